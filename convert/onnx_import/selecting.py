"""Operators that pick, join, repeat or surround elements, and those that ask for a shape."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

from .registry import Registry
from .values import (
    FIXED_BATCH_ADVICE,
    Call,
    Constant,
    Dim,
    Op,
    Result,
    Signal,
    Sizes,
    UnsupportedFormError,
    Value,
    counted,
    dim_of,
    in_trials,
    is_batch,
    times,
    whole,
)

OPERATORS = Registry()
_FAR = 2**31 - 1
"""Exporters write this, or more, for "to the end"."""


@OPERATORS.operator("Concat", since=(4, 11, 13))
def concat(op: Op) -> Call | Value:
    """Join over an axis. A constant with one row is repeated for a batch that it is joined to."""
    values = [op.value(index) for index in range(len(op.inputs))]
    axis = op.axis(1)
    if len(values) == 1:
        return values[0]
    batched = next((value for value in values if isinstance(value.dims[0], tuple)), None)
    parts = [_repeated(value, batched) if axis != 0 else value for value in values]
    return Call(torch.cat, (parts, axis))


def _repeated(value: Value, batched: Value | None) -> Value | Call:
    if batched is None or not isinstance(value, Constant) or value.dims[0] != 1:
        return value
    return Call(torch.broadcast_to, (value, (Call("size", (batched, 0)), *value.dims[1:])))


@OPERATORS.operator("Split", since=(2, 11, 13, 18))
def split(op: Op) -> Result:
    """Into parts of given sizes, or as equal as they can be."""
    x, axis, count = op.value(0), op.axis(0), len(op.used)
    sizes = op.setting("split", 1)
    if sizes is None:
        whole_axis = op.size(axis)
        part = -(-whole_axis // op.attributes.get("num_outputs", count))
        sizes = [max(min(part, whole_axis - part * position), 0) for position in range(count)]
    parts = Call(torch.split, (x, sizes, axis))
    return [Call(operator.getitem, (parts, position)) for position in range(count)]


@OPERATORS.operator("Slice", since=(1, 10, 11, 13))
def slice_(op: Op) -> Call | Value:
    """Every step-th element between two ends of some axes."""
    x, rank = op.value(0), op.rank()
    starts, ends = (_bounds(op, name, index) for name, index in (("starts", 1), ("ends", 2)))
    named = op.setting("axes", 3) or list(range(len(starts)))
    steps = op.setting("steps", 4) or [1] * len(starts)
    found: list[slice] = [slice(None)] * rank
    turned: list[int] = []
    for given, start, end, step in zip(named, starts, ends, steps, strict=True):
        axis = counted(given, rank)
        if step < 0:
            found[axis] = _backwards(start, end, step, op.size(axis))
            turned.append(axis)
        else:
            found[axis] = _forwards(op, start, end, step, x.dims[axis])
            if isinstance(start, int) and isinstance(end, int) and is_batch(x.dims[axis]):
                counts = [len(range(sizes[0])[start:end:step]) for sizes in in_trials([x.dims[axis]])]
                _check_pick(dim_of(counts), x.dims[axis])
    while found and found[-1] == slice(None):
        found.pop()
    taken: Call | Value = Call(operator.getitem, (x, tuple(found))) if found else x
    return Call(torch.flip, (taken, tuple(turned))) if turned else taken


def _check_pick(taken: Dim, size: Dim) -> None:
    """Refuse to take fixed places from the batch: from an exporter, they are all there were at its batch size.

    Raises:
        UnsupportedFormError: if as many are taken whatever the batch size is.
    """
    if isinstance(taken, int) and is_batch(size):
        raise UnsupportedFormError(f"it takes {taken} fixed places from the batch; {FIXED_BATCH_ADVICE}")


def _bounds(op: Op, name: str, index: int) -> list[Dim]:
    if name in op.attributes:
        return list(op.attributes[name])
    found = op.value(index)
    if isinstance(found, Sizes):
        return found.entries()
    return [int(item) for item in op.weight(index).array.reshape(-1)]


def _forwards(op: Op, start: Dim, end: Dim, step: int, size: Dim) -> slice:
    """Return a slice with a positive step, open where it takes everything."""
    first = None if start == 0 or (isinstance(start, int) and start <= -_FAR) else whole(start, op)
    to_end = end == size or (isinstance(end, int) and (end >= _FAR or (isinstance(size, int) and end > size)))
    last = None if to_end else whole(end, op)
    return slice(first, last, None if step == 1 else step)


def _backwards(start: Dim, end: Dim, step: int, size: int) -> slice:
    """Return the slice with a positive step that takes the same elements as one with a negative step."""
    if not isinstance(start, int) or not isinstance(end, int):
        raise UnsupportedFormError("it takes elements backwards from an end that can change; expected fixed ends")
    first = min(start + size if start < 0 else start, size - 1)
    last = max(end + size if end < 0 else end, -1)
    taken = range(first, last, step)
    return slice(taken[-1], taken[0] + 1, -step) if taken else slice(0, 0)


@OPERATORS.operator("Gather", since=(1, 11, 13))
def gather(op: Op) -> Call:
    """Elements of an axis by their place: an embedding where the table is constant, an index otherwise."""
    x, index, axis = op.value(0), op.value(1), op.axis(0)
    if isinstance(x, Constant) and x.array.ndim == 2 and axis == 0 and x.dtype.is_floating_point:
        module = nn.Embedding(x.array.shape[0], x.array.shape[1], device="meta")
        module.weight = x.parameter()
        return Call(module, (index,), named_by=x)
    place: Any = index
    if isinstance(index, Constant):
        _check_pick(index.array.size, x.dims[axis])
    if isinstance(index, Sizes) and index.arrays[0].ndim == 0:
        place = whole(index.entries()[0], op)
    if isinstance(index, Constant):
        place = _plain_index(index)
    return Call(operator.getitem, (x, (*[slice(None)] * axis, place)))


def _plain_index(index: Constant) -> int | slice | Constant:
    """Return a constant index as a number or a slice where it is one, which keeps the graph readable."""
    array = index.array
    if array.ndim == 0:
        return int(array)
    if array.ndim == 1 and array.size and array[0] >= 0 and bool((np.diff(array) == 1).all()):
        return slice(int(array[0]), int(array[-1]) + 1)
    return Constant(array.astype(np.int64), index.name)


@OPERATORS.operator("GatherElements", since=(11, 13))
def gather_elements(op: Op) -> Call:
    """Elements of an axis by their place, one for each place of the index."""
    x, index, axis = op.value(0), op.weight(1), op.axis(0)
    array = index.array.astype(np.int64)
    _check_pick(array.shape[axis], x.dims[axis])
    if bool((array < 0).any()):
        array = np.where(array < 0, array + op.size(axis), array)
    return Call(torch.gather, (x, axis, Constant(array, index.name)))


@OPERATORS.operator("GatherND", since=(11, 12, 13))
def gather_nd(op: Op) -> Call:
    """Elements, or parts, by their places on the first axes."""
    index, skipped = op.weight(1).array, op.attributes.get("batch_dims", 0)
    if skipped:
        raise UnsupportedFormError(f"batch_dims {skipped} came; expected 0")
    _check_pick(index[..., 0].size, op.value(0).dims[0])
    places = [Constant(np.ascontiguousarray(index[..., axis]), op.weight(1).name) for axis in range(index.shape[-1])]
    return Call(operator.getitem, (op.value(0), tuple(places)))


@OPERATORS.operator("Expand", since=(8, 13))
def expand(op: Op) -> Call | Value:
    """Repeat along axes of size one, without copying."""
    x, wanted = op.value(0), _bounds(op, "shape", 1)
    dims = x.dims
    rank = max(len(dims), len(wanted))
    have = [1] * (rank - len(dims)) + list(dims)
    want = [1] * (rank - len(wanted)) + list(wanted)
    found = [_broadcast(a, b) for a, b in zip(have, want, strict=True)]
    if tuple(found) == dims:
        return x
    return Call(torch.broadcast_to, (x, tuple(whole(size, op, near=x) for size in found)))


def _broadcast(have: Dim, want: Dim) -> Dim:
    """Return a size after broadcasting; a number in the file that is the batch it was exported with gives way."""
    if want == 1 or (isinstance(want, int) and isinstance(have, tuple) and want == have[0]):
        return have
    return want


@OPERATORS.operator("Tile", since=(6, 13))
def tile(op: Op) -> Call:
    """Repeat whole axes."""
    return Call(torch.tile, (op.value(0), tuple(whole(size, op) for size in _bounds(op, "repeats", 1))))


@OPERATORS.operator("Pad", since=(2, 11, 13, 18, 19, 21, 23, 24, 25))
def pad(op: Op) -> Call | Value:
    """Surround with a number, or with what the edge, the mirror image or the other end has."""
    x, rank = op.value(0), op.rank()
    pads = op.setting("pads", 1) or []
    named = op.setting("axes", 3) or list(range(rank))
    widths = [(0, 0)] * rank
    for position, axis in enumerate(named):
        widths[counted(axis, rank)] = (pads[position], pads[position + len(named)])
    given = op.attributes["value"] if "value" in op.attributes else op.number(2)
    mode = op.attributes.get("mode", "constant")
    first = next((axis for axis, pair in enumerate(widths) if pair != (0, 0)), rank)
    if first == rank:
        return x
    if mode == "constant":
        flat = _backward_order(widths[first:])
        return Call(F.pad, (x, flat, "constant", given) if given else (x, flat))
    axes = max(rank - first, rank - 2, 1)
    if axes > min(rank - 1, 3):
        raise UnsupportedFormError(f"mode {mode} on axis {first} of {rank}; expected the last three at most")
    modes = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if mode not in modes:
        raise UnsupportedFormError(f"mode {mode} came; expected constant, {', '.join(modes)}")
    return Call(F.pad, (x, _backward_order(widths[rank - axes :]), modes[mode]))


def _backward_order(widths: list[tuple[int, int]]) -> list[int]:
    """Return paddings as torch orders them: last axis first."""
    return [width for pair in reversed(widths) for width in pair]


@OPERATORS.operator("Shape", since=(1, 13, 15, 19, 21, 23, 24, 25))
def shape(op: Op) -> Constant | Sizes:
    """The sizes of all axes, or of some since opset 15."""
    return _known(list(op.value(0).dims[op.attributes.get("start", 0) : op.attributes.get("end")]), vector=True)


@OPERATORS.operator("Size", since=(1, 13, 19, 21, 23, 24, 25))
def size(op: Op) -> Constant | Sizes:
    """The number of elements."""
    return _known([times(op.value(0).dims)], vector=False)


def _known(dims: list[Dim], *, vector: bool) -> Constant | Sizes:
    arrays = tuple(np.array(sizes if vector else sizes[0], dtype=np.int64) for sizes in in_trials(dims))
    return Constant(arrays[0], "sizes") if len(arrays) == 1 else Sizes(arrays)


@OPERATORS.operator("ConstantOfShape", since=(9, 20, 21, 23, 24, 25))
def constant_of_shape(op: Op) -> Call:
    """One number in a shape that follows the batch; in a fixed shape it is folded."""
    sizes = op.value(0)
    if isinstance(sizes, Signal | Constant):
        raise UnsupportedFormError("its shape is computed from the values of a tensor; expected sizes")
    value = op.attributes.get("value")
    array = np.zeros(1, dtype=np.float32) if value is None else numpy_helper.to_array(value)
    filled = Constant(array, "value")
    shape = tuple(whole(entry, op) for entry in sizes.entries())
    return Call("new_full", (op.sources[0], shape, array.reshape(-1)[0].item()), {"dtype": filled.dtype})
