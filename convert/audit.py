"""The audit: every node of a traced graph against the rules, all refusals at once."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from torch import fx

from ..errors import ArgumentError
from ..op_table import DROPOUT_FUNCTIONS, Kind
from ..ops import activation_module, argument, follows_readout, kind_of, label, module_of, signals
from ..records import Keep, NodeFate, Spike
from ..shapes import BATCHES, batch_use, leading, node_values
from ..structures import batched, structure_text, tensors_of
from .maxpool import pool_fate, pool_problem
from .refusals import describe, refusal
from .rules import Plan

Decisions = dict[fx.Node, Spike | Keep]
_AFTER_READOUT = (Kind.READOUT, Kind.OUTPUT)


def audit(
    model: fx.GraphModule, plan: Plan, sample_shape: Sequence[Any]
) -> tuple[Decisions, list[NodeFate], list[str]]:
    """Look at every node and change nothing.

    Args:
        model: a traced ANN without in-place nodes.
        plan: rules, what to keep, surgery, and what becomes of max-pools.
        sample_shape: shape of one input sample, or of one of each input.

    Returns:
        What the plan says for each activation node, the fate of every node, and a line for each problem.
    """
    decisions: Decisions = {}
    fates: list[NodeFate] = []
    problems: list[str] = []
    carried = signals(model.graph)
    for node in model.graph.nodes:
        fate = pool_fate(node, plan.maxpool)
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
    problems += [problem for node in model.graph.nodes if (problem := pool_problem(node, decisions, plan.maxpool))]
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
    if kind is Kind.READOUT and not ruled and _ends_the_network(node):
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


def _ends_the_network(node: fx.Node) -> bool:
    """Whether nothing comes behind a node but readouts and what reshapes theirs."""
    return all(
        kind_of(user) in _AFTER_READOUT or (follows_readout(user) and _ends_the_network(user)) for user in node.users
    )


def _unknown_path(path: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(path, known, 3)
    return f"{path}: nothing in the network has this path; expected one that --dry-run lists (examine() in Python)" + (
        f", such as {', '.join(near)}." if near else "."
    )


def _structure_problems(model: fx.GraphModule) -> list[str]:
    problems = []
    if not any(node.op == "placeholder" and node.users for node in model.graph.nodes):
        problems.append(
            "the network's output does not depend on its input; expected one that does. Look at its forward."
        )
    (output,) = (node for node in model.graph.nodes if node.op == "output")
    if not output.all_input_nodes:
        problems.append(
            f"the network returns {structure_text(output.args[0])} without a tensor; expected one tensor [N, …] or "
            "more, in tuples and dicts if you like. Return them from forward."
        )
    return problems


def batch_problems(model: fx.GraphModule, sample_shape: Sequence[Any]) -> list[str]:
    """Say where a node does not keep the batch on axis 0, from shapes at two batch sizes."""
    small, large = (node_values(model, batched(sample_shape, batch)) for batch in BATCHES)
    signals: set[fx.Node] = set()
    for node in model.graph.nodes:
        if node.op == "placeholder" or (tensors_of(small[node]) and signals & set(node.all_input_nodes)):
            signals.add(node)
    return [
        f"{label(node)}: {describe(node)} gives {_shape(small[node])} at batch size {BATCHES[0]} and "
        f"{_shape(large[node])} at {BATCHES[1]}; expected the batch on axis 0 and nowhere else. "
        "Reshape with x.size(0) or flatten(1)."
        for node in model.graph.nodes
        if kind_of(node) is not Kind.OUTPUT
        and (
            not keeps_batch((small[node], large[node]))
            or (node in signals and batch_use((small[node], large[node])) == "free")
        )
    ]


def keeps_batch(pair: tuple[Any, Any]) -> bool:
    """Whether a value at the two batch sizes has exactly N on axis 0, or does not depend on N."""
    use = batch_use(pair)
    return use in ("free", "size") or (
        use == "batched" and [leading(value) for value in pair] == [{n} for n in BATCHES]
    )


def _shape(value: Any) -> str:
    return str(list(value.shape)) if hasattr(value, "shape") else str(value)
