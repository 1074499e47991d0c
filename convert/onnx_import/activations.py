"""Operators that bend each element by itself, and softmax."""

from __future__ import annotations

import math
import operator

import torch
from torch import nn

from .registry import Registry
from .reshaping import reshaped
from .values import Call, Constant, Op, Signal, UnsupportedFormError, Value, times

OPERATORS = Registry()
_FLOAT_LIMIT = 3.402823e38


@OPERATORS.operator("Relu", since=(6, 13, 14))
def relu(op: Op) -> Call:
    """max(x, 0)."""
    return Call(nn.ReLU(), op.inputs)


@OPERATORS.operator("LeakyRelu", since=(6, 16))
def leaky_relu(op: Op) -> Call:
    """Slope ``alpha`` below zero."""
    return Call(nn.LeakyReLU(op.attributes.get("alpha", 0.01)), op.inputs)


@OPERATORS.operator("Elu", since=(6, 22))
def elu(op: Op) -> Call:
    """ELU: alpha (eˣ − 1) below zero."""
    return Call(nn.ELU(op.attributes.get("alpha", 1.0)), op.inputs)


@OPERATORS.operator("Celu", since=(12, 28))
def celu(op: Op) -> Call:
    """CELU: alpha (e^(x/alpha) − 1) below zero."""
    return Call(nn.CELU(op.attributes.get("alpha", 1.0)), op.inputs)


@OPERATORS.operator("Selu", since=(6, 22))
def selu(op: Op) -> Call:
    """A multiple of ELU; a module of its own for the constants that torch has."""
    alpha, gamma = op.attributes.get("alpha", 1.6732632), op.attributes.get("gamma", 1.0507010)
    if math.isclose(alpha, 1.6732632, rel_tol=1e-6) and math.isclose(gamma, 1.0507010, rel_tol=1e-6):
        return Call(nn.SELU(), op.inputs)
    return Call(operator.mul, (Call(nn.ELU(alpha), op.inputs), gamma))


@OPERATORS.operator("ThresholdedRelu", since=(10, 22))
def thresholded_relu(op: Op) -> Call:
    """Zero up to ``alpha``, x above it."""
    return Call(nn.Threshold(op.attributes.get("alpha", 1.0), 0.0), op.inputs)


@OPERATORS.operator("Shrink", since=(9,))
def shrink(op: Op) -> Call:
    """Zero within ±lambd, x moved towards zero by ``bias`` outside."""
    limit, bias = op.attributes.get("lambd", 0.5), op.attributes.get("bias", 0.0)
    if bias not in (0.0, limit):
        raise UnsupportedFormError(f"bias {bias} with lambd {limit}; expected 0 (hard) or lambd (soft)")
    return Call(nn.Hardshrink(limit) if bias == 0.0 else nn.Softshrink(limit), op.inputs)


@OPERATORS.operator("Sigmoid", since=(6, 13))
def sigmoid(op: Op) -> Call:
    """1 / (1 + e⁻ˣ)."""
    return Call(nn.Sigmoid(), op.inputs)


@OPERATORS.operator("HardSigmoid", since=(6, 22))
def hard_sigmoid(op: Op) -> Call:
    """A line, alpha x + beta, between 0 and 1."""
    alpha, beta = op.attributes.get("alpha", 0.2), op.attributes.get("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-4) and beta == 0.5:
        return Call(nn.Hardsigmoid(), op.inputs)
    line = Call(operator.add, (Call(operator.mul, (op.value(0), alpha)), beta))
    return Call(nn.Hardtanh(0.0, 1.0), (line,))


@OPERATORS.operator("HardSwish", since=(14, 22))
def hard_swish(op: Op) -> Call:
    """X times its hard sigmoid."""
    return Call(nn.Hardswish(), op.inputs)


@OPERATORS.operator("Gelu", since=(20,))
def gelu(op: Op) -> Call:
    """X Φ(x), exactly or by tanh."""
    return Call(nn.GELU(approximate=op.attributes.get("approximate", "none")), op.inputs)


@OPERATORS.operator("Swish", since=(24,))
def swish(op: Op) -> Call:
    """X sigmoid(alpha x)."""
    alpha = op.attributes.get("alpha", 1.0)
    if alpha == 1.0:
        return Call(nn.SiLU(), op.inputs)
    return Call(operator.mul, (op.value(0), Call(nn.Sigmoid(), (Call(operator.mul, (op.value(0), alpha)),))))


@OPERATORS.operator("Softplus", since=(1, 22))
def softplus(op: Op) -> Call:
    """log(1 + eˣ)."""
    return Call(nn.Softplus(), op.inputs)


@OPERATORS.operator("Softsign", since=(1, 22))
def softsign(op: Op) -> Call:
    """X / (1 + |x|)."""
    return Call(nn.Softsign(), op.inputs)


@OPERATORS.operator("Tanh", since=(6, 13))
def tanh(op: Op) -> Call:
    """Hyperbolic tangent."""
    return Call(nn.Tanh(), op.inputs)


@OPERATORS.operator("Mish", since=(18, 22))
def mish(op: Op) -> Call:
    """X tanh(softplus(x))."""
    return Call(nn.Mish(), op.inputs)


@OPERATORS.operator("PRelu", since=(9, 16))
def prelu(op: Op) -> Call:
    """A learned slope below zero: one for all, one for each channel, or any that broadcasts."""
    x, slope = op.value(0), op.value(1)
    count = _slopes(slope, op.rank()) if isinstance(slope, Constant) else None
    if count is None or not isinstance(slope, Constant):
        below = Call(operator.mul, (x, slope))
        return Call(torch.where, (Call(torch.lt, (x, 0)), below, x))
    module = nn.PReLU(count)
    module.weight = slope.parameter() if slope.array.ndim == 1 else nn.Parameter(slope.tensor().reshape(count))
    return Call(module, (x,), named_by=slope)


def _slopes(slope: Constant, rank: int) -> int | None:
    """Return how many slopes nn.PReLU would have, or None if it cannot hold them."""
    if slope.dtype not in (torch.float16, torch.float32, torch.float64, torch.bfloat16):
        return None
    if slope.array.size == 1:
        return 1
    shape = (1,) * (rank - slope.array.ndim) + slope.array.shape
    return slope.array.size if rank > 1 and shape[1] == slope.array.size else None


@OPERATORS.operator("Clip", since=(6, 11, 12, 13))
def clip(op: Op) -> Call | Signal:
    """Between two limits: attributes in opset 6, inputs since 11."""
    x = op.signal()
    if op.since == 6:
        low, high = op.attributes.get("min"), op.attributes.get("max")
    elif any(isinstance(op.optional(index), Signal) for index in (1, 2)):
        return Call(torch.clamp, (x,), {"min": op.optional(1), "max": op.optional(2)})
    else:
        low, high = op.number(1), op.number(2)
    low = None if low is not None and low <= -_FLOAT_LIMIT else low
    high = None if high is not None and high >= _FLOAT_LIMIT else high
    return clamped(x, low, high)


def clamped(x: Signal, low: float | None, high: float | None) -> Call | Signal:
    """Return ``x`` between two limits as the module that says what it is: ReLU, ReLU6 or Hardtanh."""
    if low is None and high is None:
        return x
    if x.dtype.is_floating_point and low is not None:
        if low == 0 and high is None:
            return Call(nn.ReLU(), (x,))
        if low == 0 and high == 6:
            return Call(nn.ReLU6(), (x,))
        if high is not None and low < high:
            return Call(nn.Hardtanh(low, high), (x,))
    return Call(torch.clamp, (x,), {"min": low, "max": high})


@OPERATORS.operator("Softmax", "LogSoftmax", since=(1, 11, 13))
def softmax(op: Op) -> Call | Value:
    """Softmax over one axis; before opset 13 over all axes from ``axis`` on, as one."""
    module = nn.Softmax if op.kind == "Softmax" else nn.LogSoftmax
    x, dims = op.value(0), op.value(0).dims
    if op.since >= 13:
        return Call(module(dim=op.axis(-1)), (x,))
    axis = op.axis(1)
    long = [position for position in range(axis, len(dims)) if dims[position] != 1]
    if len(long) <= 1:
        return Call(module(dim=long[0] if long else axis), (x,))
    flat = reshaped(op, x, [times(dims[:axis]), times(dims[axis:])])
    soft = Call(module(dim=-1), (flat,))
    return reshaped(op, soft, list(dims), near=x)
