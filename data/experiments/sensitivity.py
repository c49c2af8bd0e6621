"""Widths by what a layer's outputs lose: each is pruned until the same share of their variance is unexplained.

CP's rule for VGG-16 is of ImageNet, where the deeper layers are the sensitive ones. This one asks the network: on the
unpruned network, one layer at a time, LASSO picks channels at some widths and a refit says what they leave.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from settings import Experiment
from torch import Tensor, nn

from sppkit import cp
from sppkit.compact import trace
from sppkit.graph import sites
from sppkit.lasso import path
from sppkit.reconstruct import Moments, lasso_problem, refit
from sppkit.samples import collect, convolution, patches

RIDGE = 1e-6  # changes no error that matters, and keeps the many refits of dead channels to Cholesky
WIDTHS = np.linspace(0, 1, 17)[1:-1]  # shares of a layer's channels
Curve = tuple[list[int], list[float]]  # widths, ascending, and errors there

found: dict[str, dict[str, Curve]] = {}  # by network: several runs share one


@torch.no_grad()
def curves(network: nn.Module, images: Tensor, plan: Experiment) -> dict[str, Curve]:
    """By layer what LASSO and a refit leave of its outputs' variance; `network` has its BatchNorms folded."""
    graph = trace(network)
    places, result = sites(network, graph, samplers=plan.samplers), dict[str, Curve]()
    samples = collect(network, graph, places, images, plan.points, plan.seed, 100)
    for name, place in places.items():
        conv, moments = convolution(network, name), Moments()
        for X, Y in patches(network, graph, place, conv, images, samples.pop(name), 100):
            moments.add(X, Y)
        points = {1: 1.0, conv.in_channels: 0.0}
        if moments.yty.any():
            betas = path(*lasso_problem(moments, conv.weight))[1]  # (K, c)
            reached = betas.ne(0).sum(1)
            for width in (WIDTHS * conv.in_channels).round().astype(int):
                at = reached.ge(width).nonzero().flatten()
                kept = betas[at[0] if len(at) else -1].nonzero().flatten()
                points[len(kept)] = refit(moments, kept, (conv.kernel_size[0], conv.kernel_size[1]), ridge=RIDGE).error
        result[name] = ([*sorted(points)], [points[width] for width in sorted(points)])
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


def equal_error(network: nn.Module, example: Tensor, curves: Mapping[str, Curve], plan: Experiment) -> dict[str, int]:
    """Input channels to keep by layer, for the plan's FLOP ratio and the same error in every layer."""
    low, high = 0.0, 1.0
    for _ in range(20):
        error = (low + high) / 2
        rule = shares(curves, error)
        keep = cp.widths(network, example, plan.flop_ratio, rule=rule, samplers=plan.samplers)
        widest = max(rule, key=lambda name: curves[name][0][-1] * rule[name])  # a channel is least there
        fewer = keep[widest] / curves[widest][0][-1] < rule[widest]
        low, high = (error, high) if fewer else (low, error)
    return keep
