"""Builds a NIR graph: nodes and edges for weighted layers, pools and flattening of :class:`Value` s."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from .nir_values import Array, NoNodeError, Term, Value, folded_weight, output_of
from .nir_windows import Window


def float32(value: Any) -> Array:
    """Return a value as NIR files hold it: a contiguous float32 array."""
    return np.ascontiguousarray(value, dtype=np.float32)


class Builder:
    """Collects the nodes and edges of one NIR graph.

    Args:
        nir: the nir package.

    Attributes:
        nodes: by name, in an order in which every node stands behind its sources.
        edges: from name to name.
        shapes: of each node's output for one sample.
    """

    def __init__(self, nir: Any) -> None:
        self.nir = nir
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._made: dict[tuple[Any, ...], str] = {}

    def add(self, path: str, node: Any, sources: Sequence[str], shape: Sequence[int]) -> str:
        """Add a node that reads the sum of ``sources``, and return the name it got from its path."""
        wanted = path.replace(".", "_").replace("/", "_") or type(node).__name__.lower()
        name, count = wanted, 0
        while name in self.nodes:
            count += 1
            name = f"{wanted}_{count}"
        node.metadata = {"path": path}
        # nir takes a convolution's channels from its weight, and every kernel for square
        node.input_type = {"input": np.array(self.shapes[sources[0]] if sources else shape)}
        node.output_type = {"output": np.array(shape)}
        self.nodes[name] = node
        self.shapes[name] = tuple(int(size) for size in shape)
        self.edges += [(source, name) for source in dict.fromkeys(sources)]
        return name

    def _once(self, key: tuple[Any, ...], make: Callable[[], str]) -> str:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def settled(self, value: Value, path: str) -> list[str]:
        """Return nodes whose outputs add up to the value: what a node's edges can say.

        Raises:
            NoNodeError: if positions were mixed in a way that only flattening can follow.
        """
        _check_terms(value)
        first, *others = value.terms
        none = np.zeros_like(value.bias)
        names = [self._settled_term(value, first, value.bias, path)]
        names += [self._settled_term(value, term, none, path) for term in others]
        return list(dict.fromkeys(names))

    def _settled_term(self, value: Value, term: Term, bias: Array, path: str) -> str:
        base = self._shape(term, value)
        if term.plain(base[0]):
            if (term.scale == 1).all() and not bias.any():
                return term.base
            if not bias.any():
                scale = ("scale", term.base, term.scale.tobytes())
                return self._once(
                    scale, partial(self._scale, f"{term.base}.scale", [term.base], term.scale, value.shape)
                )
        key = ("map", term.base, term.index.tobytes(), term.scale.tobytes(), bias.tobytes())
        return self._once(key, partial(self._mapped, value, term, bias, path))

    def _shape(self, term: Term, value: Value) -> tuple[int, ...]:
        base = self.shapes[term.base]
        if base[1:] != value.shape[1:]:
            raise NoNodeError("reads an adaptive pool of uneven windows, which NIR can only flatten")
        return base

    def _scale(self, path: str, sources: Sequence[str], scale: Array, shape: Sequence[int]) -> str:
        full = scale if scale.shape == tuple(shape) else scale.reshape(-1, *[1] * (len(shape) - 1))
        return self.add(path, self.nir.Scale(scale=float32(np.broadcast_to(full, shape))), sources, shape)

    def _mapped(self, value: Value, term: Term, bias: Array, path: str) -> str:
        """Add a 1×1 convolution (a matrix, for vectors) that maps channels onto channels."""
        path = f"{path}.channels"
        channels, spatial = self.shapes[term.base][0], value.shape[1:]
        if term.plain(channels) and spatial:
            weight = term.scale.reshape(-1, 1, *[1] * len(spatial))
            return self._conv_node(path, [term.base], weight, bias, _ones(spatial), _zeros(spatial), _ones(spatial),
                                   channels, value.shape)  # fmt: skip
        weight = folded_weight(np.eye(value.channels), [term], channels)
        if not spatial:
            node = self.nir.Affine(weight=float32(weight), bias=float32(bias))
            return self.add(path, node, [term.base], value.shape)
        weight = weight.reshape(*weight.shape, *[1] * len(spatial))
        return self._conv_node(
            path, [term.base], weight, bias, _ones(spatial), _zeros(spatial), _ones(spatial), 1, value.shape
        )

    def _conv_node(
        self,
        path: str,
        sources: Sequence[str],
        weight: Array,
        bias: Array,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
        shape: Sequence[int],
    ) -> str:
        before = self.shapes[sources[0]][1:]
        flat = len(before) == 1
        kind = self.nir.Conv1d if flat else self.nir.Conv2d
        node = kind(
            input_shape=before[0] if flat else tuple(before), weight=float32(weight), bias=float32(bias), groups=groups,
            stride=stride[0] if flat else stride, padding=padding[0] if flat else padding,
            dilation=dilation[0] if flat else dilation,
        )  # fmt: skip
        return self.add(path, node, sources, shape)

    def convolved(
        self,
        value: Value,
        weight: Array,
        bias: Array,
        options: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int],
        path: str,
        shape: Sequence[int],
    ) -> Value:
        """Return a convolution of a value; its channel maps and scales go into the weights.

        Args:
            value: [C, *F].
            weight: [C', C/groups, *kernel].
            bias: [C'].
            options: stride, padding, dilation, groups.
            path: of the layer.
            shape: [C', *F'] of the result.
        """
        stride, padding, dilation, groups = options

        def node(sources: Sequence[str], weight: Array, bias: Array) -> str:
            return self._conv_node(path, sources, weight, bias, stride, padding, dilation, groups, shape)

        return self._weighted(value, weight, bias, groups, any(padding), node, path, shape)

    def linear(self, value: Value, weight: Array, bias: Array | None, path: str) -> Value:
        """Return a linear layer of a vector; weight [C', C], bias [C'] or None."""

        def node(sources: Sequence[str], weight: Array, bias: Array) -> str:
            plain = self.nir.Linear(weight=float32(weight))
            layer = self.nir.Affine(weight=float32(weight), bias=float32(bias)) if bias.any() else plain
            return self.add(path, layer, sources, bias.shape)

        return self._weighted(value, weight, np.zeros(len(weight)) if bias is None else bias, 1, False, node, path,
                              weight.shape[:1])  # fmt: skip

    def _weighted(
        self,
        value: Value,
        weight: Array,
        bias: Array,
        groups: int,
        padded: bool,
        node: Callable[[Sequence[str], Array, Array], str],
        path: str,
        shape: Sequence[int],
    ) -> Value:
        _check_terms(value)
        if value.bias.any() and (padded or groups > 1):
            value = self.through_nodes(value, path)
        plain = all(term.plain(self._shape(term, value)[0]) for term in value.terms)
        same = all(np.array_equal(term.scale, value.terms[0].scale) for term in value.terms)
        if groups > 1 and not (plain and same):
            value = self.through_nodes(value, path)
            plain = same = True
        bias = bias + weight.sum(axis=tuple(range(2, weight.ndim))) @ value.bias if value.bias.any() else bias
        if plain and same:
            scale = value.terms[0].scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
            grouped = weight.reshape(groups, -1, *weight.shape[1:]) * scale
            return output_of(node([term.base for term in value.terms], grouped.reshape(weight.shape), bias), shape)
        bases = dict.fromkeys(term.base for term in value.terms)
        terms: list[Term] = []
        for base in bases:
            own = [term for term in value.terms if term.base == base]
            name = node([base], folded_weight(weight, own, self.shapes[base][0]), bias)
            terms += output_of(name, shape).terms
            bias = np.zeros_like(bias)
        return Value(tuple(shape), tuple(terms), np.zeros(shape[0]))

    def through_nodes(self, value: Value, path: str) -> Value:
        """Return the value with its maps, scales and constants made into nodes."""
        terms = [term for name in self.settled(value, path) for term in output_of(name, value.shape).terms]
        return Value(value.shape, tuple(terms), np.zeros(value.channels))

    def pooled(self, value: Value, window: Window, path: str, shape: Sequence[int]) -> Value:
        """Return the window's sums, divided by its divisor, of every channel of a value."""
        if value.bias.any() and not window.keeps_constants:
            value = self.through_nodes(value, path)
        even = not isinstance(window.divisor, np.ndarray)
        average = even and window.symmetric and len(shape) == 3 and window.divisor == np.prod(window.kernel)
        factor = 1.0 if average or not even else 1 / window.divisor
        terms = []
        for term in value.terms:
            channels = self._shape(term, value)[0]
            after = (channels, *shape[1:])
            key = ("pool", term.base, average, *window.key)
            name = self._once(key, partial(self._pool_node, term.base, window, average, path, after))
            terms.append(replace(term, base=name, scale=term.scale * factor))
        return Value(tuple(shape), tuple(terms), value.bias)

    def _pool_node(self, base: str, window: Window, average: bool, path: str, shape: Sequence[int]) -> str:
        if window.symmetric and len(shape) == 3:
            kind = self.nir.AvgPool2d if average else self.nir.SumPool2d
            sizes = (np.array(size) for size in (window.kernel, window.stride, window.before))
            name = self.add(path, kind(*sizes), [base], shape)
        else:
            name = self._window_convolution(base, window, path, shape)
        if isinstance(window.divisor, np.ndarray):
            full = np.broadcast_to(1 / window.divisor, tuple(shape))
            name = self._scale(f"{path}.counts", [name], full, shape)
        return name

    def _window_convolution(self, base: str, window: Window, path: str, shape: Sequence[int]) -> str:
        """Add the window as a depthwise convolution: NIR's pools have two axes and pad both ends alike."""
        padding = tuple(max(pads) for pads in zip(window.before, window.after, strict=True))
        lead = tuple(pad - before for pad, before in zip(padding, window.before, strict=True))
        ones = np.pad(np.ones(window.kernel), [(size, 0) for size in lead])
        weight = np.broadcast_to(ones, (shape[0], 1, *ones.shape))
        return self._conv_node(path, [base], weight, np.zeros(shape[0]), window.stride, padding, _ones(window.kernel),
                               shape[0], shape)  # fmt: skip

    def mixed_positions(self, value: Value, matrix: Array, path: str, shape: Sequence[int]) -> Value:
        """Return matrix [F', F] applied to the positions of every channel; rows of the matrix add up to 1."""
        terms = []
        for term in value.terms:
            channels, area = self._shape(term, value)[0], int(np.prod(value.shape[1:]))
            flat = self.add(f"{path}.flat", self.nir.Flatten(np.array(self.shapes[term.base]), 1, -1), [term.base],
                            (channels, area))  # fmt: skip
            weight = np.broadcast_to(matrix, (channels, *matrix.shape))
            name = self.add(path, self.nir.Linear(weight=float32(weight)), [flat], (channels, len(matrix)))
            terms.append(replace(term, base=name))
        return Value(tuple(shape), tuple(terms), value.bias)

    def flattened(self, value: Value, path: str) -> Value:
        """Return a value [C, *F] as the vector [C·F]."""
        area = int(np.prod(value.shape[1:]))
        terms = []
        for term in value.terms:
            base = term.base
            if len(self.shapes[base]) > 1:
                base = self._once(("flatten", base), partial(self._flatten, base, path))
            index = np.where(term.index[:, None] >= 0, term.index[:, None] * area + np.arange(area), -1)
            terms.append(Term(base, index.ravel(), term.scale.repeat(area)))
        return Value((value.channels * area,), tuple(terms), value.bias.repeat(area))

    def _flatten(self, base: str, path: str) -> str:
        shape = self.shapes[base]
        return self.add(path, self.nir.Flatten(np.array(shape), 0, -1), [base], (int(np.prod(shape)),))


def _check_terms(value: Value) -> None:
    if not value.terms:
        raise NoNodeError("reads a constant, which NIR has no node for")


def _ones(like: Sequence[int]) -> tuple[int, ...]:
    return (1,) * len(like)


def _zeros(like: Sequence[int]) -> tuple[int, ...]:
    return (0,) * len(like)
