"""Pruning inside a training loop: masks for the weight groups of many layers at once.

The weights of all pruned layers are views of one flat tensor, so a training step needs one mask, whatever the depth,
and no host synchronisation: it can be captured in a CUDA graph. Forward and backward pass see a masked copy, the
optimiser the weights (after an exception, `restore`). Masks are drawn for many steps at once. `attach` shows a loop of
one's own.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sppkit import kernels, methods, spp
from sppkit.plan import Plan, make_plan


def attach(network: nn.Module, example: Tensor, *, flop_ratio: float, kind: str = "column", **options: Any) -> "Pruner":
    """A pruner for a network of one's own, every convolution by the same ratio; `options` are those of `Pruner`.

    Call it after network.to(device), before the optimiser's first step. Once the pruner is finished, BatchNorms have
    seen masked weights only: renew them (torch.optim.swa_utils.update_bn), and train on as long as you like.

    >>> import torchvision
    >>> from sppkit.compact import compact
    >>> from sppkit.cost import flop_ratio
    >>> network, x = torchvision.models.squeezenet1_1(num_classes=3), torch.randn(4, 3, 32, 32)
    >>> pruner = attach(network, x, flop_ratio=2, interval=1, A=0.5)
    >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    >>> while not pruner.finished:
    ...     pruner.before()  # update when it is due (eqs. 3, 4), draw masks, mask (eq. 2)
    ...     nn.functional.cross_entropy(network(x), torch.tensor([0, 1, 2, 0])).backward()
    ...     pruner.after(optimizer)  # unmask; masked groups get no gradient and lose momentum
    ...     optimizer.step()  # weight decay still acts on every weight
    ...     optimizer.zero_grad()
    >>> round(flop_ratio(network, compact(network, x), x), 2)
    2.0
    """
    return Pruner(network, make_plan(network, example, flop_ratio=flop_ratio, kind=kind), **options)


@dataclass(eq=False, repr=False)
class Pruner:
    """Prunes the groups of a plan while the network trains; make it when the network is on its device.

    Weights keep their values under a mask; a group that is gone is zero for good. A layer at its target keeps its
    survivors (p = 0); with a FLOP ratio in the plan all ends when the network reaches it. Raises ValueError for
    settings out of range and weights that are not finite.
    """

    network: nn.Module  # the weights of its pruned layers become views of one flat tensor
    plan: Plan
    _: KW_ONLY
    method: str = "spp"  # one of `methods.METHODS`
    interval: int = 180  # t, training steps between two updates (`before` and a training loop count them)
    rounds: int = 150  # updates of the methods that remove a planned share at each
    A: float = 0.05  # SPP eq. (3), like u
    u: float = 0.25
    form: str = "adaptive"  # or "literal", see `spp`
    gradient: str = "exact"  # of the layers' inputs; "unmasked": as in the authors' code, see `restore`
    rescale: bool = False  # survivors times 1 - p when their layer is finished, as the authors' code of 2017 does
    seed: int = 0  # of the masks' own generator
    score: Callable[[], Tensor] | None = None  # importance (G,) where it is not the L1 norm of a group

    def __post_init__(self) -> None:
        spp.check(A=self.A, u=self.u, form=self.form)
        if self.interval < 1 or self.rounds < 1:
            raise ValueError(f"interval={self.interval} and rounds={self.rounds} must be at least 1")
        for name, known in (("method", methods.METHODS), ("gradient", ("exact", "unmasked"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}")
        self.groups, self.slices = self.plan.groups, self.plan.groups.slices  # slices: of the flat group axis
        self.ranked, self.targets = self.slices, dict(self.plan.targets)  # groups ranked together, how many of them go
        for name, module in self.groups.modules.items():
            if self.network.get_submodule(name) is not module:
                raise ValueError(f"the plan is of another network: make_plan(network, ...) for the one with {name!r}")
            if not bool(module.weight.isfinite().all()):
                raise ValueError(f"the weights of layer {name!r} hold NaN or infinite values; nothing was pruned")
        self._parameters = [module.weight for module in self.groups.modules.values()]
        first, elements, G = self._parameters[0], sum(w.numel() for w in self._parameters), self.groups.count
        self._p = torch.tensor([0.0] * (G + 1) + [1.0], device=first.device)  # groups; "always kept"; "not there"
        self.probability = self._p[:G]  # (G,), a view; set by hand, it acts when the masks drawn before are used up
        self.gone = torch.zeros(G, dtype=torch.bool, device=first.device)  # for good
        self.trace: list[Tensor] = []  # probabilities after each update, (G,) on the CPU
        self.sums: dict[str, Tensor] = {}  # what a step changes beside the weights: a variant's; saved with them
        self.finished, self._steps = False, 0
        self.generator = torch.Generator(first.device).manual_seed(self.seed)
        self._going = self._p.new_ones(1)  # 0 once the pruner is finished
        self._draws = first.new_ones(min(self.interval, 256), G + 2, dtype=torch.bool if first.is_cuda else None)
        self._keep, self._row, self._before = self._draws[0].clone(), len(self._draws), self.generator.get_state()
        self._weight, self._masked, self._gradient, self._momentum = first.new_zeros(4, elements).detach()
        self._mask = first.new_ones(elements, dtype=self._draws.dtype)  # like `_draws`, which holds a row a step
        self._views_of_weight, self._views_of_masked = self._views(self._weight), self._views(self._masked)
        self._columns, self._rows = torch.empty(2, elements, dtype=torch.int32, device=first.device)
        parts = (self._views(flat) for flat in (self._weight, self._gradient, self._columns, self._rows))
        for (name, module), view, gradient, columns, rows in zip(self.groups.modules.items(), *parts, strict=True):
            columns.copy_(self.groups.spread(self.groups.columns[name], view))
            rows.copy_(self.groups.spread(self.groups.rows[name], view, rows=True))
            view.copy_(module.weight.detach())
            module.weight.data, module.weight.grad = view, gradient
        self._read = self._columns.to(torch.uint16 if first.is_cuda and G < 2**16 - 1 else torch.int32)  # less to read
        self._own = self._rows if self.groups.kind == "filter" else self._columns
        longest = max(self.groups.sizes.values())
        ids = [[*range(part.start, part.stop)] + [G + 1] * longest for part in self.slices.values()]
        self._layers = torch.tensor([row[:longest] for row in ids], device=first.device)  # (L, N) indices of groups
        goal = [self.targets[name] + longest - size for name, size in self.groups.sizes.items()]
        self._target = torch.tensor(goal, device=first.device)  # (L,), with those that are not there

    def _views(self, flat: Tensor) -> list[Tensor]:
        """The parts of `flat` (elements,) in the shapes and memory formats of the weights."""
        parts = zip(flat.split([w.numel() for w in self._parameters]), self._parameters, strict=True)
        return [part.as_strided(weight.shape, torch.empty_like(weight).stride()) for part, weight in parts]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the optimiser's momentum buffers of the pruned weights views of one flat tensor, values kept."""
        self.restore()
        if "momentum" not in optimizer.defaults:
            kind = type(optimizer).__name__
            raise ValueError(f"{kind} has no momentum to clear: use torch.optim.SGD, or after() without the optimizer")
        trained = {weight for group in optimizer.param_groups for weight in group["params"]}
        for weight, view in zip(self._parameters, self._views(self._momentum), strict=True):
            state = optimizer.state[weight] if weight in trained else {"momentum_buffer": view}  # frozen: none
            if (buffer := state.get("momentum_buffer")) is None or buffer.data_ptr() != view.data_ptr():
                view.zero_() if buffer is None else view.copy_(buffer)
                state["momentum_buffer"] = view

    def before(self) -> None:
        """In a loop of one's own, at the start of every step: update when it is due, then mask."""
        if self._steps % self.interval == 0 and not self.finished:
            self.update()
        self._steps += 1
        self.mask()

    def after(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """In a loop of one's own, after the backward pass: unmask. `optimizer`: whose momentum is to be cleared."""
        if optimizer is not None:
            self.attach(optimizer)
        for weight, view in zip(self._parameters, self._views(self._gradient), strict=True):
            if weight.grad is None or weight.grad.data_ptr() != view.data_ptr():  # zero_grad() dropped it
                view.zero_() if weight.grad is None else view.copy_(weight.grad)
                weight.grad = view
        self.unmask()

    def mask(self) -> None:
        """Draw a mask for every group and show forward and backward pass the masked weights. SPP eq. (2)."""
        self.draw()
        self.apply()

    def draw(self) -> None:
        """Take the next step's masks: the part of `mask` that is not captured in a graph."""
        if self._row == len(self._draws):  # used up, or the probabilities have moved
            self._before, self._row = self.generator.get_state(), 0
            draws = torch.rand(self._draws.shape, generator=self.generator, device=self._p.device)
            torch.ge(draws, self._p, out=self._draws)
        self._keep.copy_(self._draws[self._row])
        self._row += 1

    def apply(self) -> None:
        """The part of `mask` that is captured."""
        kernels.hide(self._weight, self._keep, self._read, self._mask, self._masked)
        if self.groups.kind == "filter":
            self._mask.logical_and_(self._keep.index_select(0, self._rows))
            torch.mul(self._weight, self._mask, out=self._masked)
        self._show(self._views_of_masked)

    def restore(self) -> None:
        """Show the weights themselves: `gradient="unmasked"` needs it before the backward pass of one's own loop."""
        self._show(self._views_of_weight)

    def _show(self, views: list[Tensor]) -> None:
        for weight, view in zip(self._parameters, views, strict=True):
            weight.data = view  # a captured step remembers which tensor each of its kernels read

    def unmask(self) -> None:
        """Show the weights themselves; clear the gradients and the momentum of masked ones."""
        self.restore()
        if penalty := methods.PENALTIES.get(self.method):
            penalty(self)
        kernels.clear(self._gradient, self._momentum, self._mask)

    def importance(self) -> Tensor:
        """L1 norm of each group's own weights as they are now, unmasked, (G,); or what `score` gives."""
        if self.score is not None:
            return self.score()
        weight = self._weight.to(torch.promote_types(self._weight.dtype, torch.float32))  # bf16 is too coarse for sums
        return weight.new_zeros(self._p.shape).index_add_(0, self._own, weight.abs())[: self.groups.count]

    def update(self) -> None:
        """Move the probabilities by the method, ranked by the weights as they are now; see `methods`."""
        importance = self.importance()
        if not bool(importance.isfinite().all()):
            bad = next(n for n, part in self.slices.items() if not importance[part].isfinite().all())
            where = f"layer {bad!r}, noticed at step {self.updates * self.interval}"
            raise FloatingPointError(f"{where}: weights are NaN or infinite; lower lr or go back to a checkpoint")
        if dist.is_available() and dist.is_initialized():
            random = self.generator.get_state().to(importance.device)
            for tensor in (importance, random):  # one ranking and the same masks, whatever rounding and seeds do
                dist.broadcast(tensor, 0)
            self.generator.set_state(random.cpu())
        self.trace.append(methods.METHODS[self.method](self, importance).to("cpu", copy=True))
        self._row = len(self._draws)

    def remove(self, gone: np.ndarray, *, last: bool) -> None:
        """Take groups (G,) out for good; with `last`, the rest stay and the pruner is finished."""
        self.gone |= torch.from_numpy(gone).to(self.gone.device)
        self.probability.masked_fill_(self.gone, 1.0)
        if last:
            self.probability.copy_(self.gone)
            self._going.zero_()
            self.finished = True
        alive = torch.cat([~self.gone, self.gone.new_ones(2)])
        self._weight.mul_(alive[self._columns] & alive[self._rows])

    def keep(self, done: Tensor) -> None:
        """Let the survivors (p < 1) among the groups `done` (G,) stay: p = 0; weights times 1 - p with `rescale`."""
        survivors = done & (self.probability < 1)
        if self.rescale:
            share = torch.cat([torch.where(survivors, 1 - self.probability, 1.0), self._p.new_ones(2)])
            self._weight.mul_(share[self._own])
        self.probability.masked_fill_(survivors, 0.0)

    @property
    def updates(self) -> int:
        """How often the probabilities were updated."""
        return len(self.trace)

    @property
    def settings(self) -> dict[str, object]:
        """What a saved state must agree with to be taken up."""
        names = ("method", "interval", "rounds", "A", "u", "form", "gradient", "rescale")
        plan = {"kind": self.groups.kind, "targets": self.plan.targets, "flop_ratio": self.plan.flop_ratio}
        return plan | {name: getattr(self, name) for name in names}

    def table(self) -> pd.DataFrame:
        """One row a layer: groups, target, pruned, and how many rose above p = 0.5 and came back (recovered)."""
        rows, trace = [], self.state()["trace"]
        for name, target in self.plan.targets.items():
            p = trace[:, self.slices[name]]  # (updates, N_c)
            p = p[: int(((p == 1).sum(1) < target).sum()) + 1]  # up to the update that finished the layer
            back = ((p > 0.5).any(0) & (p[-1:] < 0.5).any(0)).sum()
            rows.append((name, p.shape[1], target, int(self.gone[self.slices[name]].sum()), int(back)))
        return pd.DataFrame(rows, columns=["layer", "groups", "target", "pruned", "recovered"])

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on: probabilities and their history (a row an update), counts, the generator."""
        trace = torch.stack(self.trace) if self.trace else torch.zeros(0, self.groups.count)
        counts = torch.tensor([int(self.finished), self._steps, self._row])
        random = self._before if self._row < len(self._draws) else self.generator.get_state()
        digest = bytearray(hashlib.sha256(repr(self.settings).encode()).digest())
        own = {"probability": self.probability, "gone": self.gone, "trace": trace, "counts": counts}
        return own | {"generator": random, "settings": torch.frombuffer(digest, dtype=torch.uint8)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up a `state()` of a pruner of the same network, plan and settings; ValueError for another."""
        own, found = self.state()["settings"], state.get("settings")
        if found is None or not torch.equal(own, found.cpu()):
            groups = f"{len(state.get('probability', ()))} groups, this pruner {self.groups.count}"
            raise ValueError(f"the saved pruning state is of another plan or method ({groups}); use the one it is of")
        self.restore()
        self.probability.copy_(state["probability"])
        self.gone.copy_(state["gone"])
        self.finished, self._steps = bool(state["counts"][0]), int(state["counts"][1])
        self._going.mul_(not self.finished)
        self.generator.set_state(state["generator"].cpu())
        self.trace, self._row = list(state["trace"].cpu()), len(self._draws)
        if (row := int(state["counts"][2])) < self._row:  # in the middle of an interval: draw its masks again
            self.draw()
            self._row = row
