"""From a module to a graph on a copy of it; the caller's model is never touched."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel

from ..arguments import check_network, described
from ..errors import ArgumentError, AuditError, reason_of
from ..op_table import Kind
from ..ops import module_kind
from ..spiking import sites
from ..structures import POSITIONAL, batched, each_shape, example_tensor, leaves_of
from .exported import trace_by_export
from .exported.trace import users_line
from .paths import RESERVED, TIME
from .rules import DEFAULT_RULES, Rules

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
TOLERANCE = 1e-4


class _Tracer(fx.Tracer):
    """Keeps torch.nn modules, and every type that the table or a rule knows, as leaves.

    The first parameters of forward are the inputs. The others get their defaults, so that ``if mask is None`` in
    forward goes the way it goes without a mask; a symbolic value would be never None.
    """

    def __init__(self, rules: Rules = DEFAULT_RULES, inputs: int | None = None) -> None:
        """Take ``inputs`` inputs; all that forward has if None, as when torch.load traces a pickled graph again."""
        super().__init__()
        self._rules = rules
        self._inputs = inputs

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = type(m) in self._rules or module_kind(type(m)) is not Kind.UNKNOWN
        return known or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Make a placeholder for each input, and give forward its own defaults for the rest."""
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        if self._inputs is None:
            return function, args
        parameters = inspect.signature(inspect.unwrap(root_fn)).parameters
        for position, proxy in enumerate(args[1:], 1):
            name = str(proxy.node.target)
            if position > self._inputs or name.startswith("*"):
                args[position] = {} if name.startswith("**") else () if name[0] == "*" else parameters[name].default
                self.graph.erase_node(proxy.node)
            else:
                proxy.node.args = ()
        return function, args

    def create_arg(self, a: Any) -> Any:
        """Let an OrderedDict, or a dataclass that is one, stay what it is; fx makes it a dict."""
        if not isinstance(a, OrderedDict):
            return super().create_arg(a)
        items = {key: self.create_arg(value) for key, value in a.items()}
        if is_dataclass(a):
            return self.create_node("call_function", type(a), (), items)
        return self.create_node("call_function", type(a), (list(items.items()),), {})


def trace(ann: nn.Module, rules: Rules, sample_shape: Sequence[Any]) -> fx.GraphModule:
    """Return a traced copy of ``ann`` in eval mode.

    A graph of known modules is copied as it is. Anything else is traced symbolically, and by torch.export
    (:func:`~.exported.trace_by_export`) where Python control flow defeats that: where it raises, or where the graph
    answers differently on one random batch, as it does when the forward asks for the type of its input. Both keep
    the same modules whole, so that parameter names survive.

    Args:
        ann: the network; wrappers for parallel running, compiling and averaging are taken off.
        rules: their types stay whole.
        sample_shape: shape of one input sample, or of one of each input; tells how many inputs there are. Parameters
            of forward that come after them get their defaults.

    Raises:
        ArgumentError: if ``ann`` is not a module or already spiking, takes another number of inputs, its weights are
            not finite, or it cannot be run on the sample shape.
        AuditError: if neither way can follow its Python, with both reasons.
    """
    check_network("convert: ann", ann)
    ann = bare(ann)
    inputs = len(each_shape(sample_shape))
    _check(ann)
    _check_inputs(ann, inputs)
    model = _all_unwrapped(copy.deepcopy(ann)).eval()
    tracer = _Tracer(rules, inputs)
    if isinstance(model, fx.GraphModule) and _is_of_known_modules(model, tracer, inputs):
        return model
    try:
        graph = tracer.trace(model)
    except Exception as error:  # whatever the forward does to a symbolic value
        problem: str | None = _stopped(error)
    else:
        for node in graph.nodes:
            node.type = None  # an annotation that is text, as postponed ones are, cannot be pickled with the graph
        traced = fx.GraphModule(tracer.root, graph, type(ann).__name__)
        problem = _problem(model, traced, sample_shape)
        if problem is None:
            return traced
    examples = _examples(model, sample_shape, zero=True)
    try:
        return trace_by_export(model, examples, is_leaf=lambda module: tracer.is_leaf_module(module, ""))
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
    check_not_spiking(ann, ann)
    for name, tensor in (*ann.named_parameters(), *ann.named_buffers()):
        if is_lazy(tensor):
            raise ArgumentError(
                f"{name}: has no shape yet; expected a network whose lazy layers know theirs. Run it once on a batch."
            )
        if tensor.device.type != "meta" and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ArgumentError(
                f"{name}: {bad} of {tensor.numel()} values are NaN or infinite; expected finite weights. "
                "Load a checkpoint from before the training diverged."
            )
    own = {name for name, _ in (*ann.named_parameters(recurse=False), *ann.named_buffers(recurse=False))}
    taken = ((own | {name for name, _ in ann.named_children()}) & RESERVED) | (own & {TIME})
    if taken:
        raise ArgumentError(
            f"{min(taken)}: a part of the network has this name, which its graph has for itself; expected another. "
            "Rename it, in the keys of its weights too."
        )
    for name, module in ann.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm | SpectralNorm):
                remedy = "remove_weight_norm" if isinstance(hook, WeightNorm) else "remove_spectral_norm"
                raise ArgumentError(
                    f"{name or 'the model'}: its {hook.name} is computed by a hook at every call; expected a "
                    f"parameter. Call torch.nn.utils.{remedy} on it first, which leaves the values that it has."
                )


def check_not_spiking(network: nn.Module, given: object) -> None:
    """Refuse a network with neurons in it.

    Args:
        network: it.
        given: what was passed as the ANN.

    Raises:
        ArgumentError: saying what to do with it.
    """
    if found := sites(network):
        raise ArgumentError(
            f"convert: ann is {described(given)}, a spiking network already ({', '.join([*found][:3])}, {len(found)} "
            "sites); expected the ANN. Pass the ANN again for another T or calibration, or "
            "assemble(conversion.prepared, …); train it with lmh.finetune.finetune, read a saved one with "
            "lmh.convert.load."
        )


def _check_inputs(ann: nn.Module, inputs: int) -> None:
    """Refuse a number of inputs that forward does not take, but leave ``forward(*xs)`` to what it says itself."""
    parameters = inspect.signature(ann.forward).parameters.values()
    takes = [p for p in parameters if p.kind in POSITIONAL]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [name for name in needed if name not in [p.name for p in takes[:inputs]]]
    if (len(takes) < inputs and not _takes_any_number(ann)) or missing:
        names = ", ".join(p.name for p in takes) or "no tensor by name"
        raise ArgumentError(
            f"{type(ann).__name__}.forward takes {names}, and {inputs} input{'s' * (inputs != 1)} came; expected one "
            f"for each parameter without a default ({', '.join(needed)}). Pass example_input=(x1, x2, …), a tensor for "
            "each; the command line takes networks with one input."
        )


def _takes_any_number(model: nn.Module) -> bool:
    return any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(model.forward).parameters.values())


def _is_of_known_modules(model: fx.GraphModule, tracer: _Tracer, inputs: int) -> bool:
    """Whether a graph is what our own tracer would give: of leaf modules, functions and methods, without defaults.

    Graphs of torch.export and make_fx call operators, and graphs with a code generator of their own take their
    input apart; both are traced again.
    """
    placeholders = [node for node in model.graph.nodes if node.op == "placeholder"]
    if len(placeholders) != inputs or any(node.args for node in placeholders):
        return False
    called = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
    known = all(tracer.is_leaf_module(model.get_submodule(path), path) for path in called)
    return known and type(model.graph._codegen) is fx.graph.CodeGen and not _calls_operators(model)


def _calls_operators(graph: fx.GraphModule) -> bool:
    targets = (node.target for node in graph.graph.nodes)
    return any(isinstance(target, torch._ops.OpOverload) and target.namespace == "aten" for target in targets)


def _problem(model: nn.Module, graph: fx.GraphModule, sample_shape: Sequence[Any]) -> str | None:
    """Say what is wrong with a symbolic graph, or None: also where the model itself does not run on this shape."""
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    if len(inputs) < len(each_shape(sample_shape)):
        return "the forward takes any number of inputs"
    if _calls_operators(graph):
        return "the graph is one of operators, without modules"
    examples = _examples(model, sample_shape)
    if any(x.is_meta for x in examples):
        return None
    try:
        expected = _run(model, examples)
    except Exception:  # the audit says where the input does not fit
        return None
    try:
        got = _run(graph, examples)
    except Exception as error:
        return _stopped(error)
    same = len(expected) == len(got) and all(map(_alike, expected, got))
    return None if same else "the graph answers differently from the model, whose forward asks for types"


def _run(model: nn.Module, examples: Sequence[Tensor]) -> list[Any]:
    """Run a network with copies of its buffers and always the same random numbers."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad(), torch.random.fork_rng(devices=[x.device for x in examples[:1] if x.is_cuda]):
        torch.manual_seed(0)
        return leaves_of(torch.func.functional_call(model, buffers, tuple(x.clone() for x in examples)))


def _alike(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(one == other)
    if one.shape != other.shape:
        return False
    scale = float(one.abs().max()) if one.numel() else 1.0
    return torch.allclose(one, other, TOLERANCE, TOLERANCE * scale, equal_nan=True)


def _examples(model: nn.Module, sample_shape: Sequence[Any], *, zero: bool = False) -> tuple[Tensor, ...]:
    """Return batches of two samples where the model's parameters are, of random numbers or of zeros."""
    parameter = example_tensor(model)
    if zero or parameter.is_meta:
        return tuple(parameter.new_zeros(shape) for shape in batched(sample_shape, 2))
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(parameter) for shape in batched(sample_shape, 2))


def _stopped(error: Exception) -> str:
    reason = reason_of(error)
    return f"{users_line(error) or 'the forward'} stops it ({reason})"
