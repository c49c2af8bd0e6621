"""What one convolution reads and gives, for a look at it by itself."""

import copy

import torch
from torch import Tensor, nn

from sppkit.compact import trace
from sppkit.graph import Site
from sppkit.samples import collect, convolution, patches


@torch.no_grad()
def sample_layer(
    network: nn.Module, layer: str, images: Tensor, *, points: int = 10, seed: int = 0, batch_size: int = 100
) -> tuple[Tensor, Tensor]:
    """Patches X (N, c * kh * kw) and outputs Y (N, n) of one convolution, as `channel_prune` samples them.

    In evaluation mode, BatchNorm not folded, before any activation: at `points` distinct positions (at most all) of
    each prepared image (B, 3, H, W), drawn from `seed`. Raises ValueError for a grouped layer or no convolution,
    misshapen or infinite images.

    >>> X, Y = sample_layer(nn.Sequential(nn.Conv2d(3, 8, 5)), "0", torch.randn(2, 3, 9, 9), points=4)
    >>> X.shape, Y.shape
    (torch.Size([8, 75]), torch.Size([8, 8]))
    """
    network = copy.deepcopy(network).eval()
    graph = trace(network)
    convolution(network, layer)  # or a ValueError
    nodes = [node for node in graph.nodes if node.target == layer]
    if not nodes:
        raise ValueError(f"layer {layer!r} is never run")
    place = Site(layer, nodes[0], None)
    samples = collect(network, graph, {layer: place}, images, points, seed, batch_size)[layer]
    X, Y = zip(*patches(network, graph, place, images, samples, batch_size, None), strict=True)
    return torch.cat(X), torch.cat(Y)
