"""One training loop for baselines, pruning and retraining.

Resumed on a CPU, a run ends bit for bit like one that was never stopped; a GPU's kernels are not that deterministic.
"""

import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from sppkit import spp
from sppkit.pruner import Pruner
from training.batches import Normalise, evaluation
from training.data import ImageData
from training.step import Training, TrainingStep, autocast, precision_flags

SAVE_EVERY = 60  # seconds between checkpoints
VIEWS = ("sampled", "expected", "threshold", "unmasked")
Result = TypeVar("Result")


class OutOfTime(Exception):
    """The deadline came before the last step; the checkpoint holds the state to go on from."""


def stepwise(
    network: nn.Module,
    data: ImageData,
    settings: Training,
    *,
    pruner: Pruner | None = None,
    stop: Callable[[], bool] | None = None,
    checkpoint: Path | None = None,
    deadline: float | None = None,
    fuse: bool = False,
) -> Generator[None, None, pd.DataFrame]:
    """Train `network`, on the device of `data`, in place and return its history; yields after every step.

    pruner: masks the weights at every step; updated every `pruner.interval` steps until it is finished.
    stop: asked after every update of the pruner; True ends the run before its last step.
    checkpoint: file to resume from if it exists; written first, every minute and at the deadline, removed at the end.
    deadline: `time.monotonic()` value after which the run saves its checkpoint and raises `OutOfTime`.
    fuse: compile the network with torch.compile: faster on a GPU, once it is compiled.

    A row an epoch: step (steps done), lr, loss, accuracy (%, on the training batches as they came), seconds.
    FloatingPointError if loss or weights stop being finite (the checkpoint holds the last state that was); ValueError
    if they never were, or for another run's file.
    """
    if bad := [name for name, value in network.named_parameters() if not value.isfinite().all()]:
        raise ValueError(f"the weights of {bad[0]!r} are NaN or infinite before training; go back to a checkpoint")
    run = TrainingStep(network, data, settings, pruner=pruner, fuse=fuse)
    length, first, history = run.batches.steps_per_epoch, 0, list[dict[str, float]]()
    quiet = True if os.environ.get("CI") else None  # None: quiet unless a terminal is attached
    devices = [run.device] if run.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), precision_flags(run.device, settings):
        run.generator.manual_seed(settings.seed)
        if checkpoint is not None and checkpoint.exists():
            first, history = run.resume(checkpoint)
        saved, done = float("-inf"), first
        begin = time.monotonic() - (history[-1]["seconds"] if history else 0.0)
        for step in tqdm(range(first, settings.steps), initial=first, total=settings.steps, disable=quiet):
            now = time.monotonic()
            late = deadline is not None and now > deadline
            if checkpoint is not None and (late or now - saved > SAVE_EVERY):
                run.save(checkpoint, step, history)
                saved = now
            if late:
                raise OutOfTime(f"stopped at step {step} of {settings.steps}")
            if pruner is not None and step % pruner.interval == 0:
                if not pruner.finished:
                    pruner.update()
                if stop and stop():
                    break
            run.step(step)
            yield
            done = step + 1
            if done % length == 0:
                history.append(run.read(done, length) | {"seconds": time.monotonic() - begin})
        if rest := done % length:
            history.append(run.read(done, rest) | {"seconds": time.monotonic() - begin})
    if not all(parameter.isfinite().all() for parameter in network.parameters()):
        raise FloatingPointError(f"weights became NaN or infinite in the last epoch; lower lr={settings.lr}")
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return pd.DataFrame(history)


def exhaust(generator: Generator[None, None, Result]) -> Result:
    """What a generator returns at its end."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def fit(network: nn.Module, data: ImageData, settings: Training, **options: Any) -> pd.DataFrame:
    """`stepwise`, with its options, run to its end."""
    return exhaust(stepwise(network, data, settings, **options))


def renew_statistics(network: nn.Module, data: ImageData, settings: Training, *, batches: int = 100) -> None:
    """Take every BatchNorm's mean and variance anew, as averages over (at most an epoch of) training batches."""
    source, device = settings.batches(data.train), data.train.images.device
    steps = range(min(batches, source.steps_per_epoch))
    inputs = (source.select(step).batch()[0] for step in steps)  # (B, 3, H, W) each
    with precision_flags(device, settings), autocast(device, settings):
        update_bn(inputs, network)


def evaluate(network: nn.Module, data: ImageData, settings: Training) -> float:
    """Accuracy in % on the test images, in evaluation mode, with the precision and normalisation of `settings`."""
    training, device = network.training, data.test.images.device
    batches = evaluation(data.test, Normalise.of(data.train, settings.normalise))
    with torch.inference_mode(), precision_flags(device, settings), autocast(device, settings):
        network.eval()
        correct = sum((network(x).argmax(1) == y).sum() for x, y in batches)
    network.train(training)
    return 100 * int(correct) / len(data.test)


@contextmanager
def view(pruner: Pruner, kind: str) -> Iterator[None]:
    """The network for a look at it while it is being pruned, its weights given back afterwards.

    "sampled": one draw of the masks, as a training step has them; "expected": weights times 1 - p; "threshold": groups
    with p below 0.5; "unmasked": all that are not gone. ValueError for another kind.
    """
    if kind not in VIEWS:
        raise ValueError(f"view {kind!r} must be one of {', '.join(VIEWS)}")
    p, random, shown = pruner._p, pruner.generator.get_state(), [weight.data for weight in pruner._parameters]
    try:
        drawn = spp.draw(p, pruner.generator)
        stays = {"sampled": drawn, "expected": 1 - p, "threshold": p < 0.5, "unmasked": p >= 0}[kind]
        weight = pruner._weight * stays[pruner._columns] * stays[pruner._rows]
        pruner._show(pruner._views(weight.to(pruner._weight.dtype)))
        yield
    finally:
        pruner._show(shown)
        pruner.generator.set_state(random)
