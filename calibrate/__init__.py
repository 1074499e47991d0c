"""Calibration: where the thresholds of a prepared network start."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..records import Calibration, Prepared, Spike, plain_value
from ..spiking import PerLayer
from .correct import changes, correct, replay
from .corrections import BatchNormReestimation, BiasCorrection, Correction, InitialPotential, SpikingMinError
from .diagnose import Diagnosis, SiteError, diagnose
from .histogram import Histogram, observe
from .policies import (
    BatchNormStatistics,
    KLDivergence,
    LocalThresholdBalancing,
    Max,
    MinError,
    Percentile,
    Policy,
)
from .refit import refit, stand_ins
from .regression import WeightRegression
from .statistics import predicted_histograms

__all__ = [
    "BatchNormReestimation",
    "BatchNormStatistics",
    "BiasCorrection",
    "Correction",
    "Diagnosis",
    "InitialPotential",
    "KLDivergence",
    "LocalThresholdBalancing",
    "Max",
    "MinError",
    "Percentile",
    "Policy",
    "SiteError",
    "SpikingMinError",
    "WeightRegression",
    "automatic",
    "calibrate",
    "changes",
    "correct",
    "diagnose",
    "policy_text",
    "refit",
    "replay",
    "stand_ins",
]


FROM_QCFS = "taken over from QCFS"


def calibrate(
    prepared: Prepared, policy: Policy, timesteps: int, data: Iterable[Any] | Tensor | None = None
) -> Calibration:
    """Find θ for every activation of a prepared network that becomes neurons.

    Args:
        prepared: from :func:`lmh.convert.prepare`.
        policy: for example ``MinError()``; see :mod:`lmh.calibrate.policies`.
        timesteps: T; the best θ depends on it.
        data: batches [N, *F] (or tuples that begin with one), or one tensor. Labels are not read.

    Returns:
        θ and v_init by path. v_init is θ/2. An activation that knows its θ (QCFS) keeps it; a channel that was
        never positive takes the median of its layer's other channels, a silent layer takes 1.

    Raises:
        CalibrationError: if the policy has nothing to work on, or the data holds NaN or no sample.
    """
    wanted = [path for path in prepared.spiking if _own_threshold(prepared, path) is None]
    histograms, samples = _histograms(prepared, policy, wanted, data)
    thresholds = {}
    for path in prepared.spiking:
        own = _own_threshold(prepared, path)
        thresholds[path] = (
            own if own is not None else _threshold(histograms[path], policy, timesteps, prepared.channels[path])
        )
    v_init = {path: torch.full_like(theta, 0.5) for path, theta in thresholds.items()}
    source = policy_text(policy) if wanted else FROM_QCFS
    return Calibration(source, timesteps, samples, thresholds, v_init)


def automatic(has_data: bool) -> Policy:
    """Return the policy that is used unless one is named: with data MinError, without BatchNormStatistics.

    Both count T/2 + 2 levels instead of T, which does better through many layers.
    """
    kind = MinError if has_data else BatchNormStatistics
    return kind(levels_per_step=0.5, base_levels=2.0)


def policy_text(policy: Policy) -> str:
    """Return a policy as text with its options: ``Max(per channel)``, ``Percentile(percent=99, per layer)``."""
    options = [
        f"{name}={value:g}" for name, value in plain_value(policy).items() if name not in ("type", "granularity")
    ]
    where = "per layer" if isinstance(policy.granularity, PerLayer) else "per channel"
    return f"{type(policy).__name__}({', '.join([*options, where])})"


def _own_threshold(prepared: Prepared, path: str) -> Tensor | None:
    decision = prepared.activations[path]
    return decision.v_threshold if isinstance(decision, Spike) else None


def _histograms(
    prepared: Prepared, policy: Policy, wanted: list[str], data: Iterable[Any] | Tensor | None
) -> tuple[dict[str, Histogram], int]:
    if not wanted:
        return {}, 0
    bounds = {path: decision.upper for path in wanted if isinstance(decision := prepared.activations[path], Spike)}
    if policy.needs_data:
        if data is None:
            raise CalibrationError(
                f"{policy_text(policy)} needs data and none was given. Pass data= (on the command line --data), or "
                "use BatchNormStatistics() (--calibration batchnorm) if the network has BatchNorm."
            )
        return observe(prepared.model, bounds, data.split(128) if isinstance(data, Tensor) else data)
    histograms, unknown = predicted_histograms(prepared)
    missing = [path for path in unknown if path in wanted]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise CalibrationError(
            f"{shown}: not predicted by a BatchNorm before it, so thresholds cannot be found without data. "
            "Pass data= (on the command line --data)."
        )
    return histograms, 0


def _threshold(histogram: Histogram, policy: Policy, timesteps: int, channels: int | None) -> Tensor:
    if channels is None or isinstance(policy.granularity, PerLayer):
        theta = policy.threshold(histogram.merged(), timesteps)[0]
        return theta if theta > 0 else torch.ones_like(theta)
    theta = policy.threshold(histogram, timesteps)
    alive = theta > 0
    fallback = theta[alive].median() if alive.any() else theta.new_tensor(1.0)
    return torch.where(alive, theta, fallback)
