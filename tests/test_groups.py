"""Weight groups: one description for importance, masks, FLOPs; the compact network is the oracle of the MACs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import networks

from sppkit.compact import compact
from sppkit.cost import flop_ratio
from sppkit.groups import KINDS, Groups
from sppkit.plan import Plan, make_plan
from sppkit.pruner import Pruner


class Odd(nn.Module):
    """Strides, dilation, a 1x1, a kernel that is no square, a sum, and two linear layers after flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 16, (3, 5), stride=2, padding=(1, 2))
        self.two = nn.Conv2d(16, 8, 3, dilation=2, padding=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.three = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 12, 3, padding=1)
        self.pool, self.linear, self.out = nn.AdaptiveAvgPool2d(2), nn.Linear(48, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.two(F.relu(self.one(x)))))
        y = self.last(F.relu(y + self.three(y)))
        return self.out(F.relu(self.linear(torch.flatten(self.pool(y), 1))))


def network(name: str) -> tuple[nn.Module, Tensor]:
    if name == "odd":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Odd(), torch.randn(3, 3, 12, 10)
    return networks.create(name), torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def drawn(groups: Groups, share: float, seed: int) -> np.ndarray:
    """Random groups, but never all of a layer."""
    gone = np.random.default_rng(seed).random(groups.count) < share
    for part in groups.slices.values():
        gone[part.start] = False
    return gone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["odd", "convnet", "resnet20-projection", "vgg16-bn"])
def test_the_compact_network_costs_what_the_groups_say(name: str, kind: str) -> None:
    for number, share in enumerate((0.8,) if name == "vgg16-bn" else (0.3, 0.9)):
        net, x = network(name)
        pruner = Pruner(net, make_plan(net, x, ratio=0.5, kind=kind))
        gone = drawn(pruner.groups, share, number)
        pruner.remove(gone, last=True)
        small = compact(net, x)  # checks that both compute the same
        assert flop_ratio(net, small, x) == pytest.approx(pruner.groups.flop_ratio(gone), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_in_one_group_and_its_importance_is_the_l1_norm(kind: str) -> None:
    net, x = network("odd")
    groups = Groups(net, x, kind=kind)
    sizes = {
        "column": {"one": 45, "two": 144, "three": 8, "last": 72},
        "block8": {"one": 15, "two": 18, "last": 9},  # `three` would be one group
        "block16": {"one": 15, "two": 9, "last": 9},
        "block32": {"one": 15, "two": 9, "last": 9},
        "channel": {"one": 3, "two": 16, "three": 8, "last": 8},
        "filter": {"one": 16, "last": 12},  # two and three feed a sum
    }
    assert groups.sizes == sizes[kind]
    pruner = Pruner(net, make_plan(net, x, ratio=0.5, kind=kind))
    importance = pruner.importance()
    for name, part in groups.slices.items():
        weight = net.get_submodule(name).weight.detach()
        by_hand = []
        for group in range(part.start, part.stop):
            rows, columns = groups.rows[name] == group, groups.columns[name] == group
            of_row = weight[torch.from_numpy(rows)].abs().sum() if kind == "filter" else 0.0
            of_column = weight.flatten(2)[:, torch.from_numpy(columns)].abs().sum() if kind != "filter" else 0.0
            by_hand.append(float(of_row + of_column))
        np.testing.assert_allclose(importance[part].numpy(), by_hand, rtol=1e-5)
        np.testing.assert_allclose(sum(by_hand), float(weight.abs().sum()), rtol=1e-5)


def test_a_block_is_neighbouring_channels_of_one_tap() -> None:
    groups = Groups(*network("odd"), kind="block8", layers=["two"])
    for block in range(2):
        for tap in range(9):
            assert (groups.columns["two"][8 * block : 8 * block + 8, tap] == 9 * block + tap).all()


def test_a_pruned_filter_takes_what_reads_it() -> None:
    net, x = network("odd")
    pruner = Pruner(net, Plan(Groups(net, x, kind="filter", layers=["last"]), {"last": 6}))
    pruner.remove(np.arange(12) < 6, last=True)
    assert not net.last.weight[:6].any()
    assert not net.linear.weight[:, : 6 * 4].any()
    assert net.linear.weight[:, 6 * 4 :].ne(0).all()
    small = compact(net, x)
    assert small.last.out_channels == 6
    assert small.linear.in_features == 24


@pytest.mark.parametrize(
    ("layers", "kind", "message"),
    [
        (["four"], "column", "layer 'four' is not a convolution; only convolutions are pruned, of this network one"),
        (["linear"], "column", "layer 'linear' is not a convolution"),
        (["two"], "filter", "layer 'two' feeds a sum, a concatenation or the output"),
        (["three"], "block8", "layer 'three' has a single group, which cannot go"),
        (None, "row", "kind='row' must be one of column, block8"),
    ],
)
def test_what_cannot_be_pruned_is_named(layers: list[str] | None, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Groups(*network("odd"), kind=kind, layers=layers)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), "Sequential has no convolutions"),
        (nn.Sequential(nn.Conv2d(3, 6, 1, groups=3)), "no convolution with two or more groups"),
        (nn.Sequential(nn.Conv2d(3, 3, 1), shared := nn.Conv2d(3, 3, 1), shared), "is called twice"),
    ],
)
def test_networks_that_cannot_be_pruned_are_refused(net: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Groups(net, torch.zeros(1, 3, 2, 2))


def test_a_depthwise_layer_is_left_alone_or_refused_by_name() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6, padding=1), nn.Conv2d(6, 4, 1))
    assert [*Groups(net, torch.zeros(1, 3, 4, 4)).layers] == ["0", "2"]
    with pytest.raises(ValueError, match="layer '1' has groups=6, whose columns cannot be removed"):
        Groups(net, torch.zeros(1, 3, 4, 4), layers=["1"])


def test_a_weight_in_two_layers_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    network[2].weight = network[0].weight
    with pytest.raises(
        ValueError, match="layer '2' has the weight of another; give each convolution a weight of its own"
    ):
        Groups(network, torch.zeros(1, 4, 9, 9))
