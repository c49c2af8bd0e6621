"""Whether everything is here that the notebooks need: requirements, device and data sets."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from training import data


def check(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """`python -m sppkit check`."""
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
    for name, problem in problems(folder).items():
        print(f"data:   {name:12} {f'not in {folder}' if problem else 'found'}")
    if failed:
        print(f"\n{failed} failed; `pip install -e '.[notebooks]'` installs what is missing")
    return int(failed > 0)


def problems(folder: Path) -> dict[str, str]:
    """For each named data set what is wrong with it in `folder`, "" if nothing is."""
    found = {"digits": ""}  # comes with scikit-learn
    for name in data.FOLDERS:
        try:
            found[name] = "" if data.find(name, folder).is_dir() else "no folder"
        except (OSError, ValueError) as error:
            found[name] = str(error)
    return found


def describe(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """`python -m sppkit data`."""
    parser.add_argument("set", help="digits, cifar10, imagenette or a folder of images")
    parser.add_argument("--download", action="store_true", help="fetch it if it is absent")
    options = parser.parse_args(arguments)
    found = data.load(options.set, root=options.data or options.root / "data", download=options.download)
    size, classes = len(found.train.images[0]), found.classes
    print(f"{found.name}: {len(found.train)} training and {len(found.test)} test images of {size}x{size} pixels")
    print(f"{len(classes)} classes: {', '.join(classes[:12])}{', ...' if len(classes) > 12 else ''}")
