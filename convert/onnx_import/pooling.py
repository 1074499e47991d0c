"""Pools: largest or mean value of a sliding window, or of everything."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import nn

from .convolution import is_symmetric, padded, paddings, spatial
from .registry import Registry
from .values import Call, Constant, Op, UnsupportedFormError

OPERATORS = Registry()
MAX_POOLS: dict[int, type[nn.Module]] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
MEAN_POOLS: dict[int, type[nn.Module]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
GLOBAL_POOLS: dict[str, dict[int, type[nn.Module]]] = {
    "GlobalAveragePool": {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d},
    "GlobalMaxPool": {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d},
}


class _Window:
    """The sliding window of one pool.

    Attributes:
        kernel, strides, dilations: one for each spatial axis.
        pads: before and after each spatial axis.
        ceil: the last window may hang over the end.
    """

    def __init__(self, op: Op) -> None:
        kernel = op.attributes["kernel_shape"]
        self.kernel, self.strides, self.dilations = spatial(op, kernel)
        if len(kernel) not in MAX_POOLS:
            raise UnsupportedFormError(f"a window of {len(kernel)} axes; expected 1, 2 or 3")
        self.pads = paddings(op, self.kernel, self.strides, self.dilations)
        self.ceil = bool(op.attributes.get("ceil_mode", 0))
        if op.attributes.get("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER"):
            self.ceil = False

    def native(self, op: Op) -> tuple[list[int], bool] | None:
        """Return the padding and the ceil_mode with which torch's module has these windows, or None if it has not.

        Padding after the end that adds no other windows than ceil_mode does is no padding at all for torch: what
        hangs over the end counts neither for the largest value nor for the mean.
        """
        before = [pair[0] for pair in self.pads]
        if any(not 0 <= pad <= width // 2 for pad, width in zip(before, self.kernel, strict=True)):
            return None
        if is_symmetric(self.pads):
            return before, self.ceil
        counts = self._counts(op, self.pads, ceil=self.ceil)
        for ceil in (False, True):
            if self._counts(op, [(pad, pad) for pad in before], ceil=ceil) == counts:
                return before, ceil
        return None

    def _counts(self, op: Op, pads: Sequence[tuple[int, int]], *, ceil: bool) -> list[int]:
        """Return the number of windows on each axis; none starts behind the end."""
        found = []
        for axis, (before, after) in enumerate(pads):
            size, stride = op.size(axis + 2), self.strides[axis]
            room = size + before + after - self._reach(axis)
            count = (-(-room // stride) if ceil else room // stride) + 1
            found.append(count - 1 if ceil and (count - 1) * stride >= size + before else count)
        return found

    def _reach(self, axis: int) -> int:
        return self.dilations[axis] * (self.kernel[axis] - 1) + 1

    def reached(self, op: Op) -> list[tuple[int, int]]:
        """Return paddings under which every window lies inside, so that none hangs over the end."""
        if not self.ceil:
            return self.pads
        ends = [
            (count - 1) * self.strides[axis] + self._reach(axis) - op.size(axis + 2) - self.pads[axis][0]
            for axis, count in enumerate(self._counts(op, self.pads, ceil=True))
        ]
        return [(before, end) for (before, _), end in zip(self.pads, ends, strict=True)]


@OPERATORS.operator("MaxPool", since=(8, 10, 11, 12, 22))
def max_pool(op: Op) -> Call:
    """The largest value of a window. Padding that torch's module cannot do is done with −∞ before it."""
    window = _Window(op)
    kind, native = MAX_POOLS[len(window.kernel)], window.native(op)
    if native is not None:
        padding, ceil = native
        module = kind(window.kernel, window.strides, padding, dilation=window.dilations, ceil_mode=ceil)
        return Call(module, (op.value(0),))
    module = kind(window.kernel, window.strides, dilation=window.dilations)
    return Call(module, (padded(op.value(0), window.reached(op), -math.inf),))


@OPERATORS.operator("AveragePool", since=(7, 10, 11, 19, 22))
def average_pool(op: Op) -> Call:
    """The mean of a window. Where torch's module cannot pad, each window is scaled by what it holds."""
    window = _Window(op)
    if any(dilation != 1 for dilation in window.dilations):
        raise UnsupportedFormError(f"dilations {window.dilations} came; expected 1, as torch has no dilated mean pool")
    kind, counted = MEAN_POOLS[len(window.kernel)], bool(op.attributes.get("count_include_pad", 0))
    native = window.native(op)
    if native is not None and (is_symmetric(window.pads) or not counted):
        padding, ceil = native
        options = {"ceil_mode": ceil, "count_include_pad": counted}
        return Call(kind(window.kernel, window.strides, padding, **options), (op.value(0),))
    pads = window.reached(op)
    module = kind(window.kernel, window.strides)
    share = _share(op, module, window.pads if counted else [(0, 0)] * len(pads), pads)
    found = Call(module, (padded(op.value(0), pads),))
    return found if share is None else Call(operator.mul, (found, share))


def _share(
    op: Op, pool: nn.Module, real: Sequence[tuple[int, int]], pads: Sequence[tuple[int, int]]
) -> Constant | None:
    """Return one over the share of each window that counts, or None if all of each does.

    Args:
        op: the node.
        pool: a mean pool without padding.
        real: padding that counts.
        pads: all padding.
    """
    sizes = [op.size(axis + 2) + sum(pair) for axis, pair in enumerate(real)]
    rest = [all_of - counting for wide, narrow in zip(reversed(pads), reversed(real), strict=True)
            for all_of, counting in zip(wide, narrow, strict=True)]  # fmt: skip
    share = pool(nn.functional.pad(torch.ones(1, 1, *sizes), rest)).reciprocal()
    return None if bool((share == 1).all()) else Constant(share.numpy(), "window_scale")


@OPERATORS.operator("GlobalAveragePool", "GlobalMaxPool", since=(1, 22))
def global_pool(op: Op) -> Call:
    """The mean or largest value of each channel."""
    kinds, axes = GLOBAL_POOLS[op.kind], op.rank() - 2
    if axes in kinds:
        return Call(kinds[axes](1), (op.value(0),))
    function = torch.mean if op.kind == "GlobalAveragePool" else torch.amax
    return Call(function, (op.value(0), tuple(range(2, op.rank()))), {"keepdim": True})
