"""Resize and Upsample, where torch's interpolation computes the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F

from .registry import Registry
from .values import Call, Dim, Op, Sizes, UnsupportedFormError, Value, in_trials, whole

OPERATORS = Registry()
_MODES = {
    "nearest": {1: "nearest", 2: "nearest", 3: "nearest"},
    "linear": {1: "linear", 2: "bilinear", 3: "trilinear"},
    "cubic": {2: "bicubic"},
}
_REFUSED = {"antialias": 0, "exclude_outside": 0, "keep_aspect_ratio_policy": "stretch"}


@OPERATORS.operator("Upsample", since=(9,))
@OPERATORS.operator("Resize", since=(10,))
def upsample(op: Op) -> Call | Value:
    """The oldest forms: nearest neighbour by whole factors is all that their text defines."""
    scales, mode = _numbers(op, 1) or [], op.attributes.get("mode", "nearest")
    if mode != "nearest" or any(scale < 1 or scale != int(scale) for scale in scales):
        raise UnsupportedFormError(
            f"mode {mode} by {scales} in opset {op.since}; expected nearest by whole factors. Export with opset 11 or "
            "newer, which say what the others are"
        )
    axes = _spatial(op, [axis for axis, scale in enumerate(scales) if scale != 1])
    if not axes:
        return op.value(0)
    return Call(F.interpolate, (op.value(0),), {"scale_factor": [scales[axis] for axis in axes], "mode": "nearest"})


@OPERATORS.operator("Resize", since=(11, 13, 18, 19))
def resize(op: Op) -> Call | Value:
    """Nearest, linear or cubic interpolation of the axes behind the channels."""
    for name, usual in _REFUSED.items():
        if op.attributes.get(name, usual) != usual:
            raise UnsupportedFormError(f"{name} {op.attributes[name]} came; expected {usual}")
    dims, named = op.value(0).dims, op.attributes.get("axes", list(range(op.rank())))
    named = [axis + op.rank() if axis < 0 else axis for axis in named]
    scales = dict(zip(named, _numbers(op, 2) or [], strict=False))
    sizes = {} if scales else dict(zip(named, _sizes(op, 3), strict=True))
    if scales:
        changed = [axis for axis, scale in scales.items() if scale != 1]
    else:
        changed = [axis for axis, size in sizes.items() if axis >= 2 and size != dims[axis]]
    axes = _spatial(op, changed)
    if not axes:
        return op.value(0)
    if scales:
        factors = [float(scales.get(axis, 1.0)) for axis in axes]
        options: dict[str, Any] = {"scale_factor": factors, "recompute_scale_factor": False}
        steps = [
            _Step(size, math.floor(size * factor), factor)
            for trial in in_trials([dims[axis] for axis in axes])
            for size, factor in zip(trial, factors, strict=True)
        ]
    else:
        targets = [sizes.get(axis, dims[axis]) for axis in axes]
        options = {"size": [whole(target, op, near=op.value(0)) for target in targets]}
        trials = in_trials([dim for axis, target in zip(axes, targets, strict=True) for dim in (dims[axis], target)])
        pairs = [(trial[place], trial[place + 1]) for trial in trials for place in range(0, len(trial), 2)]
        steps = [_Step(size, target, target / size) for size, target in pairs]
    return Call(F.interpolate, (op.value(0),), {**options, **_mode(op, len(axes), steps)})


class _Step(NamedTuple):
    """What is asked of one axis in one trial: sizes before and after, and their ratio as the file gives it."""

    size: int
    target: int
    ratio: float


def _numbers(op: Op, index: int) -> list[float] | None:
    if index == 1 and "scales" in op.attributes:
        return list(op.attributes["scales"])
    given = op.constant(index)
    return None if given is None or not given.array.size else [float(item) for item in given.array.reshape(-1)]


def _sizes(op: Op, index: int) -> list[Dim]:
    found = op.value(index)
    if isinstance(found, Sizes):
        return found.entries()
    return [int(item) for item in op.weight(index).array.reshape(-1)]


def _spatial(op: Op, changed: Sequence[int]) -> list[int]:
    """Return all axes behind the channels if any changes."""
    if any(axis < 2 for axis in changed):
        raise UnsupportedFormError("it resizes the batch or the channels; expected the axes behind them only")
    return list(range(2, op.rank())) if changed else []


def _mode(op: Op, axes: int, steps: Sequence[_Step]) -> dict[str, Any]:
    """Return torch's options for a kind of interpolation.

    Raises:
        UnsupportedFormError: if torch has no such kind.
    """
    mode = op.attributes.get("mode", "nearest")
    where = op.attributes.get("coordinate_transformation_mode", "half_pixel")
    if axes not in _MODES.get(mode, {}):
        raise UnsupportedFormError(f"mode {mode} on {axes} axes; expected nearest or linear on 1 to 3, cubic on 2")
    if mode == "nearest":
        return {"mode": _nearest(op, steps, where)}
    if mode == "cubic" and op.attributes.get("cubic_coeff_a", -0.75) != -0.75:
        raise UnsupportedFormError(f"cubic_coeff_a {op.attributes['cubic_coeff_a']} came; expected -0.75, as torch has")
    fitting = all(math.isclose(step.size * step.ratio, step.target) for step in steps)
    ones = [step.target == 1 for step in steps]
    if where == "align_corners" and fitting:
        return {"mode": _MODES[mode][axes], "align_corners": True}
    if where == "half_pixel" or (where == "pytorch_half_pixel" and (all(ones) or not any(ones))):
        return {"mode": _MODES[mode][axes], "align_corners": False}
    raise UnsupportedFormError(f"{mode} with coordinates {where}; expected half_pixel, or align_corners to whole sizes")


def _nearest(op: Op, steps: Sequence[_Step], where: str) -> str:
    """Return torch's name for a choice of neighbours, found by comparing the choice on every axis.

    Raises:
        UnsupportedFormError: if torch has no such choice.
    """
    rounding = op.attributes.get("nearest_mode", "round_prefer_floor")
    for name, shift in (("nearest", 0.0), ("nearest-exact", 0.5)):
        if all(
            np.array_equal(
                np.clip(_chosen(step, where, rounding), 0, step.size - 1),
                np.minimum(np.floor((np.arange(step.target) + shift) / step.ratio), step.size - 1),
            )
            for step in steps
        ):
            return name
    ratios = sorted({step.ratio for step in steps})
    raise UnsupportedFormError(f"nearest with {where} and {rounding} at factors {ratios}; torch chooses others")


def _chosen(step: _Step, where: str, rounding: str) -> np.ndarray:
    """Return which element each new one is taken from, by ONNX's definition."""
    places = np.arange(step.target)
    found: np.ndarray
    match where:
        case "asymmetric":
            found = places / step.ratio
        case "align_corners":
            found = places * (step.size - 1) / max(step.target - 1, 1)
        case "half_pixel" | "pytorch_half_pixel":
            found = (places + 0.5) / step.ratio - 0.5
            if where == "pytorch_half_pixel" and step.target == 1:
                found = np.zeros(1)
        case _:
            raise UnsupportedFormError(f"nearest with coordinates {where}; expected half_pixel or asymmetric")
    roundings: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "floor": np.floor,
        "ceil": np.ceil,
        "round_prefer_floor": lambda x: np.ceil(x - 0.5),
        "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    }
    return roundings[rounding](found)
