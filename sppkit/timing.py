"""Milliseconds by the clock, in one place. "Speedup" is a ratio of such times, of networks that are compact."""

import copy
import random
import time
from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor, nn

from sppkit.compact import convolutions

MASKED = 0.1  # share of a layer's columns that are zero from which it counts as masked; a refit can leave 0.05


def measure(networks: Mapping[str, nn.Module], example: Tensor, *, rounds: int = 20) -> pd.DataFrame:
    """Milliseconds of a forward pass of each network on `example`, in rounds of drawn order, after a warm-up.

    Returns one row a network: median_ms, iqr_ms (interquartile range), batch, rounds, threads, device. CUDA events
    time the GPU, a monotonic clock the CPU. Run the same network under two names to see the noise. Raises ValueError
    for an empty batch, and for a masked network, which is as slow as a dense one.
    """
    if not len(example):
        raise ValueError(f"images {tuple(example.shape)}: a batch of 0 has no speed")
    for name, network in networks.items():
        if layer := masked(network):
            raise ValueError(f"network {name!r} is masked (layer {layer!r}) and no faster for it; `compact` it first")
    probes = {name: copy.deepcopy(n).eval() if n.training else n for name, n in networks.items()}
    low, median, high = milliseconds(probes, example, rounds).quantile([0.25, 0.5, 0.75]).iloc
    table = pd.DataFrame({"median_ms": median, "iqr_ms": high - low}).assign(batch=len(example), rounds=rounds)
    return table.assign(threads=torch.get_num_threads(), device=str(example.device))


def masked(network: nn.Module) -> str | None:
    """The first convolution of whose columns some are zero in every filter, but for stand-ins of `fast.optimise`.

    A tap that is zero in every channel does not count: one that only ever sees padding is, after a refit.
    """
    for name, conv in convolutions(network).items():
        zero = conv.weight.detach().eq(0).all(0).flatten(1)  # (C, taps)
        zero = zero[: len(zero) - getattr(conv, "filled", 0), ~zero.all(0)]  # but channels of `fast.fill_up`
        if zero.float().mean() > MASKED and not getattr(conv, "stands_in", False):
            return name
    return None


def milliseconds(modules: Mapping[str, nn.Module], example: Tensor, rounds: int) -> pd.DataFrame:
    """One row a round, one column a module, after three rounds that warm up; each draws its order."""
    orders = [random.Random(k).sample([*modules], len(modules)) for k in range(rounds + 3)]
    with torch.inference_mode():
        rows = [{name: _once(modules[name], example) for name in order} for order in orders]
    return pd.DataFrame(rows[3:], columns=[*modules])


def _once(module: nn.Module, example: Tensor) -> float:
    if example.device.type != "cuda":
        begin = time.perf_counter()
        module(example)
        return (time.perf_counter() - begin) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(1_000_000)  # half a millisecond, in which the work is queued: no launch is waited for
    start.record()
    module(example)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)
