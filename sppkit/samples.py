"""Samples for a convolution: the patches that it reads and the outputs that it is to give there, batch by batch."""

import functools
import gc
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sppkit import cost
from sppkit.compact import SampledConv2d
from sppkit.graph import Probe, Site, Start

Starts = dict[int, Start] | None  # of each batch
KEPT = 2**30  # bytes of values on the way, at most, that one layer's pass leaves for the next one's
Samples = list[tuple[Tensor, Tensor]]  # of each batch: positions (B, points), outputs there (B * points, n)
Function = TypeVar("Function", bound=Callable[..., Any])


def frugal(function: Function) -> Function:
    """`function` begins again with half its `batch_size` images a chunk when memory runs out; a warning names it."""

    @functools.wraps(function)
    def run(*arguments: Any, **settings: Any) -> Any:
        while True:
            try:
                return function(*arguments, **settings)
            except (RuntimeError, MemoryError) as problem:
                size, known = settings.get("batch_size", 100) // 2, (torch.OutOfMemoryError, MemoryError)
                if not size or not (isinstance(problem, known) or "can't allocate memory" in str(problem)):
                    raise
            gc.collect()  # a graph that was being run refers to itself
            warnings.warn(f"out of memory: begun again with batch_size={size}", stacklevel=2)
            settings["batch_size"] = size

    return cast(Function, run)


def sample_patches(inputs: Tensor, conv: nn.Conv2d, positions: Tensor) -> Tensor:
    """X (B * points, c * kh * kw) that `conv` reads for output `positions` (B, points), row * output width + column."""
    inputs = inputs[:, conv.index] if isinstance(conv, SampledConv2d) else inputs
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(inputs, conv._reversed_padding_repeated_twice, mode=mode)
    (kh, kw), (dh, dw), (sh, sw), at = conv.kernel_size, conv.dilation, conv.stride, positions[:, :, None, None]
    width = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1  # of the output
    rows = at // width * sh + dh * torch.arange(kh, device=at.device)[:, None]  # (B, points, kh, 1)
    columns = at % width * sw + dw * torch.arange(kw, device=at.device)  # (B, points, 1, kw)
    image = torch.arange(len(inputs), device=at.device)[:, None, None, None]
    patches = padded.permute(0, 2, 3, 1)[image, rows, columns]  # (B, points, kh, kw, c)
    return patches.permute(0, 1, 4, 2, 3).flatten(2).flatten(0, 1)  # (B * points, c * kh * kw)


def collect(
    network: nn.Module, graph: fx.Graph, places: Mapping[str, Site], images: Tensor, points: int, seed: int, size: int
) -> dict[str, Samples]:
    """In one pass, for each place its positions and what it is to reproduce there: its output, or the sum it enters."""
    if images.ndim != 4 or not len(images) or not images.isfinite().all() or points < 1:
        raise ValueError(f"images {tuple(images.shape)} must be (B > 0, C, H, W), all finite, and points={points} > 0")
    cost.layer_table(network, images[:1].to(next(network.parameters()).device))
    if (images == images[:1, :, :1, :1]).all():
        raise ValueError(f"images {tuple(images.shape)} are constant, so there is nothing to choose by")
    samples: dict[str, Samples] = {name: [] for name in places}
    generators = {name: torch.Generator().manual_seed(seed) for name in places}  # on the CPU: the same on any device

    def see(name: str) -> Callable[[Tensor], None]:
        def sample(output: Tensor) -> None:
            drawn = torch.rand(len(output), output[0, 0].numel(), generator=generators[name])
            positions = drawn.topk(min(points, drawn.shape[1])).indices.to(output.device)  # (B, points), distinct
            samples[name].append((positions, _at(output, positions)))

        return sample

    probe = Probe(network, graph, after={place.total or place.node: see(name) for name, place in places.items()})
    for batch in images.split(size):
        probe.look(batch.to(next(network.parameters()).device))
    return samples


def patches(
    network: nn.Module, graph: fx.Graph, place: Site, images: Tensor, samples: Samples, batch_size: int, starts: Starts
) -> Iterator[tuple[Tensor, Tensor]]:
    """X and Y of a place, batch by batch; the layers after it are not run.

    starts: {}, then where passes for earlier places ended, renewed where it fits; None if what is before may change.
    """
    seen, conv = dict[str, Tensor](), convolution(network, place.layer)

    def read(inputs: Tensor) -> None:
        seen["X"] = sample_patches(inputs, conv, seen["positions"])

    def shortcut(*terms: Tensor) -> None:
        seen["shortcut"] = _at(terms[place.shortcut], seen["positions"])

    looks = {place.node: read} | ({} if place.total is None else {place.total: shortcut})
    probe = Probe(network, graph, before=looks)
    for number, (batch, (seen["positions"], Y)) in enumerate(zip(images.split(batch_size), samples, strict=True)):
        start = probe.look(batch.to(conv.weight.device), None if starts is None else starts.get(number, (0, {})))
        held = sum(v.untyped_storage().nbytes() if isinstance(v, Tensor) else math.inf for v in start[1].values())
        if starts is not None and held * len(samples) <= KEPT:
            starts[number] = start
        yield seen["X"], Y - seen["shortcut"] if place.total is not None else Y  # Y1 - Y1' + Y2


def _at(output: Tensor, positions: Tensor) -> Tensor:
    """Values (B * points, n) of a feature map (B, n, H, W) at positions (B, points)."""
    return output.flatten(2).mT.take_along_dim(positions[:, :, None], 1).flatten(0, 1)


def convolution(network: nn.Module, name: str) -> nn.Conv2d:
    found = {key: m for key, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1}
    if name not in found:
        raise ValueError(f"layer {name!r} is grouped or no convolution; choose one of {', '.join(found) or 'none'}")
    return found[name]
