"""Surrogate gradients: what stands for the derivative of the spike in the backward pass.

A surrogate is a frozen value. Called with the normalised distance to threshold u = (m_S − θ)/θ it gives
ds/du; its ``primitive`` is the smooth step whose derivative that is, which gradient checks put in the
place of the Heaviside step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from .errors import ArgumentError


class Surrogate(Protocol):
    """What every surrogate offers. u = (m_S − θ)/θ has no unit."""

    def __call__(self, u: Tensor) -> Tensor:
        """Return ds/du at ``u``, of the same shape."""
        ...

    def primitive(self, u: Tensor) -> Tensor:
        """Return the smooth step S(u) with S' = ds/du, of the same shape."""
        ...


class _Positive:
    """Numbers of a surrogate, all finite and above 0."""

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                name = type(self).__name__
                raise ArgumentError(
                    f"{name}: {item.name} is {value!r}; expected a finite number above 0. Pass {name}({item.name}="
                    f"{item.default}), say."
                )


@dataclass(frozen=True)
class Triangle(_Positive):
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
class Rectangle(_Positive):
    """ds/du = 1/(2γ) for |u| < γ, else 0 (Wu et al. 2018, STBP)."""

    gamma: float = 0.5

    def __call__(self, u: Tensor) -> Tensor:
        """Return ds/du at ``u``."""
        return (u.abs() < self.gamma).to(u.dtype) / (2 * self.gamma)

    def primitive(self, u: Tensor) -> Tensor:
        """Return the ramp from 0 to 1."""
        return (0.5 + u / (2 * self.gamma)).clamp(0, 1)


@dataclass(frozen=True)
class Sigmoid(_Positive):
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
class Arctan(_Positive):
    """ds/du = (α/2) / (1 + (π α u/2)²) (Fang et al. 2021)."""

    alpha: float = 2.0

    def __call__(self, u: Tensor) -> Tensor:
        """Return ds/du at ``u``."""
        return self.alpha / 2 / (1 + (math.pi / 2 * self.alpha * u) ** 2)

    def primitive(self, u: Tensor) -> Tensor:
        """Return arctan(π α u/2)/π + 1/2."""
        return torch.atan(math.pi / 2 * self.alpha * u) / math.pi + 0.5


@dataclass(frozen=True)
class Dspike(_Positive):
    """S(u) = (tanh(b u/2γ) + tanh(b/2)) / (2 tanh(b/2)) for |u| < γ, its slope outside 0 (Li et al., NeurIPS 2021).

    A small temperature b makes it a ramp, a large one a step. The authors write it for potentials in (0, 1) with the
    threshold in the middle, which is γ = 1 here, and adapt b while they train; here it stays.

    Attributes:
        temperature: b.
        gamma: γ, half the width in units of θ.

    >>> Dspike(temperature=3.0).primitive(torch.tensor([-2.0, 0.0, 2.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """

    temperature: float = 3.0
    gamma: float = 1.0

    def __call__(self, u: Tensor) -> Tensor:
        """Return ds/du at ``u``."""
        half = self.temperature / 2
        slope = 1 - torch.tanh(half / self.gamma * u) ** 2
        return torch.where(u.abs() < self.gamma, slope * (half / (2 * self.gamma * math.tanh(half))), 0.0)

    def primitive(self, u: Tensor) -> Tensor:
        """Return S(u), from 0 to 1."""
        half = self.temperature / 2
        return torch.tanh(half * (u / self.gamma).clamp(-1, 1)) / (2 * math.tanh(half)) + 0.5
