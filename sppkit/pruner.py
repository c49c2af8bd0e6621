"""SPP inside a training loop: masks for the columns of many convolutions at once.

The weights of all pruned convolutions are views of one flat tensor, so a training step needs one draw and one mask,
whatever the depth, and no host synchronisation: it can be captured in a CUDA graph.

    pruner = Pruner(network, targets(network, flop_ratio=4))
    every `interval` steps:      pruner.update()            SPP eq. (3), (4)
    every step:                  pruner.before()            draw masks, mask the weights: SPP eq. (2)
                                 loss.backward()
                                 pruner.after()             unmask; masked groups get no gradient and lose momentum
                                 optimizer.step()           weight decay still acts on every weight
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate

import pandas as pd
import torch
from torch import Tensor, nn

from sppkit import spp
from sppkit.networks import convolutions


def targets(network: nn.Module, *, flop_ratio: float, layers: list[str] | None = None) -> dict[str, int]:
    """Columns to prune in each convolution (or in `layers`), the same ratio R = 1 - 1/flop_ratio in all.

    >>> from sppkit import networks
    >>> targets(networks.create("convnet"), flop_ratio=4)
    {'conv1': 57, 'conv2': 600, 'conv3': 600}
    """
    if not flop_ratio > 1:
        raise ValueError(f"flop_ratio={flop_ratio} must be above 1; 2 means half the multiply-accumulates")
    found = _named(network, layers)
    return {name: spp.target_count(1 - 1 / flop_ratio, conv.weight[0].numel()) for name, conv in found.items()}


@dataclass(eq=False, repr=False)
class Pruner:
    """Prunes columns of convolutions by SPP while the network trains; make it when the network is on its device.

    Weights keep their values under a mask; a group at p = 1 is zero for good. A layer is finished when `target` groups
    are at 1; its survivors' p is then set to 0. Raises ValueError for a layer, target or weights that cannot be pruned.
    """

    network: nn.Module  # the weights of its pruned convolutions become views of one flat tensor
    targets: Mapping[str, int]  # groups (columns) to prune, by layer name
    _: KW_ONLY
    interval: int = 180  # t, training steps between two updates (`sppkit.train.fit` counts them)
    A: float = 0.05  # SPP eq. (3), like u
    u: float = 0.25
    seed: int = 0  # of the masks' own generator

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("targets is empty: name at least one convolution to prune")
        if self.interval < 1:
            raise ValueError(f"interval={self.interval} must be at least 1 step")
        self.targets = dict(self.targets)
        self.convs = _named(self.network, self.targets)
        for name, conv in self.convs.items():
            columns, target = conv.weight[0].numel(), self.targets[name]
            if conv.groups != 1:
                raise ValueError(f"layer {name!r} has groups={conv.groups}; its columns cannot be pruned, leave it out")
            if not 0 < target < columns:
                raise ValueError(f"target={target} of layer {name!r} must lie in 1 to {columns - 1}")
            if not bool(conv.weight.isfinite().all()):
                raise ValueError(f"the weights of layer {name!r} hold NaN or infinite values; nothing was pruned")
        self._parameters = weights = [conv.weight for conv in self.convs.values()]
        device, elements = weights[0].device, sum(w.numel() for w in weights)
        groups = [w[0].numel() for w in weights]
        parts = [slice(end - count, end) for count, end in zip(groups, accumulate(groups), strict=True)]
        self.slices = dict(zip(self.convs, parts, strict=True))  # of the flat group axis
        self.probability = torch.zeros(sum(groups), device=device)  # (G,)
        self.trace: list[Tensor] = []  # probabilities after each update, (G,) on the CPU
        self.generator = torch.Generator(device).manual_seed(self.seed)
        flat = torch.zeros(5, elements, device=device, dtype=weights[0].dtype)
        self._weight, self._kept, self._gradient, self._momentum, self._mask = flat
        self._group_of = torch.empty(elements, dtype=torch.int64, device=device)
        for part, ids in zip(parts, self._views(self._group_of), strict=True):
            ids.copy_(torch.arange(part.start, part.stop).view(ids.shape[1:]))  # (C, kh, kw) to (O, C, kh, kw)
        for weight, view, gradient in zip(weights, self._views(self._weight), self._views(self._gradient), strict=True):
            view.copy_(weight.detach())
            weight.data, weight.grad = view, gradient

    def _views(self, flat: Tensor) -> list[Tensor]:
        """The parts of `flat` (elements,) in the shapes and memory formats of the weights."""
        parts = zip(flat.split([w.numel() for w in self._parameters]), self._parameters, strict=True)
        return [part.as_strided(weight.shape, torch.empty_like(weight).stride()) for part, weight in parts]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the optimiser's momentum buffers of the pruned weights views of one flat tensor, values kept."""
        for weight, view in zip(self._parameters, self._views(self._momentum), strict=True):
            state = optimizer.state[weight]
            if state.get("momentum_buffer") is not None:
                view.copy_(state["momentum_buffer"])
            state["momentum_buffer"] = view

    def before(self) -> None:
        """Draw a mask for every group and mask the weights in place. SPP eq. (2)."""
        keep = spp.draw(self.probability, self.generator)
        torch.index_select(keep.to(self._mask.dtype), 0, self._group_of, out=self._mask)
        self._kept.copy_(self._weight)
        self._weight.mul_(self._mask)

    def after(self) -> None:
        """Give masked weights their values back; clear their gradients and their momentum."""
        self._weight.copy_(self._kept)
        self._gradient.mul_(self._mask)
        self._momentum.mul_(self._mask)

    def update(self) -> None:
        """Move every unfinished layer's probabilities by SPP eq. (3) and (4), ranked by its weights as they are now."""
        seen = []
        for name, target in self.targets.items():
            p, importance = self.probability[self.slices[name]], spp.column_importance(self.convs[name].weight)
            try:
                p.copy_(spp.update(p, importance, target, A=self.A, u=self.u))
            except ValueError as error:
                raise ValueError(f"layer {name!r}, update {self.updates + 1}: {error}") from error
            seen.append(p.to("cpu", copy=True))
            if self.pruned(name) == target:
                p.copy_(p == 1)  # survivors stay
        self.trace.append(torch.cat(seen))
        self._weight.masked_fill_((self.probability == 1)[self._group_of], 0.0)

    @property
    def updates(self) -> int:
        """How often the probabilities were updated."""
        return len(self.trace)

    @property
    def settings(self) -> dict[str, object]:
        """What a saved state must agree with to be taken up."""
        return {"targets": self.targets, "interval": self.interval, "A": self.A, "u": self.u}

    def pruned(self, name: str) -> int:
        """Groups of layer `name` that are gone for good."""
        return int((self.probability[self.slices[name]] == 1).sum())

    @property
    def finished(self) -> bool:
        """Whether every layer has reached its target."""
        return all(self.pruned(name) == target for name, target in self.targets.items())

    def table(self) -> pd.DataFrame:
        """One row a layer: groups, target, pruned, and how many rose above p = 0.5 and came back (recovered)."""
        rows = []
        for name, target in self.targets.items():
            p = self.state()["trace"][:, self.slices[name]]  # (updates, N_c)
            p = p[: int(((p == 1).sum(1) < target).sum()) + 1]  # up to the update that finished the layer
            back = ((p > 0.5).any(0) & (p[-1:] < 0.5).any(0)).sum()
            rows.append((name, p.shape[1], target, self.pruned(name), int(back)))
        return pd.DataFrame(rows, columns=["layer", "groups", "target", "pruned", "recovered"])

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on: probabilities, their history (one row an update) and the generator's state."""
        trace = torch.stack(self.trace) if self.trace else torch.zeros(0, len(self.probability))
        return {"probability": self.probability, "trace": trace, "generator": self.generator.get_state()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up a `state()` of a pruner of the same network and targets."""
        found, expected = len(state["probability"]), len(self.probability)
        if found != expected:
            raise ValueError(f"the saved pruning state has {found} groups, this network {expected}")
        self.probability.copy_(state["probability"])
        self.generator.set_state(state["generator"].cpu())
        self.trace = list(state["trace"].cpu())


def _named(network: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Conv2d]:
    """The convolutions `names` of a network, all where that is None."""
    found = convolutions(network)
    for name in names or ():
        if name not in found:
            raise ValueError(f"layer {name!r} is not a convolution of this network; it has {', '.join(found)}")
    return found if names is None else {name: found[name] for name in names}
