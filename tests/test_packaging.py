"""The files around the library say the same as pyproject.toml, and name no place of one machine."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import sppkit

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch"}  # PyPI's name -> conda-forge's, where they differ
IMPORT_NAMES = {"sklearn": "scikit-learn", "PIL": "pillow", "torch_pruning": "torch-pruning", "yaml": "pyyaml"}
PIP_ONLY = {"torch-pruning"}  # what the race is run against is not among conda-forge's packages
OPTIONAL = {"triton", "onnxscript"}  # the one comes with torch where there is one, the other with an extra
CALENDAR_VERSIONS = {"packaging"}  # a new year is no new interface
TARGETS = {
    "help": "make reproduce",
    "reproduce": "-m sppkit figures",
    "test": "-m pytest",
    "lab": "--ip=127.0.0.1",
    "figures": "-m sppkit figures",
    "notebooks": "run.py --profile quick --in-place",
    "clean": "rm -rf build",
    "distclean": "rm -rf .venv",
}


def requirements() -> dict[str, SpecifierSet]:
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    parsed = [Requirement(line) for line in (*PROJECT["dependencies"], *extras)]
    return {canonicalize_name(each.name): each.specifier for each in parsed}


def tracked() -> list[Path]:
    """Files that are in the repository or about to be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in names.split("\0") if (ROOT / name).is_file()]


def test_every_dependency_is_bounded_below_and_above() -> None:
    for name, specifier in requirements().items():
        operators = {each.operator for each in specifier}
        wanted = {">="} if name in CALENDAR_VERSIONS else {">=", "<"}
        assert operators == wanted, f"{name}{specifier}"


def test_every_import_is_declared() -> None:
    runtime = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    beside = ("notebooks", "notebooks/training", "data/experiments", "figures")  # modules that tests import by name
    own = {"sppkit", "training", "conftest", *(path.stem for folder in beside for path in (ROOT / folder).glob("*.py"))}
    folders = {"sppkit": runtime} | {key: {*requirements()} for key in (*beside, "tests")}
    for folder, declared in folders.items():
        for path in (ROOT / folder).glob("*.py"):
            missing = third_party(path) - own - declared - OPTIONAL
            assert not missing, f"{folder}/{path.name} imports {missing}, which pyproject.toml does not list"


def third_party(path: Path) -> set[str]:
    """Distribution names of the packages that a module imports, the standard library left out."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return {IMPORT_NAMES.get(name, name) for name in names - sys.stdlib_module_names}


def test_environment_yml_lists_what_pyproject_lists() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    lines = [line for line in environment["dependencies"] if isinstance(line, str)]
    conda = {each.name: each.specifier for each in map(Requirement, lines)}
    assert len(conda) == len(lines)
    assert conda.pop("python") == SpecifierSet(PROJECT["requires-python"])
    conda.pop("pip")
    wanted = {name: bounds for name, bounds in requirements().items() if name not in PIP_ONLY}
    assert conda == {CONDA_NAMES.get(name, name): bounds for name, bounds in wanted.items()}
    assert environment["dependencies"][-1] == {"pip": ["-e ."]}


def test_python_versions_agree() -> None:
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in (ROOT / "Makefile").read_text()
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.13"]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(("target", "does"), TARGETS.items())
def test_make_target(target: str, does: str) -> None:
    command = ["make", "-n", target]  # prints, runs nothing
    assert does in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_ci_and_workflow_call_make_test() -> None:
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK)
    assert ci.read_text().splitlines()[-1] == "make test"
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]["test"]["steps"]
    assert "make test" in [step.get("run") for step in steps]


def test_citation_names_both_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert (citation["version"], citation["license"]) == (sppkit.__version__, PROJECT["license"])
    papers = {each["identifiers"][0]["value"]: each for each in citation["references"]}
    assert set(papers) == {"arXiv:1709.06994", "arXiv:1707.06168"}
    for number, paper in papers.items():
        assert paper["url"].endswith(number.removeprefix("arXiv:"))
        assert all({"family-names", "given-names"} <= set(author) for author in paper["authors"])


def test_license_is_the_one_named() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith(f"{PROJECT['license']} License")
    assert PROJECT["authors"][0]["name"] in text


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("data/cifar-10-batches-py/test_batch", True),
        ("data/imagenette2-160/train/a.JPEG", True),
        ("data/runs/convnet.jsonl", False),
        ("data/checkpoints/convnet.safetensors", False),
        ("data/experiments/convnet.json", False),
        ("data/README.md", False),
        ("build/notebooks/00_start_here.ipynb", True),
        (".venv/bin/python", True),
        ("figures/accuracy.png", False),
    ],
)
def test_what_git_ignores(name: str, ignored: bool) -> None:
    tracked()  # skips without git
    answer = subprocess.run(["git", "check-ignore", "-q", "--no-index", name], cwd=ROOT, check=False)
    assert answer.returncode == (0 if ignored else 1)


def test_no_file_names_a_place_of_one_machine() -> None:
    home = re.compile(r"(?<![\w.])/(?:root|home|Users)/\w")
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        name = path.relative_to(ROOT).as_posix()
        found += [f"{name}: {match[0]}" for match in home.finditer(text)]
    assert found == []


def test_the_readme_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shortened, changed = re.subn("interval=2", "interval=1, A=0.9", example)
    assert changed == 1
    exec(shortened, {})
    assert re.fullmatch(r"FLOP ratio 2\.\d\d, loss [\d.]+\n", capsys.readouterr().out)
