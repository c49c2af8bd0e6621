"""For the notebooks and figures: recorded runs, one line of JSON each in data/runs/, and the tables made from them."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from training.data import project_root

from sppkit import state

TITLES = {
    "baseline": "dense",
    "spp": "SPP",
    "deterministic": "SPP, deterministic",
    "oneshot": "L1, one shot",
    "gradual": "L1, gradual",
    "random": "random",
    "taylor": "TP (Taylor)",
    "ssl": "SSL (group lasso)",
    "cp": "CP",
    "fp": "FP (L1)",
    "scratch": "CP's widths from scratch",
    "depgraph": "torch-pruning (DepGraph)",
    "jaderberg": "Jaderberg",
    "asym": "Asym.",
    "asym3d": "Asym. 3D",
    "3c": "3C",
    "layer": "one layer",
    "draws": "one layer, drawn anew",
}
KINDS = {"cp": ", channels", "fp": ", filters"}  # those of the methods that have no choice of groups, if any
KINDS |= dict.fromkeys(("scratch", "depgraph", "jaderberg", "asym", "asym3d", "3c", "layer", "draws"), "")


def read(name: str, root: Path | None = None) -> pd.DataFrame:
    """The records of data/runs/<name>.jsonl, a row a run, with `title` of the method and points `lost`."""
    folder = (root or project_root()) / "data" / "runs"
    found = {path.stem: path for path in sorted(folder.glob("*.jsonl")) if path.stat().st_size}
    if name not in found:
        there = f"there are {', '.join(found)}" if found else "nor of anything else"
        raise ValueError(f"no records of {name!r} in {folder}, {there}; `python -m sppkit run` makes them")
    runs = pd.DataFrame(map(json.loads, found[name].read_text().splitlines()))
    if "method" not in runs:
        way_out = "they are no runs of methods, read their lines with json, as notebook 10 does"
        raise ValueError(f"{found[name]}: its records have no 'method'; {way_out}")
    titles = [*map(title, runs["method"], runs["settings"])]
    final = runs["acc_final"] if "acc_final" in runs else float("nan")  # studies of one layer train nothing
    return runs.assign(title=titles, lost=runs["acc_baseline"] - final)


def latest(name: str, root: Path | None = None) -> dict[str, dict[str, Any]]:
    """What a benchmark recorded last in data/runs/<name>.jsonl, by machine."""
    path = (root or project_root()) / "data" / "runs" / f"{name}.jsonl"
    return {line["device"]: line for line in map(json.loads, path.read_text().splitlines())}


def timed(root: Path | None = None) -> pd.DataFrame:
    """The rows that `bench runs` recorded last of each network and batch on each machine."""
    path, last = (root or project_root()) / "data" / "runs" / "bench-runs.jsonl", dict[Any, pd.DataFrame]()
    for line in map(json.loads, path.read_text().splitlines()):
        machine, precision, source = (line[key] for key in ("device", "precision", "revision"))
        rows = pd.DataFrame(line["rows"]).assign(machine=machine, precision=precision, revision=source)
        last |= {(machine, *key): part for key, part in rows.groupby(["network", "batch"])}
    return pd.concat(last.values())


def clocked(root: Path | None = None) -> pd.DataFrame:
    """What `bench runs` measured last on each machine, a row a network and batch, beside what it lost.

    Columns: machine, precision, revision, network, batch, experiment, run_id, title, flop_ratio_target, median_ms,
    times (the dense network's speed), and of all seeds of such a run lost (mean), spread (standard deviation) and n.
    """
    columns = ["machine", "precision", "revision", "network", "batch", "run_id", "median_ms", "times", "experiment"]
    times = timed(root)[columns]
    runs = pd.concat([read(name, root) for name in times["experiment"].dropna().unique()]).drop_duplicates("run_id")
    same = ["experiment", "network", "title", "plan", "flop_ratio_target"]
    alike = runs.assign(plan=varied(runs)).groupby(same)["lost"]
    runs = runs.assign(spread=alike.transform("std"), n=alike.transform("size"), lost=alike.transform("mean"))
    return times.merge(runs[["run_id", "title", "flop_ratio_target", "lost", "spread", "n"]], on="run_id")


def title(method: str, settings: dict[str, Any]) -> str:
    """The method of a run, its groups, and how it departs from the method it is named after.

    >>> title("spp", {"kind": "column", "ranking": "first"})
    'SPP, columns, ranked by first norms'
    >>> title("spp", {"kind": "block8"})
    'SPP, blocks of 8'
    >>> title("cp", {"renew": True})
    'CP, channels, BatchNorm renewed'
    """
    group = settings.get("kind", "column")
    groups = f"blocks of {group.removeprefix('block')}" if group.startswith("block") else f"{group}s"
    kind = KINDS.get(method, f", {groups}")
    norms = ", BatchNorm put back" if settings.get("norms") else ""
    return f"{TITLES[method]}{kind}{norms}{departures(settings)}"


def _trace(run_id: str, root: Path | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return state.load((root or project_root()) / "data" / "runs" / "traces" / f"{run_id}.safetensors", kind="trace")


def _unpacked(values: Tensor, dtype: torch.dtype, about: dict[str, Any]) -> Tensor:
    flat = torch.frombuffer(bytearray(zlib.decompress(values.numpy().tobytes())), dtype=dtype)
    return flat.view(*reversed(about["shape"])).T


def trace(run_id: str, root: Path | None = None) -> tuple[Tensor, dict[str, slice], int]:
    """Recorded probabilities (updates, groups), float64 in 255ths; the layers' groups; training steps between rows."""
    tensors, about = _trace(run_id, root)
    layers = {name: slice(*ends) for name, ends in about["layers"].items()}
    return _unpacked(tensors["probability"], torch.uint8, about).double() / 255, layers, about["interval"]


def ranks(run_id: str, root: Path | None = None) -> Tensor:
    """Recorded ranks (updates, groups) within the layers, before each update; 0: the smallest norm, gone groups first.

    KeyError for a run that has none: they are kept of seed 0, where groups are few, and older records lack them.
    """
    tensors, about = _trace(run_id, root)
    return _unpacked(tensors["ranks"], torch.int16, about).long()


def history(run_id: str, root: Path | None = None) -> dict[str, pd.DataFrame]:
    """Rows an epoch of "pruning" and "retraining": step, lr, loss, accuracy (% on training batches), seconds."""
    return {phase: pd.DataFrame(rows) for phase, rows in _trace(run_id, root)[1]["history"].items()}


def retraining_decay(settings: dict[str, Any]) -> float:
    """The weight decay of a run's retraining: its own, or that of its training.

    >>> retraining_decay({"weight_decay": 0.004}), retraining_decay({"weight_decay": 0.004, "retrain_weight_decay": 0})
    (0.004, 0)
    """
    own = settings.get("retrain_weight_decay", -1)
    return own if own >= 0 else settings["weight_decay"]


def departures(settings: dict[str, Any]) -> str:
    """What makes a controlled run another method than the one it is named after; "" for the method itself.

    >>> departures({"masked": "still", "columns_of": "spp"})
    ', masked groups still, columns of SPP'
    >>> departures({"masks": "expected"})
    ', expected masks'
    """
    texts = {"masked": "masked groups {}", "ranking": "ranked by {}", "scope": "over the whole {}"}
    texts |= {"siblings": "siblings {:g}", "columns_of": "columns of {}", "masks": "{} masks"}
    plain = {"masked": "decays", "ranking": "norm", "scope": "layer", "siblings": 0.0, "columns_of": ""}
    plain["masks"] = "drawn"
    texts |= {"select": "chosen by {}", "samplers": "no sampler", "correct": "shortcut's loss not corrected"}
    texts |= {"renew": "BatchNorm renewed", "refit": "no refit", "ridge": "ridge {:g}"}
    plain |= {"select": "lasso", "samplers": True, "correct": True, "renew": False, "refit": True, "ridge": 0.0}
    found = {key: settings[key] for key in texts if settings.get(key, plain[key]) != plain[key]}
    names = {**TITLES, "taylor": "gradient · weight", "first": "first norms", "raw": "norms, not their ranks"}
    names |= {"history": "summed norms", "masked": "summed norms, masked"}
    names |= {"inverse": "LASSO through BatchNorm's inverse"}
    return "".join(f", {texts[key].format(names.get(value, value))}" for key, value in found.items())


def varied(runs: pd.DataFrame) -> pd.Series:
    """What runs of one title vary, a text a run: settings that differ from what most of them have, if most agree.

    >>> settings = [{"u": 0.25}, {"u": 0.25}, {"u": 0.5}]
    >>> varied(pd.DataFrame({"title": ["SPP"] * 3, "settings": settings})).tolist()
    ['', '', ', u = 0.5']
    """
    names = ("interval", "A", "u", "form", "gradient", "rescale", "rule", "prune_lr", "retrain_steps")
    texts = pd.Series("", index=runs.index)
    for name in (*names, "retrain_lr", "retrain_weight_decay"):
        values = runs["settings"].map(lambda settings, name=name: settings.get(name))  # older records lack some
        most = {title: group.mode() for title, group in values.groupby(runs["title"])}
        usual = runs["title"].map({title: modes[0] for title, modes in most.items() if len(modes) == 1})
        other = values.notna() & (values != usual)
        texts[other] += [f", {name} = {value}" for value in values[other]]
    return texts


def mean_and_spread(values: pd.Series) -> str:
    """Mean and sample standard deviation; a single run has no spread.

    >>> mean_and_spread(pd.Series([1.0, 2.0, 3.0]))
    '2.00 ± 1.00 (n=3)'
    """
    spread = f" ± {values.std():.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{spread} (n={len(values)})"


def summary_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a method and target, least lost first; points lost are against the seed's own baseline."""
    rows = []
    for (target, method), group in runs.groupby(["flop_ratio_target", "title"]):
        row = {
            "method": method,
            "FLOP ratio": f"{target:g} → {group['flop_ratio'].mean():.2f}",
            "whole network": f"{group['flop_ratio_whole'].mean():.2f}",
            "baseline %": mean_and_spread(group.drop_duplicates("baseline_id")["acc_baseline"]),
            "pruned %": mean_and_spread(group["acc_pruned"]),
            "retrained %": mean_and_spread(group["acc_final"]),
            "lost, points": mean_and_spread(group["lost"]),
        }
        rows.append((target, group["lost"].mean(), row))
    return pd.DataFrame([row for *_, row in sorted(rows, key=lambda found: found[:2])])


def caption(runs: pd.DataFrame) -> str:
    """Network, data, device, versions, precision and run ids of the records in a figure or table."""
    ids = sorted(runs["run_id"])
    shown = ", ".join(ids[:3]) + (f" … {len(ids)} runs" if len(ids) > 3 else "")
    keys = ("network", "dataset", "device", "precision", "torch")
    network, dataset, device, precision, version = (", ".join(sorted(set(runs[key]))) for key in keys)
    return f"{network} on {dataset} · {device} · {precision} · torch {version} · runs {shown}"
