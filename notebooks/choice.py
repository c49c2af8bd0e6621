"""Ways to choose the input channels of a convolution that stay, CP's and others; each is followed by the same refit.

`functools.partial(choose, name)` is what `cp.mask_channels` takes as `select`.

name          keeps                                                           source
lasso         what LASSO picks, by the exact path                             CP, arXiv 1707.06168, eqs. 1-2
alternating   the same in ROUNDS steps to the width, the weights of the       the same, as first described there
              channels left refit after each
paper         the same as the authors' code poses it: 400 samples, alpha      CP-code, see `search`
              by bisection, up to 10 % more channels than asked for
first_k       the first                                                       CP, single-layer experiments
max_response  those made by the filters of largest L1 norm                    Li et al., ICLR 2017
random        any
thinet        what is left when channels go one by one, each time the one     Luo et al., ICCV 2017
              that leaves the least energy in the sum of those gone
inverse       what LASSO picks for targets mapped through BatchNorm's         CP-code, for ResNets with BatchNorm
              inverse, see `bare_problem`; without a BatchNorm as "lasso"
"""

import copy

import torch
from torch import Tensor, nn

from sppkit.lasso import Selection, path, select
from sppkit.reconstruct import Moments, lasso_problem, refit

ROUNDS = 5


def thinet(gram: Tensor, keep: int) -> Tensor:
    """Channels (keep,) kept by ThiNet's greedy rule, from the gram (c, c) of the contributions <Z_i, Z_j>.

    The set T that goes grows by the channel with the least |sum of Z_i over T|^2, counted with it; contributions have
    zero mean, since a refit mends the mean.

    >>> thinet(torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 2.0]]), keep=1)
    tensor([2])
    """
    alive, total, with_gone = torch.ones(len(gram), dtype=torch.bool), 0.0, torch.zeros_like(gram[0])
    for _ in range(len(gram) - keep):
        energy = (total + gram.diagonal() + 2 * with_gone).masked_fill(~alive.to(gram.device), torch.inf)
        goes = int(energy.argmin())
        total, with_gone = float(energy[goes]), with_gone + gram[goes]
        alive[goes] = False
    return alive.nonzero().flatten().to(gram.device)


def paper_problem(moments: Moments, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`lasso_problem` as the authors' code poses it: W_i as it is, one intercept for all outputs, a mean over them.

    The target is Y without the bias (n,). With an intercept for each output, as in `lasso_problem`, what differs
    between the means of two outputs is not for the channels to explain; here it is.
    """
    n, c = weight.shape[:2]
    gram, correlation = lasso_problem(moments, weight, unit_norm=False)
    W, mean = weight.detach().to(moments.xtx).flatten(2), moments.mean_x.view(c, -1)  # (n, c, kk), (c, kk)
    Z, Y = (W * mean).sum(2), moments.mean_y - bias.detach().to(moments.xtx)  # means (n, c), (n,)
    gram, correlation = (gram + Z.T @ Z) / n, (correlation + Z.T @ Y) / n
    return gram - torch.outer(Z.mean(0), Z.mean(0)), correlation - Z.mean(0) * Y.mean()


def bare_problem(moments: Moments, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`lasso_problem` of a convolution without the BatchNorm that is folded into it, which multiplies by `scale` (n,).

    Its targets are the others mapped through BatchNorm's inverse, so an output counts 1 / scale^2 as much. The refit is
    of each output alone and stays the same: only the choice differs.

    >>> moments = Moments().add(torch.tensor([[1.0], [-1.0]]), torch.tensor([[2.0, 6.0], [-2.0, -6.0]]))
    >>> folded, scale = torch.tensor([2.0, 6.0]).view(2, 1, 1, 1), torch.tensor([1.0, 3.0])
    >>> [value.round(decimals=6).tolist() for value in bare_problem(moments, folded, scale)]
    [[[1.0]], [2.828427]]
    """
    bare, by = copy.copy(moments), scale.to(moments.xtx)
    bare.xty = moments.xty / by
    return lasso_problem(bare, weight.detach().to(by) / by[:, None, None, None])


def search(gram: Tensor, correlation: Tensor, keep: int, *, start: float = 1e-3, tolerance: float = 0.1) -> Selection:
    """What the authors' code accepts: `keep` channels or up to `tolerance` more, at an alpha found by bisection.

    alpha doubles from `start`, in units of the correlation, until fewer than `keep` coefficients are left, then the
    interval below is halved until the count fits. The coefficients are exact here; there coordinate descent finds
    them, and the first `start` is the last layer's. Fields, ValueError and widths beyond the path as `lasso.select`.

    >>> search(torch.eye(3), torch.tensor([0.1, 0.3, 0.2]), keep=1).kept.tolist()
    [1]
    """
    alphas, betas = (values.cpu().numpy() for values in path(gram, correlation))
    active = (betas[:-1] != 0) | (betas[1:] != 0)  # between two knots
    most = int((1 + tolerance) * keep)
    if not 1 <= keep <= active.sum(1).max(initial=0):
        return select(gram, correlation, keep)

    def count(alpha: float) -> int:
        return 0 if alpha >= alphas[0] else int(active[min(int((alphas > alpha).sum()), len(active)) - 1].sum())

    low, high = 0.0, start
    while count(high) >= keep:
        high *= 2
    for _ in range(200):
        alpha = (low + high) / 2
        if keep <= (found := count(alpha)) <= most:
            break
        low, high = (alpha, high) if found > most else (low, alpha)
    else:
        raise ValueError(f"no alpha leaves {keep} to {most} channels: several enter together; use `lasso.select`")
    k = int((alphas > alpha).sum()) - 1
    share = 0.0 if k + 1 == len(alphas) else (alphas[k] - alpha) / (alphas[k] - alphas[k + 1])
    beta = torch.from_numpy(betas[k] + share * (betas[min(k + 1, len(betas) - 1)] - betas[k])).to(gram.device)
    residual = (correlation.double() - gram.double() @ beta - alpha * beta.sign())[beta != 0].abs()
    violation = float(residual.max() / correlation.abs().max()) if len(residual) else 0.0
    return Selection(kept=beta.nonzero().flatten(), beta=beta, alpha=alpha, violation=violation)


def _lasso(moments: Moments, weight: Tensor, keep: int) -> Selection:
    gram, correlation = lasso_problem(moments, weight)
    return select(gram, correlation, keep)


def _alternating(moments: Moments, weight: Tensor, keep: int) -> Selection:
    c, shrinking = weight.shape[1], weight.double().clone()
    for k in range(ROUNDS - 1):
        kept = _lasso(moments, shrinking, round(c * (keep / c) ** ((k + 1) / ROUNDS))).kept
        shrinking.zero_()
        shrinking[:, kept] = refit(moments, kept, (weight.shape[2], weight.shape[3])).weight
    return _lasso(moments, shrinking, keep)


CHOICES = ("lasso", "alternating", "paper", "first_k", "max_response", "random", "thinet")  # of any layer
KNOWN = (*CHOICES, "inverse")


def choose(
    name: str,
    moments: Moments,
    conv: nn.Conv2d,
    keep: int,
    *,
    few: Moments | None = None,
    producer: Tensor | None = None,
    generator: torch.Generator | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, float, float]:
    """Kept channels (keep,) ascending, and LASSO's alpha and violation, 0 for the others; dead ones are its last.

    few: moments of the samples that "paper" sees, all by default. producer: weight (c, ...) of the filters that make
    the input, if one convolution makes it. generator: of "random". scale: (n,) of a BatchNorm that is folded into the
    convolution, for "inverse". Raises ValueError for an unknown name, keep out of 1..c, "max_response" without a
    producer.
    """
    weight, c = conv.weight.detach(), conv.in_channels
    if name not in KNOWN:
        raise ValueError(f"select={name!r} must be one of {', '.join(KNOWN)}")
    if not 1 <= keep <= c:
        raise ValueError(f"keep={keep} must lie in 1..{c}")
    if name in ("lasso", "inverse", "alternating", "paper"):
        if name == "paper":
            bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias
            gram, correlation = paper_problem(moments if few is None else few, weight, bias)
            found = search(gram, correlation, keep)
        elif name == "inverse" and scale is not None:
            found = select(*bare_problem(moments, weight, scale), keep)
        else:
            found = (_alternating if name == "alternating" else _lasso)(moments, weight, keep)
        return found.kept, found.alpha, found.violation
    if name == "max_response":
        if producer is None:
            raise ValueError("select='max_response' needs the filters that make a channel, and this input is shared")
        kept = producer.abs().flatten(1).sum(1).topk(keep).indices
    elif name == "thinet":
        kept = thinet(lasso_problem(moments, weight, unit_norm=False)[0], keep)
    else:
        order = torch.arange(c) if name == "first_k" else torch.randperm(c, generator=generator)
        kept = order[:keep].to(weight.device)
    return kept.sort().values, 0.0, 0.0
