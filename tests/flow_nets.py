"""Networks whose Python control flow defeats symbolic tracing, each in its own way."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE = (4, 8, 8)


class Base(nn.Module):
    """[N, 4, 8, 8] → [N, 3]; each case has a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.act = nn.ReLU()
        self.fc = nn.Linear(8, 3)

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class AsksBatch(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.stem(x)))
        if x.dim() != 4 or x.shape[0] < 1:
            raise ValueError("expected [N, C, H, W]")
        return self.head(x)


class PoolsLargeImages(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        while x.size(2) > 2:
            x = F.max_pool2d(x, 2)
        return self.head(x)


class LoopsOverShape(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        for index in range(x.shape[1] // 4):
            x = self.act(self.blocks[index](x))
        return self.head(x)


class Asserts(Base):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 4, f"expected 4 channels, got {x.shape[1]}"
        return self.head(self.act(self.bn(self.stem(x))))


class Chunks(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        parts = [self.act(part) for part in x.chunk(2, dim=1)]
        return self.head(torch.cat([*parts[::-1]], dim=1))


def rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """Like einops, for one pattern: it asks for the type and reads the sizes as numbers."""
    if type(x) is not Tensor and not isinstance(x, nn.Parameter):
        raise TypeError(f"tensor type unknown to rearrange: {type(x)}")
    assert pattern == "b (c r) h w -> b c (r h) w"
    b, c, h, w = x.shape
    return x.reshape(b, c // sizes["r"], sizes["r"], h, w).reshape(b, c // sizes["r"], sizes["r"] * h, w)


class LikeEinops(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = rearrange(x, "b (c r) h w -> b c (r h) w", r=math.prod([1, 1]))
        return self.head(x)


class AnyNumberOfInputs(Base):
    def forward(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        return self.head(self.act(self.stem(x)))


class FirstOfInputs(Base):
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.head(self.act(self.stem(inputs[0])))


class ChecksType(Base):
    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a tensor, got {type(x).__name__}")
        return self.head(self.act(self.stem(x)))


class AsksType(Base):
    """Symbolic tracing gives a graph of it without an error, and a wrong one."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.act(x)) if isinstance(x, Tensor) else self.head(x) * 2


class AsksAttribute(Base):
    """The same, by an attribute that every symbolic value has."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.tensors if hasattr(x, "tensors") else x
        return self.head(self.act(self.stem(x)))


class Options(Base):
    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        x = self.act(self.stem(x)) * scale
        return self.head(x if mask is None else x * mask)


class Length(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.stem(x)).mean((2, 3)).view(len(x), -1))


class Tolerates(Base):
    """Symbolic tracing's own error is taken for a missing feature."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        try:
            strong = bool(x.shape[1] > 4)
        except Exception:
            strong = False
        return self.head(self.act(x) if strong else x)


FLOW = [
    AsksBatch, PoolsLargeImages, LoopsOverShape, Asserts, Chunks, LikeEinops, AnyNumberOfInputs, FirstOfInputs,
    ChecksType, AsksType, AsksAttribute, Length, Tolerates,
]  # fmt: skip


class OnValues(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        if x.sum() > 0:
            x = x * 2
        return self.head(x)


class OnValuesOnly(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        return self.head(x[x > 0].reshape(1, -1).float()) if x.max().item() > 3 else self.head(x)
