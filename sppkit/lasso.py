"""LASSO selection of the input channels of one convolution (Channel Pruning, step i): the exact path.

Symbols of the paper (arXiv 1707.06168, eqs. 1-2), for N sampled patches, c input channels and n outputs:
  Z_i (N, n)   contribution X_i W_i' of channel i to the output   Y (N, n)  output to reproduce
  G (c, c)     gram, G_ij = <Z_i, Z_j> / N                        q (c,)    correlation, q_i = <Z_i, Y> / N
  beta (c,)    weight of each contribution; 0 drops the channel   alpha     the paper's lambda, in units of q

Why the Gram matrix suffices:  1/(2N) |Y - sum_i beta_i Z_i|^2 = 1/2 beta'G beta - q'beta + constant.  The
LASSO sees the samples through G and q alone, so Z (N n rows, c columns) is never formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import cho_solve, solve_triangular
from threadpoolctl import threadpool_limits
from torch import Tensor

DEPENDENT = 1e-12  # share of a channel's energy outside the span of others below which it only adds rounding
PARALLEL = 1e-10  # a correlation closer than this to following alpha never leaves it: a tie, not a crossing
TIE = 1e-12  # relative distance of two values of alpha that are one knot
ROUNDING = 1e-14  # of the largest coefficient
END = 1e-13  # alpha, relative to max |q|, that counts as 0


@dataclass(frozen=True)
class Selection:
    kept: Tensor  # (keep,) int64, ascending
    beta: Tensor  # (c,) float64
    alpha: float
    violation: float  # of the optimality conditions, relative to max |q|


def path(gram: Tensor, correlation: Tensor) -> tuple[Tensor, Tensor]:
    """Knots of the exact path of argmin 1/2 b'Gb - q'b + alpha |b|_1, from alpha = max |q| down to 0.

    Returns `alphas` (K,), descending, and `betas` (K, c), float64; between knots beta is linear in alpha. A
    dead channel (no energy) stays at 0; of proportional channels only the strongest enters. The scale of the
    input does not matter. Raises ValueError for NaN or infinite entries and for shapes other than (c, c) and
    (c,).

    >>> alphas, betas = path(torch.eye(2), torch.tensor([2.0, -1.0]))
    >>> alphas.tolist(), betas.tolist()
    ([2.0, 1.0, 0.0], [[0.0, 0.0], [1.0, 0.0], [2.0, -1.0]])
    """
    G, q, energy, top = _scaled(gram, correlation)
    alphas, betas, _ = _path(G, q)
    return (
        torch.from_numpy(alphas * top).to(gram.device),
        torch.from_numpy(betas * (top / energy)).to(gram.device),
    )


def select(gram: Tensor, correlation: Tensor, keep: int) -> Selection:
    """The channels of the path's first knot, from large alpha, with exactly `keep` non-zero coefficients.

    `alpha` = max |q - G beta|; `violation` is the largest departure from the conditions q_i - (G beta)_i =
    alpha sign(beta_i) where beta_i is not 0, over max |q|. If each stretch with `keep` channels ends in one
    of them leaving, the middle of the first is taken. If the path reaches the least-squares fit with fewer
    (the others add nothing), it is completed by the channels of largest energy outside the span of those it
    has. Raises ValueError for `keep` outside 1..c, fewer live or linearly independent channels than `keep`,
    an all-zero correlation, NaN or infinite entries, shapes that do not match.

    >>> found = select(torch.eye(3), torch.tensor([1.0, 3.0, 2.0]), keep=2)
    >>> found.kept.tolist(), found.beta.tolist(), found.alpha
    ([1, 2], [0.0, 2.0, 1.0], 1.0)
    """
    G, q, energy, top = _scaled(gram, correlation)
    if not 1 <= keep <= len(q):
        raise ValueError(f"keep={keep} must lie in 1..{len(q)}, the number of channels")
    if top == 0:
        raise ValueError("the correlation is 0 everywhere: no channel explains the output (is it constant?)")
    live, rank = int((np.diag(G) > 0).sum()), len(_independent(G, []))
    if live < keep:
        raise ValueError(f"keep={keep}, but only {live} of {len(q)} channels are live; keep at most {live}")
    if rank < keep:
        raise ValueError(
            f"keep={keep}, but only {rank} of {live} live channels are independent; keep at most {rank}"
        )
    alphas, betas, active = _path(G, q)
    knots = np.flatnonzero((betas != 0).sum(1) == keep)
    stretches = np.flatnonzero(active.sum(1) == keep)
    if len(knots):
        alpha, beta = alphas[knots[0]], betas[knots[0]]
        kept = np.flatnonzero(beta)
    elif len(stretches):
        first = stretches[0]
        alpha, beta = (alphas[first] + alphas[first + 1]) / 2, (betas[first] + betas[first + 1]) / 2
        kept = np.flatnonzero(active[first])
    else:
        kept = np.sort(_independent(G, list(np.flatnonzero(betas[-1])))[:keep])
        alpha, beta = 0.0, np.zeros(len(q))
        spread = np.sqrt(G[kept, kept])
        beta[kept] = (
            np.linalg.solve(G[np.ix_(kept, kept)] / np.outer(spread, spread), q[kept] / spread) / spread
        )
    residual = q - G @ beta
    alpha = float(np.abs(residual).max())
    violation = float(np.abs(residual - alpha * np.sign(beta))[beta != 0].max(initial=0.0))
    return Selection(
        kept=torch.from_numpy(kept).to(gram.device),
        beta=torch.from_numpy(beta * (top / energy)).to(gram.device),
        alpha=alpha * top,
        violation=violation,
    )


def independent(gram: Tensor) -> int:
    """Number of linearly independent channels, the largest width `select` can give.

    >>> independent(torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    1
    """
    return len(_independent(_scaled(gram, torch.zeros(len(gram)))[0], []))


def _scaled(gram: Tensor, correlation: Tensor) -> tuple[np.ndarray, np.ndarray, float, float]:
    """G over its mean live diagonal, q over its largest entry, dead channels exactly 0; and both scales."""
    if (
        gram.ndim != 2
        or gram.shape != (len(correlation), len(correlation))
        or correlation.ndim != 1
        or not len(gram)
    ):
        raise ValueError(
            f"gram {tuple(gram.shape)} and correlation {tuple(correlation.shape)} must be (c, c) and (c,)"
        )
    G, q = (tensor.detach().double().cpu().numpy() for tensor in (gram, correlation))
    if not (np.isfinite(G).all() and np.isfinite(q).all()):
        raise ValueError(
            "gram or correlation holds NaN or infinity; check the weights and the sampled patches"
        )
    power = np.diag(G)
    if (power < 0).any() or not np.allclose(G, G.T, rtol=0, atol=1e-6 * np.abs(power).max()):
        raise ValueError("gram must be symmetric with a non-negative diagonal")
    dead = power <= (len(q) * np.finfo(float).eps) ** 2 * power.max()
    G, q = np.where(dead | dead[:, None], 0.0, G), np.where(dead, 0.0, q)
    energy, top = float(power[~dead].mean()) if not dead.all() else 1.0, float(np.abs(q).max())
    return G / energy, q / (top or 1.0), energy, top


def _path(G: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Homotopy: alphas (K,), betas (K, c) and the channels active between two knots (K - 1, c).

    On a stretch with active channels A and signs s, beta_A = G_AA^-1 (q_A - alpha s) and |q - G beta| <=
    alpha elsewhere. Each stretch is solved afresh from G and q, so errors do not build up from knot to knot,
    and ties end in zero-length stretches. (`lars_path_gram` carries correlations along and loses the path on
    ties: 0/1 features, repeated channels.)
    """
    c, diagonal = len(q), np.diag(G)
    top, first = float(np.abs(q).max()), int(np.abs(q).argmax())
    alpha, alphas, betas = top, [top], [np.zeros(c)]
    stretches: list[np.ndarray] = []
    active, sign, L = [first], np.sign(q), np.sqrt(diagonal[[first]])[:, None]
    with threadpool_limits(1):
        while alpha > END and len(stretches) < 20 * c:
            line = np.zeros((c, 2))  # beta = line[:, 0] - alpha line[:, 1]
            line[active] = cho_solve((L, True), np.stack([q[active], sign[active]], 1), check_finite=False)
            (start, slope), (p, t) = line.T, (G @ line).T
            p = q - p  # correlation = p + alpha t
            leave, up, down = np.zeros(c), np.zeros(c), np.zeros(c)  # alpha of each channel's next event
            shrinks = sign * slope < 0
            np.divide(start, slope, out=leave, where=shrinks)
            idle = diagonal > 0
            idle[active] = False
            np.divide(p, 1 - t, out=up, where=idle & (1 - t > PARALLEL))
            np.divide(-p, 1 + t, out=down, where=idle & (1 + t > PARALLEL))
            enter = np.maximum(up, down)
            joined, row = -1, np.zeros(0)
            for joined in np.argsort(-enter, kind="stable"):  # almost always the first
                row = solve_triangular(L, G[active, joined], lower=True, check_finite=False)
                if enter[joined] <= END or diagonal[joined] - row @ row > DEPENDENT * diagonal[joined]:
                    break
            left = int(leave.argmax())
            stretches.append(np.isin(np.arange(c), active))
            leaves = leave[left] > max(enter[joined], END)
            event = leave[left] if leaves else enter[joined]
            moved = event < alpha * (1 - TIE)
            if moved:
                alpha = float(event) if event > END else 0.0
            beta = start - alpha * slope if moved else betas[-1].copy()
            beta[shrinks & (leave >= alpha * (1 - TIE) - END)] = 0.0  # exactly, all that leave at this alpha
            beta[np.abs(beta) <= ROUNDING * np.abs(beta).max()] = 0.0  # a tie can hold a channel at 0
            if leaves:
                active.remove(left)
                L = np.linalg.cholesky(G[np.ix_(active, active)])
            elif alpha:
                sign[joined] = 1.0 if up[joined] >= down[joined] else -1.0
                L = np.block([[L, np.zeros((len(active), 1))], [row, np.sqrt(diagonal[joined] - row @ row)]])
                active.append(int(joined))
            alphas.append(alpha)
            betas.append(beta)
    return np.array(alphas), np.array(betas), np.array(stretches)


def _independent(G: np.ndarray, first: list[int]) -> list[int]:
    """Independent channels by pivoted Cholesky: `first`, then by the share of energy that is new."""
    spread = np.sqrt(np.diag(G))
    spread[spread == 0] = 1.0
    unit = G / np.outer(spread, spread)
    order, rest, rows = [], np.diag(unit).copy(), np.zeros((len(G), len(G)))
    for k in range(len(G)):
        pivot = first[k] if k < len(first) else int(rest.argmax())
        if rest[pivot] <= DEPENDENT:
            break
        rows[k] = (unit[pivot] - rows[:k].T @ rows[:k, pivot]) / np.sqrt(rest[pivot])
        rest -= rows[k] ** 2
        rest[pivot] = 0.0
        order.append(pivot)
    return order
