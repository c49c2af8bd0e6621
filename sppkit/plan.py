"""How much of each layer goes: a table that can be read and plotted before anything is pruned."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import Tensor, nn

from sppkit import spp
from sppkit.groups import Groups

RULES = ("uniform", "tiers")


@dataclass(frozen=True)
class Plan:
    """Groups to prune in each layer; with `flop_ratio`, pruning ends where the network reaches that ratio.

    `flop_ratio` counts filters that fall away because no later column reads them, which `reached` cannot know before:
    pruning may end before every layer is at its target, never after.
    """

    groups: Groups
    targets: dict[str, int]  # by layer
    flop_ratio: float | None = None

    def table(self) -> pd.DataFrame:
        """One row a layer: groups, pruned, kept, ratio (pruned over groups), MACs now and MACs left."""
        rows = [(n, self.groups.sizes.get(n, 0), self.targets.get(n, 0)) for n in self.groups.macs]
        table = pd.DataFrame(rows, columns=["layer", "groups", "pruned"])
        table["kept"], table["ratio"] = table["groups"] - table["pruned"], (table["pruned"] / table["groups"]).fillna(0)
        left = self.groups.conv_macs(_gone(self.groups, self.targets), by_products=False)
        return table.assign(macs=[*self.groups.macs.values()], macs_left=[*left.values()])

    @property
    def reached(self) -> float:
        """FLOP ratio of the targets, without filters that fall away as a by-product."""
        return _ratio(self.groups, self.targets)

    def __str__(self) -> str:
        wanted, reached = self.flop_ratio, self.reached
        deviation = "" if wanted is None else f", wanted {wanted:g} ({reached / wanted - 1:+.2%})"
        head = f"{self.groups.kind}s: FLOP ratio {reached:.3f}{deviation}"
        return f"{head}\n{self.table().round(3).to_string(index=False)}"


def make_plan(
    network: nn.Module,
    example: Tensor,
    *,
    flop_ratio: float | None = None,
    ratio: float | Mapping[str, float] | None = None,
    kind: str = "column",
    layers: list[str] | None = None,
    rule: str | Mapping[str, float] = "uniform",
) -> Plan:
    """A plan for a FLOP ratio of the network or a pruning ratio R, one for all layers or by layer.

    `ratio` prunes exactly ceil(R·N) of a layer's N groups. `flop_ratio` is solved for, as near as one group allows,
    under a `rule` for the kept fractions: "uniform"; "tiers", 1 : 1.5 : 2 for low, middle and high layers (the
    smallest feature maps are high, the next larger middle; SPP's rule for VGG-16); or weights by layer, such as `pca`
    in notebooks/sensitivity.py gives. `example` (B, C, H, W), `kind` and `layers` are those of `Groups`. Raises
    ValueError for a ratio out of range or out of reach, and as `Groups` does.

    >>> import torch
    >>> network = nn.Sequential(nn.Conv2d(3, 32, 5), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
    >>> plan = make_plan(network, torch.zeros(1, 3, 32, 32), flop_ratio=4)
    >>> plan.targets, round(plan.reached, 3)
    ({'0': 57, '2': 216, '4': 431}, 3.992)
    """
    if (flop_ratio is None) == (ratio is None):
        raise ValueError(f"give one of flop_ratio={flop_ratio} and ratio={ratio}")
    groups = Groups(network, example, kind=kind, layers=[*ratio] if isinstance(ratio, Mapping) else layers)
    if ratio is not None:
        ratios = ratio if isinstance(ratio, Mapping) else dict.fromkeys(groups.layers, ratio)
        return Plan(groups, {name: spp.target_count(ratios[name], n, name) for name, n in groups.sizes.items()})
    if flop_ratio is None or not 1 < flop_ratio < np.inf:
        raise ValueError(f"flop_ratio={flop_ratio} must be above 1; 2 means half the multiply-accumulates")
    share = _shares(groups, rule)
    # A common scale s shrinks the kept fractions s·share: group k of a layer goes where s falls below k/(N·share)
    steps = [(-k / (n * share[name]), name) for name, n in groups.sizes.items() for k in range(2, n + 1)]
    gone = nearest(steps, lambda gone: _ratio(groups, gone), flop_ratio)
    return Plan(groups, {name: gone[name] for name in groups.layers}, flop_ratio)


def nearest(steps: list[tuple[float, str]], ratio: Callable[[Counter[str]], float], flop_ratio: float) -> Counter[str]:
    """How many steps (place in line, layer) of each layer, one at least in all, come nearest to a FLOP ratio.

    ratio: after so many steps of each layer; it rises with each. Raises ValueError where all of them are too few.
    """
    order = [name for _, name in sorted(steps)]

    def reached(count: int) -> float:
        return ratio(Counter(order[:count]))

    if (most := reached(len(order))) < flop_ratio * (1 - 1e-12):
        raise ValueError(f"flop_ratio={flop_ratio} is out of reach: all that can go gives {most:.2f}; stay below")
    enough = bisect_left(range(len(order)), flop_ratio, key=reached)
    return Counter(order[: min((max(enough - 1, 1), enough), key=lambda count: abs(reached(count) - flop_ratio))])


def _shares(groups: Groups, rule: str | Mapping[str, float]) -> dict[str, float]:
    if isinstance(rule, Mapping):
        if missing := [name for name in groups.layers if not rule.get(name, 0) > 0]:
            raise ValueError(f"rule gives no positive weight for layer {missing[0]!r}")
        return {name: float(rule[name]) for name in groups.layers}
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} must be one of {', '.join(RULES)}, or weights by layer")
    pixels = {name: groups.macs[name] // conv.weight.numel() for name, conv in groups.layers.items()}  # of the output
    weight = dict(zip(sorted(set(pixels.values())), (2.0, 1.5), strict=False)) if rule == "tiers" else {}
    return {name: weight.get(pixels[name], 1.0) for name in groups.layers}


def _gone(groups: Groups, targets: Mapping[str, int]) -> np.ndarray:
    """As many groups of each layer as its target says, (G,): the last, of which an uneven block is one."""
    gone = np.zeros(groups.count, dtype=bool)
    for name, count in targets.items():
        gone[groups.slices[name]][groups.sizes[name] - count :] = True
    return gone


def _ratio(groups: Groups, targets: Mapping[str, int]) -> float:
    return groups.flop_ratio(_gone(groups, targets), by_products=False)
