"""The command line: `python -m sppkit check | data | run | bench | figures | report`."""

import argparse
import importlib
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from sppkit import data, records

# Commands that lie in the repository beside what they make or draw: folder, module, function, what they do
BESIDE = {
    "run": ("data/experiments", "driver", "main", "run experiments, resumable, skipping what is recorded"),
    "bench": ("data/experiments", "bench", "main", "training speed: eager, captured, pruning"),
    "figures": ("figures", "draw", "main", "draw the figures whose records changed"),
    "report": ("figures", "draw", "report", "print the table of an experiment's records in Markdown"),
}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run one command; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if given and given[0] in BESIDE:
            return beside(given[0], given[1:])
        options = _parser().parse_args(given)
        return options.command(options) or 0
    except (ValueError, OSError, RuntimeError) as error:
        print(f"sppkit {given[0]}: {error}", file=sys.stderr)
        return 1


def beside(name: str, arguments: list[str]) -> int:
    """Run a command of `BESIDE`; ValueError where there is no checkout of the repository."""
    folder, module, function, description = BESIDE[name]
    place = Path(__file__).parent.parent / folder
    if not (place / f"{module}.py").exists():
        raise ValueError(f"{folder}/{module}.py is not here: run this in a checkout of the repository")
    sys.path.insert(0, str(place))
    parser = argparse.ArgumentParser(prog=f"sppkit {name}", description=description)
    _places(parser)
    return getattr(importlib.import_module(module), function)(parser, arguments) or 0


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
    folder = options.data or options.root / "data"
    for name, answer in data.available(folder).items():
        print(f"data:   {name:12} {'found' if answer is True else f'not in {folder}'}")
    if failed:
        print(f"\n{failed} failed; `pip install -e '.[notebooks]'` installs what is missing")
    return int(failed > 0)


def data_command(options: argparse.Namespace) -> None:
    """Load a data set, downloading it first if asked, and describe it."""
    found = data.load(options.set, root=options.data or options.root / "data", download=options.download)
    size, classes = found.image_size, found.classes
    print(f"{found.name}: {len(found.train)} training and {len(found.test)} test images of {size}x{size} pixels")
    print(f"{len(classes)} classes: {', '.join(classes[:12])}{', ...' if len(classes) > 12 else ''}")


def _places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, default=records.project_root(), help="folder of data/runs and figures/")
    parser.add_argument("--data", type=Path, help="folder of the data sets (default: data/ in the root)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sppkit", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, function in (("check", check), ("data", data_command)):
        sub = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(command=function)
        _places(sub)
    sub.add_argument("set", help="digits, cifar10, imagenette or a folder of images")
    sub.add_argument("--download", action="store_true", help="fetch it if it is absent")
    for name, (*_, description) in BESIDE.items():
        commands.add_parser(name, help=description)
    return parser


if __name__ == "__main__":
    sys.exit(main())
