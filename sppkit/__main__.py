"""The command line, `python -m sppkit`; its commands lie in the repository, beside what they check, make or draw."""

import importlib
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one of the commands (notebooks/commands.py) with its arguments; returns the exit status."""
    places = [Path(__file__).parent.parent / folder for folder in ("data/experiments", "figures", "notebooks")]
    if not (places[-1] / "commands.py").exists():
        print("sppkit: commands.py is not there: run this in a checkout of the repository", file=sys.stderr)
        return 1
    sys.path[:0] = map(str, places)
    return int(importlib.import_module("commands").main(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
