"""Blocks of a network: the stretches of its graph between places where a single signal carries everything."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..records import Prepared


@dataclass(frozen=True)
class Block:
    """A stretch of a graph, by node names that a prepared ANN and its spiking network share.

    Attributes:
        start: the node whose value the block reads; for the first one the input.
        end: the spiking activation whose value it gives.
        sites: the spiking activations in it by path, in the order in which they run, the one at its end included.
    """

    start: str
    end: str
    sites: tuple[str, ...]


def blocks(prepared: Prepared) -> list[Block]:
    """Return the blocks of a prepared network in order.

    A block ends at a spiking activation behind which nothing else is still to be read: in a residual network behind
    each residual add, in a chain behind each activation, in a DenseNet behind each dense block. What follows the last
    one (the head) belongs to none.

    >>> from torch import nn
    >>> from lmh.convert import prepare
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [block.sites for block in blocks(prepare(net, (4,)))]
    [('1',), ('3',)]
    """
    graph, spiking = prepared.model.graph, set(prepared.spiking)
    carried = of_the_input(graph)
    found: list[Block] = []
    inside: list[str] = []
    start = next(node.name for node in graph.nodes if node.op == "placeholder" and node.users)
    readers_left: dict[fx.Node, int] = {}
    for node in graph.nodes:
        for source in carried & set(node.all_input_nodes):
            readers_left[source] -= 1
            if readers_left[source] == 0:
                del readers_left[source]
        if node in carried:
            readers_left[node] = len(node.users)
        if str(node.target) in spiking:
            inside.append(str(node.target))
            if set(readers_left) == {node}:
                found.append(Block(start, node.name, tuple(inside)))
                start, inside = node.name, []
    return found


def of_the_input(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that depend on the input; a size counts, as who reads it needs the tensor that it is of."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or found & set(node.all_input_nodes):
            found.add(node)
    return found


def cut(model: fx.GraphModule, block: Block) -> fx.GraphModule:
    """Return the part of a graph that computes a block; modules and parameters are shared with ``model``.

    Args:
        model: the prepared ANN, or a spiking network of it.
        block: from :func:`blocks`.
    """
    nodes = {node.name: node for node in model.graph.nodes}
    start, end = nodes[block.start], nodes[block.end]
    wanted = _needed(end, start)
    graph = fx.Graph()
    copies = {start: graph.placeholder(block.start)}
    for node in model.graph.nodes:
        if node in wanted:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(copies[end])
    part = fx.GraphModule(model, graph)
    part.train(model.training)
    return part


def _needed(end: fx.Node, start: fx.Node) -> set[fx.Node]:
    """Return the nodes between ``start`` and ``end``, the second one included."""
    pending: list[fx.Node] = [end]
    found: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in found and node is not start:
            found.add(node)
            pending += node.all_input_nodes
    return found
