"""Channel Pruning of a chain of convolutions, layer by layer: sample, LASSO selection, least squares.

Inputs X come from the network pruned so far, targets Y from the original (arXiv 1707.06168, section 3.2), at
the same positions of the same images, so a layer also mends what the layers before it lost. The result is
masked: exact zeros for the input channels that a convolution no longer reads. `compact.compact` takes them
out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sppkit.compact import channel_links
from sppkit.cost import conv_table
from sppkit.lasso import Selection, independent, select
from sppkit.reconstruct import Moments, error, lasso_problem, refit


class _Reached(Exception):
    """Ends a forward pass at the layer that was waited for."""


def sample_patches(inputs: Tensor, conv: nn.Conv2d, positions: Tensor) -> Tensor:
    """X (B * points, c * kh * kw): what `conv` multiplies its weight with at output `positions` (B, points).

    A position is row * output width + column. Only the sampled patches are gathered, with the convolution's
    padding, stride and dilation.

    >>> conv = nn.Conv2d(1, 1, 3, padding=1)
    >>> sample_patches(torch.ones(1, 1, 4, 4), conv, torch.tensor([[0]])).tolist()
    [[0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]]
    """
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(inputs, conv._reversed_padding_repeated_twice, mode=mode)
    (kh, kw), (dh, dw), (sh, sw) = conv.kernel_size, conv.dilation, conv.stride
    width = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1  # of the output
    across = torch.arange(kh, device=inputs.device) * dh, torch.arange(kw, device=inputs.device) * dw
    rows = (positions // width * sh)[:, :, None, None] + across[0][:, None]  # (B, points, kh, 1)
    columns = (positions % width * sw)[:, :, None, None] + across[1]  # (B, points, 1, kw)
    image = torch.arange(len(inputs), device=inputs.device)[:, None, None, None]
    patches = padded.permute(0, 2, 3, 1)[image, rows, columns]  # (B, points, kh, kw, c)
    return patches.permute(0, 1, 4, 2, 3).flatten(2).flatten(0, 1)  # (B * points, c * kh * kw)


def widths(network: nn.Module, example: Tensor, flop_ratio: float) -> dict[str, int]:
    """Input channels to keep in each convolution that can lose some, for a FLOP ratio of the whole network.

    One keep fraction for all: channels go one at a time, always from the layer with the largest fraction
    left, until the convolution MACs of the dense over those of the compact network reach `flop_ratio`.
    `example` is (B, C, H, W). Raises ValueError for a ratio of 1 or less, or one out of reach (saying how far
    it can go).

    >>> from sppkit import networks
    >>> widths(networks.create("convnet"), torch.zeros(1, 3, 32, 32), 2)
    {'conv2': 20, 'conv3': 20}
    """
    if not flop_ratio > 1:
        raise ValueError(f"flop_ratio={flop_ratio} must be above 1, the dense network")
    links = channel_links(network)
    table = conv_table(network, example).set_index("layer")
    readers = {producer: consumer for consumer, producer in links.items()}
    keep = {name: int(table.at[name, "in_channels"]) for name in links}
    full = dict(keep)
    dense = int(table["macs"].sum())

    def ratio() -> float:
        left = {name: keep[name] / full[name] for name in links}
        left = {name: left.get(name, 1.0) * left.get(readers.get(name, ""), 1.0) for name in table.index}
        return dense / sum(table["macs"] * pd.Series(left))

    steps = [
        (-k / full[name], place, name) for place, name in enumerate(links) for k in range(2, full[name] + 1)
    ]
    for *_, layer in sorted(steps):
        keep[layer] -= 1
        if ratio() >= flop_ratio * (1 - 1e-12):
            return keep
    raise ValueError(
        f"flop_ratio={flop_ratio} is out of reach: one input channel left in each of "
        f"{', '.join(links) or 'no layer'} gives {ratio():.2f}"
    )


def channel_prune(
    network: nn.Module,
    images: Tensor,
    *,
    flop_ratio: float | None = None,
    keep: Mapping[str, int] | None = None,
    points: int = 10,
    seed: int = 0,
    batch_size: int = 100,
) -> tuple[nn.Module, pd.DataFrame]:
    """A masked copy of `network` with pruned input channels, and what was done to each convolution.

    `images` (B, 3, H, W) are prepared as the network takes them; `points` positions are sampled in each,
    without repetition, or all there are. Widths come from `flop_ratio` (see `widths`) or from `keep`, layer
    -> channels; a layer that keeps all is only refitted, and one with fewer linearly independent channels
    than asked keeps those. A convolution without bias gets one. `network` itself is left as it was.

    The table has one row a layer, in order: layer, channels, kept, error_before (kept channels, old weights),
    error (after the refit), both relative to the variance of the output, alpha, violation. Raises ValueError
    for a layer that cannot be pruned, widths out of range, and images, features or weights with NaN or
    infinite values.
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images {tuple(images.shape)} must be (B, C, H, W) with at least one image")
    if points < 1 or batch_size < 1:
        raise ValueError(f"points={points} and batch_size={batch_size} must be at least 1")
    if (flop_ratio is None) == (keep is None):
        raise ValueError("give either flop_ratio or keep")
    if not images.isfinite().all():
        raise ValueError("images hold NaN or infinity; nothing was pruned")
    original, pruned = copy.deepcopy(network).eval(), copy.deepcopy(network).eval()
    device = next(pruned.parameters()).device
    example = images[:1].to(device)
    links = channel_links(original)  # a producer runs before the next: from input to output
    wanted = dict(keep) if keep is not None else widths(original, example, flop_ratio or 0.0)
    _check_widths(original, links, wanted)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    with torch.no_grad():
        for name in (name for name in links if name in wanted):
            dense, conv = original.get_submodule(name), pruned.get_submodule(name)
            assert isinstance(conv, nn.Conv2d)
            moments = Moments()
            try:
                for batch in images.split(batch_size):
                    batch = batch.to(device)
                    output = _capture(original, dense, batch, output=True)
                    positions = _positions(output, points, generator)
                    inputs = _capture(pruned, conv, batch, output=False)
                    Y = output.flatten(2).gather(
                        2, positions[:, None].expand(-1, output.shape[1], -1)
                    )  # (B, n, points)
                    moments.add(sample_patches(inputs, conv, positions), Y.transpose(1, 2).flatten(0, 1))
                rows.append({"layer": name} | _prune_layer(conv, moments, wanted[name]))
            except ValueError as problem:
                raise ValueError(f"layer {name!r}: {problem}") from problem
    for module, like in zip(pruned.modules(), network.modules(), strict=True):
        module.training = like.training
    columns = ["layer", "channels", "kept", "error_before", "error", "alpha", "violation"]
    return pruned, pd.DataFrame(rows, columns=columns)


def _prune_layer(conv: nn.Conv2d, moments: Moments, keep: int) -> dict[str, float]:
    """Select, refit and mask one convolution in place; its row of the table."""
    c, bias = (
        conv.in_channels,
        conv.bias if conv.bias is not None else conv.weight.new_zeros(conv.out_channels),
    )
    if keep == c:
        found = Selection(torch.arange(c, device=bias.device), torch.ones(c), 0.0, 0.0)
    else:
        gram, correlation = lasso_problem(moments, conv.weight)
        found = select(gram, correlation, max(1, min(keep, independent(gram))))
    before = error(moments, conv.weight[:, found.kept], bias, found.kept)
    fit = refit(moments, found.kept, (conv.kernel_size[0], conv.kernel_size[1]))
    conv.weight.zero_()
    conv.weight[:, found.kept] = fit.weight.to(conv.weight)
    conv.bias = nn.Parameter(fit.bias.to(conv.weight))
    widths = {"channels": c, "kept": len(found.kept)}
    return widths | {
        "error_before": before,
        "error": fit.error,
        "alpha": found.alpha,
        "violation": found.violation,
    }


def _check_widths(network: nn.Module, links: Mapping[str, str], wanted: Mapping[str, int]) -> None:
    modules = dict(network.named_modules())
    for name, keep in wanted.items():
        conv = modules.get(name)
        if getattr(conv, "groups", 1) != 1:
            raise ValueError(f"layer {name!r} is grouped: its input channels cannot be pruned, leave it out")
        if name not in links or not isinstance(conv, nn.Conv2d):
            names = ", ".join(links) or "none"
            raise ValueError(f"layer {name!r} has no input channels to prune; those that have: {names}")
        if not 1 <= keep <= conv.in_channels:
            raise ValueError(f"keep={keep} of layer {name!r} must lie in 1..{conv.in_channels}")


def _positions(output: Tensor, points: int, generator: torch.Generator) -> Tensor:
    """Distinct output positions of each image, (B, min(points, Ho * Wo)), drawn on the CPU."""
    drawn = torch.rand(len(output), output[0, 0].numel(), generator=generator)
    return drawn.topk(min(points, drawn.shape[1])).indices.to(output.device)


def _capture(network: nn.Module, layer: nn.Module, batch: Tensor, *, output: bool) -> Tensor:
    """The layer's input, or its own output, when `batch` goes in; the layers after it are not run."""
    caught: list[Tensor] = []

    def keep(*values: Any) -> None:
        caught.append(values[2] if output else values[1][0])
        raise _Reached

    hook: Callable[..., Any] = layer.register_forward_hook if output else layer.register_forward_pre_hook
    handle = hook(keep)
    try:
        network(batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    return caught[0]
