"""What a network costs by formula: multiply-accumulates, weights and bytes; milliseconds are measured in `timing`.

"FLOP ratio" is theoretical: convolution MACs, dense over compact; "speedup" is a ratio of measured times.
"""

import copy

import pandas as pd
import torch
from torch import Tensor, nn

from sppkit.compact import ColumnConv2d


def layer_table(network: nn.Module, example: Tensor) -> pd.DataFrame:
    """One row a convolution or linear layer, for one image of the shape of `example` (B, C, H, W).

    Columns: layer, kind ("conv" or "linear"), macs, weights (biases not counted), groups (columns N_c of the
    convolution's GEMM matrix), in_channels, out_channels, height, width (of the output). Raises ValueError for images
    that the network cannot run on, such as too small ones.
    """
    rows: list[tuple[str | int, ...]] = []
    probe = copy.deepcopy(network).eval()
    names = {module: name for name, module in probe.named_modules()}

    def record(module: nn.Module, _: object, output: Tensor) -> None:
        if not isinstance(module, nn.Conv2d | nn.Linear | ColumnConv2d):
            return
        weight, linear = module.weight, isinstance(module, nn.Linear)
        height, width = (1, 1) if linear else output.shape[2:]
        inputs = getattr(module, "in_channels", weight.shape[-1])
        sizes = (weight.numel() * height * width, weight.numel(), weight[0].numel(), inputs, len(weight))
        rows.append((names[module], "linear" if linear else "conv", *sizes, height, width))

    with torch.inference_mode(), nn.modules.module.register_module_forward_hook(record):
        try:
            probe(example[:1])
        except RuntimeError as error:
            images = f"images {tuple(example.shape)} of {example.dtype}"
            raise ValueError(f"the network cannot run on {images}, give it what it was trained on: {error}") from error
    columns = ["layer", "kind", "macs", "weights", "groups", "in_channels", "out_channels", "height", "width"]
    return pd.DataFrame(rows, columns=columns)


def conv_table(network: nn.Module, example: Tensor) -> pd.DataFrame:
    """The convolutions of `layer_table`, indexed from 0 in the order in which they run."""
    table = layer_table(network, example)
    return table[table["kind"] == "conv"].drop(columns="kind").reset_index(drop=True)


def summary(network: nn.Module, example: Tensor) -> dict[str, int]:
    """conv_macs, macs (linear layers too), parameters (biases too) and bytes (parameters and buffers as stored)."""
    macs, stored = layer_table(network, example).set_index("kind")["macs"], (*network.parameters(), *network.buffers())
    sizes = {"conv_macs": int(macs.filter(like="conv", axis=0).sum()), "macs": int(macs.sum())}
    return sizes | {"parameters": sum(p.numel() for p in network.parameters()), "bytes": sum(t.nbytes for t in stored)}


def flop_ratio(dense: nn.Module, compact: nn.Module, example: Tensor) -> float:
    """Convolution MACs of `dense` over those of `compact`."""
    return summary(dense, example)["conv_macs"] / summary(compact, example)["conv_macs"]
