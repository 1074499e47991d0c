"""PREPARE: one module for each activation call, max-pools where their type wants them; output equal to the ANN's."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import AuditError
from ..ops import DROPOUT_FUNCTIONS, Kind, activation_module, argument, kind_of, label, module_of, owner_path
from ..records import Keep, NodeFate, Prepared, Spike
from ..shapes import node_values
from ..structures import as_sample_shape, batched, each_shape, leaves_of
from .audit import Decisions, audit
from .inplace import make_functional
from .maxpool import BeforeNeuron, MaxPool, answering_as, gated_pools, place_pools
from .paths import unique_path
from .rules import Plan, ReluSurgery, Rules, merged
from .tracing import trace


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
        keep: paths of nodes that stay analog.
        surgery: what to do where no rule applies; None refuses.
        maxpool: what becomes of max-pools; ``BeforeNeuron()`` unless given.

    Returns:
        The prepared network. Its output equals the ANN's, or with ``AveragePool()`` that of the ANN with average pools,
        which was checked on one random batch.

    Raises:
        AuditError: with every node that no rule covers.
        ArgumentError: if the input shape or the weights do not fit.
    """
    plan = Plan(merged(rules), frozenset(keep), surgery, maxpool or BeforeNeuron())
    model, decisions, fates, problems = _audited(ann, sample_shape, plan)
    if problems:
        raise AuditError(problems)
    by_path = _activations_to_modules(model, decisions)
    _dropout_to_modules(model)
    by_path = place_pools(model, by_path, plan.maxpool)
    model.graph.eliminate_dead_code()
    model.graph.lint()
    model.recompile()
    model.delete_all_unused_submodules()
    model.eval()
    _check_equal(ann, model, sample_shape, plan.maxpool)
    ordered = {str(node.target): by_path[str(node.target)] for node in model.graph.nodes if node.target in by_path}
    values = node_values(model, batched(sample_shape, 2))
    channels = {path: _channels(model, path, values) for path, found in ordered.items() if isinstance(found, Spike)}
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
    _, _, fates, problems = _audited(
        ann, sample_shape, Plan(merged(rules), frozenset(keep), surgery, maxpool or BeforeNeuron())
    )
    return fates, problems


def _audited(
    ann: nn.Module, sample_shape: Sequence[Any], plan: Plan
) -> tuple[fx.GraphModule, Decisions, list[NodeFate], list[str]]:
    model = trace(ann, plan.rules, sample_shape)
    problems = make_functional(model)
    model.graph.eliminate_dead_code()
    model.recompile()
    decisions, fates, found = audit(model, plan, sample_shape)
    return model, decisions, fates, [*problems, *found]


def _channels(model: fx.GraphModule, path: str, values: Mapping[fx.Node, Any]) -> int | None:
    """Return the size of axis 1 where that is the channel axis; a linear layer on [N, …, C] has it last."""
    (node,) = (node for node in model.graph.nodes if node.target == path)
    shape, current = values[node].shape, node
    while kind_of(current) not in (Kind.SYNAPSE, Kind.INPUT) and current.all_input_nodes:
        current = current.all_input_nodes[0]
    linear = isinstance(module_of(current), nn.Linear) or current.target is nn.functional.linear
    return None if linear and len(shape) > 2 else shape[1]


def _coverage(fates: Sequence[NodeFate], activations: Mapping[str, Any], values: Mapping[fx.Node, Any]) -> float:
    """Share of activation elements of one sample that spike; kept nodes count as analog ones."""
    kept = {fate.path for fate in fates if fate.fate == "kept"}

    def elements(node: fx.Node) -> int:
        return sum(leaf.numel() for leaf in pytree.tree_leaves(values[node]) if isinstance(leaf, Tensor))

    spiking = sum(elements(node) for node in values if isinstance(activations.get(str(node.target)), Spike))
    analog = sum(elements(node) for node in values if label(node) in kept)
    return spiking / (spiking + analog)


def _activations_to_modules(model: fx.GraphModule, decisions: Decisions) -> dict[str, Any]:
    """Give each activation call its own module; the first call of a module keeps the module's path."""
    by_path: dict[str, Any] = {}
    for node, decision in decisions.items():
        if kind_of(node) is not Kind.ACTIVATION and isinstance(decision, Keep):
            continue
        module = activation_module(node) if kind_of(node) is Kind.ACTIVATION else model.get_submodule(str(node.target))
        if node.op == "call_module":
            path = str(node.target)
            if path in by_path:
                path = unique_path(model, path)
        else:
            owner = owner_path(node)
            path = unique_path(
                model, f"{owner}.{type(module).__name__.lower()}" if owner else type(module).__name__.lower()
            )
        model.add_submodule(path, copy.deepcopy(module))  # a shared one would share its observers
        with model.graph.inserting_before(node):
            call = model.graph.call_module(path, (node.args[0] if node.args else node.kwargs["input"],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        model.graph.erase_node(node)
        by_path[path] = decision
    return by_path


def _dropout_to_modules(model: fx.GraphModule) -> None:
    """Give functional dropout a module, so that it wakes up again in train mode; tracing saw it in eval mode."""
    for node in list(model.graph.nodes):
        if node.op != "call_function" or node.target not in DROPOUT_FUNCTIONS:
            continue
        path = unique_path(model, ".".join(filter(None, [owner_path(node), "dropout"])))
        model.add_submodule(path, DROPOUT_FUNCTIONS[node.target](argument(node, 1, "p", 0.5)))
        with model.graph.inserting_before(node):
            call = model.graph.call_module(path, (argument(node, 0, "input"),))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        model.graph.erase_node(node)


def _check_equal(ann: nn.Module, model: fx.GraphModule, sample_shape: Sequence[Any], maxpool: MaxPool) -> None:
    """Compare the prepared network with the source on one random batch, both in eval mode."""
    parameter = next((p for p in ann.parameters() if p.is_floating_point()), torch.empty(()))
    if parameter.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(parameter) for shape in batched(sample_shape, 2)]
    was_training = {module: module.training for module in ann.modules()}
    with torch.no_grad(), answering_as(maxpool):
        try:
            expected = ann.eval()(*(x.clone() for x in inputs))
        finally:
            for module, training in was_training.items():
                module.training = training
        got = model(*(x.clone() for x in inputs))
    leaves = leaves_of(expected), leaves_of(got)
    differences = [math.inf] if len(leaves[0]) != len(leaves[1]) else list(map(_difference, *leaves))
    if not all(difference < 1e-4 for difference in differences):
        shown = ", ".join(f"{difference:.1e}" for difference in differences)
        raise AuditError(
            [
                f"the rewritten graph answers differently from {type(ann).__name__} (relative difference {shown}); "
                "expected the same. Its forward changes values in a way that tracing cannot see, such as writing into "
                "a slice or keeping values between calls: rewrite that part."
            ]
        )


def _difference(expected: Any, got: Any) -> float:
    """Relative difference of two leaves of an output; what is no tensor is equal or not."""
    if not isinstance(expected, Tensor) or not isinstance(got, Tensor):
        return 0.0 if type(expected) is type(got) and expected == got else math.inf
    if expected.shape != got.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    expected, got = expected.double(), got.double()
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
