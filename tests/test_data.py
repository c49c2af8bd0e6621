"""Loading, normalising and drawing images, against NumPy; and every bad input that a reader may have."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets.cifar
import torchvision.datasets.imagenette
from PIL import Image
from torchvision.datasets import CIFAR10

from sppkit import data
from sppkit.data import Batches, Normalise, Split

REAL = Path(__file__).parents[1] / "data"


def split(count: int = 10, size: int = 6, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(count))


def raw(size: int = 6) -> Normalise:
    """Leaves the pixels as they are."""
    return Normalise(torch.zeros(3, 1, 1), torch.ones(3, 1, 1))


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
    assert (loaded.name, loaded.image_size, loaded.classes) == ("digits", 8, tuple("0123456789"))
    both = torch.cat([loaded.train.images, loaded.test.images])
    labels = torch.cat([loaded.train.labels, loaded.test.labels])
    assert torch.equal(both, both[..., :1].expand_as(both))
    ours = sorted(
        (label, x.tobytes()) for label, x in zip(labels.tolist(), both[..., 0].numpy(), strict=True)
    )
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
    for number, file in enumerate(data.CIFAR10_FILES):
        pixels = np.full((2, 3072), number, dtype=np.uint8)
        pixels[1, :1024] = 250  # the red plane of the second image
        content = {"data": pixels, "labels": [number, 9], "label_names": [f"name{i}" for i in range(10)]}
        blob = pickle.dumps(content, protocol=2)
        (folder / file).write_bytes(blob)
        md5[file] = hashlib.md5(blob).hexdigest()
    monkeypatch.setattr(data, "CIFAR10_FILES", md5)
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
    assert data.available(tmp_path)["cifar10"] is True


@pytest.mark.parametrize(
    ("name", "contents"),
    [("cifar10", "cifar-10-batches-py/ with the files data_batch_1"), ("imagenette", "imagenette2-160, ")],
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
    found = data.available(tmp_path)
    assert found.keys() == {"digits", "cifar10", "imagenette"}
    assert found["digits"] is True
    assert found[name] == message


def test_a_missing_cifar10_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake_cifar10(tmp_path, monkeypatch) / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match=r"\(missing: data_batch_4\)"):
        data.load("cifar10", root=tmp_path)


@pytest.mark.parametrize("file", list(data.CIFAR10_FILES))
def test_a_truncated_cifar10_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    path = fake_cifar10(tmp_path, monkeypatch) / file
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(
        ValueError, match=rf"{file}' is damaged: its {path.stat().st_size} bytes.*download=True"
    ):
        data.load("cifar10", root=tmp_path)


@pytest.mark.parametrize("file", list(data.CIFAR10_FILES))
def test_a_hostile_pickle_in_the_place_of_a_cifar10_file_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.mkdir, (str(tmp_path / "mark"),)

    path = fake_cifar10(tmp_path, monkeypatch) / file
    path.write_bytes(pickle.dumps(Hostile()))
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("a file was unpickled"))
    with pytest.raises(ValueError, match=f"{file}' is damaged"):
        data.load("cifar10", root=tmp_path)
    assert not (tmp_path / "mark").exists()
    pickle.loads(path.read_bytes())  # the trap works
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["cifar10", "imagenette"])
@pytest.mark.parametrize(
    "error",
    [
        URLError("no route to host"),
        RuntimeError("File not found or corrupted."),
        PermissionError(13, "denied"),
    ],
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


def test_imagenette_is_found_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "IMAGENETTE_COUNTS", {"train": 20, "val": 10})
    write_images(tmp_path / "imagenette-128" / "train", *[2] * 10)
    write_images(tmp_path / "imagenette-128" / "val", *[1] * 10)
    loaded = data.load("imagenette", root=tmp_path)
    assert (len(loaded.train), len(loaded.test), loaded.image_size) == (20, 10, 128)
    assert loaded.classes[0] == "tench"
    assert data.available(tmp_path)["imagenette"] is True
    next((tmp_path / "imagenette-128" / "val").rglob("*.png")).unlink()
    with pytest.raises(ValueError, match=r"val' holds 9 images and not 10: it was unpacked in part; delete"):
        data.load("imagenette", root=tmp_path)
    (tmp_path / "imagenette2-320").mkdir()  # comes before imagenette-128
    with pytest.raises(ValueError, match=r"imagenette2-320/train' holds 0 images"):
        data.load("imagenette", root=tmp_path)


@pytest.mark.skipif(not (REAL / "cifar-10-batches-py").is_dir(), reason="no data/cifar-10-batches-py")
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
    with pytest.raises(ValueError, match="neither val/ nor test/"):
        data.load(tmp_path)
    write_images(tmp_path / held_out, 1, 2)
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / "class0" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "class0" / "._000.png").write_text("not an image either")
    loaded = data.load(tmp_path)
    assert loaded.train.labels.tolist() == [0, 0, 0, 1]
    assert loaded.test.labels.tolist() == [0, 1, 1]
    assert loaded.image_size == 128
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
    names = [path.name for path in data._images(folder)]
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


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "header", "16-bit"])
def test_a_corrupt_image_is_named(tmp_path: Path, damage: str) -> None:
    write_images(tmp_path, 3, 3, size=(64, 64))
    path = tmp_path / "class1" / "001.png"
    whole = path.read_bytes()
    if damage == "16-bit":
        Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(path)
    else:
        content = {"cut": whole[:60], "text": b"<html>", "empty": b"", "header": whole[:20] + b"\xff" * 90}
        path.write_bytes(content[damage])
    with pytest.raises(ValueError, match=rf"cannot read the image '{path}' \(.+\); replace it"):
        data.load(tmp_path)


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder of images .*nowhere.*digits"):
        data.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds 0 class folders"):
        data.load(tmp_path)
    write_images(tmp_path, 1)
    with pytest.raises(ValueError, match="holds 1 class folders"):
        data.load(tmp_path)
    (tmp_path / "class1").mkdir()
    with pytest.raises(ValueError, match=r"holds 2 class folders, of which without images: \['class1'\]"):
        data.load(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "class1" / "a.png")
    with pytest.raises(ValueError, match="class 0 has 1 image; the split needs two or more"):
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
        with pytest.raises(ValueError, match=f"device='{name}' asks for a GPU .*sees 0; use \"cpu\""):
            data.load("digits", device=name)
    for name in ("gpu", "meta", "cuda:x", ""):
        with pytest.raises(ValueError, match=f"device='{name}' must be"):
            data.resolve_device(name)


def test_a_gpu_where_there_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert data.resolve_device("auto") == torch.device("cuda", 0)
    assert data.resolve_device(torch.device("cuda:1")) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"'cuda:2' asks for a GPU .*sees 2"):
        data.resolve_device("cuda:2")


# --- normalising


def test_normalise_against_numpy() -> None:
    part = split(7)
    x = part.images.numpy().transpose(0, 3, 1, 2).astype(np.float64)
    expected = (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)
    y = Normalise.of(part, "channel")(part.images)
    assert y.dtype == torch.float32
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(Normalise.of(part, "mean_image")(part.images), x - x.mean(0), atol=1e-4)
    with pytest.raises(ValueError, match="kind='mean' must be"):
        Normalise.of(part, "mean")


def test_a_constant_channel_is_only_centred() -> None:
    part = split(4)
    part.images[..., 1] = 9
    y = Normalise.of(part, "channel")(part.images)
    assert torch.equal(y[:, 1], torch.zeros(4, 6, 6))
    assert torch.isfinite(y).all()


def test_evaluation_gives_every_sample_once_in_order() -> None:
    part = split(10)
    batches = list(data.evaluation(part, raw(), batch_size=4))
    assert [len(y) for _, y in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([y for _, y in batches]), part.labels)
    assert torch.equal(torch.cat([x for x, _ in batches]), part.images.permute(0, 3, 1, 2).float())


# --- batches


def epoch_of(batches: Batches, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    batches.start_epoch(epoch)
    seen = []
    for step in range(batches.steps_per_epoch):
        batches.select(step)
        seen.append(batches.batch())
    return torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("padding", "pad_value"), [(0, 0), (2, 0), (2, 128), (9, 255)])
def test_crop_and_flip_against_padding_and_slicing(padding: int, pad_value: int, flip: bool) -> None:
    part = split(60)
    batches = Batches(
        part, batch_size=20, seed=3, normalise=raw(), crop_padding=padding, flip=flip, pad_value=pad_value
    )
    x, y = epoch_of(batches, 5)
    flipped = 0
    for got, sample in zip(x.numpy(), y.tolist(), strict=True):
        border = ((padding, padding), (padding, padding), (0, 0))
        padded = np.pad(part.images[sample].numpy(), border, constant_values=pad_value)
        row, col = batches.offsets[sample].tolist()
        window = padded[row : row + 6, col : col + 6]
        if flip and batches.flips[sample]:
            window, flipped = window[:, ::-1], flipped + 1
        assert np.array_equal(got, window.transpose(2, 0, 1))
    assert flip == (15 <= flipped <= 45)
    assert batches.offsets.min() == 0
    assert batches.offsets.max() == 2 * padding
    assert torch.equal(part.images, split(60).images)


def test_an_epoch_follows_from_seed_and_epoch_alone() -> None:
    def make(seed: int) -> Batches:
        return Batches(split(12), batch_size=4, seed=seed, normalise=raw(), crop_padding=2, flip=True)

    one, two = make(1), make(1)
    epoch_of(one, 0)
    first, resumed = epoch_of(one, 3), epoch_of(two, 3)  # `two` never saw an earlier epoch
    assert torch.equal(first[0], resumed[0])
    assert torch.equal(first[1], resumed[1])
    orders = {tuple(epoch_of(make(seed), epoch)[1].tolist()) for seed in (0, 1, 2) for epoch in range(5)}
    assert len(orders) == 15
    assert all(sorted(order) == list(range(12)) for order in orders)  # every sample once an epoch


def test_the_order_does_not_hang_on_the_augmentation() -> None:
    plain = Batches(split(12), batch_size=4, seed=1, normalise=raw())
    augmented = Batches(split(12), batch_size=3, seed=1, normalise=raw(), crop_padding=2, flip=True)
    assert torch.equal(plain.order, augmented.order)


def test_what_is_left_over_is_not_used() -> None:
    batches = Batches(split(11), batch_size=4, seed=1, normalise=raw())
    assert batches.steps_per_epoch == 2
    assert len(set(epoch_of(batches, 0)[1].tolist())) == 8


def test_tensors_stay_where_they_are() -> None:
    part = split(12)
    batches = Batches(part, batch_size=4, seed=1, normalise=raw(), crop_padding=2, flip=True)

    def places() -> list[int]:
        tensors = (batches.index, batches.order, batches.offsets, batches.flips, part.images, part.labels)
        return [tensor.data_ptr() for tensor in tensors]

    before, order = places(), batches.order.clone()
    epoch_of(batches, 1)
    assert places() == before
    assert not torch.equal(batches.order, order)


def test_a_batch_is_normalised_after_the_crop() -> None:
    part = split(8)
    normalise = Normalise.of(part, "mean_image")
    settings = {"batch_size": 8, "seed": 1, "crop_padding": 2, "flip": True}
    plain, centred = (Batches(part, normalise=n, **settings) for n in (raw(), normalise))  # type: ignore[arg-type]
    assert torch.equal(centred.batch()[0], plain.batch()[0] - normalise.mean)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 9}, r"batch_size=9 must lie in 1\.\.8"),
        ({"batch_size": 0}, "batch_size=0 must"),
        ({"batch_size": 2, "crop_padding": -1}, "crop_padding=-1 must be 0 or more"),
        ({"batch_size": 2, "pad_value": 256}, "pad_value=256 in"),
    ],
)
def test_impossible_batches_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(split(8), seed=0, normalise=raw(), **settings)  # type: ignore[arg-type]


def test_a_step_outside_the_epoch_is_refused() -> None:
    batches = Batches(split(8), batch_size=4, seed=0, normalise=raw())
    for step in (-1, 2):
        with pytest.raises(ValueError, match=rf"step={step} must lie in 0\.\.1"):
            batches.select(step)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_batch_runs_in_a_cuda_graph_and_equals_the_cpu() -> None:
    part = split(64)
    there = Split(part.images.cuda(), part.labels.cuda())
    on_cpu, on_gpu = (
        Batches(
            s,
            batch_size=16,
            seed=1,
            normalise=Normalise.of(s, "channel"),
            crop_padding=2,
            flip=True,
            pad_value=128,
        )
        for s in (part, there)
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_gpu.batch()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x, y = on_gpu.batch()
    for epoch in range(3):
        on_cpu.start_epoch(epoch)
        on_gpu.start_epoch(epoch)
        for step in range(4):
            on_cpu.select(step)
            on_gpu.select(step)
            graph.replay()
            expected_x, expected_y = on_cpu.batch()
            torch.testing.assert_close(x.cpu(), expected_x)
            assert torch.equal(y.cpu(), expected_y)
