"""`python -m sppkit prune`: both methods to the end, a run that is stopped and goes on, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import prune
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from prune import Job
from torch import nn
from training import evaluate, stepwise
from training.data import load

from sppkit import cost, portable
from sppkit.__main__ import main

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of images that differ in their colour."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 8)):
        for k, name in enumerate(("blue", "green", "red")):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., 2 - k] += 120
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


def tiny(num_classes: int = 1000) -> nn.Module:
    """Three convolutions, by a name that torchvision could have."""
    convolutions = [nn.Conv2d(3, 16, 3, 2), nn.Conv2d(16, 24, 3), nn.Conv2d(24, 24, 3)]
    layers = [m for conv in convolutions for m in (conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, num_classes))


@pytest.fixture
def job(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    get, known = torchvision.models.get_model, torchvision.models.list_models

    def model(name: str, **settings: Any) -> nn.Module:
        return tiny(**settings) if name == "tiny" else get(name, **settings)

    monkeypatch.setattr(torchvision.models, "get_model", model)
    monkeypatch.setattr(torchvision.models, "list_models", lambda **settings: ["tiny", *known(**settings)])
    sizes: dict[str, Any] = {"image_size": 32, "steps": 200, "retrain_steps": 6, "batch_size": 8, "images": 24}
    return Job("tiny", "none", str(folder), "cp", 1.5, **sizes)


def arguments(job: Job, out: Path, *more: str) -> list[str]:
    settings = (
        "model",
        "weights",
        "data",
        "method",
        "flop_ratio",
        "image_size",
        "steps",
        "retrain_steps",
        "batch_size",
    )
    given = [text for name in settings for text in (f"--{name.replace('_', '-')}", str(getattr(job, name)))]
    return ["prune", *given, "--images", str(job.images), "--out", str(out), "--device", "cpu", *more]


def with_(job: Job, **settings: object) -> Job:
    return Job(**{**prune.asdict(job), **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["cp", "spp"])
def test_the_files_hold_what_the_summary_says(
    method: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = with_(job, method=method)
    assert main(arguments(job, tmp_path / "out")) == 0
    summary, out = json.loads((tmp_path / "out" / "summary.json").read_text()), capsys.readouterr().out
    small, images = portable.load(tmp_path / "out" / "network.safetensors"), load(job.data, size=32)
    assert evaluate(small, images, job.training(1, 0)) == summary["accuracy"]["retrained"]
    example = prune.prepared(images, 1)
    left, dense = (cost.summary(small, example), tiny(3))
    assert summary["cost"]["pruned"]["parameters"] == sum(p.numel() for p in small.parameters())
    assert summary["flop_ratio"] == pytest.approx(cost.summary(dense, example)["conv_macs"] / left["conv_macs"])
    assert summary["flop_ratio"] == pytest.approx(1.5, rel=0.05)
    assert summary["bytes"]["network.safetensors"] == (tmp_path / "out" / "network.safetensors").stat().st_size
    assert {*summary["milliseconds"]} == {"dense", "pruned", "dense again"}
    assert (tmp_path / "out" / "network.onnx").stat().st_size > 1000
    assert not (tmp_path / "out" / "work" / "stages").exists()
    assert (
        out.index("plan:")
        < out.index("training steps of")
        < out.index("dense: ")
        < out.index("pruned: ")
        < out.index("written: ")
    )


class Killed(Exception):
    """Stands for whatever stops a run."""


@pytest.mark.parametrize(("method", "stage"), [("cp", "retrain"), ("spp", "prune"), ("spp", "retrain")])
def test_a_run_that_was_stopped_ends_with_the_same_network(
    method: str, stage: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = with_(job, method=method)
    prune.prune(job, tmp_path / "whole", device=CPU)
    fit, deadlines = prune.fit, []

    def stopped(network: nn.Module, images: Any, settings: Any, **options: Any) -> Any:
        """After a few steps of the stage, its checkpoint written."""
        path = options.get("checkpoint")
        if path is None or path.stem != stage:
            return fit(network, images, settings, **options)
        generator = stepwise(network, images, settings, **options)
        for _ in range(3):
            next(generator)
        deadlines.append(path)
        raise Killed

    monkeypatch.setattr("training.loop.SAVE_EVERY", 0.0)
    monkeypatch.setattr(prune, "fit", stopped)
    with pytest.raises(Killed):
        prune.prune(job, tmp_path / "parts", device=CPU)
    assert deadlines[0].exists(), "nothing to go on from"
    assert not (tmp_path / "parts" / "network.safetensors").exists()
    monkeypatch.setattr(prune, "fit", fit)
    prune.prune(job, tmp_path / "parts", device=CPU)
    one, other = ((tmp_path / name / "network.safetensors").read_bytes() for name in ("whole", "parts"))
    assert one == other
    (tmp_path / "parts" / "network.safetensors").unlink()
    again = prune.prune(job, tmp_path / "parts", device=CPU)
    assert again == json.loads((tmp_path / "parts" / "summary.json").read_text())
    assert not (tmp_path / "parts" / "network.safetensors").exists(), "a job that is done was run again"


def test_equal_errors_are_a_plan_of_their_own(job: Job, folder: Path) -> None:
    images = load(folder, size=32)
    network, few = prune.network_of(job, 3), prune.prepared(images, 24)
    network[3].weight.data[12:] = network[3].weight.data[:12]  # half of the filters repeat others
    uniform, equal = (
        prune.widths(with_(job, rule=rule, flop_ratio=2.0), network, few) for rule in ("uniform", "error")
    )
    assert [*uniform] == [*equal] == ["3", "6"]
    assert equal["6"] <= 13 < uniform["6"]
    assert equal["3"] > uniform["3"]


def test_weights_of_a_file_are_taken_and_a_new_head_only_if_asked(job: Job, tmp_path: Path) -> None:
    torch.manual_seed(3)
    theirs, path = torchvision.models.resnet18(num_classes=5), tmp_path / "five.safetensors"
    safetensors.torch.save_file(theirs.state_dict(), path)
    with pytest.raises(ValueError, match="has 5 classes and the folder 3; --new-head"):
        prune.network_of(with_(job, model="resnet18", weights=str(path)), 3)
    network = prune.network_of(with_(job, model="resnet18", weights=str(path), new_head=True), 3)
    assert network.fc.out_features == 3
    assert torch.equal(network.conv1.weight, theirs.conv1.weight)
    same = prune.network_of(with_(job, model="resnet18", weights=str(path)), 5)
    assert torch.equal(same.fc.weight, theirs.fc.weight)


def test_a_dry_run_says_what_it_costs_and_writes_nothing(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(with_(job, method="spp"), tmp_path / "out", "--dry-run")) == 0
    out = capsys.readouterr().out
    assert "206 training steps" in out
    assert "columns go, FLOP ratio 1.5" in out
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_is_refused(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    (tmp_path / "weights.pth").write_bytes(b"")
    for changed, words in (
        ({"model": "resnet19"}, "'resnet19' is no classifier of torchvision.models; near it are resnet101"),
        ({"data": str(tmp_path / "absent")}, "absent"),
        ({"flop_ratio": 1.0}, "--flop-ratio 1.0 must be above 1"),
        ({"weights": str(tmp_path / "weights.pth")}, "may be a pickle, which is never read"),
        ({"weights": str(tmp_path / "no.safetensors")}, "cannot be read into 'tiny': there is no file"),
        ({"model": "resnet18", "weights": "IMAGENET9K"}, "'IMAGENET9K' cannot be read into 'resnet18'"),
        ({"batch_size": 1000}, "--batch-size 1000 is above the 72 training images"),
    ):
        assert main(arguments(with_(job, **changed), tmp_path / "out", "--dry-run")) == 1
        assert words in capsys.readouterr().err
    assert main(arguments(job, tmp_path / "full")) == 1
    assert "holds other files" in capsys.readouterr().err
    prune.claim(job, tmp_path / "mine")
    with pytest.raises(ValueError, match=r"is of a run with lr=0\.01, not 0\.5; give another --out"):
        prune.claim(with_(job, lr=0.5), tmp_path / "mine")


def test_too_few_steps_are_an_error_that_says_so(job: Job, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--steps 20 were too few: [\d,]+ columns are left to decide"):
        prune.prune(with_(job, method="spp", steps=20), tmp_path / "out", device=CPU)
