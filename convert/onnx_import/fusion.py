"""Layers that exporters take apart are put together again, so that the converter sees what the author wrote."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch import fx, nn

from .naming import Paths

Gate = Callable[[fx.GraphModule, fx.Node, fx.Node], bool]


def fuse(model: fx.GraphModule, paths: Paths) -> fx.GraphModule:
    """Put a linear layer and its bias, a gated activation, or the two limits of a ReLU6, into one module again.

    Only the spelling of the graph changes: what replaces a pattern computes the same.

    Args:
        model: the network; its graph is changed.
        paths: the module paths that it uses.

    Returns:
        The network with nothing in it that the graph does not use.
    """
    for node in reversed(model.graph.nodes):
        if node.target is operator.add:
            _fuse_bias(model, node)
        elif node.target in (operator.mul, operator.truediv):
            _fuse_gate(model, paths, node)
        elif node.target is torch.clamp:
            _fuse_relu6(model, paths, node)
    model.graph.eliminate_dead_code()
    model.graph.lint()
    return fx.GraphModule(model, model.graph, type(model).__name__).eval()


def _called(model: fx.GraphModule, value: object) -> nn.Module | None:
    """Return the module that a node calls, else None."""
    if isinstance(value, fx.Node) and value.op == "call_module":
        return model.get_submodule(str(value.target))
    return None


def _fuse_bias(model: fx.GraphModule, node: fx.Node) -> None:
    """A linear layer without bias, and a constant added to its outputs."""
    for layer, added in (node.args, reversed(node.args)):
        module = _called(model, layer)
        if not isinstance(layer, fx.Node) or not isinstance(module, nn.Linear) or module.bias is not None:
            continue
        if not isinstance(added, fx.Node) or added.op != "get_attr" or len(layer.users) != 1:
            continue
        owner, _, name = str(added.target).rpartition(".")
        bias = getattr(model.get_submodule(owner), name)
        if isinstance(bias, nn.Parameter) and bias.shape == (module.out_features,):
            module.bias = bias
            node.replace_all_uses_with(layer)
            model.graph.erase_node(node)
            return


def _product(value: object) -> tuple[float, list[fx.Node]]:
    """Return a product as a number and what else is multiplied, looking into products of products."""
    if isinstance(value, int | float):
        return float(value), []
    assert isinstance(value, fx.Node)
    if value.target is operator.mul:
        left, right = (_product(arg) for arg in value.args)
        return left[0] * right[0], left[1] + right[1]
    if value.target is operator.truediv and isinstance(value.args[1], int | float):
        scale, factors = _product(value.args[0])
        return scale / value.args[1], factors
    return 1.0, [value]


def _fuse_gate(model: fx.GraphModule, paths: Paths, node: fx.Node) -> None:
    """An activation that multiplies its input by a gate: SiLU, Hardswish, Mish, GELU."""
    if node.target is operator.truediv and not isinstance(node.args[1], int | float):
        return
    scale, factors = _product(node)
    if len(factors) != 2:
        return
    for x, gate in (factors, reversed(factors)):
        for kind, needed, holds in _GATES:
            if math.isclose(scale, needed, rel_tol=1e-4) and holds(model, x, gate):
                _replace(model, paths, node, kind(), x, gate)
                return


def _replace(
    model: fx.GraphModule, paths: Paths, node: fx.Node, module: nn.Module, x: fx.Node, replaced: fx.Node
) -> None:
    """Put a module in the place of ``node``, under the path of a module that is no longer needed if there is one."""
    if replaced.op == "call_module" and len(replaced.users) == 1:
        path = str(replaced.target)
        model.set_submodule(path, module)
    else:
        path = paths.claim(node.meta["path"])
        model.add_submodule(path, module)
    with model.graph.inserting_before(node):
        call = model.graph.call_module(path, (x,))
    call.meta["path"] = path
    node.replace_all_uses_with(call)
    model.graph.erase_node(node)


def _is_module_of(model: fx.GraphModule, value: object, kind: type[nn.Module], x: fx.Node) -> bool:
    return type(_called(model, value)) is kind and value.args[0] is x  # type: ignore[attr-defined]


def _is_sigmoid(model: fx.GraphModule, x: fx.Node, gate: fx.Node) -> bool:
    return _is_module_of(model, gate, nn.Sigmoid, x)


def _is_hard_sigmoid(model: fx.GraphModule, x: fx.Node, gate: fx.Node) -> bool:
    return _is_module_of(model, gate, nn.Hardsigmoid, x)


def _is_shifted_relu6(model: fx.GraphModule, x: fx.Node, gate: fx.Node) -> bool:
    """ReLU6(x + 3)."""
    return type(_called(model, gate)) is nn.ReLU6 and _plus_number(gate.args[0], 3.0) is x


def _is_tanh_of_softplus(model: fx.GraphModule, x: fx.Node, gate: fx.Node) -> bool:
    return type(_called(model, gate)) is nn.Tanh and _is_module_of(model, gate.args[0], nn.Softplus, x)


def _is_normal_distribution(model: fx.GraphModule, x: fx.Node, gate: fx.Node) -> bool:
    """1 + erf(x / √2), twice the distribution function of the normal distribution."""
    erf = _plus_number(gate, 1.0)
    if erf is None or erf.target is not torch.erf:
        return False
    scale, factors = _product(erf.args[0])
    return factors == [x] and math.isclose(scale, math.sqrt(0.5), rel_tol=1e-4)


def _plus_number(value: object, number: float) -> fx.Node | None:
    """Return what ``number`` is added to, if that is what ``value`` is."""
    if isinstance(value, fx.Node) and value.target is operator.add:
        for one, other in (value.args, reversed(value.args)):
            if isinstance(one, fx.Node) and isinstance(other, int | float) and other == number:
                return one
    return None


_GATES: tuple[tuple[type[nn.Module], float, Gate], ...] = (
    (nn.SiLU, 1.0, _is_sigmoid),
    (nn.Hardswish, 1.0, _is_hard_sigmoid),
    (nn.Hardswish, 1 / 6, _is_shifted_relu6),
    (nn.Mish, 1.0, _is_tanh_of_softplus),
    (nn.GELU, 0.5, _is_normal_distribution),
)


def _fuse_relu6(model: fx.GraphModule, paths: Paths, node: fx.Node) -> None:
    """A ReLU whose output is limited to 6."""
    inner = node.args[0]
    if node.kwargs == {"min": None, "max": 6} and type(_called(model, inner)) is nn.ReLU:
        _replace(model, paths, node, nn.ReLU6(), inner.args[0], inner)  # type: ignore[union-attr, arg-type]
