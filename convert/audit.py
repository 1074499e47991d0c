"""The audit: every node of a traced graph against the rules, all refusals at once."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from ..errors import ArgumentError
from ..op_table import DROPOUT_FUNCTIONS, Kind
from ..ops import activation_module, argument, kind_of, label, module_of, signals
from ..records import Keep, NodeFate, Spike
from ..shapes import BATCHES, batch_use, leading, node_values
from .refusals import describe, refusal
from .rules import Plan

Decisions = dict[fx.Node, Spike | Keep]
_AFTER_READOUT = (Kind.READOUT, Kind.OUTPUT)


def audit(
    model: fx.GraphModule, plan: Plan, sample_shape: Sequence[int]
) -> tuple[Decisions, list[NodeFate], list[str]]:
    """Look at every node and change nothing.

    Args:
        model: a traced ANN without in-place nodes.
        plan: rules, what to keep, and surgery.
        sample_shape: shape of one input sample.

    Returns:
        What the plan says for each activation node, the fate of every node, and a line for each problem.
    """
    decisions: Decisions = {}
    fates: list[NodeFate] = []
    problems: list[str] = []
    carried = signals(model.graph)
    for node in model.graph.nodes:
        fate = "unchanged"
        try:
            decision = _decide(node, plan) if node in carried else None
        except ArgumentError as error:
            problems.append(str(error))
            fate = "refused"
        else:
            if decision is not None:
                decisions[node] = decision
                fate = "converted" if isinstance(decision, Spike) else "kept"
        fates.append(NodeFate(label(node), describe(node), fate))
    problems += [problem for node in model.graph.nodes if (problem := _pool_problem(node, decisions))]
    problems += _structure_problems(model)
    known = [fate.path for fate in fates]
    problems += [_unknown_path(path, known) for path in sorted(plan.keep - set(known))]
    if not problems:
        problems += batch_problems(model, sample_shape)
    if not any(isinstance(decision, Spike) for decision in decisions.values()) and not problems:
        problems.append(
            "the network has no activation that becomes a neuron; expected at least one ReLU or QCFS. "
            "Pass rules={MyActivation: as_neuron} for an activation of your own."
        )
    return decisions, fates, problems


def _decide(node: fx.Node, plan: Plan) -> Spike | Keep | None:
    """Apply the rules to one node that carries a signal; None for nodes that need none.

    Raises:
        ArgumentError: with the problem's text.
    """
    kind = kind_of(node)
    module = module_of(node)
    if label(node) in plan.keep:
        return Keep()
    if node.target in DROPOUT_FUNCTIONS and argument(node, 2, "training", True) is not False:
        raise ArgumentError(
            f"{label(node)}: a dropout that is active in eval mode too; expected training=self.training. Pass it."
        )
    rules = plan.rules
    ruled = module is not None and type(module) in rules
    if kind is Kind.READOUT and not ruled and all(kind_of(user) in _AFTER_READOUT for user in node.users):
        return None
    if not ruled and kind not in (Kind.ACTIVATION, Kind.READOUT, Kind.UNKNOWN):
        return None
    activation = activation_module(node) if kind is Kind.ACTIVATION else module
    if activation is not None and type(activation) in rules:
        try:
            return rules[type(activation)](activation)
        except ArgumentError as error:
            if plan.surgery is None:
                raise ArgumentError(f"{label(node)}: {error}") from error
    if plan.surgery is not None:
        return Spike() if isinstance(activation, plan.surgery.stand_ins) else Keep()
    raise ArgumentError(refusal(node, plan.rules))


def _unknown_path(path: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(path, known, 3)
    return f"{path}: nothing in the network has this path; expected one that --dry-run lists (examine() in Python)" + (
        f", such as {', '.join(near)}." if near else "."
    )


def pool_sources(pool: fx.Node) -> list[fx.Node]:
    """Return the values that a max-pool reads, seen through a concat over channels."""
    source = pool.all_input_nodes[0]
    if is_channel_concat(source):
        return list(source.args[0])  # type: ignore[arg-type]
    return [source]


def is_channel_concat(node: fx.Node) -> bool:
    """Whether ``node`` joins tensors over axis 1."""
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and name in ("cat", "concat", "concatenate") and argument(node, 1, "dim", 0) == 1


def _pool_problem(node: fx.Node, decisions: Decisions) -> str | None:
    if kind_of(node) is not Kind.MAXPOOL:
        return None
    module = module_of(node)
    if getattr(module, "return_indices", False) or node.kwargs.get("return_indices"):
        return f"{label(node)}: max-pool with return_indices has no spiking form. Pool without indices."
    for source in pool_sources(node):
        if isinstance(decisions.get(source), Spike) or kind_of(source) is Kind.MAXPOOL:
            continue
        spiking = _spikes_behind(source, decisions)
        if spiking is not None:
            return (
                f"{label(node)}: a max-pool reads the spikes of {label(spiking)} through {label(source)}; expected "
                "it directly behind the activation, or behind a weighted layer. Move the pool, or use an average pool."
            )
    return None


def _spikes_behind(node: fx.Node, decisions: Decisions) -> fx.Node | None:
    """Return a spiking activation that reaches ``node`` without a weighted layer between."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if isinstance(decisions.get(current), Spike):
            return current
        if current in seen or kind_of(current) is Kind.SYNAPSE:
            continue
        seen.add(current)
        pending += current.all_input_nodes
    return None


def _structure_problems(model: fx.GraphModule) -> list[str]:
    inputs = [node for node in model.graph.nodes if node.op == "placeholder" and node.users]
    problems = []
    if len(inputs) != 1:
        names = ", ".join(node.name for node in inputs) or "none"
        problems.append(f"the network has the inputs {names}; expected one tensor [N, …].")
    (output,) = (node for node in model.graph.nodes if node.op == "output")
    if not isinstance(output.args[0], fx.Node):
        problems.append(
            f"the network returns a {type(output.args[0]).__name__}; expected one tensor [N, classes]. "
            "Wrap it in a module that returns the tensor you want."
        )
    return problems


def batch_problems(model: fx.GraphModule, sample_shape: Sequence[int]) -> list[str]:
    """Say where a node does not keep the batch on axis 0, from shapes at two batch sizes."""
    small, large = (node_values(model, (batch, *sample_shape)) for batch in BATCHES)
    signals: set[fx.Node] = set()
    for node in model.graph.nodes:
        if node.op == "placeholder" or (isinstance(small[node], Tensor) and signals & set(node.all_input_nodes)):
            signals.add(node)
    return [
        f"{label(node)}: {describe(node)} gives {_shape(small[node])} at batch size {BATCHES[0]} and "
        f"{_shape(large[node])} at {BATCHES[1]}; expected the batch on axis 0 and nowhere else. "
        "Reshape with x.size(0) or flatten(1)."
        for node in model.graph.nodes
        if not keeps_batch((small[node], large[node]))
        or (node in signals and batch_use((small[node], large[node])) == "free")
    ]


def keeps_batch(pair: tuple[Any, Any]) -> bool:
    """Whether a value at the two batch sizes has exactly N on axis 0, or does not depend on N."""
    use = batch_use(pair)
    return use in ("free", "size") or (
        use == "batched" and [leading(value) for value in pair] == [{n} for n in BATCHES]
    )


def _shape(value: Any) -> str:
    return str(list(value.shape)) if hasattr(value, "shape") else str(value)
