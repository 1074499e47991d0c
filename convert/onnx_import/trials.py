"""The sizes on which a graph is tried while it is built: the batch, and every axis that the file leaves open."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import TensorProto, TypeProto, ValueInfoProto

from .values import DTYPES, UnsupportedFormError

TRIALS = 3
OPEN_SIZES = (224, 256, 320, 288, 352, 192)


def input_trials(inputs: Sequence[ValueInfoProto], *, fixed_batch: bool = False) -> dict[str, list[tuple[int, ...]]]:
    """Return the shape of every input in each trial.

    The batch is axis 0 of the first input, whatever size the file gives it, and every axis 0 of that size in other
    inputs. The first trial has the file's own batch size B, or 1 where it is open; the others have 2B and 3B. With
    three of them, what is proportional to the batch is told from what merely grows with it.

    Args:
        inputs: of the graph, without those that are initializers.
        fixed_batch: keep the file's batch size in every trial.

    Raises:
        UnsupportedFormError: for an input of a type that torch does not have.
    """
    symbols = {info.name: _symbols(info) for info in inputs}
    first = next((dims[0] for dims in symbols.values() if dims), None)
    batch = first if isinstance(first, int) and first > 0 else 1
    opened = list(dict.fromkeys(dim for dims in symbols.values() for dim in dims if isinstance(dim, str)))
    sizes = {symbol: _rotated(position) for position, symbol in enumerate(opened)}
    if isinstance(first, str):
        sizes[first] = _batches(1, fixed_batch)

    def tried(dim: int | str, axis: int) -> Sequence[int]:
        if isinstance(dim, str):
            return sizes[dim]
        return _batches(batch, fixed_batch) if axis == 0 and dim == first and dim > 0 else (dim,) * TRIALS

    columns = {name: [tried(dim, axis) for axis, dim in enumerate(dims)] for name, dims in symbols.items()}
    return {name: [tuple(column[trial] for column in columns[name]) for trial in range(TRIALS)] for name in columns}


def _batches(batch: int, fixed: bool) -> tuple[int, ...]:
    return tuple(batch if fixed else batch * (trial + 1) for trial in range(TRIALS))


def _rotated(position: int) -> tuple[int, ...]:
    """Sizes for an open axis, so that no two axes have the same in every trial."""
    return tuple(OPEN_SIZES[(position + trial) % len(OPEN_SIZES)] for trial in range(TRIALS))


def _symbols(info: ValueInfoProto) -> list[int | str]:
    """Return each axis of an input as its size, or as a name where the file leaves it open."""
    tensor = tensor_type(info)
    return [
        int(dim.dim_value)
        if dim.HasField("dim_value")
        else dim.dim_param or (f"{info.name}:{axis}" if axis else "batch:0")
        for axis, dim in enumerate(tensor.shape.dim)
    ]


def size_of_sample(info: ValueInfoProto) -> tuple[int, ...] | None:
    """Return the shape of one sample, [*F], or None where the file leaves an axis of it open."""
    dims = _symbols(info)[1:]
    return tuple(dim for dim in dims if isinstance(dim, int)) if all(isinstance(dim, int) for dim in dims) else None


def tensor_type(info: ValueInfoProto) -> TypeProto.Tensor:
    """Return the type of an input that is a tensor torch can hold.

    Raises:
        UnsupportedFormError: for any other.
    """
    kind = info.type.WhichOneof("value")
    if kind != "tensor_type" or info.type.tensor_type.elem_type not in DTYPES:
        raise UnsupportedFormError(f"input {info.name} is a {_type_name(info)}; expected a tensor of numbers")
    return info.type.tensor_type


def _type_name(info: ValueInfoProto) -> str:
    kind = info.type.WhichOneof("value") or "value without a type"
    if kind != "tensor_type":
        return kind.replace("_type", "")
    number = info.type.tensor_type.elem_type
    known = number in TensorProto.DataType.values()
    return f"tensor of {TensorProto.DataType.Name(number) if known else f'the type number {number}'}"
