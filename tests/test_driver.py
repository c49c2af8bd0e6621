"""Experiments and their records: settings in, one line out, nothing twice, nothing lost."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import driver
import pytest
import records
import torch
from driver import Limits, baseline, run, run_all
from settings import Experiment, Places, expand
from settings import lines as lines_of
from training import OutOfTime, networks
from training.data import ImageData, load

from sppkit.compact import compact
from sppkit.cost import flop_ratio

IDENTITY = ("experiment", "network", "dataset", "method", "seed", "baseline_id", "device", "torch", "revision")
RESULTS = ("flop_ratio_target", "flop_ratio", "acc_baseline", "acc_pruned", "acc_final", "steps", "seconds")
REQUIRED = (*IDENTITY, *RESULTS, "settings", "precision")
SMALL = Experiment(
    "small", batch_size=16, baseline_steps=30, baseline_milestones=(20,), interval=1, prune_steps=260, retrain_steps=6,
    retrain_milestones=(4,), images=60, points=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load("digits")


@pytest.fixture(scope="module")
def finished(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A root with one record of each method, made once for this file."""
    places = Places(tmp_path_factory.mktemp("root"), revision="test")
    for method in ("spp", "cp"):
        run(replace(SMALL, method=method), digits, places)
    return places


def lines(places: Places, name: str) -> list[dict]:
    return [json.loads(line) for line in (places.runs / f"{name}.jsonl").read_text().splitlines()]


def test_a_record_says_all_that_it_must(finished: Places) -> None:
    spp, cp = lines(finished, "small")
    for record in (spp, cp, *lines(finished, "baseline")):
        assert not [key for key in REQUIRED if key not in record]
        assert record["revision"] == "test"
        assert Experiment.of(record["settings"]).run_id == record["run_id"]
    assert spp["method"] == "spp"
    assert spp["steps"] == 260 + 6  # the masks stay to the end of the phase
    assert spp["notes"]["updates"] < 260
    assert cp["steps"] == 6
    assert [layer["layer"] for layer in cp["notes"]["layers"]] == ["conv2", "conv3"]


def test_both_methods_start_from_the_seeds_own_baseline(finished: Places, digits: ImageData) -> None:
    (base,) = lines(finished, "baseline")
    network, record = baseline(SMALL, digits, finished)
    assert record == base
    assert driver.network_id(network) == base["baseline_id"]
    assert {record["baseline_id"] for record in lines(finished, "small")} == {base["baseline_id"]}
    assert {record["acc_baseline"] for record in lines(finished, "small")} == {base["acc_final"]}


def test_another_seed_has_another_baseline(finished: Places, digits: ImageData, tmp_path: Path) -> None:
    _, record = baseline(replace(SMALL, seed=1), digits, Places(tmp_path, revision="test"))
    assert record["baseline_id"] != lines(finished, "baseline")[0]["baseline_id"]


def test_the_flop_ratio_is_that_of_a_compact_network(finished: Places) -> None:
    spp, cp = lines(finished, "small")
    example = torch.zeros(1, 3, 32, 32)
    widths = {layer["layer"]: layer["kept"] for layer in cp["notes"]["layers"]}
    network = networks.create("convnet")
    for name, kept in widths.items():
        network.get_submodule(name).weight.data[:, kept:] = 0
    assert cp["flop_ratio"] == pytest.approx(flop_ratio(network, compact(network), example))
    assert 2 <= spp["flop_ratio"] < 3
    assert spp["flop_ratio_whole"] < spp["flop_ratio"]


def test_what_is_recorded_is_not_run_again(
    finished: Places, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "stepwise", lambda *_, **__: pytest.fail("it was run again"))
    before = lines(finished, "small")
    assert [run(replace(SMALL, method=method), digits, finished) for method in ("spp", "cp")] == before
    assert lines(finished, "small") == before


def test_a_stopped_run_ends_like_one_that_was_not(
    finished: Places, digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places, stops, ticks = Places(tmp_path, revision="test"), 0, itertools.count()
    monkeypatch.setattr(driver.time, "monotonic", lambda: float(next(ticks)))  # a tick at each look at the clock
    while True:
        try:
            record = run(SMALL, digits, places, limits=Limits(next(ticks) + 60.0))
            break
        except OutOfTime:
            stops += 1
            assert stops < 20
    assert stops > 1
    whole = lines(finished, "small")[0]
    same = ("acc_pruned", "acc_final", "flop_ratio", "baseline_id", "steps", "notes", "run_id")
    assert {key: record[key] for key in same} == {key: whole[key] for key in same}
    assert not list(places.work.rglob("*.safetensors"))


def test_the_trace_of_seed_0_is_kept(finished: Places) -> None:
    spp = lines(finished, "small")[0]
    trace, layers, interval = records.trace(spp["run_id"], finished.root)
    assert trace.shape == (spp["notes"]["updates"], 75 + 800 + 800)
    assert (layers["conv2"], interval) == (slice(75, 875), 1)
    assert float(trace[0].max()) == pytest.approx(0.05, abs=1 / 510), "the first update raises by A at most"
    planned, pruned = 38 + 400 + 400, sum(spp["notes"]["pruned"].values())
    assert pruned <= (trace[-1] == 1).sum() <= planned  # the FLOP ratio may come first


def test_ranks_and_histories_lie_beside_the_trace(finished: Places) -> None:
    spp = lines(finished, "small")[0]
    trace, layers, _ = records.trace(spp["run_id"], finished.root)
    ranks = records.ranks(spp["run_id"], finished.root)
    assert ranks.shape == trace.shape
    for part in layers.values():
        whole = torch.arange(part.stop - part.start).expand(len(ranks), -1)
        assert torch.equal(ranks[:, part].sort(1).values, whole), "a permutation at each update"
    first = trace[0, layers["conv2"]]
    assert (first[ranks[0, layers["conv2"]].argsort()].diff() <= 0).all(), "the smaller the rank, the larger p"
    history = records.history(spp["run_id"], finished.root)
    assert [int(rows["step"].iloc[-1]) for rows in history.values()] == [260, 6]
    assert list(history) == ["pruning", "retraining"]
    assert "history" not in spp["notes"]


def test_a_baseline_that_was_tampered_with_is_refused(digits: ImageData, tmp_path: Path) -> None:
    places = Places(tmp_path, revision="test")
    network, _ = baseline(SMALL, digits, places)
    (path,) = places.checkpoints.iterdir()
    network.linear.bias.data += 1
    networks.save(network, path)
    with pytest.raises(ValueError, match="is not the network that its record describes"):
        baseline(SMALL, digits, places)


def test_a_baseline_without_its_file_is_trained_anew_and_recorded(digits: ImageData, tmp_path: Path) -> None:
    """As on a GPU, where training does not end in the same weights twice: that of held-out images is not committed."""
    places, short = Places(tmp_path, revision="test"), replace(SMALL, baseline_steps=3, baseline_milestones=())
    _, first = baseline(short, digits, places)
    (path,) = places.checkpoints.iterdir()
    path.unlink()
    recorded = places.runs / "baseline.jsonl"
    recorded.write_text(json.dumps(first | {"baseline_id": "other weights"}) + "\n")
    (made,) = run_all([short.baseline()], places, device=torch.device("cpu"))
    assert path.exists(), "planned by itself it is trained, whatever is recorded"
    assert made["baseline_id"] == first["baseline_id"]
    assert [base["baseline_id"] for base in lines(places, "baseline")] == ["other weights", first["baseline_id"]]
    assert baseline(short, digits, places)[1]["baseline_id"] == first["baseline_id"]
    assert len(lines(places, "baseline")) == 2


def test_a_large_baseline_is_trained_anew_where_it_is_absent(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "LARGE", 1000)
    places, device, trained = Places(tmp_path, revision="test"), torch.device("cpu"), list[int]()
    whole, short = driver.stepwise, replace(SMALL, method="fp", baseline_steps=3, baseline_milestones=())
    monkeypatch.setattr(driver, "load", lambda *_, **__: digits)

    def counted(network, data, settings, **options):  # type: ignore[no-untyped-def]
        trained.append(settings.steps)
        return (yield from whole(network, data, settings, **options))

    monkeypatch.setattr(driver, "stepwise", counted)
    first = list(run_all([replace(short, flop_ratio=r) for r in (2, 3)], places, device=device, jobs=2))
    assert trained.count(3) == 1, "two runs share one"
    assert not places.checkpoints.exists()
    (path,) = (tmp_path / "build" / "baselines").iterdir()
    network, base = baseline(short, digits, places)
    assert {r["baseline_id"] for r in first} == {base["baseline_id"]} == {lines(places, "baseline")[0]["baseline_id"]}
    kept = path.read_bytes()
    path.unlink()  # all that needs it is recorded
    assert len(list(run_all([replace(short, flop_ratio=r) for r in (2, 3)], places, device=device, jobs=2))) == 2
    assert not path.exists()
    network.linear.bias.data += 1  # as another piece of work on a GPU would train another
    networks.save(network, path)
    other = run(replace(short, flop_ratio=4), digits, places)
    assert other["baseline_id"] == driver.network_id(network) != base["baseline_id"]
    bases = lines(places, "baseline")
    assert [b["baseline_id"] for b in bases] == [base["baseline_id"], other["baseline_id"]]
    assert bases[0]["run_id"] == bases[1]["run_id"]
    assert other["acc_baseline"] == bases[1]["acc_final"]
    path.write_bytes(kept)
    assert run(replace(short, flop_ratio=5), digits, places)["baseline_id"] == base["baseline_id"]
    assert len(lines(places, "baseline")) == 2, "a known one is not recorded again"
    path.unlink()
    run(short.baseline(), digits, places)  # asked for by itself, it is trained: its record does not bring it back
    assert path.exists()


def test_a_list_is_a_product_with_seeds_outermost(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    content = {"defaults": {"experiment": "e", "seed": [0, 1]}, "runs": [{"flop_ratio": [4, 2]}, {"method": "cp"}]}
    path.write_text(json.dumps(content))
    found = [(e.seed, e.method, e.flop_ratio) for e in expand(path)]
    assert found == [(s, m, r) for s in (0, 1) for m, r in (("spp", 4), ("spp", 2), ("cp", 2.0))]


def test_the_command_line_shows_every_kind_of_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data" / "runs").mkdir(parents=True)
    common = {"experiment": "e", "baseline_steps": 2, "retrain_steps": 2, "images": 20, "points": 2, "seed": [0, 1]}
    common |= {"baseline_milestones": [], "retrain_milestones": [], "batch_size": 8}
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"defaults": common, "runs": [{"method": "fp"}, {"method": "draws", "layer": "conv3"}]}))
    arguments = [str(path), "--device", "cpu", "--revision", "test", "--seed", "1"]
    parser = driver.argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, default=tmp_path)
    parser.add_argument("--data", type=Path)
    assert driver.main(parser, arguments) == 0
    shown = capsys.readouterr().out
    assert "1/2" in shown
    assert "fp seed 1: FLOP ratio 2.0" in shown
    assert "draws seed 1: conv3, 20 rows" in shown


def test_the_committed_lists_can_be_read() -> None:
    paths = list((Path(__file__).parent.parent / "data" / "experiments").glob("*.json"))
    assert paths
    assert all(expand(path) for path in paths)


def test_run_all_ends_at_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = Places(tmp_path, revision="test")
    assert list(run_all([SMALL], places, device=torch.device("cpu"), minutes=0)) == []
    assert "run the same command again" in capsys.readouterr().out


def test_equal_numbers_have_equal_ids() -> None:
    assert replace(SMALL, flop_ratio=4).run_id == replace(SMALL, flop_ratio=4.0).run_id
    assert replace(SMALL, flop_ratio=4).run_id != replace(SMALL, flop_ratio=2).run_id


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magic"}, "method='magic' must be one of baseline, cp, spp"),
        ({"flop_ratio": 1.0}, r"flop_ratio=1\.0 must be above 1"),
        ({"flop_ratio": float("nan")}, "flop_ratio=nan must be above 1"),
        ({"speed": 3}, "unknown setting 'speed'; an experiment has"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Experiment.of({"experiment": "e", **settings})


def test_too_few_steps_are_an_error_with_the_state_of_each_layer(digits: ImageData, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="5 steps were too few to prune; raise prune_steps"):
        run(replace(SMALL, prune_steps=5), digits, Places(tmp_path, revision="test"))


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    places = Places(tmp_path)
    places.runs.mkdir(parents=True)
    (places.runs / "e.jsonl").write_text('{"run_id": "1"}\n{"run_id": \n')
    with pytest.raises(ValueError, match=r"e\.jsonl, line 2 is not JSON"):
        list(lines_of(places.runs / "e.jsonl"))


def test_a_baseline_of_another_image_size_is_refused(finished: Places) -> None:
    with pytest.raises(ValueError, match="was trained on 32-pixel images, not 16; move it away"):
        baseline(SMALL, load("digits", size=16), finished)


def test_a_run_that_fails_does_not_stop_the_others(
    finished: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = Places(tmp_path, revision="test")
    good, bad, later = SMALL, replace(SMALL, prune_steps=5), replace(SMALL, method="oneshot", columns_of="spp")
    made = run_all([bad, later, good], places, device=torch.device("cpu"), jobs=2)
    assert [next(made)["run_id"] for _ in range(2)] == [good.run_id, later.run_id]  # the source of columns first
    with pytest.raises(RuntimeError, match="5 steps were too few to prune"):
        next(made)
    assert f"{bad.run_id} spp seed 0 failed: 5 steps were too few" in capsys.readouterr().out
    alone, both = finished.find(good), places.find(good)
    assert alone is not None
    assert both is not None
    same = ("acc_baseline", "acc_pruned", "acc_final", "flop_ratio", "baseline_id")
    assert {key: both[key] for key in same} == {key: alone[key] for key in same}  # taking turns changes nothing
    assert places.find(bad) is None


def test_choices_are_made_on_training_images(digits: ImageData, tmp_path: Path) -> None:
    record = run(replace(SMALL, method="oneshot", holdout=200), digits, Places(tmp_path, revision="test"))
    assert record["test_images"] == 200
    held = driver.hold_out(digits, 200)
    assert torch.equal(torch.cat([held.train.images, held.test.images]), digits.train.images)
    assert record["run_id"] != replace(SMALL, method="oneshot").run_id
    with pytest.raises(ValueError, match="holdout=1438 must lie in"):
        driver.hold_out(digits, 1438)


def test_a_setting_that_came_later_leaves_older_ids_alone() -> None:
    assert Experiment("e").run_id == replace(Experiment("e"), kind="column", A=0.05).run_id
    for name, value in {"kind": "block8", "A": 0.1, "form": "literal", "baseline_seed": 3, "rescale": True}.items():
        assert Experiment("e").run_id != replace(Experiment("e"), **{name: value}).run_id
    assert replace(SMALL, seed=4, baseline_seed=1).baseline() == replace(SMALL, seed=1).baseline()


@pytest.mark.parametrize("change", [{"form": "literal"}, {"siblings": 1.0}])
def test_a_run_that_may_never_end_is_cut_and_says_so(
    digits: ImageData, tmp_path: Path, change: dict[str, str | float]
) -> None:
    places = Places(tmp_path, revision="test")
    settings = replace(SMALL, prune_steps=30, A=0.5, **change)
    record = run(settings, digits, places)
    assert 0 < record["notes"]["decided"] < sum(record["notes"]["pruned"].values())
    assert record["flop_ratio"] == pytest.approx(2, rel=0.01)
    with pytest.raises(RuntimeError, match="30 steps were too few to prune"):
        run(replace(settings, form="adaptive", siblings=0.0, A=0.01), digits, places)


def test_the_revision_is_of_the_source_whatever_records_are_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, record = tmp_path / "data" / "experiments" / "driver.py", tmp_path / "data" / "runs" / "mine.jsonl"
    monkeypatch.setattr(driver, "__file__", str(here))
    for path in (here, record):
        path.parent.mkdir(parents=True)
        path.write_text("old\n")
    assert driver.revision() == "unknown"
    git = f"git -C {tmp_path} -c user.name=n -c user.email=e@example.org -c commit.gpgsign=false".split()
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "m"]):
        subprocess.run([*git, *command], check=True)
    clean = driver.revision()
    assert re.fullmatch("[0-9a-f]{12}", clean)
    record.write_text("new\n")
    assert driver.revision() == clean
    here.write_text("new\n")
    assert driver.revision() == f"{clean}-dirty"
