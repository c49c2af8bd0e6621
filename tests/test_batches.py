"""Normalising and drawing training batches, against NumPy's own padding, slicing and moments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from training import Batches, Normalise, evaluation
from training.data import Split


def split(count: int = 10, size: int = 6, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(count))


def raw(size: int = 6) -> Normalise:
    """Leaves the pixels as they are."""
    return Normalise(torch.zeros(3, 1, 1), torch.ones(3, 1, 1))


def test_normalise_against_numpy() -> None:
    part = split(7)
    x = part.images.numpy().transpose(0, 3, 1, 2).astype(np.float64)
    expected = (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)
    y = Normalise.of(part, "channel")(part.images)
    assert y.dtype == torch.float32
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(Normalise.of(part, "mean_image")(part.images), x - x.mean(0), atol=1e-4)
    with pytest.raises(ValueError, match="kind='mean' must be"):
        Normalise.of(part, "mean")


def test_a_constant_channel_is_only_centred() -> None:
    part = split(4)
    part.images[..., 1] = 9
    y = Normalise.of(part, "channel")(part.images)
    assert torch.equal(y[:, 1], torch.zeros(4, 6, 6))
    assert torch.isfinite(y).all()


def test_evaluation_gives_every_sample_once_in_order() -> None:
    part = split(10)
    batches = list(evaluation(part, raw(), batch_size=4))
    assert [len(y) for _, y in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([y for _, y in batches]), part.labels)
    assert torch.equal(torch.cat([x for x, _ in batches]), part.images.permute(0, 3, 1, 2).float())


def epoch_of(batches: Batches, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    batches.start_epoch(epoch)
    seen = []
    for step in range(batches.steps_per_epoch):
        batches.select(step)
        seen.append(batches.batch())
    return torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 2, 9])
def test_crop_and_flip_against_padding_and_slicing(padding: int, flip: bool) -> None:
    part = split(60)
    batches = Batches(part, batch_size=20, seed=3, normalise=raw(), crop_padding=padding, flip=flip)
    x, y = epoch_of(batches, 5)
    flipped = 0
    for got, sample in zip(x.numpy(), y.tolist(), strict=True):
        border = ((padding, padding), (padding, padding), (0, 0))
        padded = np.pad(part.images[sample].numpy(), border)
        row, col = batches.offsets[sample].tolist()
        window = padded[row : row + 6, col : col + 6]
        if flip and batches.flips[sample]:
            window, flipped = window[:, ::-1], flipped + 1
        assert np.array_equal(got, window.transpose(2, 0, 1))
    assert flip == (15 <= flipped <= 45)
    assert batches.offsets.min() == 0
    assert batches.offsets.max() == 2 * padding
    assert torch.equal(part.images, split(60).images)


def test_an_epoch_follows_from_seed_and_epoch_alone() -> None:
    def make(seed: int) -> Batches:
        return Batches(split(12), batch_size=4, seed=seed, normalise=raw(), crop_padding=2, flip=True)

    one, two = make(1), make(1)
    epoch_of(one, 0)
    first, resumed = epoch_of(one, 3), epoch_of(two, 3)  # `two` never saw an earlier epoch
    assert torch.equal(first[0], resumed[0])
    assert torch.equal(first[1], resumed[1])
    orders = {tuple(epoch_of(make(seed), epoch)[1].tolist()) for seed in (0, 1, 2) for epoch in range(5)}
    assert len(orders) == 15
    assert all(sorted(order) == list(range(12)) for order in orders)  # every sample once an epoch


def test_the_order_does_not_hang_on_the_augmentation() -> None:
    plain = Batches(split(12), batch_size=4, seed=1, normalise=raw())
    augmented = Batches(split(12), batch_size=3, seed=1, normalise=raw(), crop_padding=2, flip=True)
    assert torch.equal(plain.order, augmented.order)


def test_what_is_left_over_is_not_used() -> None:
    batches = Batches(split(11), batch_size=4, seed=1, normalise=raw())
    assert batches.steps_per_epoch == 2
    assert len(set(epoch_of(batches, 0)[1].tolist())) == 8


def test_tensors_stay_where_they_are() -> None:
    part = split(12)
    batches = Batches(part, batch_size=4, seed=1, normalise=raw(), crop_padding=2, flip=True)

    def places() -> list[int]:
        tensors = (batches.index, batches.order, batches.offsets, batches.flips, part.images, part.labels)
        return [tensor.data_ptr() for tensor in tensors]

    before, order = places(), batches.order.clone()
    epoch_of(batches, 1)
    assert places() == before
    assert not torch.equal(batches.order, order)


def test_a_batch_is_normalised_after_the_crop() -> None:
    part = split(8)
    normalise = Normalise.of(part, "mean_image")
    settings = {"batch_size": 8, "seed": 1, "crop_padding": 2, "flip": True}
    plain, centred = (Batches(part, normalise=n, **settings) for n in (raw(), normalise))  # type: ignore[arg-type]
    x, expected = centred.batch()[0], plain.batch()[0] - normalise.mean
    border = batch_of_ones(part, settings) == 0  # (B, 1, H, W), outside the images
    assert torch.equal(x.masked_select(~border), expected.masked_select(~border))
    colour = normalise.mean.flatten(1).mean(1).round().view(1, 3, 1, 1)  # the mean colour, not black
    assert torch.equal((x + normalise.mean).masked_select(border), colour.expand_as(x).masked_select(border))
    assert 0 < int(border.sum()) < border.numel()


def batch_of_ones(part: Split, settings: dict) -> Tensor:
    """Which pixels of the batch come from the images, (B, 1, H, W)."""
    ones = Split(torch.ones_like(part.images), part.labels)
    return Batches(ones, normalise=raw(), **settings).batch()[0][:, :1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 9}, r"batch_size=9 must lie in 1\.\.8"),
        ({"batch_size": 0}, "batch_size=0 must"),
        ({"batch_size": 2, "crop_padding": -1}, "crop_padding=-1 must be 0 or more"),
    ],
)
def test_impossible_batches_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(split(8), seed=0, normalise=raw(), **settings)  # type: ignore[arg-type]


def test_a_step_outside_the_epoch_is_refused() -> None:
    batches = Batches(split(8), batch_size=4, seed=0, normalise=raw())
    for step in (-1, 2):
        with pytest.raises(ValueError, match=rf"step={step} must lie in 0\.\.1"):
            batches.select(step)


@pytest.mark.gpu
def test_a_batch_runs_in_a_cuda_graph_and_equals_the_cpu() -> None:
    part = split(64)
    there = Split(part.images.cuda(), part.labels.cuda())
    on_cpu, on_gpu = (
        Batches(s, batch_size=16, seed=1, normalise=Normalise.of(s, "channel"), crop_padding=2, flip=True)
        for s in (part, there)
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_gpu.batch()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x, y = on_gpu.batch()
    for epoch in range(3):
        on_cpu.start_epoch(epoch)
        on_gpu.start_epoch(epoch)
        for step in range(4):
            on_cpu.select(step)
            on_gpu.select(step)
            graph.replay()
            expected_x, expected_y = on_cpu.batch()
            torch.testing.assert_close(x.cpu(), expected_x)
            assert torch.equal(y.cpu(), expected_y)
