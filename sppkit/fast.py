"""A network made ready to run, dense or compact: one call, so that both are measured at their best.

BatchNorms are folded; where reading single columns or channels costs more than it saves, a dense layer stands in; and
where a library is slow at odd widths, channels of zeros fill them up, if that is faster.
"""

import copy
from collections.abc import Mapping
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sppkit.compact import ColumnConv2d, SampledConv2d, spaces
from sppkit.graph import fold
from sppkit.kernels import run_length
from sppkit.timing import milliseconds

ENGINES, OWN = ("measured", "fused", "gathered", "dense"), (ColumnConv2d, SampledConv2d)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 0.05, torch.float16: 0.01}


def optimise(
    network: nn.Module,
    example: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    engine: str = "measured",
    multiple: int | None = None,
    capture: bool = False,
    rounds: int = 5,
    tolerance: float | None = None,
) -> "Ready":
    """A copy for inference on the device of `example` (B, C, H, W), which it is measured and checked with.

    dtype, channels_last: of weights and inputs; a call takes float32 images in any layout.
    engine: of columns and samplers; "measured" takes what is faster in the median of `rounds`, by layer and as a whole,
    "dense" or not. "gathered" columns are laid side by side first, "fused" ones, in runs on a GPU, multiplied in place.
    multiple: that `fill_up` fills widths up to; None: of 1, 16 (GPU: 8, 16, 32, 64) the fastest, unmeasured the first.
    capture: as one CUDA graph, for batches of the shape of `example` only; a call overwrites the last one's output.
    tolerance: of the outputs' difference over their size, both norms, `difference` of the result; by precision.
    Raises ValueError for an engine, precision or device that cannot be, RuntimeError if outputs differ more.
    """
    if engine not in ENGINES or dtype not in TOLERANCE or (multiple is not None and multiple < 1):
        given = f"engine={engine!r}, dtype={dtype}, multiple={multiple}"
        raise ValueError(f"{given}: one of {', '.join(ENGINES)}, of {[*TOLERANCE]}, a multiple of at least 1")
    if capture and not example.is_cuda:
        raise ValueError(f"capture=True makes a CUDA graph, and the example is on {example.device}; capture=False")
    if not len(example):
        raise ValueError(f"images {tuple(example.shape)}: a batch of 0 shows nothing")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    folded = fold(network)[0].to(example.device)
    runs = {m: run_length(m.index, prod(m.kernel_size)) for m in folded.modules() if isinstance(m, ColumnConv2d)}
    if engine == "fused" and not (example.is_cuda and dtype.itemsize == 2 and max(runs.values(), default=1) > 7):
        raise ValueError("engine='fused' needs a GPU, bf16 or fp16, and columns in runs of 8 channels; try 'measured'")
    for column, run in runs.items():
        column.engine = engine if engine == "gathered" else column.engine
        weight = column.weight.data  # laid out as it is read there
        column.weight.data = weight.T.contiguous().T if example.is_cuda and run > 7 else weight.contiguous()
    known = [8, 16, 32, 64] if example.is_cuda else [1, 16]
    multiples = [multiple] if multiple is not None else known if engine == "measured" else known[:1]
    with torch.no_grad():
        expected = copy.deepcopy(network).to(example.device).eval()(example).float()
        forms = {str(m): Ready(fill_up(copy.deepcopy(folded), m), dtype, layout) for m in multiples}
        for form in forms.values() if engine in ("measured", "dense") else ():
            take_faster(form, example, rounds if engine == "measured" else 0)
        result = forms[fastest(forms, example, rounds)]
        if capture:
            result.capture(example)
        result.difference = float((result(example) - expected).norm() / expected.norm().clamp_min(1e-30))
    rounded = example.is_cuda and torch.backends.cudnn.allow_tf32 and dtype == torch.float32  # to TF32's ten bits
    if not result.difference <= ((0.01 if rounded else TOLERANCE[dtype]) if tolerance is None else tolerance):
        raise RuntimeError(f"outputs in {dtype} differ by {result.difference:.1e}; keep a higher precision")
    return result


@torch.no_grad()
def fill_up(network: nn.Module, multiple: int) -> nn.Module:
    """The network, its widths filled up, in place, to a `multiple` by zeros that no layer hears; the function stays.

    By 8, 16 or 32 a width that is seven eighths of one of 64, a library's tile, or more goes up to that. The image gets
    its zeros where a convolution reads it. Not filled up: the output, what a sampler picks, and channels that
    anything but layers, sums and channelwise operations reads, which must give something finite for zeros.
    """
    values = spaces(network)
    for flow in {flow: None for flow in values.values() if flow.writers and not (flow.fixed or flow.norms)}:
        writers: list[Any] = [network.get_submodule(name) for name in flow.writers]
        width, *others = {writer.out_channels for writer in writers}
        near = multiple in (8, 16, 32) and 8 * width >= 7 * (width + -width % 64)
        if others or not (extra := -width % (64 if near else multiple)):
            continue
        for writer, old in [(writer, writer.weight) for writer in writers]:
            new, writer.out_channels = F.pad(old, [0, 0] * (old.ndim - 1) + [0, extra]), width + extra
            writer.weight = nn.Parameter(new if old.is_contiguous() else new.mT.contiguous().mT)  # in the same order
            writer.bias = None if writer.bias is None else nn.Parameter(F.pad(writer.bias, [0, extra]))
        for name in (*flow.consumers, *flow.samplers):
            _hear(network.get_submodule(name), width, extra)
    readers = {user.target for user in next(iter(values)).users}
    modules = [*network.named_modules(remove_duplicate=False)]
    for name, conv in modules:
        alone = type(conv) is nn.Conv2d and conv.groups == 1 and sum(module is conv for _, module in modules) == 1
        if name in readers and alone and (extra := -conv.in_channels % multiple):
            _hear(conv, conv.in_channels, extra)
            network.set_submodule(name, nn.Sequential(nn.ZeroPad3d((0, 0, 0, 0, 0, extra)), conv))
    return network


def _hear(reader: Any, width: int, extra: int) -> None:
    """Let a layer read `extra` more channels than `width`, and take nothing from them."""
    if isinstance(reader, ColumnConv2d | SampledConv2d):  # they know by number what they read
        name = "in_channels" if isinstance(reader, ColumnConv2d) else "source_channels"
        setattr(reader, name, getattr(reader, name) + extra)
        return
    weight = reader.weight.unflatten(1, (width, -1))  # (O, C, pixels, ...)
    weight = F.pad(weight, [0, 0] * (weight.ndim - 2) + [0, extra]).flatten(1, 2)
    reader.weight, reader.filled = nn.Parameter(weight), getattr(reader, "filled", 0) + extra
    setattr(reader, "in_features" if isinstance(reader, nn.Linear) else "in_channels", weight.shape[1])


class Ready(nn.Module):
    """A network behind conversions of its input and output, or behind a CUDA graph of all three."""

    def __init__(self, network: nn.Module, dtype: torch.dtype, layout: torch.memory_format) -> None:
        super().__init__()
        self.network = network.to(dtype, memory_format=layout)  # type: ignore[call-overload]
        self.dtype, self.layout, self.difference = dtype, layout, 0.0
        self.graph: Captured | None = None
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.graph is None:
            return self.network(x.to(self.dtype, memory_format=self.layout)).float()
        if x.shape != self.input.shape or x.device != self.input.device:
            raise ValueError(f"captured for {tuple(self.input.shape)} on {self.input.device}, not {tuple(x.shape)}")
        self.input.copy_(x)
        return cast(Tensor, self.graph(x))

    def capture(self, example: Tensor) -> None:
        """Record the work on batches of this shape; later ones are copied to where the graph reads."""
        self.input = example.clone()
        self.graph = Captured(self, self.input)


class Captured(nn.Module):
    """A network as a CUDA graph that reads it and `x` where they lie: keep both. Each call writes the same tensor."""

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        super().__init__()
        side, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            for _ in range(3):  # libraries choose their algorithms before anything is recorded
                network(x)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph), torch.no_grad():
            self.output = network(x)

    def forward(self, _: Tensor) -> Tensor:
        self.graph.replay()
        return self.output


def take_faster(ready: Ready, example: Tensor, rounds: int, kind: Any = OWN) -> None:
    """Replace modules of a `kind` by their dense forms where that is faster, alone or all; rounds = 0: all."""
    found = {name: m for name, m in ready.network.named_modules() if isinstance(m, kind)}
    columns = {n: m for n, m in found.items() if not rounds or m.padding[::2] == m.padding[1::2]}  # or no dense form
    inputs, names, laid = dict[str, Tensor](), {m: n for n, m in columns.items()}, {"memory_format": ready.layout}
    hooks = [m.register_forward_pre_hook(lambda m, x: inputs.update({names[m]: x[0].clone(**laid)})) for m in names]
    ready(example)
    for hook in hooks:
        hook.remove()
    other = copy.deepcopy(ready) if rounds and columns else ready
    for name, column in columns.items():
        x, made = inputs.pop(name), column.dense().to(memory_format=ready.layout)
        other.network.set_submodule(name, made)
        if not rounds or fastest({"old": column, "new": made}, x, rounds) == "new":
            ready.network.set_submodule(name, made)
    if rounds and columns:  # neighbours may have paid, in another layout for one
        ready.network = {"old": ready, "new": other}[fastest({"old": ready, "new": other}, example, rounds)].network


def fastest(forms: Mapping[str, nn.Module], x: Tensor, rounds: int) -> str:
    """Which network takes the least time for images x, on a GPU as a CUDA graph, in the median of `rounds`."""
    made = {name: Captured(each, x) if x.is_cuda else each for name, each in forms.items()} if len(forms) > 1 else {}
    return str(milliseconds(made, x, rounds).median().idxmin()) if made else next(iter(forms))
