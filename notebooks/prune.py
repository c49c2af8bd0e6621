"""A classifier of torchvision and a folder of images in, a smaller network out: what notebook 12 does, from the shell.

Stages: plan, prune, retrain, write. What is done is kept in OUT/work: the same command goes on after a kill, and ends
on a CPU with the same network, bit for bit, as if it had not been stopped.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import platform
import shutil
import time
import warnings
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import sensitivity
import torch
import torchvision
from torch import nn
from training import Normalise, Training, evaluate, fit, renew_statistics
from training.data import ImageData, device_name, load, resolve_device

from sppkit import __version__, cost, cp, portable, state
from sppkit.compact import compact
from sppkit.graph import fold
from sppkit.plan import make_plan
from sppkit.pruner import Pruner
from sppkit.timing import measure

UPDATES = 200  # of SPP's probabilities in the steps given; most plans are reached earlier
TRIED = 5  # training steps that are timed before the start


@dataclass(frozen=True)
class Job:
    """What decides the result; kept in OUT/work, and compared when a run goes on."""

    model: str
    weights: str
    data: str
    method: str
    flop_ratio: float
    image_size: int = 224
    steps: int = 20_000
    retrain_steps: int = 10_000
    lr: float = 0.01
    batch_size: int = 64
    images: int = 1_000
    rule: str = "uniform"
    ridge: float = 0.01
    new_head: bool = False
    seed: int = 0

    def training(self, steps: int, seed: int) -> Training:
        rates: dict[str, Any] = {"lr": self.lr, "weight_decay": 1e-4, "schedule": "cosine", "flip": True}
        return Training(steps=steps, batch_size=self.batch_size, seed=self.seed + seed, **rates)


HELP = {
    "model": "a classifier of torchvision.models, such as resnet50",
    "weights": "a .safetensors file, a name such as IMAGENET1K_V2 (fetched by torchvision), or none: random",
    "data": "folder of images: train/ and val/ with a folder a class, or class folders alone",
    "method": "spp: columns, while it trains; cp: channels, at once",
    "flop_ratio": "convolution multiply-accumulates, dense over pruned",
    "image_size": "pixels of a side",
    "steps": "training steps in which SPP prunes",
    "retrain_steps": "training steps after pruning",
    "lr": "learning rate at the start, falling to 0 by a cosine",
    "images": "training images that CP looks at",
    "rule": "of CP's widths: uniform, or error, the same in every layer (ahead on CIFAR-10; wants thousands of images)",
    "ridge": "of CP's refit, towards the weights as they were",
    "new_head": "a fresh last layer, for the classes of the folder",
}


def main(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """`python -m sppkit prune`."""
    for field in fields(Job):
        name, text = f"--{field.name.replace('_', '-')}", HELP.get(field.name)
        if field.name == "data":
            continue  # of every command
        if isinstance(field.default, bool):
            parser.add_argument(name, action="store_true", help=text)
        elif isinstance(field.default, int | float):
            parser.add_argument(
                name, type=type(field.default), default=field.default, help=f"{text or ''} ({field.default})"
            )
        else:
            kind = float if field.name == "flop_ratio" else str
            choices = {"method": ("spp", "cp"), "rule": ("uniform", "error")}.get(field.name)
            default = None if field.default is MISSING else field.default
            parser.add_argument(name, type=kind, required=default is None, default=default, choices=choices, help=text)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the results; the same command goes on there"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dry-run", action="store_true", help="say what it costs and stop")
    options = parser.parse_args(arguments)
    if options.data is None:
        raise ValueError(f"--data is missing: {HELP['data']}")
    given = {field.name: getattr(options, field.name) for field in fields(Job)} | {"data": str(options.data)}
    prune(Job(**given), options.out, device=resolve_device(options.device), dry=options.dry_run)
    return 0


def prune(job: Job, out: Path, *, device: torch.device, dry: bool = False) -> dict[str, Any] | None:
    """Run a job to its end, or go on with it, and return the summary; None if dry."""
    if not job.flop_ratio > 1:
        raise ValueError(f"--flop-ratio {job.flop_ratio} must be above 1; 2 means half the multiply-accumulates")
    images = load(job.data, size=job.image_size, device=device)
    dense = network_of(job, len(images.classes)).to(device)
    announce(job, dense, images, out)
    if dry:
        return None
    claim(job, out)
    if (out / "summary.json").exists():
        say(f"{out} is done already; its summary.json has the numbers")
        return dict(json.loads((out / "summary.json").read_text()))
    work = out / "work"
    accuracy = {"dense": evaluate(dense, images, job.training(1, 0))}
    say(f"dense: {accuracy['dense']:.2f} % of {len(images.test):,} validation images")
    small, accuracy["pruned"] = (by_channels if job.method == "cp" else by_columns)(job, dense, images, work)
    accuracy["retrained"] = evaluate(small, images, job.training(1, 0))
    summary = write(job, dense, small, images, accuracy, out)
    shutil.rmtree(work / "stages", ignore_errors=True)
    return summary


def claim(job: Job, out: Path) -> None:
    """Make the folder this job's; ValueError if it is another's."""
    path, settings = out / "work" / "settings.json", asdict(job) | {"weights_sha256": digest(job.weights)}
    if path.exists():
        theirs = json.loads(path.read_text())
        if other := [name for name in settings if theirs.get(name) != settings[name]]:
            was, now = theirs.get(other[0]), settings[other[0]]
            raise ValueError(f"{str(out)!r} is of a run with {other[0]}={was!r}, not {now!r}; give another --out")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{str(out)!r} holds other files; give a folder that is empty or new as --out")
    state.write_bytes(path, json.dumps(settings, indent=1).encode())


def digest(weights: str) -> str | None:
    return hashlib.sha256(Path(weights).read_bytes()).hexdigest() if Path(weights).is_file() else None


def network_of(job: Job, classes: int) -> nn.Module:
    """The network with its weights. ValueError for what cannot be had. No pickle is read but torchvision's own."""
    known = torchvision.models.list_models(module=torchvision.models)
    if job.model not in known:
        near = [name for name in known if name[:3] == job.model[:3]] or known[:5]
        raise ValueError(f"--model {job.model!r} is no classifier of torchvision.models; near it are {', '.join(near)}")
    path, torch_seed = Path(job.weights), torch.random.get_rng_state()
    torch.manual_seed(job.seed)
    try:
        if path.suffix in (".pt", ".pth", ".bin", ".pkl"):
            way = "safetensors.torch.save_file(torch.load(PATH, weights_only=True), 'weights.safetensors')"
            raise ValueError(f"--weights {job.weights!r} may be a pickle, which is never read; write it anew: {way}")
        if path.suffix == ".safetensors":
            network = torchvision.models.get_model(job.model, num_classes=_classes(path, classes))
            network.load_state_dict(safetensors.torch.load_file(path))
        elif job.weights == "none":
            network = torchvision.models.get_model(job.model, num_classes=classes)
        else:
            network = torchvision.models.get_model(job.model, weights=job.weights)
    except (OSError, RuntimeError, KeyError, safetensors.SafetensorError) as error:
        raise ValueError(f"--weights {job.weights!r} cannot be read into {job.model!r}: {error}") from error
    finally:
        rest = torch.random.get_rng_state()
        torch.random.set_rng_state(torch_seed)
    heads = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not heads:
        raise ValueError(f"--model {job.model!r} does not end in a linear layer, so its classes cannot be told")
    name, head = heads[-1]
    if head.out_features != classes:
        if not job.new_head:
            found = f"{head.out_features} classes and the folder {classes}"
            raise ValueError(f"--weights {job.weights!r} has {found}; --new-head starts the last layer anew")
        torch.random.set_rng_state(rest)
        network.set_submodule(name, nn.Linear(head.in_features, classes))
        torch.random.set_rng_state(torch_seed)
    return network


def _classes(path: Path, otherwise: int) -> int:
    """Rows of the last matrix in a file of weights: the classes of its head."""
    if not path.is_file():
        raise OSError(f"there is no file {str(path)!r}")
    with safetensors.safe_open(path, "pt") as file:
        matrices = [name for name in file.keys() if len(file.get_slice(name).get_shape()) == 2]  # noqa: SIM118
        return int(file.get_slice(matrices[-1]).get_shape()[0]) if matrices else otherwise


def announce(job: Job, dense: nn.Module, images: ImageData, out: Path) -> None:
    """What is going to happen and about how long it takes, from a few steps of a copy."""
    example = prepared(images, 1)
    costs = cost.summary(dense, example)
    say(f"{job.model}: {costs['conv_macs'] / 1e6:.0f} million MACs in convolutions, {costs['parameters']:,} parameters")
    say(f"{len(images.train):,} training and {len(images.test):,} validation images, {len(images.classes)} classes")
    if job.method == "spp":
        plan = make_plan(dense, example, flop_ratio=job.flop_ratio)
        say(f"plan: {sum(plan.targets.values()):,} of {plan.groups.count:,} columns go, FLOP ratio {plan.reached:.2f}")
    else:
        count = len(cp.widths(fold(dense)[0], example, job.flop_ratio))  # or an error that says how far it can go
        say(f"plan: channels of {count} convolutions, FLOP ratio {job.flop_ratio:g} or as near as can be")
    steps = job.retrain_steps + (job.steps if job.method == "spp" else 0)
    if len(images.train) < job.batch_size:
        raise ValueError(f"--batch-size {job.batch_size} is above the {len(images.train)} training images")
    each = max(tried(job, dense, images, 2 * TRIED) - tried(job, dense, images, TRIED), 1e-4) / TRIED
    say(f"{steps:,} training steps of {each:.2f} s, {steps * each / 60:.0f} minutes on {device_name(example.device)}")
    say(f"writes {out / 'network.safetensors'}, network.onnx and summary.json")


def prepared(images: ImageData, count: int) -> torch.Tensor:
    """The first training images as the network reads them, (count, 3, H, W)."""
    return Normalise.of(images.train, "channel")(images.train.images[:count])


def tried(job: Job, dense: nn.Module, images: ImageData, steps: int) -> float:
    """Seconds of some training steps of a copy."""
    begin = time.monotonic()
    fit(copy.deepcopy(dense), images, job.training(steps, 9))
    return time.monotonic() - begin


def by_channels(job: Job, dense: nn.Module, images: ImageData, work: Path) -> tuple[nn.Module, float]:
    """CP, then training; and the accuracy between."""
    done = work / "stages" / "pruned.safetensors"
    if not done.exists():
        generator = torch.Generator().manual_seed(job.seed)
        drawn = torch.randperm(len(images.train), generator=generator)[: job.images].to(images.train.images.device)
        few = Normalise.of(images.train, "channel")(images.train.images[drawn])
        small, table = cp.channel_prune(dense, few, keep=widths(job, dense, few), ridge=job.ridge, seed=job.seed)
        say(table[["layer", "channels", "kept", "error_before", "error"]].round(3).to_string(index=False))
        portable.save(small, done)
    # from the file in any case, so that a run that goes on is the same
    small = portable.load(done).to(images.train.images.device)
    between = evaluate(small, images, job.training(1, 0))
    say(f"pruned: {between:.2f} %")
    fit(small, images, job.training(job.retrain_steps, 1), checkpoint=work / "stages" / "retrain.safetensors")
    return small, between


def widths(job: Job, dense: nn.Module, few: torch.Tensor) -> dict[str, int]:
    """Input channels that stay in each convolution."""
    folded = fold(dense)[0]
    if job.rule == "uniform":
        return cp.widths(folded, few[:1], job.flop_ratio)
    return sensitivity.equal_error(folded, few[:1], sensitivity.curves(folded, few, seed=job.seed), job.flop_ratio)


def by_columns(job: Job, dense: nn.Module, images: ImageData, work: Path) -> tuple[nn.Module, float]:
    """SPP, then training with the masks that are left; and the accuracy between."""
    network, done, example = copy.deepcopy(dense), work / "stages" / "pruned.safetensors", prepared(images, 8)
    plan = make_plan(network, example[:1], flop_ratio=job.flop_ratio)
    pruner = Pruner(network, plan, interval=max(job.steps // UPDATES, 1), seed=job.seed)
    if not done.exists():
        settings = job.training(job.steps, 0)
        fit(
            network,
            images,
            settings,
            pruner=pruner,
            stop=lambda: pruner.finished,
            checkpoint=work / "stages" / "prune.safetensors",
        )
        if not pruner.finished:
            left = int((plan.table()["pruned"].sum()) - pruner.gone.sum())
            raise ValueError(f"--steps {job.steps} were too few: {left:,} columns are left to decide; raise it")
        renew_statistics(network, images, settings)
        weights = {f"network/{name}": value for name, value in network.state_dict().items()}
        state.save(done, weights | pruner.state(), {"kind": "pruned"})
    tensors, _ = state.load(done, kind="pruned")
    pruner.load_state(tensors)
    network.load_state_dict({name: tensors[f"network/{name}"] for name in network.state_dict()})
    between = evaluate(network, images, job.training(1, 0))
    say(f"pruned: {between:.2f} %, after {pruner.updates} updates")
    retrain = job.training(job.retrain_steps, 1)
    fit(network, images, retrain, pruner=pruner, checkpoint=work / "stages" / "retrain.safetensors")
    return compact(network, example), between


def write(
    job: Job, dense: nn.Module, small: nn.Module, images: ImageData, accuracy: dict[str, float], out: Path
) -> dict[str, Any]:
    """The files, and what they hold in numbers."""
    example = prepared(images, min(len(images.train), 8))
    portable.save(small, out / "network.safetensors")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's exporter warns of itself
            portable.to_onnx(copy.deepcopy(small).cpu(), out / "network.onnx", example.cpu())
    except ImportError as error:
        say(f"no ONNX: {error}")
    times = measure({"dense": dense, "pruned": small, "dense again": dense}, example, rounds=10)["median_ms"]
    costs = {name: cost.summary(network, example[:1]) for name, network in (("dense", dense), ("pruned", small))}
    sizes = {path.name: path.stat().st_size for path in sorted(out.glob("network.*"))}
    summary = {"settings": asdict(job), "accuracy": accuracy, "validation_images": len(images.test), "cost": costs}
    summary |= {"flop_ratio": costs["dense"]["conv_macs"] / costs["pruned"]["conv_macs"], "bytes": sizes}
    summary |= {"milliseconds": times.to_dict(), "batch": len(example), "classes": list(images.classes)}
    summary |= {"device": device_name(example.device), "torch": torch.__version__, "python": platform.python_version()}
    summary |= {"torchvision": torchvision.__version__, "sppkit": __version__}
    state.write_bytes(out / "summary.json", json.dumps(summary, indent=1).encode())
    say(
        ", ".join(f"{name} {value:.2f} %" for name, value in accuracy.items())
        + f" of {len(images.test):,} images (n=1)"
    )
    say(f"FLOP ratio {summary['flop_ratio']:.2f}, {costs['pruned']['parameters']:,} parameters")
    say(f"{len(example)} images: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in times.items()))
    say(f"written: {', '.join(f'{out / name} ({size / 1e6:.1f} MB)' for name, size in sizes.items())}")
    return summary


def say(text: str) -> None:
    print(text, flush=True)
