"""Least-squares reconstruction of one convolution's output (Channel Pruning, step ii), from moments alone.

Symbols of the paper (arXiv 1707.06168, eqs. 1-2), for N sampled patches, c input channels and n outputs:
  X (N, c kh kw)    patches, channel by channel as `weight.flatten(1)`   Y (N, n)      outputs to reproduce
  W (n, c, kh, kw)  weight; W_i (n, kh kw) is what reads channel i       beta (c,)     LASSO coefficients
  A (c kh kw)^2     centred X'X / N                                      B (c kh kw)^2 W'W over the outputs
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256  # columns of a product that is symmetric, computed at once
PIVOT = 1e-10  # share of a column's energy outside the span of the others that Cholesky needs
RIDGE = 1e-9  # of the largest column's energy, where the rank is known to be too low


class Moments:
    """Count, means and centred second moments of X (P, d) and Y (P, n), float64, on the device of the first chunk.

    xtx (d, d), xty (d, n), yty (n,) sum products of deviations from mean_x (d,) and mean_y (n,). Chunks are merged by
    their means (Chan, Golub, LeVeque 1979), so an offset costs no digits.
    """

    xty: Tensor
    _mean: Tensor

    def __init__(self) -> None:
        self.count = 0

    def add(self, X: Tensor, Y: Tensor) -> "Moments":
        """Take in a chunk and return self; ValueError, and no change, for NaN, infinity or other widths."""
        sound = X.ndim == Y.ndim == 2 and len(X) == len(Y) > 0
        if not sound or (self.count and (X.shape[1], Y.shape[1]) != self.xty.shape):
            widths = f"(d, n) = {tuple(self.xty.shape)}" if self.count else "any d and n"
            raise ValueError(f"X {tuple(X.shape)}, Y {tuple(Y.shape)} must be (P > 0, d), (P, n) with {widths}")
        V, d = torch.cat([X.detach(), Y.detach()], 1).double(), X.shape[1]  # (P, d + n)
        V -= (start := self._mean if self.count else V[0].clone())  # the first sample: exact for constant features
        step, share = V.mean(0), len(V) / (self.count + len(V))
        if not step.isfinite().all():
            raise ValueError("X or Y holds NaN or infinity; check the images and the weights of the network")
        if not self.count:
            self._mean, self._scatter = start, V.new_zeros(V.shape[1], V.shape[1])
            self.mean_x, self.mean_y = self._mean[:d], self._mean[d:]  # views: they follow
            self.xtx, self.xty, self.yty = self._scatter[:d, :d], self._scatter[:d, d:], self._scatter.diagonal()[d:]
        V -= step
        self._scatter.addr_(step, step, alpha=self.count * share)
        for a, b in ((a, a + BLOCK) for a in range(0, V.shape[1], BLOCK)):  # V'V, of which half says all
            self._scatter[a:b, a:].addmm_(V[:, a:b].T, V[:, a:])
            self._scatter[b:, a:b] = self._scatter[a:b, b:].T
        self._mean += share * step
        self.count += len(V)
        return self


@dataclass(frozen=True)
class Refit:
    weight: Tensor  # (n, keep, kh, kw) float64
    bias: Tensor  # (n,) float64
    error: float  # relative reconstruction error, see `error`
    rank: int  # of the normal equations, at most; keep kh kw less this is how many directions they leave undetermined


def lasso_problem(moments: Moments, weight: Tensor, *, unit_norm: bool = True) -> tuple[Tensor, Tensor]:
    """Gram (c, c) and correlation (c,) of the contributions Z_i = X_i W_i' (N, n), for `lasso.select`.

    <Z_i, Z_j> is the sum of the (i, j) block of A * B, outputs centred. `unit_norm` divides W_i by its Frobenius norm,
    as eq. (2) demands; a channel whose W_i is 0 is dead. Raises ValueError for another weight than the moments'.
    """
    n, c, kh, kw = weight.shape
    if (c * kh * kw, n) != moments.xty.shape:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit moments of X'Y {tuple(moments.xty.shape)}")
    kk, W = kh * kw, weight.detach().to(moments.xtx).flatten(2)  # (n, c, kk)
    if unit_norm:  # CP eq. (2), |W_i|_F = 1
        norm = W.square().sum((0, 2), keepdim=True).sqrt()  # (1, c, 1)
        W = W / torch.where(norm > 0, norm, 1.0)
    W = W.flatten(1)  # (n, c*kk)
    A, B = moments.xtx / moments.count, W.T @ W  # (c*kk, c*kk)
    gram = (A * B).view(c, kk, c, kk).sum((1, 3))  # (c, c)
    return gram, (moments.xty / moments.count * W.T).view(c, kk, n).sum((1, 2))  # and (c,)


def refit(
    moments: Moments, kept: Tensor, kernel: tuple[int, int], *, ridge: float = 0.0, own: Tensor | None = None
) -> Refit:
    """Least squares with intercept of Y on the kept channels' patches: CP step (ii), once.

    ridge: pulls the weights towards `own` (n, keep, kh, kw), 0 by default, with that many mean energies of a column.
    Where inputs hardly vary, least squares alone, the paper's, makes large weights of noise. Constant ones get none.

    Cholesky; the minimum-norm pseudo-inverse where columns are nearly dependent. Where counting alone shows the rank
    too low (few samples, constant columns), a ridge of RIDGE keeps to Cholesky, far cheaper. Raises ValueError for
    `kept` out of range or repeated, a kernel that does not divide the moments, a constant Y, a ridge below 0.

    >>> moments = Moments().add(torch.tensor([[0.0, 5.0], [4.0, 5.0]]), torch.tensor([[1.0], [9.0]]))
    >>> fit = refit(moments, torch.tensor([0]), (1, 1))
    >>> round(fit.weight.item(), 12), round(fit.bias.item(), 12), round(fit.error, 12)
    (2.0, 1.0, 0.0)
    """
    columns = _columns(moments, kept, kernel)
    A, b = moments.xtx[columns][:, columns], moments.xty[columns]  # (m, m), (m, n)
    diagonal = A.diagonal()  # a view
    rank = min(int((diagonal > 0).sum()), moments.count - 1)
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge={ridge} must be 0 or more, and finite")
    if ridge:
        pull = ridge * diagonal.mean()
        b = b if own is None else b + pull * (diagonal > 0)[:, None] * own.to(b).flatten(1).T
        diagonal += pull
    elif rank < len(A):
        diagonal += RIDGE * diagonal.max()
    factor, failed = torch.linalg.cholesky_ex(A)
    if not failed and bool((factor.diagonal().square() > PIVOT * diagonal).all()):
        solution = torch.cholesky_solve(b, factor)  # (m, n)
    else:
        values, vectors = torch.linalg.eigh(A)
        used = values > 10 * len(A) * torch.finfo(A.dtype).eps * values.max()
        rank, basis = int(used.sum()), vectors[:, used]  # (m, rank)
        solution = basis @ ((basis.T @ b) / values[used, None])  # (m, n)
    bias = moments.mean_y - solution.T @ moments.mean_x[columns]
    weight = solution.T.reshape(-1, len(kept), *kernel)  # (n, keep, kh, kw)
    return Refit(weight=weight, bias=bias, error=error(moments, weight, bias, kept), rank=rank)


def error(moments: Moments, weight: Tensor, bias: Tensor, kept: Tensor) -> float:
    """|Y - Yhat|^2 / |Y - mean Y|^2 of weight (n, keep, kh, kw), bias (n,) on the kept channels; raises as `refit`."""
    columns = _columns(moments, kept, weight.shape[2:])
    W, total = weight.detach().to(moments.xtx).flatten(1).T, float(moments.yty.sum())  # (m, n)
    if total == 0:
        raise ValueError("Y is constant over the samples, so there is nothing to reconstruct; check the images")
    offset = bias.detach().to(moments.xtx) - moments.mean_y + W.T @ moments.mean_x[columns]  # (n,) mean of Yhat - Y
    explained = 2 * (W * moments.xty[columns]).sum() - (W * (moments.xtx[columns][:, columns] @ W)).sum()
    return max(float(total - explained + moments.count * offset.square().sum()) / total, 0.0)


def _columns(moments: Moments, kept: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Rows of the moments that belong to the kept channels, (keep * kh * kw,)."""
    if not moments.count:
        raise ValueError("no samples: add chunks of X and Y to the moments first")
    kk, d = math.prod(kernel), len(moments.mean_x)
    if d % kk:
        raise ValueError(f"kernel={tuple(kernel)} does not divide the {d} columns of X into channels")
    sound = kept.dtype != torch.bool and 0 < len(kept) == len(kept.unique())
    if not sound or kept.min() < 0 or kept.max() >= d // kk:
        raise ValueError(f"kept={kept.tolist()} must be distinct channels, indices in 0..{d // kk - 1}")
    kept = kept.to(moments.xtx.device)
    return (kept[:, None] * kk + torch.arange(kk, device=kept.device)).flatten()
