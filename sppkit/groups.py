"""Weight groups: which weights of a network are pruned together, and how many MACs are left without some of them.

    kind      a group is                                                 what goes with it
    column    one input channel at one tap, over all filters             a column of the GEMM matrix
    blockB    B neighbouring input channels at one tap; B = 8, 16, 32    B columns
    channel   one input channel at all taps                              kh·kw columns
    filter    one filter and every weight that reads its output          a row, and columns of its readers

A weight (O, C, kh, kw) is seen as O rows and C·kh·kw columns; it is masked with its row's group or its column's. One
flat axis of G groups serves all layers, in the order in which these run.
"""

from itertools import accumulate
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from sppkit.compact import convolutions, flows
from sppkit.cost import conv_table

Layer = nn.Conv2d | nn.Linear
KINDS = ("column", "block8", "block16", "block32", "channel", "filter")


class Groups:
    """The groups of one kind in the convolutions `layers` (default: all that can be pruned so) of a network.

    `example` (B, C, H, W) gives the sizes of the feature maps. Raises ValueError for another kind, an unknown, grouped,
    shared or too small layer, and for a network without convolutions.
    """

    def __init__(
        self, network: nn.Module, example: Tensor, *, kind: str = "column", layers: list[str] | None = None
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
        self.kind, convs = kind, convolutions(network)
        if not convs:
            raise ValueError(f"{type(network).__name__} has no convolutions to prune; give a network with nn.Conv2d")
        self.flows = flows(network)
        if unknown := [name for name in layers or () if name not in self.flows]:
            known = f"only convolutions are pruned, of this network {', '.join(convs)}"
            raise ValueError(f"layer {unknown[0]!r} is not a convolution; {known}")
        owner = {id(conv.weight): name for name, conv in reversed(convs.items())}
        if tied := [name for name, conv in convs.items() if owner[id(conv.weight)] != name]:
            raise ValueError(f"layer {tied[0]!r} has the weight of another; give each convolution a weight of its own")
        table = conv_table(network, example).set_index("layer")
        self.macs = {name: int(table["macs"][name]) for name in self.flows}  # of the dense network
        self.layers = {name: convs[name] for name in self.flows if layers is None or name in layers}
        if layers is None:  # what is left out by itself is refused when it is named
            self.layers = {name: conv for name, conv in self.layers.items() if not self._refusal(name, conv)}
        for name, conv in self.layers.items():
            if problem := self._refusal(name, conv):
                raise ValueError(f"layer {name!r} {problem}; leave it out of `layers`")
        if not self.layers:
            raise ValueError(f"{type(network).__name__} has no convolution with two or more groups of kind {kind!r}")
        self.sizes = {name: self._count(conv) for name, conv in self.layers.items()}
        self.count = sum(self.sizes.values())  # G; the next index stands for "always kept"
        ends = accumulate(self.sizes.values())
        self.slices = {name: slice(end - n, end) for (name, n), end in zip(self.sizes.items(), ends, strict=True)}
        readers = [reader for name in self.layers for reader in self.flows[name].consumers if kind == "filter"]
        self.modules = {n: cast(Layer, network.get_submodule(n)) for n in dict.fromkeys([*self.layers, *readers])}
        self.rows = {name: self._rows(name) for name in self.modules}  # (O,) group of each row
        self.columns = {name: self._columns(name) for name in self.modules}  # (C, taps) group of each column

    def _refusal(self, name: str, conv: nn.Conv2d) -> str:
        if conv.groups > 1:
            return f"has groups={conv.groups}, whose columns cannot be removed"
        if self.kind == "filter" and (self.flows[name].mixed or not self.flows[name].consumers):
            return "feeds a sum, a concatenation or the output, so its filters must stay"
        return "has a single group, which cannot go" if self._count(conv) < 2 else ""

    def _count(self, conv: nn.Conv2d) -> int:
        return conv.out_channels if self.kind == "filter" else int(self._pattern(conv).max()) + 1

    def _pattern(self, conv: nn.Conv2d) -> np.ndarray:
        """Group of each column (C, kh·kw), counted from 0 in the layer; not for filters."""
        channel, tap = np.indices((conv.in_channels, conv.weight[0, 0].numel()))
        if self.kind == "channel":
            return channel
        block = int(self.kind.removeprefix("block")) if self.kind.startswith("block") else 1
        return channel // block * tap.shape[1] + tap

    def _rows(self, name: str) -> np.ndarray:
        own, filters = self.slices.get(name), len(self.modules[name].weight)
        return np.arange(own.start, own.stop) if own and self.kind == "filter" else np.full(filters, self.count)

    def _columns(self, name: str) -> np.ndarray:
        if self.kind != "filter":
            return self._pattern(self.layers[name]) + self.slices[name].start
        module = self.modules[name]
        producer = next((key for key in self.layers if name in self.flows[key].consumers), None)
        channels = self.sizes[producer] if producer else module.weight.shape[1]
        taps = module.weight[0].numel() // channels  # pixels of the feature map for a linear layer
        first = self.slices[producer].start + np.arange(channels) if producer else np.full(channels, self.count)
        return np.repeat(first[:, None], taps, 1)

    def spread(self, ids: np.ndarray, weight: Tensor, *, rows: bool = False) -> Tensor:
        """`self.rows[name]` or `self.columns[name]` as int64 that broadcasts to the weight of that layer."""
        shape = (-1, *[1] * (weight.ndim - 1)) if rows else (1, *weight.shape[1:])
        return torch.from_numpy(ids).reshape(shape).to(weight.device)

    def conv_macs(self, gone: np.ndarray, *, by_products: bool = True) -> dict[str, int]:
        """MACs of each convolution of the compact network without the groups `gone` (G,), bool.

        A filter that no later column reads any more goes as well, as in `compact.compact`; without `by_products` only
        where filters or channels are the groups.
        """
        gone, left = np.append(gone, False), dict[str, int]()
        alive = {name: ~gone[ids] for name, ids in self.columns.items()}  # (C, taps)
        for name, flow in self.flows.items():
            columns = alive[name].mean() if name in alive else 1.0  # the share that is left
            read = [alive[reader].any(1) for reader in flow.consumers if reader in alive]
            known = read and len(read) == len(flow.consumers) and not flow.mixed
            known = known and (by_products or self.kind in ("channel", "filter"))
            rows = max(np.any(read, 0).mean(), 1 / len(read[0])) if known else 1.0
            left[name] = round(self.macs[name] * float(rows * columns))
        return left

    def flop_ratio(self, gone: np.ndarray, *, by_products: bool = True) -> float:
        """Convolution MACs, dense over compact, without the groups `gone` (G,)."""
        return sum(self.macs.values()) / sum(self.conv_macs(gone, by_products=by_products).values())
