"""Shapes of every node of a graph, without computing: two batch sizes on the meta device show where N goes.

torch's FakeTensorMode does the same and keeps devices apart as well, but takes longer, and conversion is made of this.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map, tree_map_only

from .errors import ArgumentError, reason_of
from .ops import label
from .structures import each_shape, example_tensor, leaves_of, tensors_of

BATCHES = (2, 3)
MOST_REMEMBERED = 2**14
_META = torch.device("meta")
_MISSING = object()
_OPERATORS = "add sub mul matmul truediv floordiv mod pow lshift rshift and or xor"
_WRITERS = {"__set__", "__setitem__", *(f"__i{name}__" for name in _OPERATORS.split())}
_known: dict[Hashable, Any] = {}


class _OnMeta(TorchFunctionMode):
    """Functions run on the meta device if one of their tensors is there; the others join it, and nothing is changed.

    What comes of parameters and constants alone is computed, as a network may read it; what is written to is a copy.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors((args, kwargs)))
        if any(tensor.is_meta for tensor in tensors):
            return _remembered(func, args, kwargs)
        if tensors and (_writes(func, kwargs) or kwargs.get("inplace")):
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (args, kwargs))
        return func(*args, **kwargs)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a function's arguments; ``tensors_of`` knows more kinds of values and takes far longer."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _remembered(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return ``func(*args, **kwargs)``, on the meta device; it is called once for the same shapes.

    torch finds shapes in Python, a millisecond for a function, and a network does the same again and again.
    """
    if _name(func) == "__get__" or _writes(func, kwargs):
        return _called(func, args, kwargs)
    try:
        key = (func, _signature(args), _signature(kwargs), torch.get_default_dtype(), torch.is_inference_mode_enabled())
        value = _known.get(key, _MISSING)
    except (TypeError, RuntimeError):  # a value without a hash, a tensor without strides
        return _called(func, args, kwargs)
    if value is _MISSING:
        value = _apart(_called(func, args, kwargs))
        if len(_known) >= MOST_REMEMBERED:
            _known.clear()
        _known[key] = value
    return _apart(value)


def _called(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = tree_map(_moved, (args, kwargs))
    if func in (Tensor.cpu, Tensor.cuda):
        return args[0]
    if func is Tensor.to:
        args = (args[0], *(_META if isinstance(value, str) else value for value in args[1:]))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _META}
    if func is Tensor.view and not kwargs and not isinstance(args[1], torch.dtype):
        func = Tensor.reshape  # convolutions keep channels_last, but not here
    return func(*args, **kwargs)


def _signature(value: Any) -> Hashable:
    """Return what shapes may depend on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, tuple | list):
        return type(value), *map(_signature, value)
    if isinstance(value, dict):
        return tuple((name, _signature(item)) for name, item in value.items())
    if isinstance(value, slice):
        return slice, value.start, value.stop, value.step
    hash(value)
    return type(value), value


def _apart(value: Any) -> Any:
    """Return tensors whose shapes can change while those of ``value`` stay."""
    return tree_map_only(Tensor, Tensor.detach, value)


def _moved(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if value.is_meta else value.to(_META)
    return _META if isinstance(value, torch.device) else value


def _writes(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Tell whether a function changes a tensor that it is given."""
    name = _name(func)
    return (name.endswith("_") and not name.endswith("__")) or name in _WRITERS or "out" in kwargs


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", "")


class _Recorder(fx.Interpreter):
    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.extra_traceback = False
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as error:
            if getattr(error, "lmh_located", False):
                raise
            reason = reason_of(error)
            if "meta tensor" in reason or "'Meta' backend" in reason:
                problem = f"its shape cannot be found without its values ({reason})"
                advice = "Compute outside of the network what reads values, as .item(), float() or a branch does."
            else:
                problem = f"an input of shape {self._input_shapes()} does not fit ({reason})"
                advice = "Pass example_input (on the command line --input-size C,H,W) of the shape that it expects."
            located = ArgumentError(f"{label(n)}: {problem}. {advice}")
            located.lmh_located = True  # type: ignore[attr-defined]
            raise located from error
        self.values[n] = value
        return value

    def _input_shapes(self) -> str:
        inputs = [value for node, value in self.values.items() if node.op == "placeholder"]
        return ", ".join(str(["N", *value.shape[1:]]) for value in inputs)


def node_values(model: fx.GraphModule, input_shape: Sequence[Any]) -> dict[fx.Node, Any]:
    """Return the value of every node as tensors on the meta device (shape, dtype, no data) and plain numbers.

    Args:
        model: a traced network.
        input_shape: of the whole input, [N, *F] or [T, N, *F]; for several inputs one shape for each.

    Raises:
        ArgumentError: if the input does not fit, with the node where it showed.
    """
    recorder = _Recorder(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _OnMeta():
        parameter = example_tensor(model)
        recorder.run(*(torch.empty(shape, dtype=parameter.dtype, device=_META) for shape in each_shape(input_shape)))
    return recorder.values


def batch_use(pair: tuple[Any, Any]) -> str:
    """Say how a node's value depends on N, from its values at the two batch sizes.

    Returns:
        ``"batched"`` (every tensor has N on axis 0 and nowhere else), ``"free"`` (N nowhere), ``"size"``
        (a number that carries N), or ``"mixed"``.
    """
    leaves = [leaves_of(_plain(value)) for value in pair]
    if len(leaves[0]) != len(leaves[1]):
        return "mixed"
    return _worst([_leaf_use(a, b) for a, b in zip(*leaves, strict=True)])


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, torch.Size) else value


def _worst(uses: list[str]) -> str:
    for use in ("mixed", "size", "batched"):
        if use in uses:
            return use
    return "free"


def _leaf_use(a: Any, b: Any) -> str:
    if not isinstance(a, Tensor):
        return "free" if a == b else "size"
    if a.shape == b.shape:
        return "free"
    ratio_holds = a.ndim == b.ndim and a.ndim > 0 and a.shape[0] * BATCHES[1] == b.shape[0] * BATCHES[0]
    return "batched" if ratio_holds and a.shape[1:] == b.shape[1:] else "mixed"


def leading(value: Any) -> set[int]:
    """Return the sizes of axis 0 of all tensors in ``value`` that hold anything; attention may give an empty one."""
    return {leaf.shape[0] for leaf in tensors_of(value) if leaf.ndim and leaf.numel()}
