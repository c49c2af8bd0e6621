"""What describes an experiment: the same settings and seed are the same run, recorded as one line of JSON."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

import rivals
from training import Training
from training.data import project_root

from sppkit import plan

# Of channels, see `channels`; the last four are factorisations
CHANNELS = ("cp", "fp", "scratch", "depgraph", "jaderberg", "asym", "asym3d", "3c")
SINGLE = ("layer", "draws")  # of one layer, without training, see `single`
METHODS = ("baseline", "cp", *rivals.METHODS, *CHANNELS[1:], *SINGLE)
# Settings that came after the first records: they enter a run's id only where they differ from their default
LATER = ["kind", "rule", "rounds", "A", "u", "form", "gradient", "rescale", "holdout", "baseline_seed"]
LATER += ["baseline_schedule", "retrain_schedule", "retrain_weight_decay", "masked", "ranking", "scope", "siblings"]
LATER += ["columns_of", "masks", "select", "samplers", "correct", "renew", "refit", "ridge", "norms", "layer"]
SHARED = ("batch_size", "momentum", "weight_decay", "precision", "normalise", "crop_padding", "flip")  # by all phases
RULES = (*plan.RULES, "pca", "paper", "error")


@dataclass(frozen=True)
class Experiment:
    """One network, pruned once. Steps are iterations; ratios are convolution MACs, dense over compact."""

    experiment: str
    network: str = "convnet"
    dataset: str = "digits"
    method: str = "spp"  # one of METHODS
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
    baseline_schedule: str = "step"  # or "cosine"
    baseline_seed: int = -1  # the baseline's; -1: each seed has its own
    prune_steps: int = 32_400  # all of them: once the plan is reached, the masks stay as they are
    prune_lr: float = 1e-3
    kind: str = "column"  # of the groups, see `groups`; those of CHANNELS have channels or factors
    rule: str = "uniform"  # of the plan, see `plan`; "pca": by `sensitivity.pca` on 1,000 training images;
    # "paper" and "error" of channels, see `channels.paper_rule` and `sensitivity`
    interval: int = 180  # t of SPP; the settings to `rescale` are those of `pruner.Pruner`
    rounds: int = 150
    A: float = 0.05
    u: float = 0.25
    form: str = "adaptive"
    gradient: str = "exact"
    rescale: bool = False
    masked: str = "decays"  # what happens to masked groups, see `variants`
    ranking: str = "norm"  # of the groups, see `variants`
    scope: str = "layer"  # what is ranked together, see `variants`
    siblings: float = 0.0  # see `variants`
    masks: str = "drawn"  # or "expected", see `variants`
    columns_of: str = ""  # a method: prune the groups that it chose with the same settings and seed, see `variants`
    retrain_steps: int = 25_000
    retrain_lr: float = 1e-3
    retrain_milestones: tuple[int, ...] = (15_000, 20_000)
    retrain_schedule: str = "step"
    retrain_weight_decay: float = -1.0  # -1: weight_decay
    images: int = 5_000  # CP: training images sampled
    points: int = 10  # CP: positions an image
    select: str = "lasso"  # CP: one of `choice.KNOWN`; this and the next three, as `cp.mask_channels` has them
    samplers: bool = True
    correct: bool = True
    renew: bool = False
    refit: bool = True  # CP: False leaves the channels chosen their own weights, as FP does
    ridge: float = 0.0  # CP and factorisations: of `cp.mask_channels`, of `factorise.factorise`
    norms: bool = False  # factorisations: BatchNorms are put back before retraining, see `factorise.factorise`
    layer: str = ""  # the one that "layer" and "draws" are about
    holdout: int = 0  # test on that many of the last training images, train on the others: for choices, not for results

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} must be one of {', '.join(METHODS)}")
        if self.method != "baseline" and not self.flop_ratio > 1:
            raise ValueError(f"flop_ratio={self.flop_ratio} must be above 1; 2 means half the multiply-accumulates")
        if self.method == "taylor" and self.kind != "filter":
            raise ValueError(f"method='taylor' scores filters; set kind='filter', not {self.kind!r}")
        if (self.method in SINGLE) != bool(self.layer):
            raise ValueError(f"layer={self.layer!r} with method={self.method!r}: {' and '.join(SINGLE)} need a layer")
        if self.rule not in RULES:
            raise ValueError(f"rule={self.rule!r} must be one of {', '.join(RULES)}")

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Experiment:
        """From a JSON object; an unknown name is a ValueError."""
        known = {f.name for f in fields(cls)}
        if unknown := settings.keys() - known:
            raise ValueError(f"unknown setting {min(unknown)!r}; an experiment has {', '.join(sorted(known))}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        return cls(**values)

    def baseline(self) -> Experiment:
        """The training run that this experiment starts from; pruning settings do not enter it."""
        # prune_steps as it was when the first baselines were recorded: their ids stay what they are
        solver = [f"baseline_{name}" for name in ("steps", "lr", "milestones", "schedule")]
        kept: dict[str, Any] = {
            name: getattr(self, name) for name in ("network", "dataset", "holdout", *SHARED, *solver)
        }
        kept["seed"] = self.seed if self.baseline_seed < 0 else self.baseline_seed
        return Experiment(experiment="baseline", method="baseline", flop_ratio=1.0, prune_steps=60_000, **kept)

    def phase(self, name: str) -> Training:
        """Solver settings of a phase: "baseline", "prune" or "retrain". Each shuffles with a seed of its own."""
        shared: dict[str, Any] = {key: getattr(self, key) for key in SHARED}
        if name == "retrain" and self.retrain_weight_decay >= 0:
            shared["weight_decay"] = self.retrain_weight_decay
        return Training(
            steps=getattr(self, f"{name}_steps"),
            lr=getattr(self, f"{name}_lr"),
            milestones=getattr(self, f"{name}_milestones", ()),
            schedule=getattr(self, f"{name}_schedule", "step"),
            seed=3 * self.seed + ("baseline", "prune", "retrain").index(name),
            **shared,
        )

    def _set(self, field: Field[Any]) -> bool:
        return getattr(self, field.name) != field.default

    @property
    def run_id(self) -> str:
        """Twelve hexadecimal digits of the SHA-256 of the settings; 4 and 4.0 are the same."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in LATER or self._set(f)}
        settings = {k: float(v) if isinstance(v, int) else v for k, v in given.items()}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def expand(path: Path) -> list[Experiment]:
    """The experiments of a file {"defaults": {...}, "runs": [...]}; lists of methods, ratios or seeds are a product."""
    content, found = json.loads(path.read_text()), []
    for entry in content["runs"]:
        settings = content.get("defaults", {}) | entry
        axes = [k for k, v in settings.items() if isinstance(v, list) and not k.endswith("milestones")]
        for values in itertools.product(*(settings[axis] for axis in axes)):
            found.append(Experiment.of(settings | dict(zip(axes, values, strict=True))))
    return sorted(found, key=lambda experiment: experiment.seed)  # a list cut short has whole comparisons


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, oldest first, none if it is absent; a broken line is a ValueError that names it."""
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); remove that line") from error


@dataclass(frozen=True)
class Places:
    """Where a run reads and writes; what is unfinished lies in `work` and may be thrown away."""

    root: Path = field(default_factory=project_root)  # records and baselines go below root/data
    data: Path = field(default_factory=lambda: project_root() / "data")  # data sets
    revision: str | None = None  # None: git is asked

    runs = property(lambda self: self.root / "data" / "runs")
    checkpoints = property(lambda self: self.root / "data" / "checkpoints")
    work = property(lambda self: self.root / "build" / "work")

    def find(self, experiment: Experiment) -> dict[str, Any] | None:
        """The record of a run, if it was made."""
        return next(
            (r for r in lines(self.runs / f"{experiment.experiment}.jsonl") if r["run_id"] == experiment.run_id), None
        )
