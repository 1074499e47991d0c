"""Pooling windows: what a pool of torch adds up at every position, and what it divides by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from ...ops import argument, module_of
from .nir_values import Array, NoNodeError, Value

_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, F.avg_pool1d, F.avg_pool2d)
_MAXIMA = (nn.MaxPool1d, nn.MaxPool2d, F.max_pool1d, F.max_pool2d, torch.max_pool1d, torch.max_pool2d)
_ADAPTIVE = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_max_pool1d, F.adaptive_max_pool2d,
)  # fmt: skip


@dataclass(frozen=True)
class Window:
    """A window that moves over the positions of a channel.

    Attributes:
        kernel: size on each axis.
        stride: step on each axis.
        before: zeros in front of each axis.
        after: zeros behind each axis; negative where the last positions are not read.
        divisor: what the sum is divided by at each output position, shape of the output, or one number.
        keeps_constants: a constant input gives the same constant output.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    divisor: Array | float = 1.0
    keeps_constants: bool = False

    @property
    def symmetric(self) -> bool:
        """Whether NIR's pools, with as much padding behind as in front, read the same."""
        return all(
            0 <= before - after < stride
            for before, after, stride in zip(self.before, self.after, self.stride, strict=True)
        )

    @property
    def key(self) -> tuple[Any, ...]:
        """Two windows with the same key do the same."""
        divisor = self.divisor.tobytes() if isinstance(self.divisor, np.ndarray) else self.divisor
        return self.kernel, self.stride, self.before, self.after, divisor


def _each(value: Any, axes: int) -> tuple[int, ...]:
    return (int(value),) * axes if isinstance(value, int) else tuple(int(item) for item in value)


def _given(node: fx.Node, position: int, name: str, default: Any) -> Any:
    module = module_of(node)
    return getattr(module, name, default) if module is not None else argument(node, position, name, default)


def _axes(before: Sequence[int]) -> int:
    axes = len(before) - 1
    if axes not in (1, 2):
        raise NoNodeError(f"pools over {axes} axes; NIR has pools over 1 and 2")
    return axes


def average_window(node: fx.Node, before: Sequence[int], after: Sequence[int]) -> Window:
    """Return the window of an average pool from [C, *before] to [C, *after].

    Raises:
        NoNodeError: if no window says it.
    """
    what = type(module_of(node)) if module_of(node) is not None else node.target
    if what not in (*_AVERAGES, *_ADAPTIVE):
        raise NoNodeError("has no NIR node")
    axes = _axes(before)
    if what in _ADAPTIVE:
        return dividing_window(before, after)
    window, padding = _window(node, axes, before, after)
    include = _given(node, 5, "count_include_pad", True)
    override = _given(node, 6, "divisor_override", None)
    counts = [
        _counts(size, out, kernel, stride, pad, include)
        for size, out, kernel, stride, pad in zip(
            before[1:], after[1:], window.kernel, window.stride, padding, strict=True
        )
    ]
    divisor = np.full(tuple(after[1:]), float(override)) if override else _outer(counts)
    keeps = not override and (not include or not any(padding))
    if (divisor == divisor.flat[0]).all():
        return Window(*_spans(window), divisor=float(divisor.flat[0]), keeps_constants=keeps)
    return Window(*_spans(window), divisor=divisor, keeps_constants=keeps)


def maximum_window(node: fx.Node, before: Sequence[int], after: Sequence[int]) -> Window:
    """Return the window of a max-pool from [C, *before] to [C, *after].

    Raises:
        NoNodeError: if no window says it.
    """
    axes = _axes(before)
    what = type(module_of(node)) if module_of(node) is not None else node.target
    if what in _ADAPTIVE:
        return dividing_window(before, after)
    dilation = _each(_given(node, 4, "dilation", 1), axes)
    if what not in _MAXIMA or any(step != 1 for step in dilation) or _given(node, 6, "return_indices", False):
        raise NoNodeError("has no NIR node")
    return _window(node, axes, before, after)[0]


def dividing_window(before: Sequence[int], after: Sequence[int]) -> Window:
    """Return the window of an adaptive pool whose output size divides its input.

    Raises:
        NoNodeError: if it does not divide.
    """
    sizes = list(zip(before[1:], after[1:], strict=True))
    if any(size % out for size, out in sizes):
        raise NoNodeError(f"pools {list(before[1:])} to {list(after[1:])}, which does not divide it")
    kernel = tuple(size // out for size, out in sizes)
    none = (0,) * len(sizes)
    return Window(kernel, kernel, none, none, divisor=float(np.prod(kernel)), keeps_constants=True)


def adaptive_matrix(before: Sequence[int], after: Sequence[int]) -> Array:
    """Return what an adaptive average pool does to the positions of a channel, shape [out positions, positions]."""
    matrix: Array = np.ones((1, 1))
    for size, out in zip(before[1:], after[1:], strict=True):
        axis = np.zeros((out, size))
        for i in range(out):
            start, end = i * size // out, -(-(i + 1) * size // out)
            axis[i, start:end] = 1 / (end - start)
        matrix = np.kron(matrix, axis)
    return matrix


def _window(node: fx.Node, axes: int, before: Sequence[int], after: Sequence[int]) -> tuple[Window, tuple[int, ...]]:
    """Return the span of a pool, and its padding as torch was given it."""
    kernel = _each(_given(node, 1, "kernel_size", None), axes)
    stride = _each(_given(node, 2, "stride", None) or kernel, axes)
    padding = _each(_given(node, 3, "padding", 0), axes)
    behind = tuple(
        (out - 1) * step + length - size - pad
        for size, out, length, step, pad in zip(before[1:], after[1:], kernel, stride, padding, strict=True)
    )
    return Window(kernel, stride, padding, behind), padding


def _spans(window: Window) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return window.kernel, window.stride, window.before, window.after


def _counts(size: int, out: int, kernel: int, stride: int, padding: int, include: bool) -> Array:
    """Return how many positions torch counts in each window of one axis."""
    start = np.arange(out) * stride - padding
    end = np.minimum(start + kernel, size + padding)
    if not include:
        start, end = np.maximum(start, 0), np.minimum(end, size)
    return (end - start).astype(np.float64)


def _outer(counts: Sequence[Array]) -> Array:
    result = counts[0]
    for other in counts[1:]:
        result = result[..., None] * other
    return result


def unread(value: Value, labels: Array, stride: tuple[int, ...]) -> tuple[int, ...]:
    """How many positions behind the last taken one are not read, as negative padding."""
    sizes = zip(value.shape[1:], labels.shape[1:], stride, strict=True)
    return tuple((out - 1) * step + 1 - size for size, out, step in sizes)
