"""Engines for column convolutions on a GPU, on trial: Triton kernels that read nothing but kept columns.

The package reads them through torch's indexing, which is made for any index. Here

    columns   gathers single columns into a matrix (K, places) that the library's GEMM multiplies; any layout is read as
              it lies, and what comes out lies as (O, B, Ho, Wo), which the next such layer reads in turn
    blocks    gathers runs of 8, 16 or 32 neighbouring channels of one tap, of an input in channels-last, into a matrix
              (places, K) for the library's GEMM; what comes out is in channels-last
    fused     multiplies such runs while it reads them: no matrix is written
    Rectified a layer and the ReLU after it: the output is written once, by cuDNN, the GEMM or `fused`

Padding is never copied: each place of the output knows as bits which of its taps lie inside. `bench_speed` times them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from sppkit.compact import ColumnConv2d, SampledConv2d, trace

ENGINES = ("columns", "blocks", "fused")
RUNS = (32, 16, 8)  # channels
# of a program: places, and columns or runs that share the arithmetic of these places; for `fused`: places, filters
TILES = {"columns": (1024, 16), "blocks": (128, 8), "fused": (64, 256)}
LAUNCH = {"columns": {"num_warps": 4}, "blocks": {"num_warps": 8}, "fused": {"num_warps": 4, "num_stages": 4}}
STEP = 64  # columns that `fused` multiplies at once
RELUS = (nn.functional.relu, torch.relu)
ROWS = 8  # a GEMM is fast where sizes are multiples of it
try:
    import triton
    import triton.language as tl
except ImportError:  # a torch without it
    triton = None
else:

    @triton.jit
    def _place(  # type: ignore[no-untyped-def]
        at, places, H, W, Ho, Wo, sB, sH, sW, down, across, top, left, dh, dw, KH: tl.constexpr, KW: tl.constexpr
    ):
        """Where the window of each place begins in memory, and which of its taps (bits) lie inside the image."""
        image, rest = at // (Ho * Wo), at % (Ho * Wo)
        h, w = rest // Wo * down - top, rest % Wo * across - left
        inside = tl.full(at.shape, 0, tl.int64)
        for tap in tl.static_range(KH * KW):
            y, z = h + tap // KW * dh, w + tap % KW * dw
            there = (at < places) & (y >= 0) & (y < H) & (z >= 0) & (z < W)
            inside |= there.to(tl.int64) << tap
        return image.to(tl.int64) * sB + h * sH + w * sW, inside

    @triton.jit
    def _columns(  # type: ignore[no-untyped-def]
        x, index, read, K, rows, places, H, W, Ho, Wo, sB, sC, sH, sW, down, across, top, left, dh, dw,
        KH: tl.constexpr, KW: tl.constexpr, PLACES: tl.constexpr, COUNT: tl.constexpr,
    ):  # fmt: skip
        parts = (rows + COUNT - 1) // COUNT
        part, at = tl.program_id(0) % parts, tl.program_id(0) // parts * PLACES + tl.arange(0, PLACES)
        base, inside = _place(at, places, H, W, Ho, Wo, sB, sH, sW, down, across, top, left, dh, dw, KH, KW)
        for j in range(COUNT):
            k = part * COUNT + j
            column = tl.load(index + k, mask=k < K, other=0)
            tap = column % (KH * KW)
            offset = (column // (KH * KW)).to(tl.int64) * sC + tap // KW * dh * sH + tap % KW * dw * sW
            value = tl.load(x + base + offset, mask=((inside >> tap) & 1 == 1) & (k < K), other=0)
            value = tl.where(k == K, 1.0, value).to(read.dtype.element_ty)  # what the bias multiplies
            tl.store(read + k.to(tl.int64) * places + at, value, mask=(at < places) & (k < rows))

    @triton.jit
    def _blocks(  # type: ignore[no-untyped-def]
        x, run, taps, read, runs, places, H, W, Ho, Wo, sB, sH, sW, down, across, top, left, dh, dw,
        KH: tl.constexpr, KW: tl.constexpr, RUN: tl.constexpr, PLACES: tl.constexpr, COUNT: tl.constexpr,
    ):  # fmt: skip
        parts, channel = (runs + COUNT - 1) // COUNT, tl.arange(0, RUN)[None, :]
        part, at = tl.program_id(0) % parts, tl.program_id(0) // parts * PLACES + tl.arange(0, PLACES)
        base, inside = _place(at, places, H, W, Ho, Wo, sB, sH, sW, down, across, top, left, dh, dw, KH, KW)
        for j in range(COUNT):
            r = part * COUNT + j
            tap = tl.load(taps + r, mask=r < runs, other=0)
            offset = tl.load(run + r, mask=r < runs, other=0) * RUN + tap // KW * dh * sH + tap % KW * dw * sW
            there = ((inside >> tap) & 1 == 1) & (r < runs)
            value = tl.load(x + (base + offset)[:, None] + channel, mask=there[:, None], other=0)
            to = read + at.to(tl.int64)[:, None] * runs * RUN + r * RUN + channel
            tl.store(to, value, mask=((at < places) & (r < runs))[:, None])

    @triton.jit
    def _fused(  # type: ignore[no-untyped-def]
        x, run, taps, weight, bias, out, runs, places, filters, H, W, Ho, Wo, sB, sH, sW, down, across, top, left, dh,
        dw, KH: tl.constexpr, KW: tl.constexpr, RUN: tl.constexpr, PLACES: tl.constexpr, FILTERS: tl.constexpr,
        STEP: tl.constexpr, RELU: tl.constexpr,
    ):  # fmt: skip
        parts, column = (filters + FILTERS - 1) // FILTERS, tl.arange(0, STEP)
        part, at = tl.program_id(0) % parts, tl.program_id(0) // parts * PLACES + tl.arange(0, PLACES)
        base, inside = _place(at, places, H, W, Ho, Wo, sB, sH, sW, down, across, top, left, dh, dw, KH, KW)
        n = part * FILTERS + tl.arange(0, FILTERS)
        total = tl.full((PLACES, FILTERS), 0.0, tl.float32)
        for first in range(0, runs * RUN, STEP):
            k = first + column
            r = k // RUN
            tap = tl.load(taps + r, mask=r < runs, other=63)  # 63: nowhere
            offset = tl.load(run + r, mask=r < runs, other=0) * RUN + tap // KW * dh * sH + tap % KW * dw * sW
            offset = tl.max_contiguous(tl.multiple_of(offset + column % RUN, RUN), RUN)  # so that vectors are read
            there = tl.max_constancy((inside[:, None] >> tap[None, :]) & 1 == 1, (1, RUN))
            a = tl.load(x + (base[:, None] + offset[None, :]), mask=there, other=0)
            known = (r < runs)[:, None] & (n < filters)[None, :]
            b = tl.load(weight + k[:, None] * filters + n[None, :], mask=known, other=0)
            total = tl.dot(a, b, total, input_precision="ieee")
        total += tl.load(bias + n, mask=n < filters, other=0).to(tl.float32)[None, :]
        total = tl.maximum(total, 0.0) if RELU else total
        to = out + at.to(tl.int64)[:, None] * filters + n[None, :]
        tl.store(to, total.to(out.dtype.element_ty), mask=(at < places)[:, None] & (n < filters)[None, :])


def run_length(index: Tensor, taps: int) -> int:
    """The longest of RUNS in which the columns `index` go, channels c, c+1, ... of one tap from a multiple on; else 1.

    >>> run_length(torch.arange(16) * 9 + 4, 9), run_length(torch.arange(8, 32) * 9, 9), run_length(torch.arange(9), 9)
    (16, 8, 1)
    """
    channel, tap = index // taps, index % taps
    for run in RUNS:
        of = channel // run * taps + tap  # which run each column is of
        if len(index) and (of.bincount()[of] == run).all():
            return run
    return 1


class GatheredConv2d(nn.Module):
    """A `ColumnConv2d` of zero padding by one of ENGINES, with the ReLU after it where `relu` says so.

    ValueError for another padding mode, an engine that the columns do not allow, or more than 63 taps; RuntimeError
    without Triton.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    index: Tensor
    runs: Tensor
    taps: Tensor

    def __init__(self, column: ColumnConv2d, engine: str = "columns", *, relu: bool = False) -> None:
        super().__init__()
        (kh, kw), taps = column.kernel_size, column.kernel_size[0] * column.kernel_size[1]
        self.engine, self.run = engine, run_length(column.index, taps)
        if column.padding_mode != "constant":
            raise ValueError(f"padding_mode={column.padding_mode!r} is not gathered; only zeros are")
        if engine not in ENGINES or taps > 63:
            raise ValueError(f"engine={engine!r}, kernel {kh} x {kw}: one of {', '.join(ENGINES)}, of at most 63 taps")
        if engine != "columns" and self.run == 1:
            raise ValueError(f"engine={engine!r} is for blocks of channels, and these columns go in {self.run}s")
        if triton is None:
            raise RuntimeError("Triton is not installed; torch's builds for CUDA on Linux bring it")
        self.kernel_size, self.stride, self.dilation = column.kernel_size, column.stride, column.dilation
        self.padding = column.padding  # left, right, top, bottom
        weight, index, bias = column.weight.detach(), column.index, column.bias
        if engine == "columns":  # (O, rows), the bias behind the columns
            with_bias = weight if bias is None else torch.cat([weight, bias.detach()[:, None]], 1)
            weight = nn.functional.pad(with_bias, (0, -with_bias.shape[1] % ROWS))
        else:  # (K, O), run by run
            order = ((index // taps // self.run * taps + index % taps) * self.run + index // taps % self.run).argsort()
            weight, first = weight[:, order].T.contiguous(), index[order][:: self.run]
            self.register_buffer("taps", (first % taps).int())
            self.register_buffer("runs", (first // taps // self.run).int())
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None or engine == "columns" else nn.Parameter(bias.detach())
        self.register_buffer("index", index.int())
        self.column, self.relu = (column,), relu  # no submodule; `fast.take_faster` asks for other forms

    def dense(self) -> nn.Module:
        conv = self.column[0].dense().to(self.weight)
        return Rectified(conv) if self.relu else conv

    def fused(self) -> nn.Module:
        """Itself where its columns go in no runs."""
        return GatheredConv2d(self.column[0], "fused", relu=self.relu).to(self.weight) if self.run > 1 else self

    def forward(self, x: Tensor) -> Tensor:
        if self.engine != "columns":
            x = x.contiguous(memory_format=torch.channels_last)
        elif x.stride(1) == 1:  # neighbours in memory are to be neighbouring places, not channels
            x = x.contiguous()
        B, _, H, W = x.shape
        (kh, kw), (dh, dw), (left, right, top, bottom) = self.kernel_size, self.dilation, self.padding
        Ho = (H + top + bottom - dh * (kh - 1) - 1) // self.stride[0] + 1
        Wo = (W + left + right - dw * (kw - 1) - 1) // self.stride[1] + 1
        sB, sC, sH, sW = x.stride()
        tail = (*self.stride, top, left, dh, dw, kh, kw)
        sizes: tuple[Any, ...] = (B * Ho * Wo, H, W, Ho, Wo)
        if self.engine == "columns":
            y = self._by_columns(x, sizes, (sB, sC, sH, sW, *tail))
            y = y.relu_() if self.relu else y
            return y.unflatten(1, (B, Ho, Wo)).transpose(0, 1)  # (B, O, Ho, Wo)
        y = (self._by_blocks if self.engine == "blocks" else self._at_once)(x, sizes, (sB, sH, sW, *tail))
        return y.unflatten(0, (B, Ho, Wo)).permute(0, 3, 1, 2)

    def _by_columns(self, x: Tensor, sizes: tuple[Any, ...], rest: tuple[Any, ...]) -> Tensor:
        K, rows, (most, count), kernel = len(self.index), self.weight.shape[1], TILES["columns"], globals()["_columns"]
        read, grid = x.new_empty(rows, sizes[0]), (triton.cdiv(rows, count) * triton.cdiv(sizes[0], most),)
        if rows:
            how = {"PLACES": most, "COUNT": count, **LAUNCH["columns"]}
            kernel[grid](x, self.index, read, K, rows, *sizes, *rest, **how)
        return self.weight @ read

    def _by_blocks(self, x: Tensor, sizes: tuple[Any, ...], rest: tuple[Any, ...]) -> Tensor:
        runs, (most, count), kernel = len(self.runs), TILES["blocks"], globals()["_blocks"]
        read = x.new_empty(sizes[0], runs * self.run)
        grid = (triton.cdiv(runs, count) * triton.cdiv(sizes[0], most),)
        how = {"RUN": self.run, "PLACES": most, "COUNT": count, **LAUNCH["blocks"]}
        kernel[grid](x, self.runs, self.taps, read, runs, *sizes, *rest, **how)
        bias = x.new_zeros(self.weight.shape[1]) if self.bias is None else self.bias
        return (torch._addmm_activation if self.relu else torch.addmm)(bias, read, self.weight)

    def _at_once(self, x: Tensor, sizes: tuple[Any, ...], rest: tuple[Any, ...]) -> Tensor:
        filters, (most, wide), kernel = self.weight.shape[1], TILES["fused"], globals()["_fused"]
        bias = x.new_zeros(filters) if self.bias is None else self.bias
        y, grid = x.new_empty(sizes[0], filters), (triton.cdiv(filters, wide) * triton.cdiv(sizes[0], most),)
        how = {"RUN": self.run, "PLACES": most, "FILTERS": wide, "STEP": STEP, "RELU": self.relu, **LAUNCH["fused"]}
        given = (x, self.runs, self.taps, self.weight, bias, y, len(self.runs), sizes[0], filters)
        kernel[grid](*given, *sizes[1:], *rest, **how)
        return y


class Rectified(nn.Module):
    """A convolution of any kind, and a ReLU."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if not isinstance(layer, nn.Conv2d) or isinstance(layer, SampledConv2d) or not x.is_cuda:
            return nn.functional.relu(layer(x))
        moves: tuple[Any, ...] = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return torch.cudnn_convolution_relu(x, layer.weight, layer.bias, *moves)


def rectified(network: nn.Module) -> nn.Module:
    """The network with convolutions that nothing but a ReLU reads, by way of folded BatchNorms, as `Rectified`."""
    graph, modules = trace(network), dict(network.named_modules())
    for node in [*graph.nodes]:
        module = _module(modules, node)
        if not isinstance(module, nn.Conv2d | ColumnConv2d):
            continue
        after = node
        while len(after.users) == 1 and isinstance(_module(modules, next(iter(after.users))), nn.Identity):
            after = next(iter(after.users))
        reader = next(iter(after.users)) if len(after.users) == 1 else after
        if isinstance(_module(modules, reader), nn.ReLU) or reader.target in RELUS:
            reader.replace_all_uses_with(after)
            graph.erase_node(reader)
            network.set_submodule(node.target, Rectified(module))
    return fx.GraphModule(network, graph)


def _module(modules: dict[str, nn.Module], node: fx.Node) -> nn.Module | None:
    return modules.get(str(node.target)) if node.op == "call_module" else None


def gathered(network: nn.Module, engine: str = "columns") -> nn.Module:
    """The network with its column convolutions, in place, by this engine where it can be, by "columns" elsewhere.

    A ReLU around one (`rectified`) goes inside.
    """
    around = {module.layer: name for name, module in network.named_modules() if isinstance(module, Rectified)}
    for name, module in [*network.named_modules()]:
        if isinstance(module, ColumnConv2d):
            place, relu = around.get(module, name), module in around
            try:
                network.set_submodule(place, GatheredConv2d(module, engine, relu=relu))
            except ValueError:
                network.set_submodule(place, GatheredConv2d(module, relu=relu))
    return network
