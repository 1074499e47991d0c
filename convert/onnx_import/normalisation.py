"""Normalisation, as modules that own their statistics and weights."""

from __future__ import annotations

import operator

import numpy as np
import torch
from torch import nn

from .registry import Registry
from .values import Call, Constant, Op, Result, UnsupportedFormError

OPERATORS = Registry()
BATCH_NORMS: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
INSTANCE_NORMS: dict[int, type[nn.Module]] = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


def _kind(table: dict[int, type[nn.Module]], rank: int) -> type[nn.Module]:
    if rank not in table:
        raise UnsupportedFormError(f"an input of rank {rank}; expected {', '.join(map(str, table))}")
    return table[rank]


@OPERATORS.operator("BatchNormalization", since=(9, 14, 15))
def batch_norm(op: Op) -> Call:
    """BatchNorm with its running statistics. ONNX's momentum is the share of the old value, torch's of the new."""
    if op.attributes.get("training_mode", 0):
        raise UnsupportedFormError("it has training_mode 1; expected 0. Export the model in eval mode")
    scale, bias, mean, variance = (op.weight(index) for index in range(1, 5))
    module = _kind(BATCH_NORMS, op.rank())(
        scale.array.size,
        eps=op.attributes.get("epsilon", 1e-5),
        momentum=round(1 - op.attributes.get("momentum", 0.9), 7),
        device="meta",
    )
    module.weight, module.bias = scale.parameter(), bias.parameter()
    module.running_mean, module.running_var = mean.tensor(), variance.tensor()
    module.num_batches_tracked = torch.tensor(0)
    return Call(module, (op.value(0),), named_by=scale)


@OPERATORS.operator("InstanceNormalization", since=(6, 22))
def instance_norm(op: Op) -> Call:
    """Each channel of each sample by its own mean and variance."""
    scale, bias = op.weight(1), op.weight(2)
    kind = _kind(INSTANCE_NORMS, op.rank())
    module = kind(scale.array.size, eps=op.attributes.get("epsilon", 1e-5), affine=True, device="meta")
    module.weight, module.bias = scale.parameter(), bias.parameter()
    return Call(module, (op.value(0),), named_by=scale)


@OPERATORS.operator("GroupNormalization", since=(21,))
def group_norm(op: Op) -> Call:
    """Each group of channels by its mean and variance. The form of opset 18 was withdrawn from ONNX."""
    scale, bias = op.weight(1), op.weight(2)
    eps = op.attributes.get("epsilon", 1e-5)
    module = nn.GroupNorm(op.attributes["num_groups"], op.size(1), eps=eps, device="meta")
    module.weight, module.bias = scale.parameter(), bias.parameter()
    return Call(module, (op.value(0),), named_by=scale)


def _trailing(op: Op) -> list[int]:
    """Return the sizes of the axes that a layer's norm is over."""
    return [op.size(axis) for axis in range(op.axis(-1), op.rank())]


def _shaped(given: Constant, shape: list[int]) -> nn.Parameter:
    """Return a weight with the shape that torch wants it to have."""
    if list(given.array.shape) == shape:
        return given.parameter()
    return nn.Parameter(torch.from_numpy(np.broadcast_to(given.array, shape).copy()))


@OPERATORS.operator("LayerNormalization", since=(17,))
def layer_norm(op: Op) -> Result:
    """The axes from ``axis`` on by their mean and variance, which are its further outputs."""
    scale, bias, shape = op.weight(1), op.constant(2), _trailing(op)
    eps = op.attributes.get("epsilon", 1e-5)
    module = nn.LayerNorm(shape, eps=eps, bias=bias is not None, device="meta")
    module.weight = _shaped(scale, shape)
    if bias is not None:
        module.bias = _shaped(bias, shape)
    x = op.value(0)
    axes = list(range(op.axis(-1), op.rank()))
    mean = Call(torch.mean, (x, axes), {"keepdim": True})
    variance = Call(torch.var, (x, axes), {"correction": 0, "keepdim": True})
    return [Call(module, (x,), named_by=scale), mean, Call(torch.rsqrt, (Call(operator.add, (variance, eps)),))]


@OPERATORS.operator("RMSNormalization", since=(23,))
def rms_norm(op: Op) -> Call:
    """The axes from ``axis`` on by their root mean square."""
    scale, shape = op.weight(1), _trailing(op)
    module = nn.RMSNorm(shape, eps=op.attributes.get("epsilon", 1e-5), device="meta")
    module.weight = _shaped(scale, shape)
    return Call(module, (op.value(0),), named_by=scale)


@OPERATORS.operator("LRN", since=(1, 13))
def local_response_norm(op: Op) -> Call:
    """Each element by the squares of its neighbours over channels."""
    size = op.attributes["size"]
    if size % 2 == 0:
        raise UnsupportedFormError(f"size {size}; expected an odd one, as torch centres even windows elsewhere")
    alpha, beta, k = (op.attributes.get(*item) for item in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0)))
    return Call(nn.LocalResponseNorm(size, alpha, beta, k), (op.value(0),))


@OPERATORS.operator("LpNormalization", since=(1, 22))
def lp_norm(op: Op) -> Call:
    """One axis by its L1 or L2 norm."""
    return Call(nn.functional.normalize, (op.value(0), op.attributes.get("p", 2), op.axis(-1)))
