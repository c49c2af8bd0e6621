"""Structured probabilistic pruning (SPP, arXiv 1709.06994): the equations, as functions of tensors.

A convolution's weight (O, C, kh, kw) is a GEMM matrix of O filters by N_c = C·kh·kw columns. A column, one input
channel at one tap over all filters, is a weight group. Every group has a pruning probability.

    symbol      shape    meaning
    p           (N_c,)   pruning probability, 0 at the start; 1 is final
    r           (N_c,)   rank of a group by the L1 norm of its weights, 0 the smallest
    R           ()       pruning ratio of the layer; target = ceil(R·N_c) groups go
    A, u        ()       largest increment of p; height of the curve's centre of symmetry is u·A
    alpha, N    ()       decay of the curve and its centre, from A, u and the target
    g           (N_c,)   mask of a group, 0 with probability p, drawn anew every iteration

Two forms. "adaptive", the authors' code: groups that are gone (p = 1) leave the ranking, and alpha comes from what
remains of the target. "literal", Algorithm 1 of the paper: ranks of all groups and alpha of the whole target
throughout, which takes far more updates (notebook 02).
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

FORMS = ("adaptive", "literal")


def increment(rank: Tensor | float, remaining: Tensor | int, *, A: float = 0.05, u: float = 0.25) -> Tensor:
    """Change of the pruning probability at one update, SPP eq. (3), with alpha = ln(2/u) / remaining.

    rank, of any shape, counts among the groups not yet pruned, 0 the least important; `remaining` of these must still
    reach p = 1. Returns float64 like `rank`: A at 0, u·A at N = -ln(u) / alpha (the centre of symmetry), 0 at
    `remaining`, negative beyond. Raises ValueError for remaining < 1, A outside (0, 1] or u outside (0, 1); a tensor
    `remaining`, which broadcasts to `rank`, is not checked.

    >>> increment(torch.tensor([0, 5, 15]), 10)
    tensor([ 0.0500,  0.0177, -0.0457], dtype=torch.float64)
    """
    if not isinstance(remaining, Tensor) and remaining < 1:
        raise ValueError(f"remaining={remaining} must be at least 1; a layer at its target needs no update")
    check(A=A, u=u)
    r = torch.as_tensor(rank, dtype=torch.float64)
    alpha = math.log(2 / u) / torch.as_tensor(remaining, dtype=torch.float64, device=r.device)
    centre = -math.log(u) / alpha  # N
    falling = A * torch.exp(-alpha * r)
    # exp would overflow far beyond the target near the end; the clamp to [0, 1] of eq. (4) makes both the same
    rising = 2 * u * A - A * torch.exp((-alpha * (2 * centre - r)).clamp(max=700))
    return torch.where(r <= centre, falling, rising)  # SPP eq. (3)


def check(*, A: float, u: float, form: str = "adaptive") -> None:
    """Raise ValueError for A outside (0, 1], u outside (0, 1) or another form."""
    if not 0 < A <= 1 or not 0 < u < 1:
        raise ValueError(f"A={A} must lie in (0, 1] and u={u} in (0, 1); the paper uses A=0.05, u=0.25")
    if form not in FORMS:
        raise ValueError(f"form={form!r} must be one of {', '.join(FORMS)}")


def advance(
    p: Tensor, importance: Tensor, target: Tensor, *, A: float = 0.05, u: float = 0.25, form: str = "adaptive"
) -> Tensor:
    """SPP eq. (3) and (4) for many layers at once, without a check and without waiting for the device.

    p and importance are (L, N), target (L,); a layer with fewer than N groups is filled up with p = 1 and infinite
    importance, and these count in its target. Returns the new p (L, N), the same in a layer at its target.
    """
    gone = p == 1
    missing = (target - gone.sum(1))[:, None]  # (L, 1), to prune yet
    remaining = missing if form == "adaptive" else (target - importance.isinf().sum(1))[:, None]
    last = importance.isinf() if form == "literal" else gone  # literally, groups that are gone rank first: they are 0
    score = importance.masked_fill(gone, -torch.inf).masked_fill(last, torch.inf)
    rank = score.argsort(dim=1, stable=True).argsort(dim=1).double()  # (L, N), 0 the least important
    moved = (p.double() + increment(rank, remaining.clamp(min=1), A=A, u=u)).clamp(0, 1)  # SPP eq. (4)
    return torch.where(gone | (missing <= 0), p, moved.to(p.dtype))


def update(
    probability: Tensor, importance: Tensor, target: int, *, A: float = 0.05, u: float = 0.25, form: str = "adaptive"
) -> Tensor:
    """New pruning probabilities of one layer, SPP eq. (3) and (4).

    probability: (N_c,) in [0, 1]; groups at 1 stay there, and leave the ranking in the adaptive form.
    importance: (N_c,) finite, larger is more important; only its order counts, ties by position.
    target: groups to prune in this layer, 0 to N_c. Other input is a ValueError.

    Returns a new tensor like `probability`, the same values once `target` groups are at 1. In the adaptive form no more
    than `target` ever reach 1: only ranks below the remaining target gain probability.
    """
    check(A=A, u=u, form=form)
    if probability.dim() != 1 or probability.shape != importance.shape:
        raise ValueError(f"probability {tuple(probability.shape)}, importance {tuple(importance.shape)} must be (N_c,)")
    if not bool(((probability >= 0) & (probability <= 1)).all()):
        raise ValueError(f"probabilities must lie in [0, 1], found {probability.min():g} to {probability.max():g}")
    if bad := int((~importance.isfinite()).sum()):
        raise ValueError(f"{bad} of {len(importance)} importances are NaN or infinite; check the weights")
    if not 0 <= target <= len(probability):
        raise ValueError(f"target={target} must lie in 0 to {len(probability)}, the number of groups")
    goal = torch.tensor([target], device=probability.device)
    return advance(probability[None], importance[None], goal, A=A, u=u, form=form)[0]


def draw(probability: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Masks g, one Bernoulli draw a group: True (kept) with probability 1 - p; p = 1 never, p = 0 always."""
    return torch.rand(probability.shape, generator=generator, device=probability.device) >= probability


def target_count(ratio: float, groups: int, layer: str = "") -> int:
    """ceil(ratio·groups) without rounding errors: 0.28 of 75 is 21, although 0.28 * 75 > 21 in floating point.

    Raises ValueError where the ratio lies outside (0, 1) or would leave no group.
    """
    where = f"layer {layer!r}: " if layer else ""
    if not 0 < ratio < 1:
        raise ValueError(f"{where}ratio={ratio} must lie in (0, 1); leave a layer out of `layers` to skip it")
    count = max(1, math.ceil(Fraction(ratio).limit_denominator(10**6) * groups))
    if count >= groups:
        raise ValueError(f"{where}ratio={ratio} of {groups} groups would leave none; lower it or skip the layer")
    return count
