"""Channel pruning as an experiment: widths by the paper's rule, networks before the refit, what it is compared with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import channels
import numpy as np
import pytest
import sensitivity
import torch
from driver import run
from settings import Experiment, Places, expand
from training import networks
from training.data import ImageData, load

from sppkit.compact import SampledConv2d, convolutions, largest_difference
from sppkit.cost import flop_ratio
from sppkit.graph import fold

EXAMPLE = torch.zeros(1, 3, 32, 32)
SMALL = Experiment(
    "small", method="cp", batch_size=16, baseline_steps=30, baseline_milestones=(), retrain_steps=4,
    retrain_milestones=(), images=60, points=5,
)  # fmt: skip


def random_images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def digits() -> ImageData:
    whole = load("digits")
    return replace(whole, test=replace(whole.test, images=whole.test.images[:60], labels=whole.test.labels[:60]))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return Places(tmp_path_factory.mktemp("root"), revision="test")


@pytest.mark.parametrize(("target", "share"), [(2, 0.576), (5, 0.316)])
def test_vgg16_keeps_what_the_paper_says(target: float, share: float) -> None:
    network, _ = fold(networks.create("vgg16-bn"))
    plan = replace(SMALL, network="vgg16-bn", rule="paper", flop_ratio=target)
    convs, keep = convolutions(network), channels.widths(network, EXAMPLE, plan)
    names = [*convs]
    assert [*keep] == names[1:11]
    for name, weight in zip(keep, [1.0] * 7 + [1.5] * 3, strict=True):
        assert keep[name] == pytest.approx(weight * share * convs[name].in_channels, abs=1)
    pruned = channels.without(network, {name: torch.arange(k, convs[name].in_channels) for name, k in keep.items()})
    assert flop_ratio(network, channels.compact(pruned), EXAMPLE) == pytest.approx(target, rel=0.01)


@pytest.mark.parametrize("samplers", [True, False])
def test_a_residual_network_keeps_its_last_stage(samplers: bool) -> None:
    network, _ = fold(networks.create("resnet20-projection"))
    keep = channels.widths(network, EXAMPLE, replace(SMALL, rule="paper", flop_ratio=1.5, samplers=samplers))
    convs = [f"blocks.{block}.conv{i}" for block in range(6) for i in ((1, 2) if samplers else (2,))]
    assert {*keep} == {*convs}
    shares = [width / convolutions(network)[name].in_channels for name, width in keep.items()]
    assert max(shares) - min(shares) < 1 / 16


def test_other_rules_are_refused() -> None:
    network, plan = networks.create("convnet"), replace(SMALL, rule="paper")
    with pytest.raises(ValueError, match="rule='paper' is for VGG-16 and residual networks"):
        channels.widths(network, EXAMPLE, plan)
    with pytest.raises(ValueError, match="rule='tiers' is not for channels"):
        channels.widths(network, EXAMPLE, replace(plan, rule="tiers"))
    with pytest.raises(ValueError, match=r"one producer of a layer's input, unlike 'blocks\.0\.conv1'; samplers=False"):
        channels.widths(fold(networks.create("resnet20"))[0], EXAMPLE, replace(plan, rule="pca"))


def test_a_layer_keeps_what_the_components_of_its_input_call_for() -> None:
    """Some filters copy others: fewer components, so the layer behind them is pruned more, in proportion."""
    network, images = networks.create("convnet").eval(), random_images(20)
    filters = convolutions(network)["conv1"].weight.data
    filters[16:] = filters[:16]
    components = sensitivity.pca(network, images)
    assert components["conv1"] < components["conv2"]
    for target in (3, 4):
        keep = channels.widths(network, images, replace(SMALL, rule="pca", flop_ratio=target))
        assert max(keep.values()) < 32
        expected = components["conv1"] / components["conv2"] * keep["conv3"]
        assert keep["conv2"] == pytest.approx(expected, abs=1)


def test_equal_errors_are_equal_and_reach_the_ratio() -> None:
    network, images = networks.create("convnet").eval(), random_images(40)
    plan = replace(SMALL, rule="error", flop_ratio=1.3, points=50)
    curves = sensitivity.curves(network, images, points=plan.points, seed=plan.seed)
    for name, (widths, errors) in curves.items():
        assert widths == sorted({*widths}), name
        assert (widths[0], widths[-1], errors[0], errors[-1]) == (1, 32, 1.0, 0.0)
        assert errors == sorted(errors, reverse=True)
    half = {name: np.interp(16, *curves[name]) for name in ("conv2", "conv3")}
    keep = channels.widths(network, images, plan)
    assert min(half, key=lambda name: half[name]) == min(keep, key=lambda name: keep[name])
    left = {name: np.interp(keep[name], *curves[name]) for name in keep}
    assert left["conv2"] == pytest.approx(left["conv3"], abs=0.05)
    gone = {name: torch.arange(width, 32) for name, width in keep.items()}
    small = channels.compact(channels.without(network, gone), columns=False)
    assert flop_ratio(network, small, EXAMPLE) == pytest.approx(1.3, rel=0.03)
    assert channels.CURVES, "a second run of the same network looks it up"


def test_before_the_refit_the_same_channels_are_gone_and_no_weight_is_new(digits: ImageData) -> None:
    network, plan = networks.resnet(8, shortcut="projection").eval(), replace(SMALL, normalise="channel")
    small, bare, notes = channels.smaller(network, digits, plan)
    assert bare is not None
    assert flop_ratio(network, small, EXAMPLE) == pytest.approx(2, rel=0.01)
    sampled = {name: conv.index for name, conv in convolutions(small).items() if isinstance(conv, SampledConv2d)}
    assert sampled
    for layer in notes["layers"]:
        name = layer["layer"]
        own, left = convolutions(network)[name].weight, convolutions(bare)[name].weight
        gone = channels.gone(convolutions(bare)[name])
        assert len(gone) == layer["channels"] - layer["kept"]
        kept = [i for i in range(layer["channels"]) if i not in gone]
        assert torch.equal(own[:, kept], left[:, kept])
        if name in sampled:
            assert sampled[name].tolist() == kept
    others = {k: v for k, v in bare.state_dict().items() if k.removesuffix(".weight") not in convolutions(network)}
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in others.items())


def test_filters_go_by_their_norms_and_the_others_are_as_they_were(digits: ImageData) -> None:
    network, plan = networks.create("convnet").eval(), replace(SMALL, method="fp", flop_ratio=3)
    small, bare, notes = channels.smaller(network, digits, plan)
    assert bare is None
    images = channels.training_images(digits, plan)
    expected = channels.copy.deepcopy(network)
    for name, producer in (("conv2", "conv1"), ("conv3", "conv2")):
        norms = convolutions(network)[producer].weight.detach().abs().sum((1, 2, 3))
        kept = next(layer["kept"] for layer in notes["layers"] if layer["layer"] == name)
        weight = convolutions(expected)[name].weight.data
        weight[:, norms < norms.sort(descending=True).values[kept - 1]] = 0
        assert kept == convolutions(small)[name].in_channels
    assert largest_difference(expected, small, images[:20]) < 1e-12
    with pytest.raises(ValueError, match="method='fp' goes by filters"):
        channels.smaller(networks.resnet(8), digits, plan)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torch_pruning_reaches_the_ratio_and_takes_the_shortcut_too(digits: ImageData) -> None:
    network, plan = networks.resnet(8, shortcut="projection").eval(), replace(SMALL, method="depgraph", flop_ratio=2)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    small, bare, _ = channels.smaller(network, digits, plan)
    assert bare is None
    assert flop_ratio(network, small, EXAMPLE[:, :, :8, :8]) == pytest.approx(2, rel=0.05)
    widths = [conv.out_channels for conv in convolutions(small).values()]
    assert len({*widths[:3:2]}) == 1, "what a sum adds is as wide on both sides"
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_from_scratch_has_the_widths_and_none_of_the_weights(digits: ImageData) -> None:
    network = networks.create("convnet")
    plan = replace(SMALL, flop_ratio=4)
    (cp, *_), (fresh, *_) = (channels.smaller(network, digits, replace(plan, method=m)) for m in ("cp", "scratch"))
    shapes = [{name: conv.weight.shape for name, conv in convolutions(each).items()} for each in (cp, fresh)]
    assert shapes[0] == shapes[1]
    own = {*network.conv1.weight.flatten().tolist()}  # type: ignore[operator, union-attr]
    assert not own & {*fresh.conv1.weight.flatten().tolist()}  # type: ignore[operator, union-attr]
    again, *_ = channels.smaller(network, digits, replace(plan, method="scratch"))
    assert torch.equal(again.conv1.weight, fresh.conv1.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["jaderberg", "asym", "asym3d", "3c"])
def test_a_factorised_network_is_fine_tuned(digits: ImageData, places: Places, method: str) -> None:
    record = run(replace(SMALL, method=method, retrain_lr=1e-4), digits, places)
    assert record["flop_ratio"] == pytest.approx(2, rel=0.05)
    assert "acc_before_refit" not in record["notes"]
    assert [layer["layer"] for layer in record["notes"]["layers"]] == ["conv2", "conv3"]


@pytest.mark.parametrize("method", ["jaderberg", "asym", "asym3d", "3c"])
def test_a_factorised_network_has_its_batchnorms_back_and_is_the_same(digits: ImageData, method: str) -> None:
    network, plan = networks.resnet(8), replace(SMALL, method=method, normalise="channel")
    network(channels.training_images(digits, plan))  # gives the BatchNorms their statistics
    (plain, *_), (normed, *_) = (channels.smaller(network, digits, replace(plan, norms=n)) for n in (False, True))
    kinds = [[type(module) for module in each.modules()] for each in (network, plain, normed)]
    assert [kind.count(torch.nn.BatchNorm2d) for kind in kinds] == [7, 0, 7]
    assert not normed.training
    images = channels.training_images(digits, plan)
    torch.testing.assert_close(normed(images), plain(images), rtol=1e-3, atol=1e-4)


def test_a_record_has_the_accuracy_at_three_points(digits: ImageData, places: Places) -> None:
    cp, fp, scratch = (run(replace(SMALL, method=method), digits, places) for method in ("cp", "fp", "scratch"))
    for record in (cp, fp, scratch):
        assert all(0 <= record[f"acc_{name}"] <= 100 for name in ("baseline", "pruned", "final"))
        assert record["flop_ratio"] == pytest.approx(2, rel=0.05)
        assert record["steps"] == 4
        assert record["notes"]["seconds_choice"] >= 0
    assert {"error", "error_before", "kept"} <= cp["notes"]["layers"][0].keys()
    assert "acc_before_refit" in cp["notes"]
    assert "acc_before_refit" not in fp["notes"]
    assert len({record["baseline_id"] for record in (cp, fp, scratch)}) == 1


def test_the_settings_reach_the_pruning(digits: ImageData) -> None:
    network, plan = networks.resnet(8, shortcut="projection").eval(), replace(SMALL, normalise="channel", images=20)
    x = channels.training_images(digits, plan)[:4]
    plain, *_ = channels.smaller(network, digits, plan)
    expected = plain.eval()(x).detach()
    changes: list[dict] = [{"correct": False}, {"samplers": False}, {"select": "random"}, {"seed": 1}]
    for change in changes:
        small, *_ = channels.smaller(network, digits, replace(plan, **change))
        assert float((small.eval()(x).detach() - expected).abs().max()) > 1e-3, change
    renewed, *_ = channels.smaller(network, digits, replace(plan, renew=True))
    torch.testing.assert_close(renewed.eval()(x), expected, rtol=1e-3, atol=1e-3)  # in evaluation the same function
    means = [each.get_submodule("blocks.0.bn2").running_mean for each in (plain, renewed)]
    assert not torch.equal(*means)  # type: ignore[arg-type]


def test_without_the_refit_the_same_channels_keep_their_weights(digits: ImageData) -> None:
    network, images = networks.create("convnet"), channels.training_images(digits, SMALL)
    plan = replace(SMALL, method="cp")
    (fitted, bare, notes), (small, none, same) = (
        channels.smaller(network, digits, replace(plan, refit=refit)) for refit in (True, False)
    )
    assert none is None
    assert bare is not None
    assert [layer["kept"] for layer in notes["layers"]] == [layer["kept"] for layer in same["layers"]]
    assert largest_difference(bare, small, images[:20]) < 1e-12
    assert largest_difference(fitted, small, images[:20]) > 1e-3


def test_what_is_recorded_keeps_its_id() -> None:
    plain = Experiment("e", method="cp")
    for name, value in {
        "select": "paper",
        "samplers": False,
        "correct": False,
        "renew": True,
        "refit": False,
        "masks": "expected",
    }.items():
        assert replace(plain, **{name: value}).run_id != plain.run_id
        assert replace(plain, **{name: getattr(plain, name)}).run_id == plain.run_id


def test_the_lists_share_the_committed_baseline() -> None:
    root = Path(__file__).parent.parent / "data"
    lists = {path.stem: path for path in (root / "experiments").glob("c[1-6]*.json")}
    assert sorted(name[:2] for name in lists) == ["c1", "c2", "c3", "c4", "c5", "c6"]
    vgg = {e.baseline().run_id for name, path in lists.items() if "c5" not in name for e in expand(path) if e.seed == 0}
    assert len(vgg) == 1, "the tables of VGG-16 share a baseline"
    (resnet,) = {e.baseline().run_id for e in expand(lists["c5-resnet56"])}
    assert list((root / "checkpoints").glob(f"resnet56-projection-cifar10-seed0-{resnet}.safetensors"))
