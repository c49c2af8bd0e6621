"""The commands of `python -m sppkit`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sppkit.__main__ import main

SETTINGS = "experiment=tiny batch_size=16 baseline_steps=8 baseline_milestones=(6,) images=30 method=cp retrain_steps=4"
TINY = [*SETTINGS.split(), "retrain_milestones=(2,)", "--revision", "test"]


@pytest.mark.parametrize("command", ["check", "data", "run", "bench", "figures", "report"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert len(capsys.readouterr().out) > 200


def test_away_from_a_checkout_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sppkit.__main__.__file__", str(tmp_path / "sppkit" / "__main__.py"))
    assert main(["check"]) == 1
    assert "run this in a checkout of the repository" in capsys.readouterr().err


def test_check_finds_this_environment_good(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["check", "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "OK    torch " in out
    assert "FAIL" not in out
    assert "data:   digits       found" in out
    assert "data:   cifar10      not in" in out


def test_check_fails_for_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("check.requires", lambda _: ["torch>=99", "no-such-package>=1", "numpy>=2"])
    assert main(["check", "--root", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line[:4] for line in lines[1:4]] == ["FAIL", "FAIL", "OK  "]
    assert "2 failed" in lines[-1]


def test_run_records_and_skips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "--root", str(tmp_path), *TINY]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert "1/1" in first
    assert main(command) == 0
    assert capsys.readouterr().out == first
    records = (tmp_path / "data" / "runs" / "tiny.jsonl").read_text().splitlines()
    assert len(records) == 1
    assert json.loads(records[0])["settings"]["batch_size"] == 16
    assert main(["report", "tiny", "--root", str(tmp_path)]) == 0
    assert "CP, channels" in capsys.readouterr().out


def test_run_stops_at_the_limit_with_a_status_of_its_own(tmp_path: Path) -> None:
    assert main(["run", "--root", str(tmp_path), *TINY, "--minutes", "0"]) == 75


def test_a_list_and_settings_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "list.json", "seed=3", "--root", str(tmp_path)]) == 1
    assert "give lists or settings, not both (found seed=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "cifar10"], "cifar-10-batches-py"),
        (["data", "no-such-folder"], "no-such-folder"),
        (["run", "seed=0", "--device", "tpu"], "tpu"),
        (["run", "flop_ratio=0.5"], "flop_ratio=0.5 must be above 1"),
        (["run", "network=lenet"], "network 'lenet' is not known"),
        (["report", "nothing"], "no records of 'nothing'"),
    ],
)
def test_bad_input_is_one_line_on_stderr(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--root", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"sppkit {arguments[0]}: ")
    assert message in error


def test_bench_prints_the_eager_step_where_there_is_no_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("bench.NETWORKS", ("convnet",))
    command = ["bench", "--dataset", "digits", "--device", "cpu", "--batch-size", "8", "--steps", "2"]
    assert main([*command, "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "eager" in out
    assert "no GPU: only the eager step" in out


def test_it_runs_as_a_module_and_does_not_wait_for_torchvision() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "sppkit", "data", "digits"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "digits: 1438 training and 359 test images of 32x32 pixels" in done.stdout
    assert "training.data" in done.stderr
    assert "torchvision" not in done.stderr  # seven seconds
