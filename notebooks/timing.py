"""For the notebooks: milliseconds by the clock, in one place. "Speedup" is a ratio of such times."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor, nn


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
