"""Values on their way through a NIR graph: sums of nodes' outputs, with a channel map and a scale on each.

NIR has no concat, split, channel shuffle, subtraction or multiplication by a constant, but it adds up the edges that
meet in a node, and it has weights. So none of these becomes a node: a value is

    value[c] = Σ_terms scale[c] · output_of(base)[index[c]] + bias[c]

along axis 0 of one sample, index −1 for a zero, and whatever weighted layer reads it takes the map into its weights.
θ travels in the same way from the unit spikes of a neuron to the weights behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class NoNodeError(Exception):
    """Something that no NIR node can say; its text completes a sentence that begins with the fx node."""


@dataclass(frozen=True, eq=False)
class Term:
    """One node's output in a value.

    Attributes:
        base: name of the NIR node.
        index: for each channel of the value the channel of ``base``, −1 for none, shape [C].
        scale: factor of each channel, shape [C].
    """

    base: str
    index: Array
    scale: Array

    def plain(self, channels: int) -> bool:
        """Whether the channels are those of a base with so many, in their order."""
        return len(self.index) == channels and bool((self.index == np.arange(channels)).all())


@dataclass(frozen=True, eq=False)
class Value:
    """A sum of terms plus a constant for each channel.

    Attributes:
        shape: of one sample, [C, *F].
        terms: what is summed.
        bias: constant of each channel, shape [C].
    """

    shape: tuple[int, ...]
    terms: tuple[Term, ...]
    bias: Array

    @property
    def channels(self) -> int:
        """C."""
        return self.shape[0]


def output_of(base: str, shape: Sequence[int]) -> Value:
    """Return a node's output as a value.

    >>> output_of("conv1", (2, 4, 4)).terms[0].scale.tolist()
    [1.0, 1.0]
    """
    channels = shape[0]
    return Value(tuple(shape), (Term(base, np.arange(channels), np.ones(channels)),), np.zeros(channels))


def scaled(value: Value, factor: Array | float) -> Value:
    """Return factor · value; the factor is a number or of shape [C]."""
    terms = tuple(replace(term, scale=term.scale * factor) for term in value.terms)
    return replace(value, terms=terms, bias=value.bias * factor)


def shifted(value: Value, constant: Array | float) -> Value:
    """Return value + constant; the constant is a number or of shape [C]."""
    return replace(value, bias=value.bias + constant)


def added(a: Value, b: Value) -> Value:
    """Return a + b. Terms with the same base and map become one."""
    if a.shape != b.shape:
        raise NoNodeError(
            f"adds shapes {list(a.shape)} and {list(b.shape)}, which edges into one node cannot broadcast"
        )
    merged: dict[tuple[str, bytes], Term] = {}
    for term in (*a.terms, *b.terms):
        key = (term.base, term.index.tobytes())
        known = merged.get(key)
        merged[key] = term if known is None else replace(term, scale=known.scale + term.scale)
    return Value(a.shape, tuple(merged.values()), a.bias + b.bias)


def selected(value: Value, index: Array) -> Value:
    """Return the value whose channel c is channel ``index[c]`` of ``value``, zero for −1."""
    there = index >= 0
    terms = []
    for term in value.terms:
        taken = np.where(there, term.index[index], -1)
        if (taken >= 0).any():
            terms.append(Term(term.base, taken, np.where(taken >= 0, term.scale[index], 1.0)))
    return Value((len(index), *value.shape[1:]), tuple(terms), np.where(there, value.bias[index], 0.0))


def joined(values: Sequence[Value]) -> Value:
    """Return the concat over channels."""
    total = sum(value.channels for value in values)
    parts, start = [], 0
    for value in values:
        index = np.full(total, -1)
        index[start : start + value.channels] = np.arange(value.channels)
        parts.append(selected(value, index))
        start += value.channels
    result = parts[0]
    for part in parts[1:]:
        result = added(result, part)
    return result


def folded_weight(weight: Array, terms: Sequence[Term], channels: int) -> Array:
    """Return the weight [out, C_base, …] that gives on ``base`` what ``weight`` [out, C, …] gives on its terms."""
    columns = np.swapaxes(weight, 0, 1)
    result = np.zeros((channels, *columns.shape[1:]))
    for term in terms:
        there = term.index >= 0
        factor = term.scale[there].reshape(-1, *[1] * (weight.ndim - 1))
        np.add.at(result, term.index[there], columns[there] * factor)
    return np.swapaxes(result, 0, 1)


def channel_map(labels: Array, shape: Sequence[int]) -> tuple[Array, tuple[int, ...]] | None:
    """Say which channels, and with what spatial stride, a reordering takes.

    Args:
        labels: [C', *F'], for every element 1 + the position that it had in a tensor of ``shape``, 0 for a zero.
        shape: [C, *F].

    Returns:
        The index [C'] with −1 for zero channels, and the stride of each spatial axis; None if the elements move in
        another way.
    """
    if labels.ndim != len(shape):
        return None
    area = int(np.prod(shape[1:], dtype=np.int64))
    index = np.full(labels.shape[0], -1)
    places: Array | None = None
    for channel, own in enumerate(labels):
        if not own.any():
            continue
        if not own.all():
            return None
        source, place = np.divmod(own - 1, area)
        if (source != source.flat[0]).any() or (places is not None and (place != places).any()):
            return None
        index[channel], places = source.flat[0], place
    if places is None:
        return None
    strides = tuple(-(-before // after) for before, after in zip(shape[1:], labels.shape[1:], strict=True))
    positions = np.arange(area).reshape(tuple(shape[1:]))[tuple(slice(None, None, stride) for stride in strides)]
    return (index, strides) if np.array_equal(places, positions) else None
