"""Operators that combine tensors element by element, compare them, or change their type."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import nn

from .activations import clamped
from .registry import Registry
from .values import DTYPES, Call, Constant, Op, Signal, Sizes, UnsupportedFormError, Value, array_of, plain, whole

OPERATORS = Registry()

UNARY: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "Abs": (torch.abs, (6, 13)),
    "Acos": (torch.acos, (7, 22)),
    "Acosh": (torch.acosh, (9, 22)),
    "Asin": (torch.asin, (7, 22)),
    "Asinh": (torch.asinh, (9, 22)),
    "Atan": (torch.atan, (7, 22)),
    "Atanh": (torch.atanh, (9, 22)),
    "Ceil": (torch.ceil, (6, 13)),
    "Cos": (torch.cos, (7, 22)),
    "Cosh": (torch.cosh, (9, 22)),
    "Erf": (torch.erf, (9, 13)),
    "Exp": (torch.exp, (6, 13)),
    "Floor": (torch.floor, (6, 13)),
    "IsNaN": (torch.isnan, (9, 13, 20)),
    "Log": (torch.log, (6, 13)),
    "Neg": (operator.neg, (6, 13)),
    "Not": (torch.logical_not, (1,)),
    "Reciprocal": (torch.reciprocal, (6, 13)),
    "Round": (torch.round, (11, 22)),
    "Sign": (torch.sign, (9, 13)),
    "Sin": (torch.sin, (7, 22)),
    "Sinh": (torch.sinh, (9, 22)),
    "Sqrt": (torch.sqrt, (6, 13)),
    "Tan": (torch.tan, (7, 22)),
}
BINARY: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "Add": (operator.add, (7, 13, 14)),
    "Sub": (operator.sub, (7, 13, 14)),
    "Mul": (operator.mul, (7, 13, 14)),
    "And": (torch.logical_and, (7,)),
    "Or": (torch.logical_or, (7,)),
    "Xor": (torch.logical_xor, (7,)),
    "Equal": (torch.eq, (7, 11, 13, 19)),
    "Greater": (torch.gt, (9, 13)),
    "GreaterOrEqual": (torch.ge, (12, 16)),
    "Less": (torch.lt, (9, 13)),
    "LessOrEqual": (torch.le, (12, 16)),
}


_OPERATORS = ("Add", "Sub", "Mul", "Div", "Sum", "Mean")


def unary(op: Op) -> Call:
    """One function of each element."""
    return Call(UNARY[op.kind][0], (op.value(0),))


def binary(op: Op) -> Call:
    """One function of each pair of elements."""
    return Call(BINARY[op.kind][0], _operands(op))


for _name, (_, _versions) in UNARY.items():
    OPERATORS.operator(_name, since=_versions)(unary)
for _name, (_, _versions) in BINARY.items():
    OPERATORS.operator(_name, since=_versions)(binary)


def _operands(op: Op) -> tuple[Any, ...]:
    """Return all inputs, with Python numbers for constants of one element where torch takes them.

    torch's functions want a tensor first; its operators do not mind.
    """
    values = [op.value(index) for index in range(len(op.inputs))]
    first = values[0] if op.kind not in _OPERATORS else _number_or_value(op, values[0], values)
    return (first, *(_number_or_value(op, value, values) for value in values[1:]))


def _number_or_value(op: Op, value: Value, others: list[Value]) -> Any:
    signals = [other for other in others if isinstance(other, Signal)]
    if not signals or len(value.dims) > max(len(signal.dims) for signal in signals):
        return value
    if isinstance(value, Constant) and value.array.size == 1 and value.dtype != torch.bool:
        return value if _is_learned(value) else plain(value.array)
    if isinstance(value, Sizes) and value.arrays[0].size == 1:
        return whole(value.entries()[0], op)
    return value


def _is_learned(scalar: Constant) -> bool:
    """Whether one element is a parameter, by the dotted name that torch gives those; exporters' own have none."""
    return scalar.trainable and "." in scalar.name


def _dtype(value: Value) -> torch.dtype:
    return torch.int64 if isinstance(value, Sizes) else value.dtype


@OPERATORS.operator("Div", since=(7, 13, 14))
def div(op: Op) -> Call:
    """A quotient, towards zero for whole numbers."""
    dtype = _dtype(op.value(0))
    if dtype.is_floating_point:
        return Call(operator.truediv, _operands(op))
    return Call(torch.div, op.inputs, {"rounding_mode": "trunc"})


@OPERATORS.operator("Pow", since=(7, 12, 13, 15))
def power(op: Op) -> Call:
    """A power, of the type of its base."""
    base, dtype = op.value(0), _dtype(op.value(0))
    found = Call(torch.pow, _operands(op))
    if isinstance(base, Signal) and _dtype(op.value(1)) == dtype:
        return found
    return found if dtype == torch.float64 else Call("to", (found, dtype))


@OPERATORS.operator("Mod", since=(10, 13, 28))
def mod(op: Op) -> Call:
    """What is left of a division: with the sign of the dividend (``fmod``), or of the divisor."""
    return Call(torch.fmod if op.attributes.get("fmod", 0) else torch.remainder, _operands(op))


@OPERATORS.operator("IsInf", since=(10, 20))
def is_inf(op: Op) -> Call:
    """Whether elements are infinite, or infinite with one sign."""
    negative, positive = op.attributes.get("detect_negative", 1), op.attributes.get("detect_positive", 1)
    if negative and positive:
        return Call(torch.isinf, (op.value(0),))
    if negative or positive:
        return Call(torch.isneginf if negative else torch.isposinf, (op.value(0),))
    return Call(torch.zeros_like, (op.value(0),), {"dtype": torch.bool})


@OPERATORS.operator("Max", "Min", since=(8, 12, 13))
def extremum(op: Op) -> Call | Value:
    """The largest or smallest of several tensors; with one number, a limit: max(x, 0) is a ReLU."""
    largest = op.kind == "Max"
    values = [op.value(index) for index in range(len(op.inputs))]
    if len(values) == 2:
        for x, limit in (values, reversed(values)):
            if isinstance(x, Signal) and isinstance(limit, Constant) and limit.array.size == 1:
                number = plain(limit.array)
                if len(limit.dims) <= len(x.dims):
                    return clamped(x, number, None) if largest else clamped(x, None, number)
    function = torch.maximum if largest else torch.minimum
    found: Call | Value = values[0]
    for value in values[1:]:
        found = Call(function, (found, value))
    return found


@OPERATORS.operator("Sum", "Mean", since=(8, 13))
def total(op: Op) -> Call | Value:
    """The sum or mean of several tensors."""
    values = _operands(op)
    found = reduce(lambda left, right: Call(operator.add, (left, right)), values)
    return Call(operator.truediv, (found, len(values))) if op.kind == "Mean" and len(values) > 1 else found


@OPERATORS.operator("Where", since=(9, 16))
def where(op: Op) -> Call:
    """One tensor where a condition holds, the other elsewhere."""
    return Call(torch.where, op.inputs)


def _cast(x: Value, dtype: torch.dtype) -> Call | Value:
    if isinstance(x, Constant):
        return Constant(array_of(x.tensor().to(dtype)), x.name, x.trainable and dtype.is_floating_point)
    return x if _dtype(x) == dtype else Call("to", (x, dtype))


@OPERATORS.operator("Cast", since=(9, 13, 19, 21, 23, 24, 25, 28))
def cast(op: Op) -> Call | Value:
    """Another type of elements."""
    number = op.attributes["to"]
    if number not in DTYPES:
        raise UnsupportedFormError(f"it casts to the ONNX type number {number}; expected one that torch computes in")
    return _cast(op.value(0), DTYPES[number])


@OPERATORS.operator("CastLike", since=(15, 19, 21, 23, 24, 25))
def cast_like(op: Op) -> Call | Value:
    """The type of another tensor's elements."""
    return _cast(op.value(0), _dtype(op.value(1)))


@OPERATORS.operator("Einsum", since=(12, 28))
def einsum(op: Op) -> Call:
    """A sum of products as its equation says."""
    return Call(torch.einsum, (op.attributes["equation"].replace(" ", ""), *op.inputs))


@OPERATORS.operator("CumSum", since=(11, 14))
def cumsum(op: Op) -> Call:
    """Sums of all elements up to each one, from either end, with or without the element itself."""
    x, given = op.value(0), op.number(1)
    axis = int(given or 0)
    turned = Call(torch.flip, (x, (axis,))) if op.attributes.get("reverse", 0) else x
    found = Call(torch.cumsum, (turned, axis), {"dtype": _dtype(x)})
    if op.attributes.get("exclusive", 0):
        found = Call(operator.sub, (found, turned))
    return Call(torch.flip, (found, (axis,))) if op.attributes.get("reverse", 0) else found


@OPERATORS.operator("Trilu", since=(14,))
def trilu(op: Op) -> Call:
    """The upper or lower triangle of matrices."""
    return Call(torch.triu if op.attributes.get("upper", 1) else torch.tril, (op.value(0), int(op.number(1) or 0)))


@OPERATORS.operator("MatMul", since=(9, 13))
def matmul(op: Op) -> Call:
    """A matrix product; with a constant matrix on the right, a linear layer."""
    x, weight = op.value(0), op.value(1)
    if isinstance(weight, Constant) and weight.array.ndim == 2 and weight.dtype.is_floating_point:
        return linear(x, weight, weight.parameter((1, 0)), None)
    return Call(torch.matmul, (x, weight))


def linear(x: Any, weight: Constant, matrix: nn.Parameter, bias: nn.Parameter | None) -> Call:
    """Return a linear layer with this matrix [out, in] and bias [out], called after ``weight``."""
    module = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None, device="meta")
    module.weight, module.bias = matrix, bias  # type: ignore[assignment]
    return Call(module, (x,), named_by=weight)


@OPERATORS.operator("Gemm", since=(9, 11, 13))
def gemm(op: Op) -> Call:
    """A product of matrices, alpha A B + beta C; with constant B, a linear layer with alpha and beta in its weights."""
    a, b, c = op.value(0), op.value(1), op.optional(2)
    alpha, beta = op.attributes.get("alpha", 1.0), op.attributes.get("beta", 1.0)
    left: Any = Call(torch.permute, (a, (1, 0))) if op.attributes.get("transA", 0) else a
    transposed = bool(op.attributes.get("transB", 0))
    if not isinstance(b, Constant) or not b.dtype.is_floating_point:
        right: Any = Call(torch.permute, (b, (1, 0))) if transposed else b
        return _plus(op, _scaled(Call(torch.matmul, (left, right)), alpha), c, beta)
    matrix = b.parameter(None if transposed else (1, 0))
    if alpha != 1.0:
        matrix = nn.Parameter(matrix.detach() * alpha)
    bias = _row(c, matrix.shape[0], beta)
    found = linear(left, b, matrix, bias)
    return found if bias is not None else _plus(op, found, c, beta)


def _row(c: Value | None, count: int, beta: float) -> nn.Parameter | None:
    """Return a constant C as the bias of a linear layer, or None if it is none or differs between rows."""
    if not isinstance(c, Constant) or c.array.ndim > 2 or (c.array.ndim == 2 and c.array.shape[0] != 1):
        return None
    if beta == 1.0 and c.array.shape == (count,):
        return c.parameter()
    return nn.Parameter((c.tensor() * beta).expand(1, count).reshape(count).clone())


def _scaled(x: Any, factor: float) -> Any:
    return x if factor == 1.0 else Call(operator.mul, (x, factor))


def _plus(op: Op, product: Any, c: Value | None, beta: float) -> Call:
    return product if c is None else Call(operator.add, (product, _scaled(c, beta)))
