"""The command line: `python -m sppkit check | data | run | bench | figures | report`."""

import argparse
import ast
import importlib
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from sppkit import data, records


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    options.data = options.data or options.root / "data"
    try:
        return options.command(options) or 0
    except (ValueError, OSError, RuntimeError) as error:
        print(f"sppkit {options.name}: {error}", file=sys.stderr)
        return 1


def _checkout(folder: str, module: str) -> Any:
    """A module that lies beside the package in the repository, with the records it makes or draws."""
    place = Path(__file__).parent.parent / folder
    if not (place / f"{module}.py").exists():
        raise ValueError(f"{folder}/{module}.py is not here: run this in a checkout of the repository")
    sys.path.insert(0, str(place))
    return importlib.import_module(module)


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
    print(f"\ndevice: {data.device_name(data.resolve_device('auto'))}")
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
    """Run a list of experiments, or one given as NAME=VALUE ..., skipping what is recorded."""
    return _checkout("data/experiments", "driver").command(options)


def bench(options: argparse.Namespace) -> None:
    """Training speed: the eager, the captured and the pruning step, and the loss of each round by round."""
    device = data.resolve_device(options.device)
    images = data.load(options.dataset, root=options.data, device=device)
    print(f"{data.device_name(device)}, torch {torch.__version__}, data on the device: {images.name}")
    settings = {"batch_size": options.batch_size, "steps": options.steps, "fuse": options.fuse}
    frame = _checkout("data/experiments", "bench").training_speed(images, **settings)
    print(frame.round({"images_per_s": 0, "spread": 0, "slower": 1}).round(4).to_string(index=False))
    print("captured: the step replayed as a CUDA graph" if device.type == "cuda" else "no GPU: only the eager step")


def figures(options: argparse.Namespace) -> None:
    """Draw the figures whose records changed."""
    for file, what in _checkout("figures", "draw").draw_all(options.root):
        print(f"{what:12} figures/{file}")


def report(options: argparse.Namespace) -> None:
    """Print the table of an experiment's records in Markdown."""
    print(records.report(options.experiment, options.root))


def assignment(text: str) -> tuple[str, Any]:
    """A setting, NAME=VALUE; a value that is no Python literal is text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a list (*.json) nor NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sppkit", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True)

    def add(function: Any, name: str | None = None) -> argparse.ArgumentParser:
        text = (function.__doc__ or "").strip()
        sub = commands.add_parser(name or function.__name__, help=text, description=text)
        sub.set_defaults(command=function)
        sub.add_argument("--root", type=Path, default=records.project_root(), help="folder of data/runs and figures/")
        sub.add_argument("--data", type=Path, help="folder of the data sets (default: data/ in the root)")
        return sub

    add(check)
    add(figures)
    sub = add(report)
    sub.add_argument("experiment", nargs="?", default="s1-convnet", help="name of a file in data/runs")
    sub = add(data_command, "data")
    sub.add_argument("name_or_folder", help="digits, cifar10, imagenette or a folder of images")
    sub.add_argument("--download", action="store_true", help="fetch it if it is absent")
    sub = add(bench)
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")
    sub.add_argument("--dataset", default="cifar10", help="cifar10, or digits where that is absent")
    sub.add_argument("--batch-size", type=int, default=128)
    sub.add_argument("--steps", type=int, default=180, help="steps a round (180: one update of SPP in each)")
    sub.add_argument("--fuse", action="store_true", help="compile the networks of the captured steps")
    sub = add(run)
    sub.add_argument("what", nargs="+", help="a list such as data/experiments/s1-convnet.json, or settings NAME=VALUE")
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")
    sub.add_argument("--minutes", type=float, help="stop after this long, saved; the same command goes on")
    sub.add_argument("--jobs", type=int, default=1, help="experiments that share the GPU")
    sub.add_argument("--fuse", action="store_true", help="compile the networks (torch.compile) for speed on a GPU")
    sub.add_argument("--revision", help="recorded as the source's revision; git is asked otherwise")
    return parser


if __name__ == "__main__":
    sys.exit(main())
