"""Costs against torch's own counter and against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from training.networks import create

from sppkit import cost, timing
from sppkit.compact import ColumnConv2d, compact

IMAGE = torch.zeros(1, 3, 32, 32)


@pytest.mark.parametrize("name", ["convnet", "resnet20", "resnet20-projection", "vgg16", "vgg16-bn"])
def test_macs_are_half_of_torchs_flops(name: str) -> None:
    network = create(name).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(IMAGE)
    by_operator = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    summary = cost.summary(network, IMAGE)
    assert 2 * summary["conv_macs"] == by_operator["aten.convolution"]
    assert 2 * summary["macs"] == counter.get_total_flops() > by_operator["aten.convolution"]


def test_a_table_by_hand_and_the_batch_does_not_count() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 4, (1, 3), groups=2),
        nn.Flatten(),
        nn.Linear(4 * 8 * 6, 5),
    )
    table = cost.layer_table(network, torch.zeros(3, 3, 16, 16))
    assert table.to_dict("list") == {
        "layer": ["0", "1", "3"],
        "kind": ["conv", "conv", "linear"],
        "macs": [8 * 27 * 64, 4 * 4 * 3 * 48, 192 * 5],
        "weights": [8 * 27, 4 * 4 * 3, 192 * 5],
        "groups": [27, 12, 192],
        "in_channels": [3, 8, 192],
        "out_channels": [8, 4, 5],
        "height": [8, 8, 1],
        "width": [8, 6, 1],
    }
    assert cost.conv_table(network, torch.zeros(3, 3, 16, 16))["layer"].tolist() == ["0", "1"]


def test_a_convolution_that_runs_twice_counts_twice() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    assert cost.summary(nn.Sequential(conv, conv), IMAGE)["conv_macs"] == 2 * 3 * 27 * 1024


def test_a_column_convolution_counts_its_kept_columns() -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    column = ColumnConv2d(conv, torch.tensor([0, 5, 35]))
    summary = cost.summary(column, torch.zeros(1, 4, 9, 11))
    assert summary == {
        "conv_macs": 6 * 3 * 5 * 6,
        "macs": 6 * 3 * 5 * 6,
        "parameters": 6 * 3 + 6,
        "bytes": 4 * (6 * 3 + 6) + 8 * 3,  # float32 parameters, int64 index
    }
    table = cost.conv_table(column, torch.zeros(1, 4, 9, 11))
    assert table.loc[0, ["groups", "in_channels", "out_channels"]].tolist() == [3, 4, 6]


def test_bytes_count_buffers() -> None:
    norm = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2))
    assert cost.summary(norm, IMAGE)["bytes"] == 4 * (6 + 4 * 2) + 8  # running mean and variance; batches seen


def test_flop_ratio_is_dense_over_compact() -> None:
    network = create("convnet")
    network.conv3.weight.data.flatten(2)[:, :, :5] = 0  # 5 of 25 taps of every channel
    small = compact(network)
    dense, pruned = 32 * 75 * 1024 + 32 * 800 * 256 + 64 * 800 * 64, 64 * 160 * 64
    assert cost.flop_ratio(network, small, IMAGE) == pytest.approx(dense / (dense - pruned), rel=1e-12)
    whole = [cost.summary(net, IMAGE)["macs"] for net in (network, small)]
    assert whole == [dense + 10240, dense + 10240 - pruned]
    assert cost.flop_ratio(network, network, IMAGE) == 1


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_mode_hooks_and_statistics_alone(training: bool) -> None:
    network = create("resnet20").train(training)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    cost.summary(network, torch.ones(1, 3, 32, 32))
    with pytest.raises(ValueError, match="cannot run on images"):
        cost.summary(network, torch.ones(1, 4, 32, 32))
    assert network.training is training
    assert all(module.training is training for module in network.modules())
    assert not any(module._forward_hooks for module in network.modules())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_measure_gives_a_row_a_network_and_tells_large_from_small() -> None:
    small, large = nn.Conv2d(3, 1, 1), nn.Sequential(nn.Conv2d(3, 64, 5), nn.Conv2d(64, 64, 5))
    calls: list[str] = []
    small.register_forward_hook(lambda *_: calls.append("small"))
    large.register_forward_hook(lambda *_: calls.append("large"))
    table = timing.measure({"small": small, "large": large}, torch.zeros(2, 3, 32, 32), rounds=5)
    assert table.index.tolist() == ["small", "large"]
    assert table.columns.tolist() == ["median_ms", "iqr_ms", "batch", "rounds", "threads", "device"]
    turns = [tuple(calls[k : k + 2]) for k in range(0, len(calls), 2)]
    assert len(turns) == 8  # three of them to warm up
    assert set(turns) == {("small", "large"), ("large", "small")}  # who comes first is drawn
    assert 0 < table.loc["small", "median_ms"] * 5 < table.loc["large", "median_ms"]
    assert (table["iqr_ms"] >= 0).all()
    assert table.loc["small", ["batch", "rounds", "threads", "device"]].tolist() == [2, 5, 1, "cpu"]
