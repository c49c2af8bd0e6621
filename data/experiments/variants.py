"""Controlled departures from SPP, to find out what decides its result; none of them is the paper's method."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sppkit.pruner import Pruner

MASKED = ("decays", "still", "momentum", "trained")
RANKINGS = ("norm", "first", "taylor")


@dataclass(eq=False, repr=False)
class VariedPruner(Pruner):
    """A pruner with other rules for masked groups, or another ranking.

    masked: "decays" is SPP's; "still": their weights do not move at all; "momentum": their momentum is not cleared;
    "trained": they get the gradient that the masked network has at their place.
    ranking: "norm" is SPP's; "first": the norms before the first step, for all updates; "taylor": the sum over the
    steps since the last update of |sum of gradient · weight| in a group, masked or not; norms before the first step.
    """

    _: KW_ONLY
    masked: str = "decays"
    ranking: str = "norm"
    weight_decay: float = 0.0  # the optimiser's

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("masked", MASKED), ("ranking", RANKINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}")
        self._sums = torch.zeros_like(self._p)  # (G + 2,) of the ranking "taylor"
        self.sums = {"taylor": self._sums}
        self._first = super().importance()
        self._stays: Tensor | None = None  # (G,)

    def unmask(self) -> None:
        """SPP's, changed for masked groups; sums up what the ranking needs."""
        if self.ranking == "taylor":
            product = (self._gradient * self._weight).to(self._sums.dtype)
            self._sums += torch.zeros_like(self._sums).index_add_(0, self._own, product).abs_()
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
        elif self.ranking == "taylor" and bool(self._sums.any()):
            importance = self._sums[: self.groups.count].clone()
            self._sums.zero_()
        return importance if self._stays is None else importance + self._stays * (1 + importance.max())

    def choose(self, record: dict[str, Any]) -> None:
        """Prune the groups that went in the run of `record`, in this run's own order."""
        stays = ~gone(record["notes"]["gone"], self.groups.count)
        self._stays = torch.from_numpy(stays).to(self._p.device)


def chosen(pruner: Pruner) -> str:
    """The groups that are gone (G,), packed into hexadecimal digits."""
    return np.packbits(pruner.gone.cpu().numpy()).tobytes().hex()


def gone(digits: str, count: int) -> np.ndarray:
    """What `chosen` packed, (G,) bool."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8))[:count].astype(bool)
