"""VGG-11 with BatchNorm for 32×32 images: configuration A of Simonyan & Zisserman (2015), with one linear layer."""

from __future__ import annotations

from torch import Tensor, nn

CHANNELS = (64, 128, 256, 256, 512, 512, 512, 512)
POOLED = (0, 1, 3, 5, 7)


class CifarVGG11(nn.Module):
    """Eight 3×3 convolutions, five of them with a max-pool behind. [N, 3, 32, 32] → [N, classes]."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for index, channels in enumerate(CHANNELS):
            layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if index in POOLED else []
            before = channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(before, num_classes)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.classifier(self.features(x).flatten(1))
