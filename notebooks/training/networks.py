"""The networks of both papers, for 32-pixel images, and torchvision's for larger ones; `create(name)` makes each."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sppkit import state

VGG16 = (64, 64, 0, 128, 128, 0, *(256, 256, 256, 0), *(512, 512, 512, 0), *(512, 512, 512, 0))


class WithinChannelLRN(nn.Module):
    """Caffe's response normalisation inside a channel: x (1 + alpha mean(x²))^-beta, over 3x3 with zero padding."""

    channelwise = True  # `compact.trace` follows channels through it

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 5e-5 * F.avg_pool2d(x * x, 3, stride=1, padding=1)) ** -0.75  # alpha 5e-5, beta 0.75


class ConvNet(nn.Module):
    """The SPP paper's ConvNet, Caffe's `cifar10_full`; for raw pixels minus the mean image, stalls on unit scale."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 32, 5, padding=2), nn.Conv2d(32, 32, 5, padding=2)
        self.conv3 = nn.Conv2d(32, 64, 5, padding=2)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.pool2, self.pool3 = nn.AvgPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(3, 2, ceil_mode=True)
        self.norm1, self.norm2 = WithinChannelLRN(), WithinChannelLRN()
        self.linear = nn.Linear(64 * 4 * 4, classes)
        for name, parameter in self.named_parameters():
            deviation = 1e-4 if name == "conv1.weight" else 0.01
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=deviation)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(F.relu(self.pool1(self.conv1(x))))  # (B, 32, 16, 16)
        x = self.norm2(self.pool2(F.relu(self.conv2(x))))  # (B, 32, 8, 8)
        x = self.pool3(F.relu(self.conv3(x)))  # (B, 64, 4, 4)
        return self.linear(x.flatten(1))

    @property
    def multipliers(self) -> dict[str, tuple[float, float]]:
        """Per parameter: factors on the learning rate and on the weight decay, from the authors' prototxt."""
        return {"conv1.bias": (2, 1), "conv2.bias": (2, 1), "linear.weight": (1, 250), "linear.bias": (2, 0)}


class PaddedShortcut(nn.Module):
    """Option A: every second pixel, and zero channels up to the new width; no parameters."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, CIFAR form)."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs and shortcut == "projection":
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        elif inputs != outputs:
            self.shortcut = PaddedShortcut(outputs - inputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet(depth: int, *, classes: int = 10, shortcut: str = "A") -> nn.Sequential:
    """ResNet for 32-pixel images: one convolution, three stages of (depth - 2) / 6 blocks, widths 16, 32, 64."""
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth={depth} must be 6n + 2, such as 20 or 56")
    if shortcut not in ("A", "projection"):
        raise ValueError(f"shortcut={shortcut!r} must be 'A' or 'projection'")
    widths = [width for width in (16, 32, 64) for _ in range((depth - 2) // 6)]
    blocks = [Block(n, width, width // n, shortcut) for n, width in pairwise([16, *widths])]
    stem = {"conv1": nn.Conv2d(3, 16, 3, 1, 1, bias=False), "bn1": nn.BatchNorm2d(16), "relu": nn.ReLU()}
    head = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "linear": nn.Linear(64, classes)}
    return nn.Sequential(OrderedDict(stem | {"blocks": nn.Sequential(*blocks)} | head)).apply(_initialise)


def vgg_features(widths: Sequence[int], *, batch_norm: bool = True) -> nn.Sequential:
    """Convolutions of 3x3 with so many filters, each with a ReLU; 0 halves the map. Numbered as torchvision's VGG."""
    layers, inputs = list[nn.Module](), 3
    for width in widths:
        if width:
            norm = [nn.BatchNorm2d(width)] if batch_norm else []
            layers += [nn.Conv2d(inputs, width, 3, padding=1), *norm, nn.ReLU(inplace=True)]
        else:
            layers.append(nn.MaxPool2d(2, 2))
        inputs = width or inputs
    return nn.Sequential(*layers)


def vgg16(*, classes: int = 10, batch_norm: bool = True) -> nn.Sequential:
    """VGG-16 for 32-pixel images: its 13 convolutions and five poolings, one linear layer."""
    features = vgg_features(VGG16, batch_norm=batch_norm)
    parts = {"features": features, "flatten": nn.Flatten(), "linear": nn.Linear(512, classes)}
    return nn.Sequential(OrderedDict(parts)).apply(_initialise)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _of_torchvision(name: str) -> Callable[[int], nn.Module]:
    def make(classes: int) -> nn.Module:
        from torchvision.models import get_model  # here, because its import takes seconds

        network: nn.Module = get_model(name, num_classes=classes)
        return network

    return make


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "convnet": ConvNet,
    "resnet20": lambda classes: resnet(20, classes=classes),
    "resnet20-projection": lambda classes: resnet(20, classes=classes, shortcut="projection"),
    "resnet56": lambda classes: resnet(56, classes=classes),
    "resnet56-projection": lambda classes: resnet(56, classes=classes, shortcut="projection"),
    "vgg16": lambda classes: vgg16(classes=classes, batch_norm=False),
    "vgg16-bn": lambda classes: vgg16(classes=classes),
    **{f"torchvision/{name}": _of_torchvision(name) for name in ("alexnet", "vgg16", "resnet50")},
}


def create(name: str, *, classes: int = 10, seed: int = 0) -> nn.Module:
    """A network with fresh weights drawn from `seed`, channels last; torch's global generator is left as it was.

    >>> sum(p.numel() for p in create("convnet").parameters())
    89578
    """
    if name not in NETWORKS:
        raise ValueError(f"network {name!r} is not known; choose one of {', '.join(NETWORKS)}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
        network = NETWORKS[name](classes)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def save(network: nn.Module, path: str | Path, /, **description: Any) -> None:
    """Save the state dict of `network`; `description` says what a reader needs to build the same one."""
    state.save(path, network.state_dict(), {**description, "kind": "network"})


def load(network: nn.Module, path: str | Path) -> dict[str, Any]:
    """Load a state dict into `network`, return its description; raises as `state.load`, and for another network."""
    tensors, description = state.load(path, kind="network")
    theirs, ours = ({k: tuple(t.shape) for k, t in d.items()} for d in (tensors, network.state_dict()))
    if different := [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]:
        name, count = different[0], len(different)
        shapes = f"{theirs.get(name, 'absent')} in the file and {ours.get(name, 'absent')} in the network"
        found = f"{str(path)!r} is of another network: {name!r} is {shapes} ({count} names differ)"
        raise ValueError(f"{found}; build the network of the file's description, {description}")
    network.load_state_dict(tensors)
    return description
