"""Layers of a spiking network that train as one: BatchNorm, a residual sum, and neurons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as every_module
from torch.nn.modules.batchnorm import _BatchNorm

from .batch_norm import PendingCurrent
from .memory_order import LONG_ENOUGH
from .ops import plain_sum
from .spiking import SpikingSite


class _Deferred(_BatchNorm):
    """A BatchNorm that leaves the computing to the neurons behind it. It shares all that it has with the original."""

    def __init__(self, original: _BatchNorm) -> None:
        self.__dict__ = original.__dict__

    def forward(self, x: Tensor) -> Tensor | PendingCurrent:  # type: ignore[override]
        """Return what is to be computed, or compute it where it is no training or too little work."""
        large = x.ndim > 2 and x.shape[2:].numel() >= LONG_ENOUGH and len(x) > 0
        if self.training and large and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return PendingCurrent(self, x)
        return super().forward(x)


class _Deferred1d(_Deferred, nn.BatchNorm1d):
    pass


class _Deferred2d(_Deferred, nn.BatchNorm2d):
    pass


class _Deferred3d(_Deferred, nn.BatchNorm3d):
    pass


HOOKS = ("forward", "forward_pre", "backward", "backward_pre")
DEFERRED = {nn.BatchNorm1d: _Deferred1d, nn.BatchNorm2d: _Deferred2d, nn.BatchNorm3d: _Deferred3d}


@contextmanager
def fused_layers(snn: nn.Module) -> Iterator[None]:
    """Let neurons that train by the kernel COMPILED compute the BatchNorm and the residual sum in front of them.

    Args:
        snn: the network, or a module that holds it.

    A current then passes through memory two thirds as often, and autograd keeps BatchNorm's input alone where it kept
    the current too (lmh/batch_norm.py). It is the same up to rounding: mean and variance are summed in another order,
    and one of 16 bits is not rounded before it is integrated. :func:`lmh.finetune.finetune` does this; it is for
    training loops of one's own, around the forward pass.

    >>> from lmh.convert import load
    >>> snn, x = load("zoo:digits-cnn-t4").train(), torch.zeros(2, 1, 8, 8)
    >>> with fused_layers(snn):
    ...     loss = snn(x).square().sum()
    >>> loss.backward()
    """
    originals: dict[str, Any] = {path: snn.get_submodule(path) for path in fusible(snn)}
    try:
        for path, original in originals.items():
            snn.set_submodule(path, DEFERRED[type(original)](original))
        yield
    finally:
        for path, original in originals.items():
            snn.set_submodule(path, original)


def fusible(snn: nn.Module) -> list[str]:
    """Return the paths of the BatchNorms whose output goes to neurons and nowhere else, directly or through one sum.

    >>> from lmh.convert import load
    >>> fusible(load("zoo:digits-cnn-t4"))
    ['stem.1', 'block.bn1', 'block.bn2', 'down.1']
    """
    found = []
    for prefix, network in snn.named_modules():
        if isinstance(network, fx.GraphModule):
            found += [f"{prefix}.{path}" if prefix else path for path in _fusible(network)]
    return found


def _fusible(network: fx.GraphModule) -> list[str]:
    modules = dict(network.named_modules(remove_duplicate=False))
    calls = [node for node in network.graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    found = []
    for node in calls:
        norm = modules[node.target]
        plain = type(norm) in DEFERRED and norm.affine and not _hooked(norm)
        if plain and times[node.target] == 1 and _feeds_neurons(node, modules):
            found.append(node.target)
    return found


def _feeds_neurons(node: fx.Node, modules: dict[str, nn.Module], *, summed: bool = False) -> bool:
    """Whether a value goes to neurons and nowhere else; ``summed``: it has been through a sum."""
    if len(node.users) != 1:
        return False
    [user] = node.users
    module = modules.get(str(user.target)) if user.op == "call_module" else None
    if type(module) is nn.Identity and not _hooked(module):
        return _feeds_neurons(user, modules, summed=summed)
    if plain_sum(user) and not summed:
        return _feeds_neurons(user, modules, summed=True)
    return type(module) is SpikingSite and not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    """Whether anything else looks at what goes through a module."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(own) or any(getattr(every_module, f"_global_{kind}_hooks") for kind in HOOKS)
