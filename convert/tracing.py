"""From a module to a graph on a copy of it; the caller's model is never touched."""

from __future__ import annotations

import copy
import inspect
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import fx, nn

from ..errors import ArgumentError, AuditError
from ..ops import Kind, module_kind
from ..structures import POSITIONAL, each_shape
from .rules import DEFAULT_RULES, Rules


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


def trace(ann: nn.Module, rules: Rules, sample_shape: Sequence[Any] = ()) -> fx.GraphModule:
    """Return a traced copy of ``ann`` in eval mode.

    Args:
        ann: the network; not changed.
        rules: whose types stay whole.
        sample_shape: of one input sample, or of one of each input; tells how many inputs there are. Parameters of
            forward that come after them get their defaults.

    Raises:
        ArgumentError: if ``ann`` is not a module or already spiking, takes another number of inputs, or its weights
            are not finite.
        AuditError: if Python control flow on values keeps it from being traced.
    """
    inputs = len(each_shape(sample_shape))
    _check(ann)
    _check_inputs(ann, inputs)
    model = copy.deepcopy(ann).eval()
    tracer = _Tracer(rules, inputs)
    try:
        graph = tracer.trace(model)
    except Exception as error:
        raise AuditError([_untraceable(error)]) from error
    for node in graph.nodes:
        node.type = None  # an annotation that is text, as postponed ones are, cannot be pickled with the graph
    return fx.GraphModule(tracer.root, graph, type(ann).__name__)


def _check(ann: nn.Module) -> None:
    if not isinstance(ann, nn.Module):
        raise ArgumentError(f"convert: the model is a {type(ann).__name__}; expected a torch.nn.Module.")
    if isinstance(ann, torch.jit.ScriptModule):
        raise ArgumentError(
            "convert: the model is TorchScript, whose graph cannot be rewritten. "
            "Pass the nn.Module it was scripted from."
        )
    for name, tensor in (*ann.named_parameters(), *ann.named_buffers()):
        if tensor.device.type != "meta" and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ArgumentError(
                f"{name}: {bad} of {tensor.numel()} values are NaN or infinite; expected finite weights. "
                "Load a checkpoint from before the training diverged."
            )


def _check_inputs(ann: nn.Module, inputs: int) -> None:
    parameters = inspect.signature(ann.forward).parameters.values()
    takes = [p for p in parameters if p.kind in POSITIONAL]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [name for name in needed if name not in [p.name for p in takes[:inputs]]]
    if len(takes) < inputs or missing:
        names = ", ".join(p.name for p in takes) or "no tensor by name"
        raise ArgumentError(
            f"{type(ann).__name__}.forward takes {names}, and {inputs} input{'s' * (inputs != 1)} came; expected one "
            f"for each parameter without a default ({', '.join(needed)}). Pass example_input=(x1, x2, …), a tensor for "
            "each; the command line takes networks with one input."
        )


def _untraceable(error: Exception) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/fx/" not in frame.filename]
    where = f"{frames[-1].filename}:{frames[-1].lineno}: `{frames[-1].line}`" if frames else "the model's forward"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"{where} depends on the values of tensors ({reason}); expected a forward that runs the same nodes for "
        "every input. Move the decision out of forward, or put it into a module of its own and give that a rule."
    )
