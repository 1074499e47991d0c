"""CIFARNet: six convolutions of one width, two linear layers and a vote (Fang et al. 2021, PLIF; the paper's code)."""

from __future__ import annotations

from torch import Tensor, nn

VOTES = 10


class CIFARNet(nn.Module):
    """3×3 convolutions of 256 channels with a max-pool behind every third; ten outputs vote for each class.

    [N, 3, 32, 32] → [N, classes], which are means of activations and so never negative.
    """

    def __init__(self, num_classes: int = 10, channels: int = 256) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(6):
            inputs = channels if index else 3
            layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if index in (2, 5) else []
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Sequential(nn.Dropout(0.5), nn.Linear(channels * 8 * 8, 2048), nn.ReLU())
        self.votes = nn.Sequential(nn.Dropout(0.5), nn.Linear(2048, VOTES * num_classes), nn.ReLU())
        self.mean = nn.AvgPool1d(VOTES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean vote for each class."""
        votes = self.votes(self.hidden(self.features(x).flatten(1)))
        return self.mean(votes.unsqueeze(1)).flatten(1)
