"""VGGs with BatchNorm for small images and for event frames (Simonyan & Zisserman 2015, configurations A, B and D).

VGG-11 has one linear layer. VGG-13 and VGG-16 have the three of the original, as in QCFS (Bu et al. 2022) and the
paper; their tensors are named as in torchvision. VGG-DVS is the VGGSNN of Deng et al. (2022), with average pools.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from .initialisation import he_normal

Stages = Sequence[Sequence[int]]

ELEVEN: Stages = ((64,), (128,), (256, 256), (512, 512), (512, 512))
THIRTEEN: Stages = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))
SIXTEEN: Stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
DVS: Stages = ((64, 128), (256, 256), (512, 512), (512, 512))


class VGG(nn.Module):
    """Stages of 3×3 convolutions with a 2×2 pool behind each, then linear layers. [N, inputs, H, W] → [N, classes].

    Args:
        stages: channels of each stage's convolutions.
        classifier: from the flattened maps to the logits.
        pool: type of the pools.
        inputs: channels of the images.
        bias: of the convolutions; BatchNorm makes it idle, and published weights have it or not.
    """

    def __init__(
        self,
        stages: Stages,
        classifier: nn.Module,
        pool: Callable[[int], nn.Module] = nn.MaxPool2d,
        inputs: int = 3,
        bias: bool = True,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage in stages:
            for channels in stage:
                layers += [nn.Conv2d(inputs, channels, 3, padding=1, bias=bias), nn.BatchNorm2d(channels), nn.ReLU()]
                inputs = channels
            layers.append(pool(2))
        self.features = nn.Sequential(*layers)
        self.classifier = classifier
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.classifier(self.features(x).flatten(1))


def vgg11(num_classes: int = 10) -> nn.Module:
    """Return VGG-11 for 32×32 images."""
    return VGG(ELEVEN, nn.Linear(512, num_classes), bias=False)


def vgg13(num_classes: int = 10, side: int = 32) -> nn.Module:
    """Return VGG-13; ``side=64`` for Tiny-ImageNet."""
    return VGG(THIRTEEN, _three_layers(512 * (side // 32) ** 2, num_classes))


def vgg16(num_classes: int = 10) -> nn.Module:
    """Return VGG-16 for 32×32 images."""
    return VGG(SIXTEEN, _three_layers(512, num_classes))


def vgg_dvs(num_classes: int = 10) -> nn.Module:
    """Return VGG-DVS for event frames, [N, 2, 48, 48] → [N, classes].

    The paper's code gives each class ten outputs and takes their mean, which is again a linear layer: this one.
    """
    return VGG(DVS, nn.Linear(512 * 3 * 3, num_classes), nn.AvgPool2d, inputs=2)


def _three_layers(features: int, num_classes: int) -> nn.Sequential:
    """Two hidden layers of 4,096; dropout keeps its place in the names and is off, as in the paper's code."""
    first = (nn.Linear(features, 4096), nn.ReLU(), nn.Dropout(0.0))
    second = (nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(0.0))
    return nn.Sequential(*first, *second, nn.Linear(4096, num_classes))
