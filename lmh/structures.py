"""Several inputs and several outputs: how many a network takes, their shapes and dtype, and what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import ArgumentError

INPUT_SIZE = "lmh_input_size"
"""Key of a placeholder's ``meta``: the shape of one sample that a model file states, or None where it is open."""
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
Shape = tuple[int, ...]
SampleShape = tuple[int, ...] | tuple[Shape, ...]


def each_shape(sample_shape: Sequence[Any]) -> tuple[Shape, ...]:
    """Return the shape of one sample of each input; a plain shape is that of a single input.

    >>> each_shape((3, 8, 8)), each_shape(((3, 8, 8), (4,)))
    (((3, 8, 8),), ((3, 8, 8), (4,)))
    """
    several = bool(sample_shape) and isinstance(sample_shape[0], Sequence)
    return tuple(tuple(shape) for shape in sample_shape) if several else (tuple(sample_shape),)


def as_sample_shape(shapes: Sequence[Sequence[int]]) -> SampleShape:
    """Return the shapes of several inputs as they are kept: that of a single input is a plain shape.

    >>> as_sample_shape([(3, 8, 8)]), as_sample_shape([(3, 8, 8), (4,)])
    ((3, 8, 8), ((3, 8, 8), (4,)))
    """
    several = tuple(tuple(shape) for shape in shapes)
    return several[0] if len(several) == 1 else several


def batched(sample_shape: Sequence[Any], *leading: int) -> tuple[Shape, ...]:
    """Return the shape of each whole input, [N, *F] or [T, N, *F] by what ``leading`` is.

    >>> batched((3, 8, 8), 2)
    ((2, 3, 8, 8),)
    """
    return tuple((*leading, *shape) for shape in each_shape(sample_shape))


def input_count(model: nn.Module) -> int:
    """Return how many tensors a network's forward needs: its parameters without a default, at least one.

    >>> input_count(nn.Linear(4, 2)), input_count(nn.Bilinear(4, 4, 2))
    (1, 2)
    """
    for module in model.modules():
        try:
            parameters = inspect.signature(module.forward).parameters.values()
        except ValueError:  # TorchScript has none, and no conversion either
            return 1
        needed = [p for p in parameters if p.kind in POSITIONAL and p.default is p.empty]
        if needed or not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            return max(1, len(needed))
        # else a wrapper, such as DistributedDataParallel, that hands its arguments on
    return 1


def leaves_of(value: Any) -> list[Any]:
    """Return the leaves of nested tuples, lists, dicts and dataclasses, in order."""
    plain = pytree.tree_leaves(value, is_leaf=lambda leaf: is_dataclass(leaf) and not isinstance(leaf, type))
    found: list[Any] = []
    for leaf in plain:
        if is_dataclass(leaf) and not isinstance(leaf, type):
            found += leaves_of([getattr(leaf, item.name) for item in fields(leaf)])
        else:
            found.append(leaf)
    return found


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in a network's output, in order."""
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)]


def only_tensor(output: Any, what: str) -> Tensor:
    """Return the output, or the one tensor in it.

    Args:
        output: what a network returned.
        what: who asks, for the message.

    Raises:
        ArgumentError: if it holds several tensors or none.
    """
    found = tensors_of(output)
    if len(found) != 1:
        raise ArgumentError(
            f"{what}: the network returns {structure_text(output)}; expected one tensor. Wrap the ANN in a module "
            "that returns the tensor you mean and convert that, or work on per_step or prefixes yourself."
        )
    return found[0]


def structure_text(value: Any) -> str:
    """Return the structure of a value in words.

    >>> structure_text({"out": [1.0, 2.0], "aux": None})
    "a dict with the keys 'out', 'aux'"
    """
    name = type(value).__name__.removeprefix("immutable_")  # what fx makes of a dict or list
    kind = f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
    if isinstance(value, Mapping):
        return f"{kind} with the keys {', '.join(repr(key) for key in value)}"
    return f"{kind} of {len(value)}" if isinstance(value, tuple | list) else kind


def each_tensor(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply ``function`` to a tensor, or to every tensor in a tuple such as ``chunk`` returns."""
    return function(value) if isinstance(value, Tensor) else pytree.tree_map_only(Tensor, function, value)


def cast_floats(value: Any, dtype: torch.dtype) -> Any:
    """Return tensors of floating point in another dtype, also those in a tuple; anything else as it is."""
    return each_tensor(lambda x: x.to(dtype) if x.is_floating_point() else x, value)


def example_tensor(network: nn.Module) -> Tensor:
    """Return a tensor of the dtype and on the device that a network computes with: its first of floating point.

    >>> example_tensor(nn.ReLU())
    tensor(0.)
    """
    tensors = (tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.is_floating_point())
    return next(tensors, torch.zeros(()))
