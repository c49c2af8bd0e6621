"""Seconds of channel pruning: all layers of VGG-16, one layer beside the authors' recipe in scikit-learn, a network.

Nothing is trained: weights are torchvision's initialisation, images are noise that is smooth over some pixels, features
are what those weights make of them after each ReLU. Convolutions run in float32, moments in float64. A GPU is waited
for before and after whatever is timed, and warmed up first.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, ParamSpec, TypeVar

import numpy as np
import pandas as pd
import torch
from channels import exact
from driver import append_line, revision
from single_layer import sample_layer
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso, LinearRegression
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional as F
from training import networks
from training.data import device_name, resolve_device

from sppkit import cost, cp, lasso
from sppkit.compact import trace
from sppkit.graph import Start, sites
from sppkit.reconstruct import Moments, Refit, error, lasso_problem, refit
from sppkit.samples import collect, convolution, patches

KERNEL = (3, 3)
LAYER = "conv3_1"  # of VGG-16: 128 channels, 256 filters
FEW = 400  # samples of the authors' LASSO, at most a twentieth of all
REPEATS = 3  # of each solver and draw
CHUNK = 10_000  # patches
Settings = ParamSpec("Settings")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Sizes:
    """How much is measured; patches are images times points."""

    images: int
    points: int
    batch_size: int
    pixels: int = 224
    shrink: int = 1  # divides the widths of VGG-16
    rival_images: int = 400
    rival_points: int = 50
    rival_pixels: int = 64
    draws: int = 5  # of the samples that the authors' LASSO sees
    network: str = "vgg16-bn"
    network_images: int = 1000


FULL = {"cpu": Sizes(50, 100, batch_size=25), "cuda": Sizes(5000, 10, batch_size=100)}
QUICK = Sizes(
    images=8, points=16, batch_size=4, pixels=64, shrink=8, rival_images=40, draws=1, network="convnet",
    network_images=20,
)  # fmt: skip


def timed(
    device: torch.device, work: Callable[Settings, Result], *arguments: Settings.args, **settings: Settings.kwargs
) -> tuple[Result, float]:
    """What `work` returns, and the seconds until the device has done it."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    wait(device)
    begin = time.perf_counter()
    result = work(*arguments, **settings)
    wait(device)
    return result, time.perf_counter() - begin


def peak(device: torch.device) -> float:
    """GB: the most that tensors on a GPU took since it was reset, or that the whole process took, data included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return float("nan")
    import resource  # absent there

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def vgg16(*, shrink: int = 1, seed: int = 0) -> nn.Sequential:
    """The 13 convolutions of VGG-16 with ReLUs and poolings, named as in the papers, initialised as torchvision's."""
    generator, layers, inputs = torch.Generator().manual_seed(seed), OrderedDict[str, nn.Module](), 3
    for block, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), 1):
        for i in range(1, depth + 1):
            conv = nn.Conv2d(inputs, width // shrink, KERNEL, padding=1)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            layers |= {f"conv{block}_{i}": conv, f"relu{block}_{i}": nn.ReLU()}
            inputs = width // shrink
        layers[f"pool{block}"] = nn.MaxPool2d(2)
    return nn.Sequential(layers).eval()


def random_images(count: int, pixels: int, *, seed: int) -> Tensor:
    """Images (count, 3, pixels, pixels) on the CPU: noise smooth over 8 pixels, and white noise of a third of that."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, pixels // 8, pixels // 8, generator=generator)
    smooth = F.interpolate(coarse, size=(pixels, pixels), mode="bilinear")
    return smooth.add_(torch.randn(smooth.shape, generator=generator), alpha=1 / 3)


def gather(chunks: Iterable[tuple[Tensor, Tensor]]) -> Moments:
    moments = Moments()
    for X, Y in chunks:
        moments.add(X, Y)
    return moments


def whole_path(moments: Moments, weight: Tensor, keep: int) -> tuple[int, Tensor]:
    """Knots of the path through all widths, and the channels (keep,) at one of them."""
    gram, correlation = lasso_problem(moments, weight)
    alphas, _ = lasso.path(gram, correlation)
    return len(alphas), lasso.select(gram, correlation, keep).kept


@torch.no_grad()
def all_layers(sizes: Sizes, device: torch.device) -> tuple[pd.DataFrame, dict[str, float]]:
    """Seconds by layer of VGG-16, nothing pruned before it; seconds of the pass that samples all outputs; peak_gb.

    extraction: the inputs, on from the layer before where that was kept; path: the LASSO problem, its whole path, half
    the channels chosen once more by `select`; refit: of those.
    """
    network, rows = vgg16(shrink=sizes.shrink).to(device), []
    images, graph = random_images(sizes.images, sizes.pixels, seed=0), trace(network)
    places, size = sites(network, graph), sizes.batch_size
    starts: dict[int, Start] = {}  # nothing is pruned
    warm = gather([(torch.randn(200, 36, device=device), torch.randn(200, 8, device=device))])
    refit(warm, whole_path(warm, torch.randn(8, 4, *KERNEL, device=device), 2)[1], KERNEL)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    samples, outputs_s = timed(device, collect, network, graph, places, images, sizes.points, 0, size)
    for name, place in places.items():
        conv, positions = convolution(network, name), samples.pop(name)
        reading = patches(network, graph, place, images, positions, size, starts)
        chunks, extraction_s = timed(device, list, reading)
        moments, moments_s = timed(device, gather, chunks)
        chunks.clear()
        (knots, kept), path_s = timed(device, whole_path, moments, conv.weight, conv.in_channels // 2)
        fit, refit_s = timed(device, refit, moments, kept, KERNEL)
        widths = {"layer": name, "c": conv.in_channels, "n": conv.out_channels, "patches": moments.count}
        seconds = {"extraction_s": extraction_s, "moments_s": moments_s, "path_s": path_s, "refit_s": refit_s}
        rows.append(widths | seconds | {"knots": knots, "kept": len(kept), "error": fit.error})
    return pd.DataFrame(rows), {"outputs_s": outputs_s, "peak_gb": peak(device)}


@dataclass(frozen=True)
class Recipe:
    """What the authors' code ends with on one layer, and seconds."""

    kept: Tensor  # (keep,)
    weight: Tensor  # (n, keep, kh, kw)
    bias: Tensor  # (n,)
    select_s: float
    refit_s: float


def authors_recipe(X: np.ndarray, Y: np.ndarray, conv: nn.Conv2d, keep: int, *, seed: int) -> Recipe:
    """Channel Pruning as its authors' code does it, in scikit-learn: X (N, c kh kw), Y (N, n), float32 as there.

    LASSO by coordinate descent on FEW samples, W_i as it is, warm start, random order; alpha doubles from 1e-3 until
    fewer than `keep` channels are left, then bisection until there are `keep` or up to a tenth more. Linear regression
    on all samples of those. LASSO has one thread: its vectors are short, and several spend their time on each other.
    """
    (n, c), cpu = conv.weight.shape[:2], torch.device("cpu")
    weight, own = (t.detach().cpu().numpy() for t in (conv.weight, conv.bias))  # type: ignore[union-attr]
    rows = np.random.default_rng(seed).permutation(len(X))[: min(FEW, len(X) // 20)]
    solver = Lasso(warm_start=True, selection="random", random_state=seed)

    def choose() -> np.ndarray:
        few = X[rows].reshape(len(rows), c, -1).transpose(1, 0, 2)  # (c, rows, kk)
        Z = (few @ weight.reshape(n, c, -1).transpose(1, 2, 0)).reshape(c, -1).T  # (rows * n, c)
        y = (Y[rows] - own).ravel()  # (rows * n,)

        def left(alpha: float) -> int:
            solver.set_params(alpha=alpha).fit(Z, y)
            return int(np.count_nonzero(solver.coef_))

        low, high = 0.0, 1e-3
        while left(high) >= keep:
            high *= 2
        for _ in range(100):
            count = left(alpha := (low + high) / 2)
            if keep <= count <= 1.1 * keep:
                return np.flatnonzero(solver.coef_)
            low, high = (low, alpha) if count < keep else (alpha, high)
        raise ValueError(f"no alpha leaves keep={keep} of c={c} channels, or a tenth more; take another width")

    def regress(kept: np.ndarray) -> LinearRegression:
        return LinearRegression().fit(X.reshape(len(X), c, -1)[:, kept].reshape(len(X), -1), Y - own)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # for alpha near 0; there they go on as well
        with threadpool_limits(1):
            kept, select_s = timed(cpu, choose)
    found, refit_s = timed(cpu, regress, kept)
    solution = torch.from_numpy(found.coef_).reshape(n, len(kept), *KERNEL)
    return Recipe(torch.from_numpy(kept), solution, torch.from_numpy(found.intercept_ + own), select_s, refit_s)


@torch.no_grad()
def one_layer(sizes: Sizes, device: torch.device) -> pd.DataFrame:
    """`authors_recipe` for half the channels of LAYER, and the package at the width where that ended; a row a run.

    The package reads patches that lie where it runs, on the CPU and on a GPU too, and gathers moments first; the recipe
    runs on the CPU. error_held_out: on other images, a fourth as many. times: how often the row's total_s goes into
    the recipe's (with the same draw, the median); times_bare: the same without the moments, which serve all widths;
    error_ratio: held-out error over the recipe's.
    """
    cpu, network, rows = torch.device("cpu"), vgg16(shrink=sizes.shrink, seed=1), []
    train = sizes.rival_images * sizes.rival_points
    images = random_images(sizes.rival_images * 5 // 4, sizes.rival_pixels, seed=1)
    X, Y = sample_layer(network, LAYER, images, points=sizes.rival_points)
    held = gather([(X[train:], Y[train:])])
    X, Y, conv = X[:train], Y[:train], convolution(network, LAYER)
    places = {place: (X.to(place), Y.to(place), copy.deepcopy(conv).to(place)) for place in {cpu: 0, device: 0}}
    about = {"patches": train, "held_out": held.count, "c": conv.in_channels, "n": conv.out_channels}
    for draw in range(sizes.draws):
        row = about | {"draw": draw, "solver": "scikit-learn", "where": "CPU", "moments_s": 0.0}
        for _ in range(REPEATS):
            theirs = authors_recipe(X.numpy(), Y.numpy(), conv, conv.in_channels // 2, seed=draw)
            row |= {"kept": (keep := len(theirs.kept)), "select_s": theirs.select_s, "refit_s": theirs.refit_s}
            rows.append(row | {"error_held_out": error(held, theirs.weight, theirs.bias, theirs.kept)})
        for place, problem in places.items():
            for repeat in range(-1, REPEATS):  # the first warms up
                kept, fit, seconds = ours(place, *problem, keep)
                row |= {"solver": "sppkit", "where": "CPU" if place == cpu else "GPU", **seconds}
                row["error_held_out"] = error(held, fit.weight.cpu(), fit.bias.cpu(), kept.cpu())
                rows += [dict(row)] if repeat >= 0 else []
    frame = pd.DataFrame(rows)
    frame["total_s"] = frame[["moments_s", "select_s", "refit_s"]].sum(axis=1)
    recipe = frame[frame["solver"] == "scikit-learn"].groupby("draw")[["total_s", "error_held_out"]].median()
    recipe = recipe.loc[frame["draw"]].reset_index()
    frame["times"] = recipe["total_s"] / frame["total_s"]
    frame["times_bare"] = recipe["total_s"] / (frame["total_s"] - frame["moments_s"])
    return frame.assign(error_ratio=frame["error_held_out"] / recipe["error_held_out"])


def ours(
    device: torch.device, X: Tensor, Y: Tensor, conv: nn.Conv2d, keep: int
) -> tuple[Tensor, Refit, dict[str, float]]:
    """Channels, refit and seconds of what `cp.prune_layer` does, from X (N, c kh kw) and Y (N, n) on the device."""
    moments, moments_s = timed(device, gather, zip(X.split(CHUNK), Y.split(CHUNK), strict=True))
    (kept, *_), select_s = timed(device, cp.by_lasso, moments, conv, keep)
    fit, refit_s = timed(device, refit, moments, kept, KERNEL)
    return kept, fit, {"moments_s": moments_s, "select_s": select_s, "refit_s": refit_s}


def beside(runs: pd.DataFrame) -> pd.DataFrame:
    """Medians of the runs of `one_layer`, a row a solver, and the range of `times`; n of them."""
    columns = ["kept", "moments_s", "select_s", "refit_s", "total_s", "error_held_out", "error_ratio"]
    columns += ["times", "times_bare"]
    groups = runs.groupby(["solver", "where"], sort=False)
    least, most = groups["times"].min(), groups["times"].max()
    return groups[columns].median().assign(least=least, most=most, n=groups.size()).reset_index()


def whole_network(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Seconds of `channel_prune` for 32-pixel images at a FLOP ratio of 2, forward passes and all; n = 1."""
    network = networks.create(sizes.network, classes=10).to(device)
    images = random_images(sizes.network_images, 32, seed=2)
    (small, table), seconds = timed(device, cp.channel_prune, network, images, flop_ratio=2)
    reached = cost.flop_ratio(network, small, images[:1].to(device))
    row = {"network": sizes.network, "images": len(images), "layers": len(table), "flop_ratio": reached}
    return row | {"seconds": seconds, "n": 1}


def goals(layers: pd.DataFrame, solvers: pd.DataFrame, network: dict[str, Any], device: torch.device) -> pd.DataFrame:
    """What is wanted of full sizes, and what came out."""
    gpu = device.type == "cuda"
    times = [
        (f"scikit-learn's time over ours, {row.where}{more}", value, "at least", 5.0 if row.where == "CPU" else 50.0)
        for row in solvers[1:].itertuples()
        for more, value in ((", moments counted", row.times), (", moments not counted", row.times_bare))
    ]
    found = [
        ("12 layers: moments, paths, refits, s", solved(layers), "at most", 10.0 if gpu else 180.0),
        *times,
        ("our held-out error over scikit-learn's", solvers["error_ratio"].iloc[-1], "at most", 1.0),
        (f"{network['network']}, 32 pixels, whole, s", network["seconds"], "at most", 60.0),
    ]
    frame = pd.DataFrame(found, columns=["what", "measured", "wanted", "limit"])
    below = frame["measured"] <= frame["limit"]
    return frame.assign(met=below.where(frame["wanted"] == "at most", frame["measured"] >= frame["limit"]))


def solved(layers: pd.DataFrame) -> float:
    return float(layers[["moments_s", "path_s", "refit_s"]].to_numpy().sum())


def main(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """`python -m sppkit bench channels`: prints tables and appends a record to data/runs, of --quick to build/."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; recorded in build/")
    parser.add_argument("--revision", help="recorded as the source's revision; git is asked otherwise")
    options = parser.parse_args(arguments)
    device, cpu = resolve_device(options.device), device_name(torch.device("cpu"))
    sizes = QUICK if options.quick else FULL[device.type]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    about: dict[str, Any] = {"schema": 1, "experiment": "bench-channels", "device": device_name(device), "cpu": cpu}
    about |= {"torch": torch.__version__, "scikit-learn": version("scikit-learn"), "python": platform.python_version()}
    about |= {"revision": options.revision or revision(), "load": load, "sizes": asdict(sizes)}
    print(", ".join(f"{name} {about[name]}" for name in ("device", "cpu", "torch", "scikit-learn", "revision", "load")))
    with exact(device):
        layers, rest = all_layers(sizes, device)
        print(f"\nVGG-16, {sizes.pixels} pixels, {sizes.images} images x {sizes.points} points (n=1)")
        _show(layers)
        names = ["extraction_s", "moments_s", "path_s", "refit_s"]
        print(", ".join(f"{name} {value:.2f}" for name, value in {**rest, **layers[names].sum()}.items()))
        runs = one_layer(sizes, device)
        solvers = beside(runs)
        print(f"\n{LAYER}: c={runs['c'][0]}, {runs['n'][0]} outputs, {runs['patches'][0]} patches, medians of n runs")
        _show(solvers)
        network = whole_network(sizes, device)
        print("\nchannel_prune of a whole network")
        _show(pd.DataFrame([network]))
    frames = {"layers": layers, "solvers": solvers, "runs": runs}
    if not options.quick:
        frames["goals"] = goals(layers, solvers, network, device)
        print()
        _show(frames["goals"])
    record = about | {name: frame.to_dict("records") for name, frame in frames.items()} | rest | {"network": network}
    folder = options.root / ("build" if options.quick else "data/runs")
    append_line(folder / "bench-channels.jsonl", json.dumps(record))


def _show(frame: pd.DataFrame) -> None:
    print(frame.to_string(index=False, float_format=lambda x: f"{x:.4g}"), flush=True)
