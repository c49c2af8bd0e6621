"""Samples for a convolution: patches are what it reads, at positions as it counts them."""

from __future__ import annotations

import pytest
import torch
from single_layer import sample_layer
from torch import nn

from sppkit.samples import sample_patches


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3},
        {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ],
)
def test_patches_times_weight_are_the_outputs(settings: dict) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 5, **settings).double()
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        output = conv(x)
        positions = torch.stack([torch.randperm(output[0, 0].numel())[:7] for _ in range(3)])
        X = sample_patches(x, conv, positions)
        expected = torch.cat([output[b].flatten(1)[:, positions[b]].T for b in range(3)])  # (3 * 7, 5)
        torch.testing.assert_close(X @ conv.weight.flatten(1).T + conv.bias, expected)


def test_positions_are_distinct_and_all_of_them_at_most() -> None:
    image = torch.arange(12.0).view(1, 1, 3, 4)  # each pixel another value
    conv = nn.Sequential(nn.Conv2d(1, 2, 1))
    for points, found in ((5, 5), (12, 12), (99, 12)):
        X, Y = sample_layer(conv, "0", image, points=points)
        assert X.shape == (found, 1)
        assert len(X.unique()) == len(Y.unique(dim=0)) == found
    one, other = (sample_layer(conv, "0", image, points=5, seed=seed)[0] for seed in (0, 1))
    assert not torch.equal(one, other)
