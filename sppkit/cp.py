"""Channel Pruning of whole networks, layer by layer: sample, select, refit (arXiv 1707.06168, section 3.2 and 3.3).

Inputs X come from the network pruned so far, targets Y from the original, so a layer also mends what those before it
lost; at the end of a residual branch Y is what the pruned shortcut leaves of the original sum, Y1 - Y1' + Y2.
"""

import copy
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn

from sppkit import cost
from sppkit.compact import compact, trace
from sppkit.graph import Site, fold, norm_scale, sites, unfold
from sppkit.lasso import select as lasso
from sppkit.plan import nearest
from sppkit.reconstruct import Moments, error, lasso_problem, refit
from sppkit.samples import Starts, collect, convolution, frugal, patches

# Channels (keep,) that stay, ascending, LASSO's alpha and violation, 0 for others, from moments of what a convolution
# reads and is to give, the convolution, keep, and by keyword `few`, moments of some samples, `generator`, and, or None,
# `producer`, the filters that make its input, `scale` (n,), of the BatchNorm folded into it. See notebooks/choice.py.
Choice = Callable[..., tuple[Tensor, float, float]]


def by_lasso(moments: Moments, conv: nn.Conv2d, keep: int, **_: object) -> tuple[Tensor, float, float]:
    """CP's own `Choice`: by the exact path."""
    found = lasso(*lasso_problem(moments, conv.weight.detach()), keep)
    return found.kept, found.alpha, found.violation


def widths(
    network: nn.Module,
    example: Tensor,
    flop_ratio: float,
    *,
    rule: Mapping[str, float] | None = None,
    samplers: bool = True,
    multiple: int = 1,
) -> dict[str, int]:
    """Input channels to keep in each convolution that can lose some, for a FLOP ratio of the whole network.

    Kept fractions are in the proportions of `rule`, layer -> weight, those without one keep all (default: one fraction
    for all), as near to the ratio as a channel allows, at least one step down. `example` is (B, C, H, W). Widths are
    multiples of `multiple`, such as 8, which libraries are fast at, or all channels. Raises ValueError for a ratio of 1
    or less or out of reach, an unknown layer, a weight that is not positive.
    """
    if not 1 < flop_ratio < math.inf or multiple < 1:
        given = f"flop_ratio={flop_ratio} must be above 1; 2 means half the multiply-accumulates"
        raise ValueError(f"{given}; multiple={multiple} must be at least 1, of channels")
    found = sites(network, trace(network), samplers=samplers)
    weight = dict.fromkeys(found, 1.0) if rule is None else rule
    if bad := [name for name in weight if name not in found or not weight[name] > 0]:
        raise ValueError(f"rule: layer {bad[0]!r}, weight {weight[bad[0]]}; positive weights for any of {[*found]}")
    table = cost.conv_table(network, example).set_index("layer")
    channels = {name: int(table.at[name, "in_channels"]) for name in weight}
    allowed = {name: [c, *range((c - 1) // multiple * multiple, 0, -multiple)] for name, c in channels.items()}
    # a common scale s keeps s·weight of the channels: a layer goes to its next width half-way between the two
    pairs = ((a, b, name) for name, sizes in allowed.items() for a, b in pairwise(sizes))
    steps = [(-(a + b) / 2 / (weight[name] * channels[name]), name) for a, b, name in pairs]

    def kept(gone: Mapping[str, int]) -> dict[str, int]:
        return {name: sizes[gone[name]] for name, sizes in allowed.items()}

    macs = table["macs"]
    return kept(nearest(steps, lambda gone: macs.sum() / _macs(macs, found, channels, kept(gone)).sum(), flop_ratio))


def _macs(macs: "pd.Series[int]", found: Mapping[str, Site], channels: Mapping[str, int], keep: Mapping[str, int]):  # type: ignore[no-untyped-def]
    """MACs by layer with `keep` of the input `channels`; producers lose the same filters."""
    left = macs.astype(float)
    for name, count in keep.items():
        for layer in (name, found[name].producer):
            if layer is not None:
                left[layer] *= count / channels[name]
    return left.round().astype(int)


def channel_prune(network: nn.Module, images: Tensor, **settings: object) -> tuple[nn.Module, pd.DataFrame]:
    """A smaller network that computes what `mask_channels` leaves, with that function's settings and its table.

    >>> network = nn.Sequential(nn.Conv2d(3, 32, 5), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
    >>> images = torch.randn(20, 3, 16, 16)
    >>> small, table = channel_prune(network, images, flop_ratio=2)
    >>> round(cost.flop_ratio(network, small, images), 1)
    2.0
    """
    masked, table = mask_channels(network, images, **settings)  # type: ignore[arg-type]
    return compact(masked, columns=False), table


@frugal
@torch.no_grad()
def mask_channels(
    network: nn.Module,
    images: Tensor,
    *,
    flop_ratio: float | None = None,
    keep: Mapping[str, int] | None = None,
    rule: Mapping[str, float] | None = None,
    select: Choice | None = None,
    samplers: bool = True,
    correct: bool = True,
    renew: bool = False,
    ridge: float = 0.0,
    points: int = 10,
    seed: int = 0,
    batch_size: int = 100,
) -> tuple[nn.Module, pd.DataFrame]:
    """A copy of `network` with pruned input channels as exact zeros, and what was done to each convolution.

    images: (B, C, H, W), prepared for the network; `points` distinct positions of each are drawn from `seed`.
    flop_ratio, rule, samplers: see `widths`; or keep: layer -> channels. One that keeps all is refitted only, one with
    fewer live channels keeps those.
    select: how channels are chosen, by LASSO if it is None; see `Choice`. All get the same refit.
    correct: the end of a residual branch makes up for what its pruned shortcut lost.
    ridge: of the refit towards the weights as they were, see `reconstruct.refit`.
    renew: BatchNorms, folded meanwhile, get means and variances of the pruned network, instead of the original's.

    Of the table, a row a layer: channels, kept, filters (of which layer they go too; "" behind a sampler), error_before
    with the old weights of the kept channels and error after the refit (see `reconstruct.error`), alpha and violation
    (of `lasso.select`), undetermined directions (see `reconstruct.refit`), macs before and macs_left, filters gone
    included. In memory: samples of all outputs, (B · points) floats an output channel; moments of one layer,
    (c kh kw + n)^2 doubles, a few times; a chunk of batch_size images, halved where that is too much; `samples.KEPT`
    bytes. Raises ValueError as those functions do, for images the network cannot run on and what cannot be pruned.
    """
    if (flop_ratio is None) == (keep is None):
        raise ValueError("give either flop_ratio or keep")
    original, norms = fold(network)
    pruned, graph = copy.deepcopy(original), trace(original)
    found = sites(original, graph, samplers=samplers)
    example = images[:1].to(next(pruned.parameters()).device)
    limits = {name: convolution(original, name).in_channels for name in found}
    wanted = keep if keep is not None else widths(original, example, flop_ratio or 0.0, rule=rule, samplers=samplers)
    for name, width in wanted.items():
        if not 1 <= width <= limits.get(name, 0):
            allowed = {link: f"1..{limit}" for link, limit in limits.items()}
            raise ValueError(f"keep={width} for layer {name!r}; the layers and widths that can be pruned: {allowed}")
    places = {n: at if correct else Site(n, at.node, at.producer) for n, at in found.items() if n in wanted}
    targets = collect(original, graph, places, images, points, seed, batch_size)
    rows, statistics, generator = [], dict[str, tuple[Tensor, Tensor]](), torch.Generator().manual_seed(seed)
    shared = len([*pruned.named_parameters(remove_duplicate=False)]) > len([*pruned.parameters()])
    shared |= any(node.op == "get_attr" for node in graph.nodes)  # a layer's change may be one of what ran before it
    starts: Starts = None if shared else {}
    for name, place in places.items():
        try:
            conv, samples = convolution(pruned, name), targets.pop(name)
            total = sum(len(Y) for _, Y in samples)
            chosen = torch.zeros(total, dtype=torch.bool)  # the few that the authors' code would see
            chosen[torch.randperm(total, generator=generator)[: min(400, max(total // 20, 1))]] = True
            moments, few, start = Moments(), Moments(), 0
            for X, Y in patches(pruned, graph, place, images, samples, batch_size, starts):
                moments.add(X, Y)
                here, start = chosen[start : start + len(X)].to(X.device), start + len(X)
                if select is not None and here.any():
                    few.add(X[here], Y[here])
            producer = None if place.producer is None else convolution(original, place.producer).weight
            scale = norm_scale(network.get_submodule(norms[name])) if name in norms else None
            settings = {"few": few, "producer": producer, "generator": generator, "scale": scale}
            row = prune_layer(conv, moments, wanted[name], select, ridge, **settings)
            rows.append([name, conv.in_channels, row[0], place.producer or "", *row[1:]])
            if renew:  # mean and variance (n,) of the output over the samples
                W, b = conv.weight.double().flatten(1), cast(Tensor, conv.bias).double()
                statistics[name] = W @ moments.mean_x + b, ((W @ moments.xtx) * W).sum(1) / moments.count
        except ValueError as problem:
            raise ValueError(f"layer {name!r}: {problem}") from problem
    columns = ["layer", "channels", "kept", "filters", "error_before", "error", "alpha", "violation", "undetermined"]
    table = pd.DataFrame(rows, columns=columns)
    macs = cost.conv_table(original, example).set_index("layer")["macs"]
    left = _macs(macs, found, limits, dict(zip(table["layer"], table["kept"], strict=True)))
    table["macs"], table["macs_left"] = ([int(each[name]) for name in table["layer"]] for each in (macs, left))
    return unfold(pruned, network, norms, statistics or None), table


def prune_layer(
    conv: nn.Conv2d, moments: Moments, keep: int, select: Choice | None = None, ridge: float = 0.0, **settings: Any
) -> tuple[float, ...]:
    """Select, refit and mask one convolution in place: kept, error before and after, alpha, violation, undetermined.

    moments: of what it reads and is to give (if constant, none stays); select, settings: see `Choice`; ridge: of
    `refit`, towards the weights as they were.
    """
    bias = conv.bias if conv.bias is not None else conv.weight.new_zeros(conv.out_channels)
    if not moments.yty.any():  # units that never answer: no channel explains a constant
        conv.weight.zero_()
        conv.bias = nn.Parameter(moments.mean_y.to(conv.weight))
        return 0, 0.0, 0.0, 0.0, 0.0, 0
    kept, alpha, violation = torch.arange(conv.in_channels, device=bias.device), 0.0, 0.0
    if keep < conv.in_channels:
        kept, alpha, violation = (select or by_lasso)(moments, conv, keep, **settings)
    own = conv.weight[:, kept]
    before = error(moments, own, bias, kept)
    fit = refit(moments, kept, (conv.kernel_size[0], conv.kernel_size[1]), ridge=ridge, own=own)
    conv.weight.zero_()
    conv.weight[:, kept] = fit.weight.to(conv.weight)
    conv.bias = nn.Parameter(fit.bias.to(conv.weight))
    left = conv.weight.ne(0).transpose(0, 1).flatten(1).any(1)  # (c,): one that was 0 in every sample gets no weight
    return int(left.sum()), before, fit.error, alpha, violation, fit.weight[0].numel() - fit.rank
