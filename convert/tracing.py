"""From a module to a graph on a copy of it; the caller's model is never touched."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree

from ..arguments import check_network
from ..errors import ArgumentError, AuditError
from ..ops import Kind, module_kind
from ..spiking import sites
from .exported import trace_by_export
from .exported.trace import users_line
from .rules import DEFAULT_RULES, Rules

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
TOLERANCE = 1e-4


class _Tracer(fx.Tracer):
    """Keeps torch.nn modules, and every type that the table or a rule knows, as leaves."""

    def __init__(self, rules: Rules = DEFAULT_RULES) -> None:
        super().__init__()
        self._rules = rules

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = type(m) in self._rules or module_kind(type(m)) is not Kind.UNKNOWN
        return known or super().is_leaf_module(m, module_qualified_name)


def trace(ann: nn.Module, rules: Rules, sample_shape: Sequence[int]) -> fx.GraphModule:
    """Return a traced copy of ``ann`` in eval mode.

    A graph of known modules is copied as it is. Anything else is traced symbolically, and by torch.export
    (:func:`~.exported.trace_by_export`) where Python control flow defeats that: where it raises, or where the graph
    answers differently on one random batch, as it does when the forward asks for the type of its input. Both keep
    the same modules whole, so that parameter names survive.

    Args:
        ann: the network; wrappers for parallel running, compiling and averaging are taken off.
        rules: their types stay whole.
        sample_shape: shape of one input sample.

    Raises:
        ArgumentError: if ``ann`` is not a module or already spiking, or its weights are not finite, or it cannot be
            run on the sample shape.
        AuditError: if neither way can follow its Python, with both reasons.
    """
    check_network("convert: ann", ann)
    ann = bare(ann)
    _check(ann)
    model = _all_unwrapped(copy.deepcopy(ann)).eval()
    tracer = _Tracer(rules)
    if isinstance(model, fx.GraphModule) and _is_of_known_modules(model, tracer):
        return model
    try:
        graph = tracer.trace(model)
    except Exception as error:  # whatever the forward does to a symbolic value
        problem: str | None = _stopped(error)
    else:
        traced = fx.GraphModule(tracer.root, graph, type(ann).__name__)
        problem = _problem(model, traced, sample_shape)
        if problem is None:
            return traced
    example = _example(model, sample_shape, zero=True)
    try:
        return trace_by_export(model, example, is_leaf=lambda module: tracer.is_leaf_module(module, ""))
    except AuditError as error:
        first, *more = error.problems
        raise AuditError([f"{first} Symbolic tracing: {problem}.", *more]) from error


def bare(model: nn.Module) -> nn.Module:
    """Return the network inside what DataParallel, torch.compile or an average of weights put around it.

    >>> bare(nn.DataParallel(nn.ReLU()))
    ReLU()
    """
    while True:
        inner = model.module if isinstance(model, WRAPPERS) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _all_unwrapped(model: nn.Module) -> nn.Module:
    """Unwrap the parts of ``model`` as well; it is the caller's copy."""
    for path, module in list(model.named_modules()):
        if path and bare(module) is not module:
            model.set_submodule(path, bare(module))
    return model


def _check(ann: nn.Module) -> None:
    if isinstance(ann, torch.jit.ScriptModule):
        raise ArgumentError(
            "convert: the model is TorchScript, whose graph cannot be rewritten. Pass the nn.Module it was scripted "
            "from, with its weights: model.load_state_dict(scripted.state_dict())."
        )
    if found := sites(ann):
        raise ArgumentError(
            f"convert: {type(ann).__name__} is a spiking network already ({', '.join([*found][:3])}, {len(found)} "
            "sites); expected an ANN. Train it with lmh.finetune.finetune, read a saved one with lmh.convert.load, or "
            "convert the ANN that it came from."
        )
    for name, tensor in (*ann.named_parameters(), *ann.named_buffers()):
        if tensor.device.type != "meta" and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ArgumentError(
                f"{name}: {bad} of {tensor.numel()} values are NaN or infinite; expected finite weights. "
                "Load a checkpoint from before the training diverged."
            )


def _is_of_known_modules(model: fx.GraphModule, tracer: _Tracer) -> bool:
    """Whether a graph is what our own tracer would give: of leaf modules, functions and methods.

    Graphs of torch.export and make_fx call operators, and graphs with a code generator of their own take their
    input apart; both are traced again.
    """
    called = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
    known = all(tracer.is_leaf_module(model.get_submodule(path), path) for path in called)
    return known and type(model.graph._codegen) is fx.graph.CodeGen and not _calls_operators(model)


def _calls_operators(graph: fx.GraphModule) -> bool:
    targets = (node.target for node in graph.graph.nodes)
    return any(isinstance(target, torch._ops.OpOverload) and target.namespace == "aten" for target in targets)


def _problem(model: nn.Module, graph: fx.GraphModule, sample_shape: Sequence[int]) -> str | None:
    """Say what is wrong with a symbolic graph, or None: also where the model itself does not run on this shape."""
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    if any(str(node.target).startswith("*") for node in inputs):
        return "the forward takes any number of inputs"
    if any(node.args and node.users for node in inputs):
        return "the forward has optional inputs"
    if _calls_operators(graph):
        return "the graph is one of operators, without modules"
    x = _example(model, sample_shape)
    if x.is_meta:
        return None
    try:
        expected = _run(model, x)
    except Exception:  # the audit says where the input does not fit
        return None
    try:
        got = _run(graph, x)
    except Exception as error:
        return _stopped(error)
    same = len(expected) == len(got) and all(map(_alike, expected, got))
    return None if same else "the graph answers differently from the model, whose forward asks for types"


def _run(model: nn.Module, x: Tensor) -> list[Any]:
    """Run a network with copies of its buffers and always the same random numbers."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(0)
        return pytree.tree_leaves(torch.func.functional_call(model, buffers, (x.clone(),)))


def _alike(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(one == other)
    if one.shape != other.shape:
        return False
    scale = float(one.abs().max()) if one.numel() else 1.0
    return torch.allclose(one, other, TOLERANCE, TOLERANCE * scale, equal_nan=True)


def _example(model: nn.Module, sample_shape: Sequence[int], *, zero: bool = False) -> Tensor:
    """Return a batch of two samples where the model's parameters are, of random numbers or of zeros."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(()))
    if zero or parameter.is_meta:
        return parameter.new_zeros((2, *sample_shape))
    return torch.randn((2, *sample_shape), generator=torch.Generator().manual_seed(0)).to(parameter)


def _stopped(error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{users_line(error) or 'the forward'} stops it ({reason})"
