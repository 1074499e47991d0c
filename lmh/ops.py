"""What each node of a traced graph does, whatever way it is spelled.

Functions, methods and modules are normalised to a :class:`Kind` by the tables of :mod:`lmh.op_table`, activations to
the module type that a rule is keyed by. The audit, the passes, the statistics and the energy count all ask here.
"""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils import _pytree as pytree

from .op_table import (
    ACTIVATION_SPELLINGS,
    ADAPTIVE_MAXPOOL_FUNCTIONS,
    ADDITIONS,
    CLAMPS,
    CONTRACTIONS,
    FUNCTION_KINDS,
    MAYBE_SIZES,
    METHOD_KINDS,
    MODULE_KINDS,
    MOVING_ATTRIBUTES,
    OUT_OF_PLACE,
    PRODUCTS,
    QUOTIENTS,
    SIZE_ATTRIBUTES,
    SYNAPSE_FUNCTIONS,
    VIEW_MODULES,
    VIEWS,
    Kind,
)

PATH = "lmh_path"


def module_of(node: fx.Node) -> nn.Module | None:
    """Return the module that a call_module node calls, else None."""
    if node.op != "call_module":
        return None
    return node.graph.owning_module.get_submodule(str(node.target))  # type: ignore[union-attr]


def plain_sum(node: fx.Node) -> bool:
    """Whether a node adds two others that are not the same, changes neither of them, and does nothing else.

    >>> graph = fx.Graph()
    >>> x, y = graph.placeholder("x"), graph.placeholder("y")
    >>> [plain_sum(graph.call_function(torch.add, (x, y), keywords)) for keywords in ({}, {"alpha": 2})]
    [True, False]
    """
    adds = node.op in ("call_function", "call_method") and node.target in ADDITIONS and node.target not in OUT_OF_PLACE
    sides = {side for side in node.args if isinstance(side, fx.Node)}
    return adds and len(node.args) == len(sides) == 2 and not node.kwargs


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
    if value.target is getattr:
        return value.args[1] in MOVING_ATTRIBUTES
    if value.op != "call_function" or value.target not in MAYBE_SIZES:
        return True
    return any(is_tensor(source) for source in value.all_input_nodes)


def is_signal(value: object) -> bool:
    """Whether ``value`` is a node that carries a tensor computed from the network's input.

    Parameters, what is computed from them alone, and tensors made from sizes are none.
    """
    pending, seen = [value], set()
    while pending:
        current = pending.pop()
        if not is_tensor(current) or current in seen:
            continue
        assert isinstance(current, fx.Node)
        if current.op == "placeholder":
            return True
        seen.add(current)
        pending += reversed(current.all_input_nodes)
    return False


def signals(graph: fx.Graph) -> set[fx.Node]:
    """Return every node for which :func:`is_signal` holds."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (is_tensor(node) and any(source in found for source in node.all_input_nodes)):
            found.add(node)
    return found


def signal_operands(node: fx.Node) -> list[fx.Node]:
    """Return the signals among a call's arguments; one that is used twice, as in ``x * x``, comes twice."""
    return [leaf for leaf in pytree.tree_leaves((node.args, dict(node.kwargs))) if is_signal(leaf)]


def signal_input(node: fx.Node) -> fx.Node:
    """Return the first input that is a signal, or else the first input."""
    return next((source for source in node.all_input_nodes if is_signal(source)), node.all_input_nodes[0])


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

    Activation functions count as ``ACTIVATION`` whether a rule covers them or not; a clamp does only if it has the
    form of a ReLU or of a Hardtanh. A product, division or weighted sum of two signals is in no table. The dict or
    named tuple that is returned counts as ``OUTPUT``.
    """
    match node.op:
        case "placeholder":
            return Kind.INPUT
        case "output":
            return Kind.OUTPUT
        case "get_attr":
            return Kind.PARAMETER
        case "call_module":
            kind = _kind_of_module(module_of(node))  # type: ignore[arg-type]
            return Kind.SHAPE if kind is Kind.MAXPOOL and _selects(node) else kind
    target: Any = node.target
    if _is_container(target):
        return Kind.OUTPUT if all(kind_of(user) is Kind.OUTPUT for user in node.users) else Kind.UNKNOWN
    if target in _BY_ARGUMENTS:
        return _BY_ARGUMENTS[target](node)
    if target in MAYBE_SIZES and not is_tensor(node):
        return Kind.SIZE
    if target in ACTIVATION_SPELLINGS:
        return Kind.ACTIVATION
    kind = (FUNCTION_KINDS if node.op == "call_function" else METHOD_KINDS).get(target, Kind.UNKNOWN)
    return Kind.SHAPE if kind is Kind.MAXPOOL and _selects(node) else kind


def follows_readout(node: fx.Node) -> bool:
    """Whether a node only reshapes or selects from what a readout gives, as ``sigmoid(x).squeeze(1)`` does."""
    if kind_of(node) is not Kind.SHAPE or len(node.all_input_nodes) != 1:
        return False
    (source,) = node.all_input_nodes
    return kind_of(source) is Kind.READOUT or follows_readout(source)


def readout_name(node: fx.Node) -> str:
    """Return what a node of kind ``READOUT`` computes: ``softmax``, ``log_softmax``, ``sigmoid`` or ``logsigmoid``."""
    module = module_of(node)
    if isinstance(module, (nn.Softmax, nn.Softmax2d, nn.Softmin)):
        return "softmax"
    if isinstance(module, nn.LogSoftmax):
        return "log_softmax"
    if module is not None:
        return type(module).__name__.lower()
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


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


def _kind_of_module(module: nn.Module) -> Kind:
    found = module_kind(type(module))
    if hasattr(module, "running_mean") and module.running_mean is None:
        return Kind.UNKNOWN  # statistics of the batch in eval mode too
    if (isinstance(module, nn.Upsample) and module.mode.startswith("nearest")) or (
        found is Kind.AFFINE and getattr(module, "value", None) == 0
    ):
        return Kind.SHAPE
    return found


def _clamp_kind(node: fx.Node) -> Kind:
    low, high = _bounds(node)
    numbers = isinstance(low, int | float) and isinstance(high, int | float) and low < high
    return Kind.ACTIVATION if numbers or (low == 0 and high is None) else Kind.UNKNOWN


def _bounds(node: fx.Node) -> tuple[Any, Any]:
    return argument(node, 1, "min"), argument(node, 2, "max")


def _product_kind(node: fx.Node) -> Kind:
    if not any(is_tensor(source) for source in node.all_input_nodes):
        return Kind.SIZE
    found = signal_operands(node)
    divisor = node.target in QUOTIENTS and found and argument(node, 0, "input") is not found[0]
    return Kind.UNKNOWN if len(found) > 1 or divisor or rounds(node) else Kind.AFFINE


def rounds(node: fx.Node) -> bool:
    """Whether ``node`` is a division to whole numbers."""
    return node.target in (operator.floordiv, torch.floor_divide) or node.kwargs.get("rounding_mode") is not None


def _layer_kind(node: fx.Node) -> Kind:
    """A convolution or linear layer as a function: its weight may be computed, but not from the input."""
    found = signal_operands(node)
    if not found:
        return Kind.AFFINE
    return Kind.SYNAPSE if found == [argument(node, 0, "input")] else Kind.UNKNOWN


def _contraction_kind(node: fx.Node) -> Kind:
    """A matrix product or einsum of one signal and fixed tensors; einsum of one tensor alone only sums and moves."""
    found = signal_operands(node)
    others = [source for source in node.all_input_nodes if source not in found]
    if len(found) > 1 or (found and any(_needs_input(other) for other in others)):
        return Kind.UNKNOWN
    return Kind.SYNAPSE if found and others else Kind.AFFINE


def _needs_input(node: fx.Node) -> bool:
    """Whether the network's input is among a node's ancestors, by its values or by its sizes."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current.op == "placeholder":
            return True
        if current not in seen:
            seen.add(current)
            pending += current.all_input_nodes
    return False


def _pad_kind(node: fx.Node) -> Kind:
    constant = argument(node, 2, "mode", "constant") == "constant"
    return Kind.AFFINE if constant and argument(node, 3, "value") not in (None, 0) else Kind.SHAPE


def _resampling_kind(node: fx.Node) -> Kind:
    return Kind.SHAPE if argument(node, 3, "mode", "nearest").startswith("nearest") else Kind.AFFINE


def _norm_kind(node: fx.Node) -> Kind:
    own = argument(node, 5, "training", False) is not False or argument(node, 1, "running_mean") is None
    return Kind.UNKNOWN if own else Kind.AFFINE


def _cast_kind(node: fx.Node) -> Kind:
    given = [*node.args[1:], *node.kwargs.values()]
    whole = any(isinstance(value, torch.dtype) and not value.is_floating_point for value in given)
    named = node.target == "type" and any(isinstance(value, str) for value in given)
    return Kind.UNKNOWN if whole or named else Kind.SHAPE


def _attribute_kind(node: fx.Node) -> Kind:
    if node.args[1] in SIZE_ATTRIBUTES:
        return Kind.SIZE
    return Kind.SHAPE if node.args[1] in MOVING_ATTRIBUTES else Kind.UNKNOWN


def _selection_kind(node: fx.Node) -> Kind:
    if not is_tensor(node):
        return Kind.SIZE
    return Kind.SHAPE if len(signal_operands(node)) < 2 else Kind.UNKNOWN


_BY_ARGUMENTS: Mapping[Any, Callable[[fx.Node], Kind]] = {
    **dict.fromkeys(CLAMPS, _clamp_kind),
    **dict.fromkeys(PRODUCTS, _product_kind),
    **dict.fromkeys(SYNAPSE_FUNCTIONS, _layer_kind),
    **dict.fromkeys(CONTRACTIONS, _contraction_kind),
    **dict.fromkeys((torch.index_select, "index_select", operator.getitem), _selection_kind),
    **dict.fromkeys(("to", "type"), _cast_kind),
    F.pad: _pad_kind,
    F.interpolate: _resampling_kind,
    F.batch_norm: _norm_kind,
    getattr: _attribute_kind,
}


def activation_module(node: fx.Node) -> nn.Module:
    """Return the module that does what an ``ACTIVATION`` node does, never in place; a ReLU for all that are one."""
    module = module_of(node)
    if module is None:
        module = _functional_module(node)
    if isinstance(module, nn.Threshold) and module.threshold == module.value == 0:
        return nn.ReLU()
    if getattr(module, "inplace", False):
        module = copy.copy(module)
        module.inplace = False  # type: ignore[assignment]
    return module


def _functional_module(node: fx.Node) -> nn.Module:
    target: Any = node.target
    kind = ACTIVATION_SPELLINGS[target]
    if target in CLAMPS:
        low, high = _bounds(node)
        return nn.ReLU() if high is None else nn.Hardtanh(low, high)
    options = {name: value for name, value in node.kwargs.items() if name not in ("inplace", "input", "training")}
    return kind(*node.args[1:], **options)


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


def is_view(node: fx.Node) -> bool:
    """Whether the node's result may share memory with its first argument."""
    module = module_of(node)
    if module is None:
        return node.target in VIEWS or (node.target is getattr and node.args[1] in MOVING_ATTRIBUTES)
    return module_kind(type(module)) is Kind.SHAPE and (
        isinstance(module, VIEW_MODULES) or not type(module).__module__.startswith("torch.nn")
    )


def label(node: fx.Node) -> str:
    """Return where a node stands in the user's module tree, for messages: ``layer1.0.relu_1``.

    Before PREPARE that is the path of its own that the audit gave it, under ``PATH`` in its ``meta``.
    """
    if PATH in node.meta:
        return str(node.meta[PATH])
    return str(node.target) if node.op == "call_module" else joined(owner_path(node), node.name)


def owner_path(node: fx.Node) -> str:
    """Return the path of the module whose forward made this node, "" for the network itself."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


def joined(owner: str, name: str) -> str:
    """Return the path of ``name`` inside ``owner``, which is "" for the network itself."""
    return f"{owner}.{name}" if owner else name
