"""Make in-place nodes functional, before anything drops nodes without users.

``F.relu(x, inplace=True)`` whose result is dropped changes ``x`` for every later reader, but in the graph
it has no user and would vanish. Here every later reader of the overwritten value gets the new one.
"""

from __future__ import annotations

from torch import fx

from ..op_table import OUT_OF_PLACE
from ..ops import is_in_place, is_view, label, module_of


def make_functional(model: fx.GraphModule) -> list[str]:
    """Rewrite ``model``'s graph in place (it is the caller's copy) and return what could not be rewritten.

    Nodes that the audit refuses anyway keep their target; only their readers are rewired.
    """
    problems = []
    order = {node: position for position, node in enumerate(model.graph.nodes)}
    for node in [node for node in model.graph.nodes if is_in_place(node)]:  # a module may be called more than once
        if not node.args or not isinstance(node.args[0], fx.Node):
            continue
        target = node.args[0]
        stale = [alias for alias in _aliases(target, order, order[node]) if _read_after(alias, order[node], order)]
        if stale:
            problems.append(
                f"{label(node)}: overwrites a view of {label(stale[0])}, which is read again later; expected no "
                "shared memory. Use the out-of-place form here."
            )
            continue
        for user in [user for user in target.users if order[user] > order[node]]:
            user.replace_input_with(target, node)
        _drop_in_place(node)
    model.recompile()
    return problems


def _drop_in_place(node: fx.Node) -> None:
    """Give arithmetic its out-of-place target; activations are replaced by modules later, dropout stays."""
    if node.op == "call_module":
        module_of(node).inplace = False  # type: ignore[union-attr]
    node.target = OUT_OF_PLACE.get(node.target, node.target)
    if "inplace" in node.kwargs:
        node.kwargs = {**node.kwargs, "inplace": False}


def _aliases(node: fx.Node, order: dict[fx.Node, int], position: int) -> set[fx.Node]:
    """Nodes before ``position`` that share memory with ``node``, other than itself."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        neighbours = [user for user in current.users if is_view(user) and order[user] < position]
        neighbours += [source for source in current.all_input_nodes[:1] if is_view(current)]
        for other in neighbours:
            if other is not node and other not in found:
                found.add(other)
                pending.append(other)
    return found


def _read_after(alias: fx.Node, position: int, order: dict[fx.Node, int]) -> bool:
    return any(order[user] > position for user in alias.users)
