"""The notebook runner's strict rules, each broken by a tiny notebook, and the committed notebooks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from unittest import mock

import nbformat
import pytest
import run  # notebooks/run.py
from nbclient.output_widget import OutputWidget
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = 'profile = "quick"\nn = 1'
COMMITTED = sorted((ROOT / "notebooks").glob("*.ipynb"))


def make(*sources: str, tags: tuple[str, ...] = ("parameters",)) -> nbformat.NotebookNode:
    """A notebook with one markdown cell and then `sources`, the first of them tagged."""
    cells = [new_markdown_cell("# Title"), *(new_code_cell(source) for source in sources)]
    cells[1].metadata["tags"] = list(tags)
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": spec})


def add(house: Path, name: str, notebook: nbformat.NotebookNode) -> Path:
    path = house / "notebooks" / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def house(tmp_root: Path) -> Path:
    for folder in ("notebooks", "sppkit", "data/runs"):
        (tmp_root / folder).mkdir(parents=True)
    (tmp_root / "sppkit" / "lasso.py").write_text("a = 1\n")
    return tmp_root


def executed(house: Path, name: str) -> nbformat.NotebookNode:
    return nbformat.read(house / "build" / "notebooks" / f"{name}.ipynb", as_version=4)


# --- before a kernel starts


@pytest.mark.parametrize(
    ("notebook", "message"),
    [
        (make(PARAMETERS, tags=()), "exactly one code cell must be tagged `parameters`; tagged are: none"),
        (make(PARAMETERS, tags=("Parameters",)), "tagged are: none"),
        (make("seed = 0"), "parameter profile='quick' is not assigned in the parameters cell, which has ['seed']"),
        (make("def profile():\n    n = 1"), "which has []"),
        (make("profile = ("), "never closed"),
    ],
)
def test_refused_before_it_runs(
    house: Path, capsys: pytest.CaptureFixture[str], notebook: nbformat.NotebookNode, message: str
) -> None:
    add(house, "00_bad", notebook)
    assert run.main([], root=house) == 1
    shown = capsys.readouterr().out
    assert "00_bad.ipynb FAILED, not run: " in shown
    assert message in shown
    assert not (house / "build").exists()


def test_two_tagged_cells_and_a_tagged_text_are_refused() -> None:
    two = make(PARAMETERS, "n = 2")
    two.cells[2].metadata["tags"] = ["parameters"]
    with pytest.raises(ValueError, match="tagged are: code, code"):
        run.parameters_cell(two)
    text = make(PARAMETERS, tags=())
    text.cells[0].metadata["tags"] = ["parameters"]
    with pytest.raises(ValueError, match="tagged are: markdown"):
        run.parameters_cell(text)


def test_unknown_parameter_of_the_command_line(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(house, "00_good", make(PARAMETERS))
    assert run.main(["00", "-p", "m", "3"], root=house) == 1
    assert "parameter m=3 is not assigned" in capsys.readouterr().out


def test_not_a_notebook(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (house / "notebooks" / "00_cut.ipynb").write_text('{"cells": [')
    assert run.main([], root=house) == 1
    assert "00_cut.ipynb FAILED, not run: " in capsys.readouterr().out


def test_only_what_differs_from_the_defaults_is_injected() -> None:
    notebook = make("profile: str = 'quick'\nn = 1\nwidths = list(range(3))")
    given = {"profile": "quick", "n": 2, "widths": [0, 1, 2]}
    assert run.overrides(notebook, given) == {"n": 2, "widths": [0, 1, 2]}  # a default that is no literal


def test_numbers(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([], root=house) == 2
    assert "it holds []" in capsys.readouterr().err
    add(house, "01_one", make(PARAMETERS))
    add(house, "scratch", make(PARAMETERS))
    assert [path.stem for path in run.find(house / "notebooks", [])] == ["01_one"]
    assert run.main(["7"], root=house) == 2
    assert "no notebook '7'; there are 01" in capsys.readouterr().err
    add(house, "01_two", make(PARAMETERS))
    with pytest.raises(ValueError, match="each number once"):
        run.find(house / "notebooks", [])


@pytest.mark.parametrize("arguments", [["--in-place", "-p", "n", "2"], ["--cell-timeout", "0"], ["--profile", "x"]])
def test_command_line_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments)
    assert "error:" in capsys.readouterr().err


# --- with a kernel


def test_failures_name_the_cell_keep_the_copy_and_stop_nothing_else(
    house: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(house, "00_error", make(PARAMETERS, "print('so far')", "{}['key']", "print('never')"))
    add(house, "01_endless", make(PARAMETERS, "import time\ntime.sleep(600)"))
    add(house, "02_dead", make(PARAMETERS, "import os\nos._exit(9)"))
    add(house, "03_exit", make(PARAMETERS, "import sys\nsys.exit()", "assert False"))
    add(house, "04_good", make(PARAMETERS, "print(n + 1)"))
    assert run.main(["--cell-timeout", "2", "-p", "n", "2"], root=house) == 1
    shown = capsys.readouterr().out
    # cells count as in the source: the injected one is not among them
    assert "00_error.ipynb FAILED, cell 3: KeyError: 'key'" in shown
    assert "01_endless.ipynb FAILED, cell 2: time limit: more than 2 s a cell" in shown
    assert "02_dead.ipynb FAILED, cell 2: DeadKernelError" in shown
    assert "03_exit.ipynb FAILED, cell 3 was never run" in shown
    assert re.search(r"04_good +\d+\.\d  ok\n", shown)
    for name in ("00_error", "01_endless", "02_dead", "03_exit"):
        assert f"executed copy: {house / 'build' / 'notebooks' / name}.ipynb" in shown
        assert not json.loads((house / "build" / "notebooks" / f"{name}.json").read_text())["ok"]
    assert "so far" in str(executed(house, "00_error").cells)
    assert executed(house, "04_good").cells[-1].outputs[0].text == "3\n"  # the parameter arrived


def test_limit_of_a_whole_notebook(house: Path) -> None:
    source = add(house, "00_long", make(PARAMETERS, *["import time\ntime.sleep(1.6)"] * 3))
    result = run.run(
        source, parameters={}, out=house / "out", limits=run.Limits(cell=60, slow=1, total=2.5), force=False, root=house
    )
    assert result.status == "FAILED"
    assert "more than 2.5 s a notebook" in result.error


def test_unchanged_is_not_run_again_and_every_change_is(
    house: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []

    def execute(source: Path, copy: Path, values: dict[str, object], **_: object) -> str:
        runs.append(values)
        copy.write_bytes(source.read_bytes())
        return ""

    monkeypatch.setattr(run, "execute", execute)
    add(house, "00_good", make(PARAMETERS))

    def runs_of(*arguments: str) -> int:
        before = len(runs)
        assert run.main(arguments, root=house) == 0
        return len(runs) - before

    assert runs_of() == 1
    assert runs_of() == 0
    assert "ok (unchanged)" in capsys.readouterr().out
    notebook = make(PARAMETERS)
    notebook.cells[0].source = "# Another title"
    add(house, "00_good", notebook)
    assert runs_of() == 0  # prose alone changes nothing
    add(house, "00_good", make(PARAMETERS, "print(1)"))
    assert runs_of() == 1
    (house / "sppkit" / "lasso.py").write_text("a = 2\n")
    assert runs_of() == 1
    (house / "data" / "runs" / "a.jsonl").write_text("{}\n")
    assert runs_of() == 1
    assert runs_of("-p", "n", "2") == 1
    assert runs[-1] == {"n": 2}
    assert runs_of("-p", "n", "2") == 0
    assert runs_of("-p", "n", "2", "--force") == 1
    (house / "build" / "notebooks" / "00_good.ipynb").unlink()
    assert runs_of("-p", "n", "2") == 1


def test_what_a_slider_shows_does_not_go_back_to_the_kernel(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket is the one on which the cell's reply is awaited."""
    sent: list[int] = []
    monkeypatch.setattr(OutputWidget, "send", lambda *_, **__: sent.append(1))
    slider = "from ipywidgets import interact\n_ = interact(lambda width: print(width), width=(1, 9))"
    add(house, "00_good", make(PARAMETERS, slider))
    assert run.main([], root=house) == 0
    assert sent == []
    with monkeypatch.context() as change:
        change.setattr(run, "patch", mock.MagicMock())  # nothing is held back
        assert run.main(["--force"], root=house) == 0
    assert sent != []


# --- in place


def test_in_place_writes_a_clean_notebook_once(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show = f"display({{{run.WIDGET!r}: {{}}, 'text/plain': 'w'}}, raw=True)"
    widget = f"from IPython.display import display\n{show}"
    path = add(house, "00_good", make(PARAMETERS, "print(n)", widget))
    assert run.main(["--in-place"], root=house) == 0
    written = nbformat.read(path, as_version=4)
    assert run.verify(path) == []
    assert [cell.get("execution_count") for cell in written.cells] == [None, 1, 2, 3]
    assert [cell.metadata for cell in written.cells] == [{}, {"tags": ["parameters"]}, {}, {}]
    assert written.cells[2].outputs[0].text == "1\n"
    assert written.cells[3].outputs == []
    assert set(written.metadata) == {"kernelspec", "language_info", "sppkit"}
    assert written.metadata.sppkit.profile == "quick"
    before = path.read_bytes()
    assert run.main(["--in-place"], root=house) == 0
    assert "ok (unchanged)" in capsys.readouterr().out
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import os\nprint(os.getcwd())", "cell 2 shows a path of this machine: "),
        ("print('x' * 1_000_000)", "bytes, not below 1,000,000"),
        ("import warnings\nwarnings.warn('old name', stacklevel=1)", "cell 2 holds a warning: "),
    ],
)
def test_in_place_refuses(house: Path, capsys: pytest.CaptureFixture[str], source: str, message: str) -> None:
    path = add(house, "00_bad", make(PARAMETERS, source))
    before = path.read_bytes()
    assert run.main(["--in-place"], root=house) == 1
    shown = capsys.readouterr().out
    assert "00_bad.ipynb FAILED, not written: " in shown
    assert message in shown
    assert path.read_bytes() == before


def test_in_place_refuses_a_profile_that_would_be_injected(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(house, "00_good", make(PARAMETERS))
    assert run.main(["--in-place", "--profile", "paper"], root=house) == 1
    assert "--in-place needs profile='paper' to be the notebook's own default" in capsys.readouterr().out


def test_in_place_takes_results_from_an_earlier_run_and_keeps_newer_prose(
    house: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = make(PARAMETERS, "print(n)")
    path = add(house, "00_good", notebook)
    assert run.main([], root=house) == 0
    notebook.cells[0].source = "# A better title"
    nbformat.write(notebook, path)
    monkeypatch.setattr(run, "execute", lambda *_, **__: pytest.fail("ran twice"))
    assert run.main(["--in-place"], root=house) == 0
    written = nbformat.read(path, as_version=4)
    assert written.cells[0].source == "# A better title"
    assert written.cells[2].outputs[0].text == "1\n"
    assert run.verify(path) == []


def test_in_place_does_not_overwrite_an_edit(
    house: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = add(house, "00_good", make(PARAMETERS))

    def execute(source: Path, copy: Path, *_: object, **__: object) -> str:
        copy.write_bytes(source.read_bytes())
        nbformat.write(make(PARAMETERS, "print('edited')"), source)
        return ""

    monkeypatch.setattr(run, "execute", execute)
    assert run.main(["--in-place"], root=house) == 1
    assert "it was edited while it ran" in capsys.readouterr().out
    assert "edited" in path.read_text()


def test_a_failed_write_leaves_the_old_file(tmp_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_root / "a.json"
    run.write(path, "old")

    def replace(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(run.os, "replace", replace)
    with pytest.raises(OSError, match="disk full"):
        run.write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_root.iterdir()) == [path]


# --- committed notebooks


def clean() -> nbformat.NotebookNode:
    notebook = make(PARAMETERS, "print(n)")
    for count, cell in enumerate(notebook.cells[1:], 1):
        cell.execution_count = count
    notebook.metadata["sppkit"] = {"code_hash": run.code_hash(notebook)}
    return notebook


def test_verify_sees_every_fault(tmp_root: Path) -> None:
    def problems(notebook: nbformat.NotebookNode) -> list[str]:
        nbformat.write(notebook, tmp_root / "a.ipynb")
        return run.verify(tmp_root / "a.ipynb")

    assert problems(clean()) == []
    faulty = clean()
    faulty.cells[1].metadata["tags"] = []
    assert "tagged `parameters`" in problems(faulty)[0]
    faulty = clean()
    del faulty.metadata["kernelspec"]["language"]
    assert problems(faulty) == ["metadata.kernelspec.language is not 'python'"]
    faulty = clean()
    faulty.cells[2].source = "print(n + 1)"
    assert problems(faulty) == ["its code cells changed since it was run: make notebooks"]
    for counts in ((2, 1), (1, 3), (1, None)):
        faulty = clean()
        for cell, count in zip(faulty.cells[1:], counts, strict=True):
            cell.execution_count = count
        assert "execution counts are" in problems(faulty)[0]
    faulty = clean()
    faulty.cells[2].outputs = [new_output("error", ename="ValueError", evalue="no", traceback=[])]
    assert problems(faulty) == ["cell 2 holds an error: ValueError: no"]
    faulty.cells[2].outputs = [new_output("stream", name="stderr", text="UserWarning: old")]
    assert problems(faulty) == ["cell 2 holds a warning: UserWarning: old"]
    faulty.cells[2].outputs = [new_output("display_data", data={"text/plain": "/" + "home/ada/x.png"})]
    assert problems(faulty) == ["cell 2 shows a path of this machine: /" + "home/ada"]
    faulty.cells[2].outputs = [new_output("display_data", data={"image/png": "x" * 1_000_000})]
    assert "not below 1,000,000" in problems(faulty)[0]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_notebook(path: Path) -> None:
    assert run.verify(path) == []
