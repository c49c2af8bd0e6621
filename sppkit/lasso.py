"""LASSO selection of the input channels of one convolution (Channel Pruning, step i): the exact path.

Symbols of the paper (arXiv 1707.06168, eqs. 1-2), for N sampled patches, c input channels and n outputs:
  Z_i (N, n)   contribution X_i W_i' of channel i to the output   Y (N, n)  output to reproduce
  G (c, c)     gram, G_ij = <Z_i, Z_j> / N                        q (c,)    correlation, q_i = <Z_i, Y> / N
  beta (c,)    weight of each contribution; 0 drops the channel   alpha     the paper's lambda, in units of q

G and q suffice, and Z is never formed:  1/(2N) |Y - sum_i beta_i Z_i|^2 = 1/2 beta'G beta - q'beta + constant.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from threadpoolctl import threadpool_limits
from torch import Tensor

PARALLEL = 1e-10  # a correlation closer than this to following alpha never leaves it: a tie, not a crossing
TIE = 1e-12  # relative distance of two values of alpha that are one knot
ROUNDING = 1e-13  # of the largest coefficient, or of the largest terms of a sum, that counts as 0
END = 1e-13  # alpha, relative to max |q|, that counts as 0


@dataclass(frozen=True)
class Selection:
    kept: Tensor  # (keep,) int64, ascending
    beta: Tensor  # (c,) float64
    alpha: float
    violation: float  # of the optimality conditions, relative to max |q|


def path(gram: Tensor, correlation: Tensor) -> tuple[Tensor, Tensor]:
    """Knots of the exact path of argmin 1/2 b'Gb - q'b + alpha |b|_1, from alpha = max |q| down to 0.

    Returns `alphas` (K,) and `betas` (K, c), float64, linear between knots. A channel without energy stays at 0; of
    proportional ones only the strongest enters. Raises ValueError for NaN, infinity or other shapes than (c, c), (c,).

    >>> alphas, betas = path(torch.eye(2), torch.tensor([2.0, -1.0]))
    >>> alphas.tolist(), betas.tolist()
    ([2.0, 1.0, 0.0], [[0.0, 0.0], [1.0, 0.0], [2.0, -1.0]])
    """
    G, q, energy, top = _scaled(gram, correlation)
    alphas, betas, _ = _path(G, q)
    return torch.from_numpy(alphas * top).to(gram.device), torch.from_numpy(betas * (top / energy)).to(gram.device)


def select(gram: Tensor, correlation: Tensor, keep: int) -> Selection:
    """The channels of the path's first knot, from large alpha, with exactly `keep` non-zero coefficients.

    If each stretch with `keep` channels ends in one leaving, the middle of the first is taken. A width that the path
    does not reach is made up at its end, alpha = 0, by channels that repeat others or add nothing, with beta = 0: those
    of most energy first. `violation` is the largest of |q_i - (G beta)_i - alpha sign(beta_i)| where beta is not 0.
    Raises ValueError as `path` does, and for keep out of 1..c.

    >>> found = select(torch.eye(3), torch.tensor([1.0, 3.0, 2.0]), keep=2)
    >>> found.kept.tolist(), found.beta.tolist(), found.alpha
    ([1, 2], [0.0, 2.0, 1.0], 1.0)
    """
    G, q, energy, top = _scaled(gram, correlation)
    if not 1 <= keep <= len(q):
        raise ValueError(f"keep={keep} must lie in 1..{len(q)}")
    _, betas, active = _path(G, q, keep)
    widths = active.sum(1)  # of the stretches: up or down by one, so none is left out
    stretches = [*np.flatnonzero(widths == keep)]
    knots = [k for k in stretches if np.count_nonzero(betas[k + 1]) == keep]
    k = (knots or stretches or [len(active) - 1])[0]
    beta = (betas[k] + betas[k + 1]) / 2 if stretches and not knots else betas[k + 1]
    on = active[k] if stretches else beta != 0
    residual = q - G @ beta
    alpha = float(np.abs(residual).max())
    violation = np.abs(residual - alpha * np.sign(beta))[beta != 0].max(initial=0.0)
    chosen = np.sort(np.lexsort((-np.diag(G), ~on))[:keep])
    kept, beta = (torch.from_numpy(a).to(gram.device) for a in (chosen, beta * (top / energy)))
    return Selection(kept=kept, beta=beta, alpha=alpha * top, violation=float(violation))


def _scaled(gram: Tensor, correlation: Tensor) -> tuple[np.ndarray, np.ndarray, float, float]:
    """G over its mean live diagonal, q over its largest entry, dead channels exactly 0; and both scales."""
    if correlation.ndim != 1 or gram.shape != 2 * correlation.shape or not len(gram):
        raise ValueError(f"gram {tuple(gram.shape)} and correlation {tuple(correlation.shape)} must be (c, c) and (c,)")
    G, q = (tensor.detach().double().cpu().numpy() for tensor in (gram, correlation))
    power = np.diag(G)
    sound = np.isfinite(G).all() and np.isfinite(q).all() and (power >= 0).all()
    if not sound or not np.allclose(G, G.T, rtol=0, atol=1e-6 * power.max()):
        raise ValueError("NaN or infinity in gram or correlation, or gram not symmetric with a non-negative diagonal")
    dead = power <= (len(q) * np.finfo(float).eps) ** 2 * power.max()
    G, q = np.where(dead | dead[:, None], 0.0, G), np.where(dead, 0.0, q)
    energy, top = float(power[~dead].mean()) if not dead.all() else 1.0, float(np.abs(q).max())
    return G / energy, q / (top or 1.0), energy, top


@threadpool_limits.wrap(limits=1)  # the matrices are small
def _path(G: np.ndarray, q: np.ndarray, keep: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Homotopy: alphas (K,), betas (K, c) and which channels are active between two knots, (K - 1, c).

    On a stretch with active channels A and signs s, beta_A = G_AA^-1 (q_A - alpha s), and |q - G beta| <= alpha for the
    others. Each is solved afresh: no errors build up, ties end in stretches of zero length (`lars_path_gram` fails).
    Ends early at the first knot of a stretch with `keep` channels where all of them are still there.
    """
    c, alpha, norm = len(q), float(np.abs(q).max()), np.sqrt(np.diag(G))
    sign = np.where(np.arange(c) == np.abs(q).argmax(), np.sign(q), 0.0)  # 0 off the active set
    alphas, betas, active = [alpha], [np.zeros(c)], np.zeros((0, c), dtype=bool)
    while alpha > END and len(active) < 20 * c:
        on, line = np.flatnonzero(sign), np.zeros((c, 2))
        line[on] = cho_solve(cho_factor(G[np.ix_(on, on)]), np.stack([q[on], sign[on]], 1))
        (start, slope), (fit, t) = line.T, (G @ line).T
        p = q - fit  # so that beta = start - alpha slope, and the correlation with the residual is p + alpha t
        p[np.abs(p) <= ROUNDING * norm * (norm @ np.abs(start))] = 0.0  # the span of the active channels: adds nothing
        with np.errstate(divide="ignore", invalid="ignore"):  # alpha at which a channel leaves, or enters with + or -
            leave = np.where(sign * slope < 0, start / slope, 0.0)
            up, down = (np.where((sign == 0) & (1 - s * t > PARALLEL), s * p / (1 - s * t), 0.0) for s in (1, -1))
        enter = np.maximum(up, down)
        left, joined, event = leave.argmax(), enter.argmax(), float(max(leave.max(), enter.max()))
        joins, active = enter[joined] >= max(leave[left], END), np.vstack([active, sign != 0])
        moved = event < alpha * (1 - TIE)
        alpha = alpha if not moved else event if event > END else 0.0
        beta = start - alpha * slope if moved else betas[-1].copy()
        if joins:
            sign[joined] = 1.0 if up[joined] >= down[joined] else -1.0
        elif alpha:
            sign[left] = 0.0
        beta[sign * beta <= ROUNDING * np.abs(beta).max()] = 0.0  # a channel that left, or that a tie holds at 0
        alphas.append(alpha)
        betas.append(beta)
        if keep == len(on) == np.count_nonzero(beta):
            break
    return np.array(alphas), np.array(betas), active
