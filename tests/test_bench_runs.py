"""Networks made again from records: what the run recorded of its own is what they have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_runs
import pytest
import records as recorded
import torch
from channels import depgraph
from settings import lines
from training import networks
from training.data import project_root

from sppkit import cost
from sppkit.__main__ import main

RUNS = project_root() / "data" / "runs"


def records(name: str, **wanted: Any) -> list[dict[str, Any]]:
    found = lines(RUNS / f"{name}.jsonl")
    return [r for r in found if all({**r["settings"], **r}[key] == value for key, value in wanted.items())]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("s1-light-decay", {"method": "spp"}),
        ("s2-resnet56", {"method": "spp"}),
        ("s2-resnet56", {"kind": "filter"}),
        ("c5-resnet56", {"method": "cp", "samplers": True}),
        ("c5-resnet56", {"method": "fp"}),
        ("c2-vgg16", {"method": "cp"}),
    ],
)
def test_a_network_is_as_small_as_its_record_says(name: str, wanted: dict[str, Any]) -> None:
    record = records(name, **wanted)[0]
    dense, example = networks.create(record["network"]).eval(), torch.randn(1, 3, 32, 32)
    small = bench_runs.rebuilt(record, dense, example)
    before, after = cost.summary(dense, example), cost.summary(small, example)
    assert before["conv_macs"] / after["conv_macs"] == pytest.approx(record["flop_ratio"], rel=1e-9)
    assert before["parameters"] / after["parameters"] == pytest.approx(record["parameter_ratio"], rel=1e-9)
    assert small(example).shape == (1, 10)


def test_layers_of_other_sizes_are_those_that_torch_pruning_leaves() -> None:
    pytest.importorskip("torch_pruning")
    network, images = networks.resnet(8, shortcut="projection").eval(), torch.randn(2, 3, 32, 32)
    small = depgraph(network, images, 2)
    shapes = {n: tuple(p.shape[:2]) for n, p in small.named_parameters() if p.ndim > 1}
    made = bench_runs.resized(network, {name.removesuffix(".weight"): shape for name, shape in shapes.items()})
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    assert made(images).shape == (2, 10)


def test_layers_of_other_sizes() -> None:
    """Of the sizes that they have, the same function; of others, BatchNorms follow and the network runs."""
    network = networks.resnet(8).eval()
    shapes = {n.removesuffix(".weight"): tuple(p.shape[:2]) for n, p in network.named_parameters() if p.ndim > 1}
    same = bench_runs.resized(network, shapes)
    same.load_state_dict(network.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(same(x), network(x))
    shapes |= {"blocks.0.conv1": (5, 16), "blocks.0.conv2": (16, 5)}
    small = bench_runs.resized(network, shapes)
    assert small.blocks[0].bn1.num_features == 5
    assert small(x).shape == (1, 10)


def test_a_run_whose_shape_is_not_known_is_named() -> None:
    record = records("c3-factorised")[0]
    with pytest.raises(ValueError, match=rf"run {record['run_id']} \({record['method']}\) has no record of what"):
        bench_runs.rebuilt(record, networks.create("vgg16-bn"), torch.randn(1, 3, 32, 32))


def test_a_quick_run_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "runs").mkdir(parents=True)
    one = records("s1-light-decay", method="spp", seed=0)[:1]
    unknown = {**one[0], "run_id": "unknown", "notes": {}}
    (tmp_path / "data" / "runs" / "mine.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in [*one, unknown])
    )
    monkeypatch.setitem(bench_runs.BATCHES, "cpu", (2,))
    assert (
        main(["bench", "runs", "mine", "--quick", "--device", "cpu", "--revision", "r", "--root", str(tmp_path)]) == 0
    )
    (record,) = lines(tmp_path / "build" / "bench-runs.jsonl")
    dense, small, again = record["rows"]
    assert [dense["run_id"], small["run_id"], again["run_id"]] == ["dense", one[0]["run_id"], "dense, again"]
    assert small["times"] == pytest.approx(dense["median_ms"] / small["median_ms"])
    assert (small["method"], small["batch"], small["network"]) == ("spp", 2, "convnet")
    assert "left out: run unknown (spp) has no record of what its network looks like" in capsys.readouterr().out
    monkeypatch.setitem(bench_runs.BATCHES, "cpu", (2, 1))  # what a list that was cut short had still to do
    asked = ["bench", "runs", "mine", "--quick", "--device", "cpu", "--root", str(tmp_path)]
    assert main([*asked, "--revision", "r"]) == 0
    assert "convnet, 2 images: recorded" in capsys.readouterr().out
    assert [line["batch"] for line in lines(tmp_path / "build" / "bench-runs.jsonl")] == [2, 1]
    assert main([*asked, "--revision", "r-dirty"]) == main([*asked, "--revision", "r-dirty"]) == 0
    assert [line["batch"] for line in lines(tmp_path / "build" / "bench-runs.jsonl")] == [2, 1] * 3
    assert main(["bench", "runs", "nothing", "--root", str(tmp_path)]) == 1
    assert "nothing: no runs of these in" in capsys.readouterr().err


def test_of_each_network_and_batch_the_last_record_counts(tmp_path: Path) -> None:
    """A record of old held all networks; one of now a single table."""

    def line(device: str, revision: str, *tables: tuple[str, int]) -> str:
        rows = [{"run_id": "dense", "network": network, "batch": batch, "median_ms": 1.0} for network, batch in tables]
        return json.dumps({"device": device, "precision": "float32", "revision": revision, "rows": rows})

    path = tmp_path / "data" / "runs" / "bench-runs.jsonl"
    path.parent.mkdir(parents=True)
    written = [
        line("CPU", "a", ("vgg16-bn", 1), ("resnet56", 1)),
        line("GPU", "b", ("vgg16-bn", 1)),
        line("CPU", "c", ("vgg16-bn", 1)),
        line("CPU", "c", ("vgg16-bn", 8)),
    ]
    path.write_text("\n".join(written))
    found = recorded.timed(tmp_path).set_index(["machine", "network", "batch"])["revision"]
    expected = {("CPU", "vgg16-bn", 1): "c", ("CPU", "resnet56", 1): "a", ("GPU", "vgg16-bn", 1): "b"}
    assert found.to_dict() == expected | {("CPU", "vgg16-bn", 8): "c"}
