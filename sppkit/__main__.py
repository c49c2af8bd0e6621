"""The command line: `python -m sppkit check | data | run | bench | figures | report`."""

from __future__ import annotations

import argparse
import platform
import sys
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pandas as pd
import torch
from packaging.requirements import Requirement

from sppkit import bench, data, experiment, figures
from sppkit.experiment import Experiment, Places


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"sppkit {options.name}: {error}", file=sys.stderr)
        return 1


def check(options: argparse.Namespace) -> int:
    """OK or FAIL for every requirement, then the device and the data sets found."""
    failed = 0
    rows = [
        (
            "Python",
            "3.11 to 3.13",
            platform.python_version(),
            sys.version_info[:2] in ((3, 11), (3, 12), (3, 13)),
        )
    ]
    for text in requires("sppkit") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": "notebooks"}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "not installed"
        good = found != "not installed" and requirement.specifier.contains(found, prereleases=True)
        rows.append((requirement.name, str(requirement.specifier), found, good))
    for name, wanted, found, good in rows:
        failed += not good
        print(f"{'OK  ' if good else 'FAIL'}  {name:14} {found:16} wanted {wanted}")
    print(f"\ndevice: {experiment.device_name(data.resolve_device('auto'))}")
    for name, answer in data.available(options.data).items():
        print(f"data:   {name:12} {'found' if answer is True else 'not found'}")
    if failed:
        print(f"\n{failed} failed; `pip install -e '.[notebooks]'` installs what is missing")
    return int(failed > 0)


def data_command(options: argparse.Namespace) -> int:
    """Load a data set, downloading it first if asked, and describe it."""
    found = data.load(options.name_or_folder, root=options.data, download=options.download)
    size = found.image_size
    print(
        f"{found.name}: {len(found.train)} training and {len(found.test)} test images of {size}x{size} pixels"
    )
    print(
        f"{len(found.classes)} classes: {', '.join(found.classes[:12])}{', ...' if len(found.classes) > 12 else ''}"
    )
    return 0


def run(options: argparse.Namespace) -> int:
    """Run a list of experiments, or one given by its settings, skipping what is recorded."""
    places = Places(options.data, options.runs, options.checkpoints, options.work, options.revision)
    device = data.resolve_device(options.device)
    given = {
        f.name: getattr(options, f.name) for f in fields(Experiment) if getattr(options, f.name) is not None
    }
    if options.list:
        if given:
            raise ValueError(
                f"give a list or settings, not both (found --{next(iter(given))} beside {options.list})"
            )
        planned = list(experiment.expand(options.list))
    else:
        planned = [Experiment.of({"experiment": "own", **given})]
    if options.dry_run:
        print(
            pd.DataFrame([vars(p) for p in planned])[["method", "network", "dataset", "flop_ratio", "seed"]]
        )
        return 0
    done = 0
    for record in experiment.run_all(planned, places, device=device, minutes=options.minutes):
        done += 1
        print(
            f"{done}/{len(planned)} {record['run_id']} {record['network']} {record['method']} "
            f"seed {record['seed']}: FLOP ratio {record['flop_ratio']:.2f}, accuracy {record['acc_baseline']:.2f} -> "
            f"{record['acc_pruned']:.2f} -> {record['acc_final']:.2f} %, {record['seconds']:.0f} s",
            flush=True,
        )
    return 0 if done == len(planned) else 75  # 75: stopped at the time limit, call again


def bench_command(options: argparse.Namespace) -> int:
    """Training speed of the eager and the captured step, and the loss curves of both."""
    device = data.resolve_device(options.device)
    images = data.load(options.dataset, root=options.data, device=device)
    print(f"{experiment.device_name(device)}, torch {torch.__version__}, data on the device: {images.name}")
    frame = bench.training_speed(images, batch_size=options.batch_size, steps=options.steps)
    print(frame.round({"images_per_s": 0, "spread": 0, "loss": 4}).to_string(index=False))
    if device.type == "cuda":
        print("\ntraining loss by step, ResNet-56, same seed:")
        print(bench.loss_curves(images, "resnet56").round(4).to_string())
    else:
        print("no GPU: only the eager step was measured")
    return 0


def figures_command(options: argparse.Namespace) -> int:
    """Draw the figures whose records changed."""
    for file, what in figures.draw_all(options.figures, Places(runs=options.runs)):
        print(f"{what:12} {options.figures / file}")
    return 0


def report(options: argparse.Namespace) -> int:
    """Print the table of an experiment's records in Markdown."""
    runs = figures.records(options.experiment, Places(runs=options.runs))
    if runs.empty:
        raise ValueError(f"no records in {options.runs / options.experiment}.jsonl; `sppkit run` makes them")
    print(figures.markdown(figures.summary_table(runs)))
    print(f"\n{figures.caption(runs)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sppkit", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)

    def add(name: str, function: object, **defaults: object) -> argparse.ArgumentParser:
        text = (function.__doc__ or "").strip()
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        sub.add_argument("--data", type=Path, default=Places().data, help="folder of the data sets (data)")
        sub.add_argument("--runs", type=Path, default=Places().runs, help="folder of the records (data/runs)")
        return sub

    add("check", check)
    sub = add("data", data_command)
    sub.add_argument("name_or_folder", help="digits, cifar10, imagenette or a folder of images")
    sub.add_argument("--download", action="store_true", help="fetch it if it is absent")
    sub = add("run", run)
    sub.add_argument(
        "list", nargs="?", type=Path, help="a list of experiments, such as data/experiments/*.json"
    )
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")
    sub.add_argument("--minutes", type=float, help="stop after this long, saved; the same command goes on")
    sub.add_argument(
        "--checkpoints", type=Path, default=Places().checkpoints, help="trained baselines (data/checkpoints)"
    )
    sub.add_argument("--work", type=Path, default=Places().work, help="unfinished runs (build/work)")
    sub.add_argument("--revision", help="recorded as the source's revision; git is asked otherwise")
    sub.add_argument("--dry-run", action="store_true", help="print what would be run")
    for field in fields(Experiment):
        kind: object = {"int": int, "float": float}.get(str(field.type), str)
        flag = f"--{field.name.replace('_', '-')}"
        if str(field.type).startswith("tuple"):
            sub.add_argument(flag, type=int, nargs="*", metavar="STEP")
        elif field.type == "bool":
            sub.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
        else:
            sub.add_argument(flag, type=kind)  # type: ignore[arg-type]
    sub = add("bench", bench_command)
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")
    sub.add_argument("--dataset", default="cifar10", help="cifar10, or digits where that is absent")
    sub.add_argument("--batch-size", type=int, default=128)
    sub.add_argument("--steps", type=int, default=200, help="steps a round")
    sub = add("figures", figures_command)
    sub.add_argument(
        "--figures", type=Path, default=experiment.project_root() / "figures", help="folder of the figures"
    )
    sub = add("report", report)
    sub.add_argument("experiment", nargs="?", default="convnet-cifar10", help="name of a file in data/runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
