"""Batches (B, 3, H, W) of the images (N, H, W, 3) on the device: cropped, mirrored and normalised."""

import hashlib
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from training.data import Split


@dataclass(frozen=True, eq=False)
class Normalise:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), `(x - mean) / std` in raw units, 0..255."""

    mean: Tensor  # like `std`, broadcasts to (3, H, W)
    std: Tensor

    @classmethod
    def of(cls, split: Split, kind: str) -> "Normalise":
        """Of kind "channel" (mean and std of each channel) or "mean_image" (the mean image, std 1)."""
        if kind not in ("channel", "mean_image"):
            raise ValueError(f'kind={kind!r} must be "channel" or "mean_image"')
        if kind == "mean_image":
            mean = split.images.sum(0).permute(2, 0, 1) / len(split)  # (3, H, W)
            return cls(mean, torch.ones_like(mean[:, :1, :1]))
        std, mean = torch.std_mean(split.images.float(), (0, 1, 2), correction=0)  # (3,) each
        return cls(mean.view(3, 1, 1), torch.where(std > 0, std, 1).view(3, 1, 1))  # a constant one is only centred

    def __call__(self, images: Tensor) -> Tensor:
        return (images.permute(0, 3, 1, 2).float() - self.mean) / self.std  # (B, 3, H, W)


@dataclass(eq=False)
class Batches:
    """Batches with a random crop and mirror, made to be captured in a CUDA graph.

    An epoch follows from (seed, epoch) alone, the same on every device; samples left over sit it out. All tensors stay
    where they are: `start_epoch` and `select` copy into them, `batch` only computes on the device.
    """

    split: Split
    _: KW_ONLY
    batch_size: int
    seed: int
    normalise: Normalise
    crop_padding: int = 0  # pixels of the mean colour added on each side before the crop
    flip: bool = False

    def __post_init__(self) -> None:
        (count, height, width, _), device = self.split.images.shape, self.split.images.device
        if not 1 <= self.batch_size <= count:
            raise ValueError(f"batch_size={self.batch_size} must lie in 1..{count}, the number of samples")
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding={self.crop_padding} must be 0 or more pixels")
        self.steps_per_epoch = count // self.batch_size
        colour = self.normalise.mean.flatten(1).mean(1).round().byte()  # (3,): what becomes 0
        border = (0, 0, *[self.crop_padding] * 4)
        self.padded = F.pad(self.split.images - colour, border) + colour if self.crop_padding else self.split.images
        self.rows, self.cols = torch.arange(height, device=device), torch.arange(width, device=device)
        self.order = torch.arange(count, device=device)
        self.offsets = torch.zeros(count, 2, dtype=torch.int64, device=device)  # of a crop: row, column
        self.flips = torch.zeros(count, dtype=torch.bool, device=device)
        self.index = self.order[: self.batch_size].clone()
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Draw the epoch's order (N,), crop offsets (N, 2) and flips (N,), and select its first batch."""
        digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        self.order.copy_(torch.randperm(len(self.split), generator=generator))
        self.offsets.copy_(torch.randint(2 * self.crop_padding + 1, self.offsets.shape, generator=generator))
        self.flips.copy_(torch.randint(1 + self.flip, self.flips.shape, generator=generator))
        self.select(0)

    def select(self, step: int) -> "Batches":
        """Make `batch` give the batch `step` of the epoch, 0 <= step < steps_per_epoch; returns self."""
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step={step} must lie in 0..{self.steps_per_epoch - 1}; then start an epoch")
        self.index.copy_(self.order[step * self.batch_size : (step + 1) * self.batch_size])
        return self

    def batch(self) -> tuple[Tensor, Tensor]:
        """x (B, 3, H, W) float32, normalised, and y (B,) of the selected samples, on the device."""
        if not (self.flip or self.crop_padding):
            return self.normalise(self.split.images.index_select(0, self.index)), self.split.labels[self.index]
        top, left = self.offsets[self.index].split(1, 1)  # (B, 1) each
        cols = torch.where(self.flips[self.index, None], self.cols.flip(0), self.cols)  # (B, W)
        rows, cols = self.rows + top, cols + left  # (B, H), (B, W)
        x = self.padded[self.index[:, None, None], rows[:, :, None], cols[:, None, :]]  # (B, H, W, 3)
        return self.normalise(x), self.split.labels[self.index]


def evaluation(split: Split, normalise: Normalise, batch_size: int = 1000) -> Iterator[tuple[Tensor, Tensor]]:
    """Every sample once, in order: x (B, 3, H, W) float32, normalised, and y (B,); the last may be short."""
    for images, labels in zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True):
        yield normalise(images), labels
