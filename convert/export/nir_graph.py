"""From the graph of a spiking network to NIR nodes: one pass that collects everything NIR cannot say."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ...gate import Accumulate, Increments
from ...op_table import BATCHNORM_MODULES, CASTS, CONTRACTIONS, PRODUCTS, QUOTIENTS, UPSAMPLE_MODULES, Kind
from ...ops import argument, kind_of, label, module_of
from ...shapes import node_values
from ...spiking import SpikingSite
from ...time_axis import (
    EnterTail,
    FoldEvents,
    LeaveTail,
    LeaveTime,
    Readout,
    RepeatInTail,
    RepeatOverTime,
    call,
    time_axis,
)
from ..audit import describe
from ..deploy import input_shapes_of
from .nir_build import Builder, float32
from .nir_layers import conv_options, normalisation
from .nir_neurons import Fit, neuron_for
from .nir_values import (
    Array,
    NoNodeError,
    Value,
    added,
    channel_map,
    joined,
    output_of,
    scaled,
    selected,
    shifted,
)
from .nir_windows import Window, adaptive_matrix, average_window, dividing_window, maximum_window, unread

MAXPOOL_LOSS = (
    "max-pool of currents: NIR has none; the neurons stand in front of it and the pool passes a spike when one of its "
    "window spikes"
)
READOUT_LOSS = "the last step, {}, which runs on the mean over time: apply it to the mean of the output"
PADS = "pads with other values than zeros, which no NIR node does"
_BORDERS = (FoldEvents, RepeatOverTime, EnterTail, RepeatInTail, LeaveTail, LeaveTime)
_ADDS = (operator.add, torch.add, "add", operator.sub, torch.sub, "sub")
_SUBTRACTS = (operator.sub, torch.sub, "sub")
_NEGATES = (operator.neg, torch.neg, "neg")
_CONCATS = (torch.cat, torch.concat, torch.concatenate)
_MEANS = (torch.mean, "mean", torch.sum, "sum")


@dataclass(frozen=True)
class Moved:
    """A value whose elements were moved: ``labels`` [1, *F] hold 1 + their former position, 0 for a zero."""

    source: Value
    labels: Tensor


@dataclass(frozen=True)
class Maximum:
    """Max-pools, one behind the other, that wait for the neurons behind them: windows with the shapes they give."""

    source: Value
    stages: tuple[tuple[Window, tuple[int, ...]], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the last pool's output for one sample."""
        return self.stages[-1][1]


class Translation:
    """One pass over a network's graph.

    Args:
        nir: the nir package.
        snn: the network, BatchNorm folded.
        sample_shape: of one input sample.
        fit: how the neurons are fitted to NIR's.

    Attributes:
        builder: the nodes and edges.
        problems: a line for each node that NIR has nothing for.
        lost: what was changed to fit, by path.
    """

    def __init__(self, nir: Any, snn: fx.GraphModule, sample_shape: tuple[int, ...], fit: Fit) -> None:
        self.nir, self.snn, self.fit = nir, snn, fit
        self.builder = Builder(nir)
        self.problems: list[str] = []
        self.lost: dict[str, tuple[str, ...]] = {}
        with call(time_axis(snn), Readout.MEAN, 1):
            self._values = node_values(snn, input_shapes_of(snn, sample_shape, 1))
        self.builder.add("input", nir.Input(np.array(sample_shape)), [], sample_shape)
        self._input = output_of("input", sample_shape)
        self._env: dict[fx.Node, Any] = {}

    def run(self) -> None:
        """Translate every node; a stand-in for one that cannot be translated lets the rest be looked at."""
        for node in self.snn.graph.nodes:
            try:
                self._env[node] = self._translated(node)
            except NoNodeError as error:
                self.problems.append(f"{label(node)}: {describe(node)} {error}")
                self._env[node] = pytree.tree_map(self._stand_in, self._values[node])

    def _stand_in(self, value: Any) -> Any:
        """Return a value of the shape that a node would have had, for a file that will not be written."""
        if not isinstance(value, Tensor):
            return value
        name, shape = f"stand-in {len(self.builder.shapes)}", tuple(int(size) for size in value.shape[1:]) or (1,)
        self.builder.shapes[name] = shape
        return output_of(name, shape)

    def _translated(self, node: fx.Node) -> Any:
        kind = kind_of(node)
        module = module_of(node)
        if kind is Kind.INPUT:
            return self._input if node.users else None
        if kind is Kind.OUTPUT:
            return self._output(node)
        if kind is Kind.PARAMETER:
            return operator.attrgetter(str(node.target))(self.snn)
        if isinstance(module, SpikingSite):
            return self._site(node, module)
        if type(module) in _BORDERS:
            return self._env[node.all_input_nodes[0]]
        if not any(self._is_signal(self._env[source]) for source in node.all_input_nodes) or kind is Kind.SIZE:
            return self._called(node, self._labels_of)
        handlers: Mapping[Kind, Callable[[fx.Node], Any]] = {
            Kind.SYNAPSE: self._layer,
            Kind.AFFINE: self._affine,
            Kind.SHAPE: self._moved,
            Kind.MAXPOOL: self._maximum,
            Kind.READOUT: self._readout,
        }
        if kind not in handlers:
            gate = isinstance(module, Accumulate | Increments)
            raise NoNodeError("has no NIR node" + ("; convert with --maxpool before, in Python BeforeNeuron()" * gate))
        return handlers[kind](node)

    def _is_signal(self, value: Any) -> bool:
        return any(isinstance(leaf, (Value, Moved, Maximum)) for leaf in pytree.tree_leaves(value))

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(int(size) for size in self._values[node].shape[1:])

    def _value(self, node: Any) -> Value:
        """Return what a node carries as a value, its moves made into channel maps."""
        found = self._env[node] if isinstance(node, fx.Node) else node
        if isinstance(found, Maximum):
            raise NoNodeError("reads a max-pool that no neurons follow; NIR has no max-pool")
        return self._resolved(found, label(node)) if isinstance(found, Moved) else found

    def _resolved(self, moved: Moved, path: str) -> Value:
        labels, value = moved.labels[0].numpy().astype(np.int64), moved.source
        if labels.ndim == 1:
            return selected(self.builder.flattened(value, path), labels - 1)
        if labels.shape == value.shape and np.array_equal(labels, _labels(value.shape)):
            return value
        found = channel_map(labels, value.shape)
        if found is None:
            raise NoNodeError(f"reads {list(value.shape)} reordered to {list(labels.shape)}, which no NIR node does")
        index, stride = found
        if any(step > 1 for step in stride):
            ones, zeros = (1,) * len(stride), (0,) * len(stride)
            shape = (value.channels, *labels.shape[1:])
            value = self.builder.pooled(value, Window(ones, stride, zeros, unread(value, labels, stride)), path, shape)
        return selected(value, index)

    def _labels_of(self, found: Any) -> Any:
        """Stand labels in for signals, so that sizes and moves can be computed."""
        if isinstance(found, Moved):
            return found.labels
        if isinstance(found, Maximum):
            return torch.zeros(1, *found.shape)
        return torch.from_numpy(_labels(found.shape)[None]).double() if isinstance(found, Value) else found

    def _called(self, node: fx.Node, replaced: Callable[[Any], Any]) -> Any:
        """Run a node on the values of its inputs."""

        def given(source: fx.Node) -> Any:
            return pytree.tree_map(replaced, self._env[source], is_leaf=lambda leaf: isinstance(leaf, Moved | Maximum))

        args = fx.map_arg(node.args, given)
        kwargs = fx.map_arg(node.kwargs, given)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        module = module_of(node)
        target: Any = node.target if module is None else module
        return target(*args, **kwargs)

    def _moved(self, node: fx.Node) -> Any:
        """Follow a node that moves elements: by labels, or as a concat over channels."""
        if node.target in _CONCATS:
            tensors, axis = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
            if axis % len(self._values[node].shape) != 1:
                raise NoNodeError(f"joins along axis {axis}; expected channels, axis 1")
            return joined([self._value(tensor) for tensor in tensors])
        if node.target in CASTS:
            return self._env[node.all_input_nodes[0]]
        if node.target is F.interpolate or isinstance(module_of(node), UPSAMPLE_MODULES):
            raise NoNodeError("has no NIR node")
        if node.target is F.pad and argument(node, 2, "mode", "constant") != "constant":
            raise NoNodeError(PADS)
        sources = [self._env[source] for source in node.all_input_nodes if self._is_signal(self._env[source])]
        signals = [leaf for source in sources for leaf in pytree.tree_leaves(source) if self._is_signal(leaf)]
        if any(isinstance(signal, Maximum) for signal in signals):
            raise NoNodeError("reads a max-pool that no neurons follow; NIR has no max-pool")
        origin, *others = {signal.source if isinstance(signal, Moved) else signal for signal in signals}
        if others:
            raise NoNodeError("joins several signals in a way that no NIR node does")
        result = self._called(node, self._labels_of)
        return pytree.tree_map(lambda leaf: Moved(origin, leaf) if isinstance(leaf, Tensor) else leaf, result)

    def _site(self, node: fx.Node, site: SpikingSite) -> Value:
        path = str(node.target)
        found = self._env[node.all_input_nodes[0]]
        value = found.source if isinstance(found, Maximum) else self._value(node.all_input_nodes[0])
        neuron = neuron_for(self.nir, site, value.shape, self.fit)
        sources = self.builder.settled(scaled(value, neuron.sign), path)
        spikes = output_of(self.builder.add(path, neuron.node, sources, value.shape), value.shape)
        lost = neuron.lost
        if isinstance(found, Maximum):
            lost = (*lost, MAXPOOL_LOSS)
            spikes = self._any_of(spikes, found, f"{path}.pool")
        if lost:
            self.lost[path] = lost
        return scaled(spikes, neuron.theta)

    def _any_of(self, spikes: Value, pool: Maximum, path: str) -> Value:
        """Return a spike where one of the window spikes: its sum is above 1/2."""
        total = spikes
        for window, shape in pool.stages:
            sums = Window(window.kernel, window.stride, window.before, window.after)
            total = self.builder.pooled(total, sums, path, shape)
        threshold = self.nir.Threshold(threshold=float32(np.full(pool.shape, 0.5)))
        sources = self.builder.settled(total, path)
        return output_of(self.builder.add(f"{path}.any", threshold, sources, pool.shape), pool.shape)

    def _maximum(self, node: fx.Node) -> Maximum:
        if not all(isinstance(module_of(user), SpikingSite) or _is_pool(user) for user in _readers(node)):
            raise NoNodeError("is a max-pool that no neurons follow; NIR has no max-pool")
        found, shape = self._env[node.all_input_nodes[0]], self._shape(node)
        before = found if isinstance(found, Maximum) else Maximum(self._value(node.all_input_nodes[0]), ())
        size = before.shape if before.stages else before.source.shape
        return Maximum(before.source, (*before.stages, (maximum_window(node, size, shape), shape)))

    def _readout(self, node: fx.Node) -> Value:
        if not all(kind_of(user) in (Kind.READOUT, Kind.OUTPUT) for user in _readers(node)):
            raise NoNodeError("has no NIR node")
        self.lost[label(node)] = (READOUT_LOSS.format(describe(node)),)
        return self._value(node.all_input_nodes[0])

    def _output(self, node: fx.Node) -> None:
        if node.op != "output":
            return  # a dict or a named tuple; what it holds is looked at where it is returned
        returned = _held(node)
        if len(returned) != 1:
            raise NoNodeError("is several tensors; expected one")
        value = self._value(returned[0])
        names = self.builder.settled(value, "output")
        self.builder.add("output", self.nir.Output(np.array(value.shape)), names, value.shape)

    def _layer(self, node: fx.Node) -> Value:
        """Translate a convolution or linear layer, module or function."""
        if node.target in CONTRACTIONS:
            raise NoNodeError("has no NIR node; NIR's Affine takes a linear layer")
        module: Any = module_of(node)
        linear = isinstance(module, nn.Linear) or node.target is F.linear
        if module is None:
            weight, bias = (self._parameter(argument(node, i, name)) for i, name in ((1, "weight"), (2, "bias")))
        else:
            weight, bias = module.weight, module.bias
        value, shape = self._value(node.all_input_nodes[0]), self._shape(node)
        matrix = weight.detach().double().numpy()
        constants = None if bias is None else bias.detach().double().numpy()
        if linear:
            if len(value.shape) != 1:
                raise NoNodeError(f"works on the last axis of {list(value.shape)}; NIR's Affine takes vectors")
            return self.builder.linear(value, matrix, constants, label(node))
        constants = np.zeros(len(matrix)) if constants is None else constants
        return self.builder.convolved(value, matrix, constants, conv_options(node, module), label(node), shape)

    def _parameter(self, given: Any) -> Any:
        found = self._env[given] if isinstance(given, fx.Node) else given
        if found is not None and not isinstance(found, Tensor):
            raise NoNodeError("takes its weight from a signal")
        return found

    def _affine(self, node: fx.Node) -> Value:
        module: Any = module_of(node)
        if type(module) in BATCHNORM_MODULES:
            scale, shift = normalisation(module)
            value = self._value(node.all_input_nodes[0])
            return shifted(scaled(value, scale), shift)
        if node.target in _ADDS:
            return self._sum(node)
        if node.target is F.pad:
            raise NoNodeError(PADS)
        if node.target in _NEGATES:
            return scaled(self._value(node.args[0]), -1.0)
        if node.target in PRODUCTS:
            return self._product(node)
        if node.target in _MEANS:
            return self._mean(node)
        source = node.all_input_nodes[0]
        value, shape = self._value(source), self._shape(node)
        try:
            window = average_window(node, value.shape, shape)
        except NoNodeError:
            if "daptive" not in describe(node) or len(shape) not in (2, 3):
                raise
            return self.builder.mixed_positions(value, adaptive_matrix(value.shape, shape), label(node), shape)
        return self.builder.pooled(value, window, label(node), shape)

    def _sum(self, node: fx.Node) -> Value:
        left, right = argument(node, 0, "input"), argument(node, 1, "other")
        alpha: Any = node.kwargs.get("alpha", 1.0)
        factor: float = alpha * (-1.0 if node.target in _SUBTRACTS else 1.0)
        left_signal, right_signal = (self._signal(side) for side in (left, right))
        if left_signal and right_signal:
            return added(self._value(left), scaled(self._value(right), factor))
        if left_signal:
            value = self._value(left)
            return shifted(value, self._constant(right, value.shape) * factor)
        value = scaled(self._value(right), factor)
        return shifted(value, self._constant(left, value.shape))

    def _product(self, node: fx.Node) -> Value:
        left, right = argument(node, 0, "input"), argument(node, 1, "other")
        if self._signal(left) and self._signal(right):
            raise NoNodeError("is not linear in one signal; NIR multiplies by constants only")
        signal, other = (left, right) if self._signal(left) else (right, left)
        value = self._value(signal)
        factor = self._constant(other, value.shape)
        return scaled(value, 1 / factor if node.target in QUOTIENTS else factor)

    def _signal(self, side: Any) -> bool:
        return isinstance(side, fx.Node) and self._is_signal(self._env[side])

    def _constant(self, given: Any, shape: tuple[int, ...]) -> Array:
        """Return a number or parameter as one constant for each channel, shape [C]."""
        found = self._env[given] if isinstance(given, fx.Node) else given
        array = np.asarray(found.detach().double().numpy() if isinstance(found, Tensor) else float(found))
        full = np.broadcast_to(array, (1, *shape))[0].reshape(shape[0], -1)
        if (full != full[:, :1]).any():
            raise NoNodeError("uses a constant that differs between positions; expected one for each channel")
        return full[:, 0]

    def _mean(self, node: fx.Node) -> Any:
        """Translate a mean or sum over all positions."""
        value = self._value(node.args[0])
        axes = argument(node, 1, "dim")
        given = (axes,) if isinstance(axes, int) else tuple(axes or ())
        ranks = len(value.shape) + 1
        if {axis % ranks for axis in given} != set(range(2, ranks)) or ranks < 3:
            raise NoNodeError(f"reduces the axes {list(given)}; expected all axes behind the channels")
        ones = (value.channels, *[1] * (ranks - 2))
        result = self.builder.pooled(value, dividing_window(value.shape, ones), label(node), ones)
        if node.target in (torch.sum, "sum"):
            result = scaled(result, float(np.prod(value.shape[1:])))
        kept = argument(node, 2, "keepdim", False)
        return result if kept else Moved(result, torch.arange(1.0, value.channels + 1).double()[None])


def _labels(shape: tuple[int, ...]) -> Array:
    return np.arange(1, int(np.prod(shape)) + 1).reshape(shape)


def _is_pool(node: fx.Node) -> bool:
    return kind_of(node) is Kind.MAXPOOL


def _held(output: fx.Node) -> list[fx.Node]:
    """Return the nodes in what a network returns, out of the dicts and tuples that hold them."""
    sources = output.all_input_nodes
    return [held for n in sources for held in (_held(n) if kind_of(n) is Kind.OUTPUT else [n])]


def _readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a node's values, seen through the borders of time."""
    readers: list[fx.Node] = []
    for user in node.users:
        readers += _readers(user) if type(module_of(user)) in _BORDERS else [user]
    return readers
