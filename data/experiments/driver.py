"""Runs experiments: each seed's own baseline, pruning, retraining, compacting, and one record at the end."""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import subprocess
import time
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import rivals
import sensitivity
import torch
from channels import network_id, smaller
from settings import CHANNELS, SINGLE, Experiment, Places, expand, lines
from single import STUDIES
from torch import nn
from training import Normalise, OutOfTime, evaluate, evaluation, networks, renew_statistics, stepwise
from training.data import ImageData, Split, device_name, load, resolve_device
from training.loop import exhaust
from training.step import precision_flags
from variants import VariedPruner, WatchedPruner, chosen

from sppkit import cost, state
from sppkit.compact import compact
from sppkit.methods import cut
from sppkit.plan import make_plan
from sppkit.pruner import Pruner

AHEAD = 8  # steps
LARGE = 4_000_000  # parameters of a network whose checkpoint is not committed
TRACE = 4_000_000  # numbers in one recorded trace at most; longer ones are thinned out
RANKS = 1_000_000  # the same of ranks; no longer ones are kept
Stages = Generator[None, None, dict[str, Any]]
# A method's network, its masks, and notes for the record
Pruned = Generator[None, None, tuple[nn.Module, Pruner | None, dict[str, Any]]]


@dataclass(frozen=True)
class Limits:
    """How training is carried out; no result depends on it."""

    deadline: float | None = None  # `time.monotonic()` value
    fuse: bool = False
    jobs: int = 1

    def __call__(self, checkpoint: Path) -> dict[str, Any]:
        return {"checkpoint": checkpoint, "deadline": self.deadline, "fuse": self.fuse}

    def check(self, what: str) -> None:
        """OutOfTime before something that cannot be interrupted."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise OutOfTime(f"{what} was not begun")


def run(
    experiment: Experiment, data: ImageData, places: Places | None = None, *, limits: Limits | None = None
) -> dict[str, Any]:
    """Run one experiment, or return its record if it is there already. Raises OutOfTime at the deadline.

    Accuracies are in % of the test images, acc_final that of the compact network; seconds of pruning and retraining.
    """
    return exhaust(stages(experiment, data, places or Places(), limits or Limits()))


def stages(experiment: Experiment, data: ImageData, places: Places, limits: Limits) -> Stages:
    """`run` as a generator that yields after every training step."""
    # a record of a baseline does not bring its weights back
    if experiment.method != "baseline" and (found := places.find(experiment)) is not None:
        return found
    data = hold_out(data, experiment.holdout) if experiment.holdout else data
    network, base = yield from _baseline(experiment, data, places, limits)
    if experiment.method == "baseline":
        return base
    if experiment.method in SINGLE:
        return (yield from _study(network, data, experiment, places, base, limits))
    example = Normalise.of(data.train, experiment.normalise)(data.test.images[:64])  # (64, 3, H, W)
    dense, settings = cost.summary(network, example), experiment.phase("retrain")
    work = places.work / experiment.run_id / base["baseline_id"]
    method = _smaller if experiment.method in CHANNELS else _train_masks
    pruned, pruner, notes = yield from method(network, data, experiment, places, work, limits)
    history = yield from stepwise(pruned, data, settings, pruner=pruner, **limits(work / "retrain.safetensors"))
    small = compact(pruned, example, columns=pruner is not None)
    left = cost.summary(small, example)
    pruning = notes.pop("history", None)
    if pruner is not None and _traced(experiment):
        layers = {name: [part.start, part.stop] for name, part in pruner.slices.items()}
        trace, every = thinned((torch.stack(pruner.trace) * 255).round().to(torch.uint8))  # in 255ths
        about = {"kind": "trace", "layers": layers, "interval": every * pruner.interval, "shape": [*trace.shape]}
        about["history"] = {"pruning": pruning, "retraining": history.to_dict("list")}
        tensors = {"probability": packed(trace)}  # `records` unpacks it
        if isinstance(pruner, WatchedPruner):
            tensors["ranks"] = packed(pruner.ranks[: pruner.updates])
        state.save(places.runs / "traces" / f"{experiment.run_id}.safetensors", tensors, about)
    results = {
        "flop_ratio": dense["conv_macs"] / left["conv_macs"],
        "flop_ratio_whole": dense["macs"] / left["macs"],
        "parameter_ratio": dense["parameters"] / left["parameters"],
        "acc_baseline": base["acc_final"],
        "acc_pruned": notes.pop("acc_pruned"),
        "acc_final": evaluate(small, data, settings),
        "baseline_id": base["baseline_id"],
        "steps": notes.pop("steps", 0) + experiment.retrain_steps,
        "seconds": round(notes.pop("seconds") + history["seconds"].iloc[-1], 1),
        "jobs": limits.jobs,
        "notes": notes,
    }
    record = _record(experiment, data, places, results)
    for path in work.glob("*.safetensors"):
        path.unlink()
    return record


def _traced(plan: Experiment) -> bool:
    """Whether the probabilities over time are kept: where they move; one seed is enough for pictures."""
    moving = plan.method in ("spp", "gradual", "deterministic") and not plan.columns_of
    return moving and plan.seed == plan.holdout == 0


def baseline(
    experiment: Experiment, data: ImageData, places: Places, *, limits: Limits | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The seed's own trained network and its record, from data/checkpoints/ or trained now."""
    return exhaust(_baseline(experiment, data, places, limits or Limits()))


def _is_large(network: nn.Module) -> bool:
    """Whether a checkpoint is too large to be committed."""
    return sum(p.numel() for p in network.parameters()) > LARGE


def _baseline(
    experiment: Experiment, data: ImageData, places: Places, limits: Limits
) -> Generator[None, None, tuple[nn.Module, dict[str, Any]]]:
    """The network, and the record that has its hash. It is trained anew where its file is not there.

    Files of large ones, in build/, and of held-out ones are not committed, and training on a GPU does not end in the
    same weights twice, so such a baseline can have several records.
    """
    base = experiment.baseline()
    network = networks.create(base.network, classes=len(data.classes), seed=base.seed).to(data.train.images.device)
    name = f"{base.network}-{Path(base.dataset).name}-seed{base.seed}-{base.run_id}.safetensors".replace("/", "-")
    large, settings = _is_large(network), base.phase("baseline")
    path = (places.root / "build" / "baselines" if large else places.checkpoints) / name
    begin, size, there = time.monotonic(), len(data.train.images[0]), path.exists()
    if there:
        trained_on = networks.load(network, path).get("image_size", size)
        if trained_on != size:
            raise ValueError(f"{path} was trained on {trained_on}-pixel images, not {size}; move it away")
    else:
        yield from stepwise(network, data, settings, **limits(places.work / name))
        networks.save(network, path, name=base.network, classes=list(data.classes), image_size=size)
    identity = network_id(network)
    records = [r for r in lines(places.runs / f"{base.experiment}.jsonl") if r["run_id"] == base.run_id]
    found = next((r for r in records if r["baseline_id"] == identity), None)
    if found is None and records and there and not large:
        raise ValueError(f"{path} is not the network that its record describes; restore the file or delete both")
    if found is None:
        accuracies = dict.fromkeys(("acc_baseline", "acc_pruned", "acc_final"), evaluate(network, data, settings))
        results = {"flop_ratio": 1.0, **accuracies, "baseline_id": identity, "steps": base.baseline_steps}
        found = _record(base, data, places, results | {"seconds": round(time.monotonic() - begin, 1)})
    return network, found


def make_pruner(network: nn.Module, data: ImageData, plan: Experiment) -> Pruner:
    """The pruner of an experiment's settings; TP scores on the first ten batches' worth of training images."""
    normalise = Normalise.of(data.train, plan.normalise)
    example = normalise(data.test.images[:1])
    rule = sensitivity.pca(network, normalise(data.train.images[:1000])) if plan.rule == "pca" else plan.rule
    amounts = make_plan(network, example, flop_ratio=plan.flop_ratio, kind=plan.kind, rule=rule)
    names = ("method", "interval", "rounds", "A", "u", "form", "gradient", "rescale", "seed")
    options: dict[str, Any] = {name: getattr(plan, name) for name in names}
    own = ("masked", "ranking", "scope", "siblings", "masks", "columns_of")
    plain = all(getattr(plan, name) == getattr(Experiment, name) for name in own)
    varied: dict[str, Any] = {name: getattr(plan, name) for name in (*own[:-1], "weight_decay")}
    if plan.method == "taylor":
        batches = list(islice(evaluation(data.train, normalise, plan.batch_size), 10))
        options["score"] = lambda: rivals.scores(network, amounts.groups, batches)
    if not plain:
        return VariedPruner(network, amounts, **options, **varied)
    most = plan.prune_steps // plan.interval + 1
    if _traced(plan) and most * amounts.groups.count <= RANKS:
        return WatchedPruner(network, amounts, **options, most=most)
    return Pruner(network, amounts, **options)


def thinned(trace: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Every k-th row of (updates, groups), the last among them, so that TRACE numbers are enough; and k.

    >>> thinned(torch.zeros(10, TRACE // 3, dtype=torch.uint8))[0].shape
    torch.Size([3, 1333333])
    """
    every = -(-trace.numel() // TRACE)
    return trace[(len(trace) - 1) % every :: every], every


def packed(rows: torch.Tensor) -> torch.Tensor:
    """(updates, groups) of whole numbers, compressed, as bytes."""
    return torch.frombuffer(bytearray(zlib.compress(rows.T.contiguous().cpu().numpy().tobytes(), 9)), dtype=torch.uint8)


def _train_masks(
    network: nn.Module, data: ImageData, plan: Experiment, places: Places, work: Path, limits: Limits
) -> Pruned:
    """Masks while the network trains, until the plan is reached; retrained with the masks that are left."""
    pruner, settings = make_pruner(network, data, plan), plan.phase("prune")
    done = work / "pruned.safetensors"
    if isinstance(pruner, VariedPruner) and plan.columns_of:
        pruner.choose((yield from stages(replace(plan, method=plan.columns_of, columns_of=""), data, places, limits)))
    if done.exists():  # the run was stopped while it retrained
        tensors, description = state.load(done, kind="pruned")
        pruner.load_state(tensors)
        network.load_state_dict({name: tensors[f"network/{name}"] for name in network.state_dict()})
        return network, pruner, description["notes"]
    history = yield from stepwise(network, data, settings, pruner=pruner, **limits(work / "prune.safetensors"))
    undecided = dict[str, int]()
    # these may never end (notebooks 02, 09): the likeliest groups go, and it is noted
    if not pruner.finished and (plan.form == "literal" or plan.siblings or plan.masks == "expected"):
        undecided = {"decided": int(pruner.gone.sum())}
        order, norms = 1 - pruner.probability.double().cpu().numpy(), pruner.importance().cpu().numpy()
        for part in pruner.slices.values():
            order[part][norms[part].argmax()] = float("inf")  # a layer keeps one
        pruner.remove(cut(pruner, order)[0], last=True)
    table, last = pruner.table(), history.iloc[-1]
    if not pruner.finished:
        raise RuntimeError(f"{settings.steps} steps were too few to prune; raise prune_steps. So far:\n{table}")
    notes: dict[str, Any] = {"steps": int(last["step"]), "seconds": last["seconds"], **undecided}
    notes |= {"acc_pruned": evaluate(network, data, settings), "history": history.to_dict("list")}
    notes |= {"updates": pruner.updates, "recovered": int(table["recovered"].sum()), "planned": pruner.plan.reached}
    notes["pruned"] = dict(zip(table["layer"], table["pruned"].tolist(), strict=True))
    notes["gone"] = chosen(pruner)
    if any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        renew_statistics(network, data, settings)
        notes["acc_renewed"] = evaluate(network, data, settings)
    weights = {f"network/{name}": value for name, value in network.state_dict().items()}
    state.save(done, weights | pruner.state(), {"kind": "pruned", "notes": notes})
    return network, pruner, notes


def _smaller(
    network: nn.Module, data: ImageData, plan: Experiment, places: Places, work: Path, limits: Limits
) -> Pruned:
    """A smaller network from training images, at once, by one of CHANNELS; a run that goes on makes it again.

    acc_before_refit, where a refit changes weights: of the network with the same channels and its own weights.
    """
    limits.check(f"{plan.run_id} {plan.method}")
    begin, settings = time.monotonic(), plan.phase("retrain")
    small, bare, notes = smaller(network, data, plan)
    small = small.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    seconds = time.monotonic() - begin
    notes |= {"seconds": seconds, "seconds_choice": round(seconds, 2), "acc_pruned": evaluate(small, data, settings)}
    if bare is not None:
        notes["acc_before_refit"] = evaluate(bare, data, settings)
    yield
    return small, None, notes


def _study(
    network: nn.Module, data: ImageData, plan: Experiment, places: Places, base: dict[str, Any], limits: Limits
) -> Generator[None, None, dict[str, Any]]:
    """What `single` finds in one layer, as a record without the keys of a trained network."""
    limits.check(f"{plan.run_id} {plan.method}")
    begin = time.monotonic()
    results = STUDIES[plan.method](network, data, plan)
    yield
    found = {"acc_baseline": base["acc_final"], "baseline_id": base["baseline_id"], **results}
    return _record(plan, data, places, found | {"seconds": round(time.monotonic() - begin, 1)})


def run_all(
    experiments: Iterable[Experiment],
    places: Places,
    *,
    device: torch.device,
    minutes: float | None = None,
    jobs: int = 1,
    fuse: bool = False,
) -> Iterator[dict[str, Any]]:
    """Run experiments and yield each record as it is made; ends early at the time limit, to be called again.

    jobs: how many share the GPU, each on a stream of its own, a training step of each in turn; all of one precision.
    Small networks only wait for kernel launches, so several together take less time than one after the other.
    """
    planned, deadline = list(experiments), None if minutes is None else time.monotonic() + 60 * minutes
    limits = Limits(deadline, fuse, jobs)
    undone = [e for e in planned if e.method != "baseline" and places.find(e) is None]  # the others need no baseline
    bases = {base.run_id: base for base in (e.baseline() for e in undone)}
    if jobs > 1 and len({experiment.precision == "float32" for experiment in planned}) > 1:
        raise ValueError(f"jobs={jobs} cannot mix float32 with a lower precision; run them apart, or with jobs=1")
    images = cache(lambda dataset: load(dataset, root=places.data, device=device))
    # what others need comes first: shared baselines, then runs whose columns are taken up, planned or not
    ids, taken = {e.run_id for e in planned}, [e for e in planned if e.columns_of]
    sources = {e.run_id: e for e in (replace(e, method=e.columns_of, columns_of="") for e in taken)}
    first = {e.run_id: e for e in planned if not e.columns_of} | sources
    failed = list[Exception]()
    with precision_flags(device, planned[0].phase("retrain")) if jobs > 1 and planned else nullcontext():
        for part in ([*bases.values()], [*first.values()], taken) if jobs > 1 else (planned,):
            waiting = [_named(experiment, images(experiment.dataset), places, limits) for experiment in part]
            yield from (record for record in _together(waiting, jobs, device, failed) if record["run_id"] in ids)
            if waiting:  # out of time
                break
    if failed:
        raise failed[0]


def _named(experiment: Experiment, data: ImageData, places: Places, limits: Limits) -> Stages:
    """`stages`; an error is printed with the run that it is of."""
    try:
        return (yield from stages(experiment, data, places, limits))
    except OutOfTime:
        raise
    except Exception as error:
        print(f"{experiment.run_id} {experiment.method} seed {experiment.seed} failed: {error}", flush=True)
        raise


def _together(
    waiting: list[Stages], jobs: int, device: torch.device, failed: list[Exception]
) -> Iterator[dict[str, Any]]:
    """Advance `jobs` generators in turn, each on a stream of its own, and yield what they return.

    Takes them out of `waiting`; what is left there was not finished in time. One that fails does not stop the others:
    its error goes to `failed`.
    """
    gpu, late = device.type == "cuda", ""
    slots: dict[int, Stages] = {}
    # a run that is AHEAD steps ahead of its stream is passed over, so that a slow network does not hold up the others
    marks = [[torch.cuda.Event() for _ in range(AHEAD)] if gpu and jobs > 1 else [] for _ in range(jobs)]
    steps = [0] * jobs
    streams = [torch.cuda.Stream(device) if gpu and jobs > 1 else None for _ in range(jobs)]
    while waiting or slots:
        for slot in range(jobs):
            if slot not in slots and waiting and not late:
                slots[slot] = waiting.pop(0)
            if slot not in slots or (marks[slot] and not marks[slot][steps[slot] % AHEAD].query()):
                continue
            try:
                with torch.cuda.stream(streams[slot]) if streams[slot] else nullcontext():
                    next(slots[slot])
                    if marks[slot]:
                        marks[slot][steps[slot] % AHEAD].record()
                        steps[slot] += 1
            except StopIteration as end:
                del slots[slot]
                yield end.value
            except OutOfTime as error:
                waiting.append(slots.pop(slot))
                late = str(error)
            except Exception as error:
                del slots[slot]
                failed.append(error)
        if late and not slots:
            print(f"time is up: {late}; run the same command again to go on")
            break


def main(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """`python -m sppkit run`: lists, or one experiment from settings; prints each record, 75 if time was up."""
    parser.add_argument("what", nargs="+", help="lists (data/experiments/*.json), or settings NAME=VALUE")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seed", type=int, help="only the runs of this seed, which share a baseline")
    parser.add_argument("--minutes", type=float, help="stop after this long, saved; the same command goes on")
    parser.add_argument("--jobs", type=int, default=1, help="experiments that share the GPU")
    parser.add_argument("--fuse", action="store_true", help="compile the networks (torch.compile), for speed on a GPU")
    parser.add_argument("--revision", help="recorded as the source's revision; git is asked otherwise")
    options = parser.parse_args(arguments)
    lists = [Path(text) for text in options.what if text.endswith(".json")]
    given = dict(assignment(text) for text in options.what if not text.endswith(".json"))
    if lists and given:
        raise ValueError(f"give lists or settings, not both (found {next(iter(given))}= beside {lists[0]})")
    planned = [e for path in lists for e in expand(path)] or [Experiment.of({"experiment": "own", **given})]
    planned = [e for e in planned if options.seed in (None, e.seed)]
    places, done = Places(options.root, options.data or options.root / "data", options.revision), 0
    how = {"minutes": options.minutes, "jobs": options.jobs, "fuse": options.fuse}
    for done, r in enumerate(run_all(planned, places, device=resolve_device(options.device), **how), 1):
        what = f"{r['run_id']} {r['network']} {r['method']} seed {r['seed']}: "
        if r["method"] in SINGLE:
            what += f"{r['layer']}, {len(r['rows'])} rows"
        else:
            steps = " -> ".join(f"{r[f'acc_{name}']:.2f}" for name in ("baseline", "pruned", "final"))
            what += f"FLOP ratio {r['flop_ratio']:.2f}, {steps} %"
        print(f"{done}/{len(planned)} {what}, {r['seconds']:.0f} s", flush=True)
    return 0 if done == len(planned) else 75  # 75: stopped at the time limit, call again


def assignment(text: str) -> tuple[str, Any]:
    """A setting, NAME=VALUE; a value that is no Python literal is text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is neither a list (*.json) nor NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def append_line(path: Path, line: str) -> None:
    """Append one line, flushed to the disk; a last line that was cut short is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def hold_out(data: ImageData, count: int) -> ImageData:
    """The last `count` training images as the test, the others for training: what choices are made on."""
    if not 0 < count < len(data.train):
        raise ValueError(f"holdout={count} must lie in 1..{len(data.train) - 1}, the training images")
    here, there = slice(-count), slice(-count, None)
    train, test = (Split(data.train.images[part], data.train.labels[part]) for part in (here, there))
    return ImageData(data.name, train, test, data.classes)


def revision() -> str:
    """The git revision of the source, "-dirty" where files but records differ from it; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()

    try:
        changed = git("diff", "--name-only", "HEAD", "--", ":/", ":(exclude,top)data/runs")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _record(plan: Experiment, data: ImageData, places: Places, results: dict[str, Any]) -> dict[str, Any]:
    """Append the line: who and where, then the results."""
    settings = asdict(plan)
    record = {
        "schema": 1,
        "run_id": plan.run_id,
        **{name: settings[name] for name in ("experiment", "network", "dataset", "method", "seed", "precision")},
        "flop_ratio_target": plan.flop_ratio,
        "test_images": len(data.test),
        **results,
        "settings": settings,
        "device": device_name(data.train.images.device),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "python": platform.python_version(),
        "revision": places.revision or revision(),
    }
    append_line(places.runs / f"{plan.experiment}.jsonl", json.dumps(record))
    return record
