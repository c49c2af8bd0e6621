"""One training step on fixed tensors of the device, captured as a CUDA graph where there is a GPU.

Small networks only wait for kernel launches, so the whole step is recorded once and replayed. What a replay must see
anew lives in tensors: the batch's indices, the learning rate, the groups' masks, the generator's state.
"""

import json
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sppkit import state
from sppkit.pruner import Pruner
from training.batches import Batches, Normalise
from training.data import ImageData, Split


@dataclass(frozen=True)
class Training:
    """Settings of one training run; steps are iterations, not epochs. ValueError for a value out of range."""

    steps: int
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "step"  # lr times gamma at each milestone; "cosine": to 0 over `steps`
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    precision: str = "float32"  # on a GPU also "tf32" (convolutions) and "bf16" (autocast)
    normalise: str = "channel"  # or "mean_image", see `sppkit.batches.Normalise`
    crop_padding: int = 0  # pixels
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps={self.steps} and batch_size={self.batch_size} must be at least 1")
        for name, known in (("schedule", ("step", "cosine")), ("precision", ("float32", "tf32", "bf16"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr={self.lr} must be positive")

    def batches(self, split: Split) -> Batches:
        """Batches of `split` as a run with these settings sees them."""
        drawn: dict[str, Any] = {key: getattr(self, key) for key in ("batch_size", "seed", "crop_padding", "flip")}
        return Batches(split, normalise=Normalise.of(split, self.normalise), **drawn)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr * self.gamma ** sum(step >= milestone for milestone in self.milestones)


@dataclass(eq=False, repr=False)
class TrainingStep:
    """One training run; a network's attribute `multipliers` {parameter: (factor on lr, on decay)} is honoured."""

    network: nn.Module
    data: ImageData
    settings: Training
    _: KW_ONLY
    pruner: Pruner | None = None
    capture: bool = True
    fuse: bool = False  # the network's small kernels, by torch.compile

    def __post_init__(self) -> None:
        self.network.train()
        self.fuse &= self.pruner is None or self.pruner.gradient == "exact"  # compiled, backward keeps masked weights
        self.forward = torch.compile(self.network) if self.fuse else self.network
        if self.pruner is not None and self.pruner.gradient == "unmasked" and self.settings.precision == "bf16":
            raise ValueError("gradient='unmasked' needs precision='float32' or 'tf32': bf16 keeps masked copies")
        settings, train = self.settings, self.data.train
        self.device = train.images.device
        self.capture &= self.device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batches = settings.batches(train)
        self.optimizer = _optimizer(self.network, settings, self.device)
        if self.pruner is not None:
            self.pruner.attach(self.optimizer)
        self.totals = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, correct
        self.epoch, self.rate = -1, math.nan
        gpus = torch.cuda.default_generators  # dropout draws from the device's
        self.generator = gpus[self.device.index or 0] if self.device.type == "cuda" else torch.default_generator

    def step(self, step: int) -> None:
        """Train on the batch of `step`, counted from 0."""
        epoch, position = divmod(step, self.batches.steps_per_epoch)
        if epoch != self.epoch:
            self.batches.start_epoch(epoch)
            self.epoch = epoch
        self.batches.select(position)
        if self.pruner is not None:
            self.pruner.draw()
        if (rate := self.settings.learning_rate(step)) != self.rate:
            self.set_rate(rate)
        if self.capture and self.graph is None:
            self.record()
        (self.graph.replay if self.graph else self._body)()

    def _body(self) -> None:
        x, y = self.batches.batch()  # (B, 3, H, W), (B,)
        if self.pruner is not None:
            self.pruner.apply()
        with autocast(self.device, self.settings):
            logits = self.forward(x)  # (B, classes)
        loss = F.cross_entropy(logits.float(), y)
        if self.pruner is not None and self.pruner.gradient == "unmasked":
            self.pruner.restore()
        loss.backward()
        if self.pruner is not None:
            self.pruner.unmask()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # a captured step needs its gradients to stay where they are
        self.totals += torch.stack((loss.detach(), (logits.argmax(1) == y).float().mean()))

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of every parameter group, each with its factor."""
        self.rate = rate
        for group in self.optimizer.param_groups:
            lr, value = group["lr"], rate * group["lr_factor"]
            group["lr"] = lr.fill_(value) if isinstance(lr, Tensor) else value  # a float is baked into a graph

    def record(self) -> None:
        """Capture the step: warm up on a side stream, undo what that did, then record one step."""
        mutable = [*self._tensors().values()]  # all detached
        kept = [tensor.clone() for tensor in mutable]
        random = self.generator.get_state()
        # A stream of this run's own: graphs captured on one stream share scratch memory, and hang when run together.
        stream = torch.cuda.current_stream()
        stream = torch.cuda.Stream() if stream == torch.cuda.default_stream() else stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._body()
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(mutable, kept, strict=True):
            tensor.copy_(value)
        self.generator.set_state(random)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self._body()

    def read(self, done: int, steps: int) -> dict[str, float]:
        """Means over the last `steps` of the steps `done`, as a row of the history; starts the sums anew."""
        loss, correct = (self.totals / steps).tolist()
        self.totals.zero_()
        if not math.isfinite(loss):
            way_out = f"lower lr={self.settings.lr} or go back to a checkpoint"
            raise FloatingPointError(f"the loss became {loss} by step {done}{self._lost()}; {way_out}")
        return {"step": done, "lr": self.rate, "loss": loss, "accuracy": 100 * correct}

    def _lost(self) -> str:
        names = [name for name, tensor in self._tensors().items() if not tensor.isfinite().all()]
        return f" ({names[0]!r} and {len(names) - 1} more hold NaN or infinite values)" if names else ""

    def _tensors(self) -> dict[str, Tensor]:
        own = {f"network/{name}": value for name, value in self.network.state_dict().items()} | {"totals": self.totals}
        own |= {f"sums/{name}": value for name, value in (self.pruner.sums if self.pruner else {}).items()}
        momentum = {p: state["momentum_buffer"] for p, state in self.optimizer.state.items() if state}
        names = {name: p for name, p in self.network.named_parameters() if p in momentum}
        return own | {f"momentum/{name}": momentum[p] for name, p in names.items()}

    def _description(self) -> dict[str, Any]:
        """The settings as a file gives them back: JSON has no tuples."""
        return json.loads(json.dumps(asdict(self.settings) | {"pruner": self.pruner and self.pruner.settings}))

    def save(self, path: Path, step: int, history: list[dict[str, float]]) -> None:
        """Write a checkpoint; a state that is no longer finite leaves the old one as it was: FloatingPointError."""
        tensors = self._tensors() | {"generator": self.generator.get_state()}
        tensors |= {f"pruner/{name}": value for name, value in (self.pruner.state() if self.pruner else {}).items()}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise FloatingPointError(f"not finite any more at step {step}{self._lost()}; {path} was left as it was")
        description = {"kind": "training", "step": step, "settings": self._description(), "history": history}
        state.save(path, tensors, description)

    def resume(self, path: Path) -> tuple[int, list[dict[str, float]]]:
        """Take up a checkpoint; returns the next step and the history. ValueError if it is of another run."""
        tensors, description = state.load(path, kind="training")
        wanted, found = self._description(), description["settings"]
        if differ := [key for key in wanted | found if wanted.get(key) != found.get(key)]:
            raise ValueError(f"{path} was saved with other settings ({', '.join(differ)}); delete it to start anew")
        own = self._tensors()
        if wrong := [name for name, t in own.items() if name not in tensors or tensors[name].shape != t.shape]:
            raise ValueError(f"{path} belongs to another network (first misfit: {wrong[0]}); delete it to start anew")
        for name, value in own.items():
            value.copy_(tensors[name])
        if self.pruner is not None:
            self.pruner.load_state({name: tensors[f"pruner/{name}"] for name in self.pruner.state()})
        self.generator.set_state(tensors["generator"])
        return description["step"], description["history"]


def _optimizer(network: nn.Module, settings: Training, device: torch.device) -> torch.optim.SGD:
    """SGD with a parameter group for each pair of factors on learning rate and weight decay; frozen ones stay out."""
    factors, gpu = getattr(network, "multipliers", {}), device.type == "cuda"
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(factors.get(name, (1.0, 1.0)), []).append(parameter)
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
    described: list[dict[str, Any]] = []
    for (lr_factor, decay_factor), parameters in groups.items():
        rate = torch.tensor(settings.lr, device=device) if gpu else settings.lr
        solver = {"lr": rate, "lr_factor": lr_factor, "weight_decay": settings.weight_decay * decay_factor}
        described.append({"params": parameters, **solver})
    optimizer = torch.optim.SGD(described, lr=settings.lr, momentum=settings.momentum, fused=gpu)
    for parameter in (p for group in described for p in group["params"] if settings.momentum):
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def precision_flags(device: torch.device, settings: Training) -> AbstractContextManager[None]:
    """TF32 convolutions only where the settings allow them, and cuDNN's choice of algorithms by measurement."""
    if device.type != "cuda":
        return nullcontext()
    allow = settings.precision != "float32"
    return torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=allow)


def autocast(device: torch.device, settings: Training) -> torch.autocast:
    """bf16 autocast on a GPU where the settings ask for it, else nothing."""
    enabled = settings.precision == "bf16" and device.type == "cuda"
    # the cache of cast weights must be off: a replay would go on using the weights of the capture
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=False)
