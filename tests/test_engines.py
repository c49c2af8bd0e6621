"""The gathering kernel, by Triton's interpreter on the CPU, against the masked convolution."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType

import engines
import pytest
import torch
from torch import nn

from sppkit.compact import ColumnConv2d


@pytest.fixture
def interpreted(interpret: Callable[[ModuleType], ModuleType]) -> ModuleType:
    return interpret(engines)


CASES = [*itertools.product((1, 2), (0, 1, 2), (1, 2), (1, 3))]


@pytest.mark.parametrize(("stride", "padding", "dilation", "batch"), CASES)
def test_the_kernel_computes_what_the_masked_convolution_does(
    interpreted: ModuleType, stride: int, padding: int, dilation: int, batch: int
) -> None:
    draw = torch.Generator().manual_seed(stride + 10 * padding)
    conv = nn.Conv2d(5, 7, (3, 2), stride=stride, padding=padding, dilation=dilation)
    conv.weight.data[:, torch.rand(conv.weight[0].shape, generator=draw) < 0.7] = 0
    kept = conv.weight.data.flatten(1).ne(0).all(0).nonzero().flatten()
    x = torch.randn(batch, 5, 9, 12, generator=draw)
    engine = interpreted.GatheredConv2d(ColumnConv2d(conv, kept))
    with torch.no_grad():
        torch.testing.assert_close(engine(x), conv(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(engine(x.to(memory_format=torch.channels_last)), conv(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            engine(x.transpose(0, 1).contiguous().transpose(0, 1)), conv(x), rtol=1e-5, atol=1e-5
        )


def test_more_places_than_a_program_has_and_no_column_at_all(interpreted: ModuleType) -> None:
    conv, x = nn.Conv2d(2, 3, 3, padding=1, bias=False), torch.randn(3, 2, 24, 25)
    assert interpreted.BLOCK < 3 * 24 * 25
    with torch.no_grad():
        whole = interpreted.GatheredConv2d(ColumnConv2d(conv, torch.arange(18)))
        torch.testing.assert_close(whole(x), conv(x), rtol=1e-5, atol=1e-5)
        nothing = interpreted.GatheredConv2d(ColumnConv2d(conv, torch.arange(0)))
        assert torch.equal(nothing(x), torch.zeros(3, 3, 24, 25))


def test_a_network_of_them(interpreted: ModuleType) -> None:
    convs = [nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, stride=2)]
    columns = [ColumnConv2d(conv, torch.arange(0, conv.weight[0].numel(), 3)) for conv in convs]
    network, x = nn.Sequential(columns[0], nn.ReLU(), columns[1]), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(interpreted.gathered(network)(x), expected, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, ColumnConv2d) for module in network)


def test_what_it_cannot_do_is_refused(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    with pytest.raises(ValueError, match="padding_mode='reflect' is not gathered"):
        interpreted.GatheredConv2d(ColumnConv2d(conv, torch.arange(9)))
    monkeypatch.setattr(interpreted, "_gather", None)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        interpreted.GatheredConv2d(ColumnConv2d(nn.Conv2d(3, 4, 3), torch.arange(9)))
