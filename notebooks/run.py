"""Runs the numbered notebooks with papermill, strictly, and no notebook twice.

    python notebooks/run.py                       every notebook, quick profile, copies in build/notebooks
    python notebooks/run.py 02 04 -p seed 3       two of them, with a parameter of one's own
    python notebooks/run.py --profile paper       the papers' settings (hours, wants a GPU)
    python notebooks/run.py --in-place            for maintainers: renew the committed outputs

papermill alone lets much pass: without a cell tagged `parameters` the injected values are overwritten, an
unknown name only warns, a cell may run for ever, and `sys.exit()` ends a notebook early as a success.
Here each of these fails the notebook. The executed copy is kept either way, the other notebooks still run,
and the exit status is 1. A notebook whose code, library, records and parameters are those of its last
good run is not run again.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nbformat

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "sppkit/*.py",
    *(f"notebooks/{name}.py" for name in ("training/*", "choice", "factorise", "records")),
    *(f"notebooks/{name}.py" for name in ("rivals", "sensitivity", "single_layer")),
)
SOURCES = (*SOURCES, "data/runs/*", "data/checkpoints/*", "data/experiments/*.json")
SIZE_LIMIT = 1_000_000  # bytes of a committed notebook
WIDGET = "application/vnd.jupyter.widget-view+json"
HOMES = (r"/home/\w+", r"/Users/\w+", r"/root/\w", r"[A-Z]:\\+Users\\+\w+")
NO_VALUE = object()  # a parameter whose default is not a literal


@dataclass(frozen=True)
class Limits:
    """Seconds: one cell, a whole notebook before it counts as slow, and before it fails (None: no limit)."""

    cell: int
    slow: float | None = None
    total: float | None = None


LIMITS = {"quick": Limits(60, 60, 180), "paper": Limits(3600)}


@dataclass(frozen=True)
class Result:
    notebook: str
    seconds: float
    status: str
    error: str = ""


# --- what a notebook says of itself


def code_cells(notebook: Any) -> list[Any]:
    """The code cells without the one that papermill injects, so that numbers are those of the source."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in code if "injected-parameters" not in cell.metadata.get("tags", [])]


def defaults(cell: Any) -> dict[str, Any]:
    """Names assigned at the top level of the parameters cell, with their values where these are literals."""
    found: dict[str, Any] = {}
    for node in ast.parse(cell.source).body:
        if isinstance(node, ast.Assign):
            targets: list[ast.expr] = node.targets
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets = [node.target]
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Name):
                found[target.id] = NO_VALUE
                with contextlib.suppress(ValueError):
                    found[target.id] = ast.literal_eval(node.value)
    return found


def parameters_cell(notebook: Any) -> Any:
    """The one code cell tagged `parameters`; ValueError if there is none, or more than one."""
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1 or tagged[0].cell_type != "code":
        kinds = ", ".join(cell.cell_type for cell in tagged) or "none"
        raise ValueError(f"exactly one code cell must be tagged `parameters`; tagged are: {kinds}")
    return tagged[0]


def overrides(notebook: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that differ from the notebook's defaults; ValueError for one it does not declare."""
    known = defaults(parameters_cell(notebook))
    for name, value in parameters.items():
        if name not in known:
            raise ValueError(f"parameter {name}={value!r} is not assigned in the parameters cell, which has {[*known]}")
    return {name: value for name, value in parameters.items() if known[name] != value}


def code_hash(notebook: Any) -> str:
    sources = [cell.source for cell in code_cells(notebook)]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:16]


def source_hash(root: Path) -> str:
    """Hash of what the notebooks' outputs follow from: the library and the records, names and bytes."""
    total = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in root.glob(pattern) if path.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return total.hexdigest()[:16]


def verify(path: Path) -> list[str]:
    """What keeps a notebook from being committed: an empty list if it was run in order, whole and clean."""
    text = path.read_text(encoding="utf-8")
    return problems(nbformat.reads(text, as_version=4), text, root=ROOT)


def problems(notebook: Any, text: str, *, root: Path) -> list[str]:
    """`verify` for a notebook that is not yet written, `text` being the bytes to come."""
    found = []
    try:
        parameters_cell(notebook)
    except ValueError as error:
        found.append(str(error))
    if notebook.metadata.get("kernelspec", {}).get("language") != "python":
        found.append("metadata.kernelspec.language is not 'python'")
    if notebook.metadata.get("sppkit", {}).get("code_hash") != code_hash(notebook):
        found.append("its code cells changed since it was run: make notebooks")
    if len(text.encode()) >= SIZE_LIMIT:
        found.append(f"{len(text.encode()):,} bytes, not below {SIZE_LIMIT:,}: draw fewer or smaller figures")
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(counts) + 1)):
        found.append(f"execution counts are {counts}, not 1 to {len(counts)}: make notebooks")
    if len(code_cells(notebook)) < len([cell for cell in notebook.cells if cell.cell_type == "code"]):
        found.append("it holds a cell injected by papermill")
    for number, cell in enumerate(code_cells(notebook), 1):
        found += [f"cell {number} {problem}" for problem in output_problems(cell.outputs, root=root)]
    return found


def output_problems(outputs: Sequence[Any], *, root: Path) -> Iterator[str]:
    """An error, a warning, or a folder of the machine it was run on."""
    own = [rf"{re.escape(str(place))}(?![\w-])" for place in (root, Path.home()) if len(place.parts) > 1]
    machine = re.compile(rf"(?<![\w.])(?:{'|'.join([*own, *HOMES])})")
    for output in outputs:
        if output.output_type == "error":
            yield f"holds an error: {output.ename}: {output.evalue}"
        if output.get("name") == "stderr" and "Warning" in output.text:
            yield f"holds a warning: {output.text.strip()[:200]}"
        if path := machine.search(_shown(output)):
            yield f"shows a path of this machine: {path[0]}"


def _shown(output: Any) -> str:
    """An output's text, without the bytes of pictures."""
    data = output.get("data", {})
    shown = [content for kind, content in data.items() if not re.match(r"image/(?!svg)", kind)]
    return "\n".join([output.get("text", ""), *(each if isinstance(each, str) else json.dumps(each) for each in shown)])


# --- one notebook


def execute(source: Path, copy: Path, values: Mapping[str, Any], *, limits: Limits, root: Path) -> str:
    """Runs `source` into `copy` with `values` injected. Returns what went wrong, with the cell, or ""."""
    import papermill
    from nbclient.output_widget import OutputWidget

    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # failures are reported here, once
    begin = time.monotonic()

    def seconds_left(_: Any) -> float:
        left = limits.total - (time.monotonic() - begin) if limits.total else limits.cell
        return max(1.0, min(limits.cell, left))

    places = [str(path).replace("{", "{{").replace("}", "}}") for path in (source, copy)]  # papermill formats
    try:
        # what a slider shows goes back to the kernel by the socket on which the cell's reply is awaited: sent at a bad
        # moment, zmq overlooks the reply until the time limit. No notebook reads it there
        with kernel_environment(), patch.object(OutputWidget, "send", lambda *_, **__: None):
            papermill.execute_notebook(
                *places,
                parameters=dict(values),
                kernel_name="python3",
                progress_bar=False,
                cwd=str(source.parent),  # as in Jupyter: records.py and others are found there
                extra_arguments=["--log-level=CRITICAL"],  # of the kernel: it warns about local sockets
                timeout_func=seconds_left,
            )
    except papermill.PapermillExecutionError as error:
        problem = f"{error.ename}: {error.evalue[:2000]}"
    except TimeoutError:
        over = limits.total is not None and time.monotonic() - begin > limits.total
        limit = f"{limits.total:g} s a notebook" if over else f"{limits.cell} s a cell"
        problem = f"time limit: more than {limit}"
    except Exception as error:  # a dead kernel, no kernel, a full disk: whatever it is, it is this notebook's
        problem = f"{type(error).__name__}: {error}"
    else:
        missed = [n for n, cell in _numbered(copy) if cell.source.strip() and cell.execution_count is None]
        return f"cell {missed[0]} was never run (an exit in a cell before?)" if missed else ""
    started = [n for n, cell in _numbered(copy) if cell.metadata.get("papermill", {}).get("start_time")]
    return f"cell {started[-1]}: {problem}" if started else f"before the first cell: {problem}"


def _numbered(copy: Path) -> list[tuple[int, Any]]:
    if not copy.exists():
        return []
    return list(enumerate(code_cells(nbformat.read(copy, as_version=4)), 1))


@contextlib.contextmanager
def kernel_environment() -> Iterator[None]:
    """This environment's own kernel, not one of the user's folder, and all its threads."""
    before = dict(os.environ)
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run(source: Path, *, parameters: Mapping[str, Any], out: Path, limits: Limits, force: bool, root: Path) -> Result:
    """Runs one notebook into `out`, unless its last good run there had the same key."""
    copy, record = out / source.name, out / f"{source.stem}.json"
    try:
        notebook = nbformat.read(source, as_version=4)
        values = overrides(notebook, parameters)
    except (ValueError, SyntaxError) as error:  # nbformat's NotJSONError is a ValueError
        return Result(source.stem, 0.0, "FAILED", f"not run: {error}")
    parts = [code_hash(notebook), source_hash(root), dict(parameters), version("torch")]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()
    if not force and copy.exists() and record.exists():
        last = json.loads(record.read_text())
        if last["key"] == key and last["ok"]:
            return Result(source.stem, last["seconds"], "ok (unchanged)")
    out.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    copy.unlink(missing_ok=True)
    begin = time.monotonic()
    problem = execute(source, copy, values, limits=limits, root=root)
    seconds = round(time.monotonic() - begin, 1)
    if not problem and limits.total and seconds > limits.total:
        problem = f"time limit: {seconds:g} s, more than {limits.total:g} s a notebook"
    if problem and copy.exists():
        problem += f"\n  executed copy: {copy}"
    write(record, json.dumps({"key": key, "seconds": seconds, "ok": not problem}) + "\n")
    slow = limits.slow is not None and seconds > limits.slow
    return Result(source.stem, seconds, "FAILED" if problem else "ok (slow)" if slow else "ok", problem)


def cleaned(notebook: Any, *, profile: str, source: str, seconds: float) -> Any:
    """An executed notebook as it is committed: outputs, without timings, widgets and papermill's notes."""
    for cell in notebook.cells:
        for name in ("papermill", "execution", "ExecuteTime"):
            cell.metadata.pop(name, None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "sppkit": {"profile": profile, "code_hash": code_hash(notebook), "source_hash": source, "seconds": seconds},
        }
    )
    return notebook


def renew(source: Path, *, profile: str, out: Path, limits: Limits, force: bool, root: Path) -> Result:
    """Executes one notebook in place if its code, the library or the records changed since it was run."""
    try:
        before = source.read_bytes()
        notebook = nbformat.reads(before.decode(), as_version=4)
        if overrides(notebook, {"profile": profile}):
            raise ValueError(f"--in-place needs profile={profile!r} to be the notebook's own default")
    except (ValueError, SyntaxError) as error:
        return Result(source.stem, 0.0, "FAILED", f"not run: {error}")
    stored, now = notebook.metadata.get("sppkit", {}), source_hash(root)
    wanted = {"profile": profile, "code_hash": code_hash(notebook), "source_hash": now}
    if not force and wanted.items() <= stored.items():
        return Result(source.stem, stored.get("seconds", 0.0), "ok (unchanged)")
    result = run(source, parameters={"profile": profile}, out=out, limits=limits, force=force, root=root)
    if result.error:
        return result
    copy = nbformat.read(out / source.name, as_version=4)  # its prose may be older: only results are taken
    for cell, done in zip(code_cells(notebook), code_cells(copy), strict=True):
        cell.outputs, cell.execution_count = done.outputs, done.execution_count
    notebook = cleaned(notebook, profile=profile, source=now, seconds=result.seconds)
    text = nbformat.writes(notebook) + "\n"
    found = problems(notebook, text, root=root)
    if source.read_bytes() != before:
        found.append("it was edited while it ran; run it again")
    if found:
        return Result(source.stem, result.seconds, "FAILED", f"not written: {'; '.join(found)}")
    write(source, text)
    return Result(source.stem, result.seconds, "ok (slow)" if "slow" in result.status else "ok (written)")


def write(path: Path, text: str) -> None:
    """The old file or the new one, never half of either."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, path.stat().st_mode if path.exists() else 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


# --- all of them


def find(folder: Path, numbers: Sequence[str]) -> list[Path]:
    """The notebooks NN_*.ipynb of `folder`, all or those with the given numbers."""
    paths = sorted(path for path in folder.glob("*.ipynb") if re.match(r"\d\d_", path.name))
    have = [path.name[:2] for path in paths]
    if len(set(have)) < len(have) or not have:
        raise ValueError(f"{folder} must hold notebooks NN_*.ipynb, each number once; it holds {have}")
    for number in numbers:
        if number not in have:
            raise ValueError(f"no notebook {number!r}; there are {', '.join(have)}")
    return [path for path in paths if not numbers or path.name[:2] in numbers]


def table(results: Sequence[Result]) -> str:
    width = max(len("notebook"), *(len(result.notebook) for result in results))
    rows = [f"{'notebook':<{width}}  seconds  result"]
    return "\n".join(rows + [f"{row.notebook:<{width}}  {row.seconds:7.1f}  {row.status}" for row in results])


def literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("numbers", nargs="*", metavar="NN", help="two digits each; none: every notebook")
    parser.add_argument("--profile", choices=sorted(LIMITS), default="quick")
    parser.add_argument("--out", type=Path, help="executed copies (build/notebooks, paper: build/notebooks-paper)")
    parser.add_argument("--in-place", action="store_true", help="write outputs back into changed notebooks")
    parser.add_argument("--force", action="store_true", help="run what is unchanged too")
    parser.add_argument("--cell-timeout", type=int, metavar="SECONDS", help="60 (quick), 3600 (paper)")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="pairs")
    given = parser.parse_args(argv)
    if given.in_place and given.pairs:
        parser.error("--in-place takes no -p: a committed notebook shows its own defaults")
    if given.cell_timeout is not None and given.cell_timeout < 1:
        parser.error(f"--cell-timeout {given.cell_timeout} must be at least 1 second")
    return given


def main(argv: Sequence[str] | None = None, *, root: Path = ROOT) -> int:
    given = arguments(argv)
    limits = LIMITS[given.profile]
    limits = Limits(given.cell_timeout or limits.cell, limits.slow, limits.total)
    out = (given.out or root / "build" / ("notebooks" if given.profile == "quick" else "notebooks-paper")).resolve()
    parameters = {"profile": given.profile, **{name: literal(value) for name, value in given.pairs}}
    try:
        sources = find(root / "notebooks", given.numbers)
    except ValueError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    results = []
    for source in sources:
        print(f"{source.stem} ...", flush=True)
        common: dict[str, Any] = {"out": out, "limits": limits, "force": given.force, "root": root}
        if given.in_place:
            result = renew(source, profile=given.profile, **common)
        else:
            result = run(source, parameters=parameters, **common)
        results.append(result)
        if result.error:
            print(f"{source.name} FAILED, {result.error}", flush=True)
    print(f"\n{table(results)}\n\nWhere to look next: {out} (executed copies), figures/, README.md")
    return int(any(result.error for result in results))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("run.py: interrupted; finished notebooks are kept")
