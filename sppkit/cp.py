"""Channel Pruning of a chain of convolutions, layer by layer: sample, LASSO selection, least squares.

Inputs X come from the network pruned so far, targets Y from the original (arXiv 1707.06168, section 3.2), so a layer
also mends what those before it lost. The result is masked, with exact zeros that `compact.compact` takes out.
"""

import copy
from collections.abc import Iterator, Mapping

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sppkit.compact import channel_links
from sppkit.lasso import select
from sppkit.plan import make_plan
from sppkit.reconstruct import Moments, error, lasso_problem, refit


class _Reached(Exception):
    """Ends a forward pass at the layer that was waited for; its arguments are the layer's input and output."""


def sample_patches(inputs: Tensor, conv: nn.Conv2d, positions: Tensor) -> Tensor:
    """X (B * points, c * kh * kw) that `conv` reads for output `positions` (B, points), row * output width + column."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(inputs, conv._reversed_padding_repeated_twice, mode=mode)
    (kh, kw), (dh, dw), (sh, sw), at = conv.kernel_size, conv.dilation, conv.stride, positions[:, :, None, None]
    width = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1  # of the output
    rows = at // width * sh + dh * torch.arange(kh, device=at.device)[:, None]  # (B, points, kh, 1)
    columns = at % width * sw + dw * torch.arange(kw, device=at.device)  # (B, points, 1, kw)
    image = torch.arange(len(inputs), device=at.device)[:, None, None, None]
    patches = padded.permute(0, 2, 3, 1)[image, rows, columns]  # (B, points, kh, kw, c)
    return patches.permute(0, 1, 4, 2, 3).flatten(2).flatten(0, 1)  # (B * points, c * kh * kw)


@torch.no_grad()
def sample_layer(
    network: nn.Module,
    layer: str,
    images: Tensor,
    *,
    points: int = 10,
    seed: int = 0,
    original: nn.Module | None = None,
    batch_size: int = 100,
) -> tuple[Tensor, Tensor]:
    """Patches X (N, c * kh * kw) and outputs Y (N, n) of one convolution, as `channel_prune` samples them.

    X comes from `network`, Y from `original` (default: the same), both in evaluation mode, before any activation: at
    `points` distinct positions (at most all) of each prepared image (B, 3, H, W), drawn from `seed`. Raises ValueError
    for a grouped layer or no convolution, misshapen or infinite images.

    >>> X, Y = sample_layer(nn.Sequential(nn.Conv2d(3, 8, 5)), "0", torch.randn(2, 3, 9, 9), points=4)
    >>> X.shape, Y.shape
    (torch.Size([8, 75]), torch.Size([8, 8]))
    """
    network = copy.deepcopy(network).eval()
    original = network if original is None else copy.deepcopy(original).eval()
    X, Y = zip(*_chunks(network, original, layer, images, points, seed, batch_size), strict=True)
    return torch.cat(X), torch.cat(Y)


def widths(network: nn.Module, example: Tensor, flop_ratio: float) -> dict[str, int]:
    """Input channels to keep in each convolution that can lose some, for a FLOP ratio of the whole network.

    One fraction for all, as near to the ratio as a channel allows. `example` is (B, C, H, W). Raises ValueError for a
    ratio of 1 or less or out of reach.

    >>> from sppkit import networks
    >>> widths(networks.create("convnet"), torch.zeros(1, 3, 32, 32), 2)
    {'conv2': 20, 'conv3': 20}
    """
    links = channel_links(network)
    plan = make_plan(network, example, flop_ratio=flop_ratio, kind="filter", layers=[*links.values()])
    return {name: plan.groups.sizes[producer] - plan.targets[producer] for name, producer in links.items()}


@torch.no_grad()
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

    Samples are those of `sample_layer`; widths come from `flop_ratio` (see `widths`) or `keep`, layer -> channels. A
    layer that keeps all is only refitted; one with fewer live channels keeps those. Each gets a bias. Of the table,
    error_before is with the old weights of the kept channels, error after the refit (see `reconstruct.error`); alpha
    and violation are of `lasso.select`. Raises ValueError as those do, and for layers or widths not to be pruned.
    """
    if (flop_ratio is None) == (keep is None):
        raise ValueError("give either flop_ratio or keep")
    original, pruned = copy.deepcopy(network).eval(), copy.deepcopy(network).eval()
    links = channel_links(original)  # a producer runs before the next: from input to output
    example = images[:1].to(next(pruned.parameters()).device)
    wanted = keep if keep is not None else widths(original, example, flop_ratio or 0.0)
    for name, width in wanted.items():
        if name not in links or not 1 <= width <= _convolution(original, name).in_channels:
            allowed = {link: f"1..{_convolution(original, link).in_channels}" for link in links}
            raise ValueError(f"keep={width} for layer {name!r}; the layers and widths that can be pruned: {allowed}")
    rows = []
    for name in (name for name in links if name in wanted):
        try:
            moments = Moments()
            for chunk in _chunks(pruned, original, name, images, points, seed, batch_size):
                moments.add(*chunk)
            rows.append([name, *_prune_layer(_convolution(pruned, name), moments, wanted[name])])
        except ValueError as problem:
            raise ValueError(f"layer {name!r}: {problem}") from problem
    for module, like in zip(pruned.modules(), network.modules(), strict=True):
        module.training = like.training
    columns = ["layer", "channels", "kept", "error_before", "error", "alpha", "violation"]
    return pruned, pd.DataFrame(rows, columns=columns)


def _prune_layer(conv: nn.Conv2d, moments: Moments, keep: int) -> tuple[float, ...]:
    """Select, refit and mask one convolution in place; its row of the table."""
    bias = conv.bias if conv.bias is not None else conv.weight.new_zeros(conv.out_channels)
    kept, alpha, violation = torch.arange(conv.in_channels, device=bias.device), 0.0, 0.0
    if keep < conv.in_channels:
        gram, correlation = lasso_problem(moments, conv.weight)
        found = select(gram, correlation, min(keep, max(int((gram.diagonal() > 0).sum()), 1)))
        kept, alpha, violation = found.kept, found.alpha, found.violation
    before = error(moments, conv.weight[:, kept], bias, kept)
    fit = refit(moments, kept, (conv.kernel_size[0], conv.kernel_size[1]))
    conv.weight.zero_()
    conv.weight[:, kept] = fit.weight.to(conv.weight)
    conv.bias = nn.Parameter(fit.bias.to(conv.weight))
    return conv.in_channels, len(kept), before, fit.error, alpha, violation


def _chunks(
    network: nn.Module, original: nn.Module, layer: str, images: Tensor, points: int, seed: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """X and Y of `sample_layer`, batch by batch; the networks are in evaluation mode."""
    if images.ndim != 4 or not len(images) or not images.isfinite().all() or points < 1:
        raise ValueError(f"images {tuple(images.shape)} must be (B > 0, C, H, W), all finite, and points={points} > 0")
    conv, generator = _convolution(network, layer), torch.Generator().manual_seed(seed)  # on the CPU: same positions
    for batch in images.split(batch_size):
        batch = batch.to(conv.weight.device)
        inputs, output = _capture(network, conv, batch)
        output = output if original is network else _capture(original, _convolution(original, layer), batch)[1]
        drawn = torch.rand(len(output), output[0, 0].numel(), generator=generator)
        positions = drawn.topk(min(points, drawn.shape[1])).indices.to(output.device)  # (B, points), distinct
        Y = output.flatten(2).mT.take_along_dim(positions[:, :, None], 1).flatten(0, 1)  # (B * points, n)
        yield sample_patches(inputs, conv, positions), Y


def _capture(network: nn.Module, layer: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's input and its own output when `batch` goes in; the layers after it are not run."""

    def reached(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        raise _Reached(arguments[0], output)

    handle = layer.register_forward_hook(reached)
    try:
        network(batch)
    except _Reached as caught:
        return caught.args[0], caught.args[1]
    finally:
        handle.remove()
    raise ValueError("the network never runs this layer")


def _convolution(network: nn.Module, name: str) -> nn.Conv2d:
    found = {key: m for key, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1}
    if name not in found:
        raise ValueError(f"layer {name!r} is grouped or no convolution; choose one of {', '.join(found) or 'none'}")
    return found[name]
