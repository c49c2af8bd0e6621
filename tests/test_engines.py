"""Kernels for columns, by Triton's interpreter on the CPU, against the masked convolution."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import engines
import pytest
import torch
from torch import Tensor, nn
from training import networks

from sppkit.compact import ColumnConv2d
from sppkit.graph import fold


@pytest.fixture
def interpreted(interpret: Callable[[ModuleType], ModuleType]) -> ModuleType:
    module = interpret(engines)
    module.TILES = {"columns": (64, 5), "blocks": (64, 3), "fused": (64, 16)}  # small ones: less to interpret
    return module


def masked(channels: int, run: int, seed: int, **how: int) -> tuple[nn.Conv2d, ColumnConv2d]:
    """A convolution whose `run` neighbouring channels of a tap are zero together, and the same by its columns."""
    draw = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(channels, 7, (3, 2), **how)  # type: ignore[arg-type]
    keep = torch.rand(channels // run, 6, generator=draw) < 0.3
    keep[0, 0] = True
    flat = keep.repeat_interleave(run, 0).flatten()
    conv.weight.data.flatten(1)[:, ~flat] = 0
    return conv, ColumnConv2d(conv, flat.nonzero().flatten())


def assert_equal(engine: nn.Module, conv: nn.Module, x: Tensor, layouts: tuple[int, ...] = (0, 1, 2)) -> None:
    """In these layouts: plain, channels last, and channels first of all."""
    laid = (x, x.to(memory_format=torch.channels_last), x.transpose(0, 1).contiguous().transpose(0, 1))
    with torch.no_grad():
        for layout in layouts:
            torch.testing.assert_close(engine(laid[layout]), conv(x), rtol=1e-5, atol=1e-5)


MOVES = [*itertools.product((1, 2), (0, 1, 2), (1, 2))]
FORMS = [("columns", 1), ("blocks", 8), ("blocks", 16), ("blocks", 32), ("fused", 8), ("fused", 16), ("fused", 32)]


@pytest.mark.parametrize(("stride", "padding", "dilation"), MOVES)
def test_the_kernels_compute_what_the_masked_convolution_does(
    interpreted: ModuleType, stride: int, padding: int, dilation: int
) -> None:
    x = torch.randn(1 + padding, 32, 7, 6)
    for engine, run in FORMS:
        how = {"stride": stride, "padding": padding, "dilation": dilation, "bias": padding == 1}
        conv, column = masked(32 if run > 1 else 3, run, seed=stride + 10 * padding, **how)
        layout = (stride + padding + dilation) % 3  # each with every engine
        assert_equal(interpreted.GatheredConv2d(column, engine), conv, x[:, : conv.in_channels], (layout,))


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_more_places_runs_and_filters_than_a_program_has(interpreted: ModuleType, engine: str) -> None:
    places, many = interpreted.TILES[engine]
    channels = 2 if engine == "columns" else 32
    conv, x = nn.Conv2d(channels, 40, 3, padding=1, bias=False), torch.randn(2, channels, 5, 7)
    assert places < 2 * 5 * 7
    assert many < (40 if engine == "fused" else 9)
    assert_equal(interpreted.GatheredConv2d(ColumnConv2d(conv, torch.arange(9 * channels)), engine), conv, x)


def test_the_order_of_columns_and_later_conversions_change_nothing(interpreted: ModuleType) -> None:
    conv, x = nn.Conv2d(16, 4, 1), torch.randn(1, 16, 3, 3)
    column = ColumnConv2d(conv, torch.arange(15, -1, -1))
    for engine in engines.ENGINES:
        made = interpreted.GatheredConv2d(column, engine)
        assert_equal(made, conv, x)
        assert made.double().dense().weight.dtype == made.fused().weight.dtype == torch.float64


def test_no_column_at_all(interpreted: ModuleType) -> None:
    nothing = ColumnConv2d(nn.Conv2d(2, 3, 3, padding=1, bias=False), torch.arange(0))
    with torch.no_grad():
        assert torch.equal(interpreted.GatheredConv2d(nothing)(torch.randn(3, 2, 24, 25)), torch.zeros(3, 3, 24, 25))


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_a_network_of_them(interpreted: ModuleType, engine: str) -> None:
    """The first layer has no runs, and goes column by column."""
    convs = [nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 4, 3, stride=2)]
    blocks = torch.arange(0, 16)[:, None] * 9 + torch.tensor([0, 4, 5])
    columns = [ColumnConv2d(convs[0], torch.arange(0, 27, 3)), ColumnConv2d(convs[1], blocks.flatten().sort().values)]
    network, x = nn.Sequential(columns[0], nn.ReLU(), columns[1]), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(interpreted.gathered(network, engine)(x), expected, rtol=1e-5, atol=1e-5)
    assert [network[0].engine, network[2].engine] == ["columns", engine]
    torch.testing.assert_close(network[2].dense()(torch.ones(1, 32, 3, 3)), columns[1](torch.ones(1, 32, 3, 3)))


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_a_relu_goes_with_its_layer(interpreted: ModuleType, engine: str) -> None:
    _, column = masked(32, 16, seed=5)
    made, x = interpreted.GatheredConv2d(column, engine), torch.randn(2, 32, 6, 5)
    with torch.no_grad():
        expected = column(x).relu()
        torch.testing.assert_close(interpreted.Rectified(made)(x), expected, rtol=1e-5, atol=1e-5)
    assert 0.2 < float((expected == 0).float().mean()) < 0.8


@pytest.mark.parametrize("name", ["resnet20", "vgg16-bn", "torchvision/resnet50"])
def test_networks_with_relus_in_their_layers(name: str) -> None:
    """As many ReLUs go as have a convolution of their own in front: those after a sum stay."""
    network, x = networks.create(name).eval(), torch.randn(1, 3, 32, 32)
    folded = fold(network)[0]
    made = engines.rectified(folded)
    layers = [module for module in made.modules() if isinstance(module, engines.Rectified)]
    assert len(layers) == {"resnet20": 10, "vgg16-bn": 13, "torchvision/resnet50": 33}[name]
    with torch.no_grad():
        torch.testing.assert_close(made(x), network(x), rtol=1e-4, atol=1e-4)


def test_what_they_cannot_do_is_refused(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    column = ColumnConv2d(nn.Conv2d(3, 4, 3), torch.arange(9))
    reflected = ColumnConv2d(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), torch.arange(9))
    with pytest.raises(ValueError, match="padding_mode='reflect' is not gathered"):
        interpreted.GatheredConv2d(reflected)
    with pytest.raises(ValueError, match="engine='fused' is for blocks of channels, and these columns go in 1s"):
        interpreted.GatheredConv2d(column, "fused")
    with pytest.raises(ValueError, match="engine='dense', kernel 3 x 3: one of columns, blocks, fused"):
        interpreted.GatheredConv2d(column, "dense")
    with pytest.raises(ValueError, match=r"kernel 8 x 8: .* at most 63 taps"):
        interpreted.GatheredConv2d(ColumnConv2d(nn.Conv2d(3, 4, 8), torch.arange(9)))
    monkeypatch.setattr(interpreted, "triton", None)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        interpreted.GatheredConv2d(column)


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_the_kernels_compile_for_a_gpu(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a Hopper GPU in bf16, which takes none; memory is read in vectors where neighbours go together."""
    compiler = pytest.importorskip("triton.compiler")
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, (places, many) = getattr(engines, f"_{engine}"), engines.TILES[engine]
    constants = {"KH": 3, "KW": 3, "RUN": 16, "PLACES": places}
    constants |= {"COUNT": many, "FILTERS": many, "STEP": engines.STEP, "RELU": True}
    pointers = {"index": "*i32", "run": "*i32", "taps": "*i32"} | dict.fromkeys(
        ("x", "read", "weight", "bias", "out"), "*bf16"
    )
    kinds = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    place = {name: (number,) for number, name in enumerate(kernel.arg_names)}
    sixteen = [*pointers, *(("sB", "sH", "sW", "filters") if engine != "columns" else ())]  # channels-last, 16 channels
    source = compiler.ASTSource(
        kernel, kinds, constexprs={place[name]: value for name, value in constants.items() if name in place},
        attrs={place[name]: [["tt.divisibility", 16]] for name in sixteen if name in place},
    )  # fmt: skip
    made = compiler.compile(source, target=target, options=engines.LAUNCH[engine]).asm["ptx"]
    wide = {"columns": "ld.global.b16", "blocks": "ld.global.v4.b32", "fused": "wgmma.mma_async"}
    assert wide[engine] in made
    assert engine != "fused" or ("cp.async.cg.shared.global" in made and "ld.global.b16" not in made)  # 16 bytes
