"""What dense layers can be spared: the same outputs, by the interpreter on the CPU where a kernel is asked."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import dense_layers
import pytest
import torch
from torch import Tensor, nn
from training import networks

from sppkit import fast
from sppkit.graph import fold


@pytest.fixture
def interpreted(interpret: Callable[[ModuleType], ModuleType]) -> ModuleType:
    module = interpret(dense_layers)
    module.TILES = {"image": {"PLACES": 64}, "pool": {"NUMBERS": 64}}  # small ones, so that there are several
    return module


def laid(x: Tensor) -> list[Tensor]:
    """Plain, channels last, channels first of all, and in no order that a kernel knows."""
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    return [x, x.to(memory_format=torch.channels_last), x.transpose(0, 1).contiguous().transpose(0, 1), turned]


@pytest.mark.parametrize(
    ("name", "inside", "sums"), [("resnet20", 10, 9), ("vgg16-bn", 13, 0), ("torchvision/resnet50", 33, 16)]
)
def test_networks_with_relus_and_sums_in_their_layers(name: str, inside: int, sums: int) -> None:
    network, x = networks.create(name).eval(), torch.randn(1, 3, 32, 32)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.bias)
    with torch.no_grad():
        expected = network(x)
        made = dense_layers.rectified(fold(network)[0])
        torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-4)
    found = [type(module) for module in made.modules()]
    assert found.count(dense_layers.Rectified) == inside
    assert found.count(dense_layers.Summed) == sums
    assert nn.ReLU not in found
    without = [module for module in made.modules() if isinstance(module, nn.Conv2d) and module.bias is None]
    assert len(without) == (4 if sums == 16 else 0)  # projections


class Sums(nn.Module):
    """A convolution, and what is added to it in some way."""

    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.how = nn.Conv2d(3, 3, 1), how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.conv(x), x)


def _read_again(y: Tensor, x: Tensor) -> Tensor:
    x = x + 1
    z = torch.relu(x.add_(y))
    return z + x


def _written(y: Tensor, x: Tensor) -> Tensor:
    return torch.relu(y + nn.functional.relu(x, inplace=True))


def _other_name(y: Tensor, x: Tensor) -> Tensor:
    x = x + 1
    z = x.view(x.shape)
    return torch.relu(z.add_(y)) + x


SUMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "sum": (lambda y, x: torch.relu(y + x), 1),
    "the other way": (lambda y, x: nn.functional.relu(torch.add(x, y)), 1),
    "in place": (lambda y, x: torch.relu(y.add_(x)), 1),
    "to itself": (lambda y, _: torch.relu(y + y), 0),
    "of a number": (lambda y, _: torch.relu(y + 2), 0),
    "scaled": (lambda y, x: torch.relu(torch.add(y, x, alpha=2)), 0),
    "read twice": (lambda y, x: torch.relu(y + x) + y, 0),
    "the sum read twice": (lambda y, x: torch.relu(y + x) + (y + x), 0),  # two sums for torch.fx
    "to what is written before": (_written, 0),
    "to another name of what is read": (_other_name, 0),
    "spread": (lambda y, x: torch.relu(y + x.mean((2, 3), keepdim=True)), 1),
    "written to and read again": (_read_again, 0),
    "no ReLU": (lambda y, x: y + x, 0),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_that_go_inside(name: str) -> None:
    how, inside = SUMS[name]
    network, x = Sums(how), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        expected = network(x.clone())
        made = dense_layers.rectified(network)
        torch.testing.assert_close(made(x.clone()), expected)
    assert [type(module) for module in made.modules()].count(dense_layers.Summed) == inside


class Two(nn.Module):
    """A sum of two convolutions, or of what became of them."""

    def __init__(self, how: Callable[[Tensor, Tensor, Tensor], Tensor], filters: int = 3) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Conv2d(3, filters, 1), nn.Conv2d(3, 3, 1), how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.a(x), self.b(x), x)


@pytest.mark.parametrize(
    ("how", "filters", "biases"),
    [
        (lambda a, b, _: torch.relu(b + a), 3, 1),
        (lambda a, b, _: torch.relu(b + torch.relu(a)), 3, 2),
        (lambda a, b, x: torch.relu(b + torch.relu(a + x)), 3, 2),
        (lambda a, b, _: torch.relu(b + a), 1, 2),
        (lambda a, b, _: torch.relu(b + a) + a, 3, 2),
    ],
)
def test_a_bias_moves_where_nothing_lies_between(how: Any, filters: int, biases: int) -> None:
    network, x = Two(how, filters), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        expected = network(x)
        made = dense_layers.rectified(network)
        torch.testing.assert_close(made(x), expected)
    assert sum(name.endswith("bias") for name, _ in made.named_parameters()) == biases


@pytest.mark.parametrize("how", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}])
def test_what_the_library_s_functions_would_pad_otherwise_stays_a_layer(how: dict[str, Any]) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, **how)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(x) + x)

    network, x = Padded(), torch.randn(1, 3, 5, 5)
    expected = network(x)
    made = dense_layers.rectified(network)
    torch.testing.assert_close(made(x), expected)
    assert dense_layers.Summed not in [type(module) for module in made.modules()]
    assert not dense_layers._is_plain(network.conv)


def test_padding_and_pooling_of_one_s_own_stay() -> None:
    pad = nn.Sequential(nn.ZeroPad3d((1, 1, 1, 1, 0, 0)), nn.Conv2d(3, 8, 3))
    kinds = [type(module) for module in dense_layers.own_kernels(pad).modules()]
    assert kinds == [nn.Sequential, nn.ZeroPad3d, dense_layers.ImageConv2d]
    both = nn.Sequential(nn.MaxPool2d(2, return_indices=True))
    assert type(dense_layers.own_kernels(both)[0]) is nn.MaxPool2d  # type: ignore[index]
    x = torch.randn(3, 4, 4)
    assert torch.equal(dense_layers.MaxPool2d(2)(x), nn.MaxPool2d(2)(x))  # one image without a batch


def test_a_layer_that_is_called_twice_keeps_its_relu_outside() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.relu(self.conv(x)))

    network, x = Twice(), torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(dense_layers.rectified(network)(x), network(x))


@pytest.mark.parametrize(("stride", "padding", "dilation"), [*itertools.product((1, 2), (0, 2), (1, 2))])
def test_an_image_s_convolution(interpreted: ModuleType, stride: int, padding: int, dilation: int) -> None:
    how = {"stride": stride, "padding": padding, "dilation": dilation, "bias": padding == 2}
    for kernel, filters, relu in (((3, 2), 7, False), ((5, 5), 20, True)):
        conv, x = nn.Conv2d(3, filters, kernel, **how), torch.randn(2, 3, 9, 11)  # type: ignore[arg-type]
        made = interpreted.ImageConv2d(conv, relu=relu)
        with torch.no_grad():
            expected = conv(x).relu() if relu else conv(x)
            for each in laid(x):
                torch.testing.assert_close(made(each), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(32, 8, 3), nn.Conv2d(3, 129, 3), nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(3, 8, 3, padding="same")],
)
def test_what_is_no_image_s_convolution_is_refused(conv: nn.Conv2d) -> None:
    with pytest.raises(ValueError, match=r"Conv2d\(.*: (an image's has at most 256 columns|padding is of zeros)"):
        dense_layers.ImageConv2d(conv)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (2, 5), "padding": (0, 3), "bias": False},
        {"kernel_size": (1, 2), "stride": (2, 1), "dilation": (3, 1)},
        {"kernel_size": 4, "padding": 2, "stride": (3, 1)},
    ],
)
def test_a_convolution_of_two_places_at_once(how: dict[str, Any], relu: bool) -> None:
    conv = nn.Conv2d(8, 5, **how)
    made = dense_layers.PairedConv2d(conv, relu=relu)
    assert made.weight.shape[0] == 10
    with torch.no_grad():
        for width in (10, 11):
            for x in laid(torch.randn(2, 8, 9, width)):
                expected = conv(x).relu() if relu else conv(x)
                torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ({"kernel_size": (3, 1)}, "share what they read"),
        ({"kernel_size": 3, "stride": 2}, "share what they read"),
        ({"kernel_size": 3, "dilation": 2}, "share what they read"),
        ({"kernel_size": 3, "groups": 2}, "share what they read"),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, "padding is of zeros"),
    ],
)
def test_neighbours_that_share_nothing_are_no_pair(how: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=rf"Conv2d\(8, 4.*: .*{problem}"):
        dense_layers.PairedConv2d(nn.Conv2d(8, 4, **how))


def test_narrow_layers_go_in_pairs() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 40, 3), nn.Conv2d(40, 8, 1)
    ).eval()
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        expected = network(x)
        made = dense_layers.paired(dense_layers.rectified(network))
        torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-5)
    kinds = [type(module) for module in made.children() if not isinstance(module, nn.ReLU)]
    assert kinds == [dense_layers.Rectified, dense_layers.PairedConv2d, nn.Conv2d, nn.Conv2d]


def test_without_triton_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_layers, "triton", None)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        dense_layers.ImageConv2d(nn.Conv2d(3, 8, 3))


@pytest.mark.parametrize(
    "how",
    [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": (1, 3), "stride": (2, 1)}],
)
def test_max_pooling(interpreted: ModuleType, how: dict[str, Any]) -> None:
    x = torch.randn(3, 5, 7, 8)
    x[1, 2, 2, 4] = float("nan")
    for each in laid(x):
        found = interpreted.MaxPool2d(**how)(each)
        assert torch.equal(found.nan_to_num(7), nn.MaxPool2d(**how)(each).nan_to_num(7))
        assert found.isnan().any()


def test_a_network_with_kernels_of_its_own(interpreted: ModuleType) -> None:
    """The image gets channels of zeros from `fast.fill_up`, which nothing has to read any more."""
    layers = [
        nn.Conv2d(3, 20, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 6, 3),
        nn.MaxPool2d(2, ceil_mode=True),
    ]
    network, x = nn.Sequential(*layers).eval(), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        expected = network(x)
        fast.fill_up(network, 8)
        made = interpreted.own_kernels(interpreted.rectified(network))
        torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-5)
    kinds = [type(module) for module in made.modules()]
    assert kinds.count(interpreted.ImageConv2d) == kinds.count(interpreted.MaxPool2d) == 1
    assert nn.ZeroPad3d not in kinds
    wide = nn.Sequential(nn.Conv2d(3, 130, 3)).eval()
    fast.fill_up(wide, 8)
    assert nn.ZeroPad3d in [type(module) for module in interpreted.own_kernels(wide).modules()]


def test_the_kernels_compile_for_a_gpu(ptx: Callable[..., str]) -> None:
    pointers = dict.fromkeys(("x", "weight", "bias", "out"), "*bf16")
    sizes = {"K": 27, "KH": 3, "KW": 3, "FILTERS": 32, "STEP": dense_layers.STEP, "RELU": True}
    made = ptx(dense_layers._image, sizes | dense_layers.TILES["image"], pointers, ("filters",))
    assert "wgmma.mma_async" in made
    assert "st.global.v4.b32" in made
    made = ptx(dense_layers._pool, {"KH": 2, "KW": 2, "PLACES": 32, "WIDE": 64, "num_warps": 4}, pointers, ("C",))
    assert "ld.global.v4.b32" in made
    assert "max.NaN.bf16" in made
