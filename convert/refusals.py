"""What the audit says about a node that no rule covers: where, what it is, and what to do about it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from ..op_table import BATCHNORM_MODULES, CONTRACTIONS, PRODUCTS, SYNAPSE_FUNCTIONS, Kind
from ..ops import activation_module, kind_of, label, module_of, rounds, signal_operands
from .rules import Rules


def describe(node: fx.Node) -> str:
    """Return what a node is, in words a user knows: ``torch.nn.GELU``, ``torch.softmax``, ``.view()``."""
    module = module_of(node)
    if module is not None:
        return _type_name(type(module))
    if node.op == "call_method":
        return f".{node.target}()"
    if node.op == "call_function":
        return _function_name(node.target)
    return node.op


def _type_name(kind: type[nn.Module]) -> str:
    if kind.__module__.startswith("torch.nn.modules."):
        return f"torch.nn.{kind.__name__}"
    alike = hasattr(nn, kind.__name__)  # as a layer of torch's that it is not
    return f"{kind.__module__}.{kind.__qualname__}" if alike else kind.__qualname__


def _function_name(target: Any) -> str:
    """Return the name under which users find a function: torch._C._nn.gelu is torch.nn.functional.gelu."""
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return f"torch.ops.{target}"
    name = getattr(target, "__name__", str(target))
    for home in (F, torch, torch.special, torch.linalg, torch.fft):
        found = [key for key, value in vars(home).items() if value is target and not key.startswith("_")]
        if found:
            return f"{home.__name__}.{name if name in found else found[0]}"
    module = (getattr(target, "__module__", "") or "torch").replace("_operator", "operator")
    return f"{module}.{name}"


def refusal(node: fx.Node, rules: Rules) -> str:
    """Return the audit's line for a node that no rule covers."""
    kind = kind_of(node)
    if kind is Kind.ACTIVATION:
        name = _type_name(type(activation_module(node)))
        supported = ", ".join(rule.__name__ for rule in rules)
        return (
            f"{label(node)}: no rule for {name} (supported: {supported}). "
            f"Pass rules={{{name.removeprefix('torch.')}: as_neuron}}, or --surgery relu, and fine-tune; or --keep "
            f"{label(node)} to leave it analog."
        )
    if kind is Kind.READOUT:
        return (
            f"{label(node)}: {describe(node)} in the middle of the network has no spiking form; expected it only as "
            f"the last step, where it runs on the mean over time. {_leave_analog(node)}, or move it to the end."
        )
    module = module_of(node)
    if module is not None and parametrize.is_parametrized(module):
        return (
            f"{label(node)}: no rule for {describe(node)}, whose weights are computed at every call. Call "
            "torch.nn.utils.parametrize.remove_parametrizations on it first."
        )
    if type(module).__module__.startswith(("torch.ao.", "torchao.")):
        return f"{label(node)}: {describe(node)} is quantised; expected floating weights. Pass the network from before."
    if isinstance(module, BATCHNORM_MODULES) or node.target is F.batch_norm:
        return (
            f"{label(node)}: {describe(node)} without running statistics mixes the samples of a batch; expected "
            "statistics from training. Train it with track_running_stats=True, in eval mode training=False."
        )
    return f"{label(node)}: no rule for {describe(node)}, {_reason(node)}. {_leave_analog(node)}, or {_instead(node)}."


def _leave_analog(node: fx.Node) -> str:
    return f"Pass --keep {label(node)}, or --surgery relu, to leave it analog (keep=, surgery=ReluSurgery() in Python)"


_MULTIPLY = {*PRODUCTS, *CONTRACTIONS, *SYNAPSE_FUNCTIONS, torch.bmm, "bmm", torch.baddbmm, F.bilinear,
             F.scaled_dot_product_attention}  # fmt: skip


def _reason(node: fx.Node) -> str:
    if rounds(node):
        return "which rounds to whole numbers"
    several = len(signal_operands(node)) > 1
    if several and (node.target in _MULTIPLY or isinstance(module_of(node), nn.Bilinear | nn.MultiheadAttention)):
        return "a product of two signals"
    return "which combines several signals in a way that is not affine" if several else "not an affine node"


def _instead(node: fx.Node) -> str:
    name = describe(node).lower()
    if "norm" in name:
        return "train the ANN with BatchNorm in its place"
    if "pool" in name:
        return "use an average pool or a max-pool in its place"
    if rounds(node):
        return "divide without rounding"
    return "rewrite it with convolutions, sums and pools"
