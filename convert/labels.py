"""One path for every node of a traced ANN, the same in the audit, in ``keep``, in the report and for the sites."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from ..op_table import Kind
from ..ops import PATH, activation_module, joined, kind_of, owner_path
from .paths import unique_path


def assign_paths(model: fx.GraphModule) -> None:
    """Give every node a path that no other has; :func:`lmh.ops.label` returns it until PREPARE.

    The first call of a module has the module's own path, later ones end in ``_1``, ``_2``, …; an activation that is no
    module is named by its owner and its type in small letters, ``layer1.0.relu``; both are where its site will stand.
    Everything else is named by its owner and its name in the graph.

    Args:
        model: the traced copy, before anything is rewritten; its nodes' ``meta`` is changed.

    >>> model = fx.symbolic_trace(nn.Sequential(relu := nn.ReLU(), relu))
    >>> assign_paths(model)
    >>> [node.meta[PATH] for node in model.graph.nodes]
    ['input_1', '0', '0_1', 'output']
    """
    taken = {name for name, _ in model.named_modules()}
    called: set[Any] = set()
    for node in _activations_first(model.graph):
        if node.op == "call_module" and node.target not in called:
            path = str(node.target)
            called.add(node.target)
        elif node.op == "call_module":
            path = _free(model, str(node.target), taken)
        elif kind_of(node) is Kind.ACTIVATION:
            kind = type(activation_module(node))
            path = _free(model, joined(owner_path(node), kind.__name__.lower()), taken)
        else:
            path = _free(None, joined(owner_path(node), node.name), taken)
        taken.add(path)
        node.meta[PATH] = path


def _activations_first(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes whose paths name modules, and then the others, which must not take one of those."""
    later = []
    for node in graph.nodes:
        if node.op == "call_module" or kind_of(node) is Kind.ACTIVATION:
            yield node
        else:
            later.append(node)
    yield from later


def _free(model: nn.Module | None, wanted: str, taken: set[str]) -> str:
    """Return ``wanted`` with the first ending that no node has, and that names nothing in ``model`` if there is one."""
    path, count = wanted, 0
    while path in taken or (model is not None and unique_path(model, path) != path):
        count += 1
        path = f"{wanted}_{count}"
    return path
