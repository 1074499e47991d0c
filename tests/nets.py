"""Small networks that tests convert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def two_layers(inputs: int = 4, hidden: int = 8, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def two_layer_batches() -> list[tuple[Tensor, Tensor]]:
    """Four batches that ``two_layers()`` can be trained on."""
    return [(torch.rand(16, 4), torch.randint(3, (16,))) for _ in range(4)]


def conv_net(channels: int = 2) -> nn.Sequential:
    """[N, channels, 8, 8] → [N, 3], with a max-pool, BatchNorm and dropout."""
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 3),
    )  # fmt: skip


def _lively(net: nn.Module) -> None:
    """Weights that keep activations above zero through many layers."""
    for parameter in net.parameters():
        nn.init.uniform_(parameter, -0.2, 0.6)


class Spellings(nn.Module):
    """Nine ways to write a ReLU, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))
        self.act = nn.ReLU()
        self.act_in_place = nn.ReLU(inplace=True)
        _lively(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.layers[0](x))
        x = self.act_in_place(self.layers[1](x))
        x = F.relu(self.layers[2](x))
        x = F.relu(self.layers[3](x), inplace=True)
        x = torch.relu(self.layers[4](x))
        x = self.layers[5](x).relu()
        x = self.layers[6](x).relu_()
        x = self.layers[7](x).clamp(min=0)
        return torch.clamp_min(self.layers[8](x), 0)


class Reused(nn.Module):
    """One ReLU module called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)
        _lively(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.c(self.relu(self.b(self.relu(self.a(x))))))


class Dropped(nn.Module):
    """In-place ReLUs whose results are not bound."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.act(y)
        z = y + self.a(y)
        F.relu(z, inplace=True)
        w = self.a(z)
        w.relu_()
        w += z
        return self.b(w)


class Residual(nn.Module):
    """Residual add, concat, pools, a constant branch that meets a timed one, and a hoisted batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(8, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = x.size(0)
        current = self.stem(x)
        out = F.relu(current)
        out = F.relu(self.bn1(self.conv1(out)) + current)
        out = torch.cat([out, F.relu(current * 0.5)], dim=1)
        out = F.relu(self.conv2(out))
        out = F.avg_pool2d(out, 2)
        return self.fc(out.view(n, -1))


class Deep(nn.Module):
    """Residual blocks with BatchNorm on [N, 2, 8, 8], random but lively. [N, 3] out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(6))
        self.fc = nn.Linear(8, 3)
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 1.0)
            nn.init.uniform_(norm.bias, -0.3, 0.3)
            nn.init.uniform_(norm.running_var, 0.05, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for index in range(0, 6, 2):
            out = F.relu(self.norms[index](self.convs[index](x)))
            x = F.relu(self.norms[index + 1](self.convs[index + 1](out)) + x)
        return self.fc(x.mean((2, 3)))


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks hold equal tensors."""
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
