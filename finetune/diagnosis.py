"""Where a number that is not finite began: a tensor of the network, the data, a layer, or a gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..qcfs import QCFS
from ..spiking import SpikingSite
from .history import bare_path

STATISTICS = ("running_mean", "running_var")

SYMBOLS = {
    "raw_threshold": "θ",
    "base_threshold": "θ",
    "v_init": "v_init",
    "raw_lambda_s": "λ_S",
    "raw_lambda_d": "λ_D",
    "raw_mu_s": "μ_S",
    "raw_mu_d": "μ_D",
}


def origin(model: nn.Module, inputs: Sequence[Tensor], target: Tensor | None) -> str:
    """Say where a loss or gradient stopped being finite, after its backward pass.

    Args:
        model: with its gradients; its buffers stay as they are.
        inputs: of the batch.
        target: the teacher's outputs, or None.
    """
    if not all(map(_finite, inputs)):
        return "the batch, which holds NaN or infinite values"
    broken = [name for name, parameter in model.named_parameters() if not _finite(parameter)]
    if broken:
        return f"the network's own {named(model, broken[0])}"
    if target is not None and not _finite(target):
        return "the teacher's outputs"
    layer = _first_layer(model, inputs)
    if layer is not None:
        return f"the output of {layer}"
    gradients = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    if gradients:
        return f"the gradient of {named(model, gradients[-1])}"
    return "the loss itself"


def broken_tensor(model: nn.Module) -> str | None:
    """Return the first parameter or running statistic that is not finite, in words; None if all are.

    Other buffers may be infinite by design, as masks are.
    """
    statistics = ((name, value) for name, value in model.named_buffers() if name.rpartition(".")[2] in STATISTICS)
    for name, tensor in (*model.named_parameters(), *statistics):
        if not _finite(tensor):
            return named(model, name)
    return None


def named(model: nn.Module, name: str) -> str:
    """Return a tensor's name in words: ``θ of block.relu1``, or ``head.weight``."""
    path, _, last = name.rpartition(".")
    if isinstance(model.get_submodule(path), (SpikingSite, QCFS)):
        return f"{SYMBOLS[last]} of {bare_path(path)}"
    return bare_path(name)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _first_layer(model: nn.Module, inputs: Sequence[Tensor]) -> str | None:
    """Run the batch once more and return the first layer whose output is not finite."""
    found: list[str] = []
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def watch(path: str, module: nn.Module) -> Any:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and not all(map(_finite, _tensors(output))):
                found.append(f"{bare_path(path)} ({type(module).__name__})")

        return module.register_forward_hook(look)

    with ExitStack() as stack:
        for path, module in model.named_modules():
            if not any(module.children()):
                stack.callback(watch(path, module).remove)
        with torch.no_grad():
            model(*inputs)
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
    return found[0] if found else None


def _tensors(value: Any) -> Iterable[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
