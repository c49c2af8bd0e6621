"""Training speed: the captured step beside the eager one and beside a step that prunes, in one run.

Others are about channel pruning, pruned networks and recorded ones: `bench_channels`, `bench_speed`, `bench_runs`.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import bench_channels
import bench_runs
import bench_speed
import pandas as pd
import torch
from training import Training, TrainingStep, networks
from training.data import ImageData, device_name, load, resolve_device
from training.step import precision_flags

from sppkit.plan import make_plan
from sppkit.pruner import Pruner

IMAGES: dict[str, Any] = {"normalise": "channel", "crop_padding": 4, "flip": True}
SOLVERS: dict[str, dict[str, Any]] = {
    "convnet": {"lr": 1e-3, "normalise": "mean_image"},
    "resnet56": {"lr": 0.02, **IMAGES},
    "vgg16-bn": {"lr": 0.02, **IMAGES},
}
NETWORKS = tuple(SOLVERS)
INTERVAL = 180  # t of SPP; a round has that many steps, so that each holds one update


def training_speed(
    data: ImageData, *, batch_size: int = 128, rounds: int = 4, steps: int = INTERVAL, fuse: bool = False
) -> pd.DataFrame:
    """Images per second of whole training steps (data, augmentation, forward, backward, SGD) and the loss by round.

    One row a network and mode, interleaved, from the same weights and data order: "eager" and, on a GPU (in bf16),
    "captured" and "pruning", captured too, with SPP's masks and an update a round. images_per_s is the median of the
    rounds after the first, spread their range, slower the time of a step over the captured one's less 1, in %; loss_k
    the mean of round k. `fuse` compiles the networks of the captured modes.
    """
    device, rows = data.train.images.device, []
    gpu = device.type == "cuda"
    precision = "bf16" if gpu else "float32"
    for name in NETWORKS:
        settings = Training(steps=steps * rounds, batch_size=batch_size, precision=precision, **SOLVERS[name])
        runs = {}
        for mode in ("eager", "captured", "pruning") if gpu else ("eager",):
            network = networks.create(name, classes=len(data.classes)).to(device)
            example = data.train.images[:1].permute(0, 3, 1, 2).float()
            pruner = Pruner(network, make_plan(network, example, flop_ratio=2)) if mode == "pruning" else None
            captured = mode != "eager"
            runs[mode] = TrainingStep(network, data, settings, pruner=pruner, capture=captured, fuse=fuse and captured)
        with precision_flags(device, settings):
            for turn in range(rounds):
                for mode, run in runs.items():
                    begin = time.perf_counter()
                    for step in range(turn * steps, (turn + 1) * steps):
                        if run.pruner is not None and step % INTERVAL == 0:
                            run.pruner.update()
                        run.step(step)
                    loss = run.read(step + 1, steps)["loss"]  # this waits for the device
                    rows.append((name, mode, turn + 1, steps * batch_size / (time.perf_counter() - begin), loss))
    frame = pd.DataFrame(rows, columns=["network", "mode", "round", "images_per_s", "loss"])
    later = frame[frame["round"] > 1]  # the first round warms up and captures
    speed = later.groupby(["network", "mode"], sort=False)["images_per_s"]
    losses = frame.pivot(index=["network", "mode"], columns="round", values="loss").add_prefix("loss_")
    table = pd.DataFrame({"images_per_s": speed.median(), "spread": speed.max() - speed.min()}).reset_index()
    plain = table[table["mode"] == table["mode"].iloc[-1 if not gpu else 1]].set_index("network")["images_per_s"]
    table["slower"] = 100 * (table["network"].map(plain) / table["images_per_s"] - 1)
    table = table.join(losses, on=["network", "mode"])
    return table.assign(batch=batch_size, precision=precision, rounds=rounds - 1)


def main(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """`python -m sppkit bench`, `bench channels`, `bench speed`, `bench runs`."""
    others: dict[str, Any] = {"channels": bench_channels, "speed": bench_speed, "runs": bench_runs}
    if arguments and (other := others.get(arguments[0])):
        parser.prog, parser.description = f"{parser.prog} {arguments[0]}", other.__doc__
        other.main(parser, arguments[1:])
        return
    parser.epilog = (
        "bench channels: how fast channels are pruned; bench speed: how fast pruned networks are; "
        "bench runs: the same of those that recorded runs left; each has --help"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dataset", default="cifar10", help="cifar10, or digits where that is absent")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=INTERVAL, help="steps a round (180: one update of SPP in each)")
    parser.add_argument("--fuse", action="store_true", help="compile the networks of the captured steps")
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    images = load(options.dataset, root=options.data or options.root / "data", device=device)
    print(f"{device_name(device)}, torch {torch.__version__}, data on the device: {images.name}")
    frame = training_speed(images, batch_size=options.batch_size, steps=options.steps, fuse=options.fuse)
    print(frame.round({"images_per_s": 0, "spread": 0, "slower": 1}).round(4).to_string(index=False))
    print("captured: the step replayed as a CUDA graph" if device.type == "cuda" else "no GPU: only the eager step")
