"""One table that says what each node of a traced graph does, whatever way it is spelled.

Functions, methods and modules are normalised to a :class:`Kind`; activations to the module type that a
rule is keyed by. The audit, the passes, the statistics and the energy count all read this table.
"""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

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
AVGPOOL_MODULES = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
MAXPOOL_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
ADAPTIVE_MAXPOOL_FUNCTIONS = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
IDENTITY_MODULES = (nn.Identity, *DROPOUT_MODULES)
READOUT_MODULES = (nn.Softmax, nn.LogSoftmax, nn.Sigmoid, nn.LogSigmoid)
ACTIVATION_MODULES = (
    nn.ReLU, QCFS, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU,
    nn.SiLU, nn.Mish, nn.Softplus, nn.Tanh, nn.Hardsigmoid, nn.Hardswish, nn.Softsign,
)  # fmt: skip

MODULE_KINDS: dict[type[nn.Module], Kind] = {
    **dict.fromkeys(SYNAPSE_MODULES, Kind.SYNAPSE),
    **dict.fromkeys((*BATCHNORM_MODULES, *AVGPOOL_MODULES, nn.Upsample), Kind.AFFINE),
    **dict.fromkeys((nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.ChannelShuffle, *IDENTITY_MODULES), Kind.SHAPE),
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), Kind.SHAPE),
    **dict.fromkeys(MAXPOOL_MODULES, Kind.MAXPOOL),
    **dict.fromkeys(READOUT_MODULES, Kind.READOUT),
    **dict.fromkeys(ACTIVATION_MODULES, Kind.ACTIVATION),
}

FUNCTION_KINDS: dict[Callable[..., Any], Kind] = {
    **dict.fromkeys(
        (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear),
        Kind.SYNAPSE,
    ),
    **dict.fromkeys(
        (
            operator.add, operator.iadd, operator.sub, operator.isub, operator.neg, torch.add, torch.sub,
            F.batch_norm, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, torch.mean, torch.sum,
            F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.interpolate,
        ),
        Kind.AFFINE,
    ),
    **dict.fromkeys(
        (
            torch.flatten, torch.reshape, torch.cat, torch.concat, torch.concatenate, torch.permute, torch.transpose,
            torch.squeeze, torch.unsqueeze, torch.chunk, torch.split, F.dropout, F.dropout2d, F.dropout3d, F.pad,
        ),
        Kind.SHAPE,
    ),
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, F.max_pool3d), Kind.MAXPOOL),
    **dict.fromkeys(ADAPTIVE_MAXPOOL_FUNCTIONS, Kind.MAXPOOL),
    **dict.fromkeys((torch.max_pool1d, torch.max_pool2d, torch.max_pool3d), Kind.MAXPOOL),
    **dict.fromkeys((F.softmax, F.log_softmax, F.sigmoid), Kind.READOUT),
    **dict.fromkeys((torch.softmax, torch.log_softmax, torch.sigmoid), Kind.READOUT),
}  # fmt: skip

METHOD_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("add", "add_", "sub", "sub_", "mean", "sum", "neg"), Kind.AFFINE),
    **dict.fromkeys(
        ("flatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "chunk", "split"),
        Kind.SHAPE,
    ),
    **dict.fromkeys(("softmax", "log_softmax", "sigmoid"), Kind.READOUT),
    **dict.fromkeys(("size", "dim", "numel"), Kind.SIZE),
}

QUOTIENTS: set[Any] = {operator.truediv, operator.itruediv, torch.div, "div", "div_"}
PRODUCTS: set[Any] = {operator.mul, operator.imul, torch.mul, "mul", "mul_"} | QUOTIENTS

DROPOUT_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
}

MAYBE_SIZES: set[Any] = {
    operator.getitem, operator.add, operator.iadd, operator.sub, operator.isub, operator.neg, operator.mul,
    operator.imul, operator.truediv, operator.itruediv, operator.floordiv, operator.mod, operator.pow, operator.eq,
    operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
}  # fmt: skip

CLAMPS: set[Any] = {
    torch.clamp,
    torch.clamp_,
    "clamp",
    "clamp_",
    torch.clamp_min,
    "clamp_min",
    "clamp_min_",
}

ACTIVATION_SPELLINGS: dict[Callable[..., Any] | str, type[nn.Module]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), nn.ReLU),
    **dict.fromkeys(CLAMPS, nn.ReLU),
    **dict.fromkeys((F.relu6,), nn.ReLU6),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), nn.Hardtanh),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), nn.LeakyReLU),
    **dict.fromkeys((F.elu, F.elu_), nn.ELU),
    **dict.fromkeys((F.selu, torch.selu), nn.SELU),
    **dict.fromkeys((F.celu, torch.celu), nn.CELU),
    F.gelu: nn.GELU,
    F.silu: nn.SiLU,
    F.mish: nn.Mish,
    F.softplus: nn.Softplus,
    F.hardswish: nn.Hardswish,
    F.hardsigmoid: nn.Hardsigmoid,
    **dict.fromkeys((torch.tanh, F.tanh, "tanh", "tanh_"), nn.Tanh),
}  # fmt: skip

VIEWS = {torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.chunk,
         torch.split, operator.getitem, "flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze",
         "chunk", "split", "contiguous"}  # fmt: skip


def module_of(node: fx.Node) -> nn.Module | None:
    """Return the module that a call_module node calls, else None."""
    if node.op != "call_module":
        return None
    return node.graph.owning_module.get_submodule(str(node.target))  # type: ignore[union-attr]


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument of a call by position or keyword."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def is_tensor(value: object) -> bool:
    """Whether ``value`` is a node that carries a tensor (or a tuple of tensors), not a size or a number.

    Arithmetic and indexing carry one if any of their inputs does; the search follows one path only, so that
    long graphs of sums and slices stay cheap.
    """
    if not isinstance(value, fx.Node):
        return False
    if value.op == "call_method":
        return METHOD_KINDS.get(str(value.target)) is not Kind.SIZE
    if value.op != "call_function" or value.target not in MAYBE_SIZES:
        return value.target is not getattr
    return any(is_tensor(source) for source in value.all_input_nodes)


def module_kind(kind: type[nn.Module]) -> Kind:
    """Return what a module type does; torchvision's few own layers count where torchvision is imported."""
    ops = sys.modules.get("torchvision.ops")
    if ops is not None and kind in (ops.StochasticDepth, ops.Permute):
        return Kind.SHAPE
    if ops is not None and kind is ops.FrozenBatchNorm2d:
        return Kind.AFFINE
    return MODULE_KINDS.get(kind, Kind.UNKNOWN)


def kind_of(node: fx.Node) -> Kind:
    """Return what ``node`` does.

    Activation functions count as ``ACTIVATION`` whether a rule covers them or not; a clamp does only if
    it is a ReLU (``min=0`` and no maximum). The dict or named tuple that is returned counts as ``OUTPUT``.
    """
    match node.op:
        case "placeholder":
            return Kind.INPUT
        case "output":
            return Kind.OUTPUT
        case "get_attr":
            return Kind.PARAMETER
        case "call_module":
            kind = module_kind(type(module_of(node)))  # type: ignore[arg-type]
            return Kind.SHAPE if kind is Kind.MAXPOOL and _selects(node) else kind
    target: Any = node.target
    if _is_container(target):
        return Kind.OUTPUT if all(kind_of(user) is Kind.OUTPUT for user in node.users) else Kind.UNKNOWN
    if target in CLAMPS:
        low, high = argument(node, 1, "min"), argument(node, 2, "max")
        return Kind.ACTIVATION if low == 0 and high is None else Kind.UNKNOWN
    if target in ACTIVATION_SPELLINGS:
        return Kind.ACTIVATION
    if target in PRODUCTS:
        return _product_kind(node)
    if target is getattr:
        return Kind.SIZE if node.args[1] in ("shape", "ndim", "device", "dtype") else Kind.UNKNOWN
    if target in MAYBE_SIZES and not is_tensor(node):
        return Kind.SIZE
    if target is operator.getitem:
        return Kind.SHAPE
    kind = (FUNCTION_KINDS if node.op == "call_function" else METHOD_KINDS).get(target, Kind.UNKNOWN)
    return Kind.SHAPE if kind is Kind.MAXPOOL and _selects(node) else kind


def _selects(pool: fx.Node) -> bool:
    """Whether each window of a max-pool holds one value, as in feature pyramids: it then only leaves values out."""
    module = module_of(pool)
    if pool.target in ADAPTIVE_MAXPOOL_FUNCTIONS:
        return False
    size = getattr(module, "kernel_size", None) if module is not None else argument(pool, 1, "kernel_size")
    indices = getattr(module, "return_indices", False) or argument(pool, 6, "return_indices", False)
    return not indices and (size == 1 or (isinstance(size, tuple | list) and all(side == 1 for side in size)))


def _is_container(target: Any) -> bool:
    """Whether ``target`` makes a dict, named tuple or dataclass: what a network returns, not what it computes."""
    return isinstance(target, type) and (issubclass(target, dict) or hasattr(target, "_fields") or is_dataclass(target))


def _product_kind(node: fx.Node) -> Kind:
    tensors = [arg for arg in node.all_input_nodes if is_tensor(arg)]
    if not tensors:
        return Kind.SIZE
    signals = [arg for arg in tensors if kind_of(arg) is not Kind.PARAMETER]
    divided = node.target in QUOTIENTS
    if len(signals) > 1 or (divided and signals and node.args[0] is not signals[0]):
        return Kind.UNKNOWN
    return Kind.AFFINE


def activation_module(node: fx.Node) -> nn.Module:
    """Return the module that does what an ``ACTIVATION`` node does, never in place."""
    module = module_of(node)
    if module is not None:
        if getattr(module, "inplace", False):
            module = copy.copy(module)
            module.inplace = False  # type: ignore[assignment]
        return module
    target: Any = node.target
    kind = ACTIVATION_SPELLINGS[target]
    if target in CLAMPS:
        return kind()
    options = {name: value for name, value in node.kwargs.items() if name not in ("inplace", "input")}
    return kind(**options) if len(node.args) == 1 else kind(*node.args[1:], **options)


def is_in_place(node: fx.Node) -> bool:
    """Whether the node overwrites its first argument."""
    if node.op == "call_module":
        return bool(getattr(module_of(node), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    in_place_operator = getattr(node.target, "__module__", "") == "_operator" and name in (
        "iadd", "isub", "imul", "itruediv",
    )  # fmt: skip
    return bool(node.kwargs.get("inplace")) or in_place_operator or (name.endswith("_") and not name.endswith("__"))


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


def label(node: fx.Node) -> str:
    """Return where a node stands in the user's module tree, for messages: ``layer1.0: torch.nn.GELU``."""
    if node.op == "call_module":
        return str(node.target)
    owner = owner_path(node)
    return f"{owner + '.' if owner else ''}{node.name}"


def owner_path(node: fx.Node) -> str:
    """Return the path of the module whose forward made this node, "" for the network itself."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""
