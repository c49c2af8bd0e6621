"""The LASSO path and the selection against scikit-learn and against the optimality conditions."""

from __future__ import annotations

import choice
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso, lars_path_gram
from torch import Tensor

from sppkit import lasso

quick = settings(derandomize=True, deadline=None, max_examples=40, database=None)


def problem(seed: int, *, rows: int = 60, channels: int = 12, common: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    Z = draw.normal(size=(rows, channels)) + common * draw.normal(size=(rows, 1))
    return Z, Z @ draw.normal(size=channels) + draw.normal(size=rows)


def moments(Z: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(Z.T @ Z / len(Z)), torch.from_numpy(Z.T @ y / len(Z))


def assert_optimal(gram: Tensor, correlation: Tensor, alpha: float, beta: Tensor, tolerance: float = 1e-8) -> None:
    """The conditions of optimality of argmin 1/2 b'Gb - q'b + alpha |b|_1, relative to max |q|."""
    residual, top = correlation - gram @ beta, float(correlation.abs().max())
    assert float(residual.abs().max()) <= alpha + tolerance * top
    on = beta != 0
    assert float((residual - alpha * beta.sign())[on].abs().max() if on.any() else 0.0) <= tolerance * top


@pytest.mark.parametrize("seed", range(5))
def test_path_agrees_with_coordinate_descent(seed: int) -> None:
    Z, y = problem(seed)
    alphas, betas = (tensor.numpy() for tensor in lasso.path(*moments(Z, y)))
    for alpha in np.linspace(0.02, 0.95, 10) * alphas[0]:
        k = np.searchsorted(-alphas, -alpha)  # alphas[k - 1] > alpha >= alphas[k]
        part = (alphas[k - 1] - alpha) / (alphas[k - 1] - alphas[k])
        ours = betas[k - 1] + part * (betas[k] - betas[k - 1])
        theirs = Lasso(alpha=alpha, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(Z, y).coef_
        np.testing.assert_allclose(ours, theirs, atol=1e-7 * np.abs(theirs).max())
        np.testing.assert_array_equal(np.abs(ours) > 1e-9, np.abs(theirs) > 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_path_has_the_knots_of_lars(seed: int) -> None:
    gram, correlation = moments(*problem(seed, common=3.0, channels=20))
    alphas, betas = lasso.path(gram, correlation)
    expected, _, coefficients = lars_path_gram(correlation.numpy(), gram.numpy(), n_samples=1, method="lasso")
    np.testing.assert_allclose(alphas.numpy(), expected, atol=1e-6 * expected[0])
    np.testing.assert_allclose(betas.numpy(), coefficients.T, atol=1e-5 * np.abs(coefficients).max())


@quick
@given(st.integers(0, 10_000), st.sampled_from(["gauss", "common", "ternary", "low rank", "repeated"]))
def test_every_width_is_optimal_and_exact(seed: int, kind: str) -> None:
    draw = np.random.default_rng(seed)
    rows, channels = int(draw.integers(3, 40)), int(draw.integers(2, 16))
    Z = draw.normal(size=(rows, channels))
    if kind == "common":
        Z += 3 * draw.normal(size=(rows, 1))
    elif kind == "ternary":  # ties in every step
        Z = draw.integers(-1, 2, size=(rows, channels)).astype(float)
    elif kind == "low rank":
        Z = draw.normal(size=(rows, 2)) @ draw.normal(size=(2, channels))
    elif kind == "repeated":
        Z = Z[:, draw.integers(0, channels // 2 + 1, size=channels)]
    y = Z.sum(1) if seed % 2 else draw.integers(-3, 4, size=rows).astype(float)
    gram, correlation = moments(Z, y)
    if float(correlation.abs().max()) < 1e-12:
        return
    alphas, betas = lasso.path(gram, correlation)
    assert alphas[-1] == 0
    assert bool((alphas.diff() <= 0).all())
    for alpha, beta in zip(alphas, betas, strict=True):
        assert_optimal(gram, correlation, float(alpha), beta)
    reached = int((betas != 0).sum(1).max())
    assert reached <= np.linalg.matrix_rank(Z)
    if kind in ("gauss", "common", "low rank"):  # in general position
        assert reached == np.linalg.matrix_rank(Z)
    for keep in range(1, reached + 1):
        found = lasso.select(gram, correlation, keep)
        assert len(set(found.kept.tolist())) == keep
        assert found.kept.tolist() == sorted(found.kept.tolist())
        assert set(found.beta.nonzero().flatten().tolist()) <= set(found.kept.tolist())
        assert found.alpha == pytest.approx(float((correlation - gram @ found.beta).abs().max()), abs=1e-12)
        assert_optimal(gram, correlation, found.alpha, found.beta)
        assert found.violation < 1e-8


@pytest.mark.parametrize("keep", [1, 3, 7, 12])
def test_selection_is_the_first_knot_with_so_many(keep: int) -> None:
    gram, correlation = moments(*problem(3))
    expected, _, coefficients = lars_path_gram(correlation.numpy(), gram.numpy(), n_samples=1, method="lasso")
    knot = np.flatnonzero((np.abs(coefficients) > 1e-12).sum(0) == keep)[0]
    found = lasso.select(gram, correlation, keep)
    assert found.kept.tolist() == np.flatnonzero(np.abs(coefficients[:, knot]) > 1e-12).tolist()
    assert found.alpha == pytest.approx(expected[knot], abs=1e-6 * expected[0])
    np.testing.assert_allclose(found.beta.numpy(), coefficients[:, knot], atol=1e-6)


def test_all_channels_is_least_squares() -> None:
    Z, y = problem(4)
    found = lasso.select(*moments(Z, y), Z.shape[1])
    np.testing.assert_allclose(found.beta.numpy(), np.linalg.lstsq(Z, y, rcond=None)[0], rtol=1e-9)
    assert found.alpha < 1e-12


@pytest.mark.parametrize("scale", [1e-12, 1e-5, 1e5, 1e12])
@pytest.mark.parametrize("other", [1e-12, 1e12])
def test_scale_does_not_change_the_choice(scale: float, other: float) -> None:
    gram, correlation = moments(*problem(5))
    for keep in (1, 5, 12):
        found = lasso.select(gram, correlation, keep)
        scaled = lasso.select(gram * scale, correlation * other, keep)
        assert torch.equal(scaled.kept, found.kept)
        torch.testing.assert_close(scaled.beta * (scale / other), found.beta, rtol=1e-8, atol=1e-12)
        assert scaled.alpha / other == pytest.approx(found.alpha, rel=1e-8, abs=1e-12)


def test_permuted_channels_give_the_permuted_choice() -> None:
    gram, correlation = moments(*problem(6))
    order = torch.from_numpy(np.random.default_rng(0).permutation(12))
    for keep in range(1, 13):
        found = lasso.select(gram, correlation, keep)
        permuted = lasso.select(gram[order][:, order], correlation[order], keep)
        assert sorted(order[permuted.kept].tolist()) == found.kept.tolist()
        torch.testing.assert_close(permuted.beta, found.beta[order], rtol=1e-8, atol=1e-10)


def test_dead_and_repeated_channels_are_never_both_taken() -> None:
    Z, y = problem(7, channels=6)
    Z = np.column_stack([Z, Z[:, 2], -Z[:, 3], np.zeros(len(Z)), 0.5 * Z[:, 0]])  # 6 repeats 2, 7 mirrors 3, 8 dead
    gram, correlation = moments(Z, y)
    found = lasso.select(gram, correlation, 6)
    kept = set(found.kept.tolist())
    assert not kept & {8, 9}
    assert len(kept & {2, 6}) == len(kept & {3, 7}) == 1
    whole = lasso.select(gram, correlation, 10)
    assert whole.kept.tolist() == [*range(10)]
    for keep in (7, 8, 9):  # beyond the path: repeats in the order of their energy, the dead one last
        more = lasso.select(gram, correlation, keep)
        assert kept < set(more.kept.tolist()) <= {*range(10)} - {8}
        assert len(more.kept) == keep
        torch.testing.assert_close(more.beta, whole.beta)
        assert more.alpha < 1e-12 * float(correlation.abs().max())
        assert more.violation < 1e-12


def test_channels_that_add_nothing_come_last() -> None:
    gram, correlation = torch.diag(torch.tensor([1.0, 2.0, 1.0, 3.0])), torch.tensor([1.0, 0.0, 0.5, 0.0])
    assert lasso.select(gram, correlation, 2).beta.tolist() == [1.0, 0.0, 0.5, 0.0]
    assert lasso.select(gram, correlation, 3).kept.tolist() == [0, 2, 3]
    assert choice.search(gram, correlation, 4).beta.tolist() == [1.0, 0.0, 0.5, 0.0]
    assert lasso.select(torch.eye(3), torch.zeros(3), 1).kept.tolist() == [0]
    assert lasso.select(torch.zeros(3, 3), torch.zeros(3), 2).violation == 0


def test_equal_channels_enter_one_by_one() -> None:
    for keep in (1, 2, 3):
        found = lasso.select(torch.eye(4), torch.tensor([1.0, -1.0, 1.0, 0.5]), keep)
        assert len(set(found.kept.tolist())) == keep
        assert set(found.kept.tolist()) <= {0, 1, 2}


def test_tiny_contributions_are_still_ordered() -> None:
    found = lasso.select(torch.eye(4), torch.tensor([1.0, 1e-9, 3e-9, 2e-9], dtype=torch.float64), 3)
    assert found.kept.tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("gram", "correlation", "keep", "message"),
    [
        (torch.eye(3), torch.ones(3), 0, r"keep=0 must lie in 1..3"),
        (torch.eye(3), torch.ones(3), 4, r"keep=4 must lie in 1..3"),
        (torch.eye(3), torch.ones(2), 1, r"\(3, 3\) and correlation \(2,\)"),
        (torch.ones(3, 2), torch.ones(2), 1, r"\(3, 2\)"),
        (torch.eye(3) * torch.nan, torch.ones(3), 1, "NaN"),
        (torch.eye(3), torch.full((3,), torch.inf), 1, "infinity"),
        (-torch.eye(3), torch.ones(3), 1, "non-negative diagonal"),
    ],
)
def test_bad_input_is_named(gram: Tensor, correlation: Tensor, keep: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lasso.select(gram, correlation, keep)
