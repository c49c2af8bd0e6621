"""Methods of `sppkit.pruner` to compare SPP with, added to METHODS when this is imported.

name           groups   an update                                                               source (arXiv)
gradual        any      masks a cubic share by L1 norm, chosen anew at every update             1710.01878
ssl            columns  group lasso while training; at the last update the smallest norms go    1608.03665
deterministic  any      SPP's increments counted, without its probability                       1709.06994
random         any      random groups go at the first update                                    control
taylor         filters  TP: the smallest |gradient · feature map| of all layers, step by step   1611.06440
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sppkit.groups import Groups
from sppkit.methods import METHODS, PENALTIES, cut, oneshot, positions, probabilistic
from sppkit.pruner import Pruner

SSL_STRENGTH = 1.2e-3  # of the group lasso, as in the SPP authors' code


def gradual(pruner: Pruner, importance: Tensor) -> Tensor:
    """A share 1 - (1 - k/K)³ of each target is masked, by the norms of now: a masked group can come back."""
    k = pruner.updates + 1
    position = positions(pruner, importance)
    gone, reached = cut(pruner, np.where(position <= 1 - (1 - k / pruner.rounds) ** 3 + 1e-9, position, np.inf))
    pruner.probability.copy_(torch.from_numpy(gone))
    if k >= pruner.rounds or reached:
        pruner.remove(cut(pruner, position)[0], last=True)
    return pruner.probability


def ssl(pruner: Pruner, importance: Tensor) -> Tensor:
    """Nothing goes while `group_lasso` acts; after the last round the smallest norms."""
    return oneshot(pruner, importance) if pruner.updates + 1 >= pruner.rounds else pruner.probability


def group_lasso(pruner: Pruner) -> None:
    """The gradient of SSL's penalty, strength · w / |w_group|, until the pruner is finished."""
    norm = pruner._p.new_zeros(pruner._p.shape).index_add_(0, pruner._own, pruner._weight.square()).sqrt_()
    strength = pruner._going * SSL_STRENGTH
    pruner._gradient.addcmul_(pruner._weight / norm.clamp_min_(1e-12)[pruner._own], strength)


def deterministic(pruner: Pruner, importance: Tensor) -> Tensor:
    """SPP without its probability: a group counts up to 1, is whole until then, and never comes back."""
    pruner.probability.copy_(pruner.trace[-1] if pruner.trace else pruner.probability)
    seen = probabilistic(pruner, importance, falls=False)
    pruner.probability.copy_(pruner.gone)
    return seen


def random(pruner: Pruner, importance: Tensor) -> Tensor:
    """Random groups of each layer, at once and for good."""
    generator = torch.Generator().manual_seed(pruner.generator.initial_seed())  # rank 0's
    return oneshot(pruner, torch.rand(len(importance), generator=generator).to(importance))


def taylor(pruner: Pruner, importance: Tensor) -> Tensor:
    """TP: the least important of all layers, until the FLOP ratio of the round is reached."""
    if pruner.score is None:
        raise ValueError("method='taylor' needs score=..., such as one that calls `rivals.scores`")
    k = pruner.updates + 1
    order = importance.double().cpu().numpy()
    for part in pruner.slices.values():
        order[part][order[part].argmax()] = np.inf  # a layer keeps one
    wanted = 1 + ((pruner.plan.flop_ratio or pruner.plan.reached) - 1) * min(k / pruner.rounds, 1)
    pruner.remove(cut(pruner, order, flop_ratio=wanted)[0], last=k >= pruner.rounds)
    return pruner.probability


METHODS.update(gradual=gradual, ssl=ssl, deterministic=deterministic, random=random, taylor=taylor)
PENALTIES.update(ssl=group_lasso)


def scores(network: nn.Module, groups: Groups, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """TP's criterion for each filter (G,): the mean over images of |sum of gradient · feature map|, of norm 1 a layer.

    A gate of 1 for each image and filter has that sum as its gradient. Gradients of the weights are left as they were.
    """
    gates: dict[str, Tensor] = {}
    sums: dict[str, Tensor | float] = dict.fromkeys(groups.layers, 0.0)

    def gate(name: str, output: Tensor) -> Tensor:
        gates[name] = output.new_ones(*output.shape[:2], 1, 1, requires_grad=True)  # (B, O, 1, 1)
        return output * gates[name]

    hooks = [m.register_forward_hook(lambda *a, n=name: gate(n, a[2])) for name, m in groups.layers.items()]
    training = network.training
    try:
        network.eval()
        for x, y in batches:
            loss = F.cross_entropy(network(x), y, reduction="sum")
            for name, gradient in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
                sums[name] = sums[name] + gradient.abs().sum((0, 2, 3))  # (O,)
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return torch.cat([F.normalize(torch.as_tensor(sums[name]), dim=0) for name in groups.layers])
