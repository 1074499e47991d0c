"""Surrogate gradients: what stands for the derivative of the spike in the backward pass.

A surrogate is a frozen value. Called with the normalised distance to threshold u = (m_S − θ)/θ it gives
ds/du; its ``primitive`` is the smooth step whose derivative that is, which gradient checks put in the
place of the Heaviside step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Surrogate(Protocol):
    """What every surrogate offers. u = (m_S − θ)/θ has no unit."""

    def __call__(self, u: Tensor) -> Tensor:
        """Return ds/du at ``u``, of the same shape."""
        ...

    def primitive(self, u: Tensor) -> Tensor:
        """Return the smooth step S(u) with S' = ds/du, of the same shape."""
        ...


@dataclass(frozen=True)
class Triangle:
    """ds/du = max(0, 1 − |u|/γ)/γ, the paper's shape with its width scaled by the threshold (ours).

    >>> Triangle(gamma=1.0)(torch.tensor([-1.0, -0.5, 0.0, 2.0]))
    tensor([0.0000, 0.5000, 1.0000, 0.0000])
    """

    gamma: float = 1.0

    def __call__(self, u: Tensor) -> Tensor:
        """Return ds/du at ``u``."""
        return (self.gamma - u.abs()).relu() * self.gamma**-2

    def primitive(self, u: Tensor) -> Tensor:
        """Return the integral of the triangle, from 0 to 1."""
        z = (u / self.gamma).clamp(-1, 1)
        return 0.5 + z - 0.5 * z * z.abs()


@dataclass(frozen=True)
class Rectangle:
    """ds/du = 1/(2γ) for |u| < γ, else 0 (Wu et al. 2018, STBP)."""

    gamma: float = 0.5

    def __call__(self, u: Tensor) -> Tensor:
        """Return ds/du at ``u``."""
        return (u.abs() < self.gamma).to(u.dtype) / (2 * self.gamma)

    def primitive(self, u: Tensor) -> Tensor:
        """Return the ramp from 0 to 1."""
        return (0.5 + u / (2 * self.gamma)).clamp(0, 1)


@dataclass(frozen=True)
class Sigmoid:
    """ds/du = α σ(αu)(1 − σ(αu)), σ the logistic function."""

    alpha: float = 4.0

    def __call__(self, u: Tensor) -> Tensor:
        """Return ds/du at ``u``."""
        s = torch.sigmoid(self.alpha * u)
        return self.alpha * s * (1 - s)

    def primitive(self, u: Tensor) -> Tensor:
        """Return σ(αu)."""
        return torch.sigmoid(self.alpha * u)


@dataclass(frozen=True)
class Arctan:
    """ds/du = (α/2) / (1 + (π α u/2)²) (Fang et al. 2021)."""

    alpha: float = 2.0

    def __call__(self, u: Tensor) -> Tensor:
        """Return ds/du at ``u``."""
        return self.alpha / 2 / (1 + (math.pi / 2 * self.alpha * u) ** 2)

    def primitive(self, u: Tensor) -> Tensor:
        """Return arctan(π α u/2)/π + 1/2."""
        return torch.atan(math.pi / 2 * self.alpha * u) / math.pi + 0.5
