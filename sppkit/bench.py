"""Training speed: the captured step beside the eager one, on the same data, in one run."""

from __future__ import annotations

import time

import pandas as pd
import torch
from torch import nn

from sppkit import networks
from sppkit.data import ImageData
from sppkit.train import Training, _precision, _Run, fit

NETWORKS = ("convnet", "resnet56")


def training_speed(
    data: ImageData, *, batch_size: int = 128, steps: int = 200, rounds: int = 3
) -> pd.DataFrame:
    """Images per second of a whole training step (data, augmentation, forward, backward, SGD), median of `rounds`.

    One row a network and mode, modes interleaved round by round: "eager" and, on a GPU, "captured". `loss` is the
    mean training loss of the `steps` steps after the start, to see that both modes train alike. bf16 on a GPU.
    """
    gpu = data.train.images.device.type == "cuda"
    rows = []
    for name in NETWORKS:
        settings = Training(
            steps=steps * (rounds + 1),
            batch_size=batch_size,
            lr=1e-3 if name == "convnet" else 0.02,
            precision="bf16" if gpu else "float32",
            normalise="mean_image" if name == "convnet" else "channel",
            crop_padding=0 if name == "convnet" else 4,
            flip=name != "convnet",
        )
        runs = {
            mode: _start(name, data, settings, mode)
            for mode in (("eager", "captured") if gpu else ("eager",))
        }
        speeds: dict[str, list[float]] = {mode: [] for mode in runs}
        losses = {}
        with _precision(data, settings, autocast=False):
            for turn in range(rounds + 1):
                for mode, run in runs.items():
                    seconds = _time(run, turn * steps, steps)
                    if turn == 0:  # warm-up: the first steps choose algorithms and capture the graph
                        losses[mode] = run.read(steps - 1, steps)["loss"]
                    else:
                        speeds[mode].append(steps * batch_size / seconds)
        for mode in runs:
            speed = pd.Series(speeds[mode])
            rows.append((name, mode, speed.median(), speed.max() - speed.min(), losses[mode]))
    frame = pd.DataFrame(rows, columns=["network", "mode", "images_per_s", "spread", "loss"])
    return frame.assign(batch=batch_size, precision=settings.precision, rounds=rounds)


def loss_curves(data: ImageData, network: str, *, epochs: int = 3, batch_size: int = 128) -> pd.DataFrame:
    """Training loss by epoch, eager and captured, from the same weights, data order and augmentation."""
    steps = epochs * (len(data.train) // batch_size)
    settings = Training(
        steps=steps, batch_size=batch_size, lr=0.02, precision="bf16", crop_padding=4, flip=True
    )
    curves = {}
    for mode in ("eager", "captured"):
        net = _network(network, data)
        curves[mode] = fit(net, data, settings, capture=mode == "captured").set_index("step")["loss"]
    return pd.DataFrame(curves)


def _network(name: str, data: ImageData) -> nn.Module:
    return networks.create(name, classes=len(data.classes)).to(data.train.images.device)


def _start(name: str, data: ImageData, settings: Training, mode: str) -> _Run:
    return _Run(_network(name, data), data, settings, None, mode == "captured")


def _time(run: _Run, first: int, steps: int) -> float:
    gpu = run.device.type == "cuda"
    if gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for step in range(first, first + steps):
        run.step(step, *divmod(step, run.batches.steps_per_epoch))
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin
