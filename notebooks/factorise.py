"""Factorisations that channel pruning is compared and combined with: one convolution becomes two or three thinner ones.

A convolution has n filters of kh x kw over c channels. Its factors, from input to output:

    spatial   V (r, c, kh, 1), H (n, r, 1, kw)                  Jaderberg et al. 2014, by SVD
    channel   Q W (d, c, kh, kw), P (n, d, 1, 1)                Zhang et al. 2015, "Asym."
    3d        V (r, c, kh, 1), Q H (d, r, 1, kw), P (n, d, 1, 1)  both, "Asym. 3D"

"3c" is "3d" with channels pruned between one layer and the next (arXiv 1707.06168, section 4.1.2). Each layer is fitted
to the original's outputs with inputs from the network so far; where a ReLU follows, to what the ReLU makes of them.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping

import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sppkit import cost, cp
from sppkit.compact import compact, trace
from sppkit.graph import Site, fold, sites, unfold
from sppkit.reconstruct import Moments
from sppkit.samples import Samples, collect, convolution, frugal, patches

METHODS = ("spatial", "channel", "3d", "3c")
SCHEDULE = ((0.1, 30), (1.0, 20))  # lambda and rounds of the alternation, as in the authors' code
NARROWER = 1.15  # channels before over channels after the pruning of "3c", as in the authors' code


def split(conv: nn.Conv2d, rank: int) -> nn.Sequential:
    """V and H, by SVD the best approximation of the weight by `rank` products; the bias goes with H.

    Exact at rank min(c kh, n kw). Raises ValueError for a rank out of 1..that, a grouped convolution, padding that is
    not by a number of zeros.

    >>> split(nn.Conv2d(8, 16, 3, padding=1), 5)
    Sequential(
      (0): Conv2d(8, 5, kernel_size=(3, 1), stride=(1, 1), padding=(1, 0), bias=False)
      (1): Conv2d(5, 16, kernel_size=(1, 3), stride=(1, 1), padding=(0, 1))
    )
    """
    n, c, kh, kw = conv.weight.shape
    if conv.groups > 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ValueError(f"{conv} cannot be split: it must have one group and padding by a number of zeros")
    if not 1 <= rank <= min(c * kh, n * kw):
        raise ValueError(f"rank={rank} must lie in 1..{min(c * kh, n * kw)}")
    left, values, right = torch.linalg.svd(conv.weight.detach().double().permute(1, 2, 0, 3).reshape(c * kh, n * kw))
    left, right = left[:, :rank] * values[:rank].sqrt(), right[:rank] * values[:rank, None].sqrt()
    (sh, sw), (ph, pw), (dh, dw) = conv.stride, conv.padding, conv.dilation
    V = nn.Conv2d(c, rank, (kh, 1), (sh, 1), (ph, 0), (dh, 1), bias=False)
    H = nn.Conv2d(rank, n, (1, kw), (1, sw), (0, pw), (1, dw), bias=conv.bias is not None)
    V.weight.data = left.T.reshape(rank, c, kh, 1).to(conv.weight)
    V.weight.data[:, conv.weight.eq(0).transpose(0, 1).flatten(1).all(1)] = 0.0  # pruned channels, exactly
    H.weight.data = right.view(rank, 1, n, kw).permute(2, 0, 1, 3).contiguous().to(conv.weight)
    if conv.bias is not None:
        H.bias = nn.Parameter(conv.bias.detach().clone())
    return nn.Sequential(V, H)


def low_rank(
    X: Tensor, Y: Tensor, rank: int, *, relu: bool = False, ridge: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced-rank regression: P (n, k), Q (k, d), b (n,), for which P Q x + b comes nearest to y, k at most `rank`.

    X is (N, d), Y (N, n). k is `rank`, or the rank of the centred X or n where these are lower. ridge: a penalty on
    |P Q|^2, in mean energies of a column of the centred X.

    relu: nearest after a ReLU. Then auxiliary responses U are fitted in turn with P, Q, b: min |relu(U) - relu(Y)|^2 +
    lambda |U - X Q' P' - b|^2, each entry of U exactly, the better of a negative and a positive one. In float64.
    """
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge={ridge} must be 0 or more, and finite")
    X, Y = X.double(), Y.double()
    centre = X.mean(0)
    R = X - centre
    values, vectors = torch.linalg.eigh(R.T @ R)
    used = values > len(values) * torch.finfo(values.dtype).eps * values.max()
    whiten = vectors[:, used] / (values[used] + ridge * values.mean()).sqrt()  # (d, m)
    R = R @ whiten  # (N, m) with orthonormal columns, shorter with a ridge

    def fit(U: Tensor) -> tuple[Tensor, Tensor]:
        B = (U - U.mean(0)).T @ R  # (n, m)
        k = min(rank, *B.shape)
        left = torch.linalg.eigh(B @ B.T)[1][:, -k:] if k < len(B) else torch.eye(k).to(B)
        return left, left.T @ B  # P (n, k) and Q (k, m)

    U, Z = Y, Y.relu()
    P, Q = fit(U)
    for weight, rounds in SCHEDULE if relu else ():
        for _ in range(rounds):
            now = R @ Q.T @ P.T + U.mean(0)
            negative, positive = now.clamp(max=0), ((weight * now + Z) / (weight + 1)).relu()
            loss = [(each.relu() - Z).square() + weight * (each - now).square() for each in (negative, positive)]
            U = torch.where(loss[0] < loss[1], negative, positive)
            P, Q = fit(U)
    Q = Q @ whiten.T
    return P, Q, U.mean(0) - P @ (Q @ centre)


@frugal
@torch.no_grad()
def factorise(
    network: nn.Module,
    images: Tensor,
    *,
    method: str,
    flop_ratio: float | None = None,
    ranks: Mapping[str, tuple[int, int]] | None = None,
    ridge: float = 0.0,
    norms: bool = True,
    points: int = 10,
    seed: int = 0,
    batch_size: int = 100,
) -> tuple[nn.Module, pd.DataFrame]:
    """A factorised copy of `network` in evaluation mode, and a table of it.

    Layers are those that `cp` can prune, for all methods but "channel" without those of 1x1, front to back. flop_ratio:
    see `solve`; or ranks, layer -> (r, d), 0 for a factor that is not wanted. ridge: of `low_rank` and, in "3c",
    of `reconstruct.refit`. norms: BatchNorms, folded meanwhile, are put back behind a layer's last factor; without them
    the function is the same, but training needs a far smaller learning rate. images, points, seed, batch_size: as in
    `cp.mask_channels`. Of the table, a row a layer: layer, r, d, kept (input channels), error of the layer's outputs
    over their variance, both after the ReLU where one follows. It holds the samples of a layer's inputs in float64,
    (B points, c kh kw), a few times. Raises ValueError for an unknown method or layer, and as `solve`, `split` and
    `cp.mask_channels` do.

    >>> network = nn.Sequential(nn.Conv2d(3, 32, 5), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
    >>> images = torch.randn(20, 3, 16, 16)
    >>> small, table = factorise(network, images, method="spatial", flop_ratio=2)
    >>> table[["layer", "r", "d", "kept"]].values.tolist(), round(cost.flop_ratio(network, small, images), 2)
    ([['2', 28, 0, 32], ['4', 39, 0, 64]], 1.99)
    """
    if method not in METHODS or (flop_ratio is None) == (ranks is None):
        raise ValueError(f"method={method!r} must be one of {', '.join(METHODS)}, with either flop_ratio or ranks")
    original, folded = fold(network)
    small, graph = copy.deepcopy(original), trace(original)
    example = images[:1].to(next(original.parameters()).device)
    wanted = ranks if ranks is not None else solve(original, example, method, flop_ratio or 0.0)
    found = sites(original, graph)
    if unknown := [name for name in wanted if name not in found]:
        raise ValueError(f"layer {unknown[0]!r} cannot be factorised; choose among {[*found]}")
    for name, (r, d) in wanted.items():
        n, c, kh, kw = convolution(original, name).weight.shape
        if not (0 <= r <= (most := min(c * kh, n * kw)) and 0 <= d <= n and r + d):
            raise ValueError(f"ranks ({r}, {d}) of layer {name!r}: r must lie in 0..{most} and d in 0..{n}, not both 0")
    places = {name: Site(name, place.node, place.producer) for name, place in found.items() if name in wanted}
    narrower = _narrower(places, {name: convolution(original, name).in_channels for name in places}, wanted, method)
    targets, rows = collect(original, graph, places, images, points, seed, batch_size), []

    def look(layer: str, samples: Samples) -> Iterator[tuple[Tensor, Tensor]]:
        now = trace(small)
        place = Site(layer, next(node for node in now.nodes if node.target == layer), None)
        return patches(small, now, place, images, samples, batch_size, None)

    for name, place in places.items():
        (r, d), samples, relu, last = wanted[name], targets.pop(name), _rectified(original, place.node), name
        if name in narrower:
            moments = Moments()
            for x, y in look(name, samples):
                moments.add(x, y)
            cp.prune_layer(convolution(small, name), moments, narrower[name], ridge=ridge)
        Y = torch.cat([y for _, y in samples]).double()
        if r:
            small.set_submodule(name, split(convolution(small, name), r).to(example.device))
            last = f"{name}.1"
        conv, X = convolution(small, last), torch.cat([x for x, _ in look(last, samples)]).double()  # (N, m kh kw)
        if r:
            P, Q, b = low_rank(X, Y, min(len(conv.weight), X.shape[1]), relu=relu, ridge=ridge)
            conv.weight.copy_((P @ Q).view_as(conv.weight))
            conv.bias = nn.Parameter(b.to(conv.weight))
        response = X @ conv.weight.double().flatten(1).T  # (N, n), without the bias
        bias = torch.zeros_like(response[0]) if conv.bias is None else conv.bias.double()
        if d:
            P, Q, bias = low_rank(response, Y, d, relu=relu, ridge=ridge)
            thin = nn.Conv2d(conv.in_channels, len(Q), conv.kernel_size, conv.stride, conv.padding, conv.dilation)  # type: ignore[arg-type]
            thin.weight.data, thin.bias = torch.einsum("kn,n...->k...", Q, conv.weight.double()).to(conv.weight), None
            mix = nn.Conv2d(len(Q), len(P), 1)
            mix.weight.data, mix.bias = P[:, :, None, None].to(conv.weight), nn.Parameter(bias.to(conv.weight))
            before = [small.get_submodule(f"{name}.0")] if r else []
            small.set_submodule(name, nn.Sequential(*before, thin, mix))
            response = response @ Q.T @ P.T
        act: Callable[[Tensor], Tensor] = torch.relu if relu else torch.clone
        Z, kept = act(Y), narrower.get(name, convolution(original, name).in_channels)
        error = (act(response + bias) - Z).square().sum() / (Z - Z.mean(0)).square().sum()
        rows.append([name, r, d, kept, float(error)])
    table = pd.DataFrame(rows, columns=["layer", "r", "d", "kept", "error"])
    small = unfold(small, network, folded).eval() if norms else small
    return compact(small, columns=False) if narrower else small, table


def solve(network: nn.Module, example: Tensor, method: str, flop_ratio: float) -> dict[str, tuple[int, int]]:
    """Ranks (r, d) by layer for a FLOP ratio of the network, as near as they allow, the same for each of the layers.

    "3d" and "3c" take r = d, as the authors' code does; H and P stay one convolution, d = 0, where 3 d >= 2 n.
    `example` is (B, C, H, W). Raises ValueError for a ratio of 1 or less or out of reach.
    """
    if not 1 < flop_ratio < math.inf:
        raise ValueError(f"flop_ratio={flop_ratio} must be above 1; 2 means half the multiply-accumulates")
    table = cost.conv_table(network, example).set_index("layer")
    dense = table["macs"]
    places = sites(network, trace(network))
    convs = {name: convolution(network, name) for name in places}
    if method != "channel":
        convs = {name: conv for name, conv in convs.items() if min(conv.kernel_size) > 1}
    places = {name: places[name] for name in convs}
    # V runs on the input's columns: how many there are for each of the output's
    wide = dict[str, float]()
    for name, conv in convs.items():
        reach = conv.dilation[1] * (conv.kernel_size[1] - 1) + 1 - sum(conv._reversed_padding_repeated_twice[:2])
        wide[name] = conv.stride[1] + (reach - conv.stride[1]) / int(table.at[name, "width"])

    def at(ratio: float) -> dict[str, tuple[int, int]]:
        ranks = {}
        for name, conv in convs.items():
            (n, c, kh, kw), w = conv.weight.shape, wide[name]
            left, most = conv.weight.numel() / ratio, min(c * kh, n * kw)
            b = c * kh * w + n
            r = (math.sqrt(b * b + 4 * kw * left) - b) / (2 * kw)  # of kw r^2 + b r = left
            if method == "channel":
                r, d = 0.0, min(left / (c * kh * kw + n), n)
            elif method == "spatial" or 3 * r >= 2 * n:
                r, d = left / (c * kh * w + n * kw), 0.0
            else:
                d = r
            r, d = (max(int(value), 1) if value else 0 for value in (min(r, most), d))
            ranks[name] = (r, d)
        return ranks

    def reached(ranks: Mapping[str, tuple[int, int]]) -> float:
        inputs = {name: conv.in_channels for name, conv in convs.items()}
        narrower = _narrower(places, inputs, ranks, method)
        outputs = {places[name].producer: count for name, count in narrower.items()}
        left = dense.astype(float)
        for name, (r, d) in ranks.items():
            (n, c, kh, kw), w = convs[name].weight.shape, wide[name]
            c_left, n_left = narrower.get(name, c), outputs.get(name, n)
            first = r * c_left * kh * w + (d or n_left) * r * kw if r else d * c_left * kh * kw
            left[name] *= (first + d * n_left) / (n * c * kh * kw)
        return float(dense.sum() / left.sum())

    low, high = 0.5, 2.0 * dense.sum()
    if (most := reached(at(high))) < flop_ratio:
        raise ValueError(f"flop_ratio={flop_ratio} is out of reach: ranks of 1 give {most:.2f}")
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if reached(at(middle)) >= flop_ratio else (middle, high)
    return min(at(low), at(high), key=lambda ranks: abs(reached(ranks) - flop_ratio))


def _narrower(
    places: Mapping[str, Site], inputs: Mapping[str, int], ranks: Mapping[str, tuple[int, int]], method: str
) -> dict[str, int]:
    """Input channels to keep in each layer whose input one factorised layer makes, for "3c": never below its rank."""
    pairs = {name: place.producer for name, place in places.items() if place.producer in ranks and method == "3c"}
    return {name: max(round(inputs[name] / NARROWER), ranks[pair or ""][1]) for name, pair in pairs.items()}


def _rectified(network: nn.Module, node: fx.Node) -> bool:
    """Whether the layer's output goes through a ReLU alone (folded BatchNorms between)."""
    while len(node.users) == 1:
        (node,) = node.users
        module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.ReLU) or node.target in (F.relu, torch.relu, "relu"):
            return True
        if not isinstance(module, nn.Identity):
            return False
    return False
