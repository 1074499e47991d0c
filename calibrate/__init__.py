"""Calibration: where the thresholds of a prepared network start.

Every policy turns one histogram per activation into θ:

- :class:`Max` and :class:`Percentile` look at the largest values alone, so their θ is the same for every T.
- :class:`MinError` minimises the squared error of the ReLU with L levels that T steps can express,
  L = min(T, ⌈base_levels + levels_per_step · T⌉). With its defaults L = T, as for one layer alone.
- :class:`LocalThresholdBalancing` solves for the θ where clipping and rounding are in balance, with T levels.
- :class:`KLDivergence` keeps most of the distribution with T levels.
- :class:`BatchNormStatistics` is MinError over the distribution that BatchNorm predicts; it needs no data.

:func:`automatic` is what ``convert`` takes where no policy is named, and what ``--calibration minerror`` and
``batchnorm`` mean on the command line: MinError(levels_per_step=0.5, base_levels=2.0) with data,
BatchNormStatistics(levels_per_step=0.5, base_levels=2.0) without. So it counts L = ⌈T/2 + 2⌉ levels, which is T
itself up to T = 5; from T = 6 on ``MinError()`` in Python, with L = T, gives larger thresholds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_batches, check_kind, check_timesteps, refuse
from ..errors import CalibrationError
from ..records import FROM_QCFS, Calibration, Prepared, Spike
from ..spiking import PerLayer
from .blocks import Block, blocks
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
from .reconstruct import BlockResult, Reconstruction, reconstruct
from .refit import refit, stand_ins
from .regression import WeightRegression
from .statistics import predicted_histograms

__all__ = [
    "USUAL_CORRECTIONS",
    "BatchNormReestimation",
    "BatchNormStatistics",
    "BiasCorrection",
    "Block",
    "BlockResult",
    "Correction",
    "Diagnosis",
    "InitialPotential",
    "KLDivergence",
    "LocalThresholdBalancing",
    "Max",
    "MinError",
    "Percentile",
    "Policy",
    "Reconstruction",
    "SiteError",
    "SpikingMinError",
    "WeightRegression",
    "automatic",
    "blocks",
    "calibrate",
    "changes",
    "correct",
    "diagnose",
    "policy_text",
    "reconstruct",
    "refit",
    "replay",
    "stand_ins",
]


USUAL_CORRECTIONS: tuple[Correction, ...] = (WeightRegression(), SpikingMinError())
"""What ``auto`` and :func:`lmh.finetune.distill` correct with, in this order."""
_POLICIES = (Max, Percentile, MinError, BatchNormStatistics, LocalThresholdBalancing, KLDivergence)


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
        ArgumentError: for arguments of a wrong type, such as a policy by name.
        CalibrationError: if the policy has nothing to work on, or the data holds NaN or no sample.

    >>> from torch import nn
    >>> from lmh.convert import prepare
    >>> prepared = prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), sample_shape=(4,))
    >>> calibration = calibrate(prepared, MinError(), timesteps=4, data=torch.rand(16, 4))
    >>> calibration.samples, calibration.v_threshold["1"].shape
    (16, torch.Size([8]))
    """
    check_kind("calibrate: prepared", prepared, Prepared, "lmh.convert.prepare(ann, sample_shape)")
    check_policy("calibrate: policy", policy)
    check_timesteps(timesteps)
    if data is not None and not isinstance(data, Tensor):
        check_batches("calibrate: data", data)
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
    """Return the policy that is used unless one is named: MinError with data, BatchNormStatistics without.

    Both with levels_per_step = 0.5 and base_levels = 2, so they minimise the error of L = min(T, ⌈2 + T/2⌉) levels:
    T itself up to T = 5, 6 at T = 8, 10 at T = 16. Through many layers that does better than L = T, which
    ``MinError()`` counts (ours; docs/design.md has figures).

    Args:
        has_data: whether there are images to find thresholds on.

    >>> policy_text(automatic(True))
    'MinError(levels_per_step=0.5, base_levels=2, per channel)'
    >>> policy_text(automatic(False))
    'BatchNormStatistics(levels_per_step=0.5, base_levels=2, per channel)'
    """
    kind = MinError if has_data else BatchNormStatistics
    return kind(levels_per_step=0.5, base_levels=2.0)


def policy_text(policy: Policy) -> str:
    """Return a policy as text with its options.

    >>> policy_text(Percentile(99.0, PerLayer()))
    'Percentile(percent=99, per layer)'
    """
    names: list[str] = [item.name for item in fields(policy)] if is_dataclass(policy) else []
    options = [f"{name}={_short(getattr(policy, name))}" for name in names if name != "granularity"]
    where = "per layer" if isinstance(policy.granularity, PerLayer) else "per channel"
    return f"{type(policy).__name__}({', '.join([*options, where])})"


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else repr(value)


def check_policy(where: str, policy: object) -> None:
    """Refuse what is no policy: its name, or its class.

    Raises:
        ArgumentError: with the policy to pass.
    """
    wanted = ("needs_data", "granularity", "threshold")
    if not isinstance(policy, type) and all(hasattr(policy, name) for name in wanted):
        return
    name = policy.__name__ if isinstance(policy, type) else str(policy).partition(":")[0]
    known = {kind.__name__.lower(): kind.__name__ for kind in _POLICIES} | {"batchnorm": "BatchNormStatistics"}
    called = known.get(name.lower())
    advice = f"Pass {called}()" if called else f"Pass one of {', '.join(f'{kind.__name__}()' for kind in _POLICIES)}"
    raise refuse(where, policy, "a policy", f"{advice}, from lmh.calibrate.")


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
