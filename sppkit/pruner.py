"""SPP inside a training loop: masks for the columns of many convolutions at once.

The weights of all pruned convolutions are views of one flat tensor, so a training step needs one draw and one mask
for the whole network, whatever its depth, and no host synchronisation: the step can be captured in a CUDA graph.

    pruner = Pruner(network, targets(network, flop_ratio=4))
    every `interval` steps:      pruner.update()            SPP eq. (3), (4)
    every step:                  pruner.before()            draw masks, mask the weights: SPP eq. (2)
                                 loss.backward()
                                 pruner.after()             unmask; masked groups get no gradient and lose momentum
                                 optimizer.step()           weight decay still acts on every weight
"""

from __future__ import annotations

from collections.abc import Mapping

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
    found = convolutions(network)
    for name in layers or []:
        _lookup(found, name)
    return {
        name: spp.target_count(1 - 1 / flop_ratio, conv.weight[0].numel())
        for name, conv in found.items()
        if layers is None or name in layers
    }


class Pruner:
    """Prunes columns of convolutions by SPP while the network trains.

    Attach it after the network is on its device. Weights keep their values under a mask; a group at p = 1 is zero
    for good. A layer is finished when `target` groups are at 1; its survivors' probabilities are then set to 0.

    Args:
        network: its convolutions named in `targets` are pruned; their weights become views of one flat tensor.
        targets: groups (columns) to prune, by layer name.
        interval: t, training steps between two updates (`sppkit.train.fit` counts them).
        A, u: SPP eq. (3).
        seed: of the masks' own generator.

    Raises ValueError for an unknown layer, a grouped convolution, a target out of range or weights that are not finite.
    """

    def __init__(
        self,
        network: nn.Module,
        targets: Mapping[str, int],
        *,
        interval: int = 180,
        A: float = 0.05,
        u: float = 0.25,
        seed: int = 0,
    ) -> None:
        found = convolutions(network)
        if not targets:
            raise ValueError("targets is empty: name at least one convolution to prune")
        if interval < 1:
            raise ValueError(f"interval={interval} must be at least 1 step")
        self.convs = {name: _lookup(found, name) for name in targets}
        self.targets = dict(targets)
        self.interval, self.A, self.u = interval, A, u
        self.updates = 0
        self.trace: list[Tensor] = []  # probabilities after each update, (G,) on the CPU
        for name, conv in self.convs.items():
            columns = conv.weight[0].numel()
            if conv.groups != 1:
                raise ValueError(
                    f"layer {name!r} has groups={conv.groups}; its columns are not supported, leave it out"
                )
            if not 0 < targets[name] < columns:
                raise ValueError(f"target={targets[name]} of layer {name!r} must lie in 1 to {columns - 1}")
            if not bool(conv.weight.isfinite().all()):
                raise ValueError(
                    f"the weights of layer {name!r} hold NaN or infinite values; nothing was pruned"
                )
        weights = [conv.weight for conv in self.convs.values()]
        device = weights[0].device
        self.slices: dict[str, slice] = {}  # of the flat group axis
        self.probability = torch.zeros(sum(w[0].numel() for w in weights), device=device)  # (G,)
        self.generator = torch.Generator(device).manual_seed(seed)
        elements = sum(w.numel() for w in weights)
        self._weight, self._kept, self._gradient, self._momentum = torch.zeros(4, elements, device=device)
        self._mask = torch.ones(elements, device=device)
        self._group_of = torch.empty(elements, dtype=torch.int64, device=device)
        self._layout: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []  # shape, strides, offset
        offset = begin = 0
        for (name, conv), weight in zip(self.convs.items(), weights, strict=True):
            columns = weight[0].numel()
            self.slices[name] = slice(begin, begin + columns)
            self._layout.append((tuple(weight.shape), torch.empty_like(weight).stride(), offset))
            ids = torch.arange(begin, begin + columns, device=device).view(
                1, *weight.shape[1:]
            )  # (1, C, kh, kw)
            self._view(self._group_of, -1).copy_(ids.expand_as(weight))
            view = self._view(self._weight, -1)
            view.copy_(weight.detach())
            conv.weight.data = view
            conv.weight.grad = self._view(self._gradient, -1)
            begin, offset = begin + columns, offset + weight.numel()

    def _view(self, flat: Tensor, layer: int) -> Tensor:
        shape, strides, offset = self._layout[layer]
        return flat.as_strided(shape, strides, offset + flat.storage_offset())

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the optimiser's momentum buffers of the pruned weights views of one flat tensor, values kept."""
        for layer, conv in enumerate(self.convs.values()):
            state = optimizer.state[conv.weight]
            view = self._view(self._momentum, layer)
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
        for layer, name in enumerate(self.convs):
            p = self.probability[self.slices[name]]
            if self.pruned(name) == self.targets[name]:
                continue
            try:
                importance = spp.column_importance(self._view(self._weight, layer))
                p.copy_(spp.update(p, importance, self.targets[name], A=self.A, u=self.u))
            except ValueError as error:
                raise ValueError(f"layer {name!r}, update {self.updates + 1}: {error}") from error
            if self.pruned(name) == self.targets[name]:
                p.copy_((p == 1).to(p.dtype))  # survivors stay
        gone = (self.probability == 1)[self._group_of]  # (E,)
        self._weight.masked_fill_(gone, 0.0)
        self._momentum.masked_fill_(gone, 0.0)
        self.updates += 1
        self.trace.append(self.probability.cpu().clone())

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
            part = self.slices[name]
            p = (
                torch.stack([t[part] for t in self.trace])
                if self.trace
                else self.probability[None, part].cpu()
            )
            back = ((p > 0.5).any(0) & (p[-1] < 0.5)).sum()
            rows.append((name, p.shape[1], target, self.pruned(name), int(back)))
        return pd.DataFrame(rows, columns=["layer", "groups", "target", "pruned", "recovered"])

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on: probabilities, their history, the generator and the number of updates."""
        trace = torch.stack(self.trace) if self.trace else torch.zeros(0, len(self.probability))
        generator = self.generator.get_state()
        return {"probability": self.probability, "trace": trace, "generator": generator}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up a `state()` of a pruner of the same network and targets."""
        if state["probability"].shape != self.probability.shape:
            found, expected = len(state["probability"]), len(self.probability)
            raise ValueError(f"the saved pruning state has {found} groups, this network {expected}")
        self.probability.copy_(state["probability"])
        self.generator.set_state(state["generator"].cpu())
        self.trace = list(state["trace"].cpu())
        self.updates = len(self.trace)


def _lookup(found: Mapping[str, nn.Conv2d], name: str) -> nn.Conv2d:
    if name not in found:
        raise ValueError(f"layer {name!r} is not a convolution of this network; it has {', '.join(found)}")
    return found[name]
