"""Figures and tables drawn from records alone.

A figure's file carries a hash of its records and of this module; while that is unchanged, the file is left untouched.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from PIL import Image

from sppkit import state
from sppkit.records import Places

NAMES = {"spp": "SPP, columns", "cp": "CP, channels", "baseline": "baseline"}


def records(name: str, places: Places | None = None) -> pd.DataFrame:
    """The records of data/runs/<name>.jsonl, one row a run."""
    return pd.DataFrame((places or Places()).records(name))


def mean_and_spread(values: pd.Series) -> str:
    """Mean and sample standard deviation; a single run has no spread.

    >>> mean_and_spread(pd.Series([1.0, 2.0, 3.0]))
    '2.00 ± 1.00 (n=3)'
    """
    spread = f" ± {values.std():.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{spread} (n={len(values)})"


def summary_table(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a method and target: FLOP ratios reached, accuracies in %, loss in points against the seed's baseline."""
    rows, keys = [], ["network", "dataset", "method", "flop_ratio_target"]
    for (network, dataset, method, target), group in runs.groupby(keys):
        row = {
            "network": network,
            "data": dataset,
            "method": NAMES.get(method, method),
            "FLOP ratio": f"{target:g} → {group['flop_ratio'].mean():.2f}",
            "whole network": f"{group['flop_ratio_whole'].mean():.2f}" if "flop_ratio_whole" in group else "",
            "baseline %": mean_and_spread(group["acc_baseline"]),
            "pruned %": mean_and_spread(group["acc_pruned"]),
            "retrained %": mean_and_spread(group["acc_final"]),
            "lost, points": mean_and_spread(group["acc_baseline"] - group["acc_final"]),
            "device": ", ".join(sorted(set(group["device"]))),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown.

    >>> print(markdown(pd.DataFrame({"a": [1]})))
    | a |
    |---|
    | 1 |
    """
    head, *rows = (f"| {' | '.join(map(str, row))} |" for row in (table.columns, *table.itertuples(index=False)))
    return "\n".join([head, "|" + "---|" * len(table.columns), *rows])


def report(name: str, places: Places | None = None) -> str:
    """The table and the caption of data/runs/<name>.jsonl in Markdown, as the README shows them."""
    runs = records(name, places)
    if runs.empty:
        raise ValueError(f"no records of {name!r} in {(places or Places()).runs}; `python -m sppkit run` makes them")
    return f"{markdown(summary_table(runs))}\n\n{caption(runs)}"


def caption(runs: pd.DataFrame) -> str:
    """Device, versions, precision and run ids of the records in a figure."""
    ids = sorted(runs["run_id"])
    shown = ", ".join(ids[:3]) + (f" … {len(ids)} runs" if len(ids) > 3 else "")
    device, precision, version = (", ".join(sorted(set(runs[key]))) for key in ("device", "precision", "torch"))
    return f"{device} · {precision} · torch {version} · runs {shown}"


def accuracy_over_flop_ratio(runs: pd.DataFrame) -> Figure:
    """Accuracy on the test images over the FLOP ratio: every run a dot, mean and standard deviation of each method."""
    sns.set_theme(style="whitegrid", context="notebook")
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    dense = runs.drop_duplicates("baseline_id")["acc_baseline"]
    mean, spread = dense.mean(), dense.std()
    axes.axhline(mean, color="0.35", lw=1.2)
    axes.axhspan(mean - spread, mean + spread, color="0.35", alpha=0.12, lw=0)
    place = axes.get_yaxis_transform()  # x in shares of the width, y in data
    label = f"baseline {mean_and_spread(dense)}"
    axes.text(0.99, mean, label, transform=place, ha="right", va="bottom", fontsize=9, color="0.25")
    for (method, group), colour in zip(runs.groupby("method"), sns.color_palette("colorblind"), strict=False):
        points = group.groupby("flop_ratio_target")
        ratio, accuracy = points["flop_ratio"].mean(), points["acc_final"]
        label = f"{NAMES.get(method, method)} (n={points.size().min()} a point)"
        axes.errorbar(ratio, accuracy.mean(), accuracy.std(), marker="o", capsize=4, color=colour, label=label)
        axes.plot([1, ratio.iloc[0]], [mean, accuracy.mean().iloc[0]], ":", color=colour, lw=1)
        axes.scatter(group["flop_ratio"], group["acc_final"], s=14, color=colour, alpha=0.45, lw=0)
    axes.set(xlabel="FLOP ratio (convolution MACs, dense / compact)", ylabel="test accuracy after retraining, %")
    axes.set_title(f"{runs['network'].iloc[0]} on {runs['dataset'].iloc[0]}: mean ± standard deviation over seeds")
    axes.legend(loc="lower left")
    figure.supxlabel(caption(runs), fontsize=7, color="0.4")
    return figure


# file in figures/ -> (name of the records, function that draws them)
FIGURES: dict[str, tuple[str, Callable[[pd.DataFrame], Figure]]] = {
    "convnet-cifar10-accuracy.png": ("convnet-cifar10", accuracy_over_flop_ratio)
}


def source_hash(name: str, places: Places) -> str:
    """Hash of what a figure depends on: its records and this module."""
    path = places.runs / f"{name}.jsonl"
    return hashlib.sha256(path.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]


def drawn_from(path: Path) -> str | None:
    """The hash that a figure's file carries; None where there is none."""
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get("sppkit-source")


def draw_all(places: Places) -> list[tuple[str, str]]:
    """Draw the figures whose records or code changed; returns (file, "drawn", "unchanged" or "no records")."""
    folder, done = places.root / "figures", []
    for file, (name, function) in FIGURES.items():
        if not (places.runs / f"{name}.jsonl").exists():
            done.append((file, "no records"))
        elif drawn_from(folder / file) == (wanted := source_hash(name, places)):
            done.append((file, "unchanged"))
        else:
            figure, buffer = function(records(name, places)), io.BytesIO()
            figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None, "sppkit-source": wanted})
            plt.close(figure)
            state.write_bytes(folder / file, buffer.getvalue())
            done.append((file, "drawn"))
    return done
