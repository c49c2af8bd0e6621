"""From masked to compact: a smaller network that computes the same function.

Two kinds of exact zeros go for good: a channel that every consumer ignores, with its filter, BatchNorm entry and
columns; and a column of a GEMM matrix that is zero in every filter, where the convolution becomes a `ColumnConv2d`, or,
where whole input channels are zero that others read, a `SampledConv2d`. What mixes channels in the graph (torch.fx),
shortcuts, concatenations and the like, keeps them.
"""

import copy
import operator
from collections import Counter
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sppkit import kernels

# Modules and functions that treat each channel by itself: a channel can be followed through them. A module of your own
# that does so, and forwards nothing else, says it with an attribute `channelwise = True`.
CHANNELWISE: tuple[type[nn.Module], ...] = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Identity, nn.Dropout)
CHANNELWISE += (nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
CHANNELWISE_FUNCTIONS = {F.relu, torch.relu, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.dropout, "relu"}
CACHED = 2**22  # bytes of columns that a CPU gathers at once, or one image's
SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")


class SampledConv2d(nn.Conv2d):
    """A convolution behind a channel sampler, which picks some channels (index, (K,)) of an input that others read."""

    index: Tensor

    def __init__(self, conv: nn.Conv2d, kept: Tensor) -> None:
        kernel, moves = (conv.kernel_size[0], conv.kernel_size[1]), (conv.stride, conv.padding, conv.dilation)
        super().__init__(len(kept), conv.out_channels, kernel, *moves, padding_mode=conv.padding_mode)  # type: ignore[arg-type]
        self.weight = nn.Parameter(conv.weight.detach()[:, kept].clone())
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone())
        self.register_buffer("index", _channels(conv)[kept])
        self.source_channels = getattr(conv, "source_channels", conv.in_channels)  # of the input that others read too

    def forward(self, x: Tensor) -> Tensor:
        last = x.is_contiguous(memory_format=torch.channels_last)  # the layout stays as it is
        read = x.movedim(1, 3).index_select(3, self.index).movedim(3, 1) if last else x.index_select(1, self.index)
        return super().forward(read)

    def dense(self) -> nn.Conv2d:
        """The convolution that it is, zeros for channels that it does not read."""
        return ColumnConv2d(self, torch.arange(self.weight[0].numel(), device=self.index.device)).dense()


def _channels(conv: nn.Conv2d) -> Tensor:  # which of its input's a convolution reads, in order
    return conv.index if isinstance(conv, SampledConv2d) else torch.arange(conv.in_channels, device=conv.weight.device)


class ColumnConv2d(nn.Module):
    """A convolution by some columns of its GEMM matrix: weight (O, K), index (K,) into the C·kh·kw of `F.unfold`.

    Kept columns are gathered, by a kernel on a GPU, elsewhere from a view of all windows, and one GEMM takes them,
    there a convolution of 1 x 1; no other column is written. Runs of 8, 16 or 32 neighbouring channels are put in that
    order, and a GPU's kernel multiplies 16-bit numbers as it reads them, but by `engine` "gathered".
    """

    index: Tensor
    engine = "fused"

    def __init__(self, conv: nn.Conv2d, kept: Tensor) -> None:
        super().__init__()
        self.in_channels = getattr(conv, "source_channels", conv.in_channels)
        self.out_channels, self.kernel_size = conv.out_channels, conv.kernel_size
        self.stride, self.dilation, self.padding = conv.stride, conv.dilation, conv._reversed_padding_repeated_twice
        self.padding_mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        taps, any_kept = self.kernel_size[0] * self.kernel_size[1], bool(len(kept))
        kept = kept if any_kept else kept.new_zeros(1)  # a convolution needs one column, here of zeros
        index = _channels(conv)[kept // taps] * taps + kept % taps
        order = ((index // taps // 32 * taps + index % taps) * 32 + index // taps % 32).argsort()  # by runs
        order = order if (fused := kernels.run_length(index[order], taps) > 7) else order.sort().values
        weight = conv.weight.detach().flatten(1)[:, kept[order]] * any_kept  # (O, K)
        self.weight = nn.Parameter(weight.T.contiguous().T if fused and weight.is_cuda else weight)  # as it is read
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone())
        self.register_buffer("index", index[order])

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            found = self._numbers(x)
            if found is not None:
                return found
        (kh, kw), (sh, sw), (dh, dw) = self.kernel_size, self.stride, self.dilation
        x = F.pad(x.contiguous(), self.padding, self.padding_mode)
        rows = x.unfold(2, dh * (kh - 1) + 1, sh)[..., ::dh]  # (B, C, Ho, W, kh)
        windows = rows.unfold(3, dw * (kw - 1) + 1, sw)[..., ::dw]  # (B, C, Ho, Wo, kh, kw), a view
        channel, tap = self.index // (kh * kw), self.index % (kh * kw)
        read = windows[:, channel, :, :, tap // kw, tap % kw].transpose(0, 1)  # (B, K, Ho, Wo)
        return F.conv2d(read, self.weight[:, :, None, None], self.bias)  # (B, O, Ho, Wo), a GEMM

    def _numbers(self, x: Tensor) -> Tensor | None:
        """Where no more is asked for, no gradients, no trace: by kernels on a GPU, on a CPU so many images at once."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        plain = type(x) is Tensor and x.ndim == 4 and x.shape[1] >= self.in_channels and self.padding_mode == "constant"
        alike = plain and (x.dtype, x.device) == (self.weight.dtype, self.weight.device) == (x.dtype, self.index.device)
        if not alike or x.device.type not in ("cpu", *kernels.DEVICES) or torch.is_autocast_enabled(x.device.type):
            return None
        if x.device.type not in kernels.DEVICES:
            some = CACHED // (len(self.index) * x[:1, 0].nbytes or 1) or 1
            return torch.cat([self.forward(part) for part in x.split(some)]) if len(x) > some else None
        y = kernels.multiply(x, self) if self.engine == "fused" and x.element_size() == 2 else None
        if y is None:
            weight = self.weight if self.bias is None else torch.cat([self.weight, self.bias[:, None]], 1)
            weight = F.pad(weight, (0, -weight.shape[1] % 8))  # a GEMM is fast where sizes are multiples of it
            if (read := kernels.gather(x, self, weight.shape[1])) is None:
                return None
            y = (weight @ read.flatten(1)).unflatten(1, read.shape[1:]).transpose(0, 1)
        return y.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)  # as x

    def dense(self) -> nn.Conv2d:
        """The convolution that it is, zeros in the place of missing columns."""
        (left, right, top, bottom), mode = self.padding, self.padding_mode.replace("constant", "zeros")
        if (left, top) != (right, bottom):
            raise ValueError(f"padding {self.padding} differs from side to side; no plain convolution does that")
        sizes = (self.in_channels, self.out_channels, self.kernel_size, self.stride, (top, left), self.dilation)
        conv = nn.Conv2d(*sizes, padding_mode=mode, bias=False).to(self.weight)  # type: ignore[arg-type]
        conv.weight.data.zero_().flatten(1)[:, self.index] = self.weight.detach()
        conv.bias, conv.stands_in = copy.deepcopy(self.bias), True  # type: ignore[assignment]
        return conv

    def extra_repr(self) -> str:
        columns = self.in_channels * self.kernel_size[0] * self.kernel_size[1]
        return f"{self.in_channels}, {self.out_channels}, columns={len(self.index)} of {columns}"


@dataclass(eq=False)
class Flow:
    """Channels that lie together, by sums and by what treats each by itself: the layers, by name, that meet in them."""

    writers: list[str] = field(default_factory=list)
    consumers: list[str] = field(default_factory=list)  # of all of them, linear layers by way of flatten, too
    samplers: list[str] = field(default_factory=list)  # of some of them, which they know by number
    norms: list[str] = field(default_factory=list)
    fixed: bool = False  # something else reads or writes them: a grouped convolution, a concatenation, the output

    @property
    def mixed(self) -> bool:
        """Whether they must stay: not one convolution alone decides which there are."""
        return self.fixed or len(self.writers) != 1 or bool(self.samplers)


class _Tracer(fx.Tracer):
    def __init__(self, channelwise: bool) -> None:
        super().__init__()
        self.channelwise = channelwise

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = isinstance(m, ColumnConv2d | SampledConv2d) or (self.channelwise and getattr(m, "channelwise", False))
        return leaf or super().is_leaf_module(m, module_qualified_name)


def convolutions(network: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions of a network by name, in the order in which they were defined."""
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}


def trace(network: nn.Module, *, channelwise: bool = True) -> fx.Graph:
    """The network's graph, modules marked `channelwise` one node each; ValueError where torch.fx cannot follow it."""
    try:
        return _Tracer(channelwise).trace(network)
    except Exception as error:
        raise ValueError(f"{type(network).__name__} cannot be traced by torch.fx: {error}") from error


def flows(network: nn.Module) -> dict[str, Flow]:
    """The `Flow` of every convolution, in the order in which they run. ValueError names what cannot be followed."""
    convs, found = convolutions(network), dict[str, Flow]()
    for node, flow in spaces(network).items():
        if node.op == "call_module" and node.target in convs:
            if node.target in found:
                raise ValueError(f"layer {node.target!r} is called twice; give each place a convolution of its own")
            found[str(node.target)] = flow
    return found


def spaces(network: nn.Module) -> dict[fx.Node, Flow]:
    """Which channels each value of a network has, in the order in which values come."""
    graph, found, flat = trace(network), dict[fx.Node, Flow](), set[fx.Node]()
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        module, sources = network.get_submodule(node.target) if node.op == "call_module" else None, node.all_input_nodes
        adds = module is None and node.target in SUMS  # a module may be called as the method is
        by_number, flattened = isinstance(module, ColumnConv2d | SampledConv2d), not flat.isdisjoint(sources)
        conv, flattens = by_number or (isinstance(module, nn.Conv2d) and module.groups == 1), _flattens(module, node)
        found[node] = Flow(fixed=not conv or not node.users or calls[node.target] > 1)
        if calls[node.target] == 1 and (isinstance(module, nn.Linear) if flattened else conv):
            found[node].writers += [node.target] if conv else []
            (found[sources[0]].samplers if by_number else found[sources[0]].consumers).append(node.target)
        elif sources and (adds or _is_channelwise(module, node) or (flattens and not flattened)):
            first, *others = {found[source]: None for source in sources}
            first.norms += [node.target] if isinstance(module, nn.BatchNorm2d) else []
            first.fixed |= not node.users or (isinstance(module, nn.BatchNorm2d) and calls[node.target] > 1)
            flat |= {node} if flattens or flattened else set()
            for other in others:
                for name in ("writers", "consumers", "samplers", "norms"):
                    getattr(first, name).extend(getattr(other, name))
                first.fixed |= other.fixed
            found |= {each: first for each, flow in found.items() if flow in others or each is node}
        else:
            for source in sources:
                found[source].fixed = True
    return found


def _flattens(module: nn.Module | None, node: fx.Node) -> bool:
    named = node.target in (torch.flatten, "flatten") and 1 in (*node.args[1:2], node.kwargs.get("start_dim"))
    return named if module is None else isinstance(module, nn.Flatten) and module.start_dim == 1


def _is_channelwise(module: nn.Module | None, node: fx.Node) -> bool:
    known = node.target in CHANNELWISE_FUNCTIONS if module is None else isinstance(module, CHANNELWISE)
    return known or getattr(module, "channelwise", False)


def channel_links(network: nn.Module) -> dict[str, str]:
    """Consumer convolution -> its producer, where input channels can be dropped with the producer's filters."""
    found, convs = flows(network).items(), convolutions(network)
    chains = {name: flow.consumers[0] for name, flow in found if len(flow.consumers) == 1 and not flow.mixed}
    return {consumer: name for name, consumer in chains.items() if consumer in convs}


def compact(
    network: nn.Module, example: Tensor | None = None, *, columns: bool = True, tolerance: float = 1e-9
) -> nn.Module:
    """A copy of `network` without the channels that nothing reads and, with `columns`, without single zero columns.

    With `example` (B, C, H, W), a `largest_difference` of both networks above `tolerance` is a RuntimeError.

    >>> net = nn.Sequential(nn.Conv2d(3, 32, 5), nn.ReLU(), nn.Conv2d(32, 4, 3))
    >>> _ = net[2].weight.data[:, :8].zero_()
    >>> compact(net)[0].weight.shape
    torch.Size([24, 3, 5, 5])
    """
    small = copy.deepcopy(network)
    for producer, flow in reversed(flows(small).items()):  # consumers lose filters before they are asked
        if flow.consumers and not flow.mixed:
            _remove_channels(small, producer, flow)
    for name, conv in convolutions(small).items():
        used = conv.weight.ne(0).any(0).flatten(1)  # (C, kh*kw)
        if conv.groups > 1 or used.all():
            continue
        channels = used.any(1)
        if columns and not (channels.any() and torch.equal(used, channels[:, None].expand_as(used))):
            small.set_submodule(name, ColumnConv2d(conv, used.flatten().nonzero().flatten()))
        elif not channels.all():
            channels[0] |= not channels.any()  # a convolution needs one channel
            small.set_submodule(name, SampledConv2d(conv, channels.nonzero().flatten()))
    if example is not None and not (error := largest_difference(network, small, example)) <= tolerance:
        raise RuntimeError(f"compact and masked outputs differ by {error:.1e} of the largest, more than {tolerance}")
    return small


def largest_difference(one: nn.Module, other: nn.Module, example: Tensor) -> float:
    """Largest difference of two networks' outputs on `example` over the largest output of `one`, in absolute values."""
    # float64 copies in evaluation mode: TF32 or another order of sums must not hide a mistake
    with torch.inference_mode():
        expected, found = (copy.deepcopy(network).double().eval()(example.double()) for network in (one, other))
    return float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-30))


def _remove_channels(network: nn.Module, producer: str, flow: Flow) -> None:
    conv = convolutions(network)[producer]
    readers = [network.get_submodule(name) for name in flow.consumers]
    norms = [network.get_submodule(name) for name in flow.norms]
    weights = [cast(Tensor, reader.weight).unflatten(1, (conv.out_channels, -1)) for reader in readers]  # (O, C, ...)
    alive = torch.stack([weight.ne(0).transpose(0, 1).flatten(1).any(1) for weight in weights]).any(0)  # (C,)
    if alive.all():
        return
    alive[0] |= not alive.any()  # a convolution needs one channel
    kept = alive.nonzero().flatten()
    for module in (conv, *norms):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.dim():  # not a BatchNorm's count of batches
                tensor.data = tensor.data[kept]
    for reader, weight in zip(readers, weights, strict=True):
        smaller = weight.data[:, kept].flatten(1, 2)
        cast(Tensor, reader.weight).data = smaller
        setattr(reader, "in_channels" if isinstance(reader, nn.Conv2d) else "in_features", smaller.shape[1])
    for norm in norms:
        norm.num_features = len(kept)  # type: ignore[assignment]
    conv.out_channels = len(kept)
