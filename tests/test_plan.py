"""Plans: how much of each layer goes, solved for a FLOP ratio."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sensitivity
import torch
from torch import nn
from training import networks

from sppkit.compact import compact
from sppkit.cost import flop_ratio
from sppkit.groups import KINDS
from sppkit.plan import make_plan
from sppkit.pruner import Pruner

EXAMPLE = torch.zeros(1, 3, 32, 32)


@pytest.mark.parametrize("ratio", [1.3, 2.0, 4.0, 7.7])
@pytest.mark.parametrize("name", ["convnet", "resnet56", "vgg16-bn"])
def test_a_flop_ratio_is_hit_as_nearly_as_one_group_allows(name: str, ratio: float) -> None:
    plan = make_plan(networks.create(name), EXAMPLE, flop_ratio=ratio)
    assert plan.reached == pytest.approx(ratio, rel=2e-3)
    assert plan.flop_ratio == ratio
    table = plan.table()
    assert table["macs"].sum() / table["macs_left"].sum() == pytest.approx(plan.reached)
    shares = table["kept"] / table["groups"]
    assert shares.max() - shares.min() < 1 / table["groups"].min() + 1e-9  # one ratio in all layers


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_plan(kind: str) -> None:
    plan = make_plan(networks.create("vgg16-bn"), EXAMPLE, flop_ratio=3, kind=kind)
    assert plan.reached == pytest.approx(3, rel=1e-2)
    assert f"{kind}s: FLOP ratio" in str(plan)


def test_the_rule_for_vgg_is_the_papers() -> None:
    network = networks.create("torchvision/vgg16", classes=10)
    layers = [name for name, m in network.named_modules() if isinstance(m, nn.Conv2d)][1:]  # conv1_1 stays
    example = torch.zeros(1, 3, 224, 224)
    for ratio, low in ((2, 0.400), (4, 0.198), (5, 0.157)):  # papers' rule, kept fractions as derived for it
        table = make_plan(network, example, flop_ratio=ratio, layers=layers, rule="tiers").table().set_index("layer")
        kept = 1 - table["ratio"]
        assert kept[layers[:6]].tolist() == pytest.approx([low] * 6, abs=2e-3)
        assert kept[layers[6:9]].tolist() == pytest.approx([1.5 * low] * 3, abs=2e-3)
        assert kept[layers[9:]].tolist() == pytest.approx([2 * low] * 3, abs=2e-3)
        assert table["pruned"][[*set(table.index) - {*layers}]].tolist() == [0]


def test_ratios_are_exact_ceilings() -> None:
    network = networks.create("convnet")
    assert make_plan(network, EXAMPLE, ratio=0.28).targets == {"conv1": 21, "conv2": 224, "conv3": 224}
    assert make_plan(network, EXAMPLE, ratio={"conv2": 0.5}).targets == {"conv2": 400}


def test_channels_are_planned_with_the_filters_that_go_with_them() -> None:
    network = networks.create("convnet")
    plan = make_plan(network, EXAMPLE, flop_ratio=4, kind="channel")
    gone = np.concatenate([np.arange(size) < plan.targets[name] for name, size in plan.groups.sizes.items()])
    assert plan.reached == plan.groups.flop_ratio(gone) == pytest.approx(4, rel=0.05)
    assert make_plan(network, EXAMPLE, flop_ratio=20, kind="channel").reached > 18
    pruner = Pruner(network, plan, method="oneshot")
    pruner.update()
    assert flop_ratio(networks.create("convnet"), compact(network), EXAMPLE) == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize(("kind", "ratio"), [("block8", 2), ("block16", 2), ("block16", 3)])
def test_blocks_that_do_not_divide_the_channels_reach_the_ratio(kind: str, ratio: float) -> None:
    network = nn.Sequential(nn.Conv2d(20, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1))
    x = torch.zeros(1, 20, 9, 9)
    plan = make_plan(network, x, flop_ratio=ratio, kind=kind, layers=["0"])
    for seed in range(5):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            copy = nn.Sequential(nn.Conv2d(20, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1))
        pruner = Pruner(copy, make_plan(copy, x, flop_ratio=ratio, kind=kind, layers=["0"]), method="oneshot")
        pruner.update()
        block = int(kind[5:])
        one = network[0].weight[:, 0, 0, 0].numel() * block * 49  # MACs of one whole block
        dense = sum(plan.groups.macs.values())
        left = dense / flop_ratio(network, compact(copy), x)
        assert abs(left - dense / ratio) <= one


def test_a_plan_prunes_at_least_one_group() -> None:
    assert sum(make_plan(networks.create("convnet"), EXAMPLE, flop_ratio=1.00001).targets.values()) == 1


def test_weights_of_a_rule_are_kept_fractions() -> None:
    rule = {"conv1": 3.0, "conv2": 1.0, "conv3": 2.0}
    table = make_plan(networks.create("convnet"), EXAMPLE, flop_ratio=4, rule=rule).table().set_index("layer")
    kept = 1 - table["ratio"]
    assert kept["conv3"] / kept["conv2"] == pytest.approx(2, rel=0.02)
    assert kept["conv1"] / kept["conv2"] == pytest.approx(3, rel=0.05)


def test_sensitivity_counts_the_components_that_hold_the_energy() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1))
    network[0].weight.data[:] = network[0].weight.data[:1]  # one direction: one component of eight
    images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    found = sensitivity.pca(network, images, energy=0.99)
    assert found["0"] == pytest.approx(1 / 8)
    outputs = network(images).transpose(0, 1).flatten(1).double()
    share = torch.linalg.svdvals(outputs - outputs.mean(1, keepdim=True)).square()
    enough = int((share.cumsum(0) / share.sum() < 0.99).sum()) + 1
    assert found["2"] == enough / 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flop_ratio": 1.0}, "flop_ratio=1.0 must be above 1"),
        ({"flop_ratio": 0.5}, "flop_ratio=0.5 must be above 1"),
        ({"flop_ratio": -2}, "flop_ratio=-2 must be above 1"),
        ({"flop_ratio": math.nan}, "flop_ratio=nan must be above 1"),
        ({"flop_ratio": 1000}, r"flop_ratio=1000 is out of reach: all that can go gives \d+\.\d\d"),
        ({"ratio": 0}, r"ratio=0 must lie in \(0, 1\)"),
        ({"ratio": 1}, r"ratio=1 must lie in \(0, 1\)"),
        ({"ratio": 1.4}, r"ratio=1.4 must lie in \(0, 1\)"),
        ({"ratio": -0.1}, r"ratio=-0.1 must lie in \(0, 1\)"),
        ({"ratio": 0.999}, "layer 'conv1': ratio=0.999 of 75 groups would leave none; lower it or skip the layer"),
        ({"ratio": {"conv2": 1.4}}, r"layer 'conv2': ratio=1.4 must lie in \(0, 1\)"),
        ({"flop_ratio": 0}, "flop_ratio=0 must be above 1"),
        ({"flop_ratio": math.inf}, "flop_ratio=inf must be above 1"),
        ({"ratio": {"fc": 0.5}}, "layer 'fc' is not a convolution"),
        ({}, "give one of flop_ratio=None and ratio=None"),
        ({"ratio": 0.5, "flop_ratio": 2}, "give one of"),
        ({"flop_ratio": 2, "rule": "best"}, "rule='best' must be one of uniform, tiers"),
        ({"flop_ratio": 2, "rule": {"conv1": 1.0}}, "rule gives no positive weight for layer 'conv2'"),
    ],
)
def test_bad_plans_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(networks.create("convnet"), EXAMPLE, **options)
    with pytest.raises(ValueError, match=r"energy=1 must lie in \(0, 1\)"):
        sensitivity.pca(networks.create("convnet"), EXAMPLE, energy=1)
