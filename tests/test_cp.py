"""Channel Pruning of whole networks: sampling, widths, the layer-by-layer loop and what must be refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sppkit import compact, cost, cp, lasso, networks, reconstruct


class Chain(nn.Module):
    """conv1 -> BatchNorm -> ReLU -> conv2 (stride 2, dilated) -> ReLU -> conv3, without and with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2, bias=False)
        self.conv3 = nn.Conv2d(12, 6, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv2(self.relu(self.norm(self.conv1(x)))))
        return self.conv3(x).mean((2, 3))


@pytest.fixture
def chain() -> nn.Module:
    torch.manual_seed(0)
    network = Chain()
    network(torch.randn(32, 3, 12, 12))  # gives the BatchNorm its statistics
    return network


@pytest.fixture
def images() -> Tensor:
    return torch.randn(40, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3},
        {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ],
)
def test_patches_times_weight_are_the_outputs(settings: dict) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 5, **settings).double()
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        output = conv(x)
        positions = torch.stack([torch.randperm(output[0, 0].numel())[:7] for _ in range(3)])
        X = cp.sample_patches(x, conv, positions)
        expected = torch.cat([output[b].flatten(1)[:, positions[b]].T for b in range(3)])  # (3 * 7, 5)
        torch.testing.assert_close(X @ conv.weight.flatten(1).T + conv.bias, expected)


@pytest.mark.parametrize("ratio", [1.05, 2.0, 4.0])
@pytest.mark.parametrize("name", ["convnet", "vgg16"])
def test_widths_reach_the_ratio_of_the_compact_network_by_one_channel(name: str, ratio: float) -> None:
    network, example = networks.create(name), torch.zeros(1, 3, 32, 32)
    keep = cp.widths(network, example, ratio)

    def reached(widths: dict[str, int]) -> float:
        masked = copy.deepcopy(network)
        for layer, width in widths.items():
            masked.get_submodule(layer).weight.data[:, width:] = 0
        return cost.flop_ratio(network, compact.compact(masked), example)

    assert set(keep) == set(compact.channel_links(network))
    full = {layer: network.get_submodule(layer).in_channels for layer in keep}
    assert reached(keep) == pytest.approx(ratio, rel=0.03)
    fractions = [keep[layer] / full[layer] for layer in keep]
    assert max(fractions) - min(fractions) <= 1 / min(full.values())  # one fraction, to within a channel
    ratios = [reached(keep | {name: min(max(keep[name] + step, 1), full[name])}) for name in keep for step in (-1, 1)]
    assert min(ratios) <= ratio <= max(ratios)  # one channel more or less is beyond it


def test_pruned_network_has_the_widths_and_mends_the_output(chain: nn.Module, images: Tensor) -> None:
    before = copy.deepcopy(chain.state_dict())
    pruned, table = cp.channel_prune(chain, images, keep={"conv2": 5, "conv3": 7}, points=100)
    assert table["layer"].tolist() == ["conv2", "conv3"]
    assert table["kept"].tolist() == [5, 7]
    for layer, width in (("conv2", 5), ("conv3", 7)):
        assert int(pruned.get_submodule(layer).weight.ne(0).any(3).any(2).any(0).sum()) == width
    assert (table["error"] < table["error_before"]).all()
    assert (table["violation"] < 1e-8).all()
    assert pruned.training
    assert pruned.conv2.bias is not None
    for key, value in chain.state_dict().items():
        assert torch.equal(value, before[key])
    small = compact.compact(pruned.eval(), images)
    assert small.conv1.out_channels == 5
    assert small.conv2.weight.shape == (7, 5, 3, 3)


def test_errors_are_those_of_the_whole_feature_map(chain: nn.Module, images: Tensor) -> None:
    """All positions sampled: the table's errors follow from running both networks."""
    pruned, table = cp.channel_prune(chain.eval(), images, keep={"conv2": 5, "conv3": 7}, points=10_000)
    maps: dict[str, Tensor] = {}
    for which, network in (("dense", chain), ("pruned", pruned)):
        for layer in ("conv2", "conv3"):
            network.get_submodule(layer).register_forward_hook(
                lambda m, args, out, key=which + layer: maps.__setitem__(key, out.detach().clone())
            )
        with torch.no_grad():
            network(images)
    for layer, found in zip(table["layer"], table["error"], strict=True):
        Y, output = (maps[which + layer].transpose(0, 1).flatten(1) for which in ("dense", "pruned"))  # (n, N)
        expected = (Y - output).square().sum() / (Y - Y.mean(1, keepdim=True)).square().sum()
        assert found == pytest.approx(float(expected), rel=1e-4)


def test_keeping_everything_leaves_the_function_unchanged(chain: nn.Module, images: Tensor) -> None:
    pruned, table = cp.channel_prune(chain.eval(), images, keep={"conv2": 8, "conv3": 12}, points=100)
    assert (table["error"] < 1e-9).all()
    with torch.no_grad():
        torch.testing.assert_close(pruned(images), chain(images), rtol=1e-4, atol=1e-5)


def test_second_layer_sees_the_pruned_network(chain: nn.Module, images: Tensor) -> None:
    """With all its channels conv3 is exact, unless conv2 before it lost some."""
    _, alone = cp.channel_prune(chain, images, keep={"conv3": 12}, points=100)
    _, after = cp.channel_prune(chain, images, keep={"conv2": 3, "conv3": 12}, points=100)
    assert alone["error"].iloc[0] < 1e-9
    assert after["error"].iloc[1] > 1e-3


def test_refit_and_lasso_beat_the_first_channels(chain: nn.Module, images: Tensor) -> None:
    pruned, _ = cp.channel_prune(chain.eval(), images, keep={"conv2": 5}, points=100)
    first = copy.deepcopy(chain)
    first.conv2.weight.data[:, 5:] = 0
    with torch.no_grad():
        ours, theirs = (F.mse_loss(network(images), chain(images)) for network in (pruned, first))
    assert ours < 0.5 * theirs


@pytest.mark.parametrize("layer", ["conv1", "conv2", "conv3"])
def test_sampled_patches_explain_the_sampled_outputs(chain: nn.Module, images: Tensor, layer: str) -> None:
    X, Y = cp.sample_layer(chain, layer, images, points=4, seed=3, batch_size=16)
    conv = chain.get_submodule(layer)
    assert X.shape == (40 * 4, conv.weight[0].numel())
    expected = X @ conv.weight.flatten(1).T + (0 if conv.bias is None else conv.bias)
    torch.testing.assert_close(Y, expected, rtol=1e-4, atol=1e-5)
    assert chain.training


def test_samples_of_a_layer_are_those_it_was_pruned_with(chain: nn.Module, images: Tensor) -> None:
    pruned, table = cp.channel_prune(chain, images, keep={"conv2": 5, "conv3": 7}, seed=2)
    X, Y = cp.sample_layer(pruned, "conv3", images, seed=2, original=chain)  # conv3's input is what it was pruned on
    own_X, own_Y = cp.sample_layer(chain, "conv3", images, seed=2)
    assert torch.equal(Y, own_Y)
    assert not torch.equal(X, own_X)
    moments = reconstruct.Moments().add(X, Y)
    kept = pruned.conv3.weight.ne(0).any(3).any(2).any(0).nonzero().flatten()
    found = lasso.select(*reconstruct.lasso_problem(moments, chain.conv3.weight), 7)
    assert torch.equal(found.kept, kept)
    assert found.alpha == pytest.approx(table["alpha"].iloc[1], rel=1e-6)
    assert reconstruct.refit(moments, kept, (1, 1)).error == pytest.approx(table["error"].iloc[1], rel=1e-6)


def test_bad_layers_are_named(chain: nn.Module, images: Tensor) -> None:
    with pytest.raises(
        ValueError, match="layer 'norm' is grouped or no convolution; choose one of conv1, conv2, conv3"
    ):
        cp.sample_layer(chain, "norm", images)
    chain.unused = nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match="never runs"):
        cp.sample_layer(chain, "unused", images)


def test_same_seed_same_network_and_other_seed_other_samples(chain: nn.Module, images: Tensor) -> None:
    settings = {"keep": {"conv2": 5}, "points": 4, "batch_size": 16}
    one, two, other = (cp.channel_prune(chain, images, seed=seed, **settings)[0] for seed in (0, 0, 1))
    assert torch.equal(one.conv2.weight, two.conv2.weight)
    assert not torch.equal(one.conv2.weight, other.conv2.weight)


def test_flop_ratio_is_reached_by_a_whole_network(images: Tensor) -> None:
    torch.manual_seed(0)
    network, images = networks.create("convnet").eval(), F.interpolate(images, 32) * 50
    pruned, table = cp.channel_prune(network, images, flop_ratio=2)
    assert table["kept"].tolist() == list(cp.widths(network, images, 2).values())
    assert 2 <= cost.flop_ratio(network, compact.compact(pruned, images), images) < 2.1


def test_dead_channels_are_dropped_below_the_width_asked(chain: nn.Module, images: Tensor) -> None:
    chain.norm.weight.data[:4], chain.norm.bias.data[:4] = 0, -1  # ReLU kills four of eight
    _, table = cp.channel_prune(chain, images, keep={"conv2": 6})
    assert table["kept"].tolist() == [4]


def test_a_failure_leaves_no_hook_and_names_the_layer(chain: nn.Module, images: Tensor) -> None:
    chain.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="layer 'conv2': X or Y holds NaN"):
        cp.channel_prune(chain, images, keep={"conv2": 5})
    conv = chain.conv2
    with pytest.raises(RuntimeError):
        cp._capture(chain, conv, torch.zeros(1, 5, 12, 12))
    assert not conv._forward_hooks
    assert not conv._forward_pre_hooks


def test_bad_input_is_named(chain: nn.Module, images: Tensor) -> None:
    cases = [
        ({"keep": {"conv9": 2}}, r"keep=2 for layer 'conv9'; .* {'conv2': '1\.\.8', 'conv3': '1\.\.12'}"),
        ({"keep": {"conv1": 2}}, "keep=2 for layer 'conv1'"),
        ({"keep": {"conv2": 0}}, r"keep=0 for layer 'conv2'; .*{'conv2': '1\.\.8'"),
        ({"keep": {"conv2": 9}}, "keep=9 for layer 'conv2'"),
        ({"flop_ratio": 1.0}, r"flop_ratio=1\.0 must be above 1"),
        ({"flop_ratio": float("nan")}, "must be above 1"),
        ({"flop_ratio": 1000.0}, r"flop_ratio=1000\.0 is out of reach: one group left in each layer gives \d+\.\d\d"),
        ({}, "either flop_ratio or keep"),
        ({"flop_ratio": 2.0, "keep": {"conv2": 2}}, "either flop_ratio or keep"),
        ({"flop_ratio": 2.0, "points": 0}, "points=0"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            cp.channel_prune(chain, images, **settings)
    images[3, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"images \(40, 3, 12, 12\) .* all finite"):
        cp.channel_prune(chain, images, flop_ratio=2)
    with pytest.raises(ValueError, match=r"images \(0, 3, 12, 12\) must be \(B > 0"):
        cp.channel_prune(chain, images[:0], flop_ratio=2)


def test_grouped_layer_is_refused_by_name(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="layer '2'; the layers"):
        cp.channel_prune(network, images, keep={"2": 2})
