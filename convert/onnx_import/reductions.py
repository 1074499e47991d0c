"""Operators that take axes away: sums, means, extremes, and where they are."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from .registry import Registry
from .values import Call, Op, Result, UnsupportedFormError, Value, counted

OPERATORS = Registry()

_SINCE = (1, 11, 13, 18)
REDUCTIONS: dict[str, tuple[Callable[..., Any] | None, Callable[..., Any], Callable[..., Any] | None]] = {
    "ReduceSum": (None, torch.sum, None),
    "ReduceMean": (None, torch.mean, None),
    "ReduceMax": (None, torch.amax, None),
    "ReduceMin": (None, torch.amin, None),
    "ReduceProd": (None, torch.prod, None),
    "ReduceL1": (torch.abs, torch.sum, None),
    "ReduceL2": (torch.square, torch.sum, torch.sqrt),
    "ReduceSumSquare": (torch.square, torch.sum, None),
    "ReduceLogSum": (None, torch.sum, torch.log),
    "ReduceLogSumExp": (None, torch.logsumexp, None),
}
"""What is done to each element, how elements are joined, and what is done to the result."""


@OPERATORS.operator("ReduceMean", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare", since=_SINCE)
@OPERATORS.operator("ReduceLogSum", "ReduceLogSumExp", since=(*_SINCE, 28))
@OPERATORS.operator("ReduceMax", "ReduceMin", since=(1, 11, 12, 13, 18, 20))
@OPERATORS.operator("ReduceSum", since=(1, 11, 13))
def reduction(op: Op) -> Call | Value:
    """Join the elements of some axes. The axes are an attribute at first, an input since opset 13 or 18."""
    before, join, after = REDUCTIONS[op.kind]
    rank, named = op.rank(), op.setting("axes", 1)
    if not named:
        named = [] if op.attributes.get("noop_with_empty_axes", 0) else list(range(rank))
    axes = sorted(counted(axis, rank) for axis in named)
    found: Any = op.value(0)
    if before is not None:
        found = Call(before, (found,))
    if axes:
        found = _joined(op, join, found, axes, keepdim=bool(op.attributes.get("keepdims", 1)))
    return Call(after, (found,)) if after is not None else found


def _joined(op: Op, join: Callable[..., Any], x: Any, axes: list[int], *, keepdim: bool) -> Call:
    options: dict[str, Any] = {"keepdim": keepdim}
    if join is torch.prod:
        for axis in reversed(axes):
            x = Call(join, (x, axis), {**options, "dtype": op.signal().dtype})
        return x
    if join is torch.sum and not op.signal().dtype.is_floating_point:
        options["dtype"] = op.signal().dtype
    return Call(join, (x, axes), options)


@OPERATORS.operator("ArgMax", "ArgMin", since=(1, 11, 12, 13))
def arg_extremum(op: Op) -> Call:
    """Where the largest or smallest element is; the first of equals, or the last."""
    function = torch.argmax if op.kind == "ArgMax" else torch.argmin
    x, axis, options = op.value(0), op.axis(0), {"keepdim": bool(op.attributes.get("keepdims", 1))}
    if not op.attributes.get("select_last_index", 0):
        return Call(function, (x, axis), options)
    place = Call(function, (Call(torch.flip, (x, (axis,))), axis), options)
    last = Call(operator.sub, (Call("size", (x, axis)), 1))
    return Call(operator.sub, (last, place))


@OPERATORS.operator("TopK", since=(1, 10, 11, 24))
def top_k(op: Op) -> Result:
    """The k largest or smallest elements of an axis, and where they are; of equals the first come first."""
    k, axis = op.setting("k", 1), op.axis(-1)
    if k is None:
        raise UnsupportedFormError("its k is left out; expected one")
    options = {"dim": axis, "descending": bool(op.attributes.get("largest", 1)), "stable": True}
    ordered = Call(torch.sort, (op.value(0),), options)
    first = (*[slice(None)] * axis, slice(None, k[0]))
    return [Call(operator.getitem, (Call(operator.getitem, (ordered, place)), first)) for place in (0, 1)]
