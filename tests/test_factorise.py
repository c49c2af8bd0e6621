"""Factorisations: exact at full rank, the best at lower ones, solved for a FLOP ratio."""

from __future__ import annotations

import copy

import factorise
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import networks

from sppkit import cost

SHAPES = [{}, {"stride": 2, "padding": 1}, {"padding": (2, 1), "dilation": (2, 1)}, {"bias": False}]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def images() -> Tensor:
    return random(40, 3, 12, 12).float()


@pytest.fixture
def chain() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Conv2d(12, 16, (3, 2), stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network(random(32, 3, 12, 12).float())  # gives the BatchNorm its statistics
    return network.eval()


@pytest.mark.parametrize("settings", SHAPES)
def test_a_split_of_full_rank_is_the_convolution(settings: dict) -> None:
    conv, x = nn.Conv2d(6, 10, (3, 2), **settings).double(), random(2, 6, 9, 8)
    torch.testing.assert_close(factorise.split(conv, 18)(x), conv(x))


def test_a_split_leaves_the_smallest_singular_values() -> None:
    conv = nn.Conv2d(4, 7, (3, 2), bias=False).double()
    V, H = factorise.split(conv, 5)
    with torch.no_grad():
        left = torch.einsum("nrb,rca->ncab", H.weight[:, :, 0], V.weight[..., 0]) - conv.weight
    values = np.linalg.svd(conv.weight.detach().permute(1, 2, 0, 3).reshape(12, 14).numpy(), compute_uv=False)
    assert float(left.square().sum()) == pytest.approx(np.square(values[5:]).sum())


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_low_rank_is_reduced_rank_regression(rank: int) -> None:
    X, noise = random(200, 8) + 3, random(200, 6, seed=1)
    Y = X @ random(8, 6, seed=2) + noise - 5
    P, Q, b = (each.numpy() for each in factorise.low_rank(X, Y, rank))
    assert P.shape == (6, rank)
    # Izenman 1975: the ordinary solution, projected on the main directions of what it predicts
    A, C = (each.numpy() - each.numpy().mean(0) for each in (X, Y))
    ordinary = np.linalg.lstsq(A, C, rcond=None)[0]
    main = np.linalg.svd(A @ ordinary)[2][:rank]
    np.testing.assert_allclose(Q.T @ P.T, ordinary @ main.T @ main, atol=1e-10)
    np.testing.assert_allclose(X.numpy() @ Q.T @ P.T + b - Y.numpy(), A @ Q.T @ P.T - C, atol=1e-10)


@pytest.mark.parametrize("rank", [2, 6])
def test_a_ridge_is_reduced_rank_regression_with_rows_for_the_weights(rank: int) -> None:
    X, Y = random(60, 8) @ random(8, 8, seed=3), random(60, 6, seed=1) + 2
    P, Q, b = (each.numpy() for each in factorise.low_rank(X, Y, rank, ridge=0.05))
    A, C = (each.numpy() - each.numpy().mean(0) for each in (X, Y))
    rows = np.sqrt(0.05 * np.square(A).sum(0).mean()) * np.eye(8)
    A, C = np.concatenate([A, rows]), np.concatenate([C, np.zeros((8, 6))])
    ordinary = np.linalg.lstsq(A, C, rcond=None)[0]
    main = np.linalg.svd(A @ ordinary)[2][:rank]
    np.testing.assert_allclose(Q.T @ P.T, ordinary @ main.T @ main, atol=1e-10)
    np.testing.assert_allclose(b, (Y.numpy() - X.numpy() @ Q.T @ P.T).mean(0), atol=1e-10)


def test_a_ridge_below_0_is_quoted() -> None:
    with pytest.raises(ValueError, match="ridge=-1 must be 0 or more"):
        factorise.low_rank(random(9, 3), random(9, 2), 1, ridge=-1)


def test_low_rank_of_dependent_and_constant_columns() -> None:
    X = random(50, 3)
    X = torch.cat([X, X[:, :1] - X[:, 1:2], torch.full((50, 1), 7.0)], 1)
    Y = X[:, :3] @ random(3, 4, seed=1) + 2
    P, Q, b = factorise.low_rank(X, Y, 4)
    torch.testing.assert_close(X @ Q.T @ P.T + b, Y.double())
    assert P.shape[1] == 3, "the rank of X"


def test_the_solver_with_relu_is_better_after_it_and_fits_what_relu_hides() -> None:
    X = random(400, 10)
    hidden = X @ random(10, 2, seed=1) @ random(2, 12, seed=2) - 1
    Y = torch.where(hidden > 0, hidden, -random(400, 12, seed=3).abs())  # below 0 it is noise

    def error(relu: bool, rank: int) -> float:
        P, Q, b = factorise.low_rank(X, Y, rank, relu=relu)
        return float((F.relu(X @ Q.T @ P.T + b) - Y.relu()).square().sum() / Y.relu().square().sum())

    assert error(True, 2) < 0.2 * error(False, 2)
    assert error(True, 12) < 0.2 * error(False, 12)


def of_ranks(network: nn.Module, ranks: dict[str, tuple[int, int]], *, prune: bool) -> nn.Module:
    """A chain of convolutions with factors of these widths, whatever their weights."""
    network, before = copy.deepcopy(network), {}
    names = [name for name, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    for name, following in zip(names, [*names[1:], ""], strict=True):
        if name in ranks:
            conv, (r, d) = network.get_submodule(name), ranks[name]
            n, c = conv.out_channels, before.get(name, conv.in_channels)
            if prune and following in ranks:
                n = before[following] = max(round(n / 1.15), d)
            (kh, kw), (ph, pw), (sh, sw) = conv.kernel_size, conv.padding, conv.stride
            factors = [nn.Conv2d(c, r, (kh, 1), (sh, 1), (ph, 0))] if r else []
            last = (
                nn.Conv2d(r, d or n, (1, kw), (1, sw), (0, pw))
                if r
                else nn.Conv2d(c, d, (kh, kw), conv.stride, (ph, pw))
            )
            network.set_submodule(name, nn.Sequential(*factors, last, *([nn.Conv2d(d, n, 1)] if d else [])))
    return network


@pytest.mark.parametrize("method", factorise.METHODS)
@pytest.mark.parametrize(("name", "near"), [("convnet", 0.06), ("vgg16", 0.01)])  # what one rank in each layer is worth
def test_ranks_reach_the_ratio_as_near_as_they_can(name: str, near: float, method: str) -> None:
    network, example = networks.create(name), torch.zeros(1, 3, 32, 32)
    for ratio in (1.5, 2, 4):
        ranks = factorise.solve(network, example, method, ratio)
        assert [*ranks] == [layer for layer, m in network.named_modules() if isinstance(m, nn.Conv2d)][1:]
        small = of_ranks(network, ranks, prune=method == "3c")
        assert cost.flop_ratio(network, small, example) == pytest.approx(ratio, rel=near)


@pytest.mark.parametrize("method", ["spatial", "channel", "3d"])
def test_macs_by_formula_are_those_of_the_network(method: str, chain: nn.Module, images: Tensor) -> None:
    for ratio in (1.2, 1.7, 2.5):
        small, table = factorise.factorise(chain, images, method=method, flop_ratio=ratio)
        assert cost.flop_ratio(chain, small, images) == pytest.approx(ratio, rel=0.06)
        assert table["layer"].tolist() == ["3", "5"]
        for layer, r, d in table[["layer", "r", "d"]].itertuples(index=False):
            widths = [m.out_channels for m in small.get_submodule(layer).modules() if isinstance(m, nn.Conv2d)]
            assert widths == [*([r] if r else []), *([d] if d else []), chain.get_submodule(layer).out_channels]


@pytest.mark.parametrize("ranks", [{"3": (24, 0), "5": (32, 0)}, {"3": (0, 12), "5": (0, 16)}, {"3": (24, 12)}])
def test_full_ranks_change_nothing(ranks: dict, chain: nn.Module, images: Tensor) -> None:
    small, table = factorise.factorise(chain, images, method="3d", ranks=ranks, points=100)
    torch.testing.assert_close(small(images), chain(images), rtol=1e-3, atol=1e-4)
    assert table["error"].max() < 1e-6


@pytest.mark.parametrize("ranks", [(4, 0), (0, 3), (5, 3)])
def test_the_error_is_that_of_the_outputs_after_relu(ranks: tuple[int, int], chain: nn.Module, images: Tensor) -> None:
    small, table = factorise.factorise(chain, images, method="3d", ranks={"3": ranks}, points=1000)  # all there are
    with torch.no_grad():
        Y, now = (network[:5](images).transpose(0, 1).flatten(1) for network in (chain, small))
    error = (now - Y).square().sum() / (Y - Y.mean(1, keepdim=True)).square().sum()
    assert table["error"].item() == pytest.approx(float(error), rel=1e-3)


def test_a_layer_mends_what_those_before_it_lost(chain: nn.Module, images: Tensor) -> None:
    both = {"3": (2, 0), "5": (20, 0)}
    together = factorise.factorise(chain, images, method="spatial", ranks=both)[0]
    apart = copy.deepcopy(together)
    apart[5] = factorise.factorise(chain, images, method="spatial", ranks={"5": (20, 0)})[0][5]
    with torch.no_grad():
        wrong = [float((network(images) - chain(images)).square().sum()) for network in (together, apart)]
    assert wrong[0] < 0.9 * wrong[1]


def test_3c_prunes_between_the_layers_it_factorised(chain: nn.Module, images: Tensor) -> None:
    small, table = factorise.factorise(chain, images, method="3c", ranks={"3": (6, 4), "5": (8, 0)})
    assert table["kept"].tolist() == [8, 10]  # 12 / 1.15
    assert [m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)] == [8, 6, 4, 10, 8, 16]
    assert small[5][0].in_channels == 10
    wide, _ = factorise.factorise(chain, images, method="3c", ranks={"3": (12, 11), "5": (8, 0)})
    assert wide[5][0].in_channels == 11, "never below the rank"


def test_residual_networks_keep_their_shortcuts(images: Tensor) -> None:
    network, images = networks.create("resnet20").eval(), F.interpolate(images, 32)
    for method in ("spatial", "3c"):
        small, table = factorise.factorise(network, images, method=method, flop_ratio=1.5, points=4)
        assert len(table) == 18
        assert cost.flop_ratio(network, small, images) == pytest.approx(1.5, rel=0.02)
        assert small(images).shape == (40, 10)


def test_same_seed_same_network(chain: nn.Module, images: Tensor) -> None:
    one, two, other = (
        factorise.factorise(chain, images, method="3d", flop_ratio=2, points=4, seed=seed)[0] for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one[3][1].weight, other[3][1].weight)
    assert isinstance(chain[1], nn.BatchNorm2d), "the network given is left alone"


def test_bad_input_is_named(chain: nn.Module, images: Tensor) -> None:
    cases = [
        ({"method": "tucker", "flop_ratio": 2}, "method='tucker' must be one of spatial, channel, 3d, 3c"),
        ({"method": "3d"}, "either flop_ratio or ranks"),
        ({"method": "3d", "flop_ratio": 1.0}, r"flop_ratio=1\.0 must be above 1"),
        ({"method": "3d", "flop_ratio": 500.0}, r"flop_ratio=500\.0 is out of reach: ranks of 1 give \d+\.\d\d"),
        ({"method": "3d", "ranks": {"0": (2, 0)}}, r"layer '0' cannot be factorised; choose among \['3', '5'\]"),
        ({"method": "3d", "ranks": {"3": (25, 0)}}, r"ranks \(25, 0\) of layer '3': r must lie in 0\.\.24"),
        ({"method": "3d", "ranks": {"3": (0, 13)}}, r"ranks \(0, 13\) of layer '3': .* d in 0\.\.12"),
        ({"method": "3d", "flop_ratio": 2, "points": 0}, "points=0"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            factorise.factorise(chain, images, **settings)
    with pytest.raises(ValueError, match="one group and padding by a number of zeros"):
        factorise.split(nn.Conv2d(4, 4, 3, padding="same"), 2)
