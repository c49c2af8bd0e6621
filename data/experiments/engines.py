"""Engines for column convolutions on a GPU, on trial: Triton kernels that read nothing but kept columns.

    columns   gathers single columns as the package does (`kernels.gather`) into a matrix (K, places) that the library's
              GEMM multiplies; what comes out stays as it lies, (O, B, Ho, Wo), which the next such layer reads in turn
    blocks    gathers runs of 8, 16 or 32 neighbouring channels of one tap, of an input in channels-last, into a matrix
              (places, K) for the library's GEMM; what comes out is in channels-last
    fused     multiplies such runs while it reads them, as the package does, and pools what it gives if that comes next

Each takes the ReLU after it in. `bench_speed` times them.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from typing import Any, cast

import torch
from dense_layers import ImageConv2d, Rectified, _pair
from torch import Tensor, fx, nn

from sppkit import kernels
from sppkit.compact import ColumnConv2d

ENGINES = ("columns", "blocks", "fused")
# Of a program that gathers: places, and columns or runs (COUNT) that share the arithmetic of these places
TILES = {"columns": kernels.TILES, "blocks": {"PLACES": 128, "COUNT": 8, "num_warps": 8}}
BY_TWO = [(2, 2), (2, 2), (0, 0), (1, 1)]  # kernel, stride, padding and dilation of a pooling
ROWS = 8  # a GEMM is fast where sizes are multiples of it
try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    from sppkit.kernels import _place, _product
except ImportError:  # a torch without it
    triton = None
else:

    @triton.jit
    def _blocks(  # type: ignore[no-untyped-def]
        x, run, taps, read, runs, places, H, W, Ho, Wo, sB, sC, sH, sW, down, across, top, left, dh, dw,
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
    def _larger(a, b):  # type: ignore[no-untyped-def]
        return tl.maximum(a, b)

    @triton.jit
    def _fused(  # type: ignore[no-untyped-def]
        x, index, weight, bias, out, K, filters, places, H, W, Ho, Wo, sB, sC, sH, sW, down, across, top, left, dh, dw,
        KH: tl.constexpr, KW: tl.constexpr, RUN: tl.constexpr, PLACES: tl.constexpr, FILTERS: tl.constexpr,
        STEP: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr, NEAR: tl.constexpr,
    ):  # fmt: skip
        parts, row = (filters + FILTERS - 1) // FILTERS, tl.arange(0, PLACES)
        first, tile = tl.program_id(0) % parts * FILTERS, tl.program_id(0) // parts
        BETWEEN: tl.constexpr = PLACES // (4 * NEAR) if NEAR > 1 else 4
        SETS: tl.constexpr = PLACES // (4 * BETWEEN * NEAR)
        if POOL:  # rows NEAR and 2 * NEAR * BETWEEN apart are places of one window
            window = (row // (4 * NEAR * BETWEEN) * BETWEEN + row // (2 * NEAR) % BETWEEN) * NEAR + row % NEAR
            window += tile * (PLACES // 4)
            line = window // (Wo // 2) * 2 + row // (2 * NEAR * BETWEEN) % 2
            at = line * Wo + window % (Wo // 2) * 2 + row // NEAR % 2
        else:
            at = tile * PLACES + row
        base, inside = _place(at, places, H, W, Ho, Wo, sB, sH, sW, down, across, top, left, dh, dw, KH, KW)
        total = _product(x, index, weight, base, inside, first, K, sC, sH, sW, dh, dw, KH, KW, RUN, FILTERS, STEP)
        if POOL:
            total = tl.reshape(total, (SETS, 2, BETWEEN, 2, NEAR, FILTERS))
            total = tl.reduce(tl.reduce(total, 1, _larger), 2, _larger)
            total = tl.reshape(total, (PLACES // 4, FILTERS))
            at, places = tile * (PLACES // 4) + tl.arange(0, PLACES // 4), places // 4
        n = first + tl.arange(0, FILTERS)
        if bias is not None:
            total += tl.load(bias + n, mask=n < filters, other=0).to(tl.float32)[None, :]
        total = tl.maximum(total, 0.0) if RELU else total
        to = out + at.to(tl.int64)[:, None] * filters + n[None, :]
        tl.store(to, total.to(out.dtype.element_ty), mask=(at < places)[:, None] & (n < filters)[None, :])


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
        self.engine, self.run = engine, math.gcd(kernels.run_length(column.index, taps), column.in_channels)
        if column.padding_mode != "constant":
            raise ValueError(f"padding_mode={column.padding_mode!r} is not gathered; only zeros are")
        if engine not in ENGINES or taps > 63:
            raise ValueError(f"engine={engine!r}, kernel {kh} x {kw}: one of {', '.join(ENGINES)}, of at most 63 taps")
        if engine != "columns" and self.run < 8:
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
            weight, first = weight.T.contiguous(), index[:: self.run]
            if engine == "fused":  # rows of whole 16 bytes, which the kernel loads at once
                weight = nn.functional.pad(weight, (0, -weight.shape[1] % ROWS))
            self.register_buffer("taps", (first % taps).int())
            self.register_buffer("runs", (first // taps // self.run).int())
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None or engine == "columns" else nn.Parameter(bias.detach())
        self.register_buffer("index", index.int())
        self.column, self.relu = (column,), relu  # no submodule; `fast.take_faster` asks for other forms
        self.pool = False

    def dense(self) -> nn.Module:
        conv = self.column[0].dense().to(self.weight)
        return Rectified(conv) if self.relu else conv

    def forward(self, x: Tensor) -> Tensor:
        if self.engine == "columns":
            return self._by_columns(x)
        x = x.contiguous(memory_format=torch.channels_last)
        if (sizes := kernels._sizes(x, self)) is None:
            raise RuntimeError(f"engine={self.engine!r} needs a GPU; the images are on {x.device}")
        Ho, Wo = sizes[3:5]
        inside = self.pool and self.engine == "fused" and Ho % 2 == Wo % 2 == 0  # of the kernel
        y = self._at_once(x, sizes, inside) if self.engine == "fused" else self._by_blocks(x, sizes)
        y = y.unflatten(0, (len(x), Ho // 2, Wo // 2) if inside else (len(x), Ho, Wo)).permute(0, 3, 1, 2)
        return nn.functional.max_pool2d(y, 2) if self.pool and not inside else y

    def _by_columns(self, x: Tensor) -> Tensor:
        """(B, O, Ho, Wo), laid out as (O, B, Ho, Wo)."""
        read = kernels.gather(x, self, self.weight.shape[1], TILES["columns"])
        if read is None:
            raise RuntimeError(
                f"engine='columns' needs a GPU that Triton's kernel runs on; the images are on {x.device}"
            )
        flat = read.flatten(1)
        rectified = self.relu and len(read)
        y = torch._addmm_activation(x.new_zeros(flat.shape[1]), self.weight, flat) if rectified else self.weight @ flat
        return y.unflatten(1, read.shape[1:]).transpose(0, 1)

    def _by_blocks(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        (kh, kw), runs, kernel, how = self.kernel_size, len(self.runs), globals()["_blocks"], TILES["blocks"]
        read = x.new_empty(sizes[0], runs * self.run)
        grid = (triton.cdiv(runs, how["COUNT"]) * triton.cdiv(sizes[0], how["PLACES"]),)
        kernel[grid](x, self.runs, self.taps, read, runs, *sizes, KH=kh, KW=kw, RUN=self.run, **how)
        bias = x.new_zeros(self.weight.shape[1]) if self.bias is None else self.bias
        return (torch._addmm_activation if self.relu else torch.addmm)(bias, read, self.weight)

    def _at_once(self, x: Tensor, sizes: tuple[int, ...], pool: bool) -> Tensor:
        (kh, kw), filters, kernel = self.kernel_size, self.column[0].out_channels, globals()["_fused"]
        how, grid = kernels.tiles(sizes[0], filters)
        y = x.new_empty(sizes[0] // 4 if pool else sizes[0], filters)
        weight = TensorDescriptor.from_tensor(self.weight.data, [how["STEP"], how["FILTERS"]])
        given = (x, self.index, weight, self.bias, y, len(self.index), filters, *sizes)
        near = 8 if how["PLACES"] >= 32 * how["num_warps"] else 1  # a thread's rows of a product are 8 apart, and more
        kernel[(grid,)](*given, KH=kh, KW=kw, RUN=self.run, RELU=self.relu, POOL=pool, NEAR=near, **how)
        return y


def pooled(network: fx.GraphModule) -> None:
    """Let layers by "fused" take in, in place, a max pooling by 2 that alone reads what they give."""
    modules, nodes = dict(network.named_modules()), [*network.graph.nodes]
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    for node in nodes:
        pool, read = modules.get(str(node.target)), cast(fx.Node, node.args[0] if node.args else node)
        if node.op != "call_module" or not isinstance(pool, nn.MaxPool2d) or pool.ceil_mode or pool.return_indices:
            continue
        layer = modules.get(str(read.target)) if read.op == "call_module" and calls[read.target] == 1 else None
        by_two = [_pair(v) for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)] == BY_TWO
        if by_two and isinstance(layer, GatheredConv2d) and layer.engine == "fused" and len(read.users) == 1:
            layer.pool = True
            node.replace_all_uses_with(read)
            network.graph.erase_node(node)
    network.recompile()


def gathered(network: nn.Module, engine: str = "columns") -> nn.Module:
    """The network with its column convolutions, in place, by this engine where it can be, by "columns" elsewhere.

    A ReLU around one (`rectified`) goes inside. What reads an image, of few channels, is an `ImageConv2d` if it can be.
    """
    around = {module.layer: name for name, module in network.named_modules() if isinstance(module, Rectified)}
    for name, module in [*network.named_modules()]:
        if isinstance(module, ColumnConv2d):
            network.set_submodule(around.get(module, name), _gathered(module, engine, module in around))
    return network


def _gathered(column: ColumnConv2d, engine: str, relu: bool) -> nn.Module:
    makes: list[Any] = [lambda: GatheredConv2d(column, engine, relu=relu), lambda: GatheredConv2d(column, relu=relu)]
    if column.in_channels < ROWS:
        makes.insert(0, lambda: ImageConv2d(column.dense(), relu=relu))
    for make in makes[:-1]:
        with contextlib.suppress(ValueError):
            return cast(nn.Module, make())
    return cast(nn.Module, makes[-1]())
