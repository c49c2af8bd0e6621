"""Channel pruning of whole networks and what the paper compares it with: the network that is fine-tuned.

method     a network of the FLOP ratio                                                         source
cp         channels chosen, and the weights that read them refitted, see `cp.mask_channels`    CP, arXiv 1707.06168
fp         at CP's widths, the filters of largest L1 norm; weights as they were                Li et al., ICLR 2017
scratch    CP's widths, fresh weights                                                          CP, table 4
jaderberg  kernels of height 1 and width 1                                                     `factorise`, "spatial"
asym       fewer filters and a mix of them                                                     `factorise`, "channel"
asym3d     both                                                                                `factorise`, "3d"
3c         both, and channels pruned                                                           `factorise`, "3c"
depgraph   what depends on each other goes together, shortcuts too, by group norms             torch-pruning, 2301.12900

FP has no refit, as in the paper it comes from; CP's tables give it after fine-tuning only. A factorised network has its
BatchNorms folded unless the plan says `norms`, and then needs a smaller learning rate.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import sensitivity
import torch
from choice import choose
from factorise import factorise
from settings import Experiment
from torch import Tensor, nn
from training import Normalise, networks
from training.data import ImageData

from sppkit import cost, cp
from sppkit.compact import channel_links, compact, convolutions, trace
from sppkit.graph import fold, sites

FACTORISATIONS = {"jaderberg": "spatial", "asym": "channel", "asym3d": "3d", "3c": "3c"}
CURVES: dict[tuple[Any, ...], dict[str, sensitivity.Curve]] = {}  # by network and sample: several runs share them
STEPS = 400  # of torch-pruning
Smaller = tuple[nn.Module, nn.Module | None, dict[str, Any]]  # network, the same before the refit, notes


def exact(device: torch.device) -> AbstractContextManager[None]:
    """float32 convolutions that give the same every time: no TF32, no choice of algorithms by their speed."""
    if device.type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def prepared(data: ImageData, plan: Experiment, images: Tensor) -> Tensor:
    """Images (N, H, W, 3) as the network reads them (N, 3, H, W)."""
    return Normalise.of(data.train, plan.normalise)(images)


def training_images(data: ImageData, plan: Experiment, *, seed: int | None = None, spare: int = 0) -> Tensor:
    """As many training images as the plan says, prepared, drawn from `seed` (the plan's), none of the last `spare`."""
    generator = torch.Generator().manual_seed(plan.seed if seed is None else seed)  # on the CPU: the same everywhere
    order = torch.randperm(len(data.train) - spare, generator=generator)[: plan.images]
    return prepared(data, plan, data.train.images[order.to(data.train.images.device)])


def paper_rule(network: nn.Module, example: Tensor) -> dict[str, float]:
    """CP's proportions of kept input channels, by layer, as `cp.widths` takes them.

    VGG-16: what conv1 to conv3 give : what conv4 gives = 1 : 1.5, conv5 untouched. Residual networks of three or more
    stages: all alike but for the last stage, of the smallest feature maps, which is left alone. ValueError for others.
    """
    table, found = cost.conv_table(network, example), sites(network, trace(network))
    pixels = table["height"] * table["width"]
    if all(place.producer for place in found.values()) and len(table) == 13:
        return dict(zip(table["layer"][1:11], [1.0] * 7 + [1.5] * 3, strict=True))
    if any(place.total for place in found.values()) and pixels.nunique() > 2:
        return {layer: 1.0 for layer in table["layer"][pixels > pixels.min()] if layer in found}
    raise ValueError("rule='paper' is for VGG-16 and residual networks; take rule='uniform'")


def widths(network: nn.Module, images: Tensor, plan: Experiment) -> dict[str, int]:
    """Input channels to keep by layer, for the plan's rule and FLOP ratio; `network` has its BatchNorms folded.

    `images` (B, C, H, W) are what "error" samples and what "pca" looks at: there the weight of a layer is the
    sensitivity of the one that makes its input.
    """
    if plan.rule not in ("uniform", "paper", "pca", "error"):
        raise ValueError(f"rule={plan.rule!r} is not for channels; take 'uniform', 'paper', 'pca' or 'error'")
    if plan.rule == "error":
        how = {name: getattr(plan, name) for name in ("samplers", "points", "seed")}
        key = (network_id(network), *how.values())
        if key not in CURVES:
            CURVES[key] = sensitivity.curves(network, images, **how)
        return sensitivity.equal_error(network, images[:1], CURVES[key], plan.flop_ratio, samplers=plan.samplers)
    found, rule = sites(network, trace(network), samplers=plan.samplers), None
    if plan.rule == "paper":
        rule = {layer: weight for layer, weight in paper_rule(network, images[:1]).items() if layer in found}
    if plan.rule == "pca":
        if shared := [layer for layer, place in found.items() if place.producer is None]:
            raise ValueError(f"rule='pca' needs one producer of a layer's input, unlike {shared[0]!r}; samplers=False")
        components = sensitivity.pca(network, images[:1000])
        rule = {layer: components[place.producer or ""] for layer, place in found.items()}
    return cp.widths(network, images[:1], plan.flop_ratio, rule=rule, samplers=plan.samplers)


def smaller(network: nn.Module, data: ImageData, plan: Experiment) -> Smaller:
    """A trained network made smaller by the plan's method, and notes on each of its layers."""
    images = training_images(data, plan)
    with exact(images.device):
        if plan.method in FACTORISATIONS:
            how: dict[str, Any] = {"method": FACTORISATIONS[plan.method], "flop_ratio": plan.flop_ratio}
            settings = {name: getattr(plan, name) for name in ("ridge", "norms", "points", "seed")}
            thin, table = factorise(network, images, **how, **settings)
            return thin, None, {"layers": table.to_dict("records")}
        if plan.method == "depgraph":
            thin = depgraph(network, images, plan.flop_ratio)
            shapes = {
                name: (weight.shape, thin.get_parameter(name).shape) for name, weight in network.named_parameters()
            }
            layers = [{"layer": name.removesuffix(".weight"), "channels": old[1], "kept": new[1], "outputs": new[0]}
                      for name, (old, new) in shapes.items() if len(old) > 1]  # fmt: skip
            return thin, None, {"layers": layers}
        keep = widths(fold(network)[0], images, plan)
        if plan.method == "cp":
            settings = {
                name: getattr(plan, name) for name in ("samplers", "correct", "renew", "ridge", "points", "seed")
            }
            select = None if plan.select == "lasso" else partial(choose, plan.select)
            masked, table = cp.mask_channels(network, images, keep=keep, select=select, **settings)
            bare = without(network, {name: gone(convolutions(masked)[name]) for name in table["layer"]})
            thin = compact(masked if plan.refit else bare, images[:64], columns=False)
            return thin, bare if plan.refit else None, {"layers": table.to_dict("records")}
        if plan.method == "scratch":  # another seed than that of the baseline, whose weights these must not be
            fresh = networks.create(plan.network, classes=len(data.classes), seed=1000 + plan.seed).to(images.device)
            last = {name: torch.arange(width, _inputs(fresh, name)) for name, width in keep.items()}
            thin = compact(without(fresh, last), columns=False)
        else:
            chosen, producers = dict[str, Tensor](), channel_links(network)
            for name, width in keep.items():
                if name not in producers:
                    raise ValueError(f"method='fp' goes by filters, and the input of {name!r} has many; samplers=False")
                norms = convolutions(network)[producers[name]].weight.detach().abs().flatten(1).sum(1)
                chosen[name] = norms.topk(len(norms) - width, largest=False).indices
            thin = compact(without(network, chosen), images[:64], columns=False)
        layers = [{"layer": name, "channels": _inputs(network, name), "kept": width} for name, width in keep.items()]
        return thin, None, {"layers": layers}


def depgraph(network: nn.Module, images: Tensor, flop_ratio: float) -> nn.Module:
    """What the package torch-pruning leaves of a network: its default importance, over all layers, in small steps.

    As in its own CIFAR-10 benchmark: steps of a 400th until the ratio is reached, the classifier's outputs kept.
    ImportError without the package.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError("method='depgraph' needs torch-pruning: pip install -e '.[race]'") from error
    small, example = copy.deepcopy(network).eval(), images[:1]
    last = [module for module in small.modules() if isinstance(module, nn.Linear)][-1]
    importance, wanted = torch_pruning.importance.GroupMagnitudeImportance(p=2), flop_ratio * (1 - 1e-9)
    settings: dict[str, Any] = {"iterative_steps": STEPS, "pruning_ratio": 1.0, "global_pruning": True}
    pruner = torch_pruning.pruner.BasePruner(small, example, importance, ignored_layers=[last], **settings)
    for _ in range(STEPS):
        if cost.flop_ratio(network, small, example) >= wanted:
            return small
        pruner.step()
    raise ValueError(f"flop_ratio={flop_ratio} is out of reach of torch-pruning here")


def _inputs(network: nn.Module, layer: str) -> int:
    return convolutions(network)[layer].weight.shape[1]


def gone(conv: nn.Conv2d) -> Tensor:
    """Input channels that a masked convolution does not read."""
    return (conv.weight == 0).transpose(0, 1).flatten(1).all(1).nonzero().flatten()


@torch.no_grad()
def without(network: nn.Module, channels: Mapping[str, Tensor]) -> nn.Module:
    """A copy in which layers read 0 weights at these input channels, the other weights as they were."""
    masked = copy.deepcopy(network)
    for name, indices in channels.items():
        weight = convolutions(masked)[name].weight
        weight[:, indices.to(weight.device)] = 0
    return masked


def network_id(network: nn.Module) -> str:
    """Twelve hexadecimal digits of the SHA-256 of the state dict: names in order, each with its raw bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
