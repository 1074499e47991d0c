"""The op table: what each module type, function and method does, by every name that it has.

:mod:`lmh.ops` reads it, and decides there what depends on a call's arguments.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .int8 import SpikeConv2d, SpikeLinear, Thresholded
from .qcfs import QCFS


class Kind(Enum):
    """What a node does to the values that pass through it."""

    INPUT = "input"
    PARAMETER = "parameter"
    SYNAPSE = "weighted sum (convolution, linear)"
    AFFINE = "affine"
    SHAPE = "moves values, changes none"
    ACTIVATION = "activation"
    MAXPOOL = "max-pool"
    READOUT = "softmax or sigmoid"
    SIZE = "sizes and whole numbers"
    OUTPUT = "output"
    UNKNOWN = "not in the table"


SYNAPSE_MODULES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
BATCHNORM_MODULES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCENORM_MODULES = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
AVGPOOL_MODULES = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
AVGPOOL_FUNCTIONS = (
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
)  # fmt: skip
MAXPOOL_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
ADAPTIVE_MAXPOOL_FUNCTIONS = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
IDENTITY_MODULES = (nn.Identity, *DROPOUT_MODULES)
UPSAMPLE_MODULES = (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
CONSTANT_PAD_MODULES = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
PAD_MODULES = (
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
    nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d,
    nn.CircularPad3d,
)  # fmt: skip
READOUT_MODULES = (nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax, nn.Sigmoid, nn.LogSigmoid)
ACTIVATION_MODULES = (
    nn.ReLU, QCFS, nn.ReLU6, nn.Hardtanh, nn.Threshold, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU,
    nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Tanh, nn.Hardsigmoid, nn.Hardswish, nn.Softsign, nn.Hardshrink,
    nn.Softshrink, nn.Tanhshrink,
)  # fmt: skip
VIEW_MODULES = (nn.Flatten, nn.Unflatten, *IDENTITY_MODULES)

MODULE_KINDS: dict[type[nn.Module], Kind] = {
    **dict.fromkeys((*SYNAPSE_MODULES, SpikeConv2d, SpikeLinear), Kind.SYNAPSE),
    **dict.fromkeys((*BATCHNORM_MODULES, *INSTANCENORM_MODULES, *AVGPOOL_MODULES, nn.Fold, Thresholded), Kind.AFFINE),
    **dict.fromkeys((*UPSAMPLE_MODULES, *CONSTANT_PAD_MODULES), Kind.AFFINE),
    **dict.fromkeys((*VIEW_MODULES, *PAD_MODULES, nn.PixelShuffle, nn.PixelUnshuffle), Kind.SHAPE),
    **dict.fromkeys((nn.ChannelShuffle, nn.Unfold), Kind.SHAPE),
    **dict.fromkeys(MAXPOOL_MODULES, Kind.MAXPOOL),
    **dict.fromkeys(READOUT_MODULES, Kind.READOUT),
    **dict.fromkeys(ACTIVATION_MODULES, Kind.ACTIVATION),
}

DROPOUT_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
SYNAPSE_FUNCTIONS: set[Any] = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear,
}  # fmt: skip
CONTRACTIONS: set[Any] = {torch.matmul, torch.mm, torch.einsum, operator.matmul, "matmul", "mm"}

# What returns its input's own memory, by the same name as function and as method, or as one of them.
_VIEWS = (
    "flatten", "unflatten", "reshape", "permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "t",
    "squeeze", "unsqueeze", "chunk", "split", "unbind", "narrow", "select", "broadcast_to",
)  # fmt: skip
_COPIES = ("flip", "roll", "tile", "clone", "index_select", "repeat_interleave")
CASTS = ("to", "type", "type_as", "float", "double", "half", "bfloat16")
_VIEW_METHODS = (
    "view", "view_as", "reshape_as", "expand", "expand_as", "unfold", "detach", "contiguous", "cpu", "cuda", *CASTS,
)  # fmt: skip

FUNCTION_KINDS: dict[Callable[..., Any], Kind] = {
    **dict.fromkeys(
        (
            operator.add, operator.iadd, operator.sub, operator.isub, operator.neg, torch.add, torch.sub,
            torch.subtract, torch.neg, torch.negative, F.batch_norm, *AVGPOOL_FUNCTIONS, torch.mean, torch.sum,
            F.interpolate, F.fold, torch.zeros_like, torch.ones_like,
        ),
        Kind.AFFINE,
    ),
    **dict.fromkeys((getattr(torch, name) for name in (*_VIEWS, *_COPIES)), Kind.SHAPE),
    **dict.fromkeys(
        (
            torch.cat, torch.concat, torch.concatenate, torch.stack, torch.detach, F.pad, F.pixel_shuffle,
            F.pixel_unshuffle, F.channel_shuffle, F.unfold, *DROPOUT_FUNCTIONS,
        ),
        Kind.SHAPE,
    ),
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, F.max_pool3d), Kind.MAXPOOL),
    **dict.fromkeys(ADAPTIVE_MAXPOOL_FUNCTIONS, Kind.MAXPOOL),
    **dict.fromkeys((torch.max_pool1d, torch.max_pool2d, torch.max_pool3d), Kind.MAXPOOL),
    **dict.fromkeys((F.softmax, F.log_softmax, F.sigmoid, F.logsigmoid), Kind.READOUT),
    **dict.fromkeys((torch.softmax, torch.log_softmax, torch.sigmoid), Kind.READOUT),
}  # fmt: skip

METHOD_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("add", "add_", "sub", "sub_", "subtract", "mean", "sum", "neg", "negative"), Kind.AFFINE),
    **dict.fromkeys((*_VIEWS, *_COPIES, *_VIEW_METHODS, "repeat"), Kind.SHAPE),
    **dict.fromkeys(("softmax", "log_softmax", "sigmoid"), Kind.READOUT),
    **dict.fromkeys(("size", "dim", "ndimension", "numel", "nelement"), Kind.SIZE),
}

SIZE_ATTRIBUTES = ("shape", "ndim", "device", "dtype")
MOVING_ATTRIBUTES = ("T", "mT", "data")

QUOTIENTS: set[Any] = {
    operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide, "div", "div_", "divide",
    "true_divide",
}  # fmt: skip
PRODUCTS: set[Any] = {
    operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply", *QUOTIENTS,
}  # fmt: skip

MAYBE_SIZES: set[Any] = {
    operator.getitem, operator.add, operator.iadd, operator.sub, operator.isub, operator.neg, operator.mul,
    operator.imul, operator.truediv, operator.itruediv, operator.floordiv, operator.mod, operator.pow, operator.eq,
    operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
}  # fmt: skip

CLAMPS: set[Any] = {
    torch.clamp, torch.clamp_, torch.clip, torch.clip_, torch.clamp_min, torch.clamp_min_, "clamp", "clamp_", "clip",
    "clip_", "clamp_min", "clamp_min_",
}  # fmt: skip
THRESHOLDS: set[Any] = {F.threshold, F.threshold_, torch.threshold}  # type: ignore[attr-defined]

ACTIVATION_SPELLINGS: dict[Callable[..., Any] | str, type[nn.Module]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), nn.ReLU),
    **dict.fromkeys(CLAMPS, nn.Hardtanh),
    **dict.fromkeys(THRESHOLDS, nn.Threshold),
    **dict.fromkeys((F.relu6,), nn.ReLU6),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), nn.Hardtanh),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), nn.LeakyReLU),
    **dict.fromkeys((F.elu, F.elu_), nn.ELU),
    **dict.fromkeys((F.selu, torch.selu, torch.selu_), nn.SELU),
    **dict.fromkeys((F.celu, torch.celu, torch.celu_), nn.CELU),
    F.rrelu: nn.RReLU,
    F.gelu: nn.GELU,
    F.silu: nn.SiLU,
    F.mish: nn.Mish,
    F.softplus: nn.Softplus,
    F.hardswish: nn.Hardswish,
    F.hardsigmoid: nn.Hardsigmoid,
    F.softsign: nn.Softsign,
    F.hardshrink: nn.Hardshrink,
    F.softshrink: nn.Softshrink,
    F.tanhshrink: nn.Tanhshrink,
    **dict.fromkeys((torch.tanh, F.tanh, "tanh", "tanh_"), nn.Tanh),
}  # fmt: skip

VIEWS: set[Any] = {
    operator.getitem, torch.detach, *_VIEWS, *_VIEW_METHODS, *(getattr(torch, name) for name in _VIEWS),
    *DROPOUT_FUNCTIONS,
}  # fmt: skip

ADDITIONS: set[Any] = {operator.add, operator.iadd, torch.add, "add", "add_"}

OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    "add_": "add",
    "sub_": "sub",
    "mul_": "mul",
    "div_": "div",
}
