"""The Triton kernels, by Triton's interpreter on the CPU, against torch's operators."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sppkit import compact
from sppkit import kernels as plain
from sppkit.compact import ColumnConv2d


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint16])
@pytest.mark.parametrize("count", [1, 2048, 5001])
def test_masking_does_what_the_operators_do(kernels: ModuleType, count: int, dtype: torch.dtype) -> None:
    draw, G = torch.Generator().manual_seed(count), 2**16
    groups, keep = torch.randint(0, G, (count,), generator=draw).to(dtype), torch.rand(G, generator=draw) > 0.5
    flats = torch.randn(3, count, generator=draw)
    found, expected = [(torch.zeros(count, dtype=torch.bool), torch.zeros(count), *flats.clone()) for _ in range(2)]
    for module, flats in ((kernels, found), (plain, expected)):
        mask, masked, weight, first, second = flats
        module.hide(weight, keep, groups, mask, masked)
        module.clear(first, second, mask)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert count == 1 or 0 < expected[0].float().mean() < 1


@pytest.mark.parametrize(("stride", "padding", "dilation"), [*itertools.product((1, (2, 1)), (0, 1, 2), (1, 2))])
def test_gathering_reads_the_columns_of_unfold(
    kernels: ModuleType, stride: int | tuple[int, int], padding: int, dilation: int
) -> None:
    draw = torch.Generator().manual_seed(stride if isinstance(stride, int) else 2)
    x, kept = torch.randn(2, 5, 8, 7, generator=draw), torch.randperm(30, generator=draw)[:11]
    conv = nn.Conv2d(5, 3, (3, 2), stride=stride, padding=padding, dilation=dilation)
    column = ColumnConv2d(conv, kept)
    unfolded = F.unfold(x, conv.kernel_size, dilation, padding, stride)[:, kept]  # (B, K, places of an image)
    for layout in (x, x.to(memory_format=torch.channels_last), x.transpose(0, 1).contiguous().transpose(0, 1)):
        read = kernels.gather(layout, column, 16)
        assert read.shape[1:] == (2, *conv(x).shape[2:])
        assert torch.equal(read[:11].flatten(2).transpose(0, 1), unfolded)
        assert torch.equal(read[11:].flatten(1).unique(dim=1)[:, 0], torch.tensor([1.0, 0, 0, 0, 0]))
    assert kernels.gather(x, column, 11).shape[0] == 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_a_column_layer_by_the_kernel_is_the_masked_convolution(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(6, 9, 3, padding=1, bias=bias).to(dtype), torch.randn(3, 6, 7, 5, dtype=dtype)
    kept = torch.rand(54) < 0.3
    conv.weight.data.flatten(1)[:, ~kept] = 0
    column, launched = ColumnConv2d(conv, kept.nonzero().flatten()), []
    monkeypatch.setattr(compact, "kernels", kernels)
    gather = kernels.gather
    monkeypatch.setattr(kernels, "gather", lambda *given: launched.append(1) or gather(*given))
    with torch.no_grad():
        torch.testing.assert_close(column(x), conv(x))
        assert column(x).is_contiguous()
        last = column(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, conv(x))
        assert last.is_contiguous(memory_format=torch.channels_last), "or what comes next would turn it over"
        with pytest.raises(RuntimeError):
            column(torch.randn(1, 6, 0, 4, dtype=dtype))  # no image to read
        assert len(launched) == 4
        nothing = ColumnConv2d(conv, torch.arange(0))
        torch.testing.assert_close(nothing(x), conv(x) * 0 + (conv.bias[:, None, None] if bias else 0))
        large = nn.Conv2d(6, 2, 8, padding=4).to(dtype)  # 64 taps: more than there are bits
        assert kernels.gather(x, ColumnConv2d(large, torch.arange(384)), 384) is None
        torch.testing.assert_close(ColumnConv2d(large, torch.arange(384))(x), large(x))


def test_a_column_layer_goes_by_operators_where_more_than_numbers_is_asked_for(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(6, 9, 3, padding=1), torch.randn(3, 6, 7, 5)
    column = ColumnConv2d(conv, torch.arange(54))
    reflected = nn.Conv2d(6, 9, 3, padding=1, padding_mode="reflect")
    monkeypatch.setattr(compact, "kernels", kernels)
    monkeypatch.setattr(kernels, "gather", lambda *_: pytest.fail("the kernel was asked"))
    x.requires_grad_()
    column(x).sum().backward()
    (expected,) = torch.autograd.grad(conv(x).sum(), x)
    torch.testing.assert_close(x.grad, expected)
    x = x.detach()
    with torch.no_grad():
        expected = conv(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            traced = [torch.jit.trace(column, (x,), check_trace=False), torch.jit.script(column)]
        traced.append(torch.fx.symbolic_trace(column))
        for form in (*traced, torch.export.export(column, (x,)).module()):
            with monkeypatch.context() as patch:
                patch.setattr(kernels, "DEVICES", ())
                torch.testing.assert_close(form(x), expected)
        torch.testing.assert_close(ColumnConv2d(reflected, torch.arange(54))(x), reflected(x))
        for wrong, error in ((x[:, :5], IndexError), (x.double(), RuntimeError), (torch.randn(3, 6, 7), IndexError)):
            with pytest.raises(error):
                column(wrong)
        with torch.autocast("cpu", torch.bfloat16):
            assert column(x).dtype == conv(x).dtype == torch.bfloat16
    monkeypatch.undo()
    with torch.no_grad(), pytest.raises(RuntimeError):
        ColumnConv2d(nn.Conv2d(2, 3, 5), torch.arange(9))(torch.randn(1, 2, 4, 4))  # smaller than the kernel


def test_where_a_kernel_does_not_run_torchs_operators_stand_in(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __getitem__(self, grid: tuple[int]) -> object:
            raise RuntimeError("no compiler")

    monkeypatch.setattr(compact, "kernels", kernels)
    monkeypatch.setattr(kernels, "_gather", Broken())
    conv, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 6, 6)
    column = ColumnConv2d(conv, torch.arange(27))
    with torch.no_grad():
        with pytest.warns(UserWarning, match=r"kernel _gather does not run here \(no compiler\)"):
            torch.testing.assert_close(column(x), conv(x))
        torch.testing.assert_close(column(x), conv(x))  # it is not tried again
    assert kernels._gather is None
    assert kernels._hide is not None, "another kernel may still run"


def blocks(run: int, **how: int) -> tuple[nn.Conv2d, ColumnConv2d]:
    """A convolution of which runs of a tap's channels are left, and the same by its columns."""
    conv, keep = nn.Conv2d(64, 24, (3, 2), **how), torch.rand(64 // run, 6) < 0.4  # type: ignore[arg-type]
    keep[0, 0], keep[-1, 1] = True, False
    flat = keep.repeat_interleave(run, 0).flatten()
    conv.weight.data.flatten(1)[:, ~flat] = 0
    return conv, ColumnConv2d(conv, flat.nonzero().flatten())


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (1, 2, 2)])
@pytest.mark.parametrize("run", [8, 16, 32])
def test_columns_in_runs_are_multiplied_while_they_are_read(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, run: int, stride: int, padding: int, dilation: int
) -> None:
    torch.manual_seed(run + stride)
    conv, column = blocks(run, stride=stride, padding=padding, dilation=dilation, bias=padding == 1)
    taken = []
    monkeypatch.setattr(compact, "kernels", kernels)
    monkeypatch.setattr(kernels, "gather", lambda *given: taken.append(1) or plain.gather(*given))
    x = torch.randn(2, 64, 7, 6)
    with torch.no_grad():
        expected = conv(x)
        for laid in (x, x.to(memory_format=torch.channels_last), x.transpose(0, 1).contiguous().transpose(0, 1)):
            found = kernels.multiply(laid, column)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert found.is_contiguous(memory_format=torch.channels_last)
        assert kernels.multiply(x.double(), column.double()) is None
        half = copy.deepcopy(column).half()
        for last in (False, True):
            laid = x.half().contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            found = half(laid)
            torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
            assert found.is_contiguous(memory_format=torch.channels_last) == last, "the layout stays"
            assert found.is_contiguous() != last
        assert not taken
        half.engine = "gathered"
        torch.testing.assert_close(half(x.half()).float(), expected, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(column.float()(x), expected, rtol=1e-5, atol=1e-5)
        assert len(taken) == 2, "by name, and for numbers of 32 bits"
        wide = torch.cat([x, x[:, :4]], 1)  # channels that it does not read, and no multiple of 8: not aligned
        assert kernels.multiply(wide, column) is None
        odd = ColumnConv2d(nn.Conv2d(64, 20, 3), column.index)  # nor are its weights
        assert kernels.multiply(x, odd) is None
        assert kernels.multiply(x[:0], column).shape == conv(x[:0]).shape


def test_other_columns_of_the_same_layer_are_noticed(kernels: ModuleType) -> None:
    """What a kernel needs to know of an index is found out once, and again when the index is written to."""
    taps, x = torch.arange(16)[:, None] * 9, torch.randn(1, 16, 5, 5)
    first, second = (ColumnConv2d(nn.Conv2d(16, 8, 3), (taps + tap).flatten()) for tap in (0, 4))
    with torch.no_grad():
        assert not torch.allclose(kernels.multiply(x, first), kernels.multiply(x, second))
        first.load_state_dict(second.state_dict())
        assert torch.equal(kernels.multiply(x, first), kernels.multiply(x, second))


def test_columns_lie_in_runs_where_they_can() -> None:
    taps = 9
    for index, run in (
        (torch.arange(16) * taps + 4, 16),
        (torch.arange(8, 32) * taps, 8),
        (torch.arange(64) * taps, 32),
        (torch.arange(4, 20) * taps, 4),
        (torch.arange(taps), 1),
        (torch.arange(0), 1),
    ):
        assert plain.run_length(index, taps) == run
    conv, column = blocks(16)
    assert plain.run_length(column.index, 6) == 16
    assert not torch.equal(column.index, column.index.sort().values)
    torch.testing.assert_close(column.dense().weight, conv.weight)
    some = torch.tensor([0, 3, 7, 40])
    assert torch.equal(ColumnConv2d(conv, some).index, some), "others stay as they are given"


def test_multiplying_compiles_for_a_gpu(ptx: Callable[..., str]) -> None:
    """Columns by 16 bytes, weights in whole tiles."""
    for places, filters, step in plain.FUSED:
        sizes = {"PLACES": places, "FILTERS": filters, "STEP": step, **plain.THREE}
        constants = {"KH": 3, "KW": 3, "RUN": 16, "sC": 1, **sizes}
        pointers = {"index": "*i32", "weight": f"tensordesc<bf16[{step},{filters}]>"}
        pointers |= dict.fromkeys(("x", "bias", "out"), "*bf16")
        made = ptx(plain._multiply, constants, pointers, ("sB", "sH", "sW", "filters"))
        for instruction in ("wgmma.mma_async", "cp.async.cg.shared.global", "cp.async.bulk.tensor"):
            assert instruction in made


@pytest.mark.parametrize(
    ("places", "filters", "sizes"),
    [
        (50_176, 512, (64, 256, 32)),  # conv4_2 of VGG-16, 64 images
        (6_272, 512, (64, 128, 64)),  # 8 images: few programs, so they are smaller
        (784, 512, (64, 64, 128)),  # one image: never enough
        (802_816, 128, (128, 128, 32)),  # the widest would be half empty
        (802_816, 384, (128, 128, 32)),
        (802_816, 192, (64, 256, 32)),
        (50_176, 64, (128, 64, 32)),
        (50_176, 8, (128, 64, 32)),
        (0, 64, (64, 64, 128)),
    ],
)
def test_programs_are_large_where_many_of_them_are_full(places: int, filters: int, sizes: tuple[int, ...]) -> None:
    how, programs = plain.tiles(places, filters)
    assert (how["PLACES"], how["FILTERS"], how["STEP"]) == sizes
    assert programs * sizes[0] * sizes[1] >= places * filters
    assert programs == -(-places // sizes[0]) * -(-filters // sizes[1])


def test_gathering_compiles_for_a_gpu(ptx: Callable[..., str]) -> None:
    constants, pointers = {"KH": 3, "KW": 3, **plain.TILES}, {"index": "*i64", "x": "*bf16", "read": "*bf16"}
    assert "ld.global.b16" in ptx(plain._gather, constants, pointers)
