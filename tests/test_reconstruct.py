"""Moments, the Gram identity and the refit against the explicit matrices in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sppkit import lasso, reconstruct

N, C, KH, KW, OUT = 120, 5, 2, 3, 4


def samples(seed: int = 0, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """X (N, C * KH * KW), Y (N, OUT), weight (OUT, C, KH, KW); Y is X weight', an offset and noise."""
    draw = torch.Generator().manual_seed(seed)
    X = torch.randn(N, C * KH * KW, generator=draw, dtype=dtype).relu() + 0.5
    weight = torch.randn(OUT, C, KH, KW, generator=draw, dtype=dtype)
    return X, X @ weight.flatten(1).T + 3 + 0.3 * torch.randn(N, OUT, generator=draw, dtype=dtype), weight


def streamed(X: Tensor, Y: Tensor, chunk: int = 17) -> reconstruct.Moments:
    moments = reconstruct.Moments()
    for x, y in zip(X.split(chunk), Y.split(chunk), strict=True):
        moments.add(x, y)
    return moments


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("chunk", [1, 17, N])
def test_streamed_moments_are_the_moments_of_the_whole(chunk: int, offset: float) -> None:
    X, Y, _ = samples()
    X = X + offset
    moments = streamed(X, Y, chunk)
    x, y = X - X.mean(0), Y - Y.mean(0)
    tolerance = {"rtol": 1e-8, "atol": 1e-6}
    assert moments.count == N
    torch.testing.assert_close(moments.mean_x, X.mean(0))
    torch.testing.assert_close(moments.xtx, x.T @ x, **tolerance)
    torch.testing.assert_close(moments.xty, x.T @ y, **tolerance)
    torch.testing.assert_close(moments.yty, y.square().sum(0), **tolerance)


def test_moments_in_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    X, Y, _ = samples()
    whole = streamed(X, Y)
    monkeypatch.setattr(reconstruct, "BLOCK", 7)  # 34 columns: five blocks, the last one smaller
    moments = streamed(X, Y)
    for name in ("xtx", "xty", "yty"):  # both halves of x'x
        torch.testing.assert_close(getattr(moments, name), getattr(whole, name), rtol=1e-12, atol=1e-10)


def test_constant_features_have_no_energy_at_all() -> None:
    X = torch.full((50, 2), 0.1) * torch.tensor([1.0, 3.0])
    moments = streamed(X, torch.arange(50.0)[:, None])
    assert moments.xtx.abs().max() == 0


@pytest.mark.parametrize("unit_norm", [True, False])
def test_gram_is_that_of_the_explicit_design_matrix(unit_norm: bool) -> None:
    X, Y, weight = samples()
    gram, correlation = reconstruct.lasso_problem(streamed(X, Y), weight, unit_norm=unit_norm)
    x = (X - X.mean(0)).view(N, C, KH * KW)
    w = weight.flatten(2)  # (OUT, C, kk)
    w = w / w.square().sum((0, 2), keepdim=True).sqrt() if unit_norm else w
    Z = torch.stack([(x[:, i] @ w[:, i].T).flatten() for i in range(C)], 1)  # (N * OUT, C)
    torch.testing.assert_close(gram, Z.T @ Z / N, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(correlation, Z.T @ (Y - Y.mean(0)).flatten() / N, rtol=1e-11, atol=1e-11)


def test_a_channel_without_weights_is_dead() -> None:
    X, Y, weight = samples()
    weight[:, 2] = 0
    gram, correlation = reconstruct.lasso_problem(streamed(X, Y), weight)
    assert gram[2].abs().max() == correlation[2] == 0
    assert 2 not in lasso.select(gram, correlation, 4).kept.tolist()


@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4], [3], [4, 1]])
def test_refit_is_least_squares_with_intercept(kept: list[int]) -> None:
    X, Y, _ = samples()
    fit = reconstruct.refit(streamed(X, Y), torch.tensor(kept), (KH, KW))
    chosen = X.view(N, C, -1)[:, kept].flatten(1)
    design = torch.cat([chosen, torch.ones(N, 1, dtype=X.dtype)], 1)
    expected = torch.linalg.lstsq(design, Y).solution
    assert fit.weight.shape == (OUT, len(kept), KH, KW)
    assert fit.rank == len(kept) * KH * KW
    torch.testing.assert_close(fit.weight.flatten(1).T, expected[:-1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fit.bias, expected[-1], rtol=1e-9, atol=1e-9)
    relative = (Y - design @ expected).square().sum() / (Y - Y.mean(0)).square().sum()
    assert fit.error == pytest.approx(float(relative), rel=1e-9)


@pytest.mark.parametrize("count", [N, 9])
@pytest.mark.parametrize("towards_own", [True, False])
def test_a_ridge_is_least_squares_with_rows_for_the_weights(towards_own: bool, count: int) -> None:
    X, Y, weight = samples()
    X, Y, kept, ridge = X[:count], Y[:count], [0, 2, 3], 0.01
    own = weight[:, kept] if towards_own else None
    fit = reconstruct.refit(streamed(X, Y), torch.tensor(kept), (KH, KW), ridge=ridge, own=own)
    chosen = X.view(count, C, -1)[:, kept].flatten(1)
    centred = chosen - chosen.mean(0)
    pull = ridge * centred.square().sum(0).mean()
    rows = pull.sqrt() * torch.eye(chosen.shape[1], dtype=X.dtype)
    goal = torch.zeros(len(rows), OUT, dtype=X.dtype) if own is None else rows @ own.to(X).flatten(1).T
    expected = torch.linalg.lstsq(torch.cat([centred, rows]), torch.cat([Y - Y.mean(0), goal])).solution
    torch.testing.assert_close(fit.weight.flatten(1).T, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fit.bias, Y.mean(0) - chosen.mean(0) @ expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ridge", [-0.1, float("nan"), float("inf")])
def test_a_bad_ridge_is_quoted(ridge: float) -> None:
    X, Y, _ = samples()
    with pytest.raises(ValueError, match=f"ridge={ridge} must be 0 or more"):
        reconstruct.refit(streamed(X, Y), torch.arange(C), (KH, KW), ridge=ridge)


def test_dependent_columns_give_the_solution_of_minimum_norm() -> None:
    X, Y, _ = samples()
    X[:, KH * KW : 2 * KH * KW] = X[:, : KH * KW]  # channel 1 repeats channel 0
    fit = reconstruct.refit(streamed(X, Y), torch.tensor([0, 1, 3]), (KH, KW))
    chosen = X.view(N, C, -1)[:, [0, 1, 3]].flatten(1)
    expected = torch.linalg.pinv(chosen - chosen.mean(0), rtol=1e-10) @ (Y - Y.mean(0))
    assert fit.rank == 2 * KH * KW
    torch.testing.assert_close(fit.weight.flatten(1).T, expected, rtol=1e-8, atol=1e-8)


def test_fewer_samples_than_columns_fits_them_all() -> None:
    X, Y, _ = samples()
    fit = reconstruct.refit(streamed(X[:9], Y[:9]), torch.arange(C), (KH, KW))
    chosen = X[:9] - X[:9].mean(0)
    assert fit.rank == 8 == torch.linalg.matrix_rank(chosen)
    assert fit.error < 1e-14
    minimum_norm = torch.linalg.pinv(chosen) @ (Y[:9] - Y[:9].mean(0))
    torch.testing.assert_close(fit.weight.flatten(1).T, minimum_norm, rtol=1e-6, atol=1e-6)  # but for the ridge


def test_constant_columns_get_no_weight() -> None:
    X, Y, _ = samples()
    X[:, 4:9] = 0.1  # the end of channel 0 and the beginning of channel 1
    fit = reconstruct.refit(streamed(X, Y), torch.arange(C), (KH, KW))
    live = [k for k in range(X.shape[1]) if not 4 <= k < 9]
    expected = torch.linalg.lstsq(X[:, live] - X[:, live].mean(0), Y - Y.mean(0)).solution
    weight = fit.weight.flatten(1).T
    assert fit.rank == len(live)
    assert weight[4:9].abs().max() == 0
    own = torch.ones(OUT, C, KH, KW)
    assert (pulled := reconstruct.refit(streamed(X, Y), torch.arange(C), (KH, KW), ridge=0.1, own=own)).rank == len(
        live
    )
    assert pulled.weight.flatten(1)[:, 4:9].abs().max() == 0
    torch.testing.assert_close(weight[live], expected, rtol=1e-6, atol=1e-6)


def test_no_live_column_is_the_mean() -> None:
    _, Y, _ = samples()
    fit = reconstruct.refit(streamed(torch.ones(N, C * KH * KW), Y), torch.arange(C), (KH, KW))
    assert fit.rank == fit.weight.abs().max() == 0
    assert fit.error == pytest.approx(1)
    torch.testing.assert_close(fit.bias, Y.mean(0))


def test_the_smallest_scale_survives_beside_the_largest() -> None:
    X, Y, _ = samples()
    scale = torch.logspace(-6, 6, X.shape[1], dtype=X.dtype)
    fit = reconstruct.refit(streamed(X * scale, Y), torch.arange(C), (KH, KW))
    plain = reconstruct.refit(streamed(X, Y), torch.arange(C), (KH, KW))
    torch.testing.assert_close(fit.weight.flatten(1) * scale, plain.weight.flatten(1), rtol=1e-8, atol=1e-8)


def test_error_of_any_weight_is_the_explicit_one() -> None:
    X, Y, weight = samples()
    kept, bias = torch.tensor([1, 4]), torch.tensor([1.0, -2.0, 0.0, 5.0])
    output = X.view(N, C, -1)[:, kept].flatten(1) @ weight[:, kept].flatten(1).T + bias
    expected = (Y - output).square().sum() / (Y - Y.mean(0)).square().sum()
    found = reconstruct.error(streamed(X, Y), weight[:, kept], bias, kept)
    assert found == pytest.approx(float(expected), rel=1e-11)


def test_error_falls_with_the_width_and_refit_beats_the_old_weights() -> None:
    X, Y, weight = samples()
    moments = streamed(X, Y)
    problem = reconstruct.lasso_problem(moments, weight)
    errors, kept = [], torch.tensor([], dtype=torch.int64)
    for keep in range(1, C + 1):
        found = lasso.select(*problem, keep).kept
        kept = torch.cat([kept, found]).unique()  # nested, so that the order must hold
        fit = reconstruct.refit(moments, kept, (KH, KW))
        errors.append(fit.error)
        assert fit.error < reconstruct.error(moments, weight[:, kept], torch.full((OUT,), 3.0), kept)
    assert len(kept) == C
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]


@pytest.mark.parametrize("place", ["X", "Y"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_infinite_samples_are_refused_and_leave_the_moments_alone(place: str, value: float) -> None:
    X, Y, _ = samples()
    moments = streamed(X, Y)
    before = moments.xtx.clone()
    (X if place == "X" else Y)[3, 0] = value
    with pytest.raises(ValueError, match="X or Y holds NaN or infinity"):
        moments.add(X, Y)
    assert moments.count == N
    assert torch.equal(moments.xtx, before)


def test_bad_input_is_named() -> None:
    X, Y, weight = samples()
    moments = streamed(X, Y)
    with pytest.raises(ValueError, match=r"X \(120, 6\), Y \(120, 4\) must be .* \(d, n\) = \(30, 4\)"):
        moments.add(X[:, :6], Y)
    with pytest.raises(ValueError, match=r"\(P > 0, d\)"):
        moments.add(X[:3], Y[:2])
    with pytest.raises(ValueError, match=r"weight \(4, 4, 2, 3\)"):
        reconstruct.lasso_problem(moments, weight[:, :4])
    for kept in ([], [5], [-1], [1, 1]):
        with pytest.raises(ValueError, match=r"kept=.* must be distinct channels, indices in 0\.\.4"):
            reconstruct.refit(moments, torch.tensor(kept, dtype=torch.int64), (KH, KW))
    with pytest.raises(ValueError, match="must be distinct channels"):
        reconstruct.refit(moments, torch.arange(5) < 2, (KH, KW))
    with pytest.raises(ValueError, match=r"kernel=\(4, 4\) does not divide the 30 columns"):
        reconstruct.refit(moments, torch.tensor([0]), (4, 4))
    with pytest.raises(ValueError, match="no samples: add"):
        reconstruct.refit(reconstruct.Moments(), torch.tensor([0]), (KH, KW))
    with pytest.raises(ValueError, match="constant"):
        reconstruct.refit(streamed(X, torch.ones_like(Y)), torch.tensor([0]), (KH, KW))
