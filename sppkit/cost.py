"""What a network costs: multiply-accumulates, weights and bytes by formula, milliseconds by the clock.

"FLOP ratio" is always convolution MACs of the dense network over those of the compact one, a theoretical figure;
"speedup" is a ratio of measured times of networks that are physically smaller.
"""

from __future__ import annotations

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
    rows: list[dict[str, object]] = []

    def record(name: str, module: nn.Module, output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        positions = output[0, 0].numel() if isinstance(module, nn.Conv2d | ColumnConv2d) else 1
        row = {"layer": name, "kind": "linear" if isinstance(module, nn.Linear) else "conv"}
        sizes = {"macs": weight.numel() * positions, "weights": weight.numel(), "groups": weight[0].numel()}
        ends = {
            "in_channels": getattr(module, "in_channels", weight.shape[-1]),
            "out_channels": weight.shape[0],
        }
        height, width = (output.shape[2], output.shape[3]) if output.dim() == 4 else (1, 1)
        rows.append(row | sizes | ends | {"height": height, "width": width})

    kinds = (nn.Conv2d, nn.Linear, ColumnConv2d)
    handles = [
        module.register_forward_hook(lambda m, _, out, name=name: record(name, m, out))
        for name, module in network.named_modules()
        if isinstance(module, kinds)
    ]
    training = network.training
    try:
        with torch.inference_mode():
            network.eval()(example[:1])
    finally:
        network.train(training)
        for handle in handles:
            handle.remove()
    return pd.DataFrame(rows)


def conv_table(network: nn.Module, example: Tensor) -> pd.DataFrame:
    """The convolutions of `layer_table`, indexed from 0 in the order in which they run."""
    table = layer_table(network, example)
    return table[table["kind"] == "conv"].drop(columns="kind").reset_index(drop=True)


def summary(network: nn.Module, example: Tensor) -> dict[str, int]:
    """conv_macs, macs (linear layers too), parameters (biases too) and bytes (parameters and buffers as stored)."""
    table = layer_table(network, example)
    tensors = [*network.parameters(), *network.buffers()]
    return {
        "conv_macs": int(table.loc[table["kind"] == "conv", "macs"].sum()),
        "macs": int(table["macs"].sum()),
        "parameters": sum(p.numel() for p in network.parameters()),
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
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
    times: dict[str, list[float]] = {name: [] for name in networks}
    with torch.inference_mode():
        for network in networks.values():
            network.eval()
        for turn in range(rounds + 3):
            for name, network in networks.items():
                elapsed = _once(network, example)
                if turn >= 3:  # the first three rounds warm caches, allocator and algorithm choice
                    times[name].append(elapsed)
    frame = pd.DataFrame(times).quantile([0.25, 0.5, 0.75])
    return pd.DataFrame(
        {
            "median_ms": frame.loc[0.5],
            "iqr_ms": frame.loc[0.75] - frame.loc[0.25],
            "batch": len(example),
            "rounds": rounds,
            "threads": torch.get_num_threads(),
            "device": str(example.device),
        }
    )


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
