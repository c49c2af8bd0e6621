"""Networks made ready to run: the same outputs, engines by measurement, and what is refused."""

from __future__ import annotations

import copy

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from training import networks

from sppkit import fast, timing
from sppkit.compact import ColumnConv2d, SampledConv2d, compact, convolutions


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(name: str) -> nn.Module:
    """A network whose BatchNorms have seen something."""
    network = networks.create(name, seed=1)
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
    return network.eval()


def masked(name: str) -> nn.Module:
    """Three quarters of the columns of each inner convolution are zero."""
    network, generator = trained(name), torch.Generator().manual_seed(2)
    for layer, conv in list(timing.convolutions(network).items())[1:]:
        gone = torch.rand(conv.weight[0].shape, generator=generator) < 0.75
        assert gone.any(), layer
        conv.weight.data[:, gone] = 0
    return network


def columns(network: nn.Module) -> list[ColumnConv2d]:
    return [module for module in network.modules() if isinstance(module, ColumnConv2d)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["convnet", "resnet20-projection"])
def test_the_function_stays_and_batchnorm_is_gone(name: str, channels_last: bool, images: Tensor) -> None:
    network = trained(name)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    ready = fast.optimise(network, images, channels_last=channels_last)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ready.modules())
    torch.testing.assert_close(ready(images), network(images), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    weights = [
        module.weight for module in ready.modules() if isinstance(module, nn.Conv2d) and module.kernel_size > (1, 1)
    ]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) == channels_last for weight in weights)


def test_bf16_is_near_and_comes_back_as_float32(images: Tensor) -> None:
    network = trained("resnet20-projection")
    out, expected = fast.optimise(network, images, dtype=torch.bfloat16)(images), network(images).detach()
    assert out.dtype == torch.float32
    assert not out.requires_grad
    assert 0 < float((out - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("name", ["convnet", "resnet20-projection"])
def test_each_engine_computes_what_the_masked_network_does(name: str, images: Tensor) -> None:
    expected, small = masked(name)(images), compact(masked(name), images)
    count = len(columns(small))
    assert count > 1
    for engine, left in (("gathered", {count}), ("dense", {0}), ("measured", {*range(count + 1)})):
        ready = fast.optimise(small, images, engine=engine)
        assert len(columns(ready)) in left
        torch.testing.assert_close(ready(images), expected, rtol=1e-4, atol=1e-4)
    assert len(columns(small)) == count, "the compact network itself stays"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_faster_engine_stays_layer_by_layer(
    images: Tensor, monkeypatch: pytest.MonkeyPatch, layout: torch.memory_format
) -> None:
    small = compact(masked("resnet20-projection"), images)
    seen = list[tuple[int, ...]]()

    def clock(modules: dict[str, nn.Module], example: Tensor, rounds: int) -> pd.DataFrame:
        """Dense is faster in every second layer, not as a whole."""
        if isinstance(modules["old"], fast.Ready):
            return pd.DataFrame([{"old": 1.0, "new": 2.0}])
        seen.append(tuple(example.shape))
        assert example.is_contiguous(memory_format=layout)  # as a dense neighbour gives it
        outputs = [module(example) for module in modules.values()]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
        return pd.DataFrame([{"old": 2.0, "new": 1.0 + 2 * (len(seen) % 2)}] * rounds)

    monkeypatch.setattr(fast, "milliseconds", clock)
    ready = fast.optimise(small, images, channels_last=layout == torch.channels_last, multiple=1)
    taken, left = ([m for m in net.modules() if isinstance(m, fast.OWN)] for net in (small, ready))
    assert len(seen) == len(taken) > len(columns(small)) > 10
    assert len(left) == -(-len(seen) // 2)
    assert {shape[0] for shape in seen} == {4}


def test_a_network_is_dense_where_its_columns_pay_by_themselves_alone(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = compact(masked("resnet20-projection"), images)

    def clock(modules: dict[str, nn.Module], example: Tensor, rounds: int) -> pd.DataFrame:
        torch.testing.assert_close(*(module(example) for module in modules.values()), rtol=1e-4, atol=1e-4)
        return pd.DataFrame([{"old": 1.0, "new": whole[0] if isinstance(modules["old"], fast.Ready) else 2.0}])

    monkeypatch.setattr(fast, "milliseconds", clock)
    for dense, left in ((1.1, len(columns(small))), (0.9, 0)):
        whole = [dense]
        ready = fast.optimise(small, images, multiple=1)
        assert len(columns(ready)) == left
        torch.testing.assert_close(ready(images), small(images), rtol=1e-4, atol=1e-4)


def test_a_dense_layer_stands_in_for_a_sampler_that_costs_more(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    network = trained("resnet20-projection")
    for name, conv in timing.convolutions(network).items():
        if name.endswith("conv1") and name != "conv1":
            conv.weight.data[:, ::2] = 0
    small = compact(network)
    samplers = [name for name, module in small.named_modules() if isinstance(module, SampledConv2d)]
    assert len(samplers) > 5
    frame = {"old": [2.0], "new": [1.0]}
    monkeypatch.setattr(fast, "milliseconds", lambda *_: pd.DataFrame(frame))
    ready = fast.optimise(small, images, multiple=1)
    assert not any(isinstance(module, SampledConv2d) for module in ready.modules())
    torch.testing.assert_close(ready(images), network(images), rtol=1e-4, atol=1e-4)
    frame["new"] = [3.0]
    left = fast.optimise(small, images, multiple=1).network.named_modules()
    assert [name for name, module in left if isinstance(module, SampledConv2d)] == samplers


def widths(network: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (conv.in_channels, conv.out_channels) for name, conv in convolutions(network).items()}


@pytest.mark.parametrize("name", ["convnet", "resnet20-projection", "vgg16", "torchvision/resnet50"])
def test_filled_up_widths_are_multiples_and_the_function_stays(name: str, images: Tensor) -> None:
    network, images = trained(name).double(), images.double()
    full, _ = fast.fold(network)
    fast.fill_up(full, 24)  # divides no width of these networks, in the stream of residual blocks neither
    found, before = widths(full), widths(network)
    image = next(iter(found))
    for layer, (inputs, outputs) in found.items():
        assert outputs % 24 == 0, layer
        assert outputs - before[layer.removesuffix(".1") if layer == image else layer][1] < 24, layer
        assert inputs % 24 == 0, layer  # the image's three channels too
    assert f"{image.rpartition('.')[0]}.0" in dict(full.named_modules())  # zeros are laid beside it
    torch.testing.assert_close(full(images), network(images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fastest", ["1", "16"])
def test_widths_are_filled_up_where_that_is_faster(
    images: Tensor, monkeypatch: pytest.MonkeyPatch, fastest: str
) -> None:
    network = nn.Sequential(nn.Conv2d(3, 11, 3), nn.ReLU(), nn.Conv2d(11, 20, 3), nn.ReLU(), nn.Conv2d(20, 4, 3)).eval()
    asked = list[list[str]]()

    def clock(modules: dict[str, nn.Module], example: Tensor, rounds: int) -> pd.DataFrame:
        asked.append([*modules])
        return pd.DataFrame({name: [1.0 if name == fastest else 2.0] for name in modules})

    monkeypatch.setattr(fast, "milliseconds", clock)
    ready = fast.optimise(network, images)
    wanted = {"1": [11, 20, 4], "16": [16, 32, 4]}[fastest]
    assert [conv.out_channels for conv in convolutions(ready).values()] == wanted
    torch.testing.assert_close(ready(images), network(images), rtol=1e-4, atol=1e-5)
    for settings in ({"engine": "dense"}, {"multiple": 1}):  # nothing to choose from
        ready = fast.optimise(network, images, **settings)
        assert next(iter(convolutions(ready).values())).out_channels == 11
    assert asked == [["1", "16"]]


@pytest.mark.parametrize(
    ("width", "multiple", "full"),
    [(59, 8, 64), (56, 8, 64), (55, 8, 56), (118, 32, 128), (100, 32, 128), (111, 8, 112), (470, 16, 512), (64, 8, 64),
     (59, 1, 59), (60, 24, 72), (60, 128, 128), (65, 8, 72)],
)  # fmt: skip
def test_what_is_nearly_a_full_tile_becomes_one(width: int, multiple: int, full: int) -> None:
    network, images = nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU(), nn.Conv2d(width, 2, 1)), torch.randn(2, 3, 4, 4)
    expected = network(images)
    fast.fill_up(network, multiple)
    assert network[2].in_channels == full
    torch.testing.assert_close(network(images), expected)


@pytest.mark.parametrize("columns_first", [False, True])
def test_filled_up_columns_lie_in_memory_as_before(columns_first: bool) -> None:
    """A kernel that wants them columns first would turn them in every call."""
    torch.manual_seed(0)
    column = ColumnConv2d(nn.Conv2d(16, 60, 3), torch.arange(0, 144, 2))
    if columns_first:
        column.weight.data = column.weight.data.T.contiguous().T
    network, images = nn.Sequential(column, nn.ReLU(), nn.Conv2d(60, 4, 1)), torch.randn(2, 16, 5, 5)
    with torch.no_grad():
        expected = network(images)
        fast.fill_up(network, 8)
        assert column.weight.shape == (64, 72)
        assert (column.weight.T if columns_first else column.weight).is_contiguous()
        torch.testing.assert_close(network(images), expected)


def test_what_else_needs_its_number_of_channels_keeps_it(images: Tensor) -> None:
    """Option A's zeros lie in the middle of the channels; the output's are classes."""
    network = trained("resnet20")
    full, _ = fast.fold(network)
    fast.fill_up(full, 24)
    found = {name: outputs for name, (_, outputs) in widths(full).items() if name.startswith("blocks")}
    assert {outputs for name, outputs in found.items() if name.endswith("conv1")} == {24, 48, 72}
    assert {outputs for name, outputs in found.items() if name.endswith("conv2")} == {16, 32, 64}
    torch.testing.assert_close(full(images), network(images), rtol=1e-4, atol=1e-4)
    alone = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
    fast.fill_up(alone, 8)
    assert widths(alone) == {"0.1": (8, 5)}
    with pytest.raises(ValueError, match="multiple=0"):
        fast.optimise(alone, images, multiple=0)


class Many(nn.Module):
    """Channels in every position that is not to be touched."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.deep, self.norm = nn.Conv2d(6, 6, 1, groups=6), nn.BatchNorm2d(6)
        self.one, self.wide = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 6, 1)
        self.last, self.rows = nn.Conv2d(12, 5, 1), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(self.twice(self.first(x)))  # the same weights for two values
        z = self.norm((self.one(x) + self.wide(x)).relu())  # one channel spread over six; a norm that is not folded
        return self.rows(self.last(torch.cat([self.deep(y), z], 1)).relu())  # linear over pixels, not channels


def test_channels_that_cannot_be_filled_up_are_left_alone() -> None:
    network, images = Many().eval(), torch.randn(2, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    full = copy.deepcopy(network)
    fast.fill_up(full, 8)
    assert widths(full) == widths(network)
    torch.testing.assert_close(full(images), network(images))


class Named(nn.Module):
    """Modules called like methods and like the nodes of a graph."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.a, self.add, self.output = nn.Conv2d(3, 6, 3, padding=1), between, nn.Conv2d(6, 4, 3)

    def forward(self, output: Tensor) -> Tensor:
        return self.output(self.add(self.a(output)))


@pytest.mark.parametrize("between", [nn.Softmax(1), nn.GroupNorm(1, 6), nn.ReLU()])
def test_names_of_modules_mean_nothing(between: nn.Module, images: Tensor) -> None:
    network = Named(between).eval()
    full, read = copy.deepcopy(network), copy.deepcopy(network)
    fast.fill_up(full, 8)
    torch.testing.assert_close(full(images), network(images))
    read.output.weight.data[:, :4] = 0
    small = compact(read)
    torch.testing.assert_close(small(images), read(images))
    assert widths(small)["a"] == (3, 2 if isinstance(between, nn.ReLU) else 6)


def test_a_shared_layer_keeps_its_width_and_that_of_what_it_is_added_to(images: Tensor) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.twice, self.e = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(3, 6, 1)
            self.alias, self.last = self.a, nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.twice(self.twice(self.alias(x))) + self.e(x))

    network = Shared().eval()
    full = copy.deepcopy(network)
    fast.fill_up(full, 8)
    torch.testing.assert_close(full(images), network(images))
    assert widths(full)["e.1"] == (8, 6)


def test_a_layer_or_a_norm_that_runs_twice_is_not_folded(images: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
            self.one, self.other = nn.BatchNorm2d(6), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.b(self.norm(self.a(x)).relu()))
            return self.one(self.b(y)) + self.other(self.b(y))

    network = Twice()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(str(module))))
            module.weight.data.fill_(1.5 if module is network.one else 0.5)
    folded, norms = fast.fold(network)
    assert norms == {}
    torch.testing.assert_close(folded(images), network.eval()(images))


@pytest.mark.parametrize("name", ["vgg16", "resnet20-projection"])
def test_columns_and_samplers_read_from_filled_up_channels(name: str, images: Tensor) -> None:
    network, generator = trained(name), torch.Generator().manual_seed(3)
    for layer, conv in [*convolutions(network).items()][1:]:
        gone = torch.rand(conv.in_channels, generator=generator) < 0.4
        assert gone.any(), layer
        conv.weight.data[:, gone] = 0  # channels of a shared input: a sampler
        if layer.endswith(("0", "conv2")):
            conv.weight.data[:, torch.rand(conv.weight[0].shape, generator=generator) < 0.5] = 0
    small = compact(network)
    kinds = {type(module) for module in small.modules()}
    assert ColumnConv2d in kinds
    assert SampledConv2d in kinds or name == "vgg16"
    full, _ = fast.fold(small)
    fast.fill_up(full, 8)
    assert all(outputs % 8 == 0 for _, outputs in widths(full).values())
    assert any(outputs % 8 for _, outputs in widths(small).values())
    torch.testing.assert_close(full(images), network(images), rtol=1e-4, atol=1e-4)
    dense = fast.optimise(small, images, multiple=8, engine="dense")
    assert len(timing.measure({"filled": dense}, images, rounds=1)) == 1


def test_a_masked_network_counts_as_one_however_full_it_is(images: Tensor) -> None:
    network = masked("convnet")
    fast.fill_up(network, 40)
    assert timing.masked(network)
    full, _ = fast.fold(trained("convnet"))
    for multiple in (20, 40):  # twice
        fast.fill_up(full, multiple)
    assert timing.convolutions(full)["conv2"].weight.shape[1] == 40
    assert timing.masked(full) is None


@pytest.mark.parametrize("padding", [0, 2, "same"])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_the_dense_form_of_columns_is_the_masked_convolution(padding: int | str, mode: str) -> None:
    conv = nn.Conv2d(5, 7, (3, 5), padding=padding, padding_mode=mode, dilation=1 if padding == "same" else (2, 1))
    conv.weight.data[:, torch.rand(conv.weight[0].shape, generator=torch.Generator().manual_seed(0)) < 0.6] = 0
    kept = conv.weight.data.flatten(1).ne(0).all(0).nonzero().flatten()
    dense, x = ColumnConv2d(conv, kept).dense(), torch.randn(2, 5, 11, 12)
    assert torch.equal(dense.weight, conv.weight)
    torch.testing.assert_close(dense(x), conv(x))


def test_padding_that_differs_from_side_to_side_has_no_dense_form() -> None:
    column = ColumnConv2d(nn.Conv2d(3, 4, 4, padding="same"), torch.arange(0, 48, 3))
    with pytest.raises(ValueError, match=r"padding \[1, 2, 1, 2\] differs from side to side"):
        column.dense()


def test_a_layer_without_a_dense_form_stays_with_its_columns(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 6, 4, padding="same"), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    column = ColumnConv2d(network[0], torch.arange(0, 48, 3))
    small = nn.Sequential(column, *network[1:])
    ready = fast.optimise(small, images)
    assert len(columns(ready)) == 1
    torch.testing.assert_close(ready(images), small(images).detach(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="differs from side to side"):
        fast.optimise(small, images, engine="dense")


def test_what_cannot_be_is_refused(images: Tensor) -> None:
    network = trained("convnet")
    for settings, words in (
        ({"engine": "fused"}, r"engine='fused' needs a GPU, bf16 or fp16, and columns in runs"),
        ({"engine": "triton"}, "engine='triton'.*measured, fused, gathered, dense"),
        ({"dtype": torch.int8}, r"dtype=torch\.int8"),
        ({"capture": True}, "CUDA graph, and the example is on cpu; capture=False"),
    ):
        with pytest.raises(ValueError, match=words):
            fast.optimise(network, images, **settings)
    with pytest.raises(ValueError, match=r"\(0, 3, 32, 32\): a batch of 0"):
        fast.optimise(network, images[:0])


def test_outputs_that_differ_are_an_error(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    small = compact(masked("convnet"), images)

    def wrong(self: ColumnConv2d) -> nn.Conv2d:
        conv = right(self)
        conv.weight.data.mul_(1.01)
        return conv

    right = ColumnConv2d.dense
    monkeypatch.setattr(ColumnConv2d, "dense", wrong)
    with pytest.raises(RuntimeError, match=r"outputs in torch\.float32 differ by"):
        fast.optimise(small, images, engine="dense")


def test_a_masked_network_is_not_timed_as_a_fast_one(images: Tensor) -> None:
    network = masked("convnet")
    with pytest.raises(ValueError, match=r"network 'pruned' is masked \(layer 'conv2'\).*`compact` it first"):
        timing.measure({"pruned": network}, images, rounds=1)
    small = compact(network, images)
    standing_in = fast.optimise(small, images, engine="dense")
    table = timing.measure({"columns": small, "dense": copy.deepcopy(standing_in)}, images, rounds=1)
    assert table.index.tolist() == ["columns", "dense"]
    with pytest.raises(ValueError, match="a batch of 0 has no speed"):
        timing.measure({"columns": small}, images[:0])
