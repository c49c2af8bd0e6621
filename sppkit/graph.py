"""What channel pruning needs of a network's graph (torch.fx): places to prune, values on the way, BatchNorm folded.

A convolution whose input comes from one other convolution alone is pruned together with that one's filters. Where the
input is shared, as in a residual block, a channel sampler picks from it. Where the output enters a sum with a shortcut,
the sum is what is to be reproduced (arXiv 1707.06168, section 3.3).
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sppkit.compact import SUMS, ColumnConv2d, channel_links, trace

Looks = Mapping[fx.Node, Callable[..., None]]
Statistics = Mapping[str, tuple[Tensor, Tensor]]  # by layer, mean and variance (n,) of its output
Start = tuple[int, dict[str, Any]]  # how many nodes have run, and the values of theirs that are still read


@dataclass(frozen=True)
class Site:
    """A convolution whose input channels can be pruned, in a graph."""

    layer: str
    node: fx.Node
    producer: str | None  # the convolution that loses the same filters; None: a channel sampler picks from the input
    total: fx.Node | None = None  # the sum that the output enters
    shortcut: int = 0  # which argument of the sum is the other one


def sites(network: nn.Module, graph: fx.Graph, *, samplers: bool = True) -> dict[str, Site]:
    """Where channels can be pruned, by layer, in the order in which layers run; `graph` is a trace of `network`.

    Left alone: grouped convolutions, those that read the image, and a shortcut's projection, which lies between a
    shared input and a sum. `samplers=False` leaves every shared input alone. Raises ValueError as `compact.flows`.
    """
    links, found, reads_features = channel_links(network), dict[str, Site](), set[fx.Node]()
    modules = dict[object, nn.Module](network.named_modules())
    for node in graph.nodes:
        conv = network.get_submodule(node.target) if node.op == "call_module" else None
        features = any(source in reads_features for source in node.all_input_nodes)
        if features or isinstance(conv, nn.Conv2d):
            reads_features.add(node)
        if not (isinstance(conv, nn.Conv2d) and conv.groups == 1 and features):
            continue
        producer, end = links.get(node.target), node
        while len(end.users) == 1 and isinstance(modules.get(next(iter(end.users)).target), nn.Identity):
            end = next(iter(end.users))
        total = next(iter(end.users)) if len(end.users) == 1 else None
        if total is None or total.target not in SUMS or total.op == "call_module" or len({*total.all_input_nodes}) != 2:
            total = None
        if producer or (samplers and total is None):
            other = 0 if total is None else 1 - list(total.args).index(end)
            found[node.target] = Site(node.target, node, producer, total, other)
    return found


class Probe(fx.Interpreter):
    """Runs a network and shows values as they are at that moment: some operations overwrite them later.

    before: node -> called with the node's arguments; after: node -> called with its value. A pass ends with the last.
    """

    def __init__(self, network: nn.Module, graph: fx.Graph, *, before: Looks | None = None, after: Looks | None = None):
        super().__init__(fx.GraphModule(network, graph))  # copies the graph: nodes are found again by name
        self.plan = [*cast(fx.GraphModule, self.module).graph.nodes]
        self.before = {node.name: look for node, look in (before or {}).items()}
        self.after = {node.name: look for node, look in (after or {}).items()}

    @torch.no_grad()
    def look(self, batch: Tensor, start: Start | None = None) -> Start:
        """One pass, as far as there is something to show; on from a `start`, it returns that before the first value."""
        first = start or (0, {})
        begin, values = copy.deepcopy(first)  # what comes may write to them
        self.env = {node: values[node.name] for node in self.plan if node.name in values}
        ahead, self.args_iter = {*self.before, *self.after}, iter([batch.clone()])
        for number, node in enumerate(self.plan[begin:], begin):
            if look := self.before.get(node.name):
                if start is not None and first is start:
                    alive = {n.name: v.detach() if isinstance(v, Tensor) else v for n, v in self.env.items()}
                    first = number, copy.deepcopy(alive)
                look(*self.fetch_args_kwargs_from_env(node)[0])
            ahead.discard(node.name)
            if not ahead and node.name not in self.after:
                break
            self.env[node] = self.run_node(node)
            if look := self.after.get(node.name):
                look(self.env[node])
            if not ahead:
                break
            for done in self.user_to_last_uses.get(node, []):
                del self.env[done]
        self.env = {}
        return first


def fold(network: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """A copy in evaluation mode, BatchNorm merged with the convolution before it, both run once; layer -> BatchNorm."""
    graph, norms = trace(folded := copy.deepcopy(network).eval()), dict[str, str]()
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        user = next(iter(node.users)) if len(node.users) == 1 else node
        if {node.op, user.op} == {"call_module"} and calls[node.target] == calls[user.target] == 1:
            conv, norm = folded.get_submodule(node.target), folded.get_submodule(str(user.target))
            layer = isinstance(conv, nn.Conv2d | ColumnConv2d)
            if layer and isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
                folded.set_submodule(node.target, fuse_conv_bn_eval(conv, norm))  # type: ignore[type-var]
                folded.set_submodule(str(user.target), nn.Identity())
                norms[node.target] = str(user.target)
    return folded, norms


def norm_scale(norm: Any) -> Tensor:
    """What a BatchNorm multiplies each channel by in evaluation mode, (n,); 1 for one that it switches off."""
    scale = (norm.weight.detach() if norm.affine else 1.0) / (norm.running_var + norm.eps).sqrt()
    return torch.where(scale.abs() > 1e-6 * scale.abs().max(), scale, 1.0)


@torch.no_grad()
def unfold(
    folded: nn.Module, network: nn.Module, norms: Mapping[str, str], statistics: Statistics | None = None
) -> nn.Module:
    """A copy of `folded` that computes the same in evaluation mode, with the BatchNorms of `network` put back.

    They keep their running means and variances, or get those that `statistics` gives for a folded convolution's output:
    layer -> mean (n,), variance (n,). Either way the function is the same; training starts from other batches' scale.
    Of a layer that has become several convolutions, the last is the one before the BatchNorm.
    """
    result = copy.deepcopy(folded)
    for name, place in norms.items():
        conv: Any = [module for module in result.get_submodule(name).modules() if isinstance(module, nn.Conv2d)][-1]
        own, norm = (cast(Any, copy.deepcopy(network.get_submodule(each))) for each in (name, place))
        scale = norm_scale(norm)
        start = own.bias if own.bias is not None else torch.zeros_like(scale)
        if statistics and name in statistics:
            mean, variance = (value.to(scale) for value in statistics[name])
            norm.running_mean.copy_((mean - conv.bias) / scale + start)
            norm.running_var.copy_(variance / scale.square())
        if not norm.affine:
            norm.affine = True
            norm.weight, norm.bias = (nn.Parameter(torch.empty_like(scale)) for _ in range(2))
        norm.weight.copy_(scale * (norm.running_var + norm.eps).sqrt())
        norm.bias.copy_(conv.bias + scale * (norm.running_mean - start))
        conv.weight.div_(scale[:, None, None, None])
        conv.bias = copy.deepcopy(own.bias)
        result.set_submodule(place, norm)
    for name, module in network.named_modules():
        result.get_submodule(name).training = module.training
    return result
