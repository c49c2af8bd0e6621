"""Controlled departures from SPP, to find out what decides its result; none of them is the paper's method."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from sppkit import spp
from sppkit.pruner import Pruner

MASKED = ("decays", "still", "momentum", "trained")
RANKINGS = ("norm", "first", "taylor", "raw", "history", "masked")
SCOPES = ("layer", "network")
MASKS = ("drawn", "expected")


@dataclass(eq=False, repr=False)
class WatchedPruner(Pruner):
    """A pruner that remembers how groups ranked at each update, within their layers: 0 is the smallest norm."""

    _: KW_ONLY
    most: int = 0  # updates

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ranks = torch.zeros(self.most, self.groups.count, dtype=torch.int16, device=self._p.device)
        self.sums = {"ranks": self.ranks}

    def update(self) -> None:
        """SPP's; those that are gone have the smallest ranks."""
        importance = self.importance()
        for part in self.slices.values():
            self.ranks[self.updates, part] = importance[part].argsort(stable=True).argsort().short()
        super().update()


@dataclass(eq=False, repr=False)
class VariedPruner(Pruner):
    """A pruner with other rules for masked groups, or another ranking.

    masked: "decays" is SPP's; "still": their weights do not move at all; "momentum": their momentum is not cleared;
    "trained": they get the gradient that the masked network has at their place.
    ranking: "norm" is SPP's; "first": the norms before the first step, for all updates; "taylor": the sum over the
    steps since the last update of |sum of gradient · weight| in a group, masked or not; norms before the first step;
    "raw": the norms themselves move the probabilities, not their ranks, see `advance_by_norm`; "history" and "masked":
    the sum over the steps since the last update of the norms, and of the norms as masked, 0 where a group was masked.
    scope: "layer" is SPP's; "network": one ranking of all groups, by importance per MAC that a group costs. How many go
    is what the plan's FLOP ratio takes, counted anew at every update; each layer keeps its best group.
    siblings: a column's importance is divided by the expected number of columns of its input channel that stay, the sum
    of 1 - p, to this power. 0 is SPP's; above, the last columns of a channel become more important while others go.
    """

    _: KW_ONLY
    masked: str = "decays"
    ranking: str = "norm"
    scope: str = "layer"
    siblings: float = 0.0
    masks: str = "drawn"
    weight_decay: float = 0.0  # the optimiser's

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("masked", MASKED), ("ranking", RANKINGS), ("scope", SCOPES), ("masks", MASKS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}")
        if self.masks == "expected" and (self.method, self.masked) != ("spp", "decays"):
            raise ValueError(f"masks='expected' is SPP without masked groups; got {self.method!r}, {self.masked!r}")
        self._share = torch.ones_like(self._weight)  # (elements,) of a weight that is there, if that is "expected"
        self._sums = torch.zeros_like(self._p)  # (G + 2,) of the rankings that look at every step
        self.sums = {"taylor": self._sums}
        self._first = super().importance()
        self._stays: Tensor | None = None  # (G,)
        if self.siblings:
            if self.groups.kind != "column":
                raise ValueError(f"siblings={self.siblings} is for columns, not {self.groups.kind}s")
            channels = [channel for name in self.slices for channel in self.groups.columns[name]]  # (taps,) groups each
            numbers = np.repeat(np.arange(len(channels)), [len(channel) for channel in channels])
            self._channel = torch.from_numpy(numbers[np.argsort(np.concatenate(channels))]).to(self._p.device)  # (G,)
        if self.scope == "network":
            if self.plan.flop_ratio is None or self.groups.kind == "filter":
                raise ValueError(f"scope='network' needs a FLOP ratio, and groups other than filters; got {self.plan}")
            self.ranked, self.targets = {"network": slice(0, self.groups.count)}, {"network": 1}
            self._layers = torch.arange(self.groups.count, device=self._p.device)[None]
            costs = [self.groups.macs[name] / size for name, size in self.groups.sizes.items()]
            sizes = torch.tensor([*self.groups.sizes.values()])
            self._cost = torch.tensor(costs).repeat_interleave(sizes).to(self._p.device)  # (G,) MACs

    def draw(self) -> None:
        """SPP's; "expected" draws nothing."""
        if self.masks == "drawn":
            super().draw()

    def apply(self) -> None:
        """SPP's, or weights times 1 - p: from the probabilities as they are, since the step is captured."""
        if self.masks == "drawn":
            super().apply()
            return
        stays = 1 - self._p  # (G + 2,)
        share = stays.index_select(0, self._columns) * stays.index_select(0, self._rows)
        torch.mul(self._weight, self._share.copy_(share), out=self._masked)
        self._show(self._views_of_masked)

    def unmask(self) -> None:
        """SPP's, changed for masked groups; sums up what the ranking needs."""
        if self.ranking == "taylor":
            product = (self._gradient * self._weight).to(self._sums.dtype)
            self._sums += torch.zeros_like(self._sums).index_add_(0, self._own, product).abs_()
        elif self.ranking in ("history", "masked"):
            size = self._weight.abs() * (self._mask if self.ranking == "masked" else 1)
            self._sums.index_add_(0, self._own, size.to(self._sums.dtype))
        if self.masks == "expected":
            self.restore()
            self._gradient.mul_(self._share)
            self._momentum.mul_(self._share)
            return
        if self.masked in ("momentum", "trained"):
            self.restore()
            alive = self._mask if self.masked == "momentum" else self._alive
            self._gradient.mul_(alive)
            self._momentum.mul_(self._alive)
            return
        super().unmask()
        if self.masked == "still":
            self._gradient.addcmul_(self._weight, 1 - self._mask.to(self._weight.dtype), value=-self.weight_decay)

    @property
    def _alive(self) -> Tensor:
        """The weights (elements,) of groups that are not gone: computed in the step, since the step is captured."""
        alive = torch.cat([~self.gone, self.gone.new_ones(2)])
        return alive[self._columns] & alive[self._rows]

    def importance(self) -> Tensor:
        """By the ranking; groups that must stay come last."""
        importance = super().importance()
        if self.ranking == "first":
            importance = self._first
        elif self.ranking in ("taylor", "history", "masked") and bool(self._sums.any()):
            importance = self._sums[: self.groups.count].clone()
            self._sums.zero_()
        if self.siblings:
            kept = torch.zeros_like(importance).index_add_(0, self._channel, (1 - self.probability).to(importance))
            importance = importance / kept[self._channel].clamp(min=0.1) ** self.siblings
        if self.scope == "network":
            importance = self._over_the_network(importance)
        return importance if self._stays is None else importance + self._stays * (1 + importance.max())

    def update(self) -> None:
        """SPP's, or with norms in the place of ranks."""
        with patch.object(spp, "advance", advance_by_norm) if self.ranking == "raw" else nullcontext():
            super().update()

    def _over_the_network(self, importance: Tensor) -> Tensor:
        """Importance per MAC; counts how many groups, the least important ones first, make up the FLOP ratio."""
        score = importance / self._cost
        for part in self.slices.values():
            if self.ranking != "taylor" or not self.updates:  # norms of two layers cannot be compared
                score[part] /= importance[part].mean()
            score[part][score[part].argmax()] = torch.inf
        score = score.masked_fill(score.isinf(), 2 * score[score.isfinite()].max() + 1)
        total = sum(self.groups.macs.values())
        freed = self._cost[score.masked_fill(self.gone, -1).argsort(stable=True)].cumsum(0)
        count = int((freed < total - total / float(self.plan.flop_ratio or 1)).sum()) + 1
        self.targets["network"], self._target = count, torch.tensor([count], device=score.device)
        return score

    @property
    def settings(self) -> dict[str, object]:
        """As the pruner's, with what this one varies."""
        names = ("masked", "ranking", "scope", "siblings", "masks")
        return super().settings | {name: getattr(self, name) for name in names}

    def choose(self, record: dict[str, Any]) -> None:
        """Prune the groups that went in the run of `record`, in this run's own order."""
        stays = ~gone(record["notes"]["gone"], self.groups.count)
        self._stays = torch.from_numpy(stays).to(self._p.device)


def advance_by_norm(
    p: Tensor, importance: Tensor, target: Tensor, *, A: float = 0.05, u: float = 0.25, form: str = "adaptive"
) -> Tensor:
    """`spp.advance` with a position on the scale of norms in the place of the rank: two linear pieces.

    Of n groups left, m yet to go, the smallest norm is at 0, the first that would stay, by rank, at m, the largest at
    n - 1, the others between them by their norms. Norms at equal distances are where their ranks are. "adaptive" only.
    """
    if form != "adaptive":
        raise ValueError(f"form={form!r}: norms in the place of ranks go with 'adaptive'")
    gone = p == 1
    missing = (target - gone.sum(1))[:, None].clamp(min=0)  # (L, 1)
    norms = importance.double().masked_fill(gone, torch.inf)
    left = norms.isfinite().sum(1, keepdim=True).clamp(min=1)
    ordered = norms.sort(dim=1).values
    low, middle, high = (ordered.gather(1, at.clamp(max=left - 1)) for at in (0 * missing, missing, left - 1))
    below = missing * (norms - low) / (middle - low).clamp(min=1e-300)
    above = missing + (left - 1 - missing) * (norms - middle) / (high - middle).clamp(min=1e-300)
    place = torch.where(norms < middle, below, above).nan_to_num(posinf=0)
    moved = (p.double() + spp.increment(place, missing.clamp(min=1), A=A, u=u)).clamp(0, 1)
    return torch.where(gone | (missing <= 0), p, moved.to(p.dtype))


def chosen(pruner: Pruner) -> str:
    """The groups that are gone (G,), packed into hexadecimal digits."""
    return np.packbits(pruner.gone.cpu().numpy()).tobytes().hex()


def gone(digits: str, count: int) -> np.ndarray:
    """What `chosen` packed, (G,) bool."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8))[:count].astype(bool)
