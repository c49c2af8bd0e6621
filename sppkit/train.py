"""One training loop for baselines, pruning and retraining.

Data, augmentation, forward and backward pass, masks and the optimiser's step work on fixed tensors of the device. On
a GPU that whole step is captured once in a CUDA graph and replayed, because small networks only wait for kernel
launches; on a CPU the same function runs as it is. A checkpoint holds everything a run depends on: resumed on a CPU,
it ends bit for bit like a run that was never stopped.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from sppkit import state
from sppkit.batches import Batches, Normalise, evaluation
from sppkit.data import ImageData
from sppkit.pruner import Pruner


class OutOfTime(Exception):
    """The deadline came before the last step; the checkpoint holds the state to go on from."""


@dataclass(frozen=True)
class Training:
    """Settings of one training run; steps are iterations, not epochs.

    schedule: "step" multiplies lr by gamma at each milestone, "cosine" goes to 0 over `steps`, "constant" stays.
    precision: "float32", "tf32" (convolutions on a GPU) or "bf16" (autocast on a GPU).
    normalise: "channel" or "mean_image" (see `sppkit.batches.Normalise`); crop_padding in pixels.
    """

    steps: int
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "step"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    label_smoothing: float = 0.0
    precision: str = "float32"
    normalise: str = "channel"
    crop_padding: int = 0
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps={self.steps} and batch_size={self.batch_size} must be at least 1")
        if self.schedule not in ("step", "cosine", "constant"):
            raise ValueError(f"schedule={self.schedule!r} must be 'step', 'cosine' or 'constant'")
        if self.precision not in ("float32", "tf32", "bf16"):
            raise ValueError(f"precision={self.precision!r} must be 'float32', 'tf32' or 'bf16'")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr={self.lr} must be positive")

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0.

        >>> Training(steps=9, lr=1.0, milestones=(3, 6)).learning_rate(6)
        0.010000000000000002
        """
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        passed = sum(step >= milestone for milestone in self.milestones) if self.schedule == "step" else 0
        return self.lr * self.gamma**passed


def fit(
    network: nn.Module,
    data: ImageData,
    settings: Training,
    *,
    pruner: Pruner | None = None,
    stop: Callable[[], bool] | None = None,
    checkpoint: Path | None = None,
    deadline: float | None = None,
    capture: bool = True,
) -> pd.DataFrame:
    """Train `network` in place and return its history, one row an epoch.

    Args:
        network: on the device of `data`.
        pruner: masks the weights at every step; updated every `pruner.interval` steps until it is finished.
        stop: asked before every update of the pruner; True ends the run before its last step.
        checkpoint: file to resume from if it exists; written at the deadline and every ten minutes.
        deadline: `time.monotonic()` value after which the run saves its checkpoint and raises `OutOfTime`.
        capture: on a GPU, replay the step as a CUDA graph; False runs it eagerly.

    The history has step (count of steps done), lr, loss, accuracy (%, on the training batches as they came) and
    seconds. Raises FloatingPointError when the loss is no longer finite, ValueError for a checkpoint of other settings.
    """
    state.check_finite(dict(network.named_parameters()), "the weights before training")
    run = _Run(network, data, settings, pruner, capture)
    history: list[dict[str, float]] = []
    first = 0
    if checkpoint is not None and checkpoint.exists():
        first, history = run.resume(checkpoint)
    before, begin = (history[-1]["seconds"] if history else 0.0), time.monotonic()
    saved = begin
    quiet = True if os.environ.get("CI") else None  # None: quiet unless a terminal is attached
    with _reproducible(data, settings, run), tqdm(total=settings.steps, initial=first, disable=quiet) as bar:
        for step in range(first, settings.steps):
            epoch, position = divmod(step, run.batches.steps_per_epoch)
            now = time.monotonic()
            if checkpoint is not None and ((deadline is not None and now > deadline) or now - saved > 600):
                run.save(checkpoint, step, history)
                saved = now
            if deadline is not None and now > deadline:
                raise OutOfTime(f"stopped at step {step} of {settings.steps}")
            if pruner is not None and step % pruner.interval == 0 and not pruner.finished:
                pruner.update()
            if stop is not None and pruner is not None and step % pruner.interval == 0 and stop():
                if position:
                    history.append(run.read(step - 1, position) | {"seconds": before + now - begin})
                break
            run.step(step, epoch, position)
            bar.update()
            if position == run.batches.steps_per_epoch - 1 or step == settings.steps - 1:
                row = run.read(step, position + 1)
                history.append({**row, "seconds": before + time.monotonic() - begin})
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return pd.DataFrame(history)


def evaluate(network: nn.Module, data: ImageData, settings: Training) -> float:
    """Accuracy in % on the test images, in evaluation mode, at the precision of `settings`."""
    training = network.training
    correct = torch.zeros((), dtype=torch.int64, device=data.test.images.device)
    with torch.inference_mode(), _precision(data, settings):
        network.eval()
        for x, y in evaluation(data.test, Normalise.of(data.train, settings.normalise)):
            correct += (network(x).argmax(1) == y).sum()
    network.train(training)
    return 100 * int(correct) / len(data.test)


class _Run:
    """The fixed tensors of a training run, and one step on them."""

    def __init__(
        self, network: nn.Module, data: ImageData, settings: Training, pruner: Pruner | None, capture: bool
    ) -> None:
        self.network, self.settings, self.pruner = network.train(), settings, pruner
        self.device = data.train.images.device
        self.capture = capture and self.device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batches = Batches(
            data.train,
            batch_size=settings.batch_size,
            seed=settings.seed,
            normalise=Normalise.of(data.train, settings.normalise),
            crop_padding=settings.crop_padding,
            flip=settings.flip,
        )
        self.epoch = -1
        self.optimizer = _optimizer(network, settings, self.device)
        if pruner is not None:
            pruner.attach(self.optimizer)
        self.totals = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, correct
        self.rate = math.nan
        self.seed: Tensor | None = None  # state of torch's default generator to go on from, for dropout

    def step(self, step: int, epoch: int, position: int) -> None:
        if epoch != self.epoch:
            self.batches.start_epoch(epoch)
            self.epoch = epoch
        self.batches.select(position)
        rate = self.settings.learning_rate(step)
        if rate != self.rate:
            self._set_rate(rate)
        if self.capture and self.graph is None:
            self._capture()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._body()

    def _body(self) -> None:
        x, y = self.batches.batch()  # (B, 3, H, W), (B,)
        if self.pruner is not None:
            self.pruner.before()
        with _autocast(self.device, self.settings):
            logits = self.network(x)  # (B, classes)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=self.settings.label_smoothing)
        loss.backward()
        if self.pruner is not None:
            self.pruner.after()
        self.optimizer.step()
        self.optimizer.zero_grad(
            set_to_none=False
        )  # a captured step needs its gradients to stay where they are
        self.totals += torch.stack((loss.detach(), (logits.argmax(1) == y).float().mean()))

    def _set_rate(self, rate: float) -> None:
        self.rate = rate
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # on a GPU: a float would be baked into the graph
                group["lr"].fill_(rate * group["lr_factor"])
            else:
                group["lr"] = rate * group["lr_factor"]

    def _capture(self) -> None:
        """Warm up on a side stream, undo what that did, then record one step."""
        mutable = [
            *self.network.parameters(),
            *self.network.buffers(),
            *self._momentum().values(),
            self.totals,
        ]
        kept = [tensor.detach().clone() for tensor in mutable]
        masks = [] if self.pruner is None else [self.pruner.generator]
        states = [(generator, generator.get_state()) for generator in (*masks, self._default_generator())]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._body()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.no_grad():
            for tensor, value in zip(mutable, kept, strict=True):
                tensor.copy_(value)
        for generator, value in states:
            generator.set_state(value)
        self.graph = torch.cuda.CUDAGraph()
        for generator in masks:
            self.graph.register_generator_state(generator)
        with torch.cuda.graph(self.graph):
            self._body()

    def _default_generator(self) -> torch.Generator:
        if self.device.type == "cuda":
            return torch.cuda.default_generators[self.device.index or 0]
        return torch.default_generator

    def _momentum(self) -> dict[str, Tensor]:
        names = {parameter: name for name, parameter in self.network.named_parameters()}
        states = self.optimizer.state.items()
        return {names[p]: s["momentum_buffer"] for p, s in states if s.get("momentum_buffer") is not None}

    def read(self, step: int, steps: int) -> dict[str, float]:
        """The epoch's row of the history; starts the sums anew."""
        loss, correct = (self.totals / steps).tolist()
        self.totals.zero_()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {loss} by step {step + 1}; lower lr={self.settings.lr} or go back to a checkpoint"
            )
        return {"step": step + 1, "lr": self.rate, "loss": loss, "accuracy": 100 * correct}

    def save(self, path: Path, step: int, history: list[dict[str, float]]) -> None:
        tensors = {f"network/{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"momentum/{name}": value for name, value in self._momentum().items()}
        tensors |= {
            f"pruner/{name}": value for name, value in (self.pruner.state() if self.pruner else {}).items()
        }
        tensors |= {"totals": self.totals, "generator": self._default_generator().get_state()}
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise FloatingPointError(
                f"weights or loss are no longer finite at step {step}; {path} was left as it was"
            )
        description = {
            "kind": "training",
            "step": step,
            "settings": asdict(self.settings),
            "history": history,
        }
        state.save(path, tensors, description)

    def resume(self, path: Path) -> tuple[int, list[dict[str, float]]]:
        tensors, description = state.load(path, kind="training")
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.settings).items()}
        if description["settings"] != settings:
            differ = [key for key in settings if settings[key] != description["settings"].get(key)]
            raise ValueError(
                f"{path} was saved with other settings ({', '.join(differ)}); delete it to start anew"
            )
        own = {f"network/{name}": value for name, value in self.network.state_dict().items()}
        own |= {f"momentum/{name}": value for name, value in self._momentum().items()}
        own |= {"totals": self.totals}
        wrong = [k for k, v in own.items() if k not in tensors or tensors[k].shape != v.shape]
        if wrong or ("pruner/trace" in tensors) != (self.pruner is not None):
            raise ValueError(
                f"{path} belongs to another network or method (first misfit: {(wrong or ['pruner'])[0]})"
            )
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(tensors[name])
        if self.pruner is not None:
            parts = {n.removeprefix("pruner/"): t for n, t in tensors.items() if n.startswith("pruner/")}
            self.pruner.load_state(parts)
        self.seed = tensors["generator"]
        return description["step"], description["history"]


def _optimizer(network: nn.Module, settings: Training, device: torch.device) -> torch.optim.SGD:
    """SGD with one parameter group for each pair of factors on learning rate and weight decay."""
    factors: dict[str, tuple[float, float]] = getattr(network, "multipliers", {})
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        groups.setdefault(factors.get(name, (1.0, 1.0)), []).append(parameter)
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
    gpu = device.type == "cuda"
    optimizer = torch.optim.SGD(
        [
            {
                "params": parameters,
                "lr": torch.tensor(settings.lr, device=device) if gpu else settings.lr,
                "lr_factor": lr_factor,
                "weight_decay": settings.weight_decay * decay_factor,
            }
            for (lr_factor, decay_factor), parameters in groups.items()
        ],
        lr=settings.lr,
        momentum=settings.momentum,
        fused=gpu,
    )
    for parameter in network.parameters() if settings.momentum else ():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


@contextmanager
def _reproducible(data: ImageData, settings: Training, run: _Run) -> Iterator[None]:
    """Dropout draws from torch's default generator: seed it here and leave it as it was found."""
    devices = [data.train.images.device] if data.train.images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _precision(data, settings, autocast=False):
        generator = run._default_generator()
        generator.manual_seed(settings.seed)
        if run.seed is not None:
            generator.set_state(run.seed)
        yield


@contextmanager
def _precision(data: ImageData, settings: Training, *, autocast: bool = True) -> Iterator[None]:
    device = data.train.images.device
    if device.type != "cuda":
        yield
        return
    allow = settings.precision != "float32"
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=allow):
        if not autocast:
            yield
            return
        with _autocast(device, settings):
            yield


def _autocast(device: torch.device, settings: Training) -> torch.autocast:
    enabled = settings.precision == "bf16" and device.type == "cuda"
    # autocast's cache of cast weights must be off: a replay would go on using the weights of the capture
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=False)
