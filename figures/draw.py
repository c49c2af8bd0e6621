"""Draws the figures of this folder from recorded runs: `python -m sppkit figures`.

A figure's file carries a hash of its records and of this module; while that is unchanged, the file is left untouched.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from PIL import Image
from records import caption, clocked, departures, read, retraining_decay, summary_table, varied

from sppkit import state


def lost_over_flop_ratio(runs: pd.DataFrame) -> Figure:
    """Points lost over the FLOP ratio: every run a dot, mean and standard deviation of each method."""
    sns.set_theme(style="whitegrid", context="notebook")
    figure, axes = plt.subplots(figsize=(9.5, 4.8), layout="constrained")
    axes.axhline(0, color="0.35", lw=1.2)
    runs = runs[runs["settings"].map(departures) == ""]
    at_four = runs[runs["flop_ratio_target"] == 4].groupby("title")["lost"].mean().sort_values().index
    order = dict.fromkeys([*at_four, *runs["title"]])  # those without a run at 4 come last
    width = runs["flop_ratio_target"].max() - runs["flop_ratio_target"].min()
    for place, (title, colour) in enumerate(zip(order, sns.color_palette("colorblind"), strict=False)):
        group = runs[runs["title"] == title].sort_values("flop_ratio_target")
        shift = 0.006 * width * (place - (len(order) - 1) / 2)  # side by side: no method hides another
        points = group.groupby("flop_ratio_target")
        counts = points.size().map(str)
        label = f"{title} (n={counts.iloc[0] if counts.nunique() == 1 else ', '.join(counts)})"
        ratio, lost = points["flop_ratio"].mean(), points["lost"]
        axes.errorbar(ratio + shift, lost.mean(), lost.std(), marker="o", ms=5, capsize=3, color=colour, label=label)
        axes.scatter(group["flop_ratio"] + shift, group["lost"], s=14, color=colour, alpha=0.45, lw=0)
    axes.invert_yaxis()
    axes.set(xlabel="FLOP ratio (convolution MACs, dense / compact), methods side by side")
    axes.set(ylabel="points lost against the seed's baseline")
    axes.set_title(f"{runs['network'].iloc[0]} on {runs['dataset'].iloc[0]}: mean ± standard deviation over seeds")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8, title="n from left to right")
    figure.supxlabel(caption(runs), fontsize=7, color="0.4")
    return figure


def lost_by_method(*lists: pd.DataFrame) -> Figure:
    """Points lost at a FLOP ratio of 4 by method, a dot a seed and a bar the mean, one colour a list of records."""
    sns.set_theme(style="whitegrid", context="notebook")
    figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
    fours = [runs[(runs["flop_ratio_target"] == 4) & (runs["settings"].map(departures) == "")] for runs in lists]
    places = {title: place for place, title in enumerate(fours[-1].groupby("title")["lost"].mean().sort_values().index)}
    for number, (runs, colour) in enumerate(zip(fours, sns.color_palette("colorblind"), strict=False)):
        runs, shift = runs[runs["title"].isin(places)], 0.15 * (2 * number - len(lists) + 1)
        decays = sorted({retraining_decay(settings) for settings in runs["settings"]})
        heights = runs["title"].map(places) + shift
        label = f"retrained with weight decay {', '.join(map(str, decays))}"
        axes.plot(runs["lost"], heights, "o", color=colour, alpha=0.6, ms=5, label=label)
        means = runs.groupby("title")["lost"].mean()
        axes.plot(means, means.index.map(places) + shift, "|", color=colour, ms=16, mew=2.5)
    axes.axvline(0, color="0.35", lw=1.2)
    counts = {title: dict.fromkeys(str((runs["title"] == title).sum()) for runs in fours) for title in places}
    axes.set_yticks([*places.values()], [f"{title} (n={' and '.join(counts[title])})" for title in places])
    axes.invert_yaxis()
    axes.set(xlabel="points of test accuracy lost against the seed's own baseline")
    axes.set_title(f"{lists[0]['network'].iloc[0]} on {lists[0]['dataset'].iloc[0]}, a quarter of the MACs left")
    axes.legend(loc="upper right", fontsize=9)
    figure.supxlabel(caption(pd.concat(fours)), fontsize=7, color="0.4")
    return figure


def lost_over_speed(times: pd.DataFrame, *lists: pd.DataFrame) -> Figure:
    """Points lost (mean and spread of all seeds) over the measured speed of one seed's network, to choose from.

    times: `records.clocked`; by network and machine, of the methods in these lists, at the machine's largest batch.
    """
    sns.set_theme(style="whitegrid", context="notebook")
    times = times[times["experiment"].isin({runs["experiment"].iloc[0] for runs in lists})]
    largest = times.groupby("machine")["batch"].transform("max")
    times = times[(times["batch"] == largest) & (times["flop_ratio_target"] > 1.5)]  # what prunes next to nothing
    networks, machines = [*dict.fromkeys(times["network"])], [*dict.fromkeys(times["machine"])]
    titles = [*dict.fromkeys(times["title"])]
    colours = dict(zip(titles, sns.color_palette("tab10" if len(titles) < 11 else "husl", len(titles)), strict=True))
    markers = dict(zip(sorted(set(times["flop_ratio_target"])), cycle("o^sDvPX"), strict=False))
    size = (5.2 * len(networks) + 2, 3.6 * len(machines))
    figure, axes = plt.subplots(len(machines), len(networks), figsize=size, layout="constrained", squeeze=False)
    for (machine, network), group in times.groupby(["machine", "network"]):
        ax = axes[machines.index(machine), networks.index(network)]
        ax.axvline(1, color="0.35", lw=1.2)
        for row in group.to_dict("records"):
            how = {"color": colours[row["title"]], "marker": markers[row["flop_ratio_target"]], "ms": 8, "capsize": 3}
            ax.errorbar(row["times"], row["lost"], row["spread"], ls="", **how)
        ax.invert_yaxis()
        ax.set_title(f"{network}\n{machine}, {group['precision'].iloc[0]}, batch {group['batch'].iloc[0]}", fontsize=10)
        ax.set(xlabel="times the dense network's speed", ylabel="points lost")
        ax.locator_params(axis="x", nbins=6)
    seeds = times.groupby("title")["n"].unique().map(lambda found: ", ".join(map(str, sorted(found))))
    names = {title: f"{title} (n={seeds[title]})" for title in colours}
    handles = [plt.Line2D([], [], color=c, marker="o", ls="", label=names[title]) for title, c in colours.items()]
    handles += [plt.Line2D([], [], color="0.5", marker=m, ls="", label=f"FLOP ratio {r:g}") for r, m in markers.items()]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    revisions = ", ".join(dict.fromkeys(times["revision"]))
    figure.supxlabel(f"{caption(pd.concat(lists))}; times of one seed's network, {revisions}", fontsize=7, color="0.4")
    return figure


# file in figures/ -> (names of the records, function that draws them)
FIGURES: dict[str, tuple[tuple[str, ...], Callable[..., Figure]]] = {
    "s1-convnet.png": (("s1-convnet",), lost_over_flop_ratio),
    "s1-light-decay.png": (("s1-light-decay",), lost_over_flop_ratio),
    "s1-retraining.png": (("s1-convnet", "s1-light-decay"), lost_by_method),
    "lost-over-speed.png": (
        ("bench-runs", "race-vgg16", "race-resnet56", "s2-resnet56", "blocks-resnet56", "blocks-vgg16"),
        lost_over_speed,
    ),
}


def source_hash(names: Sequence[str], root: Path) -> str:
    """Hash of what a figure depends on: its records and this module."""
    paths = [*(root / "data" / "runs" / f"{name}.jsonl" for name in names), Path(__file__)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def drawn_from(path: Path) -> str | None:
    """The hash that a figure's file carries; None where there is none."""
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get("sppkit-source")


def draw_all(root: Path) -> list[tuple[str, str]]:
    """Draw the figures whose records or code changed; returns (file, "drawn", "unchanged" or "no records")."""
    folder, done = root / "figures", []
    for file, (names, function) in FIGURES.items():
        if not all((root / "data" / "runs" / f"{name}.jsonl").exists() for name in names):
            done.append((file, "no records"))
        elif drawn_from(folder / file) == (wanted := source_hash(names, root)):
            done.append((file, "unchanged"))
        else:
            frames = (clocked(root) if name == "bench-runs" else read(name, root) for name in names)
            figure, buffer = function(*frames), io.BytesIO()
            figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None, "sppkit-source": wanted})
            plt.close(figure)
            state.write_bytes(folder / file, buffer.getvalue())
            done.append((file, "drawn"))
    return done


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown.

    >>> print(markdown(pd.DataFrame({"a": [1]})))
    | a |
    |---|
    | 1 |
    """
    head, *rows = (f"| {' | '.join(map(str, row))} |" for row in (table.columns, *table.itertuples(index=False)))
    return "\n".join([head, "|" + "---|" * len(table.columns), *rows])


def tables(name: str, root: Path, *, flop_ratio: float | None = None) -> list[str]:
    """The runs of data/runs/<name>.jsonl in Markdown with captions: the methods, then controlled departures from them.

    What of the two a list does not have is left out. ValueError for a list without records or with studies of single
    layers, and where `flop_ratio` was not a target of any run.
    """
    runs = read(name, root)
    if runs["lost"].isna().all():
        raise ValueError(f"{name!r} has studies of single layers, which are not a table of methods; see the notebooks")
    if flop_ratio is not None:
        targets, runs = sorted(set(runs["flop_ratio_target"])), runs[runs["flop_ratio_target"] == flop_ratio]
        if runs.empty:
            raise ValueError(f"no run of {name!r} has flop_ratio={flop_ratio:g}; there are {targets}")
    runs = runs.assign(title=runs["title"] + varied(runs))
    plain = runs["settings"].map(departures) == ""
    parts = [part for part in (runs[plain], runs[~plain]) if len(part)]
    return [f"{markdown(summary_table(part))}\n\n{caption(part)}" for part in parts]


def main(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """`python -m sppkit figures`."""
    for file, what in draw_all(parser.parse_args(arguments).root):
        print(f"{what:12} figures/{file}")


def report(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """`python -m sppkit report`."""
    parser.add_argument("experiment", nargs="?", default="s1-convnet", help="name of a file in data/runs")
    parser.add_argument("--flop-ratio", type=float, help="only the runs with this target")
    options = parser.parse_args(arguments)
    print("\n\n".join(tables(options.experiment, options.root, flop_ratio=options.flop_ratio)))
