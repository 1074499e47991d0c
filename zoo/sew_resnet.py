"""SEW-ResNet for ImageNet (Fang et al. 2021): the shortcut joins behind the last neuron of a block, by addition.

Tensors are named as in the published checkpoints: each convolution and its BatchNorm are a pair (``layer1.0.conv1.0``).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .initialisation import he_normal

EIGHTEEN = (2, 2, 2, 2)
THIRTY_FOUR = (3, 4, 6, 3)


def normalised(inputs: int, channels: int, size: int, stride: int) -> nn.Sequential:
    """Return a convolution without bias and its BatchNorm."""
    conv = nn.Conv2d(inputs, channels, size, stride=stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


class SEWBlock(nn.Module):
    """[N, inputs, H, W] → [N, channels, H/stride, W/stride]. Both summands are spikes after conversion."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = normalised(inputs, channels, 3, stride)
        self.sn1 = nn.ReLU()
        self.conv2 = normalised(channels, channels, 3, 1)
        self.sn2 = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != channels:
            self.downsample = nn.Sequential(normalised(inputs, channels, 1, stride), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(f(x)) + shortcut(x)."""
        return self.sn2(self.conv2(self.sn1(self.conv1(x)))) + self.downsample(x)


class SEWResNet(nn.Module):
    """Stem, max-pool, four stages of SEW blocks, mean, linear. [N, 3, H, W] → [N, classes]."""

    def __init__(self, blocks: Sequence[int], num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.sn1 = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(64, 64, blocks[0], 1)
        self.layer2 = _stage(64, 128, blocks[1], 2)
        self.layer3 = _stage(128, 256, blocks[2], 2)
        self.layer4 = _stage(256, 512, blocks[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, num_classes)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.maxpool(self.sn1(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def _stage(inputs: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (SEWBlock(channels, channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(SEWBlock(inputs, channels, stride), *rest)


def sew_resnet18(num_classes: int = 1000) -> nn.Module:
    """Return SEW-ResNet-18."""
    return SEWResNet(EIGHTEEN, num_classes)


def sew_resnet34(num_classes: int = 1000) -> nn.Module:
    """Return SEW-ResNet-34."""
    return SEWResNet(THIRTY_FOUR, num_classes)
