"""From a module to a graph on a copy of it; the caller's model is never touched."""

from __future__ import annotations

import copy
import sys
import traceback

import torch
from torch import fx, nn

from ..errors import ArgumentError, AuditError
from ..ops import Kind, module_kind
from ..spiking import sites
from .rules import DEFAULT_RULES, Rules


class _Tracer(fx.Tracer):
    """Keeps torch.nn modules, and every type that the table or a rule knows, as leaves."""

    def __init__(self, rules: Rules = DEFAULT_RULES) -> None:
        super().__init__()
        self._rules = rules

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = type(m) in self._rules or module_kind(type(m)) is not Kind.UNKNOWN
        return known or super().is_leaf_module(m, module_qualified_name)


def trace(ann: nn.Module, rules: Rules) -> fx.GraphModule:
    """Return a traced copy of ``ann`` in eval mode.

    Raises:
        ArgumentError: if ``ann`` is not a module or already spiking, or its weights are not finite.
        AuditError: if Python control flow on values keeps it from being traced.
    """
    _check(ann)
    model = _all_unwrapped(copy.deepcopy(ann)).eval()
    tracer = _Tracer(rules)
    try:
        graph = tracer.trace(model)
    except Exception as error:
        raise AuditError([_untraceable(error)]) from error
    return fx.GraphModule(tracer.root, graph, type(ann).__name__)


def unwrapped(ann: nn.Module) -> nn.Module:
    """Return the module inside DataParallel, DistributedDataParallel and torch.compile, whose forward is the same."""
    compiled = sys.modules.get("torch._dynamo.eval_frame")
    while True:
        if isinstance(ann, nn.DataParallel | nn.parallel.DistributedDataParallel):
            ann = ann.module
        elif compiled is not None and isinstance(ann, compiled.OptimizedModule):
            ann = ann._orig_mod
        else:
            return ann


def _all_unwrapped(model: nn.Module) -> nn.Module:
    """Unwrap the parts of ``model`` as well; it is the caller's copy."""
    for path, module in list(model.named_modules()):
        if path and unwrapped(module) is not module:
            model.set_submodule(path, unwrapped(module))
    return model


def _check(ann: nn.Module) -> None:
    if not isinstance(ann, nn.Module):
        raise ArgumentError(f"convert: the model is a {type(ann).__name__}; expected a torch.nn.Module.")
    if isinstance(ann, torch.jit.ScriptModule):
        raise ArgumentError(
            "convert: the model is TorchScript, whose graph cannot be rewritten. "
            "Pass the nn.Module it was scripted from."
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


def _untraceable(error: Exception) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/fx/" not in frame.filename]
    where = f"{frames[-1].filename}:{frames[-1].lineno}: `{frames[-1].line}`" if frames else "the model's forward"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"{where} depends on the values of tensors ({reason}); expected a forward that runs the same nodes for "
        "every input. Move the decision out of forward, or put it into a module of its own and give that a rule."
    )
