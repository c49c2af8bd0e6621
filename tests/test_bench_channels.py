"""The benchmark of channel pruning: its network is VGG-16, its rival the authors' recipe, its record complete."""

from __future__ import annotations

import json
from pathlib import Path

import bench_channels as bench
import choice
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from single_layer import sample_layer
from torch import nn

from sppkit.__main__ import main
from sppkit.reconstruct import Moments
from sppkit.samples import convolution


def test_a_quick_run_measures_and_records_everything(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "channels", "--quick", "--device", "cpu", "--revision", "r1", "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    (line,) = (tmp_path / "build" / "bench-channels.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["revision"], record["torch"], record["sizes"]["shrink"]) == ("r1", torch.__version__, 8)
    assert "CPU" in record["device"]
    layers, runs, solvers = (pd.DataFrame(record[name]) for name in ("layers", "runs", "solvers"))
    assert [*layers["layer"]] == [
        "conv1_2", "conv2_1", "conv2_2", "conv3_1", "conv3_2", "conv3_3", "conv4_1", "conv4_2", "conv4_3", "conv5_1",
        "conv5_2", "conv5_3",
    ]  # fmt: skip
    for column in ("extraction_s", "moments_s", "path_s", "refit_s"):
        assert (layers[column] > 0).all()
        assert column in out
    assert (layers["kept"] * 2 == layers["c"]).all()
    assert (layers["patches"] == 8 * 16).all()
    assert record["peak_gb"] > 0
    assert [*solvers["solver"]] == ["scikit-learn", "sppkit"]
    assert [*solvers["n"]] == [bench.REPEATS] * 2
    assert runs["kept"].nunique() == 1, "both keep the same width"
    assert 8 <= runs["kept"][0] <= 8.8
    assert runs["held_out"][0] * 4 == runs["patches"][0]
    assert runs["error_ratio"].iloc[-1] == runs["error_held_out"].iloc[-1] / runs["error_held_out"][0] <= 1.05
    seconds = runs.groupby("solver")["total_s"].median()
    assert solvers["times"][1] == pytest.approx(seconds["scikit-learn"] / seconds["sppkit"])
    assert (solvers["times_bare"] >= solvers["times"]).all()
    assert record["network"]["flop_ratio"] == pytest.approx(2, rel=0.05)
    assert "goals" not in record


def test_the_network_is_torchvisions() -> None:
    with torch.device("meta"):
        known = torchvision.models.vgg16()
    ours, theirs = ([m for m in net.modules() if not [*m.children()]] for net in (bench.vgg16(), known.features))
    assert [*map(type, ours)] == [*map(type, theirs)]
    convolutions = [m for m in ours if isinstance(m, nn.Conv2d)]
    shapes = [m.weight.shape for m in theirs if isinstance(m, nn.Conv2d)]
    assert [m.weight.shape for m in convolutions] == shapes
    for m in convolutions[1:]:
        assert float(m.weight.detach().std()) == pytest.approx((2 / (9 * m.out_channels)) ** 0.5, rel=0.02)


def test_the_recipe_is_the_choice_of_the_package_and_least_squares() -> None:
    network = bench.vgg16(shrink=8, seed=3)
    X, Y = sample_layer(network, "conv3_1", bench.random_images(60, 64, seed=3), points=50)
    conv = convolution(network, "conv3_1")
    with torch.no_grad():
        conv.bias += 0.3  # type: ignore[operator]
        Y += 0.3
    found = bench.authors_recipe(X.numpy(), Y.numpy(), conv, 6, seed=5)
    few = np.random.default_rng(5).permutation(len(X))[: len(X) // 20]
    moments = Moments().add(X, Y)
    kept, *_ = choice.choose("paper", moments, conv, 6, few=Moments().add(X[few], Y[few]))
    assert found.kept.tolist() == kept.tolist()
    columns = (kept[:, None] * 9 + torch.arange(9)).flatten()
    known = torch.cat([X[:, columns], torch.ones(len(X), 1)], 1).double()
    solution = torch.linalg.lstsq(known, Y.double()).solution
    torch.testing.assert_close(found.weight.flatten(1).T.double(), solution[:-1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.bias.double(), solution[-1], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="no alpha leaves keep=17 "):  # of 16
        bench.authors_recipe(X.numpy(), Y.numpy(), conv, 17, seed=5)


@pytest.mark.parametrize(("seconds", "times", "met"), [(30.0, 6.0, True), (90.0, 4.0, False)])
def test_goals_are_met_or_missed(seconds: float, times: float, met: bool) -> None:
    layers = pd.DataFrame({"moments_s": [seconds] * 3, "path_s": 0.0, "refit_s": 1.0})
    where = {"solver": ["scikit-learn", "sppkit"], "where": "CPU"}
    solvers = pd.DataFrame(
        {**where, "times": [1.0, times], "times_bare": [1.0, 2 * times], "error_ratio": [1.0, 5.0 / times]}
    )
    found = bench.goals(layers, solvers, {"network": "n", "seconds": seconds}, torch.device("cpu"))
    assert [*found["measured"]] == [3 * seconds + 3, times, 2 * times, 5 / times, seconds]
    assert [*found["met"]] == [met, met, True, met, met]
