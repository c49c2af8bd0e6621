"""From masked to compact: a smaller network that computes the same function.

A masked network holds exact zeros. Two kinds of zeros can be taken out for good:
  * a channel that every consumer ignores: its filter, its BatchNorm entry and its columns go (channel removal);
  * a column of a convolution's GEMM matrix that is zero in every filter: the convolution becomes a
    `ColumnConv2d`, which multiplies only the kept columns.
Which channels meet which convolutions is read off the network's graph (torch.fx), so shortcuts, concatenations and
anything else that mixes channels simply keep theirs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sppkit.networks import WithinChannelLRN

# Modules and functions that treat each channel by itself: a channel can be followed through them.
CHANNELWISE = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.Dropout2d)
CHANNELWISE += (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, WithinChannelLRN)  # type: ignore[assignment]
CHANNELWISE_FUNCTIONS = {
    F.relu,
    torch.relu,
    F.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
    F.dropout,
    "relu",
}


class ColumnConv2d(nn.Module):
    """A convolution that keeps only some columns of its GEMM matrix.

    weight (O, K), index (K,) into the C·kh·kw columns of the dense form, in the order of `F.unfold`. This plain form
    unfolds everything and then selects; it saves arithmetic, not yet time.
    """

    index: Tensor

    def __init__(self, conv: nn.Conv2d, kept: Tensor) -> None:
        super().__init__()
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self.padding, self.dilation = conv.padding, conv.dilation
        matrix = conv.weight.detach().flatten(1)  # (O, C*kh*kw)
        self.weight = nn.Parameter(matrix[:, kept].clone())
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone())
        self.register_buffer("index", kept.clone())

    def forward(self, x: Tensor) -> Tensor:
        settings = {"dilation": self.dilation, "padding": self.padding, "stride": self.stride}
        columns = F.unfold(x, self.kernel_size, **settings)  # type: ignore[arg-type]  # (B, C*kh*kw, Ho*Wo)
        y = self.weight @ columns[:, self.index]  # (B, O, Ho*Wo)
        if self.bias is not None:
            y = y + self.bias[:, None]
        spans = [
            (size + 2 * pad - step * (kernel - 1) - 1) // stride + 1  # type: ignore[operator]
            for size, pad, step, kernel, stride in zip(
                x.shape[2:], self.padding, self.dilation, self.kernel_size, self.stride, strict=True
            )
        ]
        return y.unflatten(2, spans)  # (B, O, Ho, Wo)

    def extra_repr(self) -> str:
        columns = self.in_channels * self.kernel_size[0] * self.kernel_size[1]
        return f"{self.in_channels}, {self.out_channels}, columns={len(self.index)} of {columns}"


@dataclass
class Flow:
    """Where the channels of one convolution go: its consumers, and the BatchNorms on the way.

    `mixed` says that something other than a convolution reads them (a sum, a concatenation, a linear layer).
    """

    consumers: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    mixed: bool = False


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, WithinChannelLRN | ColumnConv2d) or super().is_leaf_module(
            m, module_qualified_name
        )


def flows(network: nn.Module) -> dict[str, Flow]:
    """The `Flow` of every convolution, in the order in which they run. ValueError names what cannot be followed."""
    try:
        graph = _Tracer().trace(network)
    except Exception as error:
        raise ValueError(f"{type(network).__name__} cannot be traced by torch.fx: {error}") from error
    found: dict[str, Flow] = {}
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(network.get_submodule(node.target), nn.Conv2d):
            if node.target in found:
                raise ValueError(
                    f"layer {node.target!r} is called twice; a shared convolution cannot be pruned"
                )
            found[node.target] = flow = Flow()
            _follow(network, node, flow)
    return found


def _follow(network: nn.Module, node: fx.Node, flow: Flow) -> None:
    flow.mixed |= not node.users
    for user in node.users:
        module = network.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            flow.consumers.append(str(user.target))
        elif isinstance(module, CHANNELWISE) or user.target in CHANNELWISE_FUNCTIONS:
            flow.norms += [str(user.target)] if isinstance(module, nn.BatchNorm2d) else []
            _follow(network, user, flow)
        else:
            flow.mixed = True


def channel_links(network: nn.Module) -> dict[str, str]:
    """Consumer convolution -> its producer, where input channels can be dropped together with the producer's filters.

    >>> from sppkit import networks
    >>> channel_links(networks.create("convnet"))
    {'conv2': 'conv1', 'conv3': 'conv2'}
    """
    return {
        flow.consumers[0]: producer
        for producer, flow in flows(network).items()
        if not flow.mixed and len(flow.consumers) == 1 and _conv(network, producer).groups == 1
    }


def compact(network: nn.Module, example: Tensor | None = None, *, tolerance: float = 1e-9) -> nn.Module:
    """A copy of `network` without its zero columns and without the channels that nothing reads.

    With `example` (B, C, H, W) both networks are run on it in evaluation mode, and a largest difference above
    `tolerance` times the largest output is a RuntimeError.

    >>> from sppkit import networks
    >>> net = networks.create("convnet").eval()
    >>> _ = net.conv2.weight.data[:, :8].zero_()
    >>> compact(net).conv1.weight.shape
    torch.Size([24, 3, 5, 5])
    """
    small = copy.deepcopy(network)
    with torch.no_grad():
        for producer, flow in reversed(flows(small).items()):  # consumers lose filters before they are asked
            if flow.consumers and not flow.mixed and _conv(small, producer).groups == 1:
                alive = torch.stack(
                    [_conv(small, name).weight.ne(0).any(3).any(2).any(0) for name in flow.consumers]
                )
                _remove_channels(small, producer, flow, alive.any(0))
        for name, module in list(small.named_modules()):
            if isinstance(module, nn.Conv2d) and module.groups == 1:
                if module.padding_mode != "zeros" or isinstance(module.padding, str):
                    continue  # `ColumnConv2d` pads with zeros, by number
                used = module.weight.ne(0).any(0).flatten()  # (C*kh*kw,)
                if not used.all():
                    _replace(small, name, ColumnConv2d(module, used.nonzero().flatten()))
    if example is not None:
        difference = largest_difference(network, small, example)
        if not difference <= tolerance:
            raise RuntimeError(
                f"compact and masked outputs differ by {difference:.1e} of the largest output, more than {tolerance}"
            )
    return small


def largest_difference(one: nn.Module, other: nn.Module, example: Tensor) -> float:
    """Largest absolute difference of two networks' outputs on `example`, over the largest absolute output of `one`.

    Computed in float64 on copies in evaluation mode, so that TF32 or another order of sums does not hide a mistake.
    """
    with torch.inference_mode():
        expected, found = (copy.deepcopy(network).double().eval()(example.double()) for network in (one, other))
    return float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-30))


def _remove_channels(network: nn.Module, producer: str, flow: Flow, alive: Tensor) -> None:
    if alive.all():
        return
    if not alive.any():  # a convolution needs one channel
        alive = alive.clone()
        alive[0] = True
    kept = alive.nonzero().flatten()
    conv = _conv(network, producer)
    conv.weight = nn.Parameter(conv.weight.detach()[kept].clone())
    conv.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach()[kept].clone())
    conv.out_channels = len(kept)
    for name in flow.norms:
        norm = network.get_submodule(name)
        for key in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(norm, key)
            if value is not None:
                value = value.detach()[kept].clone()
                setattr(norm, key, nn.Parameter(value) if key in ("weight", "bias") else value)
        norm.num_features = len(kept)  # type: ignore[assignment]
    for name in flow.consumers:
        consumer = _conv(network, name)
        consumer.weight = nn.Parameter(consumer.weight.detach()[:, kept].clone())
        consumer.in_channels = len(kept)


def _conv(network: nn.Module, name: str) -> nn.Conv2d:
    module = network.get_submodule(name)
    assert isinstance(module, nn.Conv2d)
    return module


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)
