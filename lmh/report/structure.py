"""The graph of a spiking network as a report shows it: every node, and what it works on."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import fx

from ..energy import binary_nodes, tail_nodes
from ..ops import label, module_of
from ..spiking import SpikingSite
from ..time_axis import takes_events
from .records import GraphNode

LEFT_OUT = ("get_attr", "output")


def graph_nodes(snn: fx.GraphModule, kept: Iterable[str] = ()) -> tuple[GraphNode, ...]:
    """Return the nodes in the order in which they run, without parameters and the output; ``kept`` stayed analog.

    >>> from lmh.convert import load
    >>> nodes = graph_nodes(load("zoo:digits-cnn-t4"))
    >>> [node.fate for node in nodes if node.what == "Conv2d"][:2]
    ['once', 'reads spikes']
    """
    binary, tail, events = binary_nodes(snn), tail_nodes(snn), takes_events(snn)
    shown = [node for node in snn.graph.nodes if node.op not in LEFT_OUT]
    position = {node: index for index, node in enumerate(shown)}
    analog = set(kept)
    timed: set[fx.Node] = set()
    on_mean: set[fx.Node] = set()
    found = []
    for node in shown:
        module = module_of(node)
        is_site = isinstance(module, SpikingSite)
        if is_site or (events and node.op == "placeholder") or any(source in timed for source in node.all_input_nodes):
            timed.add(node)
        if is_site:
            fate = "neurons"
        elif label(node) in analog:
            fate = "kept analog"
        elif node in tail or any(source in on_mean for source in node.all_input_nodes):
            fate = "time mean"
            on_mean.add(node)
        elif node not in timed:
            fate = "once"
        else:
            signals = [source for source in node.all_input_nodes if source in timed]
            spikes = bool(signals) and all(source in binary for source in signals)
            fate = "reads spikes" if spikes else "reads values"
        inputs = tuple(position[source] for source in node.all_input_nodes if source in position)
        found.append(GraphNode(label(node), _what(node), fate, inputs))
    return tuple(found)


def _what(node: fx.Node) -> str:
    """Return the class, function or method that a node calls."""
    if node.op == "placeholder":
        return "input"
    module = module_of(node)
    if module is not None:
        return type(module).__name__
    return re.sub(r"^_+", "", getattr(node.target, "__name__", str(node.target)))
