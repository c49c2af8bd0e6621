"""An engine for column convolutions on a GPU, on trial: a Triton kernel gathers, the library's GEMM multiplies.

The package reads the kept columns through torch's indexing, which is made for any index. Here one program copies the
places of one column, neighbours side by side, out of the input in whatever layout it lies, without a padded copy. What
comes out lies as (O, B, Ho, Wo), which the next such layer reads as it is. `bench_speed` times both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sppkit.compact import ColumnConv2d

BLOCK = 1024  # places a program
try:
    import triton
    import triton.language as tl
except ImportError:  # a torch without it
    triton = _gather = None
else:

    @triton.jit
    def _gather(  # type: ignore[no-untyped-def]
        x, channel, down, across, read, H, W, Ho, Wo, sB, sC, sH, sW, step_h, step_w, places, BLOCK: tl.constexpr
    ):
        k = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        image, rest = at // (Ho * Wo), at % (Ho * Wo)
        h = rest // Wo * step_h + tl.load(down + k)
        w = rest % Wo * step_w + tl.load(across + k)
        inside = (at < places) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        source = x + tl.load(channel + k) * sC + image.to(tl.int64) * sB + h * sH + w * sW
        tl.store(read + k * places + at, tl.load(source, mask=inside, other=0), mask=at < places)


class GatheredConv2d(nn.Module):
    """A `ColumnConv2d` of zero padding on a GPU; ValueError for another padding mode, RuntimeError without Triton."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    channel: Tensor
    down: Tensor
    across: Tensor

    def __init__(self, column: ColumnConv2d) -> None:
        super().__init__()
        if column.padding_mode != "constant":
            raise ValueError(f"padding_mode={column.padding_mode!r} is not gathered; only zeros are")
        if _gather is None:
            raise RuntimeError("Triton is not installed; torch's builds for CUDA on Linux bring it")
        self.weight, self.bias = column.weight, column.bias
        (kh, kw), (dh, dw) = column.kernel_size, column.dilation
        left, _, top, _ = column.padding
        tap = column.index % (kh * kw)
        self.register_buffer("channel", column.index // (kh * kw))
        self.register_buffer("down", tap // kw * dh - top)
        self.register_buffer("across", tap % kw * dw - left)
        self.stride: tuple[int, ...] = column.stride
        self.reach: tuple[int, int] = (
            dh * (kh - 1) + 1 - top - column.padding[3],
            dw * (kw - 1) + 1 - left - column.padding[1],
        )

    def read(self, x: Tensor) -> Tensor:
        """The kept columns (K, B, Ho, Wo)."""
        B, _, H, W = x.shape
        Ho, Wo = ((n - reach) // step + 1 for n, reach, step in zip((H, W), self.reach, self.stride, strict=True))
        read, places = x.new_empty(len(self.channel), B, Ho, Wo), B * Ho * Wo
        sizes: tuple[Any, ...] = (H, W, Ho, Wo, *x.stride(), *self.stride, places)
        if read.numel():
            programs = (len(self.channel), triton.cdiv(places, BLOCK))
            kernel: Any = _gather
            kernel[programs](x, self.channel, self.down, self.across, read, *sizes, BLOCK=BLOCK)
        return read

    def forward(self, x: Tensor) -> Tensor:
        read = self.read(x)
        flat = read.flatten(1)  # (K, B*Ho*Wo)
        y = self.weight @ flat if self.bias is None else torch.addmm(self.bias[:, None], self.weight, flat)
        return y.unflatten(1, read.shape[1:]).transpose(0, 1)  # (B, O, Ho, Wo)


def gathered(network: nn.Module) -> nn.Module:
    """The network with its column convolutions, in place, by this engine."""
    for name, module in [*network.named_modules()]:
        if isinstance(module, ColumnConv2d):
            network.set_submodule(name, GatheredConv2d(module))
    return network
