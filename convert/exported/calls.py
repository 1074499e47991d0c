"""What one node of an exported program becomes; a value, put into a graph by the importer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn


@dataclass(frozen=True)
class Call:
    """A function, or a method by its name.

    Attributes:
        target: what is called.
        args: with nodes of the program's graph.
        kwargs: with nodes of the program's graph.
    """

    target: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """A torch.nn module with one input.

    Attributes:
        kind: its type.
        options: for its constructor.
        source: the node of the program's graph that it reads.
        tensors: its parameters and buffers, by name, as nodes of the program's graph.
        otherwise: what is called where no module of the program holds these tensors, or where the program has a
            function in this place; without it there is a module in any case.
        first: whether it stands for the first of several results.
    """

    kind: type[nn.Module]
    options: Mapping[str, Any]
    source: fx.Node
    tensors: Mapping[str, fx.Node] = field(default_factory=dict)
    otherwise: Call | None = None
    first: bool = False


Built = Call | Layer | fx.Node | None
"""A call, a layer, a node that stands for this one, or nothing."""

Builder = Callable[[SimpleNamespace], Built]


def arguments(node: fx.Node) -> SimpleNamespace:
    """Return the arguments of an operator call by their names in its schema, defaults filled in, and ``node``."""
    values: dict[str, Any] = {"node": node}
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if position < len(node.args):
            value: Any = node.args[position]
        else:
            value = node.kwargs.get(argument.name, argument.default_value)
        values[argument.name] = tuple(value) if isinstance(value, list) else value
    return SimpleNamespace(**values)


def operator_name(node: fx.Node) -> str:
    """Return the name of the ATen operator that ``node`` calls, as in ``conv2d``; "" for anything else."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    namespace, _, name = node.target._schema.name.partition("::")
    return name if namespace == "aten" else ""


def as_it_is(node: fx.Node) -> Call:
    """Return the call that ``node`` makes, an operator by its name without the overload."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    return Call(target, node.args, node.kwargs)


def rank(node: fx.Node) -> int:
    """Return the number of axes of a node's value."""
    return int(node.meta["val"].ndim)
