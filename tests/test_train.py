"""The training loop against hand-written ones; killed and resumed runs against uninterrupted ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import Batches, Normalise, Training, TrainingStep, evaluate, fit, loop, networks
from training.data import ImageData, Split

from sppkit import state
from sppkit.groups import Groups
from sppkit.plan import Plan
from sppkit.pruner import Pruner

SETTINGS = Training(steps=14, batch_size=8, lr=1e-3, weight_decay=0.004, milestones=(5, 9), normalise="mean_image")
GOALS = {"conv1": 30, "conv2": 300}


def random_split(count: int, seed: int, size: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return Split(images, torch.randint(0, 10, (count,), generator=generator))


def random_images(size: int) -> ImageData:
    return ImageData("random", random_split(51, 0, size), random_split(23, 1, size), tuple("0123456789"))


@pytest.fixture(scope="module")
def images() -> ImageData:
    """51 images: six batches of eight, and three left over, make an epoch."""
    return random_images(32)


def dropout_network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 10),
        )


def prune(network: nn.Module, goals: dict[str, int], **options: Any) -> Pruner:
    size = 32 if "conv2" in goals else 8
    return Pruner(network, Plan(Groups(network, torch.zeros(1, 3, size, size), layers=[*goals]), goals), **options)


def make(name: str, seed: int = 0) -> nn.Module:
    return dropout_network(seed) if name == "dropout" else networks.create(name, seed=seed)


@contextmanager
def ticking() -> Iterator[None]:
    """Every look at the clock is a second later than the last."""
    ticks = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.time, "monotonic", lambda: float(next(ticks)))
        yield


def stop_after(seconds: float, *arguments: object, **options: object) -> int:
    """Run until the ticking clock stops it; the step at which it stopped."""
    with ticking(), pytest.raises(loop.OutOfTime) as caught:
        fit(*arguments, deadline=seconds, **options)  # type: ignore[arg-type]
    return int(str(caught.value).split()[3])


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def without_time(history: pd.DataFrame) -> pd.DataFrame:
    return history.drop(columns="seconds")


@pytest.mark.parametrize(
    ("name", "pruned", "options"),
    [
        ("convnet", False, {}),
        ("convnet", True, {}),
        ("convnet", True, {"momentum": 0.0}),
        ("dropout", False, {"normalise": "channel", "lr": 0.05, "schedule": "cosine"}),
        ("dropout", True, {"normalise": "channel", "lr": 0.05, "crop_padding": 4, "flip": True}),
    ],
)
def test_a_run_killed_twice_ends_bit_for_bit_like_one_that_was_not(
    images: ImageData, tmp_path: Path, name: str, pruned: bool, options: dict[str, object]
) -> None:
    settings = replace(SETTINGS, **options)  # type: ignore[arg-type]
    goals = GOALS if name == "convnet" else {"0": 20}

    def start(seed: int) -> tuple[nn.Module, Pruner | None]:
        network = make(name, seed)
        return network, prune(network, goals, interval=2, seed=seed) if pruned else None

    network, pruner = start(0)
    if pruner is not None:
        pruner.probability.fill_(0.9)  # some groups are gone before the end
    expected = fit(network, images, settings, pruner=pruner)
    path, stops = tmp_path / "run.safetensors", []
    for seed, seconds in ((0, 3.5), (1, 7.5)):  # a new process starts from whatever it has: here, other weights
        resumed, other = start(seed)
        if other is not None and seed == 0:
            other.probability.fill_(0.9)
        stops.append(stop_after(seconds, resumed, images, settings, pruner=other, checkpoint=path))
        assert path.exists()
    assert stops == [3, 9]  # both within an epoch
    resumed, other = start(2)
    history = fit(resumed, images, settings, pruner=other, checkpoint=path)
    assert not path.exists()
    assert same_tensors(network, resumed)
    pd.testing.assert_frame_equal(without_time(history), without_time(expected), check_exact=True)
    assert history["seconds"].is_monotonic_increasing
    assert history["step"].tolist() == [6, 12, 14]
    if pruner is not None and other is not None:
        assert torch.equal(pruner.probability, other.probability)
        assert torch.equal(torch.stack(pruner.trace), torch.stack(other.trace))
        assert torch.equal(pruner.generator.get_state(), other.generator.get_state())
        assert pruner.updates == other.updates == 7
        assert pruner.gone.any()


@pytest.mark.parametrize("name", ["convnet", "dropout"])
def test_equal_seeds_give_equal_runs_and_others_others(images: ImageData, name: str) -> None:
    settings = replace(SETTINGS, steps=7, normalise="channel")
    runs = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)  # must not matter
        before = torch.get_rng_state()
        network = make(name)
        history = fit(network, images, replace(settings, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
        runs.append((network, history))
    assert same_tensors(runs[0][0], runs[1][0])
    pd.testing.assert_frame_equal(without_time(runs[0][1]), without_time(runs[1][1]), check_exact=True)
    assert not same_tensors(runs[0][0], runs[2][0])


def test_global_state_survives_a_run_that_stops(images: ImageData, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    stop_after(2.5, make("dropout"), images, SETTINGS, checkpoint=tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)


def test_learning_rates_are_the_formulas() -> None:
    step = Training(steps=100, lr=0.5, milestones=(30, 60), gamma=0.2)
    for number in (0, 29, 30, 59, 60, 99):
        assert step.learning_rate(number) == pytest.approx(0.5 * 0.2 ** ((number >= 30) + (number >= 60)), rel=1e-12)
    cosine = replace(step, schedule="cosine")
    for number in range(100):
        assert cosine.learning_rate(number) == pytest.approx(0.5 * math.cos(math.pi * number / 200) ** 2, abs=1e-12)
    assert cosine.learning_rate(100) == pytest.approx(0, abs=1e-15)
    assert {replace(step, milestones=()).learning_rate(number) for number in range(100)} == {0.5}


def by_hand(network: nn.Module, images: ImageData, settings: Training) -> list[tuple[float, float]]:
    """Train by SGD written out; mean loss and accuracy of each epoch."""
    factors = getattr(network, "multipliers", {})
    velocity = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    normalise = Normalise.of(images.train, settings.normalise)
    batches = Batches(images.train, batch_size=settings.batch_size, seed=settings.seed, normalise=normalise)
    rows, sums, count = [], [0.0, 0.0], 0
    for step in range(settings.steps):
        epoch, position = divmod(step, batches.steps_per_epoch)
        if position == 0:
            batches.start_epoch(epoch)
        batches.select(position)
        x, y = batches.batch()
        logits = network.train()(x)
        loss = -logits.log_softmax(1)[torch.arange(len(y)), y].mean()
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        rate = settings.lr * settings.gamma ** sum(step >= milestone for milestone in settings.milestones)
        with torch.no_grad():
            for (name, p), gradient in zip(network.named_parameters(), gradients, strict=True):
                lr_factor, decay_factor = factors.get(name, (1.0, 1.0))
                gradient = gradient + settings.weight_decay * decay_factor * p
                velocity[name] = settings.momentum * velocity[name] + gradient
                p -= rate * lr_factor * velocity[name]
        sums = [sums[0] + float(loss.detach()), sums[1] + 100 * float((logits.argmax(1) == y).double().mean())]
        count += 1
        if position == batches.steps_per_epoch - 1 or step == settings.steps - 1:
            rows.append((sums[0] / count, sums[1] / count))
            sums, count = [0.0, 0.0], 0
    return rows


@pytest.mark.parametrize("name", ["convnet", "resnet20"])
def test_training_is_sgd_by_hand(images: ImageData, name: str) -> None:
    settings = replace(SETTINGS, steps=8, milestones=(3, 7))
    if name == "resnet20":
        settings = replace(settings, normalise="channel", lr=1e-3)
    one, other, start = (make(name) for _ in range(3))
    history, rows = fit(one, images, settings), by_hand(other, images, settings)
    assert history["loss"].tolist() == pytest.approx([row[0] for row in rows], rel=1e-5)
    assert history["accuracy"].tolist() == pytest.approx([row[1] for row in rows], abs=1e-4)
    assert history["lr"].tolist() == pytest.approx([settings.lr * 0.1, settings.lr * 0.01])
    pairs = zip(one.state_dict().values(), other.state_dict().values(), start.state_dict().values(), strict=True)
    for found, expected, first in pairs:
        moved = (expected - first).double().norm()
        # BatchNorm's small gradients are sums that cancel: float32 leaves them 0.4 % apart on some processors
        assert float((found - expected).double().norm()) <= 1e-2 * float(moved)


def test_the_factors_of_the_convnet_are_felt(images: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, steps=3, momentum=0.0, lr=1e-4)
    network, plain, start = (make("convnet") for _ in range(3))
    fit(network, images, settings)
    monkeypatch.setattr(networks.ConvNet, "multipliers", {})
    fit(plain, images, settings)
    ratio = (network.conv2.bias - start.conv2.bias).norm() / (plain.conv2.bias - start.conv2.bias).norm()
    assert float(ratio.detach()) == pytest.approx(2, rel=0.05)
    assert float(network.linear.weight.detach().norm()) < float(plain.linear.weight.detach().norm())


def test_history_has_one_row_an_epoch(images: ImageData) -> None:
    history = fit(make("dropout"), images, SETTINGS)
    assert history.columns.tolist() == ["step", "lr", "loss", "accuracy", "seconds"]
    assert history["step"].tolist() == [6, 12, 14]
    assert history["lr"].tolist() == pytest.approx([1e-4, 1e-5, 1e-5])
    assert history["accuracy"].between(0, 100).all()
    assert (history["seconds"].diff().dropna() >= 0).all()


def test_the_loss_falls_on_images_that_can_be_learned() -> None:
    split = random_split(40, 0, 32)
    shade = (split.labels % 2 * 120 + 60).to(torch.uint8)
    split = Split(shade[:, None, None, None].expand(-1, 32, 32, 3).contiguous(), split.labels % 2)
    images = ImageData("shades", split, split, ("dark", "light"))
    network, settings = networks.create("resnet20", classes=2), Training(steps=20, batch_size=20, lr=0.05)
    history = fit(network, images, settings)
    assert history["loss"].iloc[-1] < 0.3 < 0.5 < history["loss"].iloc[0]
    assert history["accuracy"].iloc[-1] > 95


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_is_a_plain_loop(images: ImageData, training: bool) -> None:
    network = make("dropout")
    fit(network, images, replace(SETTINGS, normalise="channel", lr=0.05, milestones=()))
    pixels = images.train.images.double()
    mean, std = pixels.mean((0, 1, 2)), pixels.flatten(0, 2).std(0, correction=0)
    network.eval()
    right = 0
    with torch.no_grad():
        for image, label in zip(images.test.images, images.test.labels, strict=True):
            x = ((image.double() - mean) / std).permute(2, 0, 1).float()
            right += int(network(x[None]).argmax() == label)
    network.train(training)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert evaluate(network, images, replace(SETTINGS, normalise="channel")) == pytest.approx(100 * right / 23)
    assert network.training is training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(torch.full((len(x),), 3), 10).float()


def test_evaluate_counts_all_test_images(images: ImageData) -> None:
    large = replace(images, test=random_split(1203, 5, 4))
    expected = 100 * images_of(large.test, 3) / 1203
    normalise_at_32 = replace(large, train=random_split(5, 6, 4))
    assert evaluate(Constant(), normalise_at_32, SETTINGS) == pytest.approx(expected)


def images_of(split: Split, label: int) -> int:
    return sum(int(y) == label for y in split.labels)


def test_the_pruner_is_updated_every_interval_until_it_is_finished(
    images: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make("dropout")
    pruner = prune(network, {"0": 5}, interval=3)
    calls: list[int] = []
    masks: list[float] = []
    update, before = Pruner.update, Pruner.apply

    def counted_update(self: Pruner) -> None:
        calls.append(len(masks))
        update(self)
        if len(calls) == 3:
            self.probability.zero_()
            self.remove(np.arange(27) < 5, last=True)

    def counted_before(self: Pruner) -> None:
        before(self)
        masks.append(float(self._mask.float().mean()))

    monkeypatch.setattr(Pruner, "update", counted_update)
    monkeypatch.setattr(Pruner, "apply", counted_before)
    fit(network, images, SETTINGS, pruner=pruner)
    assert calls == [0, 3, 6]
    assert len(masks) == SETTINGS.steps  # masks go on to the end
    assert masks[-1] == pytest.approx(22 / 27)


def test_stopping_early_records_the_part_of_the_epoch(images: ImageData) -> None:
    answers: list[int] = []

    def stop() -> bool:
        answers.append(pruner.updates)
        return len(answers) == 5

    network = make("dropout")
    pruner = prune(network, {"0": 20}, interval=2)
    history = fit(network, images, SETTINGS, pruner=pruner, stop=stop)
    assert history["step"].tolist() == [6, 8]
    assert pruner.updates == len(answers) == 5
    assert fit_to(images, 8)["loss"].tolist() == pytest.approx(history["loss"].tolist(), rel=1e-6)
    network = make("dropout")
    pruner, answers[:] = prune(network, {"0": 20}, interval=2), [0]
    history = fit(network, images, SETTINGS, pruner=pruner, stop=stop)
    assert history["step"].tolist() == [6]  # it stopped where the epoch ended


def fit_to(images: ImageData, steps: int) -> pd.DataFrame:
    network = make("dropout")
    settings = replace(SETTINGS, steps=steps)
    return fit(network, images, settings, pruner=prune(network, {"0": 20}, interval=2))


def test_weights_that_are_not_finite_are_refused(images: ImageData) -> None:
    network = make("convnet")
    network.conv2.weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"weights of 'conv2\.weight' are NaN or infinite before training"):
        fit(network, images, SETTINGS)


@pytest.mark.parametrize("stop", [7, 8])
def test_a_diverged_run_says_so_and_keeps_the_checkpoint_it_had(images: ImageData, tmp_path: Path, stop: int) -> None:
    settings = replace(SETTINGS, normalise="channel", milestones=(7,), gamma=1e38)
    path = tmp_path / "run.safetensors"
    assert stop_after(4.5, make("dropout"), images, settings, checkpoint=path) == 4
    good = path.read_bytes()
    with pytest.raises(
        FloatingPointError, match=r"the loss became (nan|inf) by step 12 \('network/0\..*\); lower lr=0\.001"
    ):
        fit(make("dropout"), images, settings, checkpoint=path)
    assert path.read_bytes() == good
    # a deadline within the epoch comes before the loss is looked at
    with (
        ticking(),
        pytest.raises(FloatingPointError, match=r"not finite any more at step 9 \('network/.*' and \d+ more hold NaN"),
    ):
        fit(make("dropout"), images, settings, checkpoint=path, deadline=6.5)
    assert path.read_bytes() == good
    assert list(tmp_path.iterdir()) == [path]
    path.unlink()
    with pytest.raises(FloatingPointError, match="by step 12"):  # before the first minute is over
        fit(make("dropout"), images, settings, checkpoint=path)
    tensors, description = state.load(path, kind="training")
    assert description["step"] == 0
    assert torch.equal(tensors["network/0.weight"], make("dropout")[0].weight)


def test_statistics_are_renewed_as_means_over_batches(images: ImageData) -> None:
    network = make("dropout")
    network[1].running_mean.fill_(9.0)
    settings = replace(SETTINGS, normalise="channel")
    loop.renew_statistics(network, images, settings, batches=2)
    batches = settings.batches(images.train)
    outputs = [network[0](batches.select(step).batch()[0]).detach() for step in range(2)]
    torch.testing.assert_close(network[1].running_mean, torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0))
    torch.testing.assert_close(network[1].running_var, torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0))


@pytest.mark.parametrize("part", ["weights", "statistics", "momentum", "loss"])
def test_nothing_that_is_not_finite_is_saved(images: ImageData, tmp_path: Path, part: str) -> None:
    network = make("dropout")
    run = TrainingStep(network, images, SETTINGS)
    momentum = run._tensors()["momentum/0.weight"]
    tensors = {"weights": network[0].weight, "statistics": network[1].running_var}
    ({"momentum": momentum, "loss": run.totals} | tensors)[part].data.view(-1)[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"not finite any more at step 3 \("):
        run.save(tmp_path / "run", 3, [])
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_written_first_and_every_minute(
    images: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count(step=25)
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(ticks)))
    saved: list[int] = []
    monkeypatch.setattr(TrainingStep, "save", lambda self, path, step, history: saved.append(step))
    fit(make("dropout"), images, replace(SETTINGS, steps=8), checkpoint=tmp_path / "run")
    assert saved == [0, 3, 6]


@pytest.fixture
def checkpoint(images: ImageData, tmp_path: Path) -> Path:
    path = tmp_path / "run.safetensors"
    stop_after(4.5, make("convnet"), images, SETTINGS, checkpoint=path)
    return path


def test_a_checkpoint_of_another_run_is_refused_and_kept(images: ImageData, checkpoint: Path) -> None:
    before = checkpoint.read_bytes()
    with pytest.raises(ValueError, match=r"was saved with other settings \(lr, milestones\); delete it to start anew"):
        fit(make("convnet"), images, replace(SETTINGS, lr=0.5, milestones=(5,)), checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"belongs to another network \(first misfit: network/conv1"):
        fit(make("resnet20"), images, SETTINGS, checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"belongs to another network .*linear\.weight"):
        fit(networks.create("convnet", classes=11), images, SETTINGS, checkpoint=checkpoint)
    network = make("convnet")
    weights = make("convnet")
    with pytest.raises(ValueError, match=r"saved with other settings \(pruner\)"):
        fit(network, images, SETTINGS, checkpoint=checkpoint, pruner=prune(network, GOALS))
    assert same_tensors(network, weights)
    assert checkpoint.read_bytes() == before


def test_a_checkpoint_with_other_pruning_is_refused(images: ImageData, tmp_path: Path) -> None:
    path, network = tmp_path / "run.safetensors", make("convnet")
    stop_after(4.5, network, images, SETTINGS, checkpoint=path, pruner=prune(network, GOALS))
    network = make("convnet")
    with pytest.raises(ValueError, match=r"other settings \(pruner\)"):
        fit(network, images, SETTINGS, checkpoint=path)
    pruner = prune(network, {"conv2": 300, "conv3": 300})
    with pytest.raises(ValueError, match=r"other settings \(pruner\)"):
        fit(network, images, SETTINGS, checkpoint=path, pruner=pruner)


def test_a_checkpoint_cut_short_or_of_another_kind_is_refused(images: ImageData, checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is cut short or damaged"):
        fit(make("convnet"), images, SETTINGS, checkpoint=checkpoint)
    networks.save(make("convnet"), checkpoint)
    with pytest.raises(ValueError, match="is of kind 'network'"):
        fit(make("convnet"), images, SETTINGS, checkpoint=checkpoint)


def test_a_checkpoint_holds_no_code(checkpoint: Path) -> None:
    tensors, description = state.load(checkpoint, kind="training")
    assert description["step"] == 4
    assert description["settings"]["lr"] == SETTINGS.lr
    assert {name.split("/")[0] for name in tensors} == {"network", "momentum", "totals", "generator"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 and batch_size=8 must be at least 1"),
        ({"batch_size": 0}, "steps=14 and batch_size=0"),
        ({"schedule": "linear"}, "schedule='linear' must be one of step, cosine"),
        ({"precision": "fp16"}, "precision='fp16' must be one of float32, tf32, bf16"),
        ({"lr": 0.0}, r"lr=0\.0 must be positive"),
        ({"lr": math.nan}, "lr=nan must be positive"),
        ({"lr": math.inf}, "lr=inf must be positive"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **options)  # type: ignore[arg-type]


def test_a_batch_larger_than_the_set_is_refused(images: ImageData) -> None:
    with pytest.raises(ValueError, match="batch_size=64"):
        fit(make("dropout"), images, replace(SETTINGS, batch_size=64))


def test_a_gradient_through_unmasked_weights_is_not_compiled(
    images: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    for gradient in ("exact", "unmasked"):
        network = make("convnet")
        pruner = prune(network, {"conv2": 400}, gradient=gradient)
        TrainingStep(network, images, SETTINGS, pruner=pruner, fuse=True)
        assert (network in compiled) == (gradient == "exact")
