"""`python -m sppkit prune`: files hold what the summary says, a kill changes nothing, what does not fit is named."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import prune
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import get_model
from training import data, networks
from training.step import TrainingStep

from sppkit import cost, portable
from sppkit.__main__ import main
from sppkit.plan import make_plan
from sppkit.pruner import Pruner

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
# Of the one a BatchNorm lies behind each convolution; the other has dropout and neither BatchNorm nor linear layer
MODELS = {"spp": "shufflenet_v2_x0_5", "cp": "squeezenet1_1"}
SIZES = "--steps 260 --interval 1 --retrain-steps 6 --batch-size 8 --image-size 32 --images 40 --lr 0.005 --device cpu"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of three digits, and weights of both networks."""
    place, digits = tmp_path_factory.mktemp("prune"), data.load("digits", size=16)
    for part, split, most in (("train", digits.train, 120), ("val", digits.test, 40)):
        few = (split.labels < 3).nonzero().flatten()[:most].tolist()
        for number in few:
            path = place / "images" / part / f"digit {split.labels[number]}" / f"{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(split.images[number].numpy()).save(path)
    for name in MODELS.values():
        torch.manual_seed(0)
        safetensors.torch.save_file(get_model(name, num_classes=3).state_dict(), place / f"{name}.safetensors")
    return place


def command(place: Path, method: str, out: Path, *more: str) -> list[str]:
    model = MODELS[method]
    given = ["--model", model, "--weights", str(place / f"{model}.safetensors"), "--data", str(place / "images")]
    return ["prune", *given, "--method", method, "--flop-ratio", "1.8", "--out", str(out), *SIZES.split(), *more]


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """Both methods run to their ends, SPP without what ONNX needs."""
    with pytest.MonkeyPatch.context() as patch:
        assert main(command(place, "cp", place / "cp")) == 0
        patch.setitem(sys.modules, "onnxscript", None)
        assert main(command(place, "spp", place / "spp")) == 0
    return place


def percent_right(network: nn.Module, split: data.Split) -> float:
    """By hand, as torchvision prepares images."""
    x = ((split.images / 255 - MEAN) / STD).permute(0, 3, 1, 2)  # (N, 3, H, W)
    with torch.inference_mode():
        return float((network.eval()(x).argmax(1) == split.labels).double().mean() * 100)


@pytest.mark.parametrize("method", ["spp", "cp"])
def test_the_files_hold_what_the_summary_says(method: str, whole: Path) -> None:
    out, images = whole / method, data.load(whole / "images", size=32)
    summary, small = json.loads((out / "summary.json").read_text()), portable.load(out / "network.safetensors")
    dense, x = get_model(MODELS[method], num_classes=3), torch.zeros(1, 3, 32, 32)
    dense.load_state_dict(safetensors.torch.load_file(whole / f"{MODELS[method]}.safetensors"))
    assert summary["accuracy_dense"] == pytest.approx(percent_right(dense, images.test))
    assert summary["accuracy_retrained"] == pytest.approx(percent_right(small, images.test))
    assert summary["flop_ratio"] == pytest.approx(cost.flop_ratio(dense, small, x)) == pytest.approx(1.8, rel=0.05)
    assert summary["cost"] == {"dense": cost.summary(dense, x), "compact": cost.summary(small, x)}
    assert summary["bytes"] == {path.name: path.stat().st_size for path in out.glob("network.*")}
    assert [(row["network"], row["batch"]) for row in summary["milliseconds"]] == [
        *(("dense", 1), ("compact", 1), ("dense", 8), ("compact", 8))
    ]
    assert summary["settings"]["classes"] == ["digit 0", "digit 1", "digit 2"]
    assert {path.name for path in out.iterdir()} == {"summary.json", *summary["bytes"]}
    if method == "spp":
        assert summary["accuracy_retrained"] > 60  # a third of the images is of each class
        assert "sppkit[export]" in summary["onnx"]
    else:
        assert "network.onnx" in summary["bytes"]


class Killed(BaseException):
    """Stands for whatever stops a run; nothing catches it."""


@pytest.mark.parametrize("method", ["spp", "cp"])
def test_a_run_that_was_killed_ends_with_the_same_bytes(
    method: str, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, step, done = whole / f"{method}-killed", TrainingStep.step, list[int]()
    retrained = prune.retrained

    def killed(self: TrainingStep, number: int) -> None:
        done.append(number)
        if len(done) == 6 and self.settings.steps > 4:  # the steps that are timed before the start are fewer
            raise Killed
        step(self, number)

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr("training.loop.SAVE_EVERY", 0.0)
    monkeypatch.setattr(TrainingStep, "step", killed)
    with pytest.raises(Killed):
        main(command(whole, method, out))
    assert [*(out / "work").glob(".*.tmp")] == []
    first = out / "work" / ("prune.safetensors" if method == "spp" else "retrain.safetensors")
    assert first.exists(), "nothing to go on from"
    if method == "spp":  # once more, between the stages: the pruned network is there, nothing of the next
        monkeypatch.setattr(TrainingStep, "step", step)
        monkeypatch.setattr("training.loop.SAVE_EVERY", 60.0)
        monkeypatch.setattr(prune, "retrained", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            main(command(whole, method, out))
        assert (out / "work" / "pruned.safetensors").exists()
        monkeypatch.setattr(prune, "retrained", retrained)
    monkeypatch.setattr(TrainingStep, "step", step)
    monkeypatch.setattr("training.loop.SAVE_EVERY", 60.0)
    assert main(command(whole, method, out)) == 0
    assert (out / "network.safetensors").read_bytes() == (whole / method / "network.safetensors").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(prune, "dense_network", None)  # a run that is finished does nothing
    assert main(command(whole, method, out)) == 0
    assert "is of this run, which is finished" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "said"), [("--lr 0.5", "lr=0.005"), ("--flop-ratio 3", "flop_ratio=1.8")])
def test_another_run_does_not_go_on_in_the_same_folder(
    option: str, said: str, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / "cp" / "summary.json").read_bytes()
    assert main(command(whole, "cp", whole / "cp", *option.split())) == 1
    error = capsys.readouterr().err
    assert f"is of a run with {said}, here it is {option.split()[1]}" in error
    assert "another --out" in error
    assert (whole / "cp" / "summary.json").read_bytes() == before


def test_a_dry_run_says_what_it_takes_and_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "dry"
    assert main(command(place, "spp", out, "--dry-run", "--retrain-steps", "1000")) == 0
    said = capsys.readouterr().out
    total, each = map(float, re.findall(r"about ([\d.]+) s at most \(([\d.e-]+) s a step\)", said)[0])
    assert total == pytest.approx((260 + 1000) * each, rel=0.1, abs=1)
    dense = get_model(MODELS["spp"], num_classes=3)
    assert f"{sum(p.numel() for p in dense.parameters()):,} parameters" in said
    assert abs(float(re.findall(r"FLOP ratio ([\d.]+)", said)[0]) / 1.8 - 1) < 0.01
    assert "at most 260 steps of SPP, an update every 1, then 1,000 of training" in said
    assert not out.exists()


@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_the_number_of_updates_is_that_of_a_pruner_whose_weights_stay(ratio: float) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
    plan = make_plan(network, torch.zeros(1, 3, 12, 12), ratio=ratio)
    pruner = Pruner(network, plan, interval=1)
    while not pruner.finished:
        pruner.update()
    required = {"model": "resnet18", "weights": "", "data": "", "method": "spp", "flop_ratio": 2.0}
    enough = prune.Job(**required, steps=pruner.updates)  # type: ignore[arg-type]
    assert prune.interval_of(enough, plan) == 1
    few = prune.Job(**required, steps=pruner.updates - 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{pruner.updates} updates or so reach it, --steps {pruner.updates} or more"):
        prune.interval_of(few, plan)
    ample = prune.Job(**required, steps=100 * pruner.updates)  # type: ignore[arg-type]
    assert (pruner.updates - 1) * prune.interval_of(ample, plan) < ample.steps * 0.7


def test_the_network_sees_images_as_its_weights_want_them() -> None:
    torch.manual_seed(0)
    images = torch.randint(256, (5, 8, 8, 3), dtype=torch.uint8)
    split = data.Split(images, torch.zeros(5, dtype=torch.int64))
    required = {"model": "resnet18", "weights": "", "data": "", "method": "spp", "flop_ratio": 2.0}
    job = prune.Job(**required, mean="0.1,0.2,0.3", std="0.5,0.6,0.7", batch_size=5)  # type: ignore[arg-type]
    given = job.training(1, 0).batches(split)
    seen = prune.Ready(nn.Identity(), split, job)(given.normalise(images))
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    torch.testing.assert_close(seen, ((images / 255 - mean) / std).permute(0, 3, 1, 2), atol=1e-5, rtol=0)


def test_weights_by_name_are_fetched_without_a_pickle_that_could_run_code(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, asked = get_model("squeezenet1_1", num_classes=1000).state_dict(), list[Any]()

    def fetch(url: str, **how: object) -> dict[str, Tensor]:
        asked.append(how)
        return theirs

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    images = data.load(place / "images", size=32)
    required = {"model": "squeezenet1_1", "weights": "DEFAULT", "data": "x", "method": "cp", "flop_ratio": 2.0}
    with pytest.raises(ValueError, match="is for 1000 classes, --data 'x' has 3; --new-head draws"):
        prune.dense_network(prune.Job(**required), images)  # type: ignore[arg-type]
    network = prune.dense_network(prune.Job(**required, new_head=True), images)  # type: ignore[arg-type]
    assert asked[-1]["weights_only"]
    assert len(network.state_dict()["classifier.1.weight"]) == 3
    assert torch.equal(network.state_dict()["features.0.weight"], theirs["features.0.weight"])

    def absent(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", absent)
    assert main(command(place, "cp", place / "fetched", "--weights", "IMAGENET1K_V1")) == 1
    error = capsys.readouterr().err
    assert "--weights 'IMAGENET1K_V1' could not be fetched" in error
    assert "no route to host" in error
    assert "give a .safetensors file" in error


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--model resnet19", "--model 'resnet19' is not in torchvision.models; it has alexnet"),
        ("--method thinet", "--method 'thinet' must be spp or cp"),
        ("--rule best", "--rule 'best' must be uniform or error"),
        ("--flop-ratio 1", "--flop-ratio 1 must be above 1"),
        ("--flop-ratio 1e6", "flop_ratio=1000000.0 is out of reach"),
        ("--data {place}/absent", "there is no folder"),
        ("--data {place}/empty", "0 class folders"),
        ("--weights IMAGENET9K", "'IMAGENET9K' is neither a file nor of IMAGENET1K_V1, DEFAULT"),
        ("--weights {place}/weights.pth", "torch.load('weights.pth', weights_only=True)"),
        (
            "--weights {place}/squeezenet1_1.safetensors --model vgg11",
            "'features.3.weight' is absent there, (128, 64, 3, 3) in vgg11",
        ),
        ("--out {place}/full", "holds other files; give an empty or a new folder"),
        ("--steps 30 --method spp", "updates or so reach it, --steps"),
        ("--batch-size 1000", "batch_size=1000 must lie in 1..120"),
        ("--retrain-steps 0", "--retrain-steps 0 must be at least 1"),
        ("--std 1,0,1", "--std '1,0,1' must each be three numbers"),
        ("--image-size 8", "the network cannot run on images (1, 3, 8, 8)"),
        ("--device tpu", "device='tpu' is absent"),
    ],
)
def test_what_does_not_fit_is_quoted(given: str, words: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "empty").mkdir(exist_ok=True)
    (place / "full").mkdir(exist_ok=True)
    (place / "full" / "letter.txt").write_text("mine")
    torch.save({}, place / "weights.pth")
    assert main(command(place, "cp", place / "refused", *given.format(place=place).split())) == 1
    assert words in capsys.readouterr().err
    assert not (place / "refused").exists()


def test_a_new_head_is_trained_first(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(prune, "by_channels", killed)
    out, dense = place / "headed", get_model(MODELS["cp"], num_classes=3)
    with pytest.raises(Killed):
        main(command(place, "cp", out, "--new-head"))
    assert "before that, a new head: 6 steps of training" in capsys.readouterr().out
    networks.load(dense, out / "work" / "dense.safetensors")
    given = safetensors.torch.load_file(place / f"{MODELS['cp']}.safetensors")
    moved = {name: float((dense.state_dict()[name] - tensor).abs().max()) for name, tensor in given.items()}
    assert 0 < moved["features.0.weight"] < 0.01  # trained on
    assert moved["classifier.1.weight"] > 0.02  # drawn anew
    found = json.loads((out / "summary.json").read_text())["accuracy_dense"]
    assert found == pytest.approx(percent_right(dense, data.load(place / "images", size=32).test))


def test_widths_by_error_take_more_from_a_layer_that_hardly_reads_half_of_its_input() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.ReLU(), nn.Conv2d(24, 8, 3))
    next(network.get_submodule("4").parameters()).data[:, 12:] *= 0.01
    given = {"model": "resnet18", "weights": "", "data": "", "method": "cp", "flop_ratio": 2.0}
    uniform, error = prune.Job(**given), prune.Job(**given, rule="error")  # type: ignore[arg-type]
    few = torch.randn(60, 3, 16, 16)
    plain, equal = (prune.widths_of(job, network.eval(), few) for job in (uniform, error))
    assert equal["4"] <= 13 < plain["4"]
    assert equal["2"] > plain["2"]
