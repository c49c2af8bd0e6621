"""What a network costs: multiply-accumulates, weights and bytes by formula, milliseconds by the clock.

"FLOP ratio" is theoretical: convolution MACs, dense over compact; "speedup" is a ratio of measured times.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor, nn

from sppkit.compact import ColumnConv2d


def layer_table(network: nn.Module, example: Tensor) -> pd.DataFrame:
    """One row a convolution or linear layer, for one image of the shape of `example` (B, C, H, W).

    Columns: layer, kind ("conv" or "linear"), macs, weights (biases not counted), groups (columns N_c of the
    convolution's GEMM matrix), in_channels, out_channels, height, width (of the output).
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
        probe(example[:1])
    columns = ["layer", "kind", "macs", "weights", "groups", "in_channels", "out_channels", "height", "width"]
    return pd.DataFrame(rows, columns=columns)


def conv_table(network: nn.Module, example: Tensor) -> pd.DataFrame:
    """The convolutions of `layer_table`, indexed from 0 in the order in which they run."""
    table = layer_table(network, example)
    return table[table["kind"] == "conv"].drop(columns="kind").reset_index(drop=True)


def summary(network: nn.Module, example: Tensor) -> dict[str, int]:
    """conv_macs, macs (linear layers too), parameters (biases too) and bytes (parameters and buffers as stored)."""
    table = layer_table(network, example)
    return {
        "conv_macs": int(table.loc[table["kind"] == "conv", "macs"].sum()),
        "macs": int(table["macs"].sum()),
        "parameters": sum(p.numel() for p in network.parameters()),
        "bytes": sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers())),
    }


def flop_ratio(dense: nn.Module, compact: nn.Module, example: Tensor, *, whole: bool = False) -> float:
    """Convolution MACs of `dense` over those of `compact`; with `whole`, the linear layers count too."""
    key = "macs" if whole else "conv_macs"
    return summary(dense, example)[key] / summary(compact, example)[key]


def measure(networks: Mapping[str, nn.Module], example: Tensor, *, rounds: int = 20) -> pd.DataFrame:
    """Milliseconds of a forward pass of each network on `example`, interleaved round by round after a warm-up.

    Returns one row a network: median_ms, iqr_ms (interquartile range), batch, rounds, threads, device. CUDA events
    time the GPU, a monotonic clock the CPU. Run the same network under two names to see the noise.
    """
    probes = {name: copy.deepcopy(network).eval() for name, network in networks.items()}
    with torch.inference_mode():
        times = [{name: _once(probe, example) for name, probe in probes.items()} for _ in range(rounds + 3)]
    low, median, high = pd.DataFrame(times[3:]).quantile([0.25, 0.5, 0.75]).iloc  # three rounds warm up
    table = pd.DataFrame({"median_ms": median, "iqr_ms": high - low}).assign(batch=len(example), rounds=rounds)
    return table.assign(threads=torch.get_num_threads(), device=str(example.device))


def _once(network: nn.Module, example: Tensor) -> float:
    if example.device.type != "cuda":
        begin = time.perf_counter()
        network(example)
        return (time.perf_counter() - begin) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    network(example)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)
