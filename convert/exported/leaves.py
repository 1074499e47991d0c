"""Modules that a rule or the table knows stay whole, though torch.export looks into every one."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable

from torch import fx, nn

from ...op_table import Kind
from ...ops import is_tensor, module_kind, module_of
from .places import module_stack


def in_the_table(module: nn.Module) -> bool:
    """Whether the op table knows the module's type."""
    return module_kind(type(module)) is not Kind.UNKNOWN


def restore_leaves(imported: fx.GraphModule, model: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> None:
    """Put calls of ``model``'s own modules where their forwards were traced.

    Args:
        imported: the graph of ``model``; changed.
        model: where the modules come from, and whose tensors the graph holds.
        is_leaf: which modules to restore. A call is left as it is if it reads more than one value, or gives more
            than one.
    """
    paths = {path for path, module in model.named_modules() if path and is_leaf(module) and _takes_one(module)}
    calls: dict[str, tuple[str, list[fx.Node]]] = {}
    for node in imported.graph.nodes:
        for key, (path, _) in node.meta.get("nn_module_stack", {}).items():
            if path in paths:
                calls.setdefault(key, (path, []))[1].append(node)
                break
    opened = [
        (path, nodes)
        for path, nodes in calls.values()
        if not any(type(module_of(node)) is type(model.get_submodule(path)) for node in nodes)
    ]
    if any([_restore(imported, path, model.get_submodule(path), nodes) for path, nodes in opened]):
        imported.graph.eliminate_dead_code()
        imported.graph.lint()
        imported.recompile()
        imported.delete_all_unused_submodules()


def _takes_one(module: nn.Module) -> bool:
    if type(module).forward is nn.Module.forward:  # a container, as an exported program is made of
        return False
    required = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    return len(required) == 1


def _restore(imported: fx.GraphModule, path: str, module: nn.Module, nodes: list[fx.Node]) -> bool:
    inside = set(nodes)
    read = {source for source in _sources(nodes) if source not in inside and source.op != "get_attr"}
    given = [node for node in nodes if any(user not in inside for user in node.users) and is_tensor(node)]
    signals = [source for source in read if is_tensor(source)]
    if len(signals) != 1 or len(given) != 1 or any(_takes_apart(node, signals[0]) for node in nodes):
        return False
    imported.add_submodule(path, module)
    with imported.graph.inserting_before(given[0]):
        call = imported.graph.call_module(path, (signals[0],))
    call.meta["nn_module_stack"] = module_stack(given[0])
    given[0].replace_all_uses_with(call, delete_user_cb=lambda user: user not in inside)
    for node in reversed(nodes):
        if not node.users:
            imported.graph.erase_node(node)
    return True


def _takes_apart(node: fx.Node, value: fx.Node) -> bool:
    """Whether ``node`` takes an element of a tuple; tensors are indexed by tuples."""
    return node.target is operator.getitem and node.args[0] is value and isinstance(node.args[1], int)


def _sources(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    return {source for node in nodes for source in node.all_input_nodes}
