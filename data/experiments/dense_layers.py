"""What a GPU's library leaves lying in dense layers, on trial: passes over memory that can be spared.

Dense networks gain as pruned ones do, so `bench_speed` gives them to both.

    Rectified    a convolution and the ReLU after it: the output is written once
    Summed       a convolution, what is added to it, and the ReLU after the sum, in one go
    ImageConv2d  a convolution of few columns, as those of an image are: read as it lies, in no multiple of 8 channels
    PairedConv2d a convolution of few filters: two places of a row at once, by the library
    MaxPool2d    max pooling by a kernel of our own, in the layout that it finds
"""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sppkit.compact import SUMS, ColumnConv2d, SampledConv2d, trace

RELUS = (F.relu, torch.relu)
IN_PLACE = (operator.iadd, operator.isub, operator.imul, "add_")
FEW = 256  # columns of an `ImageConv2d` at most
STEP = 32  # columns that it multiplies at once
NARROW = 32  # filters of a `PairedConv2d` at most
TILES = {"image": {"PLACES": 128, "num_warps": 4}, "pool": {"NUMBERS": 2048, "num_warps": 4}}  # of a program
try:
    import triton
    import triton.language as tl
except ImportError:  # a torch without it
    triton = None
else:

    @triton.jit
    def _image(  # type: ignore[no-untyped-def]
        x, weight, bias, out, places, filters, H, W, Ho, Wo, sB, sC, sH, sW, down, across, top, left, dh, dw,
        K: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, PLACES: tl.constexpr, FILTERS: tl.constexpr,
        STEP: tl.constexpr, RELU: tl.constexpr,
    ):  # fmt: skip
        at, n = tl.program_id(0) * PLACES + tl.arange(0, PLACES), tl.arange(0, FILTERS)
        image, rest = at // (Ho * Wo), at % (Ho * Wo)
        h, w = rest // Wo * down - top, rest % Wo * across - left
        base = x + image.to(tl.int64) * sB
        total = tl.full((PLACES, FILTERS), 0.0, tl.float32)
        for first in tl.static_range(0, K, STEP):
            k = first + tl.arange(0, STEP)
            y, z = h[:, None] + (k // KW % KH * dh)[None, :], w[:, None] + (k % KW * dw)[None, :]
            there = (at < places)[:, None] & (k < K)[None, :] & (y >= 0) & (y < H) & (z >= 0) & (z < W)
            offset = (k // (KH * KW) * sC)[None, :] + y * sH + z * sW
            a = tl.load(base[:, None] + offset, mask=there, other=0)
            known = (k < K)[:, None] & (n < filters)[None, :]
            b = tl.load(weight + k[:, None] * filters + n[None, :], mask=known, other=0)
            total = tl.dot(a, b, total, input_precision="ieee")
        total += tl.load(bias + n, mask=n < filters, other=0).to(tl.float32)[None, :]
        total = tl.maximum(total, 0.0) if RELU else total
        to = out + at.to(tl.int64)[:, None] * filters + n[None, :]
        tl.store(to, total.to(out.dtype.element_ty), mask=(at < places)[:, None] & (n < filters)[None, :])

    @triton.jit
    def _pool(  # type: ignore[no-untyped-def]
        x, out, places, C, H, W, Ho, Wo, down, across, top, left, KH: tl.constexpr, KW: tl.constexpr,
        PLACES: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        parts = (C + WIDE - 1) // WIDE
        c = tl.program_id(0) % parts * WIDE + tl.arange(0, WIDE)
        at = tl.program_id(0) // parts * PLACES + tl.arange(0, PLACES)
        image, rest = at // (Ho * Wo), at % (Ho * Wo)
        h, w = rest // Wo * down - top, rest % Wo * across - left
        base = x + (image.to(tl.int64) * H * W * C)[:, None] + c[None, :]
        most = tl.full((PLACES, WIDE), float("-inf"), out.dtype.element_ty)
        for tap in tl.static_range(KH * KW):
            y, z = h + tap // KW, w + tap % KW
            there = (at < places) & (y >= 0) & (y < H) & (z >= 0) & (z < W)
            read = base + ((y * W + z) * C)[:, None]
            value = tl.load(read, mask=there[:, None] & (c < C)[None, :], other=float("-inf"))
            most = tl.maximum(most, value, propagate_nan=tl.PropagateNan.ALL)
        to = out + at.to(tl.int64)[:, None] * C + c[None, :]
        tl.store(to, most, mask=(at < places)[:, None] & (c < C)[None, :])


class Rectified(nn.Module):
    """A convolution of any kind, and a ReLU."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if not _is_plain(layer) or not x.is_cuda:
            return F.relu(layer(x))
        conv = cast(nn.Conv2d, layer)
        return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, *_moves(conv))


class Summed(nn.Module):
    """A convolution, a sum with what else there is, and a ReLU."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        layer = self.layer
        if not x.is_cuda or getattr(other, "shape", None) != (len(x), layer.out_channels, *_size(x, layer)):
            return F.relu(layer(x) + other)  # a sum that spreads one of both, for one
        return torch.cudnn_convolution_add_relu(x, layer.weight, other, 1.0, layer.bias, *_moves(layer))


def _moves(layer: nn.Conv2d) -> tuple[Any, ...]:
    return layer.stride, layer.padding, layer.dilation, layer.groups


def _is_plain(layer: nn.Module) -> bool:
    """Whether a convolution is one that the library's functions take as it is."""
    plain = isinstance(layer, nn.Conv2d) and not isinstance(layer, SampledConv2d)
    return plain and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _size(x: Tensor, layer: Any) -> tuple[int, int]:
    """Height and width of what a convolution with padding in numbers gives."""
    sides = zip(x.shape[2:], layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True)
    Ho, Wo = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides)
    return Ho, Wo


class ImageConv2d(nn.Module):
    """A convolution of the first channels of its input, those that `fast.fill_up` did not add, in channels-last.

    ValueError for what it cannot be: more than FEW columns, more than 128 filters, groups, other padding than of zeros.
    """

    def __init__(self, conv: nn.Conv2d, *, relu: bool = False) -> None:
        super().__init__()
        weight = conv.weight.detach()[:, : conv.in_channels - getattr(conv, "filled", 0)]
        if weight[0].numel() > FEW or len(weight) > 128 or conv.groups > 1:
            raise ValueError(f"{conv}: an image's has at most {FEW} columns, 128 filters and one group")
        if not _is_plain(conv):
            raise ValueError(f"{conv}: padding is of zeros, in numbers")
        if triton is None:
            raise RuntimeError("Triton is not installed; torch's builds for CUDA on Linux bring it")
        self.kernel_size, self.stride, self.relu = conv.kernel_size, conv.stride, relu
        self.padding, self.dilation = conv.padding, conv.dilation
        self.weight = nn.Parameter(weight.flatten(1).T.contiguous())  # (K, O)
        self.bias = nn.Parameter(weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        (K, filters), (B, _, H, W), kernel = self.weight.shape, x.shape, globals()["_image"]
        Ho, Wo = _size(x, self)
        how = {"K": K, "KH": self.kernel_size[0], "KW": self.kernel_size[1], "STEP": STEP, "RELU": self.relu}
        how |= {"FILTERS": max(16, triton.next_power_of_2(filters)), **TILES["image"]}
        y, grid = x.new_empty(B, Ho, Wo, filters), (triton.cdiv(B * Ho * Wo, how["PLACES"]),)
        moves = (*self.stride, *self.padding, *self.dilation)
        kernel[grid](x, self.weight, self.bias, y, B * Ho * Wo, filters, H, W, Ho, Wo, *x.stride(), *moves, **how)
        return y.permute(0, 3, 1, 2)


class PairedConv2d(nn.Module):
    """A convolution that gives two neighbours of a row at once, with the ReLU after it where `relu` says so.

    Twice the filters on a kernel wider by one, the second half of them a tap later, by a stride of 2: a library reads
    the input for both, and has filters enough for its kernels. A row of odd length is computed place by place.

    ValueError where neighbours share nothing, or for other padding than of zeros.
    """

    def __init__(self, conv: nn.Conv2d, *, relu: bool = False) -> None:
        super().__init__()
        if not _is_plain(conv):
            raise ValueError(f"{conv}: padding is of zeros, in numbers")
        if (conv.stride[1], conv.dilation[1], conv.groups) != (1, 1, 1) or conv.kernel_size[1] == 1:
            raise ValueError(
                f"{conv}: neighbours of a row share what they read by a stride, a dilation and groups of 1"
            )
        weight, bias = conv.weight.detach(), conv.bias
        both = torch.cat([F.pad(weight, (0, 1)), F.pad(weight, (1, 0))])  # (2 O, C, KH, KW + 1)
        self.weight = nn.Parameter(both.contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(weight.new_zeros(len(both)) if bias is None else bias.detach().repeat(2))
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.dilation, self.relu = conv.dilation, relu

    def forward(self, x: Tensor) -> Tensor:
        Ho, Wo = _size(x, self)
        weight, bias, down, filters = self.weight, self.bias, self.stride[0], len(self.bias) // 2
        if Wo % 2:
            return self._conv(x, weight[:filters, :, :, :-1].contiguous(), bias[:filters], (down, 1))
        y = self._conv(x, weight, bias, (down, 2)).permute(0, 2, 3, 1)
        return y.reshape(len(x), Ho, Wo, filters).permute(0, 3, 1, 2)

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int]) -> Tensor:
        moves: tuple[Any, ...] = (stride, self.padding, self.dilation, 1)
        if self.relu and x.is_cuda:
            return torch.cudnn_convolution_relu(x, weight, bias, *moves)
        y = F.conv2d(x, weight, bias, *moves)
        return F.relu(y) if self.relu else y


class MaxPool2d(nn.MaxPool2d):
    """The same as torch's, on a GPU; what lies in an order that the kernel does not know, by torch's."""

    def forward(self, x: Tensor) -> Tensor:
        for order in ((0, 2, 3, 1), (0, 1, 2, 3), (1, 0, 2, 3)) if triton and x.ndim == 4 else ():
            laid = x.permute(order)
            if laid.is_contiguous():
                last = order[3] == 1
                y = self._pooled(laid if last else laid.flatten(0, 1).unsqueeze(3))
                return y.permute(0, 3, 1, 2) if last else y.unflatten(0, laid.shape[:2])[..., 0].permute(order)
        return super().forward(x)

    def _pooled(self, x: Tensor) -> Tensor:
        """Of (images, H, W, C)."""
        (B, H, W, C), kernel = x.shape, globals()["_pool"]
        (kh, kw), (down, across), (top, left) = (_pair(v) for v in (self.kernel_size, self.stride, self.padding))
        Ho, Wo = (H + 2 * top - kh) // down + 1, (W + 2 * left - kw) // across + 1
        y, wide, how = x.new_empty(B, Ho, Wo, C), min(128, triton.next_power_of_2(C)), dict(TILES["pool"])
        most = how.pop("NUMBERS") // wide
        grid = (triton.cdiv(B * Ho * Wo, most) * triton.cdiv(C, wide),)
        tail = (down, across, top, left, kh, kw, most, wide)
        kernel[grid](x, y, B * Ho * Wo, C, H, W, Ho, Wo, *tail, **how)
        return y


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def rectified(network: nn.Module) -> nn.Module:
    """The network with ReLUs, and sums in front of them, inside the convolutions that nothing else reads.

    BatchNorms have been folded. Of a sum of two convolutions the later one gives its bias to the other. The network
    given is not to be used any more.
    """
    graph, modules = trace(network), dict(network.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in [*graph.nodes]:
        module = _module(modules, node)
        if not isinstance(module, nn.Conv2d | ColumnConv2d) or calls[node.target] > 1:
            continue
        after = _last(modules, node)
        reader = next(iter(after.users)) if len(after.users) == 1 else after
        if _is_relu(modules, reader):
            reader.replace_all_uses_with(after)
            graph.erase_node(reader)
            network.set_submodule(str(node.target), Rectified(module))
        elif _is_plain(module) and (relu := _relu_of_sum(modules, node, after, reader)) is not None:
            other = next(each for each in reader.all_input_nodes if each is not after)
            with graph.inserting_before(relu):
                made = graph.call_module(node.target, (node.args[0], other))
            relu.replace_all_uses_with(made)
            behind = [relu, reader]
            while after is not node:
                behind.append(after)
                after = cast(fx.Node, after.args[0])
            for gone in (*behind, node):
                graph.erase_node(gone)
            network.set_submodule(str(node.target), Summed(cast(nn.Conv2d, module)))
            _give_bias(dict(network.named_modules()), calls, other, cast(nn.Conv2d, module))
    return fx.GraphModule(network, graph)


def _last(modules: dict[str, nn.Module], node: fx.Node) -> fx.Node:
    """The last of the Identities behind a node that nothing else reads, or the node."""
    while len(node.users) == 1 and isinstance(_module(modules, next(iter(node.users))), nn.Identity):
        node = next(iter(node.users))
    return node


def _is_relu(modules: dict[str, nn.Module], node: fx.Node) -> bool:
    return isinstance(_module(modules, node), nn.ReLU) or node.target in RELUS


def _relu_of_sum(modules: dict[str, nn.Module], conv: fx.Node, after: fx.Node, node: fx.Node) -> fx.Node | None:
    """The ReLU behind the sum of `after`, where a convolution ends, and another value that `node` is, if it is one.

    Nothing else reads the sum, and nothing is written in place between the convolution and the ReLU, where both go.
    """
    plain = node.op != "call_module" and node.target in SUMS and len(node.args) == 2 and not node.kwargs
    if not plain or len(node.all_input_nodes) != 2 or len(node.users) != 1:
        return None
    if node.target in IN_PLACE and node.args[0] is not after:
        return None  # someone may read what the sum was written to
    (reader,) = node.users
    between = conv.next
    while between is not reader:
        if between is not node and _writes(modules, between):
            return None
        between = between.next
    return reader if _is_relu(modules, reader) else None


def _writes(modules: dict[str, nn.Module], node: fx.Node) -> bool:
    """Whether a node writes to its input."""
    named = node.op == "call_method" and str(node.target).endswith("_")
    told = True in (node.kwargs.get("inplace"), *node.args[1:]) and node.op == "call_function"
    return named or told or node.target in IN_PLACE or bool(getattr(_module(modules, node), "inplace", False))


def _give_bias(modules: dict[str, nn.Module], calls: Counter[Any], node: fx.Node, to: nn.Conv2d) -> None:
    """Move the bias of the convolution that `node` comes from, where nothing else reads it; modules as they are now."""
    while isinstance(_module(modules, node), nn.Identity) and len(node.users) == 1:
        node = cast(fx.Node, node.args[0])
    conv = _module(modules, node)
    free = len(node.users) == 1 and calls[node.target] == 1
    if free and type(conv) is nn.Conv2d and conv.bias is not None and conv.out_channels == to.out_channels:
        to.bias = nn.Parameter(conv.bias.detach() + (0 if to.bias is None else to.bias.detach()))
        conv.bias = None


def _module(modules: dict[str, nn.Module], node: fx.Node) -> nn.Module | None:
    return modules.get(str(node.target)) if node.op == "call_module" else None


def own_kernels(network: nn.Module) -> nn.Module:
    """The network, in place, with `MaxPool2d`, and `ImageConv2d` where fewer than 8 channels are read, zeros aside."""
    for name, module in [*network.named_modules()]:
        if type(module) is nn.MaxPool2d:
            if module.ceil_mode or module.return_indices or _pair(module.dilation) != (1, 1):
                continue
            network.set_submodule(name, MaxPool2d(module.kernel_size, module.stride, module.padding))
    for name, conv, relu in _convolutions(network):
        filled = getattr(conv, "filled", 0)
        if conv.in_channels - filled < 8:
            with contextlib.suppress(ValueError):  # too many columns, or filters
                network.set_submodule(name, ImageConv2d(conv, relu=relu))
                if filled:  # by `fast.fill_up`, in an nn.Sequential
                    network.set_submodule(name.removesuffix("1") + "0", nn.Identity())
    return network


def paired(network: nn.Module) -> nn.Module:
    """The network, in place, with `PairedConv2d` where 8 channels and more are read by NARROW filters and fewer."""
    for name, conv, relu in _convolutions(network):
        if conv.in_channels >= 8 and conv.out_channels <= NARROW:
            with contextlib.suppress(ValueError):  # neighbours share nothing
                network.set_submodule(name, PairedConv2d(conv, relu=relu))
    return network


def _convolutions(network: nn.Module) -> list[tuple[str, nn.Conv2d, bool]]:
    """Of plain convolutions: the name of the module that one is or is inside of, the layer, whether a ReLU follows."""
    inside = {f"{name}.layer" for name, module in network.named_modules() if isinstance(module, Rectified | Summed)}
    found = []
    for name, module in network.named_modules():
        conv = module.layer if isinstance(module, Rectified) else module
        if isinstance(conv, nn.Conv2d) and name not in inside:
            found.append((name, conv, conv is not module))
    return found
