"""Masking in one pass over memory each way: Triton kernels on a GPU, torch's operators elsewhere."""

import warnings
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a torch without it: on a CPU, on Windows
    triton = _hide = _clear = None
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


def hide(weight: Tensor, keep: Tensor, groups: Tensor, mask: Tensor, masked: Tensor) -> None:
    """mask = keep[groups] and masked = weight · mask; keep (G,), groups as `narrow` gives them, the others as long."""
    if not _launched(_hide, weight, keep, groups, mask, masked):
        torch.mul(weight, torch.index_select(keep, 0, groups.int(), out=mask), out=masked)


def narrow(groups: Tensor, count: int) -> Tensor:
    """int32 indices below `count`, on a GPU in two bytes where these can hold them: `hide` waits for memory alone."""
    return groups.to(torch.uint16) if groups.is_cuda and count <= 2**16 else groups


def clear(first: Tensor, second: Tensor, mask: Tensor) -> None:
    """Set both to 0 where the mask is 0."""
    if not _launched(_clear, first, second, mask):
        first.mul_(mask)
        second.mul_(mask)


def _launched(kernel: Any, *tensors: Tensor) -> bool:
    first, count = tensors[0], len(tensors[0])
    if kernel is None or not first.is_cuda or first.dtype != torch.float32:
        return False
    arguments = [tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor for tensor in tensors]
    try:
        with torch.cuda.device(first.device):
            kernel[(triton.cdiv(count, 2048),)](*arguments, count, BLOCK=2048)  # elements a program
    except Exception as error:  # Triton compiles at the first launch: no compiler, or a GPU that it does not know
        warnings.warn(f"Triton's kernels do not run here ({error}); torch's operators mask instead", stacklevel=2)
        globals().update(_hide=None, _clear=None)
    return kernel in (_hide, _clear)
