"""Studies of one layer against explicit patches and against the pruning of the whole network."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import channels
import choice
import numpy as np
import pytest
import single
import torch
from driver import Limits, baseline, run
from settings import Experiment, Places
from single_layer import sample_layer
from training import OutOfTime, evaluate, networks
from training.data import ImageData, load
from variants import gone

from sppkit import cp
from sppkit.compact import convolutions
from sppkit.graph import fold

SMALL = Experiment(
    "small", method="layer", layer="conv3", batch_size=16, baseline_steps=30, baseline_milestones=(), images=60,
    points=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> ImageData:
    whole = load("digits")
    return replace(whole, test=replace(whole.test, images=whole.test.images[:60], labels=whole.test.labels[:60]))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return Places(tmp_path_factory.mktemp("root"), revision="test")


def test_a_row_is_what_pruning_that_layer_alone_gives(
    digits: ImageData, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single, "RATIOS", (4 / 3, 2))
    record, (network, base) = run(SMALL, digits, places), baseline(SMALL, digits, places)
    assert record["baseline_id"] == base["baseline_id"]
    assert record["acc_baseline"] == base["acc_final"]
    assert len(record["rows"]) == 2 * (len(choice.CHOICES) - 1)
    images = channels.training_images(digits, SMALL, spare=60)
    for row in record["rows"]:
        if row["select"] in ("lasso", "max_response", "thinet") and row["ratio"] == 2:
            assert row["kept"] == 16
            masked, table = cp.mask_channels(
                network, images, keep={"conv3": 16}, select=partial(choice.choose, row["select"]), points=5
            )
            for column in ("error_before", "error"):
                assert row[column] == pytest.approx(float(table[column].iloc[0]), rel=1e-6)
            assert row["acc_refitted"] == pytest.approx(evaluate(masked, digits, SMALL.phase("retrain")), abs=2)
            kept = [i for i in range(32) if i not in channels.gone(convolutions(masked)["conv3"])]
            bare = channels.without(network, {"conv3": channels.gone(convolutions(masked)["conv3"])})
            assert row["acc_before_refit"] == pytest.approx(evaluate(bare, digits, SMALL.phase("retrain")), abs=2)
            last = channels.prepared(digits, SMALL, digits.train.images[-60:])
            X, Y = (t.double() for t in sample_layer(network, "conv3", last, points=5))
            conv = convolutions(masked)["conv3"]
            rest = Y - X @ conv.weight.detach().double().flatten(1).T - conv.bias.detach().double()  # type: ignore[union-attr]
            explicit = float(rest.square().sum() / (Y - Y.mean(0)).square().sum())
            assert row["error_held_out"] == pytest.approx(explicit, rel=1e-4)
            assert len(kept) == 16


def test_held_out_images_are_in_no_sample(digits: ImageData) -> None:
    numbered = digits.train.images.clone()
    numbered[:, 0, 0, 0] = torch.arange(len(numbered)) // 256
    numbered[:, 0, 0, 1] = torch.arange(len(numbered)) % 256
    data = ImageData("digits", replace(digits.train, images=numbered), digits.test, digits.classes)
    plan = replace(SMALL, images=500)
    found, ends = (
        channels.training_images(data, plan, seed=7, spare=500),
        channels.prepared(data, plan, numbered[-500:]),
    )
    assert len(found) == len(ends) == 500
    assert not {*map(tuple, found[:, :2, 0, 0].tolist())} & {*map(tuple, ends[:, :2, 0, 0].tolist())}


def test_draws_differ_in_their_samples_alone(
    digits: ImageData, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single, "DRAWS", 3)
    plan = replace(SMALL, method="draws", flop_ratio=2)
    network = fold(networks.create("convnet", seed=3))[0]
    first, again = (single.draws(network, digits, plan) for _ in range(2))
    for row, other in zip(first["rows"], again["rows"], strict=True):
        assert {k: v for k, v in row.items() if "seconds" not in k} == {
            k: v for k, v in other.items() if "seconds" not in k
        }
    lasso, paper = ([row for row in first["rows"] if row["select"] == name] for name in ("lasso", "paper"))
    assert [row["kept"] for row in lasso] == [16] * 3
    assert all(16 <= row["kept"] <= 17 for row in paper)
    assert len({row["error"] for row in lasso}) == 3
    sets = [{*np.flatnonzero(gone(row["channels"], 32)).tolist()} for row in paper]
    assert [len(each) for each in sets] == [row["kept"] for row in paper]
    assert first["overlap"]["paper"] == pytest.approx(single.overlap(sets))
    assert 0 < first["overlap"]["paper"] <= 1
    assert run(plan, digits, places)["rows"][0].keys() == lasso[0].keys()


def test_no_study_is_begun_after_the_deadline(digits: ImageData, places: Places) -> None:
    plan = replace(SMALL, method="draws", flop_ratio=3)
    baseline(plan, digits, places)
    with pytest.raises(OutOfTime, match=f"{plan.run_id} draws was not begun"):
        run(plan, digits, places, limits=Limits(time.monotonic()))


def test_layers_that_a_study_is_not_about_are_refused(digits: ImageData) -> None:
    with pytest.raises(ValueError, match="layer='conv1' must be one that a single convolution feeds: conv2, conv3"):
        single.draws(networks.create("convnet"), digits, replace(SMALL, method="draws", layer="conv1"))
    with pytest.raises(ValueError, match="layer and draws need a layer"):
        replace(SMALL, layer="")
    with pytest.raises(ValueError, match="layer='conv2' with method='cp'"):
        replace(SMALL, method="cp", layer="conv2")
