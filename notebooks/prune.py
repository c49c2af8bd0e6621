"""A classifier of torchvision and a folder of images in, a smaller network out: what notebook 12 does, as a command.

    in the folder --out    what it holds
    network.safetensors    the smaller network (`portable`), which reads images as --mean and --std prepare them
    network.onnx           the same
    summary.json           settings, versions, and numbers as they become known; "milliseconds" comes last
    work/                  checkpoints and the networks between stages, removed at the end

A stage begins with the file that the one before it wrote. So the same command goes on after a kill, and on a CPU it
ends bit for bit as if there had been none.
"""

import argparse
import copy
import hashlib
import json
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import sensitivity
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models
from tqdm import tqdm
from training import Normalise, Training, evaluate, networks, renew_statistics, stepwise, view
from training.data import ImageData, Split, device_name, load, resolve_device

from sppkit import __version__, cost, cp, portable, spp, state
from sppkit.compact import compact, convolutions
from sppkit.graph import fold
from sppkit.plan import Plan, make_plan
from sppkit.pruner import Pruner
from sppkit.timing import masked, measure

EVERY = 30.0  # seconds between two lines of progress
PART = 250  # images evaluated at once, and for a line of progress
TRIED = 3  # training steps that are timed before the start
Value = TypeVar("Value")


def option(text: str, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Job:
    """What decides the result: options of the command, of which a folder --out has one set."""

    model: str = option("a classifier of torchvision.models, such as resnet50")
    weights: str = option("a .safetensors file of its state dict, or a name such as DEFAULT, fetched by torchvision")
    data: str = option("folder of images: train/ and val/ with a folder a class, or class folders alone")
    method: str = option("spp: columns, while it trains; cp: channels, from a sample of images")
    flop_ratio: float = option("convolution multiply-accumulates, dense over pruned; 2 is half of them")
    steps: int = option("training steps of SPP at most: it ends when the plan is reached", 20_000)
    interval: int = option("steps between two updates of SPP; 0: as many as let the plan be reached", 0)
    images: int = option("training images that CP looks at", 1_000)
    rule: str = option("of CP's widths: uniform, or error, the same in every layer (ahead on CIFAR-10)", "uniform")
    ridge: float = option("of CP's refit towards the weights as they were, see notebook 12", 0.01)
    retrain_steps: int = option("training steps after pruning", 10_000)
    lr: float = option("learning rate of SPP; after pruning it falls from there to 0", 0.01)
    batch_size: int = option("images of a training step", 64)
    image_size: int = option("pixels of a side", 224)
    mean: str = option("what the weights were trained with, of red, green and blue in 0..1", "0.485,0.456,0.406")
    std: str = option("the same", "0.229,0.224,0.225")
    new_head: bool = option("draw the layer of the classes anew, and train --retrain-steps before pruning", False)
    seed: int = option("of batches, masks, samples and a new head", 0)

    def __post_init__(self) -> None:
        for name, choices in (("method", ("spp", "cp")), ("rule", ("uniform", "error"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} {getattr(self, name)!r} must be {' or '.join(choices)}")
        if not 1 < self.flop_ratio < float("inf"):
            raise ValueError(f"--flop-ratio {self.flop_ratio:g} must be above 1; 2 is half the multiply-accumulates")
        for name in ("steps", "images", "retrain_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        self.normalise("cpu")

    def training(self, steps: int, stage: int, schedule: str = "cosine") -> Training:
        """Settings of a stage; images come without the mean image, and `Ready` undoes that."""
        how: dict[str, Any] = {"weight_decay": 1e-4, "precision": "tf32", "normalise": "mean_image"}
        seed = 10 * self.seed + stage
        return Training(steps, batch_size=self.batch_size, lr=self.lr, schedule=schedule, seed=seed, **how)

    def normalise(self, device: torch.device | str) -> Normalise:
        """Images (B, H, W, 3) uint8 as the weights want them."""
        try:
            mean, std = ([float(part) for part in text.split(",")] for text in (self.mean, self.std))
            assert len(mean) == len(std) == 3
            assert min(std) > 0
        except (ValueError, AssertionError) as error:
            wanted = "three numbers with commas between them, those of std positive"
            raise ValueError(f"--mean {self.mean!r} --std {self.std!r} must each be {wanted}") from error
        return Normalise(*(torch.tensor(v, device=device).view(3, 1, 1) * 255 for v in (mean, std)))


class Ready(nn.Module):
    """A network behind the batches of `training`, images of `split` less their mean image, which it prepares anew."""

    shift: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, split: Split, job: Job) -> None:
        super().__init__()
        given, wanted = Normalise.of(split, "mean_image"), job.normalise(split.images.device)
        self.register_buffer("shift", (given.mean - wanted.mean) / wanted.std, persistent=False)  # (3, H, W)
        self.register_buffer("std", wanted.std, persistent=False)
        self.network = network
        self.train(network.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x / self.std + self.shift)


def main(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """`python -m sppkit prune`."""
    job, options = _parsed(parser, arguments)
    device = resolve_device(options.device)
    images = load(job.data, root=options.root / "data", size=job.image_size, device=device)
    path = Path(job.weights)
    made = asdict(job) | {"weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""}
    made |= {"device": str(device), "training_images": len(images.train), "validation_images": len(images.test)}
    record = taken_up(options.out, made | {"classes": list(images.classes)})
    if "milliseconds" in record:
        say(f"{options.out / 'summary.json'} is of this run, which is finished")
        return 0
    dense = dense_network(job, images).to(device)
    announce(job, dense, images, options.out)
    if not options.dry_run:
        run(job, dense, images, options.out, record)
    return 0


def _parsed(parser: argparse.ArgumentParser, arguments: list[str]) -> tuple[Job, argparse.Namespace]:
    for each in fields(Job):
        name, text, needed = each.name.replace("_", "-"), each.metadata["help"], each.default is MISSING
        if each.type is bool:
            parser.add_argument(f"--{name}", action="store_true", help=text)
        elif name != "data":  # which every command has
            text = text if needed else f"{text} (default: {each.default})"
            default = None if needed else each.default
            parser.add_argument(f"--{name}", type=each.type, required=needed, default=default, help=text)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; the same command goes on there")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dry-run", action="store_true", help="say what it will do and take, and stop")
    options = parser.parse_args(arguments)
    if options.data is None:
        raise ValueError("--data is missing: give a folder of images, train/ and val/ with a folder a class")
    given = {each.name: getattr(options, each.name) for each in fields(Job)}
    return Job(**given | {"data": str(options.data)}), options


def taken_up(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The summary so far of a run with these settings; ValueError for a folder of another, or of something else."""
    path = out / "summary.json"
    try:
        record = json.loads(path.read_bytes()) if path.exists() else {"settings": settings}
        found = record["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is not the summary of a run ({error!r}); give another --out") from error
    if not path.exists() and out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {str(out)!r} holds other files; give an empty or a new folder")
    for name, now in settings.items():
        if found.get(name) != now:
            was = f"{name}={found.get(name)!r}, here it is {now!r}"
            raise ValueError(f"--out {str(out)!r} is of a run with {was}; give the same, or another --out")
    return record


def dense_network(job: Job, images: ImageData) -> nn.Module:
    """The network with its weights, for the classes of the folder; ValueError for what does not fit."""
    known, classes = list_models(module=torchvision.models), len(images.classes)
    if job.model not in known:
        raise ValueError(f"--model {job.model!r} is not in torchvision.models; it has {', '.join(known)}")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how GoogLeNet's and Inception's weights are drawn
        torch.manual_seed(job.seed)
        network = get_model(job.model, num_classes=classes).eval()
        with torch.device("meta"):
            other = get_model(job.model, num_classes=classes + 1).state_dict()
    own, tensors = network.state_dict(), _weights(job)
    head = [name for name, tensor in own.items() if tensor.shape != other[name].shape]
    if job.new_head:
        tensors |= {name: own[name] for name in head}
    elif trained_for := {len(tensors[name]) for name in head if name in tensors} - {classes}:
        found = f"for {trained_for.pop()} classes, --data {job.data!r} has {classes}"
        raise ValueError(f"--weights {job.weights!r} is {found}; --new-head draws that layer anew and trains it")
    theirs, ours = ({k: tuple(t.shape) for k, t in each.items()} for each in (tensors, own))
    differ = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k) and not k.endswith("num_batches_tracked")]
    if differ:
        shapes = f"{theirs.get(differ[0], 'absent')} there, {ours.get(differ[0], 'absent')} in {job.model}"
        raise ValueError(f"--weights {job.weights!r}: {differ[0]!r} is {shapes} ({len(differ)} names differ)")
    network.load_state_dict(tensors)
    return network


def _weights(job: Job) -> dict[str, Tensor]:
    """The state dict: of a safetensors file, or by name from torchvision, whose files are checked by their hash."""
    path, quoted = Path(job.weights), f"--weights {job.weights!r}"
    names = [*get_model_weights(job.model).__members__]  # aliases such as DEFAULT, too
    if job.weights in names:
        try:
            found = get_model_weights(job.model)[job.weights]
            return dict(found.get_state_dict(progress=False, check_hash=True, weights_only=True))
        except (OSError, RuntimeError) as error:
            ways = "check the network, or give a .safetensors file"
            raise ValueError(f"{quoted} could not be fetched ({error}); {ways}") from error
    if not path.is_file():
        raise ValueError(f"{quoted} is neither a file nor of {', '.join(names)}, which {job.model} has")
    try:
        return safetensors.torch.load(path.read_bytes())
    except safetensors.SafetensorError as error:
        # A pickle may run code when it is read. weights_only=True is to prevent it and has had holes, so that reading
        # one is left to those who know where theirs comes from.
        way = f"safetensors.torch.save_file(torch.load({path.name!r}, weights_only=True), 'weights.safetensors')"
        raise ValueError(f"{quoted} is not a safetensors file ({error}); from a .pth that you trust: {way}") from error


def announce(job: Job, dense: nn.Module, images: ImageData, out: Path) -> None:
    """Say what will be done and about how long it takes; ValueError for what would fail hours later."""
    example = job.normalise(images.train.images.device)(images.train.images[:1])  # (1, 3, H, W)
    costs = cost.summary(dense, example)
    if layer := masked(dense):
        raise ValueError(
            f"--weights {job.weights!r} are masked already (layer {layer!r}); give those of a whole network"
        )
    with tempfile.TemporaryDirectory() as folder:
        portable.save(dense, Path(folder) / "network.safetensors")
    if getattr(dense, "aux_logits", False):
        raise ValueError(f"--model {job.model!r} has several outputs while it trains; choose one that has one")
    say(
        f"{job.model}: {costs['conv_macs'] / 1e6:,.0f} million MACs in convolutions, {costs['parameters']:,} parameters"
    )
    say(f"{len(images.train):,} training and {len(images.test):,} validation images, {len(images.classes)} classes")
    retrain = job.retrain_steps * (1 + job.new_head)
    if job.method == "spp":
        plan = make_plan(dense, example, flop_ratio=job.flop_ratio)
        interval = interval_of(job, plan)
        say(f"plan: {sum(plan.targets.values()):,} of {plan.groups.count:,} columns, FLOP ratio {plan.reached:.3f}")
        say(f"at most {job.steps:,} steps of SPP, an update every {interval}, then {job.retrain_steps:,} of training")
        each, choice = step_seconds(job, dense, images, spp=True), 0.0
        seconds = (job.steps + retrain) * each
    else:
        widths = cp.widths(fold(dense)[0], example, job.flop_ratio)
        small = stand_in(dense, widths)
        say(f"plan: channels of {len(widths)} convolutions, FLOP ratio {cost.flop_ratio(dense, small, example):.3f}")
        say(f"CP from {min(job.images, len(images.train)):,} images, then {job.retrain_steps:,} steps of training")
        each, choice = step_seconds(job, small, images), choice_seconds(job, dense, images, widths)
        seconds = choice + retrain * each
    if job.new_head:
        say(f"before that, a new head: {job.retrain_steps:,} steps of training")
    parts = f"{each:.3g} s a step" + (f", {choice:.0f} s to choose channels" if choice else "")
    say(f"about {seconds:,.0f} s at most ({parts}) on {device_name(example.device)}")
    say(f"writes {out / 'network.safetensors'}, network.onnx and summary.json")


def stand_in(dense: nn.Module, widths: Mapping[str, int]) -> nn.Module:
    """A network of these widths, whichever channels will go."""
    network = copy.deepcopy(dense)
    for name, width in widths.items():
        convolutions(network)[name].weight.data[:, width:] = 0
    return compact(network, columns=False)


def step_seconds(job: Job, network: nn.Module, images: ImageData, *, spp: bool = False) -> float:
    """Seconds of a training step of a copy, after a first one."""
    network, split = copy.deepcopy(network), images.train
    example = job.normalise(split.images.device)(split.images[:1])
    pruner = Pruner(network, make_plan(network, example, flop_ratio=job.flop_ratio)) if spp else None
    steps = stepwise(Ready(network, split, job), images, job.training(TRIED + 1, 0), pruner=pruner)
    moments = list[float]()
    for _ in range(TRIED + 1):
        next(steps)
        if split.images.is_cuda:
            torch.cuda.synchronize(split.images.device)
        moments.append(time.monotonic())
    steps.close()
    return (moments[-1] - moments[0]) / TRIED


def choice_seconds(job: Job, dense: nn.Module, images: ImageData, widths: Mapping[str, int]) -> float:
    """Seconds of CP, from one layer in the middle and few images."""
    few, layer = sample(job, images, 100), [*widths][len(widths) // 2]
    begin = time.monotonic()
    cp.mask_channels(dense, few, keep={layer: widths[layer]}, ridge=job.ridge)
    return (time.monotonic() - begin) * len(widths) * min(job.images, len(images.train)) / len(few)


def interval_of(job: Job, plan: Plan) -> int:
    """Steps between two updates of SPP; ValueError where the steps would not do.

    Where no rank changes, the number of updates is known beforehand; the default leaves half as many again.
    """
    longest, inf = max(plan.groups.sizes.values()), float("inf")
    missing = torch.tensor([longest - size for size in plan.groups.sizes.values()])  # (L,)
    rank = torch.arange(longest).expand(len(missing), -1) - missing[:, None]  # (L, N), filled up in front
    p, target = (rank < 0).float(), torch.tensor([*plan.targets.values()]) + missing
    importance, updates = rank.float().masked_fill(rank < 0, inf), 0
    while ((p == 1).sum(1) < target).any():
        p, updates = spp.advance(p, importance, target), updates + 1
    interval = job.interval or max(1, 2 * job.steps // (3 * updates))
    if job.interval < 0 or (updates - 1) * interval >= job.steps:
        needed = f"{updates} updates or so reach it, --steps {(updates - 1) * max(interval, 1) + 1} or more"
        raise ValueError(f"--steps {job.steps} with --interval {job.interval} are too few for the plan: {needed}")
    return interval


def run(job: Job, dense: nn.Module, images: ImageData, out: Path, record: dict[str, Any]) -> None:
    """All stages, of which those that are done are passed over, and the summary."""
    work, device = out / "work", images.train.images.device

    def known(name: str, find: Callable[[], Value]) -> Value:
        if name not in record:
            record[name] = find()
            state.write_bytes(out / "summary.json", json.dumps(record, indent=1).encode())
        return record[name]

    def made(path: Path, make: Callable[[], nn.Module]) -> nn.Module:
        if not path.exists():
            portable.save(make().eval(), path)
        return portable.load(path).to(device)

    def accurate(name: str, network: nn.Module) -> None:
        percent = known(f"accuracy_{name}", lambda: accuracy(job, network, images.test, images))
        say(f"{name}: {percent:.2f} % of {len(images.test):,} validation images")

    known("versions", lambda: versions() | {"device": device_name(device)})
    if job.new_head:
        path = work / "dense.safetensors"
        if not path.exists():
            train(job, dense, images, job.training(job.retrain_steps, 0), work / "head.safetensors")
            networks.save(dense, path)
        networks.load(dense.eval(), path)
    accurate("dense", dense)
    prune = by_columns if job.method == "spp" else by_channels
    small = made(work / "pruned.safetensors", lambda: prune(job, dense, images, work))
    accurate("pruned", small)
    small = made(out / "network.safetensors", lambda: retrained(job, small, images, work))
    accurate("retrained", small)
    finish(job, dense, small, images, out, known)
    shutil.rmtree(work, ignore_errors=True)


def train(
    job: Job, network: nn.Module, images: ImageData, settings: Training, path: Path, pruner: Pruner | None = None
) -> None:
    """Train with checkpoints at `path`, with a line of progress now and then; ends with the pruner, if there is one."""
    done = state.load(path, kind="training")[1]["step"] if path.exists() else 0
    few = slice(None, None, -(-len(images.test) // PART))
    few_images = Split(images.test.images[few], images.test.labels[few])
    stop = None if pruner is None else lambda: pruner.finished
    ready = Ready(network.train(), images.train, job)
    steps, told = stepwise(ready, images, settings, pruner=pruner, stop=stop, checkpoint=path), time.monotonic()
    while True:
        try:
            next(steps)
        except StopIteration as end:
            history = end.value
            break
        except FloatingPointError as error:
            raise ValueError(f"--lr {job.lr:g} is too much: {error}; give a lower one and another --out") from error
        done += 1
        if time.monotonic() - told > EVERY:
            gone = f", {int(pruner.gone.sum()):,} columns gone" if pruner else ""
            with view(pruner, "sampled") if pruner else nullcontext():
                percent = accuracy(job, network, few_images, images)
            say(f"{path.stem}: step {done:,} of {settings.steps:,}{gone}, {percent:.1f} % of {len(few_images)} images")
            told = time.monotonic()
    if len(history):
        last = history.iloc[-1]
        say(f"{path.stem}: {done:,} steps, loss {last['loss']:.3f}, {last['accuracy']:.1f} % of the training batches")


def accuracy(job: Job, network: nn.Module, split: Split, images: ImageData) -> float:
    """In % of a split, in parts, so that large images do not take much memory."""
    right = 0
    for x, y in zip(split.images.split(PART), split.labels.split(PART), strict=True):
        part = Split(x, y)
        percent = evaluate(Ready(network, part, job), ImageData("", part, part, images.classes), job.training(1, 0))
        right += round(percent * len(part) / 100)
    return 100 * right / len(split)


def sample(job: Job, images: ImageData, most: int) -> Tensor:
    """Some training images, (B, 3, H, W): a folder has them class by class, so they are drawn."""
    generator = torch.Generator().manual_seed(job.seed)
    drawn = torch.randperm(len(images.train), generator=generator)[:most].to(images.train.images.device)
    return job.normalise(drawn.device)(images.train.images[drawn])


def by_channels(job: Job, dense: nn.Module, images: ImageData, work: Path) -> nn.Module:
    """CP, with a line a layer."""
    number = count(1)

    def told(moments: Any, conv: nn.Conv2d, keep: int, **_: object) -> tuple[Tensor, float, float]:
        say(f"convolution {next(number)}: {keep} of {conv.in_channels} channels stay")
        return cp.by_lasso(moments, conv, keep)

    few = sample(job, images, job.images)
    keep = widths_of(job, dense, few)
    return cp.channel_prune(dense, few, keep=keep, select=told, ridge=job.ridge, seed=job.seed)[0]


def widths_of(job: Job, dense: nn.Module, few: Tensor) -> dict[str, int]:
    """Input channels that stay in each convolution."""
    folded = fold(dense)[0]
    if job.rule == "uniform":
        return cp.widths(folded, few[:1], job.flop_ratio)
    curves = sensitivity.curves(folded, few, seed=job.seed)
    return sensitivity.equal_error(folded, few[:1], curves, job.flop_ratio)


def by_columns(job: Job, dense: nn.Module, images: ImageData, work: Path) -> nn.Module:
    """SPP; with new means and variances for BatchNorms, which have seen masked weights only."""
    example, path = sample(job, images, 8), work / "masked.safetensors"
    settings = job.training(job.steps, 1, "step")
    if not path.exists():
        network = copy.deepcopy(dense)
        plan = make_plan(network, example, flop_ratio=job.flop_ratio)
        pruner = Pruner(network, plan, interval=interval_of(job, plan), seed=job.seed)
        train(job, network, images, settings, work / "prune.safetensors", pruner)
        if not pruner.finished:
            gone = f"{int(pruner.gone.sum()):,} of {sum(plan.targets.values()):,} columns gone"
            ways = f"give --steps {2 * job.steps} and another --out, or a smaller --interval"
            raise ValueError(f"--steps {job.steps} were too few: {pruner.updates} updates, {gone}; {ways}")
        networks.save(network, path)
    network = copy.deepcopy(dense)
    networks.load(network, path)
    if any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        renew_statistics(Ready(network, images.train, job), images, settings)
    return compact(network.eval(), example)


def retrained(job: Job, small: nn.Module, images: ImageData, work: Path) -> nn.Module:
    train(job, small, images, job.training(job.retrain_steps, 2), work / "retrain.safetensors")
    return small


def finish(
    job: Job, dense: nn.Module, small: nn.Module, images: ImageData, out: Path, known: Callable[..., Any]
) -> None:
    """ONNX, costs, bytes and milliseconds."""
    example = sample(job, images, min(job.batch_size, 32))

    def onnx() -> str:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's exporter warns of itself
                to_onnx(copy.deepcopy(small).cpu(), out / "network.onnx", example[:2].cpu())
        except (ImportError, RuntimeError) as error:  # a package is missing, or ONNX has no word for an operation
            return f"network.onnx was not written: {error}"
        return "network.onnx is written"

    def milliseconds() -> list[dict[str, Any]]:
        both = {"dense": dense, "compact": small}
        tables = [measure(both, batch, rounds=10).reset_index(names="network") for batch in (example[:1], example)]
        return [row for table in tables for row in table.to_dict("records")]

    say(known("onnx", onnx))
    costs = known("cost", lambda: {k: cost.summary(n, example) for k, n in (("dense", dense), ("compact", small))})
    ratio = known("flop_ratio", lambda: costs["dense"]["conv_macs"] / costs["compact"]["conv_macs"])
    sizes = known("bytes", lambda: {path.name: path.stat().st_size for path in sorted(out.glob("network.*"))})
    times = known("milliseconds", milliseconds)
    say(f"FLOP ratio {ratio:.2f}, " + " -> ".join(f"{costs[n]['parameters']:,}" for n in costs) + " parameters")
    for row in times:
        say(f"{row['network']}: {row['median_ms']:.1f} ms for {row['batch']} images on {row['device']}")
    say(f"written: {', '.join(f'{out / name} ({size / 1e6:.1f} MB)' for name, size in sizes.items())}, summary.json")


def to_onnx(network: nn.Module, path: Path, example: Tensor) -> None:
    """Write ONNX with any batch size, input "images", output "outputs"; ImportError without the extra `export`."""
    try:
        import onnxscript  # noqa: F401  what torch.onnx needs
    except ImportError as error:
        packages = "those of pip install 'sppkit[export]', in a checkout pip install -e '.[export]'"
        raise ImportError(f"ONNX needs more packages, {packages}") from error
    program = torch.onnx.export(
        network.eval(), (example,), input_names=["images"], output_names=["outputs"],
        dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, verbose=False,
    )  # fmt: skip
    assert program is not None
    state.write_bytes(path, program.model_proto.SerializeToString())


def versions() -> dict[str, str]:
    found = {module.__name__: str(module.__version__) for module in (torch, torchvision)}
    return found | {"sppkit": __version__, "python": platform.python_version()}


def say(text: str) -> None:
    tqdm.write(text)  # above the bar that training has in a terminal
