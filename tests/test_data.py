"""Loading images, against scikit-learn, Pillow and plain slicing; and every bad input a reader may have."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import check
import numpy as np
import pytest
import torch
import torchvision.datasets.cifar
import torchvision.datasets.imagenette
from PIL import Image
from torchvision.datasets import CIFAR10
from training import Normalise, data
from training.data import Split

REAL = Path(__file__).parents[1] / "data"
CIFAR10_FILES = [*(file for file, _ in [*CIFAR10.train_list, *CIFAR10.test_list]), CIFAR10.meta["filename"]]


def write_images(folder: Path, *counts: int, size: tuple[int, int] = (9, 7)) -> None:
    """One class folder for each count, with images of one colour, the class in red, the number in green."""
    for label, count in enumerate(counts):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(count):
            image = Image.new("RGB", size, (10 * label, number, 200))
            image.save(folder / f"class{label}" / f"{number:03}.png")


# --- the named data sets


def test_digits_are_the_digits_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    loaded = data.load("digits", size=8)
    assert (loaded.name, len(loaded.train.images[0]), loaded.classes) == ("digits", 8, tuple("0123456789"))
    both = torch.cat([loaded.train.images, loaded.test.images])
    labels = torch.cat([loaded.train.labels, loaded.test.labels])
    assert torch.equal(both, both[..., :1].expand_as(both))
    ours = sorted((label, x.tobytes()) for label, x in zip(labels.tolist(), both[..., 0].numpy(), strict=True))
    gray = np.round(digits.images * 255 / 16).astype(np.uint8)
    assert ours == sorted((int(label), x.tobytes()) for label, x in zip(digits.target, gray, strict=True))
    for label in range(10):
        whole, held_out = int((labels == label).sum()), int((loaded.test.labels == label).sum())
        assert abs(held_out - whole / 5) <= 0.5
    assert torch.equal(data.load("digits", size=8).test.images, loaded.test.images)


def test_digits_are_enlarged_without_moving() -> None:
    small, large = data.load("digits", size=8).test, data.load("digits").test
    assert large.images.shape == (len(small), 32, 32, 3)
    assert torch.equal(small.labels, large.labels)
    means = large.images.float().view(-1, 8, 4, 8, 4, 3).mean((2, 4))[:, 1:-1, 1:-1]  # of each 4x4 block
    x = small.images.float()
    kernel = torch.tensor([1, 6, 1]) / 8  # the mean over a block of a bilinear enlargement by 4
    rows = sum(w * x[:, i : i + 6] for i, w in enumerate(kernel))
    expected = sum(w * rows[:, :, i : i + 6] for i, w in enumerate(kernel))
    assert (means - expected).abs().max() <= 0.5  # each pixel is rounded


def test_shrinking_is_antialiased() -> None:
    stripes = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 200
    shrunk = data._resize(stripes, 2)
    assert (shrunk.float() - 100).abs().max() < 30


def test_an_impossible_size_is_refused() -> None:
    with pytest.raises(ValueError, match="size=0 must be at least 1 pixel"):
        data.load("digits", size=0)


def fake_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CIFAR-10 of 12 images, with the md5 of its files put in place of the real ones."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    md5 = {}
    for number, file in enumerate(CIFAR10_FILES):
        pixels = np.full((2, 3072), number, dtype=np.uint8)
        pixels[1, :1024] = 250  # the red plane of the second image
        content = {"data": pixels, "labels": [number, 9], "label_names": [f"name{i}" for i in range(10)]}
        blob = pickle.dumps(content, protocol=2)
        (folder / file).write_bytes(blob)
        md5[file] = hashlib.md5(blob).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [[f, m] for f, m in md5.items() if f.startswith("data")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})
    return folder


def test_cifar10_is_read_in_the_order_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cifar10(tmp_path, monkeypatch)
    loaded = data.load("cifar10", root=tmp_path)
    assert loaded.classes == tuple(f"name{i}" for i in range(10))
    assert loaded.train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert loaded.test.labels.tolist() == [5, 9]
    assert loaded.train.images[2::2, 0, 0].tolist() == [[i] * 3 for i in (1, 2, 3, 4)]
    assert loaded.train.images[3, 5, 7].tolist() == [250, 1, 1]
    assert data.load("cifar10", root=tmp_path, size=16).train.images.shape == (10, 16, 16, 3)
    assert not check.problems(tmp_path)["cifar10"]


@pytest.mark.parametrize(
    ("name", "contents"),
    [("cifar10", "should hold cifar-10-batches-py."), ("imagenette", "should hold imagenette2-160 or ")],
)
def test_a_missing_data_set_names_the_folder_its_contents_and_three_ways_out(
    tmp_path: Path, name: str, contents: str
) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        data.load(name, root=tmp_path)
    message = str(caught.value)
    for part in (
        repr(str(tmp_path)),
        contents,
        "Three ways out",
        f'load("{name}", download=True)',
        f"python -m sppkit data {name} --download",
        "root=",
        '"digits"',
    ):
        assert part in message
    found = check.problems(tmp_path)
    assert found.keys() == {"digits", "cifar10", "imagenette"}
    assert not found["digits"]
    assert found[name] == message


def test_a_missing_cifar10_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake_cifar10(tmp_path, monkeypatch) / "data_batch_4").unlink()
    with pytest.raises(ValueError, match=r"data_batch_4' is missing or damaged: 0 bytes.*download=True"):
        data.load("cifar10", root=tmp_path)
    assert "data_batch_4" in check.problems(tmp_path)["cifar10"]


@pytest.mark.parametrize("file", CIFAR10_FILES)
def test_a_truncated_cifar10_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    path = fake_cifar10(tmp_path, monkeypatch) / file
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=rf"{file}' is missing or damaged: {path.stat().st_size} bytes.*download=True"):
        data.load("cifar10", root=tmp_path)


@pytest.mark.parametrize("file", CIFAR10_FILES)
def test_a_hostile_pickle_in_the_place_of_a_cifar10_file_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.mkdir, (str(tmp_path / "mark"),)

    path = fake_cifar10(tmp_path, monkeypatch) / file
    path.write_bytes(pickle.dumps(Hostile()))
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("a file was unpickled"))
    with pytest.raises(ValueError, match=f"{file}' is missing or damaged"):
        data.load("cifar10", root=tmp_path)
    assert not (tmp_path / "mark").exists()
    pickle.loads(path.read_bytes())  # the trap works
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["cifar10", "imagenette"])
@pytest.mark.parametrize(
    "error",
    [URLError("no route to host"), RuntimeError("File not found or corrupted."), PermissionError(13, "denied")],
    ids=["no network", "cut short", "read-only folder"],
)
def test_a_failed_download_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    for module in (torchvision.datasets.cifar, torchvision.datasets.imagenette):
        monkeypatch.setattr(module, "download_and_extract_archive", fail)
    with pytest.raises(OSError, match=f"cannot download {name} into the folder '{tmp_path}'") as caught:
        data.load(name, root=tmp_path, download=True)
    assert str(error) in str(caught.value)
    assert "root=" in str(caught.value)
    assert '"digits"' in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OSError, match=r"cannot download cifar10 into the folder .*data"):
            data.load("cifar10", root=tmp_path / "data", download=True)
    finally:
        tmp_path.chmod(0o755)


def test_a_download_repairs_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_cifar10(tmp_path, monkeypatch) / "test_batch"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    download = lambda *_, **__: path.write_bytes(whole)  # noqa: E731
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", download)
    assert len(data.load("cifar10", root=tmp_path, download=True).test) == 2
    monkeypatch.setattr(
        torchvision.datasets.cifar,
        "download_and_extract_archive",
        lambda *_, **__: pytest.fail("what is whole is not downloaded again"),
    )
    data.load("cifar10", root=tmp_path, download=True)


def test_imagenette_is_found_in_any_of_its_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "imagenette-128" / "train", 2, 1)
    write_images(tmp_path / "imagenette-128" / "val", 1, 2)
    loaded = data.load("imagenette", root=tmp_path)
    assert (loaded.name, len(loaded.train.images[0])) == ("imagenette", 128)
    assert loaded.classes == ("class0", "class1")
    assert (loaded.train.labels.tolist(), loaded.test.labels.tolist()) == ([0, 0, 1], [0, 1, 1])
    assert not check.problems(tmp_path)["imagenette"]
    fail = lambda *_, **__: pytest.fail("what is there is not downloaded in another size")  # noqa: E731
    monkeypatch.setattr(torchvision.datasets.imagenette, "download_and_extract_archive", fail)
    assert len(data.load("imagenette", root=tmp_path, download=True).test) == 3
    (tmp_path / "imagenette2-320").mkdir()  # comes before imagenette-128
    with pytest.raises(ValueError, match=r"imagenette2-320' holds 0 class folders"):
        data.load("imagenette", root=tmp_path)


@pytest.mark.cifar10
def test_the_real_cifar10() -> None:
    loaded = data.load("cifar10", root=REAL)
    assert (len(loaded.train), len(loaded.test)) == (50_000, 10_000)
    assert loaded.train.labels.bincount().tolist() == [5000] * 10
    assert loaded.classes[:3] == ("airplane", "automobile", "bird")
    mean = Normalise.of(loaded.train, "channel").mean.flatten() / 255
    assert torch.allclose(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-4)  # the widely used values


# --- folders of images


def test_a_folder_is_split_by_class(tmp_path: Path) -> None:
    write_images(tmp_path / "pets", 10, 5, 2)
    loaded = data.load(tmp_path / "pets", size=4)
    assert (loaded.name, loaded.classes) == ("pets", ("class0", "class1", "class2"))
    assert loaded.train.labels.bincount().tolist() == [8, 4, 1]
    assert loaded.test.labels.bincount().tolist() == [2, 1, 1]
    seen = [
        (label, *pixel)
        for part in (loaded.train, loaded.test)
        for label, pixel in zip(part.labels.tolist(), part.images[:, 2, 1].tolist(), strict=True)
    ]
    expected = [(label, 10 * label, n, 200) for label, count in enumerate((10, 5, 2)) for n in range(count)]
    assert sorted(seen) == expected
    assert torch.equal(data.load(str(tmp_path / "pets"), size=4).test.images, loaded.test.images)


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_train_and_val_folders_are_taken_as_they_are(tmp_path: Path, held_out: str) -> None:
    write_images(tmp_path / "train", 3, 1)
    with pytest.raises(FileNotFoundError, match=r"test'; it should hold train/ and val/ \(or test/\)"):
        data.load(tmp_path)
    write_images(tmp_path / held_out, 1, 2)
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / "class0" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "class0" / "._000.png").write_text("not an image either")
    loaded = data.load(tmp_path)
    assert loaded.train.labels.tolist() == [0, 0, 0, 1]
    assert loaded.test.labels.tolist() == [0, 1, 1]
    assert len(loaded.train.images[0]) == 128
    (tmp_path / held_out / "class1").rename(tmp_path / held_out / "other")
    with pytest.raises(ValueError, match=r"differ: \['class1', 'other'\]"):
        data.load(tmp_path)


def test_every_kind_of_image_becomes_rgb(tmp_path: Path) -> None:
    write_images(tmp_path, 1, 1)
    folder = tmp_path / "class0"
    Image.new("L", (5, 9), 77).save(folder / "gray.png")
    Image.new("1", (5, 9), 1).save(folder / "bits.png")
    Image.new("LA", (5, 9), (77, 0)).save(folder / "gray-alpha.png")
    Image.new("RGBA", (300, 1), (1, 2, 3, 0)).save(folder / "wide.png")
    Image.new("CMYK", (1, 30), (0, 255, 255, 0)).save(folder / "cmyk.jpg", quality=100)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 10, 20, 30])
    palette.save(folder / "palette.bmp")
    palette.save(folder / "transparent.PNG", transparency=bytes([0, 128]))
    images, labels, _ = data._read(tmp_path, 6)
    names = sorted(path.name for path in folder.iterdir())
    found = {name: images[i, 3, 3].tolist() for i, name in enumerate(names)}
    assert images.shape == (9, 6, 6, 3)
    assert labels.tolist() == [0] * 8 + [1]
    assert found.pop("cmyk.jpg") == pytest.approx([255, 0, 0], abs=3)
    assert found == {
        "000.png": [0, 0, 200],
        "gray.png": [77, 77, 77],
        "bits.png": [255, 255, 255],
        "gray-alpha.png": [77, 77, 77],
        "wide.png": [1, 2, 3],
        "palette.bmp": [10, 20, 30],
        "transparent.PNG": [10, 20, 30],
    }


def test_the_centre_is_kept(tmp_path: Path) -> None:
    pixels = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)
    for name, shown in (("wide.png", pixels), ("tall.png", pixels.swapaxes(0, 1))):
        Image.fromarray(np.ascontiguousarray(shown)).save(tmp_path / name)
    assert np.array_equal(data._decode(tmp_path / "wide.png", 6), pixels[:, 2:8])
    assert np.array_equal(data._decode(tmp_path / "tall.png", 6), pixels[:, 2:8].swapaxes(0, 1))
    square = np.zeros((8, 8, 3), dtype=np.uint8)
    square[:, 4:] = 200
    Image.fromarray(square).save(tmp_path / "square.png")
    half = data._decode(tmp_path / "square.png", 4)
    assert half[:, 0].max() == 0
    assert half[:, 3].min() == 200


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "header"])
def test_a_corrupt_image_is_named(tmp_path: Path, damage: str) -> None:
    write_images(tmp_path, 3, 3, size=(64, 64))
    path = tmp_path / "class1" / "001.png"
    whole = path.read_bytes()
    content = {"cut": whole[:60], "text": b"<html>", "empty": b"", "header": whole[:20] + b"\xff" * 90}
    path.write_bytes(content[damage])
    with pytest.raises(ValueError, match=rf"cannot read the image '{path}' \(.+\); replace or remove"):
        data.load(tmp_path)


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere.*digits"):
        data.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds 0 class folders"):
        data.load(tmp_path)
    write_images(tmp_path, 1)
    with pytest.raises(ValueError, match="holds 1 class folders"):
        data.load(tmp_path)
    (tmp_path / "class1").mkdir()
    with pytest.raises(ValueError, match=r"holds 2 class folders, .*too few images: {'class0': 1, 'class1': 0}"):
        data.load(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "class1" / "a.png")
    with pytest.raises(ValueError, match=r"too few images: {'class0': 1, 'class1': 1}; .*each with 2 or more"):
        data.load(tmp_path)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(0, 4, 4, 3, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 4, 4, 3), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(2)),
    ],
    ids=["empty", "channels first", "float", "more labels", "float labels"],
)
def test_a_split_of_the_wrong_shape_or_type_is_refused(images: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"give \(N, H, W, 3\) torch.uint8"):
        Split(images, labels)


# --- devices


def test_a_gpu_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert data.resolve_device("auto") == torch.device("cpu")
    assert data.resolve_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match=f"device='{name}' is absent; use \"auto\" .*\\(cpu\\).*CUDA build"):
            data.load("digits", device=name)
    for name in ("gpu", "meta", "cuda:x", ""):
        with pytest.raises(ValueError, match=f"device='{name}' is absent; use"):
            data.resolve_device(name)


def test_a_gpu_where_there_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert data.resolve_device("auto") == torch.device("cuda", 0)
    assert data.resolve_device(torch.device("cuda:1")) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"'cuda:2' is absent; .*\(cpu, cuda:0, cuda:1\)"):
        data.resolve_device("cuda:2")


def test_an_image_of_more_than_8_bits_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(tmp_path / name / f"{number}.png")
    with pytest.raises(ValueError, match="its mode I;16 has more than 8 bits a channel"):
        data.load(tmp_path)
