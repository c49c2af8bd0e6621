"""The command line: `python -m sppkit check | data | run | bench | figures | report`."""

import argparse
import sys
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from sppkit import bench, data, experiment, figures
from sppkit.records import Experiment, Places, expand, project_root


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    options.data = options.data or options.root / "data"
    try:
        return options.command(options) or 0
    except (ValueError, OSError, RuntimeError) as error:
        print(f"sppkit {options.name}: {error}", file=sys.stderr)
        return 1


def check(options: argparse.Namespace) -> int:
    """OK or FAIL for every requirement, then the device and the data sets found."""
    failed = 0
    for wanted in map(Requirement, ("Python>=3.11,<3.14", *(requires("sppkit") or []))):
        if wanted.marker and not wanted.marker.evaluate({"extra": "notebooks"}):
            continue
        try:
            found = "{}.{}.{}".format(*sys.version_info) if wanted.name == "Python" else version(wanted.name)
            good = wanted.specifier.contains(found, prereleases=True)
        except PackageNotFoundError:
            found, good = "not installed", False
        failed += not good
        print(f"{'OK  ' if good else 'FAIL'}  {wanted.name:14} {found:16} wanted {wanted.specifier}")
    print(f"\ndevice: {experiment.device_name(data.resolve_device('auto'))}")
    for name, answer in data.available(options.data).items():
        print(f"data:   {name:12} {'found' if answer is True else f'not in {options.data}'}")
    if failed:
        print(f"\n{failed} failed; `pip install -e '.[notebooks]'` installs what is missing")
    return int(failed > 0)


def data_command(options: argparse.Namespace) -> None:
    """Load a data set, downloading it first if asked, and describe it."""
    found = data.load(options.name_or_folder, root=options.data, download=options.download)
    size, classes = found.image_size, found.classes
    print(f"{found.name}: {len(found.train)} training and {len(found.test)} test images of {size}x{size} pixels")
    print(f"{len(classes)} classes: {', '.join(classes[:12])}{', ...' if len(classes) > 12 else ''}")


def run(options: argparse.Namespace) -> int:
    """Run a list of experiments, or one given by its settings, skipping what is recorded."""
    given = {f.name: getattr(options, f.name) for f in fields(Experiment) if getattr(options, f.name) is not None}
    if options.list and given:
        raise ValueError(f"give a list or settings, not both (found --{next(iter(given))} beside {options.list})")
    planned = expand(options.list) if options.list else [Experiment.of({"experiment": "own", **given})]
    places, done = Places(options.root, options.data, options.revision), 0
    device = data.resolve_device(options.device)
    how = {"device": device, "minutes": options.minutes, "jobs": options.jobs, "fuse": options.fuse}
    for done, r in enumerate(experiment.run_all(planned, places, **how), 1):
        what = f"{r['run_id']} {r['network']} {r['method']} seed {r['seed']}: FLOP ratio {r['flop_ratio']:.2f}"
        accuracies = f"{r['acc_baseline']:.2f} -> {r['acc_pruned']:.2f} -> {r['acc_final']:.2f} %"
        print(f"{done}/{len(planned)} {what}, {accuracies}, {r['seconds']:.0f} s", flush=True)
    return 0 if done == len(planned) else 75  # 75: stopped at the time limit, call again


def bench_command(options: argparse.Namespace) -> None:
    """Training speed of the eager and the captured step, and the loss of both round by round."""
    device = data.resolve_device(options.device)
    images = data.load(options.dataset, root=options.data, device=device)
    print(f"{experiment.device_name(device)}, torch {torch.__version__}, data on the device: {images.name}")
    frame = bench.training_speed(images, batch_size=options.batch_size, steps=options.steps, fuse=options.fuse)
    print(frame.round({"images_per_s": 0, "spread": 0, "slower": 1}).round(4).to_string(index=False))
    print("captured: the step replayed as a CUDA graph" if device.type == "cuda" else "no GPU: only the eager step")


def figures_command(options: argparse.Namespace) -> None:
    """Draw the figures whose records changed."""
    for file, what in figures.draw_all(Places(options.root)):
        print(f"{what:12} figures/{file}")


def report(options: argparse.Namespace) -> None:
    """Print the table of an experiment's records in Markdown."""
    print(figures.report(options.experiment, Places(options.root)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sppkit", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)

    def add(name: str, function: object) -> argparse.ArgumentParser:
        text = (function.__doc__ or "").strip()
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        sub.add_argument("--root", type=Path, default=project_root(), help="folder of data/runs and figures/")
        sub.add_argument("--data", type=Path, help="folder of the data sets (default: data/ in the root)")
        return sub

    add("check", check)
    add("figures", figures_command)
    sub = add("report", report)
    sub.add_argument("experiment", nargs="?", default="convnet-cifar10", help="name of a file in data/runs")
    sub = add("data", data_command)
    sub.add_argument("name_or_folder", help="digits, cifar10, imagenette or a folder of images")
    sub.add_argument("--download", action="store_true", help="fetch it if it is absent")
    sub = add("bench", bench_command)
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")
    sub.add_argument("--dataset", default="cifar10", help="cifar10, or digits where that is absent")
    sub.add_argument("--batch-size", type=int, default=128)
    sub.add_argument("--steps", type=int, default=bench.INTERVAL, help="steps a round")
    sub.add_argument("--fuse", action="store_true", help="compile the networks of the captured steps")
    sub = add("run", run)
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")
    sub.add_argument("list", nargs="?", type=Path, help="a list of experiments, such as data/experiments/*.json")
    sub.add_argument("--minutes", type=float, help="stop after this long, saved; the same command goes on")
    sub.add_argument("--jobs", type=int, default=1, help="experiments that share the GPU")
    sub.add_argument("--fuse", action="store_true", help="compile the networks (torch.compile) for speed on a GPU")
    sub.add_argument("--revision", help="recorded as the source's revision; git is asked otherwise")
    for field in fields(Experiment):
        kind, flag = str(field.type), f"--{field.name.replace('_', '-')}"
        if kind.startswith("tuple"):
            sub.add_argument(flag, type=int, nargs="*", metavar="STEP")
        elif kind == "bool":
            sub.add_argument(flag, action=argparse.BooleanOptionalAction, default=None)
        else:
            sub.add_argument(flag, type={"int": int, "float": float}.get(kind, str))
    return parser


if __name__ == "__main__":
    sys.exit(main())
