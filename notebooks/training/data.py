"""Load a data set whole, as uint8 tensors on the device: training then needs no loader process."""

import hashlib
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torch.types import Device

IMAGENETTE = ("imagenette2-160", "imagenette2-320", "imagenette2", "imagenette-128")
FOLDERS = {"cifar10": ("cifar-10-batches-py",), "imagenette": IMAGENETTE}
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
PathLike = str | Path


@dataclass(frozen=True, eq=False)
class Split:
    """images (N, H, W, 3) uint8 and labels (N,) int64 on one device; N is at least 1."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        n, found = len(self.labels), [(*t.shape, t.dtype) for t in (self.images, self.labels)]
        if not n or found != [(n, *self.images.shape[1:3], 3, torch.uint8), (n, torch.int64)]:
            raise ValueError(f"images and labels are {found}; give (N, H, W, 3) torch.uint8, (N,) torch.int64")

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class ImageData:
    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]


def project_root() -> Path:
    """The first of the working directory and its parents that holds data/runs; else the working directory."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "data" / "runs").is_dir()), here)


def resolve_device(name: Device) -> torch.device:
    """The device of "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1"; ValueError if it is absent."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    present = ["cpu", *(f"cuda:{i}" for i in range(count))]
    wanted = {"auto": present[min(count, 1)], "cuda": "cuda:0"}.get(str(name), str(name))
    if wanted not in present:
        here = f'"auto" or what torch {torch.__version__} finds here ({", ".join(present)})'
        raise ValueError(f"device={str(name)!r} is absent; use {here}, or install a CUDA build of torch")
    return torch.device(wanted)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture and torch's thread count."""
    cpu = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu


def load(
    name: PathLike, *, root: PathLike = "data", size: int | None = None, device: Device = "cpu", download: bool = False
) -> ImageData:
    """Load "digits", "cifar10" or "imagenette", or the folder of images at the path `name`.

    A folder holds train/ and val/ (or test/), each with class folders, or class folders alone: then a fixed, stratified
    fifth is the test. `size` is the side in pixels (32 for digits and cifar10, else 128). cifar10 and imagenette lie in
    `root`, where `download` puts them. Raises FileNotFoundError for absent data, OSError for a failed download,
    ValueError for damaged data, too few images or an absent device.

    >>> load("digits", size=16).train.images.shape
    torch.Size([1438, 16, 16, 3])
    """
    target, root = resolve_device(device), Path(root).expanduser().absolute()
    if size is not None and size < 1:
        raise ValueError(f"size={size} must be at least 1 pixel, or None for the data set's own")
    held = name == "imagenette" and any((root / folder).is_dir() for folder in IMAGENETTE)  # of whatever size
    if download and str(name) in FOLDERS and not held:  # torchvision leaves a whole CIFAR-10 as it is
        try:
            _download(str(name), root)
        except Exception as error:  # torchvision lets through what the network, the archive and the disk raise
            ways = 'check the network and that the folder is writable, or give root=..., or use "digits"'
            raise OSError(f"cannot download {name} into the folder {str(root)!r} ({error}): {ways}") from error
    if name == "digits":
        from sklearn.datasets import load_digits  # here, because its import takes seconds

        digits = load_digits()
        gray = torch.from_numpy(digits.images * (255 / 16)).round().byte()[..., None].expand(-1, -1, -1, 3)
        train, test = _split(_resize(gray, size or 32), torch.from_numpy(digits.target))
        classes = tuple("0123456789")
    elif name == "cifar10":
        from torchvision.datasets import CIFAR10  # here, because its import takes seconds

        find("cifar10", root)  # before a file is unpickled
        sets = CIFAR10(root, train=True), CIFAR10(root, train=False)
        train, test = (Split(_resize(torch.from_numpy(s.data), size or 32), torch.tensor(s.targets)) for s in sets)
        classes = tuple(sets[0].classes)
    else:
        folder = find("imagenette", root) if name == "imagenette" else Path(name).expanduser()
        train, test, classes = _folder(folder, size or 128)
    train, test = (Split(s.images.to(target), s.labels.to(target)) for s in (train, test))
    return ImageData(Path(name).name, train, test, classes)


def _download(name: str, root: Path) -> None:
    from torchvision.datasets import CIFAR10, Imagenette

    CIFAR10(root, download=True) if name == "cifar10" else Imagenette(root, size="160px", download=True)


def find(name: str, root: Path) -> Path:
    """The folder of "imagenette", or of "cifar10" with the md5 of each file checked."""
    folder = next((root / f for f in FOLDERS[name] if (root / f).is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"no {name} in the folder {str(root)!r}, which should hold {' or '.join(FOLDERS[name])}. Three ways out: "
            f'load("{name}", download=True) or `python -m sppkit data {name} --download`; root=... for the folder '
            'that holds it; "digits", which needs no files'
        )
    if name == "cifar10":
        from torchvision.datasets import CIFAR10

        for file, md5 in [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]:
            data = (folder / file).read_bytes() if (folder / file).exists() else b""
            if hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
                found = f"{str(folder / file)!r} is missing or damaged: {len(data)} bytes, not of md5 {md5}"
                raise ValueError(f'{found}; call load("cifar10", download=True) or copy it again')
    return folder


def _folder(folder: Path, size: int) -> tuple[Split, Split, tuple[str, ...]]:
    if not (folder / "train").is_dir():
        images, labels, classes = _read(folder, size, least=2)
        return *_split(images, labels), classes
    held_out = folder / ("val" if (folder / "val").is_dir() else "test")
    *train, classes = _read(folder / "train", size)
    *test, test_classes = _read(held_out, size)
    if odd := sorted({*classes} ^ {*test_classes}):
        raise ValueError(f"{str(folder)!r}: the classes of train/ and {held_out.name}/ differ: {odd}")
    return Split(*train), Split(*test), classes


def _read(folder: Path, size: int, *, least: int = 1) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """images (N, size, size, 3), labels (N,) and class names; every class must have `least` images."""
    if not folder.is_dir():
        ways = 'it should hold train/ and val/ (or test/), or class folders; or use "digits" or "cifar10"'
        raise FileNotFoundError(f"there is no folder {str(folder.absolute())!r}; {ways}")
    folders = sorted(folder.glob("[!.]*/"))
    members = {f.name: sorted(p for p in f.rglob("[!.]*") if p.suffix.lower() in SUFFIXES) for f in folders}
    few = {name: len(paths) for name, paths in members.items() if len(paths) < least}
    if len(members) < 2 or few:
        found = f"{str(folder)!r} holds {len(members)} class folders, of these with too few images: {few}"
        raise ValueError(f"{found}; it needs two or more, each with {least} or more ({', '.join(SUFFIXES)})")
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        images = np.stack([*pool.map(partial(_decode, size=size), chain(*members.values()))])
    counts = torch.tensor([len(paths) for paths in members.values()])
    return torch.from_numpy(images), torch.arange(len(counts)).repeat_interleave(counts), tuple(members)


def _decode(path: Path, size: int) -> np.ndarray:
    """(size, size, 3) uint8: the shorter side resized to `size`, the centre of the longer one kept."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # a conversion would cut off what is above 255
                raise ValueError(f"its mode {image.mode} has more than 8 bits a channel")
            # By way of RGBA, because a palette may hold transparency, which RGB cannot
            rgb = (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
        return np.asarray(ImageOps.fit(rgb, (size, size), Image.Resampling.BILINEAR))
    except Exception as error:  # Pillow's decoders raise many kinds of exception on a damaged file
        raise ValueError(f"cannot read the image {str(path)!r} ({error}); replace or remove it") from error


def _resize(images: Tensor, size: int) -> Tensor:
    """(N, H, H, 3) uint8 -> (N, size, size, 3), bilinear, antialiased when it shrinks."""
    resize = partial(F.interpolate, size=(size, size), mode="bilinear", antialias=size < images.shape[1])
    parts = [resize(x.float()).round().byte() for x in images.permute(0, 3, 1, 2).split(1000)]  # float32 is large
    return torch.cat(parts).permute(0, 2, 3, 1).contiguous()  # (N, size, size, 3)


def _split(images: Tensor, labels: Tensor) -> tuple[Split, Split]:
    """A fixed split, the same on every machine: of each class a fifth, and at least one, goes to the test."""
    generator, test = torch.Generator().manual_seed(0), torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]  # (members,)
        order = torch.randperm(len(members), generator=generator)
        test[members[order[: max(1, round(len(members) / 5))]]] = True
    return Split(images[~test], labels[~test]), Split(images[test], labels[test])
