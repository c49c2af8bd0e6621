"""Runs experiments: each seed's own baseline, pruning, retraining, compacting, and one record at the end."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sppkit import cost, cp, networks, state
from sppkit.batches import Normalise
from sppkit.compact import compact
from sppkit.data import ImageData, load
from sppkit.pruner import Pruner, targets
from sppkit.records import Experiment, Places
from sppkit.train import OutOfTime, evaluate, fit

Pruned = tuple[nn.Module, Pruner | None, dict[str, Any]]  # network, its masks, and notes for the record


def run(
    experiment: Experiment, data: ImageData, places: Places | None = None, *, deadline: float | None = None
) -> dict[str, Any]:
    """Run one experiment, or return its record if it is there already. Raises OutOfTime at the deadline.

    Accuracies are in % of the test images, acc_final that of the compact network; seconds of pruning and retraining.
    """
    places = places or Places()
    if (found := places.find(experiment)) is not None:
        return found
    network, base = baseline(experiment, data, places, deadline=deadline)
    if experiment.method == "baseline":
        return base
    example = Normalise.of(data.train, experiment.normalise)(data.test.images[:64])  # (64, 3, H, W)
    dense, settings, work = cost.summary(network, example), experiment.phase("retrain"), places.work / experiment.run_id
    pruned, pruner, notes = METHODS[experiment.method](network, data, experiment, work, deadline)
    history = fit(pruned, data, settings, pruner=pruner, checkpoint=work / "retrain.safetensors", deadline=deadline)
    small = compact(pruned, example)
    left = cost.summary(small, example)
    if pruner is not None and experiment.seed == 0:  # one seed's trajectory is enough for the notebooks' pictures
        layers = {name: [part.start, part.stop] for name, part in pruner.slices.items()}
        trace = (torch.stack(pruner.trace) * 255).round().to(torch.uint8)  # (updates, groups) in 255ths
        about = {"kind": "trace", "layers": layers, "interval": pruner.interval}
        state.save(places.runs / "traces" / f"{experiment.run_id}.safetensors", {"probability": trace}, about)
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
        "notes": notes,
    }
    record = _record(experiment, data, places, results)
    for path in work.glob("*.safetensors"):
        path.unlink()
    return record


def baseline(
    experiment: Experiment, data: ImageData, places: Places, *, deadline: float | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The seed's own trained network and its record, from data/checkpoints/ or trained now."""
    base = experiment.baseline()
    network = networks.create(base.network, classes=len(data.classes), seed=base.seed).to(data.train.images.device)
    name = f"{base.network}-{Path(base.dataset).name}-seed{base.seed}-{base.run_id}.safetensors".replace("/", "-")
    path, found, settings = places.checkpoints / name, places.find(base), base.phase("baseline")
    begin = time.monotonic()
    if path.exists():
        trained_on = state.load_network(network, path).get("image_size", data.image_size)
        if trained_on != data.image_size:
            raise ValueError(f"{path} was trained on {trained_on}-pixel images, not {data.image_size}; move it away")
    else:
        fit(network, data, settings, checkpoint=places.work / name, deadline=deadline)
        state.save_network(network, path, name=base.network, classes=list(data.classes), image_size=data.image_size)
    identity = state.network_id(network)
    if found is None:
        accuracies = dict.fromkeys(("acc_baseline", "acc_pruned", "acc_final"), evaluate(network, data, settings))
        results = {"flop_ratio": 1.0, **accuracies, "baseline_id": identity, "steps": base.baseline_steps}
        found = _record(base, data, places, results | {"seconds": round(time.monotonic() - begin, 1)})
    if found["baseline_id"] != identity:
        raise ValueError(f"{path} is not the network that its record describes; restore the file or delete both")
    return network, found


def _spp(network: nn.Module, data: ImageData, plan: Experiment, work: Path, deadline: float | None) -> Pruned:
    """Masks by SPP until every layer is at its target; retrained with the masks that are left."""
    pruner = Pruner(network, targets(network, flop_ratio=plan.flop_ratio), interval=plan.interval, seed=plan.seed)
    done, settings = work / "pruned.safetensors", plan.phase("prune")
    if done.exists():  # the run was stopped while it retrained
        tensors, description = state.load(done, kind="pruned")
        pruner.load_state(tensors)
        network.load_state_dict({name: tensors[f"network/{name}"] for name in network.state_dict()})
        return network, pruner, description["notes"]
    limits: dict[str, Any] = {"checkpoint": work / "prune.safetensors", "deadline": deadline}
    history = fit(network, data, settings, pruner=pruner, stop=lambda: pruner.finished, **limits)
    table, last = pruner.table(), history.iloc[-1]
    if not pruner.finished:
        raise RuntimeError(f"{settings.steps} steps were too few to prune; raise prune_steps. So far:\n{table}")
    notes = {"steps": int(last["step"]), "seconds": last["seconds"], "acc_pruned": evaluate(network, data, settings)}
    notes |= {"updates": pruner.updates, "recovered": int(table["recovered"].sum())}
    weights = {f"network/{name}": value for name, value in network.state_dict().items()}
    state.save(done, weights | pruner.state(), {"kind": "pruned", "notes": notes})
    return network, pruner, notes


def _cp(network: nn.Module, data: ImageData, plan: Experiment, work: Path, deadline: float | None) -> Pruned:
    """Channels by LASSO and least squares from training images; compact at once, retrained as a smaller network."""
    begin, seed = time.monotonic(), plan.seed
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    chosen = data.train.images[order[: plan.images].to(data.train.images.device)]
    images = Normalise.of(data.train, plan.normalise)(chosen)
    masked, table = cp.channel_prune(network, images, flop_ratio=plan.flop_ratio, points=plan.points, seed=seed)
    accuracy = evaluate(masked, data, plan.phase("retrain"))
    notes = {"seconds": time.monotonic() - begin, "acc_pruned": accuracy, "layers": table.to_dict("records")}
    return compact(masked, images[:64]), None, notes


METHODS: dict[str, Callable[[nn.Module, ImageData, Experiment, Path, float | None], Pruned]] = {"spp": _spp, "cp": _cp}


def run_all(
    experiments: Iterable[Experiment], places: Places, *, device: torch.device, minutes: float | None = None
) -> Iterator[dict[str, Any]]:
    """Run experiments in order and yield each record; ends early at the time limit, to be called again."""
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    images = cache(lambda dataset: load(dataset, root=places.data, device=device))
    try:
        for experiment in experiments:
            yield run(experiment, images(experiment.dataset), places, deadline=deadline)
    except OutOfTime as error:
        print(f"time is up: {experiment.run_id} {error}; run the same command again to go on")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture and torch's thread count."""
    cpu = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu


def revision() -> str:
    """The git revision of the source, with "-dirty" where files differ from it; "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
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
    state.append_line(places.runs / f"{plan.experiment}.jsonl", json.dumps(record))
    return record
