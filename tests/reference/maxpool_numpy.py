"""Max-pools of spikes in NumPy float64, written from their definitions, window by window and step by step.

Nothing here imports torch or lmh: it is what the library is compared with. ``first_of_the_lead`` is the rule of a
gate that passes one neuron's spikes; the tests show what it loses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Rule = Callable[[Array], Array]


def places(
    size: int, kernel: int, stride: int, padding: int = 0, dilation: int = 1, ceil: bool = False
) -> list[list[int]]:
    """Return the positions inside each window along one axis; padding holds none."""
    span = dilation * (kernel - 1) + 1
    steps = size + 2 * padding - span
    count = (-(-steps // stride) if ceil else steps // stride) + 1
    if ceil and (count - 1) * stride >= size + padding:  # a window that begins in the padding on the right is none
        count -= 1
    return [[p for k in range(kernel) if 0 <= (p := i * stride - padding + k * dilation) < size] for i in range(count)]


def pooled(x: ArrayLike, windows: Sequence[list[list[int]]], rule: Rule) -> Array:
    """Apply ``rule`` to every window of ``x`` [T, N, C, *F]; ``windows`` are the places along each axis of F."""
    x = np.asarray(x, dtype=np.float64)
    out = np.zeros((*x.shape[:3], *(len(axis) for axis in windows)))
    for index in itertools.product(*(range(len(axis)) for axis in windows)):
        corner = [axis[i] for axis, i in zip(windows, index, strict=True)]
        cells = [x[(..., *place)] for place in itertools.product(*corner)]
        out[(..., *index)] = rule(np.stack(cells, -1))
    return out


def gate(window: Array) -> Array:
    """Pass a spike of the window [T, N, C, K] if its neuron had fired as often as any before this step."""
    count = np.zeros(window.shape[1:])
    rows = []
    for step in window:
        leads = count == count.max(-1, keepdims=True)
        rows.append(np.where(leads, step, 0.0).max(-1))
        count += step != 0
    return np.stack(rows)


def first_of_the_lead(window: Array) -> Array:
    """A gate that passes the spikes of the first neuron among those that have fired most, this step included."""
    count = np.zeros(window.shape[1:])
    rows = []
    for step in window:
        count += step != 0
        rows.append(np.take_along_axis(step, count.argmax(-1)[..., None], -1)[..., 0])
    return np.stack(rows)


def first_of_the_lead_before(window: Array) -> Array:
    """The same, by what had been fired before this step."""
    count = np.zeros(window.shape[1:])
    rows = []
    for step in window:
        rows.append(np.take_along_axis(step, count.argmax(-1)[..., None], -1)[..., 0])
        count += step != 0
    return np.stack(rows)


def growth_of_the_maximum(window: Array) -> Array:
    """Return by how much the largest sum so far grows at each step, for any values."""
    largest = np.cumsum(window, 0).max(-1)
    return np.diff(largest, axis=0, prepend=np.zeros((1, *largest.shape[1:])))


def average(window: Array) -> Array:
    """Return the mean of the window at each step."""
    return window.mean(-1)
