"""One convolution of a trained network at a time: nothing is trained, all choices are made from the same moments.

"layer": every way to choose channels at every ratio; accuracy of the network with this layer pruned, before and after
the refit, and the error of the layer's output on the patches that were fitted and on patches of other images.
"draws": LASSO and the authors' way to use it ("paper") on samples drawn again and again: widths, channels, errors.
Errors are those of `reconstruct.error`; BatchNorms are folded, as in `cp.mask_channels`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import combinations
from typing import Any

import choice
import numpy as np
import torch
from channels import exact, prepared, training_images
from settings import Experiment
from single_layer import sample_layer
from torch import Tensor, nn
from training import evaluate
from training.data import ImageData

from sppkit.compact import channel_links, convolutions
from sppkit.graph import fold
from sppkit.reconstruct import Moments, error, refit

RATIOS = (4 / 3, 2, 3, 4)  # of input channels before and after
DRAWS = 10
CHUNK = 10_000  # patches
FEW = 400  # samples of the authors' code, at most a twentieth of all


def one_layer(network: nn.Module, data: ImageData, plan: Experiment) -> dict[str, Any]:
    """Results of "layer": `rows`, one a way to choose and ratio, and the accuracy of the network as it is."""
    folded, _ = fold(network)
    conv, producer = _convolution(folded, plan.layer), convolutions(folded)[channel_links(folded)[plan.layer]]
    dense, settings, rows = conv.weight.detach().clone(), plan.phase("retrain"), []
    own = conv.bias.detach().clone() if conv.bias is not None else dense.new_zeros(len(dense))
    moments, few = _moments(folded, training_images(data, plan, spare=plan.images), plan, plan.seed)
    held = _held_out(folded, data, plan)
    for select in choice.CHOICES:
        for ratio in RATIOS if select != "paper" else ():  # which is "draws"
            keep = max(round(conv.in_channels / ratio), 1)
            random = torch.Generator().manual_seed(plan.seed)
            options: dict[str, Any] = {"few": few, "producer": producer.weight, "generator": random}
            begin = time.monotonic()
            kept, *_ = choice.choose(name=select, moments=moments, conv=conv, keep=keep, **options)
            fit = refit(moments, kept, _kernel(conv))
            row: dict[str, Any] = {"select": select, "ratio": ratio, "kept": len(kept)}
            row["seconds"] = time.monotonic() - begin
            row["error_before"] = error(moments, dense[:, kept], own, kept)
            row |= {"error": fit.error, "error_held_out": error(held, fit.weight, fit.bias, kept)}
            _set(conv, kept, dense[:, kept], own)
            row["acc_before_refit"] = evaluate(folded, data, settings)
            _set(conv, kept, fit.weight, fit.bias)
            row["acc_refitted"] = evaluate(folded, data, settings)
            rows.append(row)
            with torch.no_grad():
                conv.weight.copy_(dense)
    return {"layer": plan.layer, "channels": conv.in_channels, "rows": rows}


def draws(network: nn.Module, data: ImageData, plan: Experiment) -> dict[str, Any]:
    """Results of "draws": `rows`, one a draw and way, with the chosen channels packed; their mean `overlap` by way.

    seconds: of the choice and the refit, the moments of the samples that it reads not counted, which `seconds_moments`
    are; both ways refit from all samples.
    """
    folded, _ = fold(network)
    conv, held, rows = _convolution(folded, plan.layer), _held_out(folded, data, plan), list[dict[str, Any]]()
    keep, chosen = max(round(conv.in_channels / plan.flop_ratio), 1), dict[str, list[set[int]]]()
    for draw in range(DRAWS):
        begin = time.monotonic()
        images = training_images(data, plan, seed=1000 * plan.seed + draw, spare=plan.images)
        moments, few = _moments(folded, images, plan, 1000 * plan.seed + draw)
        float(moments.yty.sum())  # waits for the device
        sampled = time.monotonic() - begin
        for select in ("lasso", "paper"):
            begin = time.monotonic()
            kept, *_ = choice.choose(
                name=select, moments=moments, few=few, conv=conv, keep=keep, producer=None, generator=torch.Generator()
            )
            fit = refit(moments, kept, _kernel(conv))
            row: dict[str, Any] = {"draw": draw, "select": select, "kept": len(kept), "seconds_moments": sampled}
            row |= {"seconds": time.monotonic() - begin, "error": fit.error}
            row |= {"error_held_out": error(held, fit.weight, fit.bias, kept), "channels": _packed(kept, conv)}
            rows.append(row)
            chosen.setdefault(select, []).append({*kept.tolist()})
    shared = {select: overlap(sets) for select, sets in chosen.items()}
    return {"layer": plan.layer, "channels": conv.in_channels, "keep": keep, "overlap": shared, "rows": rows}


STUDIES = {"layer": one_layer, "draws": draws}


def overlap(chosen: Iterable[set[int]]) -> float:
    """Mean over all pairs of sets of the share of their members that both have.

    >>> overlap([{1, 2}, {2, 3}, {1, 2}])
    0.5555555555555556
    """
    return float(np.mean([len(one & other) / len(one | other) for one, other in combinations(chosen, 2)]))


def _convolution(network: nn.Module, layer: str) -> nn.Conv2d:
    """The layer, if its input comes from one other convolution alone."""
    if layer not in (links := channel_links(network)):
        raise ValueError(f"layer={layer!r} must be one that a single convolution feeds: {', '.join(links)}")
    return convolutions(network)[layer]


def _kernel(conv: nn.Conv2d) -> tuple[int, int]:
    return conv.kernel_size[0], conv.kernel_size[1]


def _held_out(network: nn.Module, data: ImageData, plan: Experiment) -> Moments:
    """Moments of the last training images, which are kept out of every sample that a choice sees."""
    images = prepared(data, plan, data.train.images[-plan.images :])
    return _moments(network, images, plan, plan.seed)[0]


def _moments(network: nn.Module, images: Tensor, plan: Experiment, seed: int) -> tuple[Moments, Moments]:
    """Moments of all samples of the layer, and of the few that the choice "paper" sees."""
    with exact(images.device):
        X, Y = sample_layer(network, plan.layer, images, points=plan.points, seed=seed)
    moments, few = Moments(), Moments()
    for x, y in zip(X.split(CHUNK), Y.split(CHUNK), strict=True):
        moments.add(x, y)
    chosen = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))[: min(FEW, max(len(X) // 20, 1))]
    chosen = chosen.to(X.device)
    return moments, few.add(X[chosen], Y[chosen])


@torch.no_grad()
def _set(conv: nn.Conv2d, kept: Tensor, weight: Tensor, bias: Tensor) -> None:
    conv.weight.zero_()
    conv.weight[:, kept] = weight.to(conv.weight)
    conv.bias = nn.Parameter(bias.to(conv.weight))


def _packed(kept: Tensor, conv: nn.Conv2d) -> str:
    """Kept channels as hexadecimal digits, a bit a channel; `variants.gone` unpacks them."""
    flags = np.zeros(conv.in_channels, dtype=bool)
    flags[kept.cpu().numpy()] = True
    return np.packbits(flags).tobytes().hex()
