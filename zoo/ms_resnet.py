"""MS-ResNet for ImageNet (Hu et al. 2021): neurons stand before the convolutions, so the shortcut carries no spikes.

As in the paper's code, a max-pool follows the stem and no neuron the last block; Hu et al. halve the resolution by a
strided first stage instead, and have one there.
"""

from __future__ import annotations

from torch import Tensor, nn

from .initialisation import he_normal

THIRTY_FOUR = ((64, 3), (128, 4), (256, 6), (512, 3))


class MSBlock(nn.Module):
    """[N, inputs, H, W] → [N, channels, H/stride, W/stride]: x + f(x), nothing behind the sum."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(inputs, channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != channels:
            conv = nn.Conv2d(inputs, channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return f(x) + shortcut(x)."""
        return self.residual(x) + self.shortcut(x)


class MSResNet34(nn.Module):
    """Stem, max-pool, sixteen blocks in four stages, mean, linear. [N, 3, H, W] → [N, classes]."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        conv = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(64), nn.MaxPool2d(3, stride=2, padding=1))
        blocks: list[nn.Module] = []
        before = 64
        for channels, count in THIRTY_FOUR:
            for index in range(count):
                stride = 2 if index == 0 and channels != 64 else 1
                blocks.append(MSBlock(before, channels, stride))
                before = channels
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, num_classes)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.fc(self.pool(self.blocks(self.stem(x))).flatten(1))
