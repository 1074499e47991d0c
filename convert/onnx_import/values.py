"""What flows between ONNX nodes while a graph is built, and what an operator's function sees and returns.

The graph is built on several trials at once: assumed sizes of the axes that may change, first of all the
batch. What comes out the same in every trial is a constant of the network, however the file computes it.
What grows with the trials is read off a tensor when the network runs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx, nn

Dim = int | tuple[int, ...]
"""A size: a number if it is the same in every trial, else one number for each trial."""

DTYPES: Mapping[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}


FIXED_BATCH_ADVICE = (
    "expected the batch to be free on axis 0 of the input. Export the model with batch size 1 or a dynamic batch axis, "
    "or pass fixed_batch=True to import it for that size"
)


class UnsupportedFormError(Exception):
    """A form of an operator that cannot be imported; the builder turns it into a line of its SourceError."""


def dim_of(sizes: Iterable[int]) -> Dim:
    """Return a size from its value in each trial."""
    found = tuple(int(size) for size in sizes)
    return found[0] if all(size == found[0] for size in found) else found


def in_trials(dims: Sequence[Dim]) -> list[tuple[int, ...]]:
    """Return the sizes of all axes in each trial; one trial stands for all if no size changes."""
    count = max((len(dim) for dim in dims if isinstance(dim, tuple)), default=1)
    return [tuple(dim if isinstance(dim, int) else dim[trial] for dim in dims) for trial in range(count)]


def is_batch(dim: Dim) -> bool:
    """Whether a size is a multiple of the batch size."""
    return isinstance(dim, tuple) and all(size == dim[0] * (trial + 1) for trial, size in enumerate(dim))


def times(dims: Sequence[Dim]) -> Dim:
    """Return the product of sizes."""
    return dim_of(math.prod(sizes) for sizes in in_trials(dims))


@dataclass(frozen=True, eq=False)
class Signal:
    """A value that exists when the network runs.

    Attributes:
        node: that computes it.
        trials: a fake tensor (shape and type, no data) for each trial.
    """

    node: fx.Node
    trials: tuple[Tensor, ...]

    @property
    def dims(self) -> tuple[Dim, ...]:
        """Return the size of every axis."""
        return tuple(dim_of(sizes) for sizes in zip(*(trial.shape for trial in self.trials), strict=True))

    @property
    def dtype(self) -> torch.dtype:
        """Return the element type."""
        return self.trials[0].dtype


@dataclass(frozen=True, eq=False)
class Constant:
    """A value that the file holds, or that follows from what it holds.

    Attributes:
        array: its elements.
        name: of the initializer that it came from, else of the ONNX value.
        trainable: it came from an initializer and has a floating-point type.
    """

    array: np.ndarray
    name: str
    trainable: bool = False
    _parameters: dict[tuple[int, ...] | None, nn.Parameter] = field(default_factory=dict, repr=False)

    @property
    def dims(self) -> tuple[Dim, ...]:
        """Return the size of every axis."""
        return self.array.shape

    @property
    def dtype(self) -> torch.dtype:
        """Return the element type as torch has it."""
        return replace(self, array=self.array.reshape(-1)[:0]).tensor().dtype

    def tensor(self) -> Tensor:
        """Return a copy of the elements.

        Raises:
            UnsupportedFormError: for types that torch does not have.
        """
        array = np.array(self.array, order="C", copy=True)
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        try:
            return torch.from_numpy(array)
        except TypeError as error:
            raise UnsupportedFormError(f"{self.name} has elements of type {array.dtype}, which torch lacks") from error

    @property
    def shared(self) -> bool:
        """Whether nodes that read this initializer share one parameter.

        Not if its elements are all equal: exporters merge initializers that merely happen to be equal (the zeros and
        ones of fresh BatchNorm layers), and training must be able to tell those apart.
        """
        return not bool((self.array == self.array.reshape(-1)[:1]).all())

    def parameter(self, permutation: tuple[int, ...] | None = None) -> nn.Parameter:
        """Return the elements as a parameter, with the axes in another order if one is given."""
        tensor = self.tensor()
        if permutation is not None:
            tensor = tensor.permute(permutation).contiguous()
        if not self.shared:
            return nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        if permutation not in self._parameters:
            self._parameters[permutation] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        return self._parameters[permutation]


@dataclass(frozen=True, eq=False)
class Sizes:
    """Numbers that the file computes from the shape of a tensor, and that differ between trials.

    Attributes:
        arrays: the numbers in each trial, all of one shape.
    """

    arrays: tuple[np.ndarray, ...]

    @property
    def dims(self) -> tuple[Dim, ...]:
        """Return the size of every axis of the array of numbers."""
        return self.arrays[0].shape

    def entries(self) -> list[Dim]:
        """Return each number, in every trial.

        Raises:
            UnsupportedFormError: if one is not whole.
        """
        columns = np.stack([array.reshape(-1) for array in self.arrays], axis=1)
        if not bool((columns == np.floor(columns)).all()):
            raise UnsupportedFormError(f"it uses a fraction computed from the batch size; {FIXED_BATCH_ADVICE}")
        return [dim_of(column) for column in columns]


Value = Signal | Constant | Sizes


@dataclass(frozen=True, eq=False)
class Call:
    """One call in the graph to come.

    Attributes:
        target: a module, a function, or the name of a method of the first argument.
        args: values, plain numbers, further calls, or tuples, lists and slices of them.
        kwargs: the same.
        named_by: the constant after whose name a module is called.
    """

    target: nn.Module | Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    named_by: Constant | None = None


Result = Call | Signal | Constant | Sizes | Sequence[Call | Signal | Constant | Sizes | None]


@dataclass(frozen=True)
class Op:
    """One ONNX node, as an operator's function sees it.

    Attributes:
        kind: the operator's name.
        since: the opset in which this version of the operator appeared.
        attributes: as plain Python values.
        inputs: the values it reads; None for an optional one that is left out.
        used: for each output, whether anything reads it.
        sources: the inputs of the network, for sizes that the node's own inputs do not show.
    """

    kind: str
    since: int
    attributes: Mapping[str, Any]
    inputs: tuple[Value | None, ...]
    used: tuple[bool, ...]
    sources: tuple[Signal, ...]

    def optional(self, index: int) -> Value | None:
        """Return an input, or None if it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def value(self, index: int) -> Value:
        """Return an input that must be there."""
        found = self.optional(index)
        if found is None:
            raise UnsupportedFormError(f"its input {index} is left out; expected one")
        return found

    def signal(self, index: int = 0) -> Signal:
        """Return an input that depends on the network's input."""
        found = self.value(index)
        if isinstance(found, Signal):
            return found
        raise UnsupportedFormError(f"its input {index} is constant; expected a value computed from the network's input")

    def constant(self, index: int) -> Constant | None:
        """Return an input that must not depend on the network's input, or None if it is left out."""
        found = self.optional(index)
        if found is None or isinstance(found, Constant):
            return found
        if isinstance(found, Sizes):
            raise UnsupportedFormError(f"its input {index} depends on the batch size; {FIXED_BATCH_ADVICE}")
        raise UnsupportedFormError(f"its input {index} is computed from the network's input; expected a constant")

    def weight(self, index: int) -> Constant:
        """Return a weight: a constant that must be there."""
        found = self.constant(index)
        if found is None:
            raise UnsupportedFormError(f"its input {index} is left out; expected a constant")
        return found

    def setting(self, name: str, index: int | None = None) -> list[int] | None:
        """Return whole numbers that are an attribute in old opsets and an input in new ones, or None."""
        if name in self.attributes:
            found = self.attributes[name]
            return [int(item) for item in (found if isinstance(found, Sequence) else [found])]
        given = None if index is None else self.constant(index)
        return None if given is None else [int(item) for item in given.array.reshape(-1)]

    def number(self, index: int) -> float | int | bool | None:
        """Return a constant input of one element as a Python number, or None if it is left out."""
        given = self.constant(index)
        if given is None:
            return None
        if given.array.size != 1:
            raise UnsupportedFormError(f"its input {index} has {given.array.size} elements; expected one")
        return plain(given.array)

    def rank(self, index: int = 0) -> int:
        """Return the number of axes of an input."""
        return len(self.value(index).dims)

    def axis(self, default: int, name: str = "axis", index: int = 0) -> int:
        """Return an axis of an input, counted from the front."""
        return counted(self.attributes.get(name, default), self.rank(index))

    def size(self, axis: int, index: int = 0) -> int:
        """Return the size of an axis, which must be the same whatever the network's input is.

        Raises:
            UnsupportedFormError: if it is not.
        """
        dim = self.value(index).dims[axis]
        if not isinstance(dim, int):
            raise UnsupportedFormError(
                f"it needs the size of axis {axis} when the file is read, but that axis can change; expected a fixed "
                "size there. Export the model with fixed sizes of all axes but the batch; if it is the batch, pass "
                "fixed_batch=True to import the model for the file's batch size"
            )
        return dim


def counted(axis: int, rank: int) -> int:
    """Return an axis counted from the front."""
    if not -rank <= axis < max(rank, 1):
        raise UnsupportedFormError(f"axis {axis} came; expected -{rank} to {rank - 1}")
    return axis + rank if axis < 0 else axis


def array_of(tensor: Tensor) -> np.ndarray:
    """Return the elements of a tensor as an array."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))
    return tensor.numpy()


def plain(array: np.ndarray) -> float | int | bool:
    """Return the one element of an array as a Python number."""
    return array.reshape(-1)[0].item() if array.dtype.name != "bfloat16" else float(array.reshape(-1)[0])


def whole(dim: Dim, op: Op, *, near: Value | None = None) -> int | Call:
    """Say a size as a number, or as what computes it when the network runs.

    Args:
        dim: the size in each trial.
        op: whose inputs and sources may show it.
        near: where to look first.

    Raises:
        UnsupportedFormError: if no axis, multiple, quotient or product of two axes is always that size.
    """
    if isinstance(dim, int):
        return dim
    axes = _changing_axes((near, *op.inputs, *op.sources))
    for value, axis, size in axes:
        if size == dim:
            return Call("size", (value, axis))
    for value, axis, size in axes:
        found = _affine(dim, size, Call("size", (value, axis)))
        if found is not None:
            return found
    for value, axis, size in axes:
        for other, other_axis, other_size in axes:
            if times([size, other_size]) == dim:
                return Call(operator.mul, (Call("size", (value, axis)), Call("size", (other, other_axis))))
    raise UnsupportedFormError(
        f"it uses a size that is {list(dim)} in trials of 1, 2 and 3 batches; {FIXED_BATCH_ADVICE}"
    )


def _changing_axes(values: Sequence[Value | None]) -> list[tuple[Signal, int, tuple[int, ...]]]:
    signals = [value for value in values if isinstance(value, Signal)]
    return [
        (signal, axis, size)
        for signal in signals
        for axis, size in enumerate(signal.dims)
        if isinstance(size, tuple) and all(size)
    ]


def _affine(dim: tuple[int, ...], size: tuple[int, ...], read: Call) -> Call | None:
    """Return ``read`` times a number, divided by one, or plus one, whichever is ``dim`` in every trial."""
    pairs = list(zip(dim, size, strict=True))
    factor, divisor, difference = dim[0] // size[0], size[0] // dim[0] if dim[0] else 0, dim[0] - size[0]
    if all(a == b * factor for a, b in pairs):
        return Call(operator.mul, (read, factor))
    if divisor and all(b == a * divisor for a, b in pairs):
        return Call(operator.floordiv, (read, divisor))
    if all(a - b == difference for a, b in pairs):
        return Call(operator.add, (read, difference))
    return None
