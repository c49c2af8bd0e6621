"""What TP ranks filters by (Molchanov et al., arXiv 1611.06440): `score` of the method "taylor" in `sppkit.methods`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sppkit.groups import Groups


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
