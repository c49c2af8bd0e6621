"""Compact networks against the masked ones they come from."""

from __future__ import annotations

import copy
import io
import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from training.networks import NETWORKS, create

from sppkit import compact as module
from sppkit.compact import ColumnConv2d, SampledConv2d, channel_links, compact, convolutions, largest_difference


def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """BatchNorms with shifts and statistics of their own: a removed channel is missed if it still spoke."""
    generator = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.uniform_(0.5, 1.5, generator=generator)
            layer.bias.data.normal_(0, 0.5, generator=generator)
            layer.running_mean.normal_(0, 0.5, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
        elif isinstance(layer, nn.Conv2d) and layer.bias is not None:
            layer.bias.data.normal_(0, 0.1, generator=generator)
    return network.eval()


def mask_columns(network: nn.Module, share: float = 0.5, channels: float = 0.2, seed: int = 1) -> nn.Module:
    """Zero random columns of every convolution, and of some input channels all of them."""
    generator = torch.Generator().manual_seed(seed)
    for conv in convolutions(network).values():
        keep = torch.rand(conv.weight.shape[1:], generator=generator) >= share  # (C, kh, kw)
        keep &= (torch.rand(len(keep), generator=generator) >= channels)[:, None, None]
        conv.weight.data *= keep
    return network


def calibrate(network: nn.Module, x: Tensor) -> nn.Module:
    """Scale convolutions and BatchNorms for `x`: images still differ at the end of a deep network."""

    def scale(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        layer.weight.data /= output.std()
        return layer._conv_forward(inputs[0], layer.weight, layer.bias)

    def centre(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        shift = layer.running_mean.clone()
        layer.running_mean.copy_(inputs[0].mean((0, 2, 3)) + 0.1 * shift)
        layer.running_var.mul_(inputs[0].var((0, 2, 3)) + 0.1)

    handles = []
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            handles.append(layer.register_forward_hook(scale))
        elif isinstance(layer, nn.BatchNorm2d):
            handles.append(layer.register_forward_pre_hook(centre))
    out(network, x)
    for handle in handles:
        handle.remove()
    return network


def images(size: int = 32, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(2))


def out(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network.eval()(x)


LINKS = {"convnet": 2, "resnet20": 9, "resnet20-projection": 9, "vgg16-bn": 12, "vgg16": 12}
LINKS |= {"torchvision/alexnet": 4, "torchvision/resnet50": 32, "torchvision/vgg16": 12}
LINKS |= {"resnet56": 27, "resnet56-projection": 27}
assert LINKS.keys() == NETWORKS.keys()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("convnet", 32),
        ("resnet20", 32),
        ("resnet20-projection", 32),
        ("vgg16-bn", 32),
        ("vgg16", 32),
        ("resnet56", 32),
        ("resnet56-projection", 32),
        ("torchvision/alexnet", 64),
        ("torchvision/resnet50", 64),
        ("torchvision/vgg16", 32),
    ],
)
def test_compact_computes_what_the_masked_network_computes(name: str, size: int) -> None:
    x = images(size).double() * (60 if name == "convnet" else 1)
    network = calibrate(mask_columns(randomise(create(name))).double(), x)
    expected, small = out(network, x), compact(network)
    spread = float((expected[0] - expected[1]).abs().max())  # how far the output depends on the image
    assert spread > 0.05 * float(expected.abs().max())
    torch.testing.assert_close(out(small, x), expected, rtol=0, atol=1e-9 * spread)
    dense = convolutions(network)
    layers = {name: layer for name, layer in small.named_modules() if hasattr(layer, "in_channels")}
    assert layers.keys() == dense.keys()
    assert all(layer.weight.ne(0).any(0).all() for layer in layers.values())  # no zero column is left
    plain = {name: layer for name, layer in layers.items() if not isinstance(layer, SampledConv2d)}
    removed = [name for name, layer in plain.items() if layer.in_channels < dense[name].in_channels]
    assert set(removed) <= set(channel_links(network)) | {
        "layer1.0.conv1",
        "layer1.0.downsample.0",
    }  # those of the stem
    assert len(removed) + sum(name in channel_links(network) for name in layers.keys() - plain.keys()) >= LINKS[name]
    assert len(channel_links(network)) == LINKS[name]
    parameters = sum(p.numel() for p in small.parameters())
    assert parameters < sum(p.numel() for p in network.parameters())


def test_the_original_is_left_alone() -> None:
    network = mask_columns(randomise(create("resnet20"))).train()
    before = copy.deepcopy(network.state_dict())
    small = compact(network, images())
    assert network.training
    assert small.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    small.conv1.weight.data.fill_(7.0)
    small.linear.weight.data.fill_(7.0)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"stride": (2, 3), "padding": (0, 2)},
        {"dilation": 2, "padding": 2},
        {"dilation": (1, 3), "padding": (3, 1), "stride": (3, 1)},
        {"kernel_size": (1, 5), "bias": False},
        {"kernel_size": 1, "stride": 2},
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_column_convolution_is_the_masked_convolution(options: dict[str, object], batch: int) -> None:
    settings = {"kernel_size": (3, 2)} | options
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = nn.Conv2d(4, 5, **settings).double()  # type: ignore[arg-type]
    total = conv.weight[0].numel()
    kept = torch.randperm(total, generator=torch.Generator().manual_seed(3))[: total // 2].sort().values
    mask = torch.zeros(total, dtype=torch.double)
    mask[kept] = 1
    x = torch.randn(batch, 4, 11, 9, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    column = ColumnConv2d(conv, kept)
    conv.weight.data *= mask.view(1, *conv.weight.shape[1:])
    torch.testing.assert_close(out(column, x), out(conv, x), rtol=1e-12, atol=1e-12)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out(column, last), out(conv, x), rtol=1e-12, atol=1e-12)
    assert column.weight.shape == (5, total // 2)


def test_no_tensor_holds_a_column_that_is_not_kept() -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):  # a view makes nothing
                self.elements = max(self.elements, made.untyped_storage().nbytes() // made.element_size())
            return made

    kept = torch.arange(0, 64 * 9, 8)
    column = ColumnConv2d(nn.Conv2d(64, 5, 3, padding=1), kept)
    with torch.no_grad(), Largest() as largest:
        column(torch.randn(1, 64, 10, 10))
    assert largest.elements == max(len(kept) * 10 * 10, 64 * 12 * 12)  # its matrix, or the padded input


def test_other_columns_of_a_state_are_read_as_they_are() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 5, 3, padding=1), torch.randn(2, 4, 6, 6)
    one, other = (ColumnConv2d(conv, torch.tensor(kept)) for kept in ([0, 9, 18, 27], [4, 5, 14, 35]))
    state, order = other.state_dict(), torch.tensor([2, 0, 3, 1])  # in whatever order they were saved
    one.load_state_dict(state | {"weight": state["weight"][:, order], "index": state["index"][order]})
    torch.testing.assert_close(out(one, x), out(other, x))


def test_no_kept_column_leaves_the_bias() -> None:
    conv = nn.Conv2d(4, 5, 3, padding=1)
    column = ColumnConv2d(conv, torch.zeros(0, dtype=torch.int64))
    found = out(column, images(6, channels=4))
    assert torch.equal(found, conv.bias.detach()[None, :, None, None].expand(2, 5, 6, 6))
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    nn.init.zeros_(network[2].weight)
    small = compact(network, images(8))  # every channel in between is dead; one stays
    assert small[0].out_channels == 1
    assert small[2].weight.shape == (2, 1)  # and so does one column, of zeros
    assert not small[2].weight.any()


@pytest.mark.parametrize("stride", [1, 2])
def test_many_images_are_gathered_in_parts_that_a_cache_holds(monkeypatch: pytest.MonkeyPatch, stride: int) -> None:
    conv = nn.Conv2d(4, 5, 3, stride, 1)
    column, x, read = ColumnConv2d(conv, torch.arange(36)), images(6, 5, 4), list[int]()
    conv2d = F.conv2d

    def counted(given: Tensor, *others: Tensor) -> Tensor:
        read.append(len(given))
        return conv2d(given, *others)

    monkeypatch.setattr(F, "conv2d", counted)
    with torch.no_grad():
        for cached, parts in ((1, [1] * 5), (2 * 36 * 4 * 36, [2, 2, 1]), (2**22, [5])):
            monkeypatch.setattr(module, "CACHED", cached)
            found = column(x)
            assert read == parts
            torch.testing.assert_close(found, conv2d(x, conv.weight, conv.bias, stride, 1))
            read.clear()
        assert column(x[:0]).shape == conv(x[:0]).shape


def test_nothing_is_replaced_where_every_column_is_kept() -> None:
    network = randomise(create("resnet20"))
    small = compact(network)
    assert not any(isinstance(layer, ColumnConv2d) for layer in small.modules())
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}
    assert torch.equal(out(small, images()), out(network, images()))


def test_dead_channels_leave_their_producer_and_its_batch_norm() -> None:
    network = randomise(create("vgg16-bn"))
    dead = torch.tensor([3, 10, 63])
    network.features[3].weight.data[:, dead] = 0  # the second convolution ignores three channels of the first
    small = compact(network, images())
    first, norm, second = small.features[0], small.features[1], small.features[3]
    alive = torch.tensor([k for k in range(64) if k not in dead])
    assert (first.out_channels, norm.num_features, second.in_channels) == (61, 61, 61)
    assert torch.equal(first.weight, network.features[0].weight[alive])
    for key in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(norm, key), getattr(network.features[1], key)[alive])
    assert torch.equal(second.weight, network.features[3].weight[:, alive])
    assert not any(isinstance(layer, ColumnConv2d) for layer in small.modules())
    assert small.features[3].out_channels == 64
    small.train()(images()).sum().backward()  # it can be trained on
    assert first.weight.grad.shape == first.weight.shape


def test_removal_runs_through_from_the_last_layer_to_the_first() -> None:
    """A filter that goes takes its input channels along: they may be the last of a producer's channel."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    network[4].weight.data[:, 1] = 0
    network[2].weight.data[[0, 2, 3], 3] = 0  # channel 3 is read by filter 1 alone, and nothing reads that
    small = compact(network, images(12))
    assert [small[k].weight.shape[:2] for k in (0, 2, 4)] == [(3, 3), (3, 3), (2, 3)]


def test_a_channel_stays_while_one_of_several_readers_needs_it() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(self.stem(x).relu(), 2)
            return self.left(x) - self.right(x)

    network = Fork().eval()
    network.left.weight.data[:, [0, 1, 2]] = 0
    network.right.weight.data[:, [1, 2, 3]] = 0
    small = compact(network, images(8))
    assert small.stem.out_channels == 4
    assert isinstance(small.left, SampledConv2d)
    assert len(small.left.index) == 3
    assert channel_links(network) == {}


@pytest.mark.parametrize("name", ["resnet20", "resnet20-projection"])
def test_channels_that_feed_a_sum_stay(name: str) -> None:
    network = randomise(create(name))
    for block in network.blocks:  # no convolution reads channel 0 of the sums, nor channel 2 inside the blocks
        block.conv1.weight.data[:, 0] = 0
        block.conv2.weight.data[:, 2] = 0
    small = compact(network, images())
    assert small.conv1.out_channels == 16
    for dense, block in zip(network.blocks, small.blocks, strict=True):
        assert block.conv1.weight.shape[0] == dense.conv1.out_channels - 1
        assert block.bn1.num_features == dense.conv1.out_channels - 1
        assert block.conv2.out_channels == block.bn2.num_features == dense.conv2.out_channels


def test_channels_that_feed_a_linear_layer_a_concatenation_or_a_grouped_convolution_stay() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)
            self.grouped, self.d = nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1)
            self.linear = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.c(torch.cat([self.a(x), self.b(x)], 1))
            return self.linear(self.d(self.grouped(x)).mean((2, 3)))

    network = Mixed().eval()
    network.c.weight.data[:, 2] = 0
    network.grouped.weight.data[:2, 0] = 0
    network.d.weight.data[:, 1] = 0
    network.linear.weight.data[:, 1] = 0
    small = compact(network, images(5))
    assert channel_links(network) == {}
    assert [small.get_submodule(k).out_channels for k in ("a", "b", "c", "grouped", "d")] == [4] * 5
    assert isinstance(small.c, SampledConv2d)
    assert isinstance(small.grouped, nn.Conv2d)


def test_links_of_the_networks_read_by_eye() -> None:
    assert channel_links(create("convnet")) == {"conv2": "conv1", "conv3": "conv2"}
    inside = {f"blocks.{k}.conv2": f"blocks.{k}.conv1" for k in range(9)}
    assert channel_links(create("resnet20")) == inside
    assert channel_links(create("resnet20-projection")) == inside
    convs = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    chain = {f"features.{b}": f"features.{a}" for a, b in itertools.pairwise(convs)}
    assert channel_links(create("vgg16")) == chain


def test_a_shared_convolution_is_refused() -> None:
    conv = nn.Conv2d(3, 3, 3)
    with pytest.raises(ValueError, match="layer '0' is called twice; give each place a convolution of its own"):
        compact(nn.Sequential(conv, nn.ReLU(), conv))


def test_a_network_that_cannot_be_traced_is_refused() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"Branching cannot be traced by torch\.fx: "):
        channel_links(Branching())


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.Conv2d(3, 4, 3, padding="valid"),
        nn.Conv2d(3, 4, (1, 5), padding="same", dilation=(1, 2)),
        nn.Conv2d(3, 4, 3, padding=(2, 1), stride=2, padding_mode="circular"),
    ],
    ids=["reflect", "same", "valid", "uneven", "circular"],
)
def test_any_padding_is_that_of_the_convolution(conv: nn.Conv2d) -> None:
    network = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    conv.weight.data[:, :, 0, 1] = 0
    network[2].weight.data[:, 1] = 0
    small = compact(network)
    torch.testing.assert_close(out(small, images(7)), out(network, images(7)))
    assert small[0].out_channels == 3
    assert isinstance(small[0], ColumnConv2d)


def test_a_wrong_compaction_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    network = mask_columns(randomise(create("resnet20")))
    assert largest_difference(network, compact(network), images()) < 1e-12

    class Wrong(ColumnConv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.01

    monkeypatch.setattr(module, "ColumnConv2d", Wrong)
    compact(network)  # unasked, it does not compare
    with pytest.raises(RuntimeError, match=r"compact and masked outputs differ by .* more than 1e-09"):
        compact(network, images())
    compact(network, images(), tolerance=10.0)

    class Broken(ColumnConv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * math.nan

    monkeypatch.setattr(module, "ColumnConv2d", Broken)
    with pytest.raises(RuntimeError, match="differ by nan"):
        compact(network, images(), tolerance=10.0)


def test_largest_difference_is_relative_and_restores_modes() -> None:
    one, other = nn.Linear(2, 2, bias=False).train(), nn.Linear(2, 2, bias=False).eval()
    one.weight.data = torch.tensor([[4.0, 0], [0, 1]])
    other.weight.data = torch.tensor([[4.0, 0], [0, 1.5]])
    assert largest_difference(one, other, torch.tensor([[1.0, 1]])) == pytest.approx(0.5 / 4)
    assert (one.training, other.training) == (True, False)


def test_compacting_twice_is_compacting_once() -> None:
    network = mask_columns(randomise(create("convnet")))
    once = compact(network)
    twice = compact(once)
    shapes = [{name: value.shape for name, value in net.state_dict().items()} for net in (once, twice)]
    assert shapes[0] == shapes[1]
    assert torch.equal(out(once, images()), out(twice, images()))


def test_a_state_dict_goes_through_a_file_without_code() -> None:
    network = mask_columns(randomise(create("vgg16-bn")))
    small, same = compact(network), compact(network)
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for value in same.state_dict().values():
        value.zero_()
    same.load_state_dict(loaded)
    assert torch.equal(out(small, images()), out(same, images()))
    assert sum(name.endswith("index") for name in loaded) == 13


def test_a_sampled_network_can_be_pruned_and_compacted_again() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.read, self.end = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return x + self.end(self.read(x).relu())

    network = Fork().eval()
    network.read.weight.data[:, [1, 4]] = 0
    once = compact(network, images(9))
    assert isinstance(once.read, SampledConv2d)
    assert once.read.index.tolist() == [0, 2, 3, 5]
    once.read.weight.data[:, 1] = 0  # channel 2
    twice = compact(once, images(9))
    assert twice.read.index.tolist() == [0, 3, 5]
    assert twice.stem.out_channels == 6
    twice.read.weight.data[:, 2, 0, 1] = 0  # one column of channel 5
    thrice = compact(twice, images(9))
    assert isinstance(thrice.read, ColumnConv2d)
    assert 5 * 9 + 1 not in thrice.read.index
    assert len(thrice.read.index) == 26


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_sampler_keeps_the_layout_of_what_it_reads(layout: torch.memory_format) -> None:
    conv, x = nn.Conv2d(8, 5, 3, padding=(1, 0), stride=2), torch.randn(2, 8, 9, 7)
    kept = torch.tensor([1, 2, 6])
    sampled = SampledConv2d(conv, kept)
    with torch.no_grad():
        conv.weight[:, [0, 3, 4, 5, 7]] = 0
        read = x.to(memory_format=layout)
        torch.testing.assert_close(sampled(read), conv(x), rtol=1e-5, atol=1e-5)
        assert sampled(read).is_contiguous(memory_format=layout)


def test_the_dense_form_of_a_sampler_reads_every_channel() -> None:
    conv, x = nn.Conv2d(8, 5, 3, padding=1), torch.randn(2, 8, 9, 7)
    once = SampledConv2d(conv, torch.tensor([0, 2, 3, 7]))
    twice = SampledConv2d(once, torch.tensor([1, 3]))  # channels 2 and 7
    for sampled, kept in ((once, [0, 2, 3, 7]), (twice, [2, 7])):
        dense = sampled.dense()
        assert dense.weight.shape == (5, 8, 3, 3)
        assert dense.weight.ne(0).any(0).flatten(1).any(1).nonzero().flatten().tolist() == kept
        with torch.no_grad():
            torch.testing.assert_close(dense(x), sampled(x), rtol=1e-5, atol=1e-5)
    columns = ColumnConv2d(once, torch.arange(0, 36, 5))
    with torch.no_grad():
        torch.testing.assert_close(columns.dense()(x), columns(x), rtol=1e-5, atol=1e-5)
