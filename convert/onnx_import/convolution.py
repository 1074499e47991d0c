"""Convolution and transposed convolution, as modules that own their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import nn

from .registry import Registry
from .values import Call, Constant, Op, UnsupportedFormError

OPERATORS = Registry()
CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def spatial(op: Op, kernel: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Return kernel, strides and dilations of a sliding window."""
    axes = len(kernel)
    strides, dilations = op.attributes.get("strides", [1] * axes), op.attributes.get("dilations", [1] * axes)
    if not len(strides) == len(dilations) == axes == op.rank() - 2:
        raise UnsupportedFormError(
            f"a kernel of {axes} axes with strides {strides} and dilations {dilations} on an input of rank {op.rank()}"
            "; expected one of each for every axis behind the channels"
        )
    return list(kernel), list(strides), list(dilations)


def paddings(op: Op, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[tuple[int, int]]:
    """Return the padding before and after each spatial axis, worked out where ``auto_pad`` asks for it."""
    axes = len(kernel)
    mode = op.attributes.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        pads = op.attributes.get("pads", [0] * 2 * axes)
        return list(zip(pads[:axes], pads[axes:], strict=True))
    if mode == "VALID":
        return [(0, 0)] * axes
    found = []
    for axis, (width, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True)):
        reach = dilation * (width - 1) + 1
        size = 0 if stride == 1 else op.size(axis + 2)
        total = max((-(-size // stride) - 1) * stride + reach - size, 0) if stride > 1 else reach - 1
        less = total // 2
        found.append((less, total - less) if mode == "SAME_UPPER" else (total - less, less))
    return found


def padded(x: Any, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Call | Any:
    """Return ``x`` padded on its last axes, or ``x`` itself where there is nothing to pad."""
    if all(pair == (0, 0) for pair in pads):
        return x
    widths = [width for pair in reversed(pads) for width in pair]
    return Call(F.pad, (x, widths, "constant", value) if value else (x, widths))


def is_symmetric(pads: Sequence[tuple[int, int]]) -> bool:
    """Whether every axis is padded alike before and after, as torch's modules can."""
    return all(before == after >= 0 for before, after in pads)


@OPERATORS.operator("Conv", since=(1, 11, 22))
def conv(op: Op) -> Call:
    """A convolution of one to three axes; padding that differs between the two ends becomes a pad of its own."""
    weight = op.weight(1)
    kernel, strides, dilations = spatial(op, weight.array.shape[2:])
    _check_axes(kernel)
    pads = paddings(op, kernel, strides, dilations)
    inside = is_symmetric(pads)
    groups = op.attributes.get("group", 1)
    module = CONVOLUTIONS[len(kernel)](
        weight.array.shape[1] * groups,
        weight.array.shape[0],
        kernel,
        stride=strides,
        padding=[before for before, _ in pads] if inside else 0,
        dilation=dilations,
        groups=groups,
        bias=op.optional(2) is not None,
        device="meta",
    )
    _fill(module, weight, op.constant(2))
    return Call(module, (op.value(0) if inside else padded(op.value(0), pads),), named_by=weight)


def _check_axes(kernel: Sequence[int]) -> None:
    if len(kernel) not in CONVOLUTIONS:
        raise UnsupportedFormError(f"a kernel of {len(kernel)} axes; expected 1, 2 or 3")


def _fill(module: nn.Module, weight: Constant, bias: Constant | None) -> None:
    module.weight = weight.parameter()
    if bias is not None:
        module.bias = bias.parameter()


@OPERATORS.operator("ConvTranspose", since=(1, 11, 22))
def conv_transpose(op: Op) -> Call:
    """A transposed convolution; what torch's padding cannot say is cut off or added behind it."""
    weight = op.weight(1)
    kernel, strides, dilations = spatial(op, weight.array.shape[2:])
    _check_axes(kernel)
    extra = list(op.attributes.get("output_padding", [0] * len(kernel)))
    pads = _transposed_paddings(op, kernel, strides, dilations, extra)
    extra = [more + max(-before - after, 0) for more, (before, after) in zip(extra, pads, strict=True)]
    pads = [(before, after) if before + after >= 0 else (0, 0) for before, after in pads]
    moved = [more + before - after for more, (before, after) in zip(extra, pads, strict=True)]
    limits = [max(stride, dilation) for stride, dilation in zip(strides, dilations, strict=True)]
    inside = all(0 <= more < limit for more, limit in zip(moved, limits, strict=True))
    groups = op.attributes.get("group", 1)
    module = TRANSPOSED[len(kernel)](
        weight.array.shape[0],
        weight.array.shape[1] * groups,
        kernel,
        stride=strides,
        padding=[before for before, _ in pads] if inside else 0,
        output_padding=moved if inside else extra,
        dilation=dilations,
        groups=groups,
        bias=op.optional(2) is not None,
        device="meta",
    )
    _fill(module, weight, op.constant(2))
    found = Call(module, (op.value(0),), named_by=weight)
    return found if inside else padded(found, [(-before, -after) for before, after in pads])


def _transposed_paddings(
    op: Op, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], extra: Sequence[int]
) -> list[tuple[int, int]]:
    """Return what is cut off each end; worked out from the output's shape where that is given."""
    axes = range(len(kernel))
    mode = op.attributes.get("auto_pad", "NOTSET")
    shape = op.attributes.get("output_shape")
    if shape is None and mode not in ("SAME_UPPER", "SAME_LOWER"):
        return paddings(op, kernel, strides, dilations)
    found = []
    for axis in axes:
        size = op.size(axis + 2)
        wanted = shape[axis - len(kernel)] if shape is not None else size * strides[axis]
        total = strides[axis] * (size - 1) + extra[axis] + (kernel[axis] - 1) * dilations[axis] + 1 - wanted
        less = max(total, 0) // 2
        found.append((less, total - less) if mode == "SAME_UPPER" else (total - less, less))
    return found
