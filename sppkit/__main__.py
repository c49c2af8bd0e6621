"""The command line: `python -m sppkit check | data | prune | run | bench | figures | report`."""

import argparse
import importlib
import sys
from pathlib import Path

# What each command does, and the module and function, in the repository beside what it checks, makes or draws
COMMANDS = {
    "check": ("OK or FAIL for every requirement, then the device and the data sets found", "check", "check"),
    "data": ("load a data set, downloading it first if asked, and describe it", "check", "describe"),
    "prune": ("prune a classifier of torchvision on a folder of images, resumable", "prune", "main"),
    "run": ("run experiments, resumable, skipping what is recorded", "driver", "main"),
    "bench": ("training speed: eager, captured, pruning; `bench channels`, `bench speed`: others", "bench", "main"),
    "figures": ("draw the figures whose records changed", "draw", "main"),
    "report": ("print the table of an experiment's records in Markdown", "draw", "report"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command with its arguments; returns the exit status."""
    overview = argparse.ArgumentParser(prog="sppkit", description=__doc__)
    commands = overview.add_subparsers(dest="name", required=True)
    for name, (description, *_) in COMMANDS.items():
        commands.add_parser(name, help=description, add_help=False)
    given = sys.argv[1:] if arguments is None else arguments
    name = overview.parse_args(given[:1]).name
    description, module, function = COMMANDS[name]
    try:
        places = [Path(__file__).parent.parent / folder for folder in ("data/experiments", "figures", "notebooks")]
        if not any((place / f"{module}.py").exists() for place in places):
            raise ValueError(f"{module}.py is not beside the package: run this in a checkout of the repository")
        sys.path[:0] = map(str, places)
        root = importlib.import_module("training.data").project_root()
        parser = argparse.ArgumentParser(prog=f"sppkit {name}", description=description)
        parser.add_argument("--root", type=Path, default=root, help="folder of data/runs and figures/")
        parser.add_argument("--data", type=Path, help="folder of the data sets (default: data/ in the root)")
        return getattr(importlib.import_module(module), function)(parser, given[1:]) or 0
    except (ValueError, OSError, RuntimeError) as error:
        print(f"sppkit {name}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
