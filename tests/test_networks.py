"""The networks against the papers' tables, and their parts against plain formulas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from training import networks
from training.networks import WithinChannelLRN, create

from sppkit.compact import convolutions
from sppkit.cost import conv_table

# Convolution MACs, the rounding of that figure, and weights of the dense networks at 32 pixels.
COUNTS = {
    "convnet": (12.29e6, 0.005e6, 79_200),
    "resnet20": (40.550e6, 0.5e3, 267_696),
    "resnet20-projection": (40.813e6, 0.5e3, 270_256),
    "resnet56": (125.485e6, 0.5e3, 848_304),
    "resnet56-projection": (125.747e6, 0.5e3, 850_864),
    "vgg16": (313.20e6, 5e3, 14_710_464),
    "vgg16-bn": (313.20e6, 5e3, 14_710_464),
}


@pytest.mark.parametrize("name", COUNTS)
def test_convolutions_count_what_the_table_says(name: str) -> None:
    macs, tolerance, weights = COUNTS[name]
    table = conv_table(create(name), torch.zeros(1, 3, 32, 32))
    assert table["macs"].sum() == pytest.approx(macs, abs=tolerance)
    assert table["weights"].sum() == weights


def on_meta(name: str, size: int) -> tuple[nn.Module, torch.Tensor]:
    """Shapes alone: the large networks need neither memory nor time."""
    with torch.device("meta"):
        return networks.NETWORKS[name](1000), torch.zeros(1, 3, size, size)


@pytest.mark.parametrize(
    ("name", "macs", "tolerance"),
    [
        ("torchvision/alexnet", 655.6e6, 0.05e6),
        ("torchvision/vgg16", 15.347e9, 0.5e6),
        ("torchvision/resnet50", 4.087e9, 0.5e6),
    ],
)
def test_torchvisions_networks_count_what_the_table_says(name: str, macs: float, tolerance: float) -> None:
    table = conv_table(*on_meta(name, 224))
    assert table["macs"].sum() == pytest.approx(macs, abs=tolerance)
    if name == "torchvision/alexnet":
        assert table["groups"].tolist() == [363, 1600, 1728, 3456, 2304]
    if name == "torchvision/vgg16":
        assert table["weights"].sum() == 14_710_464


def test_the_convnet_has_the_papers_columns_and_its_pooling_rounds_up() -> None:
    network = create("convnet")
    table = conv_table(network, torch.zeros(1, 3, 32, 32))
    assert table["groups"].tolist() == [75, 800, 800]
    assert table["height"].tolist() == table["width"].tolist() == [32, 16, 8]
    sizes = []
    for pool in (network.pool1, network.pool2, network.pool3):
        pool.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(32, 16, 16), (32, 8, 8), (64, 4, 4)]


def test_the_convnets_initial_weights_and_factors_are_the_prototxts() -> None:
    network = create("convnet", seed=3)
    for layer, deviation in (
        (network.conv1, 1e-4),
        (network.conv2, 0.01),
        (network.conv3, 0.01),
        (network.linear, 0.01),
    ):
        assert float(layer.weight.detach().std()) == pytest.approx(deviation, rel=0.06)
        assert not layer.bias.detach().any()
    names = dict(network.named_parameters())
    factors = {name: network.multipliers.get(name, (1, 1)) for name in names}
    assert factors == {
        "conv1.weight": (1, 1),
        "conv1.bias": (2, 1),
        "conv2.weight": (1, 1),
        "conv2.bias": (2, 1),
        "conv3.weight": (1, 1),
        "conv3.bias": (1, 1),
        "linear.weight": (1, 250),
        "linear.bias": (2, 0),
    }


def test_response_normalisation_is_the_formula() -> None:
    x = np.random.default_rng(0).normal(0, 100, (2, 3, 6, 5))
    padded = np.pad(x**2, ((0, 0), (0, 0), (1, 1), (1, 1)))
    expected = np.empty_like(x)
    for row in range(x.shape[2]):
        for col in range(x.shape[3]):
            mean = padded[:, :, row : row + 3, col : col + 3].sum((2, 3)) / 9  # the padding counts
            expected[:, :, row, col] = x[:, :, row, col] * (1 + 5e-5 * mean) ** -0.75
    np.testing.assert_allclose(WithinChannelLRN()(torch.from_numpy(x)).numpy(), expected, rtol=1e-12)
    assert np.abs(expected / x - 1).max() > 0.1  # at this scale the normalisation is felt


def test_option_a_takes_every_second_pixel_and_pads_with_zero_channels() -> None:
    x = torch.randn(2, 16, 7, 8, generator=torch.Generator().manual_seed(0))
    y = networks.PaddedShortcut(16)(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, [0, 2, 4, 6]][:, :, :, [0, 2, 4, 6]])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


@pytest.mark.parametrize("shortcut", ["A", "projection"])
def test_both_shortcuts_have_the_same_shapes(shortcut: str) -> None:
    network = create("resnet20" + ("" if shortcut == "A" else "-projection"), classes=7)
    shapes = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    assert shapes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3
    projections = [name for name in convolutions(network) if "shortcut" in name]
    assert projections == ([] if shortcut == "A" else ["blocks.3.shortcut.0", "blocks.6.shortcut.0"])


def test_a_block_adds_its_shortcut_before_the_last_relu() -> None:
    block = create("resnet20").blocks[1].eval()
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(block.conv2.weight)
    nn.init.constant_(block.bn2.bias, 0.25)
    assert torch.allclose(block(x), (x + 0.25).clamp(min=0))


def test_batch_norm_follows_each_convolution() -> None:
    kinds = [type(module) for module in create("vgg16-bn").features]
    follow = [after for before, after in itertools.pairwise(kinds) if before is nn.Conv2d]
    assert follow == [nn.BatchNorm2d] * 13
    assert nn.BatchNorm2d not in [type(module) for module in create("vgg16").features]


def test_vgg_is_torchvisions() -> None:
    from torchvision.models.vgg import cfgs, make_layers

    for batch_norm in (True, False):
        torch.manual_seed(0)
        ours = networks.vgg_features(networks.VGG16, batch_norm=batch_norm)
        torch.manual_seed(0)
        theirs = make_layers(cfgs["D"], batch_norm=batch_norm)
        assert repr(ours) == repr(theirs)
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor), name


def test_weights_come_from_the_seed_alone_and_global_state_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(5)
    seeded.clear()
    state = torch.get_rng_state()
    one = create("resnet20", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert seeded == []  # the GPU's generators are global state too
    torch.rand(3)
    same, other = create("resnet20", seed=1), create("resnet20", seed=2)
    pairs = zip(one.parameters(), same.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.conv1.weight, other.conv1.weight)


def test_weights_are_channels_last() -> None:
    assert create("convnet").conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_wrong_names_and_depths_say_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"network 'resnet21' is not known; choose one of convnet, .*resnet50"):
        create("resnet21")
    for depth in (2, 21):
        with pytest.raises(ValueError, match=rf"depth={depth} must be 6n \+ 2"):
            networks.resnet(depth)
    with pytest.raises(ValueError, match="shortcut='B' must be 'A' or 'projection'"):
        networks.resnet(20, shortcut="B")
