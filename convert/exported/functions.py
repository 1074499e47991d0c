"""ATen operators that become functions and methods of the op table's spelling; and those that vanish."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace as Arguments
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .calls import Builder, Built, Call, Layer, as_it_is, rank
from .layers import short

_TO_THE_END = 2**63 - 1


def nothing(a: Arguments) -> Built:
    """Assertions on sizes and types: true for every input that torch.export admitted."""
    return None


def same(a: Arguments) -> Built:
    """Operators that return their input's values."""
    return a.node.args[0]


def cast(a: Arguments) -> Built:
    """A cast or move that changes neither type nor device is nothing; any other stays."""
    before, after = a.node.args[0].meta["val"], a.node.meta["val"]
    return same(a) if (before.dtype, before.device) == (after.dtype, after.device) else as_it_is(a.node)


def clone(a: Arguments) -> Built:
    """A copy is needless where nothing is written in place, unless it orders memory."""
    free = a.memory_format in (None, torch.preserve_format)
    return same(a) if free else Call("contiguous", (a.self,), {"memory_format": a.memory_format})


def contiguous(a: Arguments) -> Built:
    """Contiguous memory, or channels last."""
    usual = a.node.kwargs.get("memory_format", torch.contiguous_format) is torch.contiguous_format
    return Call("contiguous", (a.self,), {} if usual else {"memory_format": a.memory_format})


def function(target: Callable[..., Any], *names: str) -> Builder:
    """Make the builder of a call ``target(names…)``, with the operator's arguments of these names."""

    def build(a: Arguments) -> Built:
        return Call(target, tuple(getattr(a, name) for name in names))

    return build


def summed(target: Callable[..., Any]) -> Builder:
    """Make the builder of a sum or difference, with its factor for the second term."""

    def build(a: Arguments) -> Built:
        return Call(target, (a.self, a.other), {} if a.alpha == 1 else {"alpha": a.alpha})

    return build


def swapped_sub(a: Arguments) -> Built:
    """Other − self."""
    return Call(operator.sub, (a.other, a.self)) if a.alpha == 1 else as_it_is(a.node)


def reduced(target: Callable[..., Any]) -> Builder:
    """Make the builder of a mean or sum over axes, or over all of them."""

    def build(a: Arguments) -> Built:
        if a.dtype not in (None, a.self.meta["val"].dtype):
            return as_it_is(a.node)
        if getattr(a, "dim", None) is None:
            return as_it_is(a.node) if getattr(a, "keepdim", False) else Call(target, (a.self,))
        return Call(target, (a.self, a.dim), {"keepdim": a.keepdim})

    return build


def clamp(a: Arguments) -> Built:
    """A clamp; with ``min=0`` and no maximum it is a ReLU."""
    return Call(torch.clamp, (a.self,), {"min": a.min, "max": a.max})


def size(a: Arguments) -> Built:
    """The size of one axis."""
    return Call("size", (a.self, a.dim))


def numel(a: Arguments) -> Built:
    """The number of values."""
    return Call("numel", (a.self,))


def flatten(a: Arguments) -> Built:
    """Flatten, as a module where the program had one."""
    options = {"start_dim": a.start_dim, "end_dim": a.end_dim}
    return Layer(nn.Flatten, options, a.self, otherwise=Call(torch.flatten, (a.self, a.start_dim, a.end_dim)))


def reshaped(method: str) -> Builder:
    """Make the builder of ``x.view(…)`` or ``x.reshape(…)``."""

    def build(a: Arguments) -> Built:
        sizes = a.size if hasattr(a, "size") else a.shape
        return Call(method, (a.self, *sizes))

    return build


def matrix_transposed(a: Arguments) -> Built:
    """The transpose of a matrix; a vector stays."""
    return Call(torch.transpose, (a.self, 0, 1)) if rank(a.self) == 2 else same(a)


def squeeze(a: Arguments) -> Built:
    """Squeeze all axes, one, or some."""
    return Call(torch.squeeze, (a.self, a.dim) if hasattr(a, "dim") else (a.self,))


def cat(a: Arguments) -> Built:
    """A concat."""
    return Call(torch.cat, (list(a.tensors), a.dim))


def pad(a: Arguments) -> Built:
    """Padding with a constant, a reflection, the edge, or the other side."""
    return Call(F.pad, (a.self, a.pad, getattr(a, "mode", "constant"), a.value))


def slice_(a: Arguments) -> Built:
    """``x[:, start:end:step]`` over one axis."""
    whole = a.start in (None, 0) and a.end in (None, _TO_THE_END) and a.step == 1
    if whole:
        return same(a)
    end = None if a.end == _TO_THE_END else a.end
    return Call(operator.getitem, (a.self, _at(a, slice(a.start, end, a.step))))


def select(a: Arguments) -> Built:
    """``x[:, index]`` over one axis."""
    return Call(operator.getitem, (a.self, _at(a, a.index)))


def _at(a: Arguments, index: Any) -> tuple[Any, ...]:
    axis = a.dim % rank(a.self)
    return (*[slice(None)] * axis, index)


def index(a: Arguments) -> Built:
    """Indexing by tensors."""
    return Call(operator.getitem, (a.self, tuple(slice(None) if i is None else i for i in a.indices)))


def interpolate(mode: str, *, antialias: bool = False) -> Builder:
    """Make the builder of an interpolation; a module where the program had one."""

    def build(a: Arguments) -> Built:
        settings: dict[str, Any] = {"size": short(a.output_size), "scale_factor": short(_scales(a)), "mode": mode}
        if settings["scale_factor"] is not None:
            settings["size"] = None
        if hasattr(a, "align_corners"):
            settings["align_corners"] = a.align_corners
        source: fx.Node = a.node.args[0]
        if antialias:
            return Call(F.interpolate, (source,), {**settings, "antialias": True})
        return Layer(nn.Upsample, settings, source, otherwise=Call(F.interpolate, (source,), settings))

    return build


def _scales(a: Arguments) -> Any:
    """Return the scale factors of an interpolation, of whichever overload, or None."""
    if hasattr(a, "scale_factors"):
        return a.scale_factors
    scales = tuple(getattr(a, name, None) for name in ("scales_d", "scales_h", "scales_w"))[-rank(a.node) + 2 :]
    scales = (a.scales,) if hasattr(a, "scales") else scales
    return None if None in scales else scales
