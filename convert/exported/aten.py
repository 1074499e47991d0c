"""One table from ATen operator to its builder: what every call in an exported program becomes.

Keys are operator names, with the overload where it matters. Besides what torch.export writes there are the
operators that its default decompositions leave of common networks. A builder gets the arguments of one call by
their names in the schema and returns a :class:`~.calls.Call`, a :class:`~.calls.Layer`, another node that has
the same value, or None for a node that does nothing. In-place forms have been replaced before (:mod:`.memory`).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from . import functions as f
from . import layers as m
from .calls import Builder, Built, arguments, as_it_is, operator_name

WEIGHTED: dict[str, Builder] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), m.conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), m.conv_transposed),
    "convolution": m.convolution,
    "linear": m.linear,
    "addmm": m.addmm,
    "mm": m.mm,
    "batch_norm": m.batch_norm,
    **dict.fromkeys(
        ("_native_batch_norm_legit_no_training", "_native_batch_norm_legit_functional"), m.first(m.batch_norm)
    ),
    "layer_norm": m.layer_norm,
    "native_layer_norm": m.first(m.layer_norm),
    "group_norm": m.group_norm,
}

POOLS: dict[str, Builder] = {
    **dict.fromkeys(("max_pool1d", "max_pool1d_with_indices"), m.max_pool(nn.MaxPool1d)),
    **dict.fromkeys(("max_pool2d", "max_pool2d_with_indices"), m.max_pool(nn.MaxPool2d)),
    **dict.fromkeys(("max_pool3d", "max_pool3d_with_indices"), m.max_pool(nn.MaxPool3d)),
    "adaptive_max_pool1d": m.adaptive_max_pool(nn.AdaptiveMaxPool1d),
    "adaptive_max_pool2d": m.adaptive_max_pool(nn.AdaptiveMaxPool2d),
    "adaptive_max_pool3d": m.adaptive_max_pool(nn.AdaptiveMaxPool3d),
    "avg_pool1d": m.avg_pool(nn.AvgPool1d),
    "avg_pool2d": m.avg_pool(nn.AvgPool2d),
    "avg_pool3d": m.avg_pool(nn.AvgPool3d),
    "adaptive_avg_pool1d": m.module(nn.AdaptiveAvgPool1d, "output_size"),
    **dict.fromkeys(("adaptive_avg_pool2d", "_adaptive_avg_pool2d"), m.module(nn.AdaptiveAvgPool2d, "output_size")),
    **dict.fromkeys(("adaptive_avg_pool3d", "_adaptive_avg_pool3d"), m.module(nn.AdaptiveAvgPool3d, "output_size")),
}

ACTIVATIONS: dict[str, Builder] = {
    "relu": m.module(nn.ReLU),
    "relu6": m.module(nn.ReLU6),
    "hardtanh": m.hardtanh,
    "leaky_relu": m.module(nn.LeakyReLU, "negative_slope"),
    "prelu": m.prelu,
    "rrelu": m.module(nn.RReLU, "lower", "upper"),
    "elu": m.elu,
    "celu": m.module(nn.CELU, "alpha"),
    "selu": m.module(nn.SELU),
    "gelu": m.module(nn.GELU, "approximate"),
    "silu": m.module(nn.SiLU),
    "mish": m.module(nn.Mish),
    "softplus": m.module(nn.Softplus, "beta", "threshold"),
    "tanh": m.module(nn.Tanh),
    "hardsigmoid": m.module(nn.Hardsigmoid),
    "hardswish": m.module(nn.Hardswish),
    "threshold": m.module(nn.Threshold, "threshold", "value"),
    "hardshrink": m.module(nn.Hardshrink, "lambd"),
    "softshrink": m.module(nn.Softshrink, "lambd"),
    "glu": m.module(nn.GLU, "dim"),
    "sigmoid": m.module(nn.Sigmoid),
    "log_sigmoid": m.module(nn.LogSigmoid),
    **dict.fromkeys(("softmax", "_softmax"), m.softmax(nn.Softmax)),
    **dict.fromkeys(("log_softmax", "_log_softmax"), m.softmax(nn.LogSoftmax)),
    "clamp": f.clamp,
    "clamp_min": f.function(torch.clamp_min, "self", "min"),
}

DROPOUTS: dict[str, Builder] = {
    "dropout": m.module(nn.Dropout, "p"),
    "native_dropout": m.first(m.module(nn.Dropout, "p")),
    "feature_dropout": m.feature_dropout,
    "alpha_dropout": m.module(nn.AlphaDropout, "p"),
    "feature_alpha_dropout": m.module(nn.FeatureAlphaDropout, "p"),
}

ARITHMETIC: dict[str, Builder] = {
    "add": f.summed(torch.add),
    "sub": f.summed(torch.sub),
    "rsub": f.swapped_sub,
    "neg": f.function(operator.neg, "self"),
    "mul": f.function(torch.mul, "self", "other"),
    "div": f.function(torch.div, "self", "other"),
    "div.Tensor_mode": lambda a: as_it_is(a.node),
    "div.Scalar_mode": lambda a: as_it_is(a.node),
    "mean": f.reduced(torch.mean),
    "sum": f.reduced(torch.sum),
}

SHAPES: dict[str, Builder] = {
    "flatten": f.flatten,
    "unflatten": m.module(nn.Unflatten, "dim", unflattened_size="sizes"),
    **dict.fromkeys(("view", "_unsafe_view"), f.reshaped("view")),
    "reshape": f.reshaped("reshape"),
    "permute": f.function(torch.permute, "self", "dims"),
    "transpose": f.function(torch.transpose, "self", "dim0", "dim1"),
    "t": f.matrix_transposed,
    "contiguous": f.contiguous,
    "squeeze": f.squeeze,
    "unsqueeze": f.function(torch.unsqueeze, "self", "dim"),
    "chunk": f.function(torch.chunk, "self", "chunks", "dim"),
    "split": f.function(torch.split, "self", "split_size", "dim"),
    "split_with_sizes": f.function(torch.split, "self", "split_sizes", "dim"),
    **dict.fromkeys(("cat", "concat", "concatenate"), f.cat),
    **dict.fromkeys(("pad", "constant_pad_nd"), f.pad),
    "slice": f.slice_,
    "select": f.select,
    "index": f.index,
    "pixel_shuffle": m.module(nn.PixelShuffle, "upscale_factor"),
    "pixel_unshuffle": m.module(nn.PixelUnshuffle, "downscale_factor"),
    "channel_shuffle": m.module(nn.ChannelShuffle, "groups"),
    "upsample_nearest1d": f.interpolate("nearest"),
    "upsample_nearest2d": f.interpolate("nearest"),
    "upsample_nearest3d": f.interpolate("nearest"),
    "_upsample_nearest_exact1d": f.interpolate("nearest-exact"),
    "_upsample_nearest_exact2d": f.interpolate("nearest-exact"),
    "_upsample_nearest_exact3d": f.interpolate("nearest-exact"),
    "upsample_linear1d": f.interpolate("linear"),
    "upsample_bilinear2d": f.interpolate("bilinear"),
    "upsample_bicubic2d": f.interpolate("bicubic"),
    "upsample_trilinear3d": f.interpolate("trilinear"),
    "_upsample_bilinear2d_aa": f.interpolate("bilinear", antialias=True),
    "_upsample_bicubic2d_aa": f.interpolate("bicubic", antialias=True),
    "sym_size": f.size,
    "sym_numel": f.numel,
}

NEEDLESS: dict[str, Builder] = {
    **dict.fromkeys(("detach", "detach_", "alias", "lift", "lift_fresh", "lift_fresh_copy"), f.same),
    **dict.fromkeys(("to", "_to_copy", "type_as"), f.cast),
    "clone": f.clone,
    **dict.fromkeys(("_assert_tensor_metadata", "_assert_scalar", "_assert_async"), f.nothing),
    **dict.fromkeys(("_functional_assert_scalar", "_functional_assert_async"), f.nothing),
    **dict.fromkeys(("sym_constrain_range", "sym_constrain_range_for_size"), f.nothing),
}

TABLE: dict[str, Builder] = {**WEIGHTED, **POOLS, **ACTIVATIONS, **DROPOUTS, **ARITHMETIC, **SHAPES, **NEEDLESS}


def builder(node: fx.Node) -> Builder | None:
    """Return the builder for an operator call, or None if the table has none."""
    name = operator_name(node)
    overload: Any = getattr(node.target, "_overloadname", "")
    return TABLE.get(f"{name}.{overload}") or TABLE.get(name)


def built(node: fx.Node) -> Built:
    """Return what an operator call becomes; an operator that the table does not have stays as it is."""
    found = builder(node)
    return as_it_is(node) if found is None else found(arguments(node))
