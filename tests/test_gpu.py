"""The captured training step and networks made ready: skipped without a GPU.

Run on one with `python -m pytest tests/test_gpu.py`.
"""

import copy
from dataclasses import replace

import dense_layers
import engines
import pytest
import torch
from torch import nn
from training import Training, TrainingStep, data, loop, networks

from sppkit import fast, kernels
from sppkit.compact import ColumnConv2d
from sppkit.plan import make_plan
from sppkit.pruner import Pruner

pytestmark = pytest.mark.gpu
SETTINGS = Training(steps=40, batch_size=64, lr=1e-3, weight_decay=0.004, normalise="mean_image")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", device="cuda")


def make(seed=0):
    return networks.create("convnet", seed=seed).to("cuda")


def prune(network, **options):
    return Pruner(network, make_plan(network, torch.zeros(1, 3, 32, 32, device="cuda"), flop_ratio=2), **options)


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.mark.parametrize("pruned", [False, True])
def test_captured_and_eager_steps_are_equal_bit_for_bit(digits, pruned):
    # with deterministic kernels: otherwise two eager runs differ by 0.1 % of the way after 40 steps as well
    results = []
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        for capture in (False, True):
            network = make()
            pruner = prune(network, interval=4) if pruned else None
            run = TrainingStep(network, digits, SETTINGS, pruner=pruner, capture=capture)
            for step in range(SETTINGS.steps):
                if pruner is not None and step % pruner.interval == 0:
                    pruner.update()
                run.step(step)
            results.append((weights(network), run.totals.clone()))
    assert float((results[0][0] - weights(make())).norm()) > 0
    assert all(torch.equal(eager, captured) for eager, captured in zip(*results, strict=True))


def test_warming_up_and_capturing_leave_no_trace_in_the_weights(digits):
    network = networks.create("resnet20").to("cuda")
    before = copy.deepcopy(network.state_dict())
    run = TrainingStep(network, digits, replace(SETTINGS, normalise="channel"))
    run.batches.start_epoch(0)
    run.batches.select(0)
    run.set_rate(1e-3)
    run.record()
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert run.totals.tolist() == [0, 0]


def test_a_replay_sees_a_new_learning_rate(digits):
    network = make()
    run = TrainingStep(network, digits, replace(SETTINGS, momentum=0.0, weight_decay=0.0))
    run.step(0)
    steps = []
    for rate in (1e-3, 1e-2, 1e-9):
        run.batches.select(1)
        run.set_rate(rate)
        before = weights(network).clone()
        run.graph.replay()
        steps.append(float((weights(network) - before).norm()))
    assert steps[1] / steps[0] == pytest.approx(10, rel=0.2)
    assert steps[2] < 1e-4 * steps[0]


def test_a_replay_draws_new_masks_and_sees_new_probabilities(digits):
    network = make()
    pruner = prune(network, interval=1)  # masks are drawn for one step at a time
    run = TrainingStep(network, digits, SETTINGS, pruner=pruner)
    pruner.probability.fill_(0.5)
    run.step(0)
    masks = []
    for position in (1, 2):
        run.step(position)
        masks.append(pruner._mask.clone())
    assert not torch.equal(*masks)
    assert 0.4 < float(masks[0].float().mean()) < 0.6
    pruner.probability.fill_(1.0)
    run.step(3)
    assert float(pruner._mask.sum()) == 0


@pytest.mark.parametrize("count", [1, 2047, 100_003])
def test_the_kernels_do_what_the_operators_do(count, monkeypatch):
    results = []
    for gpu in (True, False):
        generator = torch.Generator("cuda").manual_seed(0)
        weight, first, second = torch.randn(3, count, generator=generator, device="cuda")
        keep = torch.rand(50, generator=generator, device="cuda") < 0.5
        groups = torch.randint(50, (count,), generator=generator, device="cuda", dtype=torch.int32)
        mask, masked = torch.zeros(count, dtype=torch.bool, device="cuda"), torch.full_like(weight, 7)
        if not gpu:
            for name in ("_hide", "_clear"):
                monkeypatch.setattr(kernels, name, None)
        assert gpu == (kernels._hide is not None)
        kernels.hide(weight, keep, groups.to(torch.uint16), mask, masked)
        kernels.clear(first, second, mask)
        results.append((mask, masked, first, second))
    assert torch.equal(mask, keep[groups])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_pruning_resumes_on_a_gpu(digits, tmp_path, monkeypatch, precision):
    settings = replace(SETTINGS, steps=200, precision=precision)
    results = []
    for stops in (False, True):
        network = make()
        pruner = prune(network, interval=2)
        path = tmp_path / f"{stops}.safetensors"
        if stops:
            with monkeypatch.context() as patch:
                patch.setattr(loop.time, "monotonic", iter(range(1000)).__next__)
                with pytest.raises(loop.OutOfTime, match="at step 30 of 200"):
                    loop.fit(network, digits, settings, pruner=pruner, checkpoint=path, deadline=31)
            network = make(seed=1)
            pruner = prune(network, interval=2, seed=1)
        history = loop.fit(network, digits, settings, pruner=pruner, checkpoint=path)
        assert pruner.updates == 100
        results.append((pruner.probability.clone(), history["loss"]))
    assert results[0][1].iloc[0] == pytest.approx(results[1][1].iloc[0], rel=1e-2)
    assert float(results[0][0].mean()) > 0.1
    assert float((results[0][0] - results[1][0]).abs().mean()) < 0.02


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_network_made_ready_answers_as_before(precision):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3)).eval()
    network.append(ColumnConv2d(nn.Conv2d(64, 16, 3, stride=2), torch.arange(0, 576, 3))).to("cuda")
    first, second = torch.randn(2, 5, 3, 17, 18, device="cuda")
    with torch.no_grad():
        for last in (False, True):
            for engine in ("measured", "gathered", "dense"):
                ready = fast.optimise(network, first, dtype=precision, channels_last=last, engine=engine, capture=True)
                for x in (first, second):
                    expected = network(x)
                    error = (ready(x) - expected).abs().max() / expected.abs().max()
                    assert float(error) < (0.03 if precision == torch.bfloat16 else 0.01)  # TF32
    with pytest.raises(ValueError, match=r"captured for \(5, 3, 17, 18\)"):
        ready(first[:1])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_blocks_made_ready_answer_as_before_by_each_engine(precision):
    torch.manual_seed(0)
    blocks = (torch.rand(4, 9) < 0.3).repeat_interleave(16, 0).flatten().nonzero().flatten()
    network = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU()).eval()
    network.append(ColumnConv2d(nn.Conv2d(64, 72, 3, padding=1, stride=2), blocks)).to("cuda")
    x = torch.randn(5, 3, 17, 18, device="cuda")
    with torch.no_grad():
        expected = network(x)
        for last in (False, True):
            for engine in fast.ENGINES if precision == torch.bfloat16 else ("measured", "gathered", "dense"):
                ready = fast.optimise(network, x, dtype=precision, channels_last=last, engine=engine, capture=True)
                error = (ready(x) - expected).norm() / expected.norm()
                assert float(error) < (0.01 if precision == torch.bfloat16 else 2e-3)  # TF32
    for given in ((network[:2], torch.bfloat16), (network, torch.float32)):
        with pytest.raises(ValueError, match="engine='fused' needs a GPU, bf16 or fp16, and columns in runs"):
            fast.optimise(given[0], x, dtype=given[1], engine="fused")


@pytest.mark.parametrize(
    ("engine", "run"), [("columns", 1), ("blocks", 8), ("blocks", 16), ("fused", 16), ("fused", 32)]
)
@pytest.mark.parametrize("size", [7, 40])
def test_the_engines_on_trial_compute_what_the_masked_convolution_does(engine, run, size):
    torch.manual_seed(size)
    for precision, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        conv = nn.Conv2d(96, 200, 3, padding=1, stride=1 + size % 2).to("cuda", precision)
        keep = (torch.rand(96 // run, 9, device="cuda") < 0.3).repeat_interleave(run, 0).flatten()
        conv.weight.data.flatten(1)[:, ~keep] = 0
        x = torch.randn(3, 96, size, size + 3, device="cuda", dtype=precision)
        column = ColumnConv2d(conv, keep.nonzero().flatten())
        with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
            expected = conv.double()(x.double())
            for each in (x, x.to(memory_format=torch.channels_last), x.transpose(0, 1).contiguous().transpose(0, 1)):
                for layer in (engines.GatheredConv2d(column, engine), column):
                    assert float((layer(each).double() - expected).norm() / expected.norm()) < limit
            assert kernels._gather is not None, "the package gathers by its kernel"
            assert kernels._multiply is not None


@pytest.mark.parametrize("name", ["vgg16-bn", "resnet20", "torchvision/resnet50"])
def test_what_dense_layers_are_spared_on_trial_changes_no_answer(name):
    network, x = networks.create(name).to("cuda").eval(), torch.randn(3, 3, 32, 32, device="cuda")
    for precision, limit in ((torch.float32, 1e-2), (torch.bfloat16, 0.05)):
        ready = fast.optimise(network, x, dtype=precision, channels_last=True, tolerance=limit)
        with torch.no_grad():
            expected = network(x)
            for change in (dense_layers.rectified, dense_layers.own_kernels):
                ready.network = change(ready.network)
                assert float((ready(x) - expected).norm() / expected.norm()) < limit
    kinds = [type(module) for module in ready.modules()]
    assert dense_layers.ImageConv2d in kinds
    assert nn.MaxPool2d not in kinds


@pytest.mark.parametrize("sizes", kernels.FUSED)
def test_a_fused_layer_takes_a_pooling_in(sizes, monkeypatch):
    monkeypatch.setattr(kernels, "FUSED", (sizes,))
    torch.manual_seed(0)
    x = torch.randn(3, 96, 14, 18, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    conv = nn.Conv2d(96, sizes[1], 3, padding=1).to(x)
    keep = (torch.rand(6, 9, device="cuda") < 0.3).repeat_interleave(16, 0).flatten()
    conv.weight.data.flatten(1)[:, ~keep] = 0
    column = ColumnConv2d(conv, keep.nonzero().flatten())
    layer = engines.GatheredConv2d(column, "fused", relu=True)
    layer.pool = True
    with torch.no_grad():
        plain = conv.double()(x.double())
        expected = nn.functional.max_pool2d(plain.relu(), 2)
        found = layer(x)
        assert float((column(x).double() - plain).norm() / plain.norm()) < 1e-2, "the package's own"
    assert found.shape == expected.shape == (3, sizes[1], 7, 9)
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("width", [16, 17])
def test_two_places_at_once_on_a_gpu(width):
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 32, 3, padding=1).to("cuda", torch.bfloat16, memory_format=torch.channels_last)
    x = torch.randn(3, 32, 9, width, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        found, expected = dense_layers.PairedConv2d(conv, relu=True)(x), conv.double()(x.double()).relu()
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-2


def test_max_pooling_on_trial_is_torch_s():
    x = torch.randn(4, 40, 29, 30, device="cuda", dtype=torch.bfloat16)
    x[1, 2, 2, 4] = float("nan")
    for each in (x, x.to(memory_format=torch.channels_last), x.transpose(0, 1).contiguous().transpose(0, 1)):
        for how in ({"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}):
            found = dense_layers.MaxPool2d(**how)(each)
            assert torch.equal(found.nan_to_num(7), nn.MaxPool2d(**how)(each).nan_to_num(7))
            assert found.isnan().any()
