"""Kernels for columns, by Triton's interpreter on the CPU, against the masked convolution."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType

import engines
import pytest
import torch
from dense_layers import ImageConv2d, rectified
from torch import Tensor, nn

from sppkit import kernels as plain
from sppkit.compact import ColumnConv2d

TILES = {"columns": {"PLACES": 64, "COUNT": 5}, "blocks": {"PLACES": 64, "COUNT": 3}}  # columns: as in `kernels`


@pytest.fixture
def interpreted(kernels: ModuleType, interpret: Callable[[ModuleType], ModuleType]) -> ModuleType:
    module = interpret(engines)
    assert module.TILES["columns"] is kernels.TILES
    for engine, tiles in TILES.items():  # small ones: less to interpret
        module.TILES[engine] = {**module.TILES[engine], **tiles}
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
    places, many = TILES.get(engine, {"PLACES": 64, "FILTERS": 16}).values()
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
        assert made.double().dense().weight.dtype == torch.float64


def test_no_column_at_all(interpreted: ModuleType) -> None:
    nothing = ColumnConv2d(nn.Conv2d(2, 3, 3, padding=1, bias=False), torch.arange(0))
    with torch.no_grad():
        assert torch.equal(interpreted.GatheredConv2d(nothing)(torch.randn(3, 2, 24, 25)), torch.zeros(3, 3, 24, 25))


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_a_network_of_them(interpreted: ModuleType, engine: str) -> None:
    """The first layer has no runs, and goes column by column."""
    convs = [nn.Conv2d(9, 32, 3, padding=1), nn.Conv2d(32, 4, 3, stride=2)]
    blocks = torch.arange(0, 16)[:, None] * 9 + torch.tensor([0, 4, 5])
    columns = [ColumnConv2d(convs[0], torch.arange(0, 81, 9)), ColumnConv2d(convs[1], blocks.flatten().sort().values)]
    network, x = nn.Sequential(columns[0], nn.ReLU(), columns[1]), torch.randn(2, 9, 8, 8)
    with torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(interpreted.gathered(network, engine)(x), expected, rtol=1e-5, atol=1e-5)
    assert [network[0].engine, network[2].engine] == ["columns", engine]
    torch.testing.assert_close(network[2].dense()(torch.ones(1, 32, 3, 3)), columns[1](torch.ones(1, 32, 3, 3)))


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_a_relu_goes_with_its_layer(interpreted: ModuleType, engine: str) -> None:
    _, column = masked(32, 16, seed=5)
    made, x = interpreted.GatheredConv2d(column, engine, relu=True), torch.randn(2, 32, 6, 5)
    with torch.no_grad():
        expected = column(x).relu()
        torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-5)
    assert 0.2 < float((expected == 0).float().mean()) < 0.8


@pytest.mark.parametrize("warps", [2, 8])  # a window's places in rows 8 apart, or beside each other
def test_pooling_goes_with_a_fused_layer_that_nothing_else_reads(
    interpreted: ModuleType, kernels: ModuleType, warps: int
) -> None:
    class Network(nn.Module):
        def __init__(self, pool: nn.Module, twice: bool = False) -> None:
            super().__init__()
            self.conv, self.pool, self.twice = ColumnConv2d(conv, column.index), pool, twice

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.conv(x))
            return self.pool(y).sum(1) + (y.mean() if self.twice else 0)

    _, column = masked(32, 16, seed=7, padding=1)
    conv = nn.Conv2d(32, 20, (3, 2), padding=1)
    kernels.THREE = {**kernels.THREE, "num_warps": warps}
    cases = [(nn.MaxPool2d(2), False, (6, 9)), (nn.MaxPool2d(2), False, (7, 9)), (nn.MaxPool2d(2), True, (6, 9))]
    for pool, twice, size in [*cases, (nn.MaxPool2d(3), False, (6, 9)), (nn.AvgPool2d(2), False, (6, 9))]:
        network, x = Network(pool, twice).eval(), torch.randn(3, 32, *size)
        with torch.no_grad():
            expected = network(x)
            made = interpreted.gathered(rectified(network), "fused")
            interpreted.pooled(made)
            torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-5)
        assert made.conv.pool == (not twice and isinstance(pool, nn.MaxPool2d) and pool.kernel_size == 2)


def test_an_image_is_read_by_a_kernel_of_its_own_or_by_columns(interpreted: ModuleType) -> None:
    few, wide = (ColumnConv2d(nn.Conv2d(3, filters, 3), torch.arange(0, 27, 3)) for filters in (8, 130))
    made = interpreted.gathered(nn.Sequential(few, nn.Conv2d(8, 3, 1), wide), "fused")
    assert isinstance(made[0], ImageConv2d)
    assert made[2].engine == "columns", "more filters than that kernel has"
    full = torch.zeros(8, 27)
    full[:, ::3] = few.weight.detach()
    assert torch.equal(made[0].weight, full.T)


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
    monkeypatch.setattr(interpreted.kernels, "DEVICES", ("cuda",))
    with pytest.raises(RuntimeError, match=r"engine='columns' needs a GPU .*; the images are on cpu"):
        interpreted.GatheredConv2d(column)(torch.randn(1, 3, 8, 8))
    monkeypatch.setattr(interpreted, "triton", None)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        interpreted.GatheredConv2d(column)


@pytest.mark.parametrize("engine", ["blocks", "fused"])
def test_the_kernels_compile_for_a_gpu(engine: str, ptx: Callable[..., str]) -> None:
    """Memory is read in vectors where neighbours go together."""
    tiles = engines.TILES.get(engine) or plain.tiles(50_176, 512)[0]
    constants = {"KH": 3, "KW": 3, "RUN": 16, "sC": 1, "RELU": True, "POOL": True, "NEAR": 1, **tiles}
    pointers = dict.fromkeys(("run", "taps", "index"), "*i32") | dict.fromkeys(("x", "read", "bias", "out"), "*bf16")
    weight = f"tensordesc<bf16[{tiles.get('STEP')},{tiles.get('FILTERS')}]>"
    sixteen = ("sB", "sH", "sW", "filters")  # channels-last, 16 channels
    made = ptx(getattr(engines, f"_{engine}"), constants, {**pointers, "weight": weight}, sixteen)
    wide = {"blocks": "ld.global.v4.b32", "fused": "wgmma.mma_async"}
    assert wide[engine] in made
    if engine == "fused":  # by 16 bytes, and of weights whole tiles
        assert "cp.async.cg.shared.global" in made
        assert "cp.async.bulk.tensor" in made
