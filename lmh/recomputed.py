"""What the backward pass computes again instead of keeping it.

A layer of a spiking network is a convolution, BatchNorm, often a residual sum, and neurons. Autograd keeps three
tensors [T·N, C, *F] of it: BatchNorm's input, the neurons' current and their output. Only the first is needed. (Inside
:func:`lmh.layers.fused_layers` neurons that are compiled keep no current of their own; what is left is the output.)

- The current is BatchNorm's output, or a residual sum. :func:`source_of` finds that in autograd's graph, and the
  backward pass of the neurons normalises once more, by the mean and variance that BatchNorm keeps: a tenth of its cost.
- An output is 0 or θ. :class:`Spikes` keeps a bit of it, and that is all that the next layers keep of their input, such
  as a convolution for the gradient of its weight.

Both give the same numbers bit for bit, and both are done inside :func:`recompute` alone, as they take time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spikes:
    """The output of a site, of which a bit for every spike is kept.

    Attributes:
        shape: [T·N, C, *F].
        dtype: of the output.
        unpack: computes it from the bits, in its order in memory.
    """

    shape: torch.Size
    dtype: torch.dtype
    unpack: Callable[[], Tensor]

    def __call__(self) -> Tensor:
        """Return θ s, [T·N, C, *F]."""
        return self.unpack()


@dataclass(frozen=True)
class Normalised:
    """The output of a BatchNorm.

    Attributes:
        node: BatchNorm in autograd's graph, which keeps its input until it has run.
        bias: β, [C]; a copy, as the node keeps none and cannot tell if it changes.
    """

    node: Any
    bias: Tensor

    @classmethod
    def of(cls, node: Any) -> Normalised | None:
        """Return the output of a node, or None for a BatchNorm without β or one that keeps no input."""
        beta = getattr(node.next_functions[2][0], "variable", None)
        return None if beta is None or node._saved_input is None else cls(node, beta.detach().clone())

    @property
    def shape(self) -> torch.Size:
        """[T·N, C, *F]."""
        return self.node._saved_input.shape

    @property
    def dtype(self) -> torch.dtype:
        """That of input and output."""
        return self.node._saved_input.dtype

    def __call__(self) -> Tensor:
        """Return γ (x − mean)/σ + β, [T·N, C, *F], by BatchNorm's own kernel: with γ/σ for γ and 1 for σ."""
        node = self.node
        with torch.no_grad():
            if node._saved_training:
                mean, scale = node._saved_result1, node._saved_result2 * node._saved_weight
                return torch.native_batch_norm(
                    node._saved_input, scale, self.bias, mean, torch.ones_like(mean), False, 0.0, 0.0
                )[0]
            mean, variance = node._saved_running_mean, node._saved_running_var
            return torch.native_batch_norm(
                node._saved_input, node._saved_weight, self.bias, mean, variance, False, 0.0, node._saved_eps
            )[0]


@dataclass(frozen=True)
class Sum:
    """The sum of two tensors of one shape, such as a block and its shortcut."""

    one: Source
    other: Source

    @property
    def shape(self) -> torch.Size:
        """[T·N, C, *F]."""
        return self.one.shape

    @property
    def dtype(self) -> torch.dtype:
        """That of both."""
        return self.one.dtype

    def __call__(self) -> Tensor:
        """Return the sum, [T·N, C, *F]."""
        return self.one().add_(self.other())


Source = Normalised | Spikes | Sum


def source_of(tensor: Tensor) -> Source | None:
    """Return what computes a tensor again from what autograd keeps anyway; None where there is no such thing.

    Only on CPUs, where BatchNorm's kernels for training and evaluation round alike.
    """
    unchanged = tensor.device.type == "cpu" and tensor._version == 0
    source = _of_node(tensor.grad_fn) if unchanged else None
    return source if source and (source.shape, source.dtype) == (tensor.shape, tensor.dtype) else None


def _of_node(node: Any) -> Source | None:
    """Return what computes the output of a node of autograd's graph again."""
    kind = None if node is None else node.name()
    if kind == "NativeBatchNormBackward0":
        return Normalised.of(node)
    if kind == "AddBackward0" and node._saved_alpha == 1:
        one, other = (_of_node(before) for before, _ in node.next_functions)
        alike = one and other and (one.shape, one.dtype) == (other.shape, other.dtype)
        return Sum(one, other) if one and other and alike else None
    return spikes_of(node)


def spikes_of(node: Any) -> Spikes | None:
    """Return the spikes of neurons in autograd's graph, None for another node."""
    spikes = getattr(node, "spikes", None)
    return spikes if isinstance(spikes, Spikes) else None


_asked: ContextVar[bool] = ContextVar("recompute", default=False)


def recomputing() -> bool:
    """Whether the present code runs inside :func:`recompute`."""
    return _asked.get()


@contextmanager
def recompute() -> Iterator[None]:
    """Keep less of what runs inside this block, and compute it again in the backward pass.

    Holds for neurons that run by the kernels FUSED and COMPILED, for currents on CPUs, and for layers that read the
    neurons' output as it is. For training loops of one's own; :func:`lmh.finetune.finetune` takes
    ``Schedule(memory=Recompute())``.

    >>> from lmh.convert import load
    >>> snn, x = load("zoo:digits-cnn-t4").train(), torch.zeros(2, 1, 8, 8)
    >>> with recompute():
    ...     loss = snn(x).square().sum()
    >>> loss.backward()
    """

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        spikes = spikes_of(tensor.grad_fn)
        return tensor if spikes is None else spikes

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    token = _asked.set(True)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _asked.reset(token)
