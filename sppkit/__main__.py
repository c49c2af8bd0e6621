"""The command line: `python -m sppkit check | data | run | bench | figures | report`."""

import argparse
import importlib
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from sppkit import data
from sppkit.data import project_root

# What each command does, and where: this module, or one that lies in the repository beside what it makes or draws
COMMANDS = {
    "check": ("OK or FAIL for every requirement, then the device and the data sets found", "sppkit.__main__", "check"),
    "data": ("load a data set, downloading it first if asked, and describe it", "sppkit.__main__", "describe"),
    "run": ("run experiments, resumable, skipping what is recorded", "driver", "main"),
    "bench": ("training speed: eager, captured, pruning", "bench", "main"),
    "figures": ("draw the figures whose records changed", "draw", "main"),
    "report": ("print the table of an experiment's records in Markdown", "draw", "report"),
}
BESIDE = ("data/experiments", "figures", "notebooks")


def main(arguments: list[str] | None = None) -> int:
    """Run one command with its arguments; returns the exit status."""
    overview = argparse.ArgumentParser(prog="sppkit", description=__doc__)
    commands = overview.add_subparsers(dest="name", required=True)
    for name, (description, *_) in COMMANDS.items():
        commands.add_parser(name, help=description, add_help=False)
    given = sys.argv[1:] if arguments is None else arguments
    name = overview.parse_args(given[:1]).name
    description, module, function = COMMANDS[name]
    parser = argparse.ArgumentParser(prog=f"sppkit {name}", description=description)
    parser.add_argument("--root", type=Path, default=project_root(), help="folder of data/runs and figures/")
    parser.add_argument("--data", type=Path, help="folder of the data sets (default: data/ in the root)")
    try:
        if "." not in module:
            places = [Path(__file__).parent.parent / folder for folder in BESIDE]
            if not any((place / f"{module}.py").exists() for place in places):
                raise ValueError(f"{module}.py is not beside the package: run this in a checkout of the repository")
            sys.path[:0] = map(str, places)
        return getattr(importlib.import_module(module), function)(parser, given[1:]) or 0
    except (ValueError, OSError, RuntimeError) as error:
        print(f"sppkit {name}: {error}", file=sys.stderr)
        return 1


def check(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """The command `check`."""
    options, failed = parser.parse_args(arguments), 0
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
    folder = options.data or options.root / "data"
    for name, answer in data.available(folder).items():
        print(f"data:   {name:12} {'found' if answer is True else f'not in {folder}'}")
    if failed:
        print(f"\n{failed} failed; `pip install -e '.[notebooks]'` installs what is missing")
    return int(failed > 0)


def describe(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """The command `data`."""
    parser.add_argument("set", help="digits, cifar10, imagenette or a folder of images")
    parser.add_argument("--download", action="store_true", help="fetch it if it is absent")
    options = parser.parse_args(arguments)
    found = data.load(options.set, root=options.data or options.root / "data", download=options.download)
    size, classes = found.image_size, found.classes
    print(f"{found.name}: {len(found.train)} training and {len(found.test)} test images of {size}x{size} pixels")
    print(f"{len(classes)} classes: {', '.join(classes[:12])}{', ...' if len(classes) > 12 else ''}")


if __name__ == "__main__":
    sys.exit(main())
