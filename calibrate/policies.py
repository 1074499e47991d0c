"""Threshold policies: each a frozen type that turns a histogram of activations into θ, knowing T."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..spiking import PerChannel, PerLayer
from .histogram import BINS, Histogram

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

    A coarse grid finds the region of the minimum for each channel and a fine one the minimum. With d = θ/L, and N_l and
    M_l the number and the sum of all x from (l − ½) d on, where q has at least l levels,

        Σ (x − q)² = Σ x² − 2 d Σ M_l + d² Σ (2 l − 1) N_l     (l = 1 … L)
    """
    numbers, masses = (_from_each_bin_on(x) for x in (histogram.counts, histogram.counts * histogram.centers()))
    bins = 1 / histogram.width.double().clamp_min(1e-300)[:, None]
    level = torch.arange(1, levels + 1, device=bins.device)

    def best_of(candidates: list[Tensor]) -> Tensor:
        best, least = candidates[0], torch.full_like(candidates[0], torch.inf)
        for theta in candidates:
            step = theta[:, None] / levels
            first = (step * bins * (level - 0.5) - 0.5).ceil_().clamp_(0, BINS).long()
            gain = 2 * masses.gather(1, first) - (2 * level - 1) * step * numbers.gather(1, first)
            error = -(step * gain).sum(1)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, theta, best)
        return best

    top = histogram.maximum.double()
    best = best_of([top * step / COARSE for step in range(1, COARSE + 1)])
    fine = top / (COARSE * FINE)
    best = best_of([(best + fine * step).clamp(min=fine, max=top) for step in range(1 - FINE, FINE)])
    return torch.where(top > 0, best, 0.0).to(histogram.maximum.dtype)


def _from_each_bin_on(values: Tensor) -> Tensor:
    """Return the sums of [C, BINS] from every bin to the last, and 0 behind it, [C, BINS + 1]."""
    return torch.nn.functional.pad(values.flip(1).cumsum(1).flip(1), (0, 1))


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


@dataclass(frozen=True)
class LocalThresholdBalancing:
    """θ where clipping and rounding are in balance (after Bu et al. 2025, local threshold balancing; solved by us).

    Bu et al. move each channel's θ down the gradient of its local error, batch by batch. With x the pre-activation
    and T steps, values above θ lose x − θ and the others are rounded to multiples of θ/T, with an error that is even
    over one step:

        F(θ) = E[(x − θ)₊²] + (θ/T)²/12 · P(0 < x ≤ θ)
        F′(θ)/2 ≈ −E[(x − θ)₊] + θ/(12 T²) · P(0 < x ≤ θ)

    The first term of F′ rises to 0 and the second grows, so it has one zero, which we read off the histogram instead
    of descending to it. (What moves across θ with it, θ² p(θ)/(12 T²) in F′, is left out, as it makes F′ noisy.)
    """

    granularity: PerLayer | PerChannel = field(default_factory=PerChannel)
    needs_data: ClassVar[bool] = True

    def threshold(self, histogram: Histogram, timesteps: int) -> Tensor:
        """Return the zero of F′, by linear interpolation between the edges of bins."""
        counts, centers = histogram.counts, histogram.centers().double()
        edges = torch.arange(BINS + 1, device=counts.device) * histogram.width.double()[:, None]
        inside = torch.nn.functional.pad(counts.cumsum(1), (1, 0))
        mass = torch.nn.functional.pad((counts * centers).cumsum(1), (1, 0))
        clipped = (mass[:, -1:] - mass) - edges * (inside[:, -1:] - inside)
        slope = edges * inside / (12 * timesteps**2) - clipped
        right = (slope > 0).to(torch.int64).argmax(1, keepdim=True).clamp_min(1)
        low, high = slope.gather(1, right - 1), slope.gather(1, right)
        theta = edges.gather(1, right) - high / (high - low).clamp_min(1e-300) * histogram.width.double()[:, None]
        found = torch.minimum(theta[:, 0].to(histogram.maximum.dtype), histogram.maximum)
        return torch.where(histogram.maximum > 0, found, 0.0)


@dataclass(frozen=True)
class KLDivergence:
    """θ whose T levels keep most of the distribution (entropy calibration, Migacz 2017, for the neuron's levels).

    For every θ of a grid: P is the histogram of positive values up to θ, with all larger ones in its last bin. Q
    spreads what lies in each cell of the quantised ReLU, from (k − ½)θ/T to (k + ½)θ/T, evenly over those of its bins
    that P has filled. θ has the least Σ P log(P/Q).

    Attributes:
        candidates: how many θ are tried, evenly up to the top of the histogram.
    """

    candidates: int = 64
    granularity: PerLayer | PerChannel = field(default_factory=PerChannel)
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.candidates <= BINS:
            raise ArgumentError(f"KLDivergence: {self.candidates} candidates; expected 1 to {BINS}, such as 64.")

    def threshold(self, histogram: Histogram, timesteps: int) -> Tensor:
        """Return the best θ of the grid, at most the maximum."""
        least = torch.full_like(histogram.maximum, torch.inf)
        best = histogram.maximum
        for step in range(1, self.candidates + 1):
            bins = step * BINS // self.candidates
            theta = torch.minimum(bins * histogram.width, histogram.maximum)
            divergence = self._divergence(histogram.counts, bins, timesteps)
            better = divergence < least
            least, best = torch.where(better, divergence.to(least), least), torch.where(better, theta, best)
        return torch.where(histogram.maximum > 0, best, 0.0)

    @staticmethod
    def _divergence(counts: Tensor, bins: int, levels: int) -> Tensor:
        """Return KL(P‖Q) of each channel for a θ at the upper edge of bin ``bins``."""
        p = counts[:, :bins].clone()
        inside = p > 0
        p[:, -1] += counts[:, bins:].sum(1)
        cells = ((torch.arange(bins, device=p.device) + 0.5) / bins * levels + 0.5).long().expand(len(p), -1)
        empty = p.new_zeros(len(p), levels + 1)
        held = empty.scatter_add(1, cells, counts[:, :bins])
        filled = empty.scatter_add(1, cells, inside.to(p.dtype))
        q = (held / filled.clamp_min(1)).gather(1, cells) * inside
        p, q = (x / x.sum(1, keepdim=True).clamp_min(1e-300) for x in (p, q))
        return torch.where(p > 0, p * (p.clamp_min(1e-300) / q.clamp_min(1e-12)).log(), 0.0).sum(1)
