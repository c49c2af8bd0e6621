"""The Triton kernels of masking, by Triton's interpreter on the CPU, against torch's operators."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from sppkit import kernels


@pytest.fixture
def interpreted(interpret: Callable[[ModuleType], ModuleType]) -> ModuleType:
    return interpret(kernels)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint16])
@pytest.mark.parametrize("count", [1, 2048, 5001])
def test_the_kernels_do_what_the_operators_do(interpreted: ModuleType, count: int, dtype: torch.dtype) -> None:
    draw, G = torch.Generator().manual_seed(count), 2**16
    groups, keep = torch.randint(0, G, (count,), generator=draw).to(dtype), torch.rand(G, generator=draw) > 0.5
    flats = torch.randn(3, count, generator=draw)
    found, expected = [(torch.zeros(count, dtype=torch.bool), torch.zeros(count), *flats.clone()) for _ in range(2)]
    mask, masked, weight, first, second = found
    programs = (-(-count // 2048),)
    interpreted._hide[programs](
        weight, keep.view(torch.uint8), groups, mask.view(torch.uint8), masked, count, BLOCK=2048
    )
    interpreted._clear[programs](first, second, mask.view(torch.uint8), count, BLOCK=2048)
    mask, masked, weight, first, second = expected
    kernels.hide(weight, keep, groups, mask, masked)
    kernels.clear(first, second, mask)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert count == 1 or 0 < expected[0].float().mean() < 1


def test_indices_stay_as_they_are_on_a_cpu_or_where_two_bytes_do_not_do() -> None:
    groups = torch.tensor([0, 2**16], dtype=torch.int32)
    assert kernels.narrow(groups, 2**16 + 1) is groups
    assert kernels.narrow(groups[:1], 1).dtype == torch.int32
