"""Threshold policies: each a frozen type that turns a histogram of activations into θ, knowing T."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..qcfs import quantize
from ..spiking import PerChannel, PerLayer
from .histogram import Histogram

COARSE, FINE = 32, 8


class Policy(Protocol):
    """What every policy offers."""

    needs_data: ClassVar[bool]

    @property
    def granularity(self) -> PerLayer | PerChannel:
        """One θ for each channel, or one for the layer."""
        ...

    def threshold(self, histogram: Histogram, timesteps: int) -> Tensor:
        """Return θ for each channel of the histogram, [C]; 0 where a channel was never positive."""
        ...


@dataclass(frozen=True)
class Max:
    """θ = the largest activation seen (Diehl et al. 2015, data-based normalisation); the same for every T."""

    granularity: PerLayer | PerChannel = field(default_factory=PerChannel)
    needs_data: ClassVar[bool] = True

    def threshold(self, histogram: Histogram, timesteps: int) -> Tensor:
        """Return the exact maximum."""
        return histogram.maximum


@dataclass(frozen=True)
class Percentile:
    """θ = the P-th percentile of the activations, zeros included (Rueckauer et al. 2017), to bin width.

    Attributes:
        percent: P in (0, 100].
    """

    percent: float = 99.9
    granularity: PerLayer | PerChannel = field(default_factory=PerChannel)
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise ArgumentError(f"Percentile: {self.percent} came; expected a number above 0 and at most 100.")

    def threshold(self, histogram: Histogram, timesteps: int) -> Tensor:
        """Return the upper edge of the bin that holds the percentile; 0 where it falls among the zeros."""
        zeros = histogram.total - histogram.counts.sum(1, keepdim=True)
        below = zeros + histogram.counts.cumsum(1)
        reached = below >= histogram.total * self.percent / 100 - 1e-9
        edge = (reached.to(torch.int64).argmax(1) + 1).to(histogram.width.dtype) * histogram.width
        among_zeros = zeros[:, 0] >= histogram.total * self.percent / 100
        return torch.where(among_zeros, 0.0, torch.minimum(edge, histogram.maximum))


def least_error(histogram: Histogram, levels: int) -> Tensor:
    """Return the θ in (0, maximum] with the least Σ (x − q(x))², q with L = ``levels``, [C].

    A coarse grid finds the region of the minimum for each channel and a fine one the minimum.
    """
    top = histogram.maximum
    best = _best_of(histogram, levels, [top * step / COARSE for step in range(1, COARSE + 1)])
    fine = top / (COARSE * FINE)
    around = [(best + fine * step).clamp(min=fine, max=top) for step in range(1 - FINE, FINE)]
    return _best_of(histogram, levels, around)


def _best_of(histogram: Histogram, levels: int, candidates: list[Tensor]) -> Tensor:
    centers, counts = histogram.centers(), histogram.counts.float()
    best = candidates[0]
    least = torch.full_like(best, torch.inf)
    for theta in candidates:
        difference = centers - quantize(centers, theta.clamp_min(1e-30)[:, None], levels)
        error = (difference.square_() * counts).sum(1)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, theta, best)
    return torch.where(histogram.maximum > 0, best, 0.0)


@dataclass(frozen=True)
class MinError:
    """θ with the least squared error of the quantised ReLU with L levels over the activations seen.

    A neuron with v_init = θ/2 answers a constant current with just T levels, so L = T is the clipping and
    rounding error at the given T (the layer-wise error of Deng & Gu 2021 and Li et al. 2021). In a network
    currents are not constant and the finest levels are lost to the order in which spikes arrive; counting
    fewer than T levels then gives smaller thresholds that do better (ours; docs/design.md has figures).
    ``MinError()`` has L = T; :func:`lmh.calibrate.automatic` chooses MinError(0.5, 2.0), which has L = ⌈T/2 + 2⌉.

    Attributes:
        levels_per_step: slope of L = min(T, ⌈base_levels + levels_per_step · T⌉).
        base_levels: L at T = 0 on that line.
        granularity: one θ for each channel, or for the layer.
    """

    levels_per_step: float = 1.0
    base_levels: float = 0.0
    granularity: PerLayer | PerChannel = field(default_factory=PerChannel)
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _levels(self, 1)

    def threshold(self, histogram: Histogram, timesteps: int) -> Tensor:
        """Return the best θ up to the maximum, to 1/256 of it."""
        return least_error(histogram, _levels(self, timesteps))


@dataclass(frozen=True)
class BatchNormStatistics:
    """θ as :class:`MinError`, over the activations that BatchNorm's parameters predict; needs no data (ours).

    Behind a BatchNorm the pre-activation of a channel is taken as normal with mean = bias and standard
    deviation = |weight|; :mod:`lmh.calibrate.statistics` carries both through the rest of the graph.

    Attributes:
        levels_per_step: as :class:`MinError`.
        base_levels: as :class:`MinError`.
        granularity: one θ for each channel, or for the layer.
    """

    levels_per_step: float = 1.0
    base_levels: float = 0.0
    granularity: PerLayer | PerChannel = field(default_factory=PerChannel)
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _levels(self, 1)

    def threshold(self, histogram: Histogram, timesteps: int) -> Tensor:
        """Return the best θ over the predicted distribution."""
        return least_error(histogram, _levels(self, timesteps))


def _levels(policy: MinError | BatchNormStatistics, timesteps: int) -> int:
    """Return L for T, from 1 to T."""
    slope, base = policy.levels_per_step, policy.base_levels
    if not (0 < slope < math.inf and 0 <= base < math.inf):
        raise ArgumentError(
            f"levels_per_step is {slope} and base_levels {base}; expected finite numbers, the first above 0, "
            "the second at least 0, such as 1 and 0."
        )
    return min(timesteps, math.ceil(base + slope * timesteps))
