"""Channel Pruning of whole networks: sampling, widths, the layer-by-layer loop and what must be refused."""

from __future__ import annotations

import copy
from functools import partial

import choice
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from single_layer import sample_layer
from sklearn.linear_model import Lasso
from torch import Tensor, is_tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from training import networks

from sppkit import compact, cost, cp, graph, lasso, reconstruct, samples


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


@pytest.mark.parametrize(("name", "ratio"), [("convnet", 1.05), ("convnet", 2.0), ("convnet", 4.0), ("vgg16", 2.0)])
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
    pruned, table = cp.mask_channels(chain, images, keep={"conv2": 5, "conv3": 7}, points=100)
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
    pruned, table = cp.mask_channels(chain.eval(), images, keep={"conv2": 5, "conv3": 7}, points=10_000)
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
    pruned, table = cp.mask_channels(chain.eval(), images, keep={"conv2": 8, "conv3": 12}, points=100)
    assert (table["error"] < 1e-9).all()
    with torch.no_grad():
        torch.testing.assert_close(pruned(images), chain(images), rtol=1e-4, atol=1e-5)


def test_a_ridge_ties_the_refit_to_the_weights_as_they_were(chain: nn.Module, images: Tensor) -> None:
    everything, _ = cp.mask_channels(chain, images, keep={"conv2": 8, "conv3": 12}, ridge=0.1)
    torch.testing.assert_close(everything(images), chain(images), rtol=1e-3, atol=1e-4)
    free, weak, strong = (cp.mask_channels(chain, images, keep={"conv3": 5}, ridge=each) for each in (0, 0.1, 1e9))
    errors = [table["error"].item() for _, table in (free, weak, strong)]
    assert errors[0] < errors[1] < errors[2]
    assert errors[2] < strong[1]["error_before"].item()  # by the bias
    own = chain.get_submodule("conv3").weight
    moved = [
        (masked.get_submodule("conv3").weight - own * masked.get_submodule("conv3").weight.ne(0)).norm()
        for masked, _ in (free, weak, strong)
    ]
    assert moved[0] > moved[1] > 1e3 * moved[2]


def test_second_layer_sees_the_pruned_network(chain: nn.Module, images: Tensor) -> None:
    """With all its channels conv3 is exact, unless conv2 before it lost some."""
    _, alone = cp.mask_channels(chain, images, keep={"conv3": 12}, points=100)
    _, after = cp.mask_channels(chain, images, keep={"conv2": 3, "conv3": 12}, points=100)
    assert alone["error"].iloc[0] < 1e-9
    assert after["error"].iloc[1] > 1e-3


def test_refit_and_lasso_beat_the_first_channels(chain: nn.Module, images: Tensor) -> None:
    pruned, _ = cp.mask_channels(chain.eval(), images, keep={"conv2": 5}, points=100)
    first = copy.deepcopy(chain)
    first.conv2.weight.data[:, 5:] = 0
    with torch.no_grad():
        ours, theirs = (F.mse_loss(network(images), chain(images)) for network in (pruned, first))
    assert ours < 0.5 * theirs


@pytest.mark.parametrize("layer", ["conv1", "conv2", "conv3"])
def test_sampled_patches_explain_the_sampled_outputs(chain: nn.Module, images: Tensor, layer: str) -> None:
    X, Y = sample_layer(chain, layer, images, points=4, seed=3, batch_size=16)
    conv = chain.get_submodule(layer)
    assert X.shape == (40 * 4, conv.weight[0].numel())
    expected = X @ conv.weight.flatten(1).T + (0 if conv.bias is None else conv.bias)
    torch.testing.assert_close(Y, expected, rtol=1e-4, atol=1e-5)
    assert chain.training


def test_samples_of_a_layer_are_those_it_was_pruned_with(chain: nn.Module, images: Tensor) -> None:
    pruned, table = cp.mask_channels(chain, images, keep={"conv2": 5, "conv3": 7}, seed=2)
    X, _ = sample_layer(pruned, "conv3", images, seed=2)  # conv3's input is what it was pruned on
    _, Y = sample_layer(chain, "conv3", images, seed=2)
    moments = reconstruct.Moments().add(X, Y)
    kept = pruned.conv3.weight.ne(0).any(3).any(2).any(0).nonzero().flatten()
    found = lasso.select(*reconstruct.lasso_problem(moments, chain.conv3.weight), 7)
    assert torch.equal(found.kept, kept)
    assert found.alpha == pytest.approx(table["alpha"].iloc[1], rel=1e-4)
    assert reconstruct.refit(moments, kept, (1, 1)).error == pytest.approx(table["error"].iloc[1], rel=1e-4)


def test_bad_layers_are_named(chain: nn.Module, images: Tensor) -> None:
    with pytest.raises(
        ValueError, match="layer 'norm' is grouped or no convolution; choose one of conv1, conv2, conv3"
    ):
        sample_layer(chain, "norm", images)
    chain.unused = nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match="layer 'unused' is never run"):
        sample_layer(chain, "unused", images)


def test_same_seed_same_network_and_other_seed_other_samples(chain: nn.Module, images: Tensor) -> None:
    settings = {"keep": {"conv2": 5}, "points": 4, "batch_size": 16}
    one, two, other = (cp.mask_channels(chain, images, seed=seed, **settings)[0] for seed in (0, 0, 1))
    assert torch.equal(one.conv2.weight, two.conv2.weight)
    assert not torch.equal(one.conv2.weight, other.conv2.weight)


def test_flop_ratio_is_reached_by_a_whole_network(images: Tensor) -> None:
    torch.manual_seed(0)
    network, images = networks.create("convnet").eval(), F.interpolate(images, 32) * 50
    pruned, table = cp.mask_channels(network, images, flop_ratio=2)
    assert table["kept"].tolist() == list(cp.widths(network, images, 2).values())
    assert 2 <= cost.flop_ratio(network, compact.compact(pruned, images), images) < 2.1


def test_dead_channels_are_dropped_below_the_width_asked(chain: nn.Module, images: Tensor) -> None:
    chain.norm.weight.data[:4], chain.norm.bias.data[:4] = 0, -1  # ReLU kills four of eight
    _, table = cp.mask_channels(chain, images, keep={"conv2": 6})
    assert table["kept"].tolist() == [4]


def test_a_failure_names_the_layer(chain: nn.Module, images: Tensor) -> None:
    chain.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="layer 'conv2': X or Y holds NaN"):
        cp.mask_channels(chain, images, keep={"conv2": 5})


def test_bad_input_is_named(chain: nn.Module, images: Tensor) -> None:
    cases = [
        ({"keep": {"conv9": 2}}, r"keep=2 for layer 'conv9'; .* {'conv2': '1\.\.8', 'conv3': '1\.\.12'}"),
        ({"keep": {"conv1": 2}}, "keep=2 for layer 'conv1'"),
        ({"keep": {"conv2": 0}}, r"keep=0 for layer 'conv2'; .*{'conv2': '1\.\.8'"),
        ({"keep": {"conv2": 9}}, "keep=9 for layer 'conv2'"),
        ({"flop_ratio": 1.0}, r"flop_ratio=1\.0 must be above 1"),
        ({"flop_ratio": float("nan")}, "must be above 1"),
        ({"flop_ratio": 1000.0}, r"flop_ratio=1000\.0 is out of reach: all that can go gives \d+\.\d\d"),
        ({}, "either flop_ratio or keep"),
        ({"flop_ratio": 2.0, "keep": {"conv2": 2}}, "either flop_ratio or keep"),
        ({"flop_ratio": 2.0, "points": 0}, "points=0"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            cp.mask_channels(chain, images, **settings)
    images[3, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"images \(40, 3, 12, 12\) .* all finite"):
        cp.mask_channels(chain, images, flop_ratio=2)
    with pytest.raises(ValueError, match=r"images \(0, 3, 12, 12\) must be \(B > 0"):
        cp.mask_channels(chain, images[:0], flop_ratio=2)


@pytest.mark.parametrize("asked", [{"flop_ratio": 2.0}, {"keep": {"features.3": 30}}])
def test_images_that_do_not_fit_the_network_are_refused(asked: dict) -> None:
    network = torchvision.models.alexnet(num_classes=2)
    with pytest.raises(ValueError, match=r"images \(1, 3, 16, 16\) of torch.float32.* too small"):  # receptive field
        cp.mask_channels(network, torch.randn(2, 3, 16, 16), **asked)
    with pytest.raises(ValueError, match=r"images \(1, 1, 64, 64\)"):
        cp.mask_channels(network, torch.randn(2, 1, 64, 64), **asked)
    with pytest.raises(ValueError, match=r"of torch\.uint8"):
        cp.mask_channels(network, torch.zeros(2, 3, 64, 64, dtype=torch.uint8), **asked)


def test_smaller_chunks_where_memory_runs_out(
    chain: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, chunks, limit = reconstruct.Moments.add, list[int](), 100

    def limited(self: reconstruct.Moments, X: Tensor, Y: Tensor) -> reconstruct.Moments:
        chunks.append(len(X))
        if len(X) > limit:
            raise torch.OutOfMemoryError("Tried to allocate more than there is")
        return add(self, X, Y)

    _, expected = cp.mask_channels(chain, images, flop_ratio=2, batch_size=10)
    monkeypatch.setattr(reconstruct.Moments, "add", limited)
    with pytest.warns(UserWarning, match="out of memory: begun again with batch_size=") as caught:
        _, table = cp.mask_channels(chain, images, flop_ratio=2, batch_size=40)
    assert [str(each.message)[-2:] for each in caught] == ["20", "10"]
    assert chunks[:3] == [400, 200, 100]
    assert len(chunks) == 2 + 2 * 4
    pd.testing.assert_frame_equal(table, expected)
    limit = 0
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="=1"):  # not even one image
        cp.mask_channels(chain, images, flop_ratio=2, batch_size=2)


def test_what_the_samples_leave_undetermined_is_reported(chain: nn.Module, images: Tensor) -> None:
    _, table = cp.mask_channels(chain, images, keep={"conv2": 6, "conv3": 6})
    assert table["undetermined"].tolist() == [0, 0]
    _, table = cp.mask_channels(chain, images[:5], keep={"conv2": 6, "conv3": 6})  # 50 samples of 54 and 6 columns
    assert table["undetermined"].tolist() == [6 * 9 - 49, 0]


def test_no_tensor_grows_with_the_number_of_samples() -> None:
    """Z, as the paper forms it, would have N n c entries."""
    c, n, chunk = 8, 16, 50
    most, random = 0, torch.Generator().manual_seed(0)

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal most
            result = function(*args, **(kwargs or {}))
            sizes = [tensor.untyped_storage().nbytes() for tensor in pytree.tree_leaves(result) if is_tensor(tensor)]
            most = max([most, *sizes])
            return result

    conv, moments = nn.Conv2d(c, n, 3), reconstruct.Moments()
    with Largest():
        for _ in range(200):
            moments.add(torch.randn(chunk, c * 9, generator=random), torch.randn(chunk, n, generator=random))
        with torch.no_grad():
            cp.prune_layer(conv, moments, 4)
    assert moments.count == 200 * chunk
    assert most == 8 * max((c * 9 + n) ** 2, chunk * (c * 9 + n))
    assert most < 8 * moments.count * n * c / 100


def test_grouped_layer_is_refused_by_name(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="layer '2'; the layers"):
        cp.mask_channels(network, images, keep={"2": 2})


class Branches(nn.Module):
    """A residual block, its shortcut projected or not, overwriting as torchvision's do, then a shared 1x1 reader."""

    def __init__(self, projected: bool) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.conv1, self.norm1 = nn.Conv2d(10, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.project = nn.Sequential(nn.Conv2d(10, 10, 1, bias=False), nn.BatchNorm2d(10)) if projected else None
        self.conv3, self.relu = nn.Conv2d(10, 6, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm0(self.stem(x)))
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += x if self.project is None else self.project(x)
        y = self.relu(y)
        return self.conv3(y) + y[:, :6]


def shifted(network: nn.Module) -> nn.Module:
    """BatchNorms with statistics and parameters of their own, in evaluation mode."""
    generator = torch.Generator().manual_seed(3)
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor, low, high in ((norm.running_mean, -0.2, 0.2), (norm.running_var, 0.5, 1.5)):
            tensor.uniform_(low, high, generator=generator)
        norm.weight.data.uniform_(0.5, 1.5, generator=generator)
        norm.bias.data.uniform_(-0.3, 0.3, generator=generator)
    return network.eval()


@pytest.fixture(params=[False, True], ids=["identity", "projection"])
def branches(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return shifted(Branches(request.param))


def outputs(network: nn.Module, x: Tensor, *layers: str) -> dict[str, Tensor]:
    """Each layer's input, and the network's output under ""."""
    seen: dict[str, Tensor] = {}
    for layer in layers:
        network.get_submodule(layer).register_forward_pre_hook(
            lambda m, args, key=layer: seen.__setitem__(key, args[0].detach().clone())
        )
    with torch.no_grad():
        return seen | {"": network(x)} | seen


def test_sites_of_the_networks_read_by_eye() -> None:
    def found(network: nn.Module, **options: bool) -> dict[str, tuple[str | None, bool]]:
        places = graph.sites(network, compact.trace(network), **options)
        return {name: (place.producer, place.total is not None) for name, place in places.items()}

    assert found(networks.create("convnet")) == {"conv2": ("conv1", False), "conv3": ("conv2", False)}
    for name in ("resnet20", "resnet20-projection"):
        folded = graph.fold(networks.create(name))[0]
        inner = {f"blocks.{k}.conv2": (f"blocks.{k}.conv1", True) for k in range(9)}
        outer = {f"blocks.{k}.conv1": (None, False) for k in range(9)}
        assert found(folded) == inner | outer
        assert found(folded, samplers=False) == inner
    resnet50 = graph.fold(torchvision.models.resnet50())[0]
    places = found(resnet50)
    assert places["layer2.0.conv1"] == (None, False)
    assert places["layer2.0.conv2"] == ("layer2.0.conv1", False)
    assert places["layer2.0.conv3"] == ("layer2.0.conv2", True)
    assert "layer2.0.downsample.0" not in places
    assert len(places) == 48


def test_a_folded_network_is_the_same_function_and_so_is_the_unfolded(images: Tensor, branches: nn.Module) -> None:
    branches.norm1.weight.data[2] = 0.0  # a channel that is switched off
    branches.norm2 = nn.BatchNorm2d(10, affine=False).eval()
    expected = branches(images)
    folded, norms = graph.fold(branches)
    assert {"stem": "norm0", "conv1": "norm1", "conv2": "norm2"}.items() <= norms.items()
    torch.testing.assert_close(folded(images), expected, rtol=1e-4, atol=1e-5)
    conv = folded.get_submodule("conv2")
    conv.weight.data *= 0.5
    conv.bias.data += 1.0
    statistics = {"conv2": (torch.linspace(-1, 1, 10), torch.linspace(0.5, 2, 10))}
    for given in (None, statistics):
        back = graph.unfold(folded, branches, norms, given)
        assert isinstance(back.get_submodule("norm1"), nn.BatchNorm2d)
        torch.testing.assert_close(back(images), folded(images), rtol=1e-4, atol=1e-5)


def test_the_end_of_a_branch_makes_up_for_its_shortcut(images: Tensor, branches: nn.Module) -> None:
    """All positions sampled: the error at the end of the branch is that of the sum, against the original's."""
    keep = {"conv1": 6, "conv2": 5}
    settings = {"keep": keep, "points": 10_000}
    original = graph.fold(branches)[0]
    pruned, table = cp.mask_channels(branches, images, **settings)
    expected, found = (outputs(network, images, "conv3")["conv3"] for network in (branches, pruned))
    assert table["layer"].tolist() == ["conv1", "conv2"]
    assert table["filters"].tolist() == ["", "conv1"]
    sums = []
    for network in (original, graph.fold(pruned)[0]):
        nodes = compact.trace(network)
        total = graph.sites(network, nodes)["conv2"].total
        graph.Probe(network, nodes, after={total: lambda value: sums.append(value.detach().clone())}).look(images)
    Y, Yhat = sums
    torch.testing.assert_close(expected, Y.relu())
    torch.testing.assert_close(found, Yhat.relu())
    before = branches.norm2(branches.conv2(outputs(branches, images, "conv2")["conv2"])).detach()
    spread = (before - before.mean((0, 2, 3), keepdim=True)).square().sum()
    assert table["error"].iloc[1] == pytest.approx(float((Y - Yhat).square().sum() / spread), rel=1e-3)


class Overwriting(nn.Module):
    """A shared input that is written to on the way, by what must not happen twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.conv2, self.conv3 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = torch.relu(self.conv1(x))
        x.mul_(3)
        y = self.conv2(y)
        x.mul_(0.5)
        return self.conv3(torch.relu_(y + x)).mean((2, 3))


class Remembering(nn.Module):
    """Weights that act before their layer runs: of another layer too, or read at the start."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.stem, self.conv1 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.conv2, self.conv3 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.tied = tied
        if tied:
            self.conv2.weight = self.conv1.weight

    def forward(self, x: Tensor) -> Tensor:
        early = 1.0 if self.tied else self.conv1.weight.mean()
        x = torch.relu(self.conv2(torch.relu(self.conv1(torch.relu(self.stem(x))))))
        return self.conv3(x * early).mean((2, 3))


class Chunks(nn.Module):
    """A value that is no tensor is read late, and a layer that insists on gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.conv2, self.conv3 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.graded = nn.ReLU()
        self.graded.forward = torch.enable_grad()(self.graded.forward)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        halves = self.graded(self.stem(x)).chunk(2, 1)
        y = self.graded(self.conv1(halves[0]))
        y = self.graded(self.conv2(y)) + halves[1].repeat(1, 2, 1, 1)
        return self.conv3(y).mean((2, 3))


@pytest.mark.parametrize(
    ("network", "goes_on"),
    [
        (Overwriting, [True, True]),
        (partial(Branches, False), [True, True]),
        (partial(Branches, True), [True, True]),
        (partial(Remembering, False), [False, False]),
        (partial(Remembering, True), [False, False]),
        (Chunks, [False, False]),
    ],
)
def test_passes_that_go_on_from_the_layer_before_see_the_same(
    network: partial[nn.Module], goes_on: list[bool], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    dense, found = shifted(network()), []
    one_map = 40 * 8 * 12 * 12 * 4  # bytes of eight channels, all images
    for kept in (-1, one_map, 2**30):  # each pass from the images on; on where little is still read; on everywhere
        monkeypatch.setattr(samples, "KEPT", kept)
        begun: list[int] = []
        run_node = graph.Probe.run_node
        monkeypatch.setattr(graph.Probe, "run_node", lambda probe, node: begun.append(1) or run_node(probe, node))  # noqa: B023
        pruned, table = cp.mask_channels(dense, images, flop_ratio=1.5, batch_size=15)
        monkeypatch.setattr(graph.Probe, "run_node", run_node)
        found.append((pruned.state_dict(), table, len(begun)))
    for state, table, _ in found[1:]:
        torch.testing.assert_close(state, found[0][0], rtol=0, atol=0)
        pd.testing.assert_frame_equal(table, found[0][1])
    counts = [count for *_, count in found]
    assert [counts[1] < counts[0], counts[2] < counts[1]] == goes_on


def test_correction_lowers_the_error_of_a_deep_network() -> None:
    torch.manual_seed(0)
    network, x = shifted(networks.create("resnet20")), torch.randn(60, 3, 32, 32)
    with torch.no_grad():
        expected, lost = network(x), {}
        for correct in (True, False):
            pruned, _ = cp.mask_channels(network, x, flop_ratio=2, points=100, correct=correct)
            lost[correct] = float((pruned(x) - expected).square().mean())
    assert lost[True] < lost[False]


@pytest.mark.parametrize("name", ["resnet20", "resnet20-projection", "torchvision/resnet10", "torchvision/alexnet"])
def test_whole_networks_are_pruned_and_compact(name: str) -> None:
    torch.manual_seed(0)
    model, size = name.removeprefix("torchvision/"), 64 if "torchvision" in name else 32
    if model == "resnet10":  # one block a stage
        network = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)
    else:
        network = torchvision.models.get_model(model, num_classes=4) if size == 64 else networks.create(name)
    network, x = shifted(network), torch.randn(12, 3, size, size)
    masked, table = cp.mask_channels(network, x, flop_ratio=2)
    small, again = compact.compact(masked, columns=False), table
    if size == 32:  # the same in one call; the others take long
        small, again = cp.channel_prune(network, x, flop_ratio=2)
    assert compact.largest_difference(masked, small, x) < 1e-10
    assert cost.flop_ratio(network, small, x) == pytest.approx(2, rel=0.01 if size == 32 else 0.04)  # dead channels
    pd.testing.assert_frame_equal(table, again)
    macs = cost.conv_table(small, x[:1]).set_index("layer")["macs"]
    assert table.set_index("layer")["macs_left"].to_dict() == macs[table["layer"]].to_dict()
    assert [type(m) for m in small.modules() if isinstance(m, nn.BatchNorm2d)] == [
        type(m) for m in network.modules() if isinstance(m, nn.BatchNorm2d)
    ]


class Inception(nn.Module):
    """Two branches of unequal depth, concatenated with their input: an inception module and a dense block in one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze, self.wide = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 8, 3, padding=1)
        self.side, self.norm, self.last = nn.Conv2d(6, 5, 1), nn.BatchNorm2d(19), nn.Conv2d(19, 7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        both = torch.cat([x, self.wide(self.squeeze(x).relu()).relu(), self.side(x).relu()], 1)
        return self.last(self.norm(both).relu()).mean((2, 3))


def test_concatenated_branches_are_read_through_samplers(images: Tensor) -> None:
    torch.manual_seed(0)
    network = shifted(Inception())
    masked, table = cp.mask_channels(network, images, flop_ratio=1.6)
    assert dict(zip(table["layer"], table["filters"], strict=True)) == {
        "squeeze": "",
        "wide": "squeeze",
        "side": "",
        "last": "",
    }
    small = compact.compact(masked, columns=False)
    assert isinstance(small.get_submodule("last"), compact.SampledConv2d)
    assert compact.largest_difference(masked, small, images) < 1e-5
    assert cost.flop_ratio(network, small, images) == pytest.approx(1.6, rel=0.05)
    everything = dict(zip(table["layer"], table["channels"], strict=True))
    same, _ = cp.mask_channels(network, images, keep=everything, points=100)
    assert compact.largest_difference(network, same, images) < 1e-5


def test_keeping_every_channel_of_a_residual_network_changes_nothing(images: Tensor, branches: nn.Module) -> None:
    same, table = cp.mask_channels(branches, images, keep={"conv1": 10, "conv2": 8}, points=100)
    assert (table["error"] < 1e-9).all()
    with torch.no_grad():
        torch.testing.assert_close(same(images), branches(images), rtol=1e-3, atol=1e-4)


def test_renewed_norms_hold_what_the_pruned_network_computes(images: Tensor, branches: nn.Module) -> None:
    settings = {"keep": {"conv1": 6, "conv2": 5}, "points": 10_000}
    kept, renewed = (cp.mask_channels(branches, images, renew=renew, **settings)[0] for renew in (False, True))
    with torch.no_grad():
        torch.testing.assert_close(kept(images), renewed(images), rtol=1e-4, atol=1e-5)
        seen = outputs(renewed, images, "norm1", "norm2")
    for name, norm in (("norm1", renewed.norm1), ("norm2", renewed.norm2)):
        variance, mean = torch.var_mean(seen[name], (0, 2, 3), correction=0)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-3, atol=1e-4)
    assert torch.equal(kept.norm1.running_var, branches.norm1.running_var)


def test_a_rule_sets_the_proportions_and_leaves_the_others_alone() -> None:
    network, example = networks.create("vgg16"), torch.zeros(1, 3, 32, 32)
    convs = [*cost.conv_table(network, example)["layer"]]
    rule = dict.fromkeys(convs[1:8], 1.0) | dict.fromkeys(convs[8:11], 1.5)  # conv1_2 to conv4_1; conv4_2 to conv5_1
    keep = cp.widths(network, example, 4, rule=rule)
    table = cost.conv_table(network, example).set_index("layer")
    shares = {name: count / table.at[name, "in_channels"] for name, count in keep.items()}
    assert [*keep] == convs[1:11]
    for name in convs[8:11]:
        assert shares[name] == pytest.approx(1.5 * shares[convs[4]], abs=0.02)
    with pytest.raises(ValueError, match="rule: layer 'nowhere', weight 1"):
        cp.widths(network, example, 4, rule={"nowhere": 1.0})
    with pytest.raises(ValueError, match=r"flop_ratio=50 is out of reach: all that can go gives \d"):
        cp.widths(network, example, 50, rule=rule)


def test_choices_keep_what_their_names_say(chain: nn.Module, images: Tensor) -> None:
    errors, kept = {}, {}
    for select in choice.CHOICES:
        pruned, table = cp.mask_channels(
            chain, images, keep={"conv2": 4}, points=100, select=partial(choice.choose, select)
        )
        kept[select] = pruned.conv2.weight.ne(0).any(3).any(2).any(0).nonzero().flatten()
        errors[select] = float(table["error"].iloc[0])
        assert len(kept[select]) == 4  # ten percent more than four is four
        assert table["error"].iloc[0] < table["error_before"].iloc[0]
    assert kept["first_k"].tolist() == [0, 1, 2, 3]
    scale = chain.norm.weight / (chain.norm.running_var + chain.norm.eps).sqrt()
    largest = (chain.conv1.weight * scale[:, None, None, None]).abs().sum((1, 2, 3)).topk(4).indices
    assert kept["max_response"].tolist() == largest.sort().values.tolist()
    assert errors["lasso"] < min(errors["first_k"], errors["random"])
    with pytest.raises(ValueError, match="layer 'conv2': select='best' must be one of lasso, alternating, paper"):
        cp.mask_channels(chain, images, keep={"conv2": 4}, select=partial(choice.choose, "best"))


def test_the_inverse_of_batchnorm_is_lasso_of_the_bare_convolution(chain: nn.Module, images: Tensor) -> None:
    conv, norm = nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12)
    torch.manual_seed(3)
    nn.init.uniform_(norm.weight, 0.05, 5.0)
    norm.running_mean, norm.running_var, norm.bias.data = torch.randn(12), 0.1 + torch.rand(12), torch.randn(12)
    with torch.no_grad():
        norm.weight[::3] *= -1
        conv.weight *= torch.linspace(0.1, 2, 12)[:, None, None, None]
    network = nn.Sequential(chain.conv1, chain.norm, nn.ReLU(), conv, norm, nn.ReLU()).eval()
    X, Y = sample_layer(network, "3", images, points=20)  # before BatchNorm
    bare = reconstruct.Moments().add(X, Y)
    expected = {keep: lasso.select(*reconstruct.lasso_problem(bare, conv.weight), keep) for keep in range(1, 8)}
    folded, _ = graph.fold(network)
    X, Y = sample_layer(folded, "3", images, points=20)
    moments, scale = reconstruct.Moments().add(X, Y), graph.norm_scale(norm)
    assert torch.allclose(scale, norm.weight / (norm.running_var + norm.eps).sqrt())
    for keep, found in expected.items():
        kept, alpha, violation = choice.choose("inverse", moments, folded[3], keep, scale=scale)
        assert torch.equal(kept, found.kept)
        assert alpha == pytest.approx(found.alpha, rel=1e-5)
        assert violation < 1e-8
    plain = {keep: choice.choose("inverse", moments, folded[3], keep)[0] for keep in expected}
    assert all(torch.equal(kept, choice.choose("lasso", moments, folded[3], keep)[0]) for keep, kept in plain.items())
    assert any(not torch.equal(kept, expected[keep].kept) for keep, kept in plain.items()), "it is another choice"
    for keep in expected:  # and that is what a whole network gets
        pruned, _ = cp.mask_channels(
            network, images, keep={"3": keep}, points=20, select=partial(choice.choose, "inverse")
        )
        masked = pruned[3].weight.ne(0).any(3).any(2).any(0).nonzero().flatten()
        assert torch.equal(masked, expected[keep].kept)


def test_alternating_is_lasso_and_least_squares_in_turn(chain: nn.Module, images: Tensor) -> None:
    X, Y = (t.double() for t in sample_layer(chain, "conv2", images, points=8))
    A, C = ((t - t.mean(0)).numpy() for t in (X, Y))
    columns = np.arange(72).reshape(8, 9)
    left, W = np.arange(8), chain.conv2.weight.detach().double().flatten(2).numpy()  # (n, c, 9)
    for width in (7, 6, 5, 4, 3):  # 8 (3 / 8)^(k / 5)
        Z = np.stack([(A[:, columns[i]] @ (W[:, i] / np.linalg.norm(W[:, i])).T).ravel() for i in left], 1)
        found = lasso.select(torch.from_numpy(Z.T @ Z), torch.from_numpy(Z.T @ C.ravel()), width)
        left = left[found.kept.numpy()]
        fit = np.linalg.lstsq(A[:, columns[left].ravel()], C, rcond=None)[0]
        W[:, left] = fit.T.reshape(12, width, 9)
    kept = choice.choose("alternating", reconstruct.Moments().add(X, Y), chain.conv2, 3)[0]
    assert kept.tolist() == left.tolist()


def test_a_choice_takes_dead_channels_last_and_refuses_other_widths(chain: nn.Module, images: Tensor) -> None:
    X, Y = sample_layer(chain, "conv2", images, points=8)
    X.unflatten(1, (8, 9))[:, 2:5] = 0.0
    moments = reconstruct.Moments().add(X, Y)
    for name in ("lasso", "alternating", "paper"):
        assert choice.choose(name, moments, chain.conv2, 5)[0].tolist() == [0, 1, 5, 6, 7]
        assert set(choice.choose(name, moments, chain.conv2, 7)[0].tolist()) > {0, 1, 5, 6, 7}
    for keep in (0, 9):
        for name in choice.CHOICES:
            with pytest.raises(ValueError, match=rf"keep={keep} must lie in 1\.\.8"):
                choice.choose(name, moments, chain.conv2, keep)


def test_thinet_is_greedy(images: Tensor) -> None:
    torch.manual_seed(0)
    Z = torch.randn(50, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64)
    gone: list[int] = []
    for _ in range(4):  # by its definition, with the contributions themselves
        rest = [i for i in range(7) if i not in gone]
        gone.append(min(rest, key=lambda i: float(Z[:, [*gone, i]].sum(1).square().sum())))
    assert choice.thinet(Z.T @ Z, 3).tolist() == sorted({*range(7)} - {*gone})


def test_rounded_widths_are_multiples_and_near_the_ratio() -> None:
    multiple = 16
    network, example = networks.create("vgg16"), torch.zeros(1, 3, 32, 32)
    plain, rounded = cp.widths(network, example, 4), cp.widths(network, example, 4, multiple=multiple)
    assert [*plain] == [*rounded]
    assert all(width % multiple == 0 for width in rounded.values())
    assert any(width % multiple for width in plain.values())
    assert max(abs(rounded[name] - plain[name]) for name in plain) <= multiple
    gone = {name: torch.arange(width, 512) for name, width in rounded.items()}
    for name, conv in compact.convolutions(network).items():
        if name in gone:
            conv.weight.data[:, gone[name][gone[name] < conv.in_channels]] = 0
    ratio = cost.flop_ratio(networks.create("vgg16"), compact.compact(network, columns=False), example)
    assert ratio == pytest.approx(4, rel=0.05)
    with pytest.raises(ValueError, match="out of reach: all that can go gives"):
        cp.widths(network, example, 1000, multiple=multiple)
    with pytest.raises(ValueError, match="multiple=0 must be at least 1"):
        cp.widths(network, example, 4, multiple=0)


def test_max_response_needs_the_filters(images: Tensor, branches: nn.Module) -> None:
    with pytest.raises(ValueError, match="layer 'conv1': select='max_response' needs the filters"):
        cp.mask_channels(branches, images, keep={"conv1": 4}, select=partial(choice.choose, "max_response"))


def test_the_authors_problem_is_that_of_stacked_outputs(chain: nn.Module, images: Tensor) -> None:
    """One LASSO with one intercept on Z stacked over outputs, bias taken off, as their code hands it on."""
    X, Y = (t.double() for t in sample_layer(chain, "conv3", images, points=8))
    W, bias = chain.conv3.weight.detach().double(), chain.conv3.bias.detach().double()
    Z = torch.einsum("Nck,nck->Nnc", X.unflatten(1, (12, 1)), W.flatten(2)).flatten(0, 1)  # (N n, c)
    y = (Y - bias).flatten()
    gram, correlation = choice.paper_problem(reconstruct.Moments().add(X, Y), W, bias)
    centred = Z - Z.mean(0)
    torch.testing.assert_close(gram, centred.T @ centred / len(Z))
    torch.testing.assert_close(correlation, centred.T @ (y - y.mean()) / len(Z))
    found = choice.search(gram, correlation, 5)
    theirs = Lasso(alpha=found.alpha, tol=1e-12, max_iter=100_000).fit(Z.numpy(), y.numpy()).coef_
    np.testing.assert_allclose(found.beta.numpy(), theirs, atol=1e-6 * np.abs(theirs).max())
    assert found.kept.tolist() == np.flatnonzero(theirs).tolist()


def test_the_authors_widths_are_up_to_a_tenth_above(images: Tensor) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 60, 3), nn.ReLU(), nn.Conv2d(60, 5, 3)).eval()
    widths = [
        int(
            cp.mask_channels(
                network, images, keep={"2": 20}, points=50, select=partial(choice.choose, "paper"), seed=seed
            )[1]["kept"].iloc[0]
        )
        for seed in range(6)
    ]
    assert all(20 <= width <= 22 for width in widths)
    with pytest.raises(ValueError, match="no alpha leaves 2 to 2 channels"):
        choice.search(torch.eye(4), torch.tensor([3.0, 2.0, 2.0, 2.0]), 2)
    with pytest.raises(ValueError, match=r"keep=5 must lie in 1\.\.4"):
        choice.search(torch.eye(4), torch.ones(4), 5)


@pytest.mark.parametrize("correct", [True, False])
def test_a_dead_block_of_a_residual_network_goes(images: Tensor, correct: bool) -> None:
    network = networks.create("resnet20", seed=0).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    dead = network.blocks[4].bn1
    nn.init.zeros_(dead.weight)
    nn.init.constant_(dead.bias, -1.0)  # never positive: the ReLU behind it gives 0
    masked, table = cp.mask_channels(network, images, flop_ratio=2, correct=correct)
    table = table.set_index("layer")
    assert table.loc[["blocks.4.conv1", "blocks.4.conv2"], "kept"].tolist() == [0, 0]
    assert table["kept"].drop(["blocks.4.conv1", "blocks.4.conv2"]).min() > 1
    assert table.loc["blocks.4.conv1", "error"] == 0
    small = compact.compact(masked, images, columns=False)
    assert compact.largest_difference(masked, small, images) < 1e-9
    with pytest.raises(ValueError, match=r"images \(4, 3, 32, 32\) are constant"):
        cp.mask_channels(network, torch.ones(4, 3, 32, 32), flop_ratio=2)
