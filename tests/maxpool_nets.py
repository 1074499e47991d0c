"""A network with a max-pool behind spikes, and its conversion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmh.calibrate import Max
from lmh.convert import Conversion, convert
from lmh.convert.maxpool import MaxPool


def second_layer(pool: nn.Module | None = None) -> nn.Sequential:
    """[N, 1, 8, 8] → [N, 3]; the pool is behind the second activation, whose currents vary in time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), pool or nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3),
    ).eval()  # fmt: skip


def converted(maxpool: MaxPool, timesteps: int = 64, **options: Any) -> tuple[nn.Module, Conversion, Tensor]:
    ann, x = second_layer(), torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ann(x)
    return ann, convert(ann, timesteps, data=x, calibration=Max(), maxpool=maxpool, **options), x
