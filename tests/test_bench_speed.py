"""The benchmark of pruned networks: it measures what it says, the noise stands beside it, the record is whole."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import bench_speed as bench
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sppkit import cost, fast
from sppkit.__main__ import main
from sppkit.compact import ColumnConv2d, convolutions

MACHINE = bench.Machine(torch.device("cpu"), torch.float32, bench.QUICK)


def test_a_quick_run_measures_and_records_everything(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "speed", "--quick", "--device", "cpu", "--revision", "r1", "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    (line,) = (tmp_path / "build" / "bench-speed.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["revision"], record["torch"], record["mode"]) == ("r1", torch.__version__, "eager")
    layers, networks, widths = (pd.DataFrame(record[name]) for name in ("layers", "networks", "widths"))
    assert {*layers["layer"]} == {*bench.LAYERS}
    for _, rows in layers.groupby("layer"):
        assert [*rows["kind"]] == ["dense", "columns", "blocks of 16", "dense, again"]
        assert rows["columns"].iloc[1] == rows["columns"].iloc[0] / 4
        assert rows["times"].tolist() == pytest.approx([rows["median_ms"].iloc[0] / ms for ms in rows["median_ms"]])
    for (_, batch), rows in networks.groupby(["architecture", "batch"]):
        assert rows["network"].iloc[0] == "dense"
        assert rows["network"].iloc[-1] == "dense, again"
        assert rows["flop_ratio"].iloc[[0, -1]].tolist() == [1, 1]
        assert batch in bench.QUICK.batches
    assert {*bench.FACTORISATIONS} < {*networks["network"]}
    assert (widths["median_ms"] > 0).all()
    assert widths["filters"].is_monotonic_increasing
    assert "goals" not in record
    assert "VGG-16" in out


def test_the_floor_is_that_of_hand_counted_work() -> None:
    """Operations as torch counts them; bytes: input, weights, output once, the matrix of columns written and read."""
    limits = {"operations": 1e9, "bytes": 1e9}
    table = bench.layers(MACHINE, limits).set_index(["layer", "kind"])
    for name, (c, n, pixels) in bench.LAYERS.items():
        c, n, pixels = c // 8, n // 8, pixels * 32 // 224
        conv, x = nn.Conv2d(c, n, 3, padding=1), torch.randn(2, c, pixels, pixels)
        with FlopCounterMode(display=False) as counter:
            y = conv(x)
        operations = counter.get_total_flops()
        moved = 4 * (x.numel() + conv.weight.numel() + y.numel())
        assert table.at[(name, "dense"), "floor_ms"] == pytest.approx(max(operations, moved) / 1e6)
        read = 4 * (x.numel() + conv.weight.numel() / 4 + y.numel() + 2 * c * 9 / 4 * 2 * pixels**2)
        assert table.at[(name, "columns"), "floor_ms"] == pytest.approx((operations / 4 + read) / 1e6)


@pytest.mark.parametrize("multiple", [1, 8])
def test_channels_go_from_every_layer_and_the_ratio_is_reached(multiple: int) -> None:
    network, example = bench.vgg16(shrink=4), torch.randn(1, 3, 32, 32)
    small = bench.fewer_channels(network, example, 4, multiple=multiple)
    assert cost.flop_ratio(network, small, example) == pytest.approx(4, rel=0.02 if multiple == 1 else 0.15)
    wide, narrow = (list(convolutions(net).values()) for net in (network, small))
    assert all(b.out_channels < a.out_channels for a, b in zip(wide[:-1], narrow[:-1], strict=True))
    assert all(conv.out_channels % multiple == 0 for conv in narrow)


@pytest.mark.parametrize(("kind", "size"), [("column", 1), ("block8", 8)])
def test_columns_go_in_groups(kind: str, size: int) -> None:
    network, example = bench.vgg16(shrink=4), torch.randn(1, 3, 32, 32)
    small = bench.fewer_columns(network, example, 4, kind=kind)
    assert cost.flop_ratio(network, small, example) >= 4 * 0.98
    columns = [module for module in small.modules() if isinstance(module, ColumnConv2d)]
    assert len(columns) >= 10
    for module in columns[1:]:
        tap = module.index % 9
        assert all(int(count) % size == 0 for count in tap.bincount(minlength=9))


def test_a_narrow_resnet_has_the_layers_of_a_whole_one() -> None:
    whole, narrow = bench.torchvision.models.resnet50(), bench.Narrow(0.5)
    assert [*convolutions(whole)] == [*convolutions(narrow)]
    assert narrow(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    example = torch.randn(1, 3, 64, 64)
    assert cost.flop_ratio(whole, narrow, example) == pytest.approx(4, rel=0.25)


def test_goals_are_met_from_their_limit_on() -> None:
    single = pd.DataFrame([(name, "columns", 1.9 + 0.1 * k) for k, name in enumerate(bench.LAYERS)],
                          columns=["layer", "kind", "times"])  # fmt: skip
    nets = pd.DataFrame([("VGG-16", "channels", 1, 3.0), ("VGG-16", "channels", 8, 9.0)],
                        columns=["architecture", "network", "batch", "times"])  # fmt: skip
    table = bench.goals(single, nets, replace(MACHINE, sizes=bench.FULL["cpu"]))
    assert table["met"].tolist() == [False, True, True, True, True]
    assert table["times"].tolist() == pytest.approx([1.9, 2.0, 2.1, 2.2, 3.0])


def test_goals_of_a_gpu_are_against_the_fastest_dense_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.Machine, "gpu", True)
    kinds = ["columns", "blocks of 16", "blocks of 16, fused"]
    single = pd.DataFrame([(name, kind, 1 + k) for name in bench.LAYERS for k, kind in enumerate(kinds)],
                          columns=["layer", "kind", "times"])  # fmt: skip
    rows = [
        ("VGG-16", "dense, library", 0.5, 0.8),
        ("VGG-16", "channels", 1.0, 3.04),
        ("VGG-16", "channels in 8s", 1, 2.96),
    ]
    rows += [("VGG-16", "columns, gathered", 0.8, 0), ("VGG-16", "columns", 0.7, 0), ("VGG-16", "blocks of 16", 1, 0)]
    rows += [("ResNet-50", "dense, library", 1.0, 1.0), ("ResNet-50", "channels", 1.3, 1.3)]
    nets = pd.DataFrame(rows, columns=["architecture", "network", "times", "layers_times"]).assign(batch=64)
    table = bench.goals(single, nets, replace(MACHINE, sizes=bench.FULL["cuda"])).set_index("what")
    found = table.loc[["VGG-16 at 4, channels, its convolutions", "VGG-16 at 4, channels in 8s, its convolutions"]]
    assert found["times"].tolist() == [3.04, 2.96]
    assert found["library"].tolist() == pytest.approx([3.8, 3.7])
    assert found["met"].tolist() == [True, False]
    assert table["library"]["VGG-16 at 4, columns"] == pytest.approx(1.6)
    assert table["library"]["conv4_2, a quarter in blocks of 16"] == 3
    assert table.at["ResNet-50 at 2, channels and samplers", "met"]


class Replayed(nn.Module):
    """What a CUDA graph is to the benchmark: it keeps nothing of what it reads, and cannot be copied."""

    def __init__(self, network: nn.Module, x: torch.Tensor) -> None:
        super().__init__()
        self.output = network(x)
        self.reads = [weakref.ref(tensor) for tensor in (x, *network.parameters(), *network.buffers())]

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        assert all(read() is not None for read in self.reads), "what the graph reads is gone"
        return self.output

    def __deepcopy__(self, _: object) -> None:
        raise TypeError("cannot pickle 'CUDAGraph' object")


def test_the_way_of_a_gpu_through_the_benchmark(
    kernels: ModuleType, interpret: Callable[[ModuleType], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines on trial by the interpreter; graphs are played."""

    def optimise(network: nn.Module, example: torch.Tensor, **how: Any) -> fast.Ready:
        capture = how.pop("capture", False)
        ready = right(network, example, **how)
        if capture:
            ready.capture(example)
        return ready

    right = fast.optimise
    kernels.TILES |= {"PLACES": 1024, "COUNT": 16}  # fewer programs to interpret
    monkeypatch.setattr(bench, "engines", interpret(bench.engines))
    kernels.FUSED = ((64, 32, 64),)
    dense = interpret(bench.dense_layers)
    for kernel in ("_image", "_pool"):
        monkeypatch.setattr(bench.dense_layers, kernel, getattr(dense, kernel))
    monkeypatch.setattr(fast, "Captured", Replayed)
    monkeypatch.setattr(fast, "optimise", optimise)
    monkeypatch.setattr(bench.Machine, "gpu", True)
    monkeypatch.setattr(bench, "LAYERS", {"conv3_2": (256, 256, 56)})
    monkeypatch.setattr(bench, "MULTIPLES", (8, 32))
    sizes = replace(bench.QUICK, batches=(1,), rounds=1, layer_batch=1)
    machine = replace(MACHINE, sizes=sizes)
    table = bench.layers(machine, {"operations": 1e9, "bytes": 1e9}).set_index("kind")
    floor = table["floor_ms"]
    assert floor["blocks of 16"] == floor["blocks of 16, fused"] < floor["blocks of 16, gathered"]
    trials = [f"{kind}, {title}" for kind, titles in bench.TRIALS.items() for title in titles.values()]
    assert {*table.index} == {"dense", *bench.TRIALS, *trials, "dense, again"}
    assert table.loc[trials, "columns"].tolist() == [32 * 9 / 4, 4 * 16, 4 * 16]
    image = torch.randn(1, 3, 32, 32)
    whole = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.MaxPool2d(3), nn.Conv2d(32, 32, 3, padding=1))
    whole = whole.extend([nn.ReLU(), nn.MaxPool2d(2)]).eval()
    nets = {"dense": whole, "columns": bench.fewer_columns(whole, image, 4)}
    nets[f"blocks of {bench.BLOCK}"] = bench.fewer_columns(whole, image, 4, kind=f"block{bench.BLOCK}")
    found = machine.table(nets, image).set_index("network")
    package = [f"{name}, package" for name in nets]
    trials = ["columns, gathered", "blocks of 16, fused"]
    assert [*found.index] == [*nets, "dense, library", *package, *trials, "dense, again"]
    assert (found.loc[package, "form"] == "NHWC").all()
    assert (found["difference"] < 1e-4).all()
    assert (found["layers_ms"] > 0).all()
    ways = "(NCHW|NHWC)((, dense)?, in (8|32)s)?(, ReLU inside|, own kernels|, own kernels, in pairs)?"
    assert found["form"].str.fullmatch(ways).all()
    assert (table["difference"] < 1e-4).all()
    sound = bench.engines.GatheredConv2d.forward
    monkeypatch.setattr(bench.engines.GatheredConv2d, "forward", lambda self, x, **how: 1.05 * sound(self, x, **how))
    monkeypatch.setattr(fast, "take_faster", lambda *_: None)
    monkeypatch.setattr(bench.Machine, "_take_from", lambda *_: None)
    wrong = machine.table(nets, image).set_index("network")["difference"]
    assert (wrong[["columns, gathered", "blocks of 16, fused"]] > 0.01).all()
    widths = bench.by_width(machine)
    assert (widths["median_ms"] > 0).all()
