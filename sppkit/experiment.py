"""Experiments as records: settings in, one JSON line out.

An `Experiment` is flat and complete: the same settings and seed mean the same run. `run` trains or loads the seed's
own baseline, prunes it, retrains it, makes it compact and appends the record to a file of data/runs/. Figures,
tables and the README are drawn from those lines alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from sppkit import cost, cp, networks, state
from sppkit.compact import compact
from sppkit.batches import Normalise
from sppkit.data import ImageData, load
from sppkit.pruner import Pruner, targets
from sppkit.train import OutOfTime, Training, evaluate, fit


@dataclass(frozen=True)
class Experiment:
    """One network, pruned once. Steps are iterations; ratios are convolution MACs, dense over compact."""

    experiment: str
    network: str = "convnet"
    dataset: str = "digits"
    method: str = "spp"  # "baseline", "spp" or "cp"
    flop_ratio: float = 2.0  # target
    seed: int = 0
    batch_size: int = 100
    momentum: float = 0.9
    weight_decay: float = 0.004
    precision: str = "float32"
    normalise: str = "mean_image"
    crop_padding: int = 0
    flip: bool = False
    baseline_steps: int = 70_000
    baseline_lr: float = 1e-3
    baseline_milestones: tuple[int, ...] = (60_000, 65_000)
    prune_steps: int = 60_000  # at most; SPP stops when every layer is at its target
    prune_lr: float = 1e-3
    interval: int = 180  # t of SPP
    retrain_steps: int = 25_000
    retrain_lr: float = 1e-3
    retrain_milestones: tuple[int, ...] = (15_000, 20_000)
    images: int = 5_000  # CP: training images sampled
    points: int = 10  # CP: positions an image

    def __post_init__(self) -> None:
        if self.method not in ("baseline", *METHODS):
            raise ValueError(f"method={self.method!r} must be 'baseline' or one of {', '.join(METHODS)}")
        if self.method != "baseline" and not self.flop_ratio > 1:
            raise ValueError(
                f"flop_ratio={self.flop_ratio} must be above 1; 2 means half the multiply-accumulates"
            )

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Experiment:
        """From a JSON object; an unknown name is a ValueError."""
        known = {f.name for f in fields(cls)}
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r}; an experiment has {', '.join(sorted(known))}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})

    def baseline(self) -> Experiment:
        """The training run that this experiment starts from; pruning settings do not enter it."""
        shared = (
            "network",
            "dataset",
            "seed",
            "batch_size",
            "momentum",
            "weight_decay",
            "precision",
            "normalise",
        )
        shared += ("crop_padding", "flip", "baseline_steps", "baseline_lr", "baseline_milestones")
        kept = {name: getattr(self, name) for name in shared}
        return Experiment(experiment="baseline", method="baseline", flop_ratio=1.0, **kept)

    def phase(self, name: str) -> Training:
        """Solver settings of a phase: "baseline", "prune" or "retrain". Each shuffles with a seed of its own."""
        names = ("batch_size", "momentum", "weight_decay", "precision", "normalise", "crop_padding", "flip")
        return Training(
            steps=getattr(self, f"{name}_steps"),
            lr=getattr(self, f"{name}_lr"),
            milestones=getattr(self, f"{name}_milestones", ()),
            seed=3 * self.seed + ("baseline", "prune", "retrain").index(name),
            **{key: getattr(self, key) for key in names},
        )

    @property
    def run_id(self) -> str:
        """Twelve hexadecimal digits of the SHA-256 of the settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def project_root() -> Path:
    """The first of the working directory and its parents that holds data/runs; else the working directory."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "data" / "runs").is_dir()), here)


@dataclass(frozen=True)
class Places:
    """Where a run reads and writes; `work` holds unfinished runs and may be thrown away."""

    data: Path = field(default_factory=lambda: project_root() / "data")
    runs: Path = field(default_factory=lambda: project_root() / "data" / "runs")
    checkpoints: Path = field(default_factory=lambda: project_root() / "data" / "checkpoints")
    work: Path = field(default_factory=lambda: project_root() / "build" / "work")
    revision: str | None = None  # asked of git where it is None

    @classmethod
    def of(cls, profile: str) -> Places:
        """For a notebook: data from data/, everything it writes under build/, apart from the recorded runs."""
        if profile not in ("quick", "paper"):
            raise ValueError(f"profile={profile!r} must be 'quick' or 'paper'")
        own = project_root() / "build" / profile
        return cls(runs=own / "runs", checkpoints=own / "checkpoints", work=own / "work")

    def records(self, name: str) -> list[dict[str, Any]]:
        """All records of an experiment's file, oldest first; a broken line is a ValueError that names it."""
        path = self.runs / f"{name}.jsonl"
        found = []
        for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error}); remove that line") from error
        return found


def run(
    experiment: Experiment, data: ImageData, places: Places | None = None, *, deadline: float | None = None
) -> dict[str, Any]:
    """Run one experiment, or return its record if it is there already. Raises OutOfTime at the deadline."""
    places = places or Places()
    for record in places.records(experiment.experiment):
        if record["run_id"] == experiment.run_id:
            return record
    begin = time.monotonic()
    network, baseline_record = baseline(experiment, data, places, deadline=deadline)
    if experiment.method == "baseline":
        return baseline_record
    dense = networks.create(experiment.network, classes=len(data.classes)).to(data.train.images.device)
    example = Normalise.of(data.train, experiment.normalise)(data.test.images[:64])  # (64, 3, H, W)
    work = places.work / experiment.run_id
    pruned, pruner, notes = METHODS[experiment.method](network, data, experiment, work, deadline)
    acc_pruned = notes.pop("acc_pruned", None) or evaluate(pruned, data, experiment.phase("retrain"))
    settings = experiment.phase("retrain")
    fit(pruned, data, settings, pruner=pruner, checkpoint=work / "retrain.safetensors", deadline=deadline)
    small = compact(pruned, example)
    sizes = {"dense": cost.summary(dense, example), "compact": cost.summary(small, example)}
    record = {
        **_header(experiment, data, places),
        "flop_ratio": sizes["dense"]["conv_macs"] / sizes["compact"]["conv_macs"],
        "flop_ratio_whole": sizes["dense"]["macs"] / sizes["compact"]["macs"],
        "parameter_ratio": sizes["dense"]["parameters"] / sizes["compact"]["parameters"],
        "acc_baseline": baseline_record["acc_final"],
        "acc_pruned": acc_pruned,
        "acc_final": evaluate(small, data, settings),
        "baseline_id": baseline_record["baseline_id"],
        "steps": notes.pop("prune_steps", 0) + experiment.retrain_steps,
        "notes": notes,
        "seconds": round(time.monotonic() - begin, 1),
    }
    if pruner is not None and experiment.seed == 0:
        _save_trace(pruner, experiment, places)
    _append(record, experiment, places)
    for path in work.glob("*.safetensors"):
        path.unlink()
    return record


def baseline(
    experiment: Experiment, data: ImageData, places: Places, *, deadline: float | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The seed's own trained network and its record, from data/checkpoints/ or trained now."""
    base = experiment.baseline()
    network = networks.create(base.network, classes=len(data.classes), seed=base.seed)
    network.to(data.train.images.device)
    name = f"{base.network}-{Path(base.dataset).name}-seed{base.seed}-{base.run_id}".replace("/", "-")
    path = places.checkpoints / f"{name}.safetensors"
    found = [r for r in places.records(base.experiment) if r["run_id"] == base.run_id]
    if path.exists():
        state.load_network(network, path)
        if found and found[-1]["baseline_id"] != state.network_id(network):
            raise ValueError(
                f"{path} is not the network that its record describes; restore the file or delete both"
            )
        if found:
            return network, found[-1]
    begin = time.monotonic()
    settings = base.phase("baseline")
    if not path.exists():
        fit(network, data, settings, checkpoint=places.work / f"{name}.safetensors", deadline=deadline)
        state.save_network(network, path, name=base.network, classes=list(data.classes), run_id=base.run_id)
    accuracy = evaluate(network, data, settings)
    record = {
        **_header(base, data, places),
        "flop_ratio": 1.0,
        "acc_baseline": accuracy,
        "acc_pruned": accuracy,
        "acc_final": accuracy,
        "baseline_id": state.network_id(network),
        "steps": base.baseline_steps,
        "notes": {},
        "seconds": round(time.monotonic() - begin, 1),
    }
    _append(record, base, places)
    return network, record


Pruned = tuple[nn.Module, Pruner | None, dict[str, Any]]


def _spp(
    network: nn.Module, data: ImageData, experiment: Experiment, work: Path, deadline: float | None
) -> Pruned:
    """Masks by SPP until every layer is at its target; retrained with the masks that are left."""
    goals = targets(network, flop_ratio=experiment.flop_ratio)
    pruner = Pruner(network, goals, interval=experiment.interval, seed=experiment.seed)
    done = work / "pruned.safetensors"
    if done.exists():  # the run was stopped while it retrained
        tensors, notes = state.load(done, kind="pruned")
        pruner.load_state(tensors)
        network.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("n/")})
        return network, pruner, {k: v for k, v in notes.items() if k not in ("kind", "schema")}
    settings = experiment.phase("prune")
    history = fit(
        network,
        data,
        settings,
        pruner=pruner,
        stop=lambda: pruner.finished,
        checkpoint=work / "prune.safetensors",
        deadline=deadline,
    )
    if not pruner.finished:
        raise RuntimeError(
            f"{experiment.prune_steps} steps were not enough: {pruner.table().to_dict('records')}; raise prune_steps"
        )
    notes = {
        "prune_steps": int(history["step"].iloc[-1]),
        "updates": pruner.updates,
        "recovered": int(pruner.table()["recovered"].sum()),
        "acc_pruned": evaluate(network, data, settings),
    }
    weights = {f"n/{name}": value for name, value in network.state_dict().items()}
    state.save(done, weights | pruner.state(), {"kind": "pruned", **notes})
    return network, pruner, notes


def _cp(
    network: nn.Module, data: ImageData, experiment: Experiment, work: Path, deadline: float | None
) -> Pruned:
    """Channels by LASSO and least squares from training images; compact at once, retrained as a smaller network."""
    generator = torch.Generator().manual_seed(experiment.seed)
    chosen = torch.randperm(len(data.train), generator=generator)[: experiment.images]
    normalise = Normalise.of(data.train, experiment.normalise)
    images = normalise(data.train.images[chosen.to(data.train.images.device)])
    masked, table = cp.channel_prune(
        network, images, flop_ratio=experiment.flop_ratio, points=experiment.points, seed=experiment.seed
    )
    return compact(masked, images[:64]), None, {"layers": json.loads(table.to_json(orient="records"))}


METHODS: dict[str, Callable[[nn.Module, ImageData, Experiment, Path, float | None], Pruned]] = {
    "spp": _spp,
    "cp": _cp,
}


def expand(path: Path) -> Iterator[Experiment]:
    """The experiments of a list: {"defaults": {...}, "runs": [...]}; a list of methods, ratios or seeds is a product.

    Seeds come outermost, so that a list cut short has whole comparisons.
    """
    content = json.loads(path.read_text())
    found = []
    for entry in content["runs"]:
        settings = {**content.get("defaults", {}), **entry}
        axes = [k for k in ("method", "flop_ratio", "seed") if isinstance(settings.get(k), list)]
        for values in itertools.product(*(settings[axis] for axis in axes)):
            found.append(Experiment.of({**settings, **dict(zip(axes, values, strict=True))}))
    yield from sorted(found, key=lambda experiment: experiment.seed)


def run_all(
    experiments: Iterable[Experiment], places: Places, *, device: torch.device, minutes: float | None = None
) -> Iterator[dict[str, Any]]:
    """Run experiments in order and yield each record; ends early at the time limit, to be called again."""
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    sets: dict[str, ImageData] = {}
    for experiment in experiments:
        if experiment.dataset not in sets:
            sets[experiment.dataset] = load(experiment.dataset, root=places.data, device=device)
        try:
            yield run(experiment, sets[experiment.dataset], places, deadline=deadline)
        except OutOfTime as error:
            print(f"time is up: {experiment.run_id} {error}; run the same command again to go on")
            return


def revision() -> str:
    """The git revision of the source, with "-dirty" where files differ from it; "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture and torch's thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def _header(experiment: Experiment, data: ImageData, places: Places) -> dict[str, Any]:
    return {
        "schema": 1,
        "run_id": experiment.run_id,
        "experiment": experiment.experiment,
        "network": experiment.network,
        "dataset": experiment.dataset,
        "test_images": len(data.test),
        "method": experiment.method,
        "flop_ratio_target": experiment.flop_ratio,
        "seed": experiment.seed,
        "settings": asdict(experiment),
        "device": device_name(data.train.images.device),
        "precision": experiment.precision,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "revision": places.revision or revision(),
    }


def _save_trace(pruner: Pruner, experiment: Experiment, places: Places) -> None:
    """Seed 0's probabilities after every update, (updates, groups) in 255ths, for the notebooks' pictures."""
    trace = (torch.stack(pruner.trace) * 255).round().to(torch.uint8)
    layers = {name: [part.start, part.stop] for name, part in pruner.slices.items()}
    path = places.runs / "traces" / f"{experiment.run_id}.safetensors"
    state.save(path, {"probability": trace}, {"kind": "trace", "layers": layers, "interval": pruner.interval})


def _append(record: dict[str, Any], experiment: Experiment, places: Places) -> None:
    state.append_line(places.runs / f"{experiment.experiment}.jsonl", json.dumps(record))
