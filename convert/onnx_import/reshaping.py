"""Operators that give the same elements another shape. The batch stays free, whatever number the file has for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from .registry import Registry
from .values import (
    FIXED_BATCH_ADVICE,
    Call,
    Constant,
    Dim,
    Op,
    Result,
    Sizes,
    UnsupportedFormError,
    Value,
    counted,
    in_trials,
    times,
    whole,
)

OPERATORS = Registry()


def reshaped(op: Op, x: Value | Call, target: Sequence[Dim], *, near: Value | None = None) -> Call | Value:
    """Return ``x`` in another shape, with sizes that change read off a tensor when the network runs.

    Args:
        op: the node.
        x: what to reshape, or a call that gives it.
        target: the size of each axis; at most one -1.
        near: the value whose axes show the sizes; ``x`` unless given.
    """
    shown = near if near is not None else x
    dims = shown.dims if not isinstance(shown, Call) else ()
    if x is shown and tuple(target) == dims:
        assert not isinstance(x, Call)
        return x
    if x is shown and len(dims) > 2 and tuple(target) == (dims[0], times(dims[1:])):
        return Call(torch.flatten, (x, 1))
    sizes: list[int | Call] = []
    for axis, size in enumerate(target):
        if isinstance(size, int):
            sizes.append(size)
        elif not isinstance(shown, Call) and axis < len(dims) and dims[axis] == size:
            sizes.append(Call("size", (shown, axis)))
        elif -1 not in target and -1 not in sizes and size not in dims:
            sizes.append(-1)
        else:
            sizes.append(whole(size, op, near=None if isinstance(shown, Call) else shown))
    return Call(torch.reshape, (x, tuple(sizes)))


@OPERATORS.operator("Reshape", since=(5, 13, 14, 19, 21, 23, 24, 25))
def reshape(op: Op) -> Call | Value:
    """To a shape that is constant, or computed from the shape of a tensor."""
    x, wanted = op.value(0), _sizes(op, 1)
    if not op.attributes.get("allowzero", 0):
        wanted = [x.dims[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    literal = [size for size in wanted if isinstance(size, int)]
    if len(literal) == len(wanted):
        return reshaped(op, x, with_free_axes(x.dims, literal))
    return reshaped(op, x, wanted)


def _sizes(op: Op, index: int) -> list[Dim]:
    """Return an input that holds sizes."""
    found = op.value(index)
    if isinstance(found, Constant):
        return [int(size) for size in found.array.reshape(-1)]
    if isinstance(found, Sizes):
        return found.entries()
    raise UnsupportedFormError("its shape is computed from the values of a tensor; expected sizes")


def with_free_axes(dims: Sequence[Dim], target: Sequence[int]) -> list[Dim]:
    """Return a fixed target shape with the axes of ``dims`` that can change put back in.

    Exporters write the batch size they saw into the target. An axis of ``dims`` that changes is found again behind
    the same number of elements: if its size is there, it is the same axis; if not, it was split or joined with its
    neighbours, and -1 takes what is left.

    Args:
        dims: the shape before.
        target: the shape after, for the first trial.

    >>> with_free_axes([(1, 2, 3), 512, 1, 1], [1, 512])
    [(1, 2, 3), 512]
    >>> with_free_axes([(1, 2, 3), 116, 7, 7], [1, 2, 58, 7, 7])
    [(1, 2, 3), 2, 58, 7, 7]
    >>> with_free_axes([(1, 2, 3), 8], [2, 4])
    [-1, 4]
    """
    first = in_trials(dims)[0]
    moving = [axis for axis, size in enumerate(dims) if isinstance(size, tuple)]
    if not moving or 0 in first:
        return list(target)
    known = math.prod(size for size in target if size != -1)
    full = [math.prod(first) // known if size == -1 and known else size for size in target]
    found: list[Dim] = list(full)
    for axis in moving:
        behind = math.prod(first[:axis])
        places = [place for place in range(len(full)) if math.prod(full[:place]) == behind]
        same = [place for place in places if full[place] == first[axis]]
        if same:
            found[same[0]] = dims[axis]
        elif places and -1 not in found:
            found[places[0]] = -1
    return found


@OPERATORS.operator("Flatten", since=(9, 11, 13, 21, 23, 24, 25))
def flatten(op: Op) -> Call | Value:
    """To two axes."""
    x, dims = op.value(0), op.value(0).dims
    axis = op.attributes.get("axis", 1)
    axis = axis + len(dims) if axis < 0 else axis
    if axis == 1 and len(dims) > 2:
        return Call(nn.Flatten(1), (x,))
    return reshaped(op, x, [times(dims[:axis]), times(dims[axis:])])


@OPERATORS.operator("Squeeze", since=(1, 11, 13, 21, 23, 24, 25))
def squeeze(op: Op) -> Call | Value:
    """Drop axes of size one: those named, else all that always have it."""
    x, dims = op.value(0), op.value(0).dims
    named = op.setting("axes", 1)
    axes = [axis for axis, size in enumerate(dims) if size == 1] if named is None else named
    counted_axes = sorted(counted(axis, len(dims)) for axis in axes)
    if not counted_axes:
        return x
    moving = [axis for axis in counted_axes if dims[axis] != 1]
    if moving:
        raise UnsupportedFormError(
            f"it drops axis {moving[0]}, whose size is {dims[moving[0]]} in trials of 1, 2 and 3 batches; "
            f"{FIXED_BATCH_ADVICE}"
        )
    return Call(torch.squeeze, (x, counted_axes[0] if len(counted_axes) == 1 else tuple(counted_axes)))


@OPERATORS.operator("Unsqueeze", since=(1, 11, 13, 21, 23, 24, 25))
def unsqueeze(op: Op) -> Call | Value:
    """Insert axes of size one."""
    axes = op.setting("axes", 1) or []
    rank = op.rank() + len(axes)
    found: Call | Value = op.value(0)
    for axis in sorted(counted(axis, rank) for axis in axes):
        found = Call(torch.unsqueeze, (found, axis))
    return found


@OPERATORS.operator("Transpose", since=(1, 13, 21, 23, 24, 25))
def transpose(op: Op) -> Call | Value:
    """Put the axes into another order; backwards unless one is given."""
    order = op.attributes.get("perm", list(reversed(range(op.rank()))))
    return op.value(0) if list(order) == sorted(order) else Call(torch.permute, (op.value(0), tuple(order)))


@OPERATORS.operator("DepthToSpace", since=(1, 11, 13, 28))
def depth_to_space(op: Op) -> Call | Value:
    """Channels into blocks of pixels: as torch's pixel shuffle (CRD), or with the block first (DCR)."""
    x, block = op.value(0), op.attributes["blocksize"]
    if op.attributes.get("mode", "DCR") == "CRD":
        return Call(nn.PixelShuffle(block), (x,))
    batch, _, height, width = x.dims
    depth = op.size(1) // block**2
    split = reshaped(op, x, [batch, block, block, depth, height, width])
    moved = Call(torch.permute, (split, (0, 3, 4, 1, 5, 2)))
    return reshaped(op, moved, [batch, depth, times([height, block]), times([width, block])], near=x)


@OPERATORS.operator("SpaceToDepth", since=(1, 13, 28))
def space_to_depth(op: Op) -> Call | Value:
    """Blocks of pixels into channels: as torch's pixel unshuffle (CRD), or with the block first (DCR)."""
    x, block = op.value(0), op.attributes["blocksize"]
    if op.attributes.get("mode", "DCR") == "CRD":
        return Call(nn.PixelUnshuffle(block), (x,))
    batch, channels = x.dims[:2]
    rows, columns = op.size(2) // block, op.size(3) // block
    split = reshaped(op, x, [batch, channels, rows, block, columns, block])
    moved = Call(torch.permute, (split, (0, 3, 5, 1, 2, 4)))
    return reshaped(op, moved, [batch, times([channels, block * block]), rows, columns], near=x)


@OPERATORS.operator("Identity", since=(1, 13, 14, 16, 19, 21, 23, 24, 25))
def identity(op: Op) -> Value:
    """The value itself."""
    return op.value(0)


@OPERATORS.operator("Dropout", since=(7, 10, 12, 13, 22))
def dropout(op: Op) -> Result:
    """Dropout with its ratio, for training; nothing in eval mode. The ratio is an attribute until opset 10."""
    ratio = op.attributes.get("ratio", 0.5) if op.since < 12 else op.number(1)
    if op.since >= 12 and op.number(2):
        raise UnsupportedFormError("it has training_mode true; expected a model exported in eval mode")
    x = op.signal()
    return [Call(nn.Dropout(0.5 if ratio is None else ratio), (x,)), Call(torch.ones_like, (x,), {"dtype": torch.bool})]
