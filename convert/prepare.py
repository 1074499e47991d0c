"""PREPARE: one module for each activation call, max-pools where their type wants them; output equal to the ANN's."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from ..arguments import check_names
from ..errors import AuditError
from ..op_table import CONTRACTIONS, DROPOUT_FUNCTIONS, Kind
from ..ops import PATH, activation_module, argument, joined, kind_of, label, module_of, owner_path, signal_input
from ..qcfs import QCFS
from ..records import Keep, NodeFate, Prepared, Spike
from ..shapes import node_values
from ..structures import as_sample_shape, batched, each_shape, tensors_of
from .audit import Decisions, audit
from .equality import same_answers
from .inplace import make_functional
from .labels import assign_paths
from .maxpool import BeforeNeuron, MaxPool, WhereExact, gated_pools, place_pools
from .paths import unique_path
from .refusals import describe
from .rules import Plan, ReluSurgery, Rules, as_neuron, merged
from .tracing import bare, trace

MONOTONE = (nn.ReLU, nn.ReLU6, nn.Hardtanh, QCFS)
"""Activations that commute with a max-pool."""


def prepare(
    ann: nn.Module,
    sample_shape: Sequence[Any],
    *,
    rules: Rules | None = None,
    keep: Iterable[str] = (),
    surgery: ReluSurgery | None = None,
    maxpool: MaxPool | None = None,
) -> Prepared:
    """Trace a copy of ``ann``, audit it and give every activation call a module of its own.

    Args:
        ann: the network; not changed.
        sample_shape: shape of one input sample, for example (3, 224, 224); for several inputs a shape for each.
        rules: from activation type to rule, on top of the defaults.
        keep: paths of nodes that stay analog, as :func:`examine` lists them. Each call of a module that is called
            several times has its own, ``relu``, ``relu_1``, …; ``relu`` keeps the first call only.
        surgery: what to do where no rule applies; None refuses.
        maxpool: what becomes of max-pools; ``WhereExact()`` unless given.

    Returns:
        The prepared network. Its output equals the ANN's, or with ``AveragePool()`` that of the ANN with average
        pools, which was checked on one random batch, apart from activations before a max-pool that are not monotone:
        with ``BeforeNeuron()`` the pool moves before them, as it does for neurons; with ``WhereExact()`` the first.

    Raises:
        AuditError: with every node that no rule covers.
        ArgumentError: if the input shape or the weights do not fit.

    >>> prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), sample_shape=(4,)).spiking
    ['1']
    """
    plan = Plan(merged(rules), frozenset(check_names("keep", keep)), surgery, maxpool or WhereExact())
    ann = bare(ann)
    model, decisions, fates, problems = _audited(ann, sample_shape, plan)
    if problems:
        raise AuditError(problems)
    by_path = _activations_to_modules(model, decisions)
    _dropout_to_modules(model)
    commutes = all(isinstance(model.get_submodule(path), MONOTONE) for path in _spiking(by_path))
    before_moving = isinstance(plan.maxpool, BeforeNeuron | WhereExact) and not commutes
    if before_moving:
        _finish(model)
        same_answers(ann, model, sample_shape, plan.maxpool)
    by_path = place_pools(model, by_path, plan.maxpool)
    _finish(model)
    if not before_moving:
        same_answers(ann, model, sample_shape, plan.maxpool)
    ordered = {str(node.target): by_path[str(node.target)] for node in model.graph.nodes if node.target in by_path}
    fates += _added(ordered, fates, model)
    values = node_values(model, batched(sample_shape, 2))
    flat = [node for node in values if node.target in ordered and values[node].ndim < 2]
    if flat:
        raise AuditError([f"{label(node)}: works on [N]; expected [N, …]. Put the squeeze behind it." for node in flat])
    channels = {path: _channels(model, path, values) for path in _spiking(ordered)}
    shape = as_sample_shape(each_shape(sample_shape))
    coverage = _coverage(fates, ordered, values)
    gated = gated_pools(model.graph, plan.maxpool)
    return Prepared(model, ordered, shape, channels, tuple(fates), coverage, gated)


def examine(
    ann: nn.Module,
    sample_shape: Sequence[Any],
    *,
    rules: Rules | None = None,
    keep: Iterable[str] = (),
    surgery: ReluSurgery | None = None,
    maxpool: MaxPool | None = None,
) -> tuple[list[NodeFate], list[str]]:
    """The audit alone: the fate of every node, and the problems that :func:`prepare` would raise."""
    plan = Plan(merged(rules), frozenset(check_names("keep", keep)), surgery, maxpool or WhereExact())
    _, _, fates, problems = _audited(bare(ann), sample_shape, plan)
    return fates, problems


def _audited(
    ann: nn.Module, sample_shape: Sequence[Any], plan: Plan
) -> tuple[fx.GraphModule, Decisions, list[NodeFate], list[str]]:
    stand_ins = plan.surgery.stand_ins if plan.surgery else ()
    model = trace(ann, {**dict.fromkeys(stand_ins, as_neuron), **plan.rules}, sample_shape)
    for node in model.graph.find_nodes(op="placeholder"):  # modules are found by paths that no input may have
        if isinstance(getattr(model, node.target, None), nn.Module):
            node.target = f"{node.target}_input"
    problems = make_functional(model)
    model.graph.eliminate_dead_code()
    model.recompile()
    assign_paths(model)
    decisions, fates, found = audit(model, plan, sample_shape)
    return model, decisions, fates, [*problems, *found]


def _spiking(activations: Mapping[str, Any]) -> list[str]:
    return [path for path, decision in activations.items() if isinstance(decision, Spike)]


def _finish(model: fx.GraphModule) -> None:
    model.graph.eliminate_dead_code()
    model.graph.lint()
    model.recompile()
    model.delete_all_unused_submodules()
    model.eval()


def _added(activations: Mapping[str, Any], fates: Sequence[NodeFate], model: fx.GraphModule) -> list[NodeFate]:
    """The fates of activations that the audit did not see: copies that read a max-pool."""
    known = {fate.path for fate in fates}
    nodes = {str(node.target): node for node in model.graph.nodes if node.op == "call_module"}
    return [NodeFate(path, describe(nodes[path]), "converted") for path in activations if path not in known]


def _channels(model: fx.GraphModule, path: str, values: Mapping[fx.Node, Any]) -> int | None:
    """Return the size of axis 1 where that is the channel axis; a linear layer on [N, …, C] has it last."""
    (node,) = (node for node in model.graph.nodes if node.target == path)
    shape, current = values[node].shape, node
    while kind_of(current) not in (Kind.SYNAPSE, Kind.INPUT) and current.all_input_nodes:
        current = signal_input(current)
    linear = isinstance(module_of(current), nn.Linear) or current.target in {nn.functional.linear, *CONTRACTIONS}
    return None if linear and len(shape) > 2 else shape[1]


def _coverage(fates: Sequence[NodeFate], activations: Mapping[str, Any], values: Mapping[fx.Node, Any]) -> float:
    """Share of activation elements of one sample that spike; kept nodes count as analog ones, but layers do not."""
    kept = {fate.path for fate in fates if fate.fate == "kept"}

    def elements(node: fx.Node) -> int:
        return sum(tensor.numel() for tensor in tensors_of(values[node]))

    spiking = sum(elements(node) for node in values if isinstance(activations.get(str(node.target)), Spike))
    analog = sum(elements(node) for node in values if label(node) in kept and kind_of(node) is not Kind.SYNAPSE)
    return spiking / (spiking + analog)


def _activations_to_modules(model: fx.GraphModule, decisions: Decisions) -> dict[str, Any]:
    """Give each activation call its own module at the call's path."""
    by_path: dict[str, Any] = {}
    for node, decision in decisions.items():
        if kind_of(node) is not Kind.ACTIVATION and isinstance(decision, Keep):
            continue
        module = activation_module(node) if kind_of(node) is Kind.ACTIVATION else model.get_submodule(str(node.target))
        path = label(node)
        model.add_submodule(path, copy.deepcopy(module))  # a shared one would share its observers
        _replace_by_module(model, node, path)
        by_path[path] = decision
    return by_path


def _dropout_to_modules(model: fx.GraphModule) -> None:
    """Give functional dropout a module, so that it wakes up again in train mode; tracing saw it in eval mode."""
    for node in list(model.graph.nodes):
        if node.op != "call_function" or node.target not in DROPOUT_FUNCTIONS:
            continue
        path = unique_path(model, joined(owner_path(node), "dropout"))
        model.add_submodule(path, DROPOUT_FUNCTIONS[node.target](argument(node, 1, "p", 0.5)))
        _replace_by_module(model, node, path)


def _replace_by_module(model: fx.GraphModule, node: fx.Node, path: str) -> None:
    with model.graph.inserting_before(node):
        call = model.graph.call_module(path, (argument(node, 0, "input"),))
    call.meta = {key: value for key, value in node.meta.items() if key != PATH}
    node.replace_all_uses_with(call)
    model.graph.erase_node(node)
