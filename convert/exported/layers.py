"""ATen operators that become torch.nn modules: one short builder for each family, from arguments to a layer."""

from __future__ import annotations

import operator
from dataclasses import replace
from types import SimpleNamespace as Arguments
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from .calls import Builder, Built, Call, Layer, as_it_is, operator_name, rank

_CONVOLUTIONS: dict[int, tuple[type[nn.Module], Any]] = {
    1: (nn.Conv1d, F.conv1d),
    2: (nn.Conv2d, F.conv2d),
    3: (nn.Conv3d, F.conv3d),
}
_TRANSPOSED: dict[int, tuple[type[nn.Module], Any]] = {
    1: (nn.ConvTranspose1d, F.conv_transpose1d),
    2: (nn.ConvTranspose2d, F.conv_transpose2d),
    3: (nn.ConvTranspose3d, F.conv_transpose3d),
}
_BATCHNORMS: dict[int, type[nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
_FEATURE_DROPOUTS: dict[int, type[nn.Module]] = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}


def _given(**tensors: Any) -> dict[str, fx.Node]:
    return {name: node for name, node in tensors.items() if node is not None}


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _only_first(a: Arguments) -> bool:
    """Whether nothing reads a result of this call but the first of several."""
    return all(user.target is operator.getitem and user.args[1] == 0 for user in a.node.users)


def short(value: Any) -> Any:
    """Return one number for a tuple of equal ones, as people write kernel sizes."""
    equal = isinstance(value, tuple) and len(set(value)) == 1 and isinstance(value[0], int | float)
    return value[0] if equal else value


def conv(a: Arguments) -> Built:
    """conv1d, conv2d, conv3d, with padding as numbers or ``"same"``."""
    shape = _shape(a.weight)
    kind, function = _CONVOLUTIONS[len(shape) - 2]
    geometry = {"stride": a.stride, "padding": a.padding, "dilation": a.dilation, "groups": a.groups}
    sizes = {"in_channels": shape[1] * a.groups, "out_channels": shape[0], "kernel_size": shape[2:]}
    options = {**sizes, **geometry, "bias": a.bias is not None}
    called = Call(function, (a.input, a.weight, a.bias), geometry)
    return Layer(kind, options, a.input, _given(weight=a.weight, bias=a.bias), called)


def conv_transposed(a: Arguments) -> Built:
    """conv_transpose1d, conv_transpose2d, conv_transpose3d."""
    shape = _shape(a.weight)
    kind, function = _TRANSPOSED[len(shape) - 2]
    geometry = {
        "stride": a.stride,
        "padding": a.padding,
        "output_padding": a.output_padding,
        "groups": a.groups,
        "dilation": a.dilation,
    }
    sizes = {"in_channels": shape[0], "out_channels": shape[1] * a.groups, "kernel_size": shape[2:]}
    options = {**sizes, **geometry, "bias": a.bias is not None}
    called = Call(function, (a.input, a.weight, a.bias), geometry)
    return Layer(kind, options, a.input, _given(weight=a.weight, bias=a.bias), called)


def convolution(a: Arguments) -> Built:
    """All convolutions, as decompositions leave them."""
    return conv_transposed(a) if a.transposed else conv(a)


def _linear(source: fx.Node, weight: fx.Node, bias: fx.Node | None) -> Built:
    called = Call(F.linear, (source, weight, bias))
    shape = _shape(weight)
    if len(shape) != 2:
        return called
    options = {"in_features": shape[1], "out_features": shape[0], "bias": bias is not None}
    return Layer(nn.Linear, options, source, _given(weight=weight, bias=bias), called)


def linear(a: Arguments) -> Built:
    """X Wᵀ + b."""
    return _linear(a.input, a.weight, a.bias)


def _transposed_matrix(node: Any) -> fx.Node | None:
    """Return the matrix whose transpose ``node`` is, or None."""
    if not isinstance(node, fx.Node) or rank(node) != 2:
        return None
    swaps: dict[str, tuple[Any, ...]] = {"permute": ([1, 0],), "transpose": (0, 1), "t": ()}
    matrix = node.args[0] if node.args[1:] == swaps.get(operator_name(node)) else None
    return matrix if isinstance(matrix, fx.Node) else None


def addmm(a: Arguments) -> Built:
    """A linear layer as decompositions leave it."""
    weight = _transposed_matrix(a.mat2)
    if weight is None or rank(a.self) != 1 or (a.alpha, a.beta) != (1, 1):
        return as_it_is(a.node)
    return _linear(a.mat1, weight, a.self)


def mm(a: Arguments) -> Built:
    """A linear layer without bias as decompositions leave it."""
    weight = _transposed_matrix(a.mat2)
    return as_it_is(a.node) if weight is None else _linear(a.self, weight, None)


def batch_norm(a: Arguments) -> Built:
    """BatchNorm in its eval form: by running statistics where there are any, in a program of train mode too."""
    tracked = a.running_mean is not None
    options = {
        "num_features": _shape(a.input)[1],
        "eps": a.eps,
        "momentum": a.momentum,
        "affine": a.weight is not None,
        "track_running_stats": tracked,
    }
    tensors = {"running_mean": a.running_mean, "running_var": a.running_var, "weight": a.weight, "bias": a.bias}
    settings = {"training": not tracked, "momentum": a.momentum, "eps": a.eps}
    called = Call(F.batch_norm, (a.input, *tensors.values()), settings)
    if (a.weight is None) != (a.bias is None) or rank(a.input) not in _BATCHNORMS:
        return called
    return Layer(_BATCHNORMS[rank(a.input)], options, a.input, _given(**tensors), called)


def layer_norm(a: Arguments) -> Built:
    """LayerNorm, which the converter has no rule for but users do."""
    options = {
        "normalized_shape": a.normalized_shape,
        "eps": a.eps,
        "elementwise_affine": a.weight is not None,
        "bias": a.bias is not None,
    }
    called = Call(F.layer_norm, (a.input, a.normalized_shape, a.weight, a.bias, a.eps))
    return Layer(nn.LayerNorm, options, a.input, _given(weight=a.weight, bias=a.bias), called)


def group_norm(a: Arguments) -> Built:
    """GroupNorm, which the converter has no rule for but users do."""
    called = Call(F.group_norm, (a.input, a.num_groups, a.weight, a.bias, a.eps))
    if (a.weight is None) != (a.bias is None):
        return called
    options = {
        "num_groups": a.num_groups,
        "num_channels": _shape(a.input)[1],
        "eps": a.eps,
        "affine": a.weight is not None,
    }
    return Layer(nn.GroupNorm, options, a.input, _given(weight=a.weight, bias=a.bias), called)


def first(builder: Builder) -> Builder:
    """Make ``builder`` serve an operator of several results, of which the layer has only the first."""

    def build(a: Arguments) -> Built:
        built = builder(a)
        return replace(built, first=True) if isinstance(built, Layer) and _only_first(a) else as_it_is(a.node)

    return build


def module(kind: type[nn.Module], *same: str, **renamed: str) -> Builder:
    """Make the builder of a module without tensors.

    Args:
        kind: its type.
        same: constructor arguments that the operator calls the same.
        renamed: from constructor argument to the operator's name for it.
    """
    names = {**{name: name for name in same}, **renamed}

    def build(a: Arguments) -> Built:
        return Layer(kind, {name: short(getattr(a, source)) for name, source in names.items()}, a.node.args[0])

    return build


def max_pool(kind: type[nn.Module]) -> Builder:
    """Make the builder of a max-pool, of the operators with and without indices."""

    def build(a: Arguments) -> Built:
        options = {
            "kernel_size": short(a.kernel_size),
            "stride": short(a.stride or a.kernel_size),
            "padding": short(a.padding),
            "dilation": short(a.dilation),
            "ceil_mode": a.ceil_mode,
        }
        return _pool(kind, options, a, indices="with_indices" in operator_name(a.node))

    return build


def adaptive_max_pool(kind: type[nn.Module]) -> Builder:
    """Make the builder of an adaptive max-pool, whose operator always has indices."""

    def build(a: Arguments) -> Built:
        return _pool(kind, {"output_size": short(a.output_size)}, a, indices=True)

    return build


def _pool(kind: type[nn.Module], options: dict[str, Any], a: Arguments, *, indices: bool) -> Layer:
    if indices and not _only_first(a):
        return Layer(kind, {**options, "return_indices": True}, a.self)
    return Layer(kind, options, a.self, first=indices)


def avg_pool(kind: type[nn.Module]) -> Builder:
    """Make the builder of an average pool."""

    def build(a: Arguments) -> Built:
        options = {
            "kernel_size": short(a.kernel_size),
            "stride": short(a.stride or a.kernel_size),
            "padding": short(a.padding),
            "ceil_mode": a.ceil_mode,
            "count_include_pad": a.count_include_pad,
        }
        if kind is not nn.AvgPool1d:
            options["divisor_override"] = a.divisor_override
        return Layer(kind, options, a.self)

    return build


def hardtanh(a: Arguments) -> Built:
    """Hardtanh, and ReLU6, which torch writes as Hardtanh from 0 to 6."""
    if (a.min_val, a.max_val) == (0, 6):
        return Layer(nn.ReLU6, {}, a.self)
    return Layer(nn.Hardtanh, {"min_val": a.min_val, "max_val": a.max_val}, a.self)


def elu(a: Arguments) -> Built:
    """ELU; other scales have no module."""
    if (a.scale, a.input_scale) != (1, 1):
        return as_it_is(a.node)
    return Layer(nn.ELU, {"alpha": a.alpha}, a.self)


def prelu(a: Arguments) -> Built:
    """PReLU, with its slopes."""
    called = Call(F.prelu, (a.self, a.weight))
    return Layer(nn.PReLU, {"num_parameters": _shape(a.weight)[0]}, a.self, _given(weight=a.weight), called)


def softmax(kind: type[nn.Module]) -> Builder:
    """Make the builder of a softmax that keeps the type of its numbers."""

    def build(a: Arguments) -> Built:
        dtype = getattr(a, "dtype", None)
        if dtype not in (None, a.self.meta["val"].dtype):
            return as_it_is(a.node)
        return Layer(kind, {"dim": a.dim}, a.self)

    return build


def feature_dropout(a: Arguments) -> Built:
    """Dropout of whole channels."""
    return Layer(_FEATURE_DROPOUTS.get(rank(a.input), nn.Dropout), {"p": a.p}, a.input)
