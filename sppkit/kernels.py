"""Triton kernels for a GPU; torch's operators stand in elsewhere.

Masks are applied in one pass over memory each way. Columns of a GEMM matrix are gathered, of any layout, or, in runs of
channels, multiplied as they are read. No padding is copied: each place knows as bits which taps lie inside the image.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

DEVICES = ("cuda",)  # that kernels are for
BLOCK = 2048  # weights that a program masks
TILES = {"PLACES": 1024, "COUNT": 16, "num_warps": 4}  # of a program that gathers: places, columns that share them
FUSED = ((64, 256, 32), (128, 128, 32), (64, 128, 64), (128, 64, 32), (64, 64, 128))  # places, filters, columns at once
THREE = {"num_warps": 4, "num_stages": 3, "maxnreg": 168}  # such programs share a multiprocessor
BUSY = 256  # programs that keep a GPU busy
try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a torch without it: on a CPU, on Windows
    triton = _hide = _clear = _gather = _multiply = None
else:

    @triton.jit
    def _hide(weight, keep, groups, mask, masked, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        there = at < count
        kept = tl.load(keep + tl.load(groups + at, mask=there, other=0).to(tl.int32), mask=there, other=0)
        tl.store(mask + at, kept, mask=there)
        tl.store(masked + at, tl.where(kept != 0, tl.load(weight + at, mask=there, other=0), 0), mask=there)

    @triton.jit
    def _clear(first, second, mask, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        hidden = (tl.load(mask + at, mask=at < count, other=1) == 0) & (at < count)
        tl.store(first + at, 0.0, mask=hidden)  # what is kept is neither read nor written
        tl.store(second + at, 0.0, mask=hidden)

    @triton.jit
    def _place(  # type: ignore[no-untyped-def]
        at, places, H, W, Ho, Wo, sB, sH, sW, down, across, top, left, dh, dw, KH: tl.constexpr, KW: tl.constexpr
    ):
        """Where the window of each place begins in memory, and which of its taps (bits) lie inside the image."""
        image, rest = at // (Ho * Wo), at % (Ho * Wo)
        h, w = rest // Wo * down - top, rest % Wo * across - left
        inside = tl.full(at.shape, 0, tl.int32 if KH * KW < 32 else tl.int64)
        for tap in tl.static_range(KH * KW):
            y, z = h + tap // KW * dh, w + tap % KW * dw
            there = (at < places) & (y >= 0) & (y < H) & (z >= 0) & (z < W)
            inside |= there.to(inside.dtype) << tap
        return image.to(tl.int64) * sB + h * sH + w * sW, inside

    @triton.jit
    def _gather(  # type: ignore[no-untyped-def]
        x, index, read, K, rows, places, H, W, Ho, Wo, sB, sC, sH, sW, down, across, top, left, dh, dw,
        KH: tl.constexpr, KW: tl.constexpr, PLACES: tl.constexpr, COUNT: tl.constexpr,
    ):  # fmt: skip
        parts = (rows + COUNT - 1) // COUNT
        part, at = tl.program_id(0) % parts, tl.program_id(0) // parts * PLACES + tl.arange(0, PLACES)
        base, inside = _place(at, places, H, W, Ho, Wo, sB, sH, sW, down, across, top, left, dh, dw, KH, KW)
        for j in tl.static_range(COUNT):
            k = part * COUNT + j
            column = tl.load(index + k, mask=k < K, other=0)
            tap = column % (KH * KW)
            offset = (column // (KH * KW)).to(tl.int64) * sC + tap // KW * dh * sH + tap % KW * dw * sW
            value = tl.load(x + base + offset, mask=((inside >> tap) & 1 == 1) & (k < K), other=0)
            value = tl.where(k == K, 1.0, value).to(read.dtype.element_ty)  # what a bias multiplies
            tl.store(read + k.to(tl.int64) * places + at, value, mask=(at < places) & (k < rows))

    @triton.jit
    def _product(  # type: ignore[no-untyped-def]
        x, index, weight, base, inside, first, K, sC, sH, sW, dh, dw, KH: tl.constexpr, KW: tl.constexpr,
        RUN: tl.constexpr, FILTERS: tl.constexpr, STEP: tl.constexpr,
    ):  # fmt: skip
        """Of windows at `base` and `weight` (K, O) from filter `first` on; columns in runs of RUN channels."""
        total, k = tl.full((base.shape[0], FILTERS), 0.0, tl.float32), tl.arange(0, STEP)
        column = tl.load(index + k, mask=k < K, other=0)
        for start in range(0, K, STEP):
            k = start + tl.arange(0, STEP)
            later = tl.load(index + k + STEP, mask=k + STEP < K, other=0)  # waited for in the next round
            tap = tl.where(k < K, column % (KH * KW), KH * KW)  # which is never inside
            offset = column // (KH * KW) * sC + tap // KW * dh * sH + tap % KW * dw * sW
            offset = tl.max_contiguous(tl.multiple_of(offset, RUN), RUN)  # so that vectors are read
            there = tl.max_constancy((inside[:, None] >> tap[None, :]) & 1 == 1, (1, RUN))
            a = tl.load(x + (base[:, None] + offset[None, :]), mask=there, other=0)
            total = tl.dot(a, weight.load([start, first]), total, input_precision="ieee")
            column = later
        return total

    @triton.jit
    def _multiply(  # type: ignore[no-untyped-def]
        x, index, weight, bias, out, K, filters, places, H, W, Ho, Wo, sB, sC, sH, sW, down, across, top, left, dh, dw,
        KH: tl.constexpr, KW: tl.constexpr, RUN: tl.constexpr, PLACES: tl.constexpr, FILTERS: tl.constexpr,
        STEP: tl.constexpr,
    ):  # fmt: skip
        parts = (filters + FILTERS - 1) // FILTERS
        first, at = tl.program_id(0) % parts * FILTERS, tl.program_id(0) // parts * PLACES + tl.arange(0, PLACES)
        base, inside = _place(at, places, H, W, Ho, Wo, sB, sH, sW, down, across, top, left, dh, dw, KH, KW)
        total = _product(x, index, weight, base, inside, first, K, sC, sH, sW, dh, dw, KH, KW, RUN, FILTERS, STEP)
        n = first + tl.arange(0, FILTERS)
        if bias is not None:
            total += tl.load(bias + n, mask=n < filters, other=0).to(tl.float32)[None, :]
        to = out + at.to(tl.int64)[:, None] * filters + n[None, :]
        tl.store(to, total.to(out.dtype.element_ty), mask=(at < places)[:, None] & (n < filters)[None, :])


def hide(weight: Tensor, keep: Tensor, groups: Tensor, mask: Tensor, masked: Tensor) -> None:
    """mask = keep[groups] and masked = weight · mask; keep (G,), groups int32 or uint16, the others as long."""
    given, count = (weight, keep, groups, mask, masked), len(weight)
    if weight.dtype != torch.float32 or not _launched("_hide", -(-count // BLOCK), *given, count, BLOCK=BLOCK):
        torch.mul(weight, torch.index_select(keep, 0, groups.int(), out=mask), out=masked)


def clear(first: Tensor, second: Tensor, mask: Tensor) -> None:
    """Set both to 0 where the mask is 0."""
    given, count = (first, second, mask), len(first)
    if first.dtype != torch.float32 or not _launched("_clear", -(-count // BLOCK), *given, count, BLOCK=BLOCK):
        first.mul_(mask)
        second.mul_(mask)


def gather(x: Tensor, columns: Any, rows: int, tiles: dict[str, int] = TILES) -> Tensor | None:
    """What a `ColumnConv2d`, or the like of it, reads of x (B, C, H, W), as (rows, B, Ho, Wo); None where it cannot be.

    Behind the K columns, where `rows` is above K, come a row of ones, which a bias multiplies, and zeros.
    """
    x = x.contiguous() if x.stride(1) == 1 else x  # neighbours in memory are to be neighbouring places, not channels
    if _gather is None or (sizes := _sizes(x, columns)) is None:
        return None
    read, (kh, kw) = x.new_empty(rows, len(x), *sizes[3:5]), columns.kernel_size
    grid = -(-rows // tiles["COUNT"]) * -(-sizes[0] // tiles["PLACES"])
    given = (x, columns.index, read, len(columns.index), rows, *sizes)
    return read if not grid or _launched("_gather", grid, *given, KH=kh, KW=kw, **tiles) else None


def multiply(x: Tensor, columns: Any) -> Tensor | None:
    """What a `ColumnConv2d` whose columns lie in runs gives for x (B, C, H, W), in channels-last; None as `gather`."""
    (kh, kw), index, (filters, K) = columns.kernel_size, columns.index, columns.weight.shape
    runs, version = columns.__dict__.get("runs", (None, 0)), 0 if index.is_inference() else index._version
    if runs[0] is not index or runs[1] != version:  # found out once, since it waits for the device
        runs = columns.runs = index, version, run_length(index, kh * kw), index.int()
    run = math.gcd(runs[2], x.shape[1])
    fits = _multiply is not None and run > 7 and filters % 8 == 0 and x.dtype != torch.float64  # rows of whole 16 bytes
    if not fits or (sizes := _sizes(x := x.contiguous(memory_format=torch.channels_last), columns)) is None:
        return None
    (how, grid), y = tiles(sizes[0], filters), x.new_empty(sizes[0], filters)
    weight = TensorDescriptor.from_tensor(columns.weight.detach().T.contiguous(), [how["STEP"], how["FILTERS"]])
    given = (x, runs[3], weight, columns.bias, y, K, filters, *sizes)
    done = not grid or _launched("_multiply", grid, *given, KH=kh, KW=kw, RUN=run, **how)
    return y.view(len(x), *sizes[3:5], filters).permute(0, 3, 1, 2) if done else None


def tiles(places: int, filters: int) -> tuple[dict[str, int], int]:
    """How to multiply, by how many programs: the first of FUSED that is BUSY and half full or more, or the last."""
    made = [(sizes, -(-places // sizes[0]) * -(-filters // sizes[1])) for sizes in FUSED]
    fits = (m for m in made if m[1] >= BUSY and 2 * (-filters % m[0][1]) < max(m[0][1], 128))
    (P, F, step), grid = next(fits, made[-1])
    return {"PLACES": P, "FILTERS": F, "STEP": step} | THREE, grid


def run_length(index: Tensor, taps: int) -> int:
    """Of how many channels c, c + 1, ... of one tap, from a multiple on, columns lie in runs: 32 at most."""
    first = torch.cat([index.new_zeros(1), (index.diff() != taps).nonzero().flatten() + 1])[: len(index)]  # of a run
    return math.gcd(32, len(index) or 1, *first.tolist(), *(index[first] // taps).tolist())


def _sizes(x: Tensor, columns: Any) -> tuple[int, ...] | None:
    """What both kernels ask of an input and a layer: places, sizes, strides, moves; None where they cannot run."""
    (kh, kw), (down, across), (dh, dw) = columns.kernel_size, columns.stride, columns.dilation
    (B, _, H, W), (left, right, top, bottom) = x.shape, columns.padding
    Ho, Wo = ((H + top + bottom - dh * (kh - 1) - 1) // down + 1, (W + left + right - dw * (kw - 1) - 1) // across + 1)
    if x.device.type not in DEVICES or kh * kw > 63 or min(Ho, Wo) < 1:
        return None
    return B * Ho * Wo, H, W, Ho, Wo, *x.stride(), down, across, top, left, dh, dw


def _launched(name: str, grid: int, *arguments: Any, **how: int) -> bool:
    """Whether a kernel was launched, of so many programs; the first argument is on their device."""
    if (kernel := globals()[name]) is None or arguments[0].device.type not in DEVICES:
        return False
    given = [a.view(torch.uint8) if isinstance(a, Tensor) and a.dtype == torch.bool else a for a in arguments]
    try:
        with torch.cuda.device_of(arguments[0]):
            kernel[(grid,)](*given, **how)
    except Exception as error:  # Triton compiles at the first launch: no compiler, or a GPU that it does not know
        warnings.warn(f"Triton's kernel {name} does not run here ({error}); torch's operators stand in", stacklevel=2)
        globals()[name] = None
    return globals()[name] is not None
