"""Milliseconds of pruned layers and networks beside dense ones, and what the machine could do at best.

Nothing is trained: weights are random, and which channels and columns go is drawn; a clock does not see the difference.
All networks, the dense one too, are made ready by `fast.optimise` in the layout of memory that is faster for each, on a
GPU with what `dense_layers` spares them where that is; "dense, library" is without its kernels, ", package" as
`fast.optimise` alone leaves it. Single layers take what they read as they want it, and have no bias: a library adds it
in a pass of its own unless a ReLU follows.
On a GPU in bf16, each replayed as a CUDA graph, on a CPU in float32. Rounds are interleaved, and the dense network is
made ready and runs twice: how far its two times differ is the noise.

ceilings: of a large matrix product (operations a second), also tried as a 1 x 1 convolution, and a large copy (bytes a
second, read and written).
floor_ms: of a layer by these, with every number read or written once: the longer of multiplying and moving, for columns
the sum of both, since they are gathered into a matrix first, but where an engine is fused. of_floor: floor over
measured. difference: of outputs, over their size, from the dense network's or the masked convolution's.
layers: of a network's convolutions, each by itself; layers_ms is their sum.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import channels
import dense_layers
import engines
import numpy as np
import pandas as pd
import torch
import torchvision
from bench_channels import _show, random_images, vgg16
from driver import append_line, revision
from factorise import factorise
from records import TITLES
from torch import Tensor, nn
from torch.nn import functional as F
from training.data import device_name, resolve_device

from sppkit import cost, cp, fast
from sppkit.compact import ColumnConv2d, compact, convolutions
from sppkit.groups import Groups
from sppkit.plan import make_plan
from sppkit.timing import measure, milliseconds

SHARE = 0.25  # of the columns that are kept in single layers
LAYERS = {"conv3_2": (256, 256, 56), "conv4_1": (256, 512, 28), "conv4_2": (512, 512, 28), "conv5_2": (512, 512, 14)}
MULTIPLES = (8, 16, 32, 64)  # of widths of a GPU's networks
BLOCK = 16  # neighbouring input channels of one tap
TOLERANCE = 0.1  # of outputs in bf16: random weights, factorised from few samples, reach half of it; it is recorded
# engines on trial by what they are for; of a network the last
TRIALS = {"columns": {"columns": "gathered"}, f"blocks of {BLOCK}": {"blocks": "gathered", "fused": "fused"}}
RATIO, RESNET_RATIO = 4.0, 2.0  # of the networks' convolution MACs
FACTORISATIONS = {TITLES[name]: method for name, method in channels.FACTORISATIONS.items() if method != "3c"}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    pixels: int = 224
    shrink: int = 1  # divides the widths of VGG-16 and of the layers
    rounds: int = 20
    batches: tuple[int, ...] = (1, 8)
    layer_batch: int = 1
    matrix: int = 2048  # rows of the ceiling's product
    copied: int = 2**26  # elements of the ceiling's copy


FULL = {"cpu": Sizes(), "cuda": Sizes(rounds=50, batches=(1, 8, 64, 128), layer_batch=64, matrix=8192, copied=2**29)}
QUICK = Sizes(pixels=32, shrink=8, rounds=2, batches=(1, 2), layer_batch=2, matrix=64, copied=2**12)


@dataclass(frozen=True)
class Machine:
    device: torch.device
    dtype: torch.dtype
    sizes: Sizes

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @classmethod
    def of(cls, device: torch.device, sizes: Sizes) -> Machine:
        return cls(device, torch.bfloat16 if device.type == "cuda" else torch.float32, sizes)

    def about(self, experiment: str, given: str | None) -> dict[str, Any]:
        """The beginning of a record, printed; `given` is the source's revision, if git is not to be asked."""
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
        about: dict[str, Any] = {
            "device": device_name(self.device),
            "cpu": device_name(torch.device("cpu")),
            "threads": torch.get_num_threads(),
            **versions,
            "python": platform.python_version(),
            "revision": given or revision(),
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "precision": str(self.dtype).removeprefix("torch."),
            "mode": "captured" if self.gpu else "eager",
        }
        print(", ".join(f"{name} {value}" for name, value in about.items()))
        return {"schema": 1, "experiment": experiment, **about}

    def ready(self, network: nn.Module, example: Tensor, *, own: bool = True, package: bool = False) -> fast.Ready:
        """The fastest of both layouts as `fast.optimise` makes it, on a GPU with and without what `dense_layers` has.

        There, in channels-last, widths are filled up to each of MULTIPLES; with the fastest of these columns and
        samplers, dense layers until then, are tried, and narrow layers in pairs. `form` of the result tells which.
        own: False leaves out kernels that are not the library's; package: `fast.optimise` in channels-last, no more.
        """
        how: dict[str, Any] = {"dtype": self.dtype, "tolerance": TOLERANCE if self.gpu else None}
        if not self.gpu or package:
            layouts = {"NHWC": True} if self.gpu else {"NCHW": False, "NHWC": True}
            made = {name: fast.optimise(network, example, channels_last=last, **how) for name, last in layouts.items()}
        else:
            made = {"NCHW": fast.optimise(network, example, multiple=MULTIPLES[0], engine="dense", **how)}
            named = "NHWC, dense" if any(isinstance(module, fast.OWN) for module in network.modules()) else "NHWC"
            for multiple in MULTIPLES:
                given = {**how, "multiple": multiple, "engine": "dense"}
                self._inside(made, f"{named}, in {multiple}s", network, example, own, **given)
            best = fast.fastest(made, example, 5)
            if named != "NHWC":
                multiple = next((m for m in MULTIPLES if f"in {m}s" in best), MULTIPLES[0])
                columns = self._inside({}, f"NHWC, in {multiple}s", network, example, own, multiple=multiple, **how)
                best = fast.fastest({best: made[best], **columns}, example, 5)
                made |= columns
            narrow = any(conv.out_channels <= dense_layers.NARROW for conv in convolutions(network).values())
            if narrow and "own kernels" in best:
                self._try(made, best, f"{best}, in pairs", dense_layers.paired, example)
        form = fast.fastest(made, example, 5)
        ready = made[form]
        ready.form = form  # type: ignore[assignment]
        if self.gpu:
            ready.capture(example)
        return ready

    def _inside(
        self, made: dict[str, fast.Ready], form: str, network: nn.Module, example: Tensor, own: bool, **how: Any
    ) -> dict[str, fast.Ready]:
        """A form more, the same with ReLUs inside of convolutions, and with kernels of our own; all that there are."""
        made[form] = fast.optimise(network, example, channels_last=True, **how)
        self._try(made, form, f"{form}, ReLU inside", dense_layers.rectified, example)
        if own:
            self._try(made, f"{form}, ReLU inside", f"{form}, own kernels", dense_layers.own_kernels, example)
        return made

    def _try(self, made: dict[str, fast.Ready], form: str, name: str, change: Any, example: Tensor) -> None:
        """One more form of another one; on trial: what a GPU has against it is printed."""
        try:
            with torch.no_grad():
                ready = copy.deepcopy(made[form])
                expected = ready(example)
                ready.network = change(ready.network)
                apart = _apart(ready(example), expected)
            if not apart < TOLERANCE:
                raise RuntimeError(f"outputs differ by {apart:.1e}")
            ready.difference += apart
            made[name] = ready
        except Exception as problem:
            print(f"{name}, {len(example)} images: {problem}", flush=True)

    def gathered(self, network: nn.Module, example: Tensor, engine: str) -> fast.Ready:
        """Columns by an engine on trial, dense where that is faster, compared with the package's."""
        how: dict[str, Any] = {"dtype": self.dtype, "channels_last": True, "tolerance": TOLERANCE}
        ready = fast.optimise(network, example, engine="gathered", **how)
        with torch.no_grad():
            expected = ready(example)
            ready.network = dense_layers.own_kernels(dense_layers.rectified(ready.network))
            engines.gathered(ready, engine)
            if engine == "fused":
                fast.take_faster(ready, example, 5, engines.GatheredConv2d)
                engines.pooled(ready.network)
            else:
                self._take_from(ready, example)
            ready.difference += _apart(ready(example), expected)
            ready.form = "NHWC, own kernels"  # type: ignore[assignment]
            ready.capture(example)
        return ready

    def _take_from(self, ready: fast.Ready, example: Tensor) -> None:
        """Dense layers up to the one from which on columns are faster: they lie in another order, changed once.

        Of many layers about every sixteenth part is tried.
        """
        found = {n: m for n, m in ready.network.named_modules() if isinstance(m, engines.GatheredConv2d)}
        layers = {name: layer for name, layer in found.items() if layer.padding[::2] == layer.padding[1::2]}
        names, times = [*layers], dict[int, float]()
        ends = [*range(0, len(names), max(1, len(names) // 16)), len(names)]
        for start, end in pairwise([0, *ends]):
            for before in names[start:end]:
                ready.network.set_submodule(before, layers[before].dense().to(memory_format=ready.layout))  # type: ignore[call-overload]
            probe = fast.Captured(ready, example) if self.gpu else ready
            times[end] = float(milliseconds({"": probe}, example, 5).median().iloc[0])
        for name in names[min(times, key=times.__getitem__) :]:
            ready.network.set_submodule(name, layers[name])

    @torch.no_grad()
    def by_layer(self, ready: fast.Ready, example: Tensor) -> dict[str, float]:
        """Milliseconds of convolutions, with padding, ReLUs and sums inside, each by itself on the input it gets."""
        kinds: tuple[Any, ...] = (dense_layers.Rectified, dense_layers.Summed, dense_layers.ImageConv2d)
        kinds += (dense_layers.PairedConv2d, engines.GatheredConv2d, ColumnConv2d, nn.Conv2d, nn.ZeroPad3d)
        found, inputs = dict[str, nn.Module](), dict[str, list[Tensor]]()
        for name, module in ready.network.named_modules():
            if isinstance(module, kinds) and name.rpartition(".")[0] not in found:
                found[name] = module

        def note(name: str, module: nn.Module) -> Any:
            return module.register_forward_pre_hook(lambda _, xs: inputs.update({name: [x.clone() for x in xs]}))

        hooks = [note(name, module) for name, module in found.items()]
        ready.network(example.to(self.dtype, memory_format=ready.layout))
        for hook in hooks:
            hook.remove()
        times = dict[str, float]()
        for name, module in found.items():
            x, *others = inputs.pop(name)
            work = _With(module, others)
            probe = fast.Captured(work, x) if self.gpu else work
            times[name] = float(milliseconds({name: probe}, x, self.sizes.rounds)[name].median())
        return times

    def alone(self, layer: nn.Module, x: Tensor, *, channels_last: bool = False) -> nn.Module:
        """A layer in the machine's precision; on a GPU a CUDA graph on `x`, converted beforehand to this layout."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        layer = copy.deepcopy(layer).to(self.dtype, memory_format=layout)  # type: ignore[call-overload]
        if not self.gpu:
            return layer
        read = x.to(self.dtype, memory_format=layout)
        graph = fast.Captured(layer, read).eval()
        graph.layer = layer  # a graph keeps nothing of what it reads
        graph.register_buffer("read", read)
        return graph

    def table(self, networks: Mapping[str, nn.Module], example: Tensor) -> pd.DataFrame:
        """`timing.measure` of the networks made ready, and how many times the first one's speed each has."""
        first = next(iter(networks))
        ready = {name: self.ready(network, example) for name, network in networks.items()}
        if self.gpu:
            ready[f"{first}, library"] = self.ready(networks[first], example, own=False)
        for name in [name for name in networks if self.gpu and name in (first, *TRIALS)]:
            ready[f"{name}, package"] = self.ready(networks[name], example, package=True)
        for name in [name for name in networks if self.gpu and name in TRIALS]:
            *_, engine = TRIALS[name]
            try:
                ready[f"{name}, {TRIALS[name][engine]}"] = self.gathered(networks[name], example, engine)
            except Exception as problem:  # on trial: what a GPU has against it is no reason to lose the others
                print(f"{name} by {engine}, {len(example)} images: {problem}", flush=True)
        ready[f"{first}, again"] = self.ready(networks[first], example)  # anew: places in memory are noise, too
        table = measure(ready, example, rounds=self.sizes.rounds)
        table["times"] = table["median_ms"].iloc[0] / table["median_ms"]
        table["difference"] = pd.Series({name: each.difference for name, each in ready.items()})
        table["form"] = pd.Series({name: str(each.form) for name, each in ready.items()})
        if len(example) == self.sizes.layer_batch:
            table["layers"] = pd.Series({name: self.by_layer(each, example) for name, each in ready.items()})
            table["layers_ms"] = table["layers"].map(lambda times: sum(times.values()))
            table["layers_times"] = table["layers_ms"].iloc[0] / table["layers_ms"]
        return table.rename_axis("network").reset_index()


def ceilings(machine: Machine) -> dict[str, float]:
    """Operations and bytes a second of a large product, also as a convolution, and a large copy, at the fastest."""
    n, count = machine.sizes.matrix, machine.sizes.copied
    a, b = (torch.randn(n, n, device=machine.device, dtype=machine.dtype) for _ in range(2))
    source = torch.randn(count, device=machine.device, dtype=machine.dtype)
    target = torch.empty_like(source)
    image, kernel = b.view(1, n, -1, 32), a[:, :, None, None]  # by another library, which may be faster
    works: dict[str, Any] = {"product": lambda _: a @ b, "convolution": lambda _: F.conv2d(image, kernel)}
    works["copy"] = lambda _: target.copy_(source)
    seconds = milliseconds(works, a, machine.sizes.rounds).min() / 1e3
    moved = 2 * source.nbytes
    multiplied = float(seconds[["product", "convolution"]].min())
    return {"operations": 2 * n**3 / multiplied, "bytes": moved / float(seconds["copy"])}


@torch.no_grad()
def layers(machine: Machine, limits: Mapping[str, float]) -> pd.DataFrame:
    """Single 3 x 3 convolutions of VGG-16: dense, random columns and random blocks, a quarter kept."""
    parts, size = [], torch.finfo(machine.dtype).bits // 8
    for name, (c, n, pixels) in LAYERS.items():
        c, n, pixels = c // machine.sizes.shrink, n // machine.sizes.shrink, pixels * machine.sizes.pixels // 224
        torch.manual_seed(0)
        x = torch.randn(machine.sizes.layer_batch, c, pixels, pixels, device=machine.device)
        dense = nn.Conv2d(c, n, 3, padding=1, bias=False).to(machine.device)
        block = min(BLOCK, c // 2)
        drawn = {"columns": _drawn(c, 1).to(machine.device), f"blocks of {block}": _drawn(c, block).to(machine.device)}
        ready: dict[str, nn.Module] = {"dense": machine.alone(dense, x)}
        last = machine.alone(dense, x, channels_last=True)
        times = milliseconds({"dense": ready["dense"], "last": last}, x, 5).median()
        if times["last"] < times["dense"]:
            ready["dense"] = last
        again = machine.alone(dense, x, channels_last=ready["dense"] is last)
        difference = {"dense": 0.0, "dense, again": 0.0}  # of outputs, from the masked convolution's
        for kind, kept in list(drawn.items()):
            column = ColumnConv2d(dense, kept.nonzero().flatten())
            masked = copy.deepcopy(dense)
            masked.weight.data.flatten(1)[:, ~kept] = 0
            with channels.exact(machine.device):
                expected = masked(x)
                torch.testing.assert_close(column(x), expected, rtol=1e-4, atol=1e-4)
            ready[kind] = machine.alone(column, x, channels_last=machine.gpu and kind != "columns")
            difference[kind] = _apart(ready[kind](x), expected)
            for engine, title in TRIALS[kind].items() if machine.gpu else ():
                one = machine.alone(engines.GatheredConv2d(column, engine), x, channels_last=engine != "columns")
                ready[f"{kind}, {title}"], drawn[f"{kind}, {title}"] = one, kept
                difference[f"{kind}, {title}"] = _apart(one(x), expected)
        table = measure({**ready, "dense, again": again}, x, rounds=machine.sizes.rounds).rename_axis("kind")
        columns = pd.Series({kind: float(drawn[kind].sum()) if kind in drawn else c * 9.0 for kind in table.index})
        places = len(x) * pixels**2
        multiply = 2 * columns * n * places / limits["operations"]
        fused = columns.index.str.endswith(", fused") | ((columns.index == f"blocks of {block}") & machine.gpu)
        matrix = (columns < c * 9) & ~fused  # of columns, written and read
        move = size * (x.numel() + columns * n + n * places + matrix * 2 * columns * places) / limits["bytes"]
        floor = (multiply + move).where(matrix, multiply.combine(move, max)) * 1e3
        table = table.assign(
            layer=name,
            difference=pd.Series(difference),
            columns=columns,
            floor_ms=floor,
            of_floor=floor / table["median_ms"],
        )
        parts.append(table.assign(times=table["median_ms"].iloc[0] / table["median_ms"]).reset_index())
    return pd.concat(parts, ignore_index=True)


def _drawn(channels: int, block: int) -> Tensor:
    """Which columns (channels * 9,) stay, a quarter, where `block` neighbouring channels of a tap go together."""
    groups = torch.zeros(channels // block * 9, dtype=torch.bool)
    groups[torch.randperm(len(groups))[: round(len(groups) * SHARE)]] = True
    return groups.view(-1, 9).repeat_interleave(block, 0).flatten()


def fewer_channels(network: nn.Module, example: Tensor, flop_ratio: float, *, multiple: int = 1) -> nn.Module:
    """Random channels gone, the same share of each layer's, widths in multiples; samplers where inputs are shared."""
    return with_widths(network, cp.widths(network, example, flop_ratio, multiple=multiple))


def with_widths(network: nn.Module, keep: Mapping[str, int]) -> nn.Module:
    """Random input channels gone, so many kept by layer."""
    masked, generator = copy.deepcopy(network), torch.Generator().manual_seed(0)
    for name, width in keep.items():
        weight = convolutions(masked)[name].weight.data
        weight[:, torch.randperm(weight.shape[1], generator=generator)[width:]] = 0
    return compact(masked, columns=False)


def fewer_columns(network: nn.Module, example: Tensor, flop_ratio: float, *, kind: str = "column") -> nn.Module:
    """Random groups gone, the same share of each layer's."""
    plan, generator = make_plan(network, example, flop_ratio=flop_ratio, kind=kind), torch.Generator().manual_seed(0)
    gone = np.zeros(plan.groups.count, dtype=bool)
    for name, target in plan.targets.items():
        gone[plan.groups.slices[name]][torch.randperm(plan.groups.sizes[name], generator=generator)[:target]] = True
    return without_groups(network, plan.groups, gone)


def without_groups(network: nn.Module, groups: Groups, gone: np.ndarray) -> nn.Module:
    """What `compact` leaves of a network without the groups `gone` (G,)."""
    masked, gone = copy.deepcopy(network), np.append(gone, False)
    for name in groups.modules:
        weight = masked.get_parameter(f"{name}.weight").data
        for ids, rows in ((groups.rows[name], True), (groups.columns[name], False)):
            weight.masked_fill_(groups.spread(gone[ids], weight, rows=rows), 0)
    return compact(masked)


class Narrow(torchvision.models.ResNet):
    """ResNet-50 with all its widths scaled, the residual stream's too."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        super().__init__(torchvision.models.resnet.Bottleneck, [3, 4, 6, 3])
        self.fc = nn.Linear(self.inplanes, 1000)

    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        return super()._make_layer(block, round(planes * self.scale / 8) * 8, blocks, stride, dilate)


def networks(machine: Machine, *, images: Tensor) -> dict[str, dict[str, nn.Module]]:
    """Dense networks and what is left of them, by architecture, the dense one first."""
    example, shrink = images[:1], machine.sizes.shrink
    vgg = vgg16(shrink=shrink)
    found: dict[str, nn.Module] = {"dense": vgg}
    found |= {f"channels in {m}s" if m > 1 else "channels": fewer_channels(vgg, example, RATIO, multiple=m)
              for m in (1, 8, 16, 32) if m * shrink <= 32}  # fmt: skip
    found["columns"] = fewer_columns(vgg, example, RATIO)
    found[f"blocks of {BLOCK}"] = fewer_columns(vgg, example, RATIO, kind=f"block{BLOCK}")
    torch.manual_seed(0)
    for name, method in FACTORISATIONS.items():
        found[name] = factorise(vgg, images, method=method, flop_ratio=RATIO, points=50)[0]
    torch.manual_seed(0)
    resnet = torchvision.models.resnet50() if shrink == 1 else torchvision.models.resnet18()
    small = {"dense": resnet.eval(), "channels": fewer_channels(resnet, example, RESNET_RATIO)}
    if shrink == 1:
        small["channels in 8s"] = fewer_channels(resnet, example, RESNET_RATIO, multiple=8)
        small["stream too"] = Narrow(RESNET_RATIO**-0.5).eval()
    return {"VGG-16": found, type(resnet).__name__ + ("-50" if shrink == 1 else "-18"): small}


def whole(machine: Machine) -> pd.DataFrame:
    """Every network at every batch size, with its FLOP ratio; printed as it comes."""
    images, parts = random_images(8, machine.sizes.pixels, seed=0), []
    for name, found in networks(machine, images=images).items():
        dense = next(iter(found.values()))
        ratios = {kind: cost.flop_ratio(dense, each, images[:1]) for kind, each in found.items()}
        for batch in machine.sizes.batches:
            example = random_images(batch, machine.sizes.pixels, seed=1).to(machine.device)
            table = machine.table(found, example).assign(architecture=name)
            parts.append(table.assign(flop_ratio=table["network"].map(_fastest).map(ratios).fillna(1.0)))
            _show(parts[-1].drop(columns=["threads", "device", "layers"], errors="ignore"))
    return pd.concat(parts, ignore_index=True)


def by_width(machine: Machine) -> pd.DataFrame:
    """One layer as wide as conv4_1 with fewer and fewer filters: where a library has steps."""
    c = n = 256 // machine.sizes.shrink
    pixels = 28 * machine.sizes.pixels // 224
    x = torch.randn(machine.sizes.layer_batch, c, pixels, pixels, device=machine.device)
    wide = range(max(n // 64, 1) * 2, n + 1, max(n // 64, 1))
    convs = {str(w): nn.Conv2d(c, w, 3, padding=1, bias=False).to(x.device) for w in wide}
    ready = {w: machine.alone(conv, x, channels_last=machine.gpu) for w, conv in convs.items()}
    table = measure(ready, x, rounds=machine.sizes.rounds).rename_axis("filters").reset_index()
    return table.assign(filters=table["filters"].astype(int), inputs=c, pixels=pixels)


def goals(single: pd.DataFrame, nets: pd.DataFrame, machine: Machine) -> pd.DataFrame:
    """What is wanted of full sizes, and what came out: times the speed of the fastest dense one.

    library: of the dense one without kernels of our own; what such kernels do for both is no merit of pruning.
    """
    layer = single.assign(kind=single["kind"].map(_fastest)).groupby(["layer", "kind"])["times"].max()
    nets = nets[nets["batch"] == (64 if machine.gpu else 1)].assign(network=lambda each: each["network"].map(_fastest))
    wanted = []

    def want(what: str, times: float, at_least: float, library: float = 1.0) -> None:
        wanted.append({"what": what, "times": times, "library": times / library, "at_least": at_least})

    def of_network(architecture: str, kind: str, at_least: float, column: str = "times", what: str = "") -> None:
        found = nets[nets["architecture"] == architecture].groupby("network")[column].max()
        ratio = "2, channels and samplers" if architecture == "ResNet-50" else f"4, {kind}"
        want(f"{architecture} at {ratio}{what}", found[kind], at_least, found.get("dense, library", 1.0))

    if not machine.gpu:
        for name in LAYERS:
            want(f"{name}, a quarter of the columns", layer[name, "columns"], 2.0)
        of_network("VGG-16", "channels", 3.0)
    else:
        for name, limit in (("conv3_2", 1.4), ("conv4_2", 1.8), ("conv5_2", 1.8)):
            want(f"{name}, a quarter of the columns", layer[name, "columns"], limit)
        for kind in ("channels", "channels in 8s"):
            of_network("VGG-16", kind, 3.0, "layers_times", ", its convolutions")
        for name in ("conv4_2", "conv5_2"):
            want(f"{name}, a quarter in blocks of 16", layer[name, "blocks of 16"], 2.5)
        for architecture, kind, limit in (
            ("VGG-16", "columns", 1.5), ("VGG-16", "blocks of 16", 2.2), ("ResNet-50", "channels", 1.3)
        ):  # fmt: skip
            of_network(architecture, kind, limit)
    frame = pd.DataFrame(wanted)
    return frame.assign(met=frame["times"] >= frame["at_least"])


class _With(nn.Module):
    """A layer that reads others beside its input."""

    def __init__(self, layer: nn.Module, others: list[Tensor]) -> None:
        super().__init__()
        self.layer, self.others = layer, others

    def forward(self, x: Tensor) -> Any:
        return self.layer(x, *self.others)


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def _fastest(name: str) -> str:
    """Engines on trial count for what they are for.

    >>> _fastest("blocks of 16, fused"), _fastest("dense, again")
    ('blocks of 16', 'dense, again')
    """
    kind, _, engine = name.partition(", ")
    return kind if engine in TRIALS.get(kind, {}).values() else name


def main(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """`python -m sppkit bench speed`: prints tables and appends a record to data/runs, of --quick to build/."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; recorded in build/")
    parser.add_argument("--revision", help="recorded as the source's revision; git is asked otherwise")
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    sizes = QUICK if options.quick else FULL[device.type]
    machine = Machine.of(device, sizes)
    about = machine.about("bench-speed", options.revision)
    limits = ceilings(machine)
    print(", ".join(f"{name} {value:.3g}/s" for name, value in limits.items()))
    frames = {"layers": layers(machine, limits)}
    _show(frames["layers"].drop(columns=["threads", "device"]))
    frames["networks"] = whole(machine)
    frames["widths"] = by_width(machine)
    if not options.quick:
        frames["goals"] = goals(frames["layers"], frames["networks"], machine)
        _show(frames["goals"])
    record = about | {"sizes": asdict(sizes), "ceilings": limits}
    record |= {name: json.loads(frame.to_json(orient="records")) for name, frame in frames.items()}
    folder = options.root / ("build" if options.quick else "data/runs")
    append_line(folder / "bench-speed.jsonl", json.dumps(record, allow_nan=False))
