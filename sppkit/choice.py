"""Ways to choose the input channels of a convolution that stay; each is followed by the same refit.

name          keeps                                                           source
lasso         what LASSO picks, by the exact path                             CP, arXiv 1707.06168, eqs. 1-2
paper         the same as the authors' code poses it: 400 samples, alpha      CP-code, see `lasso.search`
              by bisection, up to 10 % more channels than asked for
first_k       the first                                                       CP, single-layer experiments
max_response  those made by the filters of largest L1 norm                    Li et al., ICLR 2017
random        any
thinet        what is left when channels go one by one, each time the one     Luo et al., ICCV 2017
              that leaves the least energy in the sum of those gone
"""

import torch
from torch import Tensor, nn

from sppkit.lasso import search, select
from sppkit.reconstruct import Moments, lasso_problem, paper_problem


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


def _lasso(moments: Moments, weight: Tensor, keep: int) -> tuple[Tensor, float, float]:
    gram, correlation = lasso_problem(moments, weight)
    found = select(gram, correlation, min(keep, max(int((gram.diagonal() > 0).sum()), 1)))
    return found.kept, found.alpha, found.violation


CHOICES = ("lasso", "paper", "first_k", "max_response", "random", "thinet")


def choose(
    name: str,
    moments: Moments,
    few: Moments,
    conv: nn.Conv2d,
    keep: int,
    producer: Tensor | None,
    generator: torch.Generator,
) -> tuple[Tensor, float, float]:
    """Kept channels (keep,) ascending, and LASSO's alpha and violation, 0 for the others.

    few: moments of the samples that "paper" sees. producer: weight (c, ...) of the filters which make the input, if one
    convolution makes it. Raises ValueError for an unknown name, and for "max_response" without a producer.
    """
    if name not in CHOICES:
        raise ValueError(f"select={name!r} must be one of {', '.join(CHOICES)}")
    weight, c = conv.weight, conv.in_channels
    if name == "lasso":
        return _lasso(moments, weight, keep)
    if name == "paper":
        found = search(
            *paper_problem(few, weight, weight.new_zeros(len(weight)) if conv.bias is None else conv.bias), keep
        )
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
