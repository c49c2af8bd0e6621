"""Milliseconds of the networks that recorded runs left, beside the dense one: what their accuracy costs in time.

A network is made again from its record, with the widths or without the groups that the run ended with, and with random
weights, since a clock does not see them. All are made ready and timed as `bench_speed` does it; a network of columns or
blocks counts as the package makes it or by an engine on trial, whichever is faster.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from bench_channels import _show
from bench_speed import FULL, QUICK, Machine, with_widths, without_groups
from driver import append_line
from settings import lines
from torch import Tensor, nn
from training import networks
from training.data import resolve_device
from variants import gone

from sppkit import cost, fast, kernels
from sppkit.compact import ColumnConv2d
from sppkit.groups import Groups
from sppkit.timing import measure, milliseconds

WIDTHS = ("cp", "fp", "scratch")  # methods whose records have the channels kept
BATCHES = {"cpu": (1, 8), "cuda": (1, 256)}


def rebuilt(record: dict[str, Any], dense: nn.Module, example: Tensor) -> nn.Module:
    """The compact network of a run, with random weights. ValueError for one whose record does not tell its shape."""
    notes, kind = record["notes"], record["settings"]["kind"]
    if "gone" in notes:
        groups = Groups(dense, example, kind=kind)
        return without_groups(dense, groups, gone(notes["gone"], groups.count))
    layers = notes.get("layers", [])
    if record["method"] in WIDTHS and layers:
        return with_widths(dense, {layer["layer"]: layer["kept"] for layer in layers})
    if layers and "outputs" in layers[0]:
        return resized(dense, {layer["layer"]: (layer["outputs"], layer["kept"]) for layer in layers})
    raise ValueError(f"run {record['run_id']} ({record['method']}) has no record of what its network looks like")


def resized(network: nn.Module, shapes: dict[str, tuple[int, int]]) -> nn.Module:
    """Convolutions and linear layers with these outputs and inputs, BatchNorms after them; random weights."""
    small, width = copy.deepcopy(network), 0
    for name, module in [*network.named_modules()]:
        made: nn.Module | None = None
        if isinstance(module, nn.Conv2d):
            width, inputs = shapes[name]
            kernel, moves = (module.kernel_size, module.stride, module.padding), {"bias": module.bias is not None}
            made = nn.Conv2d(inputs, width, *kernel, **moves)  # type: ignore[arg-type]
        elif isinstance(module, nn.Linear):
            made = nn.Linear(shapes[name][1], shapes[name][0])
        elif isinstance(module, nn.BatchNorm2d):
            made = nn.BatchNorm2d(width)
        if made is not None:
            small.set_submodule(name, made.eval())
    return small


def ready(machine: Machine, network: nn.Module, example: Tensor) -> fast.Ready:
    """The fastest that there is of a network."""
    made = machine.ready(network, example)
    found = [module for module in network.modules() if isinstance(module, ColumnConv2d) and machine.gpu]
    blocks = any(kernels.run_length(module.index, math.prod(module.kernel_size)) >= 8 for module in found)
    for engine in ("columns", "fused") if blocks else ("columns",) if found else ():
        try:
            other = machine.gathered(network, example, engine)
        except Exception as problem:  # on trial
            print(f"by {engine}, {len(example)} images: {problem}", flush=True)
            continue
        times = milliseconds({"made": made, "other": other}, example, 5).median()
        made = other if times["other"] < times["made"] else made
    return made


def table(records: Iterable[dict[str, Any]], machine: Machine, batch: int) -> pd.DataFrame:
    """A row a run: run_id, experiment, method, seed, flop_ratio, median_ms, times (of the dense network's speed).

    "dense" stands there twice in the place of a run, made ready twice: the difference of its times is the noise.
    """
    found = list(records)
    (name,) = {record["network"] for record in found}
    dense = networks.create(name).to(machine.device).eval()
    example = torch.randn(batch, 3, machine.sizes.pixels, machine.sizes.pixels, device=machine.device)
    nets, ratios = {"dense": machine.ready(dense, example)}, {"dense": 1.0}
    for record in found:
        try:
            network = rebuilt(record, dense, example[:1]).to(machine.device)
        except ValueError as problem:
            print(f"left out: {problem}")
            continue
        ratios[record["run_id"]] = cost.flop_ratio(dense, network, example[:1])
        nets[record["run_id"]] = ready(machine, network, example)
    nets["dense, again"] = machine.ready(dense, example)  # anew: places in memory and caches are noise, too
    times = measure(nets, example, rounds=machine.sizes.rounds)
    about = pd.DataFrame(found).set_index("run_id")[["experiment", "method", "seed", "flop_ratio_target"]]
    times = times.assign(times=times["median_ms"].iloc[0] / times["median_ms"], flop_ratio=pd.Series(ratios))
    return times.join(about[~about.index.duplicated()]).rename_axis("run_id").reset_index().assign(network=name)


def main(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """`python -m sppkit bench runs`: prints tables, each a record in data/runs, of --quick in build/.

    What this revision has recorded on this machine is left out: a list that was cut short goes on.
    """
    parser.add_argument("names", nargs="+", help="of experiments that are recorded in data/runs")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seed", type=int, help="only the runs of this seed: others leave networks much like them")
    parser.add_argument("--quick", action="store_true", help="two rounds, to see that it runs; recorded in build/")
    parser.add_argument("--revision", help="recorded as the source's revision; git is asked otherwise")
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    machine = Machine.of(device, replace(QUICK if options.quick else FULL[device.type], pixels=32))
    known = options.root / "data" / "runs"
    records = [record for name in options.names for record in lines(known / f"{name}.jsonl")]
    records = [r for r in records if r["method"] != "baseline" and options.seed in (None, r["seed"])]
    if not records:
        raise ValueError(f"{', '.join(options.names)}: no runs of these in {known}; `python -m sppkit run` makes them")
    about = machine.about("bench-runs", options.revision)
    path = options.root / ("build" if options.quick else "data/runs") / "bench-runs.jsonl"
    for network in dict.fromkeys(record["network"] for record in records):
        same = [record for record in records if record["network"] == network]
        for batch in BATCHES[device.type]:
            part = {"network": network, "batch": batch, "runs": sorted(record["run_id"] for record in same)}
            if is_recorded(path, about | part):
                print(f"{network}, {batch} images: recorded")
                continue
            rows = table(same, machine, batch)
            _show(rows.drop(columns=["threads", "device", "rounds"]))
            part |= {"rounds": machine.sizes.rounds, "rows": json.loads(rows.to_json(orient="records"))}
            append_line(path, json.dumps(about | part, allow_nan=False))


def is_recorded(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether these runs were timed on this machine by this revision of the source, which is known and clean."""
    same = ("device", "revision", "network", "batch", "runs")
    known = wanted["revision"] != "unknown" and not wanted["revision"].endswith("-dirty")
    return known and any(all(line.get(key) == wanted[key] for key in same) for line in lines(path))
