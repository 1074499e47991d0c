"""ResNets for 32×32 images: ResNet-20 and its deeper kin, ResNet-18, ResNet-19 and the wide ResNet-19.

Where a block changes its shape, the shortcut is either free of parameters (option A of He et al. 2016, section 4.2:
every second pixel, new channels of zeros) or a 1×1 convolution with BatchNorm. Module names follow the widely shared
PyTorch checkpoints of these families (``layer1.0.conv1``, …). What is not He et al.'s is the paper's code's: ResNet-19
(Zheng et al. 2021) begins with 64 channels there, and ends in two linear layers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ..qcfs import QCFS
from .initialisation import he_normal

DEPTHS = (20, 32, 44, 56)
NINETEEN = ((128, 3), (256, 3), (512, 2))

Shortcut = Callable[[int, int, int], nn.Module]
Activation = Callable[[int], nn.Module]


def relu(channels: int) -> nn.Module:
    """Return a ReLU."""
    return nn.ReLU()


def qcfs(channels: int) -> nn.Module:
    """Return QCFS with L = 4 and a θ for each channel, 4 at the start."""
    return QCFS(levels=4, v_threshold=4.0, channels=channels)


class PaddedShortcut(nn.Module):
    """[N, C, H, W] → [N, C + 2·extra, ⌈H/2⌉, ⌈W/2⌉]: every second pixel, ``extra`` zero channels on each side."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        """Return the strided, padded input."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))


def padded(inputs: int, channels: int, stride: int) -> nn.Module:
    """Return a shortcut without parameters, for a stride of 2."""
    return PaddedShortcut((channels - inputs) // 2)


def projected(inputs: int, channels: int, stride: int) -> nn.Module:
    """Return a 1×1 convolution with BatchNorm."""
    return nn.Sequential(nn.Conv2d(inputs, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut. [N, inputs, H, W] → [N, channels, H/stride, W/stride]."""

    def __init__(
        self, inputs: int, channels: int, stride: int, shortcut: Shortcut, activation: Activation = relu
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu1 = activation(channels)
        self.relu2 = activation(channels)
        same = stride == 1 and inputs == channels
        self.shortcut = nn.Identity() if same else shortcut(inputs, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(shortcut(x) + f(x))."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))


class StagedResNet(nn.Module):
    """A stem, stages of blocks, a pool and linear layers. [N, inputs, H, W] → [N, classes].

    Args:
        stem: channels of the first convolution.
        stages: (channels, blocks) of each; every stage but the first halves the resolution.
        shortcut: where a block changes its shape.
        pool: from the last stage's maps to what is flattened.
        linear: from that to the logits.
        inputs: channels of the images.
        activation: makes one for so many channels.
    """

    def __init__(
        self,
        stem: int,
        stages: Sequence[tuple[int, int]],
        shortcut: Shortcut,
        pool: nn.Module,
        linear: nn.Module,
        inputs: int = 3,
        activation: Activation = relu,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = activation(stem)
        self.stages = tuple(f"layer{index}" for index in range(1, len(stages) + 1))
        before = stem
        for name, (channels, blocks) in zip(self.stages, stages, strict=True):
            first = BasicBlock(before, channels, 1 if name == "layer1" else 2, shortcut, activation)
            rest = (BasicBlock(channels, channels, 1, shortcut, activation) for _ in range(blocks - 1))
            self.add_module(name, nn.Sequential(first, *rest))
            before = channels
        self.pool = pool
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.linear(self.pool(x).flatten(1))


class CifarResNet(StagedResNet):
    """Three stages of (depth − 2)/6 blocks with 16, 32, 64 channels. [N, 3, 32, 32] → [N, classes]."""

    def __init__(
        self, depth: int = 20, num_classes: int = 10, shortcut: Shortcut = padded, activation: Activation = relu
    ) -> None:
        stages = [(channels, (depth - 2) // 6) for channels in (16, 32, 64)]
        pool, linear = nn.AdaptiveAvgPool2d(1), nn.Linear(64, num_classes)
        super().__init__(16, stages, shortcut, pool, linear, activation=activation)


def resnet20(num_classes: int = 10, activation: Activation = relu) -> nn.Module:
    """Return ResNet-20 with projections, the one of QCFS and of the paper."""
    return CifarResNet(20, num_classes, projected, activation)


def resnet18(num_classes: int = 10) -> nn.Module:
    """Return ResNet-18 with a 3×3 stem and no max-pool."""
    stages = ((64, 2), (128, 2), (256, 2), (512, 2))
    return StagedResNet(64, stages, projected, nn.AdaptiveAvgPool2d(1), nn.Linear(512, num_classes))


def resnet19(num_classes: int = 10, inputs: int = 3) -> nn.Module:
    """Return ResNet-19; with ``inputs=2`` for event frames."""
    linear = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, num_classes))
    return StagedResNet(64, NINETEEN, projected, nn.AdaptiveAvgPool2d(1), linear, inputs)


def wide_resnet19(num_classes: int = 10) -> nn.Module:
    """Return the wide ResNet-19: 128 channels from the stem on, and 4×4 pixels of the last maps are kept."""
    dropout1, dropout2 = nn.Dropout(0.25), nn.Dropout(0.25)
    linear1, linear2 = nn.Linear(512 * 4 * 4, 256), nn.Linear(256, num_classes)
    linear = nn.Sequential(OrderedDict(dropout1=dropout1, linear1=linear1, dropout2=dropout2, linear2=linear2))
    model = StagedResNet(128, NINETEEN, projected, nn.AvgPool2d(2), linear)
    he_normal(model)
    return model
