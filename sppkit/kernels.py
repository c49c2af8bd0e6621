"""Masking in one pass over memory each way: Triton kernels on a GPU, torch's operators elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a torch without it: on a CPU, on Windows
    triton = None

BLOCK = 2048  # elements a program

if triton is not None:

    @triton.jit
    def _hide(weight, keep, groups, mask, masked, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        there = at < count
        kept = tl.load(keep + tl.load(groups + at, mask=there, other=0), mask=there, other=0)
        tl.store(mask + at, kept, mask=there)
        tl.store(masked + at, tl.where(kept != 0, tl.load(weight + at, mask=there, other=0), 0), mask=there)

    @triton.jit
    def _clear(first, second, mask, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        hidden = (tl.load(mask + at, mask=at < count, other=1) == 0) & (at < count)
        tl.store(first + at, tl.zeros((BLOCK,), tl.float32), mask=hidden)  # what is kept is neither read nor written
        tl.store(second + at, tl.zeros((BLOCK,), tl.float32), mask=hidden)


def hide(weight: Tensor, keep: Tensor, groups: Tensor, mask: Tensor, masked: Tensor) -> None:
    """mask = keep[groups] and masked = weight · mask; keep (G,) bool, groups int32 and the others of one length."""
    if triton is not None and weight.is_cuda and weight.dtype == torch.float32:
        grid = (triton.cdiv(len(weight), BLOCK),)
        _hide[grid](weight, keep.view(torch.uint8), groups, mask.view(torch.uint8), masked, len(weight), BLOCK=BLOCK)
    else:
        torch.index_select(keep, 0, groups, out=mask)
        torch.mul(weight, mask, out=masked)


def clear(first: Tensor, second: Tensor, mask: Tensor) -> None:
    """Set both to 0 where the mask (bool) is False."""
    if triton is not None and first.is_cuda and first.dtype == torch.float32:
        _clear[(triton.cdiv(len(first), BLOCK),)](first, second, mask.view(torch.uint8), len(first), BLOCK=BLOCK)
    else:
        first.mul_(mask)
        second.mul_(mask)
