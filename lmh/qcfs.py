"""QCFS: the quantised clip-floor-shift activation, the ANN side of the neuron (Bu et al., ICLR 2022)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .errors import ArgumentError

RAW_LIMIT = 60.0


def positive(base: Tensor, raw: Tensor) -> Tensor:
    """θ = θ₀ exp(raw), the learnable threshold (ours): raw = 0 gives θ₀ exactly, and no raw value gives 0 or infinity.

    Args:
        base: θ₀ > 0, any shape.
        raw: the parameter, broadcast against ``base``; without unit, taken from −60 to 60.
    """
    return base * raw.clamp(-RAW_LIMIT, RAW_LIMIT).exp()


def quantize(x: Tensor, v_threshold: Tensor, levels: int) -> Tensor:
    """q(x) = θ clip(⌊x L/θ + 1/2⌋, 0, L)/L, with the gradient passed straight through the floor.

    With L = T, v_init = θ/2, the IF preset and a constant current x this is the neuron's mean output.

    Args:
        x: pre-activation, any shape.
        v_threshold: θ > 0, broadcast against ``x``, in its unit.
        levels: L ≥ 1.

    Returns:
        The quantised activation, shape of ``x``.

    >>> quantize(torch.tensor([-1.0, 0.3, 0.6, 9.0]), torch.tensor(1.0), 4)
    tensor([0.0000, 0.2500, 0.5000, 1.0000])
    """
    y = (x / v_threshold).clamp(0, 1) * levels + 0.5
    y = y + (y.floor() - y).detach()
    return v_threshold * (y / levels)


class QCFS(nn.Module):
    """The QCFS activation as a module, with θ learnable and kept positive: θ = θ₀ exp(raw).

    Args:
        levels: L, the number of quantisation steps.
        v_threshold: θ₀ at the start. The authors start at 8.
        channels: one θ for each channel (axis 1) instead of one for the layer.

    Shapes: any [N, *F] or, with ``channels``, [N, channels, *F]; the output has the input's shape.

    >>> QCFS(levels=4, v_threshold=1.0)(torch.tensor([0.3])).item()
    0.25
    """

    def __init__(self, levels: int = 4, v_threshold: float = 8.0, channels: int | None = None) -> None:
        super().__init__()
        if levels < 1:
            raise ArgumentError(f"QCFS: levels is {levels}; expected at least 1.")
        if not (v_threshold > 0 and math.isfinite(v_threshold)):
            raise ArgumentError(f"QCFS: v_threshold is {v_threshold}; expected a finite number above 0.")
        self.levels = levels
        self.base_threshold: Tensor
        shape = () if channels is None else (channels,)
        self.register_buffer("base_threshold", torch.full(shape, float(v_threshold)))
        self.raw_threshold = nn.Parameter(torch.zeros(shape))

    @property
    def v_threshold(self) -> Tensor:
        """θ, a scalar or [channels], in the unit of the pre-activation."""
        return positive(self.base_threshold, self.raw_threshold)

    def forward(self, x: Tensor) -> Tensor:
        """Return q(x), shape of ``x``."""
        theta = self.v_threshold
        if theta.ndim:
            theta = theta.reshape(-1, *[1] * (x.ndim - 2))
        return quantize(x, theta, self.levels)

    def extra_repr(self) -> str:
        """Return L, for the module's repr."""
        return f"levels={self.levels}"
