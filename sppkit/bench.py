"""Training speed: the captured step beside the eager one, on the same data, in one run."""

from __future__ import annotations

import time
from typing import Any

import pandas as pd

from sppkit import networks
from sppkit.data import ImageData
from sppkit.step import Training, TrainingStep, precision_flags

SOLVERS: dict[str, dict[str, Any]] = {
    "convnet": {"lr": 1e-3, "normalise": "mean_image"},
    "resnet56": {"lr": 0.02, "normalise": "channel", "crop_padding": 4, "flip": True},
}
NETWORKS = tuple(SOLVERS)


def training_speed(data: ImageData, *, batch_size: int = 128, steps: int = 390, rounds: int = 4) -> pd.DataFrame:
    """Images per second of whole training steps (data, augmentation, forward, backward, SGD) and the loss by round.

    One row a network and mode: "eager" and, on a GPU (in bf16), "captured", interleaved, from the same weights and data
    order. images_per_s is the median of the rounds after the first, spread their range, loss_k the mean of round k.
    """
    device, rows = data.train.images.device, []
    gpu = device.type == "cuda"
    precision = "bf16" if gpu else "float32"
    for name in NETWORKS:
        settings = Training(steps=steps * rounds, batch_size=batch_size, precision=precision, **SOLVERS[name])
        runs = {}
        for mode in ("eager", "captured") if gpu else ("eager",):
            network = networks.create(name, classes=len(data.classes)).to(device)
            runs[mode] = TrainingStep(network, data, settings, capture=mode == "captured")
        with precision_flags(device, settings):
            for turn in range(rounds):
                for mode, run in runs.items():
                    begin = time.perf_counter()
                    for step in range(turn * steps, (turn + 1) * steps):
                        run.step(step)
                    loss = run.read(step + 1, steps)["loss"]  # this waits for the device
                    rows.append((name, mode, turn + 1, steps * batch_size / (time.perf_counter() - begin), loss))
    frame = pd.DataFrame(rows, columns=["network", "mode", "round", "images_per_s", "loss"])
    later = frame[frame["round"] > 1]  # the first round warms up and captures
    speed = later.groupby(["network", "mode"], sort=False)["images_per_s"]
    losses = frame.pivot(index=["network", "mode"], columns="round", values="loss").add_prefix("loss_")
    table = pd.DataFrame({"images_per_s": speed.median(), "spread": speed.max() - speed.min()}).join(losses)
    return table.reset_index().assign(batch=batch_size, precision=precision, rounds=rounds - 1)
