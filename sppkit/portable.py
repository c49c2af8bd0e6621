"""A network as one file that needs no class of its own: tensors, and its graph as plain JSON. Never a pickle.

The graph is that of torch.fx: modules of torch.nn by name and arguments, functions and methods out of a fixed list.
What is loaded computes the same, trains on, and goes to torch.compile, torch.export and ONNX.
"""

import inspect
import math
import operator
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sppkit import state
from sppkit.compact import ColumnConv2d, SampledConv2d, trace

KIND = "portable network"
NAME = re.compile(r"(?!__)\w[\w-]*(\.(?!__)[\w-]+)*", re.ASCII)  # of a module, tensor or node: nothing that is code
OWN = {"ColumnConv2d": ColumnConv2d, "SampledConv2d": SampledConv2d}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{place}.{name}": getattr(module, name)
    for place, module, names in (
        ("operator", operator, "add iadd sub mul imul truediv floordiv pow getitem"),
        ("torch", torch, "add mul cat flatten relu sigmoid mean transpose"),
        ("F", F, "relu pad dropout max_pool2d avg_pool2d adaptive_avg_pool2d silu gelu hardtanh relu6 hardswish"),
    )
    for name in names.split()
}
METHODS = {"add", "chunk", "contiguous", "flatten", "mean", "mul", "permute", "relu", "reshape", "size", "transpose"}
METHODS |= {"unflatten", "view"}


def save(network: nn.Module, path: str | Path) -> None:
    """Write a network, compact or not; ValueError names a module, function or argument that the file cannot hold."""
    graph, nodes, modules = trace(network, channelwise=False), list[dict[str, Any]](), dict[str, Any]()
    names = {function: name for name, function in FUNCTIONS.items()}
    for node in graph.nodes:
        target = names.get(node.target) if node.op == "call_function" else str(node.target)
        if target is None or (node.op == "call_method" and target not in METHODS):
            place = f"{node.op} {node.target} (node {node.name!r})"
            raise ValueError(f"{place} cannot be written; torch.export may take it")
        if node.op == "call_module":
            modules[target] = _described(network.get_submodule(target), target)
        call = {"args": _plain(node.args), "kwargs": _plain(node.kwargs)}
        nodes.append({"name": node.name, "op": node.op, "target": target} | call)
    state_dict, trained = network.state_dict(), dict(network.named_parameters())
    read = {str(node.target): str(node.target) in trained for node in graph.nodes if node.op == "get_attr"}
    if lost := [name for name in read if name not in state_dict]:
        raise ValueError(f"tensor {lost[0]!r} is not in the state dict; make it a parameter or a persistent buffer")
    tensors = {k: v for k, v in state_dict.items() if k.rpartition(".")[0] in modules or k in read}
    state.save(path, tensors, {"kind": KIND, "nodes": nodes, "modules": modules, "read": read})


def load(path: str | Path) -> fx.GraphModule:
    """The network of a file of `save`, in evaluation mode, on the CPU; ValueError for a damaged or unsound file."""
    tensors, description = state.load(path, kind=KIND)
    try:
        graph, seen, parts = fx.Graph(), dict[str, fx.Node](), dict[str, Any]()  # modules and tensors by dotted name
        parts |= {n: _built(about, tensors.get(f"{n}.index")) for n, about in description["modules"].items()}
        parts |= {n: nn.Parameter(tensors[n]) if own else tensors[n] for n, own in description["read"].items()}
        for node in description["nodes"]:
            op, target, name = node["op"], node["target"], node["name"]
            args, kwargs = _unplain(node["args"], seen), _unplain(node["kwargs"], seen)
            sound = all(map(NAME.fullmatch, (name, target))) and all(key.isidentifier() for key in kwargs)
            taken = any(hasattr(nn.Module, part) for part in target.split(".")[:-1])  # it would be entered, and changed
            if not sound or taken or (op == "call_method" and target not in METHODS):
                raise ValueError(f"a node may not be {name!r}, {op!r} of {target!r} with {[*kwargs]}")
            what = FUNCTIONS[target] if op == "call_function" else target
            seen[name] = graph.create_node(op, what, args, kwargs, name)
        graph.lint()
        network = fx.GraphModule(parts, graph)
        network.load_state_dict(tensors, assign=True)  # in their own precision
        return network.eval()
    except Exception as error:  # whatever a file that was not written by `save` leads to
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{str(path)!r} describes no network ({found}); save it again") from error


def _described(module: nn.Module, name: str) -> dict[str, Any]:
    """Class and arguments of a module: the parameters of its constructor, which modules of torch.nn keep by name."""
    kind = type(module)
    if kind in OWN.values():
        keys = ["out_channels", "kernel_size", "stride", "dilation", "padding", "padding_mode"]
    elif getattr(nn, kind.__name__, None) is kind:
        parameters = inspect.signature(kind).parameters.items()
        keys = [k for k, p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and k not in ("device", "dtype")]
    else:
        raise ValueError(f"module {name!r} is a {kind.__name__}, not of torch.nn; write its forward with those")
    arguments = {key: getattr(module, key, None) for key in keys}
    if "bias" in keys or kind in OWN.values():
        arguments["bias"] = getattr(module, "bias", None) is not None
    about = {"class": kind.__name__, "arguments": _plain(arguments)}
    with suppress(TypeError, ValueError):
        if kind in OWN.values() or repr(_built(about, None)) == repr(module):
            return about
    raise ValueError(f"module {name!r}, {module}, cannot be made again from its attributes")  # not all are kept by name


def _built(about: dict[str, Any], index: Tensor | None) -> nn.Module:
    name, arguments = about["class"], _unplain(about["arguments"], {})
    if name in OWN:
        if index is None or index.ndim != 1 or index.dtype != torch.int64 or (len(index) and int(index.min()) < 0):
            raise ValueError(f"a {name} needs an index of non-negative whole numbers")
        taps = math.prod(arguments["kernel_size"]) if name == "ColumnConv2d" else 1
        inputs = int(index.max()) // taps + 1 if len(index) else 1
        if name == "ColumnConv2d":  # it holds the padding of each side
            padding, mode = arguments.pop("padding"), arguments.pop("padding_mode")
            column = ColumnConv2d(nn.Conv2d(inputs, **arguments), index)
            column.padding, column.padding_mode = list(padding), mode
            return column
        return SampledConv2d(nn.Conv2d(inputs, **arguments), index)
    kind = getattr(nn, name)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"{name!r} is no module of torch.nn")
    with torch.device("meta"):  # the file has the values
        module: nn.Module = kind(**arguments)
    return module


def _plain(value: Any) -> Any:
    """As JSON: nodes, tuples, slices and dictionaries are marked."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, slice):
        return {"slice": [_plain(each) for each in (value.start, value.stop, value.step)]}
    if isinstance(value, tuple | list):
        return {"tuple" if isinstance(value, tuple) else "list": [_plain(each) for each in value]}
    if isinstance(value, dict):
        return {"dict": {str(key): _plain(each) for key, each in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{value!r} ({type(value).__name__}) cannot be written in a file of plain text")


def _unplain(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if not isinstance(value, dict):
        return value
    ((mark, content),) = value.items()
    if mark == "node":
        return nodes[content]
    if mark == "dict":
        return {key: _unplain(each, nodes) for key, each in content.items()}
    parts = [_unplain(each, nodes) for each in content]
    return slice(*parts) if mark == "slice" else tuple(parts) if mark == "tuple" else parts
