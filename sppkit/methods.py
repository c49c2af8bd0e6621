"""What an update does, by method; those that SPP is compared with add themselves here (notebooks/rivals.py).

    name           groups   an update                                                               source (arXiv)
    spp            any      moves probabilities by eqs. (3), (4); masks are drawn from them         1709.06994
    oneshot        any      the smallest L1 norms go at the first update; on filters this is FP     1608.08710

Each moves `pruner.probability`, returns what to record, and ends at the plan's FLOP ratio.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sppkit import spp

if TYPE_CHECKING:
    from sppkit.pruner import Pruner


def probabilistic(pruner: "Pruner", importance: Tensor, *, falls: bool = True) -> Tensor:
    """SPP: one update of every layer that is not yet at its target; `falls=False` keeps what has risen."""
    old = pruner.probability.clone()
    ends = ((old, 1.0), (importance, torch.inf))  # of groups that are not there
    p, score = (torch.cat([v, v.new_zeros(1), v.new_full((1,), end)])[pruner._layers] for v, end in ends)  # (L, N)
    moved = spp.advance(p, score, pruner._target, A=pruner.A, u=pruner.u, form=pruner.form)
    moved = moved if falls else torch.maximum(moved, p)
    there = pruner._layers < pruner.groups.count
    pruner.probability[pruner._layers[there]] = moved[there]
    seen, reached = pruner.probability.clone(), pruner.probability == 1
    if not torch.equal(reached, pruner.gone):
        order = np.where(reached.cpu().numpy(), positions(pruner, importance), np.inf)
        gone, last = cut(pruner, order)
        full = (moved == 1).sum(1, keepdim=True) >= pruner._target[:, None]  # (L, 1) layers at their targets
        done = torch.full_like(pruner.gone, last)
        done[pruner._layers[there]] |= full.expand_as(there)[there]
        spared = reached & ~torch.from_numpy(gone).to(reached.device)  # the FLOP ratio does not need them
        pruner.probability[spared], seen[spared] = 0.0, old[spared]
        pruner.keep(done)
        pruner.remove(gone, last=last or bool(full.all()))
    return seen


def oneshot(pruner: "Pruner", importance: Tensor) -> Tensor:
    """The least important groups of each layer, at once and for good."""
    pruner.remove(cut(pruner, positions(pruner, importance))[0], last=True)
    return pruner.probability


METHODS: dict[str, Callable[["Pruner", Tensor], Tensor]] = {"spp": probabilistic, "oneshot": oneshot}
PENALTIES: dict[str, Callable[["Pruner"], None]] = {}  # by method: adds its own to the gradients, step by step


def positions(pruner: "Pruner", importance: Tensor) -> np.ndarray:
    """Place of each group in the order of removal: rank (from 1) over target; above 1 a group is not planned to go."""
    score, place = importance.double().cpu().numpy(), np.full(len(importance), np.inf)
    score = np.where(pruner.gone.cpu().numpy(), -np.inf, score)
    for name, part in pruner.ranked.items():
        if target := pruner.targets[name]:
            place[part] = (score[part].argsort(kind="stable").argsort(kind="stable") + 1) / target
    return np.where(place <= 1, place, np.inf)


def cut(pruner: "Pruner", order: np.ndarray, *, flop_ratio: float | None = None) -> tuple[np.ndarray, bool]:
    """The groups (G,) that go when they are taken in ascending `order`, and whether this reaches the FLOP ratio.

    Those gone already are in it; infinity never goes. It ends as near to the FLOP ratio (the plan's) as it can.
    """
    gone, wanted = pruner.gone.cpu().numpy(), flop_ratio or pruner.plan.flop_ratio
    candidates = [i for i in np.argsort(order, kind="stable") if np.isfinite(order[i]) and not gone[i]]
    place = np.where(gone, -1.0, np.inf)
    place[candidates] = np.arange(len(candidates))

    def ratio(count: int) -> float:
        return pruner.groups.flop_ratio(place < count)

    if wanted is None or ratio(len(candidates)) < wanted * (1 - 1e-9):
        return place < np.inf, False
    enough = bisect_left(range(len(candidates)), wanted * (1 - 1e-9), key=ratio)
    nearest = min((max(enough - 1, 0), enough), key=lambda count: abs(ratio(count) - wanted))
    return place < nearest, True
