"""The commands of `python -m sppkit`: what each is for, and where it is."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from training.data import project_root

# What each command does, and the module and function
COMMANDS = {
    "check": ("OK or FAIL for every requirement, then the device and the data sets found", "check", "check"),
    "data": ("load a data set, downloading it first if asked, and describe it", "check", "describe"),
    "prune": ("prune a classifier of torchvision on a folder of images, resumable", "prune", "main"),
    "run": ("run experiments, resumable, skipping what is recorded", "driver", "main"),
    "bench": ("training speed: eager, captured, pruning; `bench channels`, `bench speed`: others", "bench", "main"),
    "figures": ("draw the figures whose records changed", "draw", "main"),
    "report": ("print the table of an experiment's records in Markdown", "draw", "report"),
}


def main(arguments: list[str]) -> int:
    """Run one command with its arguments; returns the exit status."""
    overview = argparse.ArgumentParser(prog="sppkit", description=f"python -m sppkit {' | '.join(COMMANDS)}")
    commands = overview.add_subparsers(dest="name", required=True)
    for name, (description, *_) in COMMANDS.items():
        commands.add_parser(name, help=description, add_help=False)
    name = overview.parse_args(arguments[:1]).name
    description, module, function = COMMANDS[name]
    try:
        parser = argparse.ArgumentParser(prog=f"sppkit {name}", description=description)
        parser.add_argument("--root", type=Path, default=project_root(), help="folder of data/runs and figures/")
        parser.add_argument("--data", type=Path, help="folder of the data sets (default: data/ in the root)")
        return getattr(importlib.import_module(module), function)(parser, arguments[1:]) or 0
    except (ValueError, OSError, RuntimeError) as error:
        print(f"sppkit {name}: {error}", file=sys.stderr)
        return 1
