"""Least-squares reconstruction of one convolution's output (Channel Pruning, step ii), from moments alone.

Symbols of the paper (arXiv 1707.06168, eqs. 1-2), for N sampled patches, c input channels and n outputs:
  X (N, c kh kw)    patches, channel by channel as `weight.flatten(1)`   Y (N, n)      outputs to reproduce
  W (n, c, kh, kw)  weight; W_i (n, kh kw) is what reads channel i       beta (c,)     LASSO coefficients
  A (c kh kw)^2     centred X'X / N                                      B (c kh kw)^2 W'W over the outputs

The samples are read once, in chunks: memory is O((c kh kw)^2 + chunk). Every width's LASSO problem, refit and
error follow from the moments without going back to the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PIVOT = 1e-10  # share of a column's energy outside the span of the others that Cholesky needs


class Moments:
    """Means and centred second moments of X (P, d) and Y (P, n), float64, on the device of the first chunk.

    Attributes: count; mean_x (d,), mean_y (n,); xtx (d, d), xty (d, n), yty (n,), sums over samples of
    products of deviations from the means. Chunks are merged by their means (Chan, Golub, LeVeque 1979), so a
    large offset costs no digits.

    >>> moments = Moments().add(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]]))
    >>> moments.mean_x.item(), moments.xtx.item(), moments.xty.item()
    (1.0, 2.0, 4.0)
    """

    mean_x: Tensor
    mean_y: Tensor
    xtx: Tensor
    xty: Tensor
    yty: Tensor

    def __init__(self) -> None:
        self.count = 0

    def add(self, X: Tensor, Y: Tensor) -> Moments:
        """Take in a chunk and return self; ValueError, and no change, for NaN, infinity or other widths."""
        if X.ndim != 2 or Y.ndim != 2 or len(X) != len(Y) or not len(X):
            raise ValueError(
                f"X {tuple(X.shape)} and Y {tuple(Y.shape)} must be (P, d) and (P, n) with P of at least 1"
            )
        if self.count and (X.shape[1:], Y.shape[1:]) != (self.mean_x.shape, self.mean_y.shape):
            raise ValueError(
                f"a chunk of widths {X.shape[1]} and {Y.shape[1]} does not fit moments of widths "
                f"{len(self.mean_x)} and {len(self.mean_y)}"
            )
        for name, values in (("X", X), ("Y", Y)):
            if not values.isfinite().all():
                raise ValueError(
                    f"{name} holds NaN or infinity; check the images and the weights of the network"
                )
        X, Y = X.detach().double(), Y.detach().double()
        if not self.count:
            d, n = X.shape[1], Y.shape[1]
            self.mean_x, self.mean_y = X[0].clone(), Y[0].clone()  # exact for constant features
            self.xtx, self.xty, self.yty = X.new_zeros(d, d), X.new_zeros(d, n), X.new_zeros(n)
        X, Y = X - self.mean_x, Y - self.mean_y  # from the means so far
        step_x, step_y = X.mean(0), Y.mean(0)
        X, Y = X - step_x, Y - step_y
        weight = self.count * len(X) / (self.count + len(X))
        self.xtx += X.T @ X + weight * torch.outer(step_x, step_x)
        self.xty += X.T @ Y + weight * torch.outer(step_x, step_y)
        self.yty += Y.square().sum(0) + weight * step_y.square()
        self.count += len(X)
        self.mean_x = self.mean_x + step_x * (len(X) / self.count)
        self.mean_y = self.mean_y + step_y * (len(X) / self.count)
        return self


@dataclass(frozen=True)
class Refit:
    weight: Tensor  # (n, keep, kh, kw) float64
    bias: Tensor  # (n,) float64
    error: float  # relative reconstruction error, see `error`
    rank: int  # of the normal equations; below keep kh kw, the weight is the one of minimum norm


def lasso_problem(moments: Moments, weight: Tensor, *, unit_norm: bool = True) -> tuple[Tensor, Tensor]:
    """Gram (c, c) and correlation (c,) of the contributions Z_i = X_i W_i' (N, n), for `lasso.select`.

    Z is never formed: <Z_i, Z_j> is the sum of the (i, j) block of A * B. Each output is centred, which is
    the paper's intercept. `unit_norm` divides W_i by its Frobenius norm as eq. (2) demands; a channel whose
    W_i is 0 is dead.

    >>> moments = Moments().add(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[2.0], [-2.0]]))
    >>> gram, correlation = lasso_problem(moments, torch.full((1, 2, 1, 1), 2.0))
    >>> gram.tolist(), correlation.tolist()
    ([[1.0, 0.0], [0.0, 0.0]], [2.0, 0.0])
    """
    n, c, kh, kw = weight.shape
    if (c * kh * kw, n) != moments.xty.shape:
        raise ValueError(
            f"weight {tuple(weight.shape)} does not fit moments of X'Y {tuple(moments.xty.shape)}"
        )
    W = weight.detach().to(moments.xtx).flatten(1)  # (n, c*kk)
    kk, A, B = kh * kw, moments.xtx / moments.count, W.T @ W  # (c*kk, c*kk)
    gram = (A * B).view(c, kk, c, kk).sum((1, 3))  # (c, c)
    correlation = (moments.xty / moments.count * W.T).view(c, kk, n).sum((1, 2))  # (c,)
    if unit_norm:  # CP eq. (2), |W_i|_F = 1
        norm = W.view(n, c, kk).square().sum((0, 2)).sqrt()  # (c,)
        scale = torch.where(norm > 0, 1 / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)
        gram, correlation = gram * torch.outer(scale, scale), correlation * scale
    return gram, correlation


def refit(moments: Moments, kept: Tensor, kernel: tuple[int, int]) -> Refit:
    """Least squares with intercept of Y on the kept channels' patches: CP step (ii), once.

    Cholesky; where the columns are dependent or nearly so, an eigenvalue pseudo-inverse, which gives the
    solution of minimum norm and a `rank` below keep kh kw. Raises ValueError for `kept` out of range or
    repeated, a kernel that does not divide the moments, and a constant Y.

    >>> moments = Moments().add(torch.tensor([[0.0, 5.0], [4.0, 5.0]]), torch.tensor([[1.0], [9.0]]))
    >>> fit = refit(moments, torch.tensor([0]), (1, 1))
    >>> round(fit.weight.item(), 12), round(fit.bias.item(), 12), round(fit.error, 12)
    (2.0, 1.0, 0.0)
    """
    columns = _columns(moments, kept, kernel)
    A, b = moments.xtx[columns][:, columns], moments.xty[columns]  # (m, m), (m, n)
    factor, failed = torch.linalg.cholesky_ex(A)
    if not failed and bool((factor.diagonal().square() > PIVOT * A.diagonal()).all()):
        solution, rank = torch.cholesky_solve(b, factor), len(A)  # (m, n)
    else:
        values, vectors = torch.linalg.eigh(A)
        used = values > 10 * len(A) * torch.finfo(A.dtype).eps * values.max()
        rank = int(used.sum())
        solution = vectors[:, used] @ ((vectors[:, used].T @ b) / values[used, None])  # (m, n)
    bias = moments.mean_y - solution.T @ moments.mean_x[columns]
    weight = solution.T.reshape(-1, len(kept), *kernel)  # (n, keep, kh, kw)
    return Refit(weight=weight, bias=bias, error=error(moments, weight, bias, kept), rank=rank)


def error(moments: Moments, weight: Tensor, bias: Tensor, kept: Tensor) -> float:
    """Relative reconstruction error |Y - Yhat|^2 / |Y - mean Y|^2 of a weight (n, keep, kh, kw) and bias.

    0 is perfect; 1 is no better than a constant output. Raises ValueError as `refit` does.

    >>> moments = Moments().add(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [3.0]]))
    >>> error(moments, torch.zeros(1, 1, 1, 1), torch.tensor([2.0]), torch.tensor([0]))
    1.0
    """
    columns = _columns(moments, kept, (weight.shape[2], weight.shape[3]))
    W, total = weight.detach().to(moments.xtx).flatten(1).T, float(moments.yty.sum())  # (m, n)
    if total == 0:
        raise ValueError(
            "Y is constant over the samples, so there is nothing to reconstruct; check the images"
        )
    offset = (
        bias.detach().to(moments.xtx) - moments.mean_y + W.T @ moments.mean_x[columns]
    )  # (n,) mean of Yhat - Y
    explained = 2 * (W * moments.xty[columns]).sum() - (W * (moments.xtx[columns][:, columns] @ W)).sum()
    return max(float(total - explained + moments.count * offset.square().sum()) / total, 0.0)


def _columns(moments: Moments, kept: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Rows of the moments that belong to the kept channels, (keep * kh * kw,)."""
    kk = kernel[0] * kernel[1]
    channels, rest = divmod(len(moments.mean_x), kk)
    if rest:
        raise ValueError(f"kernel={kernel} does not divide patches of {len(moments.mean_x)} values")
    if (
        not len(kept)
        or len(kept.unique()) != len(kept)
        or not 0 <= int(kept.min()) <= int(kept.max()) < channels
    ):
        raise ValueError(f"kept={kept.tolist()} must be distinct channels in 0..{channels - 1}, at least one")
    kept = kept.to(moments.xtx.device)
    return (kept[:, None] * kk + torch.arange(kk, device=kept.device)).flatten()
