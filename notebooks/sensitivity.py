"""Plans that ask the network how much each layer can lose; those of the papers are of their own networks and data.

`pca`: by how many directions a layer's outputs need. `equal_error`: CP's rule for VGG-16 is of ImageNet, where the
deeper layers are the sensitive ones; here, on the unpruned network, one layer at a time, LASSO picks channels at some
widths and a refit says what they leave. Each layer is pruned until the same share of its outputs' variance is left.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from sppkit import cp
from sppkit.compact import convolutions, trace
from sppkit.graph import Start, sites
from sppkit.lasso import path
from sppkit.reconstruct import Moments, lasso_problem, refit
from sppkit.samples import collect, convolution, patches

RIDGE = 1e-6  # changes no error that matters, and keeps the many refits of dead channels to Cholesky
WIDTHS = np.linspace(0, 1, 17)[1:-1]  # shares of a layer's channels
Curve = tuple[list[int], list[float]]  # widths, ascending, and errors there


@torch.no_grad()
def pca(network: nn.Module, images: Tensor, *, energy: float = 0.9) -> dict[str, float]:
    """For each convolution the share of its outputs' principal components that hold `energy` of their variance.

    Few components: redundant, prune more. As weights of `make_plan(rule=...)` this follows the SPP paper's use of PCA
    for AlexNet. `images` (B, C, H, W) are prepared for the network. Raises ValueError for `energy` outside (0, 1).
    """
    if not 0 < energy < 1:
        raise ValueError(f"energy={energy} must lie in (0, 1)")
    found, probe = dict[str, float](), copy.deepcopy(network).eval()

    def note(name: str, output: Tensor) -> None:
        points = output.transpose(0, 1).flatten(1).double()  # (O, B·H·W)
        values = torch.linalg.eigvalsh(torch.cov(points)).flip(0).clamp_min(0)  # (O,), largest first
        enough = int((values.cumsum(0) < energy * values.sum()).sum()) + 1
        found[name] = min(enough, len(values)) / len(values)

    for name, conv in convolutions(probe).items():
        conv.register_forward_hook(lambda _, __, output, name=name: note(name, output))
    probe(images)
    return found


@torch.no_grad()
def curves(
    network: nn.Module, images: Tensor, *, samplers: bool = True, points: int = 10, seed: int = 0
) -> dict[str, Curve]:
    """By layer what LASSO and a refit leave of its outputs' variance; `network` has its BatchNorms folded.

    images (B, C, H, W), samplers, points and seed are those of `cp.mask_channels`.
    """
    graph = trace(network)
    places, result = sites(network, graph, samplers=samplers), dict[str, Curve]()
    samples, starts = collect(network, graph, places, images, points, seed, 100), dict[int, Start]()
    for name, place in places.items():
        conv, moments = convolution(network, name), Moments()
        for X, Y in patches(network, graph, place, images, samples.pop(name), 100, starts):
            moments.add(X, Y)
        curve = {1: 1.0, conv.in_channels: 0.0}
        if moments.yty.any():
            betas = path(*lasso_problem(moments, conv.weight))[1]  # (K, c)
            reached = betas.ne(0).sum(1)
            for width in (WIDTHS * conv.in_channels).round().astype(int):
                at = reached.ge(width).nonzero().flatten()
                kept = betas[at[0] if len(at) else -1].nonzero().flatten()
                curve[len(kept)] = refit(moments, kept, (conv.kernel_size[0], conv.kernel_size[1]), ridge=RIDGE).error
        result[name] = ([*sorted(curve)], [curve[width] for width in sorted(curve)])
    return result


def shares(curves: Mapping[str, Curve], error: float) -> dict[str, float]:
    """By layer the share of its channels that leaves `error`, between the widths of a curve by the straight line.

    >>> shares({"a": ([1, 3, 5], [1.0, 0.2, 0.0]), "b": ([1, 4], [1.0, 0.0])}, 0.1)
    {'a': 0.8, 'b': 0.925}
    """
    result = {}
    for name, (widths, errors) in curves.items():
        falling = np.minimum.accumulate(errors)[::-1]  # ascending, as `np.interp` needs it
        result[name] = float(np.interp(error, falling, widths[::-1])) / widths[-1]
    return result


def equal_error(
    network: nn.Module, example: Tensor, curves: Mapping[str, Curve], flop_ratio: float, *, samplers: bool = True
) -> dict[str, int]:
    """Input channels to keep by layer, for a FLOP ratio and the same error in every layer.

    What `cp.mask_channels` takes as `keep`. ValueError as `cp.widths`.
    """
    low, high = 0.0, 1.0
    for _ in range(20):
        error = (low + high) / 2
        rule = shares(curves, error)
        keep = cp.widths(network, example, flop_ratio, rule=rule, samplers=samplers)
        widest = max(rule, key=lambda name: curves[name][0][-1] * rule[name])  # a channel is least there
        fewer = keep[widest] / curves[widest][0][-1] < rule[widest]
        low, high = (error, high) if fewer else (low, error)
    return keep
