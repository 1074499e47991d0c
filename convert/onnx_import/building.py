"""The builder: walks a checked ONNX graph once and writes the torch.fx graph, tried on fake tensors as it grows."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import SourceError, reason_of
from ...structures import INPUT_SIZE
from .fold import fold
from .naming import Paths, identifier, path_of_constant, path_of_node, path_of_weight
from .refusal import Missing, refuse
from .registry import Registry
from .trials import input_trials, size_of_sample, tensor_type
from .values import DTYPES, FIXED_BATCH_ADVICE, Call, Constant, Op, Signal, Sizes, UnsupportedFormError, Value, whole

CLASS_NAME = "OnnxNetwork"


def build(
    model: ModelProto, registry: Registry, where: str, *, fixed_batch: bool = False
) -> tuple[fx.GraphModule, Paths]:
    """Return the network of a checked model, and the module paths that it uses.

    Args:
        model: as :func:`~lmh.convert.onnx_import.reading.read_model` returns it.
        registry: which function imports which operator.
        where: what to call the model in messages.
        fixed_batch: build it for the file's batch size alone.

    Raises:
        SourceError: with every node that cannot be imported.
    """
    try:
        builder = _Builder(model, registry, fixed_batch=fixed_batch)
        builder.inputs()
    except UnsupportedFormError as error:
        raise SourceError(f"{where}: {error}.") from error
    with _quiet_trials():
        for node in _live(model):
            builder.node(node)
    if not builder.missing and not builder.problems:
        builder.problems += builder.frozen_outputs()
    if builder.missing or builder.problems:
        raise refuse(where, builder.missing, builder.problems)
    return builder.network(), builder.paths


@contextmanager
def _quiet_trials() -> Iterator[None]:
    """Keep torch from logging trials that do not fit, which are reported with the node they belong to."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def _live(model: ModelProto) -> Iterator[NodeProto]:
    """Yield the nodes that the outputs depend on, in order."""
    wanted = {output.name for output in model.graph.output}
    kept: set[int] = set()
    for position in reversed(range(len(model.graph.node))):
        node = model.graph.node[position]
        if wanted & set(node.output):
            kept.add(position)
            wanted.update(name for name in node.input if name)
    yield from (node for position, node in enumerate(model.graph.node) if position in kept)


class _Builder:
    def __init__(self, model: ModelProto, registry: Registry, *, fixed_batch: bool) -> None:
        self.model, self.registry, self.fixed_batch = model, registry, fixed_batch
        self.opsets = {entry.domain: entry.version for entry in model.opset_import}
        self.root, self.graph = nn.Module(), fx.Graph()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.sources: tuple[Signal, ...] = ()
        self.problems: list[str] = []
        self.missing: list[Missing] = []
        self._broken: set[str] = set()
        self._frozen: str | None = None
        self._attributes: dict[Constant, tuple[fx.Node, Tensor]] = {}
        self._values: dict[str, Value] = {tensor.name: _held(tensor) for tensor in model.graph.initializer}
        weights = (path_of_weight(tensor.name) for tensor in model.graph.initializer)
        self.paths = Paths((*(path_of_node(node) for node in _live(model)), *(path for path in weights if path)))
        self._readers: dict[str, int] = defaultdict(int)
        for name in (
            *(n for node in _live(model) for n in node.input),
            *(output.name for output in model.graph.output),
        ):
            self._readers[name] += 1

    def inputs(self) -> None:
        """Make a placeholder for every input that is not an initializer."""
        given = [info for info in self.model.graph.input if info.name not in self._values]
        shapes = input_trials(given, fixed_batch=self.fixed_batch)
        alike = all(shape == trials[0] for trials in shapes.values() for shape in trials)
        names: set[str] = set()
        for info in given:
            name = identifier(info.name)
            while name in names:
                name += "_"
            names.add(name)
            dtype = DTYPES[tensor_type(info).elem_type]
            with self.mode:
                trials = tuple(torch.empty(shape, dtype=dtype) for shape in shapes[info.name][: 1 if alike else None])
            placeholder = self.graph.placeholder(name)
            placeholder.meta[INPUT_SIZE] = size_of_sample(info)
            signal = Signal(placeholder, trials)
            self._values[info.name] = signal
            self.sources = (*self.sources, signal)

    def node(self, node: NodeProto) -> None:
        """Import one ONNX node; what goes wrong is noted, and the nodes behind it are only looked up."""
        try:
            outputs = None
            if self._broken.isdisjoint(node.input):
                inputs = [self._values[name] if name else None for name in node.input]
                outputs = fold(node, inputs, self.opsets)
            if outputs is None:
                outputs = self._imported(node)
        except UnsupportedFormError as error:
            self.problems.append(f"{_label(node)}: {error}.")
            outputs = None
        except Exception as error:  # what a file that contradicts itself makes NumPy, onnx and torch raise
            self.problems.append(f"{_label(node)}: its attributes and inputs do not fit together ({reason_of(error)}).")
            outputs = None
        if outputs is None:
            self._broken.update(node.output)
        else:
            self._values.update(outputs)

    def _imported(self, node: NodeProto) -> dict[str, Value] | None:
        entry = self.registry.find(node.domain, node.op_type, self.opsets.get(node.domain, 1))
        if entry is None:
            self.missing.append(Missing(node.domain, node.op_type, node.name or node.output[0]))
            return None
        if not self._broken.isdisjoint(node.input):
            return None
        key, importer = entry
        op = Op(
            node.op_type,
            key.since_version,
            {attribute.name: _attribute(helper.get_attribute_value(attribute)) for attribute in node.attribute},
            tuple(self._values[name] if name else None for name in node.input),
            tuple(bool(name) and self._readers[name] > 0 for name in node.output),
            self.sources,
        )
        result = importer(op)
        results = list(result) if isinstance(result, Sequence) else [result]
        writer = _Writer(self, op, self.paths.inside(path_of_node(node), node.op_type.lower()))
        outputs: dict[str, Value] = {}
        for position, name in enumerate(node.output):
            if not op.used[position]:
                continue
            if position >= len(results) or (found := results[position]) is None:
                raise UnsupportedFormError(f"its output {position} is read; expected output 0 only")
            outputs[name] = writer.value(found)
        if self._frozen is None and _changes(op.inputs) and not _changes(outputs.values()):
            self._frozen = _label(node)
        return outputs

    def attribute(self, constant: Constant) -> tuple[fx.Node, Tensor]:
        """Return a constant and the node that reads it: a parameter if it was an initializer, else a buffer."""
        if constant not in self._attributes or (constant.trainable and not constant.shared):
            path = self.paths.claim(path_of_constant(constant.name))
            owner, _, name = path.rpartition(".")
            holder = self.folder(owner)
            if constant.trainable:
                holder.register_parameter(name, constant.parameter())
            else:
                holder.register_buffer(name, constant.tensor())
            self._attributes[constant] = self.graph.get_attr(path), getattr(holder, name)
        return self._attributes[constant]

    def folder(self, path: str) -> nn.Module:
        """Return the module that holds others at this path, made where it is missing."""
        current = self.root
        for part in path.split(".") if path else []:
            if not hasattr(current, part):
                current.add_module(part, nn.Module())
            current = getattr(current, part)
        return current

    def frozen_outputs(self) -> list[str]:
        """Say which outputs always have the file's batch size, because a node picks by places that it knew."""
        batch = self.sources[0].dims[:1] if self.sources else ()
        if not batch or isinstance(batch[0], int):
            return []
        values = {output.name: self._values[output.name] for output in self.model.graph.output}
        return [
            f"output {name}: has {value.dims[0]} rows whatever the batch size is, fixed at {self._frozen}; "
            f"{FIXED_BATCH_ADVICE}."
            for name, value in values.items()
            if isinstance(value, Signal) and value.dims[:1] == (batch[0][0],)
        ]

    def network(self) -> fx.GraphModule:
        """Return the finished network: one output as a tensor, several as a tuple."""
        empty = Op("output", 0, {}, (), (), self.sources)
        writer = _Writer(self, empty, "output")
        found = [writer.argument(self._values[output.name])[0] for output in self.model.graph.output]
        self.graph.output(found[0] if len(found) == 1 else tuple(found))
        _drop_unread(self.graph)
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph, CLASS_NAME).eval()


def _changes(values: Iterable[Value | None]) -> bool:
    """Whether an axis of any signal changes between trials."""
    signals = [value for value in values if isinstance(value, Signal)]
    return any(isinstance(size, tuple) for signal in signals for size in signal.dims)


def _drop_unread(graph: fx.Graph) -> None:
    """Drop constants that nothing reads any more, keeping unused inputs."""
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


class _Writer:
    """Writes what one ONNX node becomes, running every call on the trials."""

    def __init__(self, builder: _Builder, op: Op, path: str) -> None:
        self.builder, self.op, self.path = builder, op, path
        self._written: dict[Call, tuple[fx.Node, tuple[Any, ...]]] = {}
        self._count = max((len(source.trials) for source in builder.sources), default=1)

    def value(self, result: Call | Value) -> Value:
        """Return what an operator's function returned, with its calls written."""
        if not isinstance(result, Call):
            return result
        node, trials = self._call(result)
        if len({trial.ndim for trial in trials}) > 1:
            raise self._misfit(1, "its rank changes with the batch")
        return Signal(node, trials)

    def argument(self, given: Any) -> tuple[Any, tuple[Any, ...]]:
        """Return an argument as the graph takes it, and what it is in each trial."""
        if isinstance(given, Call):
            return self._call(given)
        if isinstance(given, Signal):
            return given.node, given.trials
        if isinstance(given, Constant):
            node, tensor = self.builder.attribute(given)
            return node, (tensor,) * self._count
        if isinstance(given, Sizes):
            return self._call(_as_tensor(given, self.op))
        if isinstance(given, slice):
            parts = [self.argument(part) for part in (given.start, given.stop, given.step)]
            return slice(*(part for part, _ in parts)), tuple(slice(*run) for run in _runs(parts))
        if isinstance(given, tuple | list):
            parts = [self.argument(part) for part in given]
            kind = type(given)
            return kind(part for part, _ in parts), tuple(kind(run) for run in _runs(parts, self._count))
        return given, (given,) * self._count

    def _call(self, call: Call) -> tuple[fx.Node, tuple[Any, ...]]:
        if call not in self._written:
            self._written[call] = self._write(call)
        return self._written[call]

    def _write(self, call: Call) -> tuple[fx.Node, tuple[Any, ...]]:
        args, arg_trials = self.argument(call.args)
        kwargs = {name: self.argument(given) for name, given in call.kwargs.items()}
        trials = tuple(
            self._tried(call, arg_trials[trial], {name: found[1][trial] for name, found in kwargs.items()}, trial)
            for trial in range(self._count)
        )
        options = {name: found[0] for name, found in kwargs.items()}
        graph = self.builder.graph
        if isinstance(call.target, nn.Module):
            node = graph.call_module(self._placed(call, call.target), args, options)
        elif isinstance(call.target, str):
            node = graph.call_method(call.target, args, options)
        else:
            node = graph.call_function(call.target, args, options)
        node.meta["path"] = self.path
        return node, trials

    def _placed(self, call: Call, module: nn.Module) -> str:
        weight = call.named_by
        shown = None if weight is None else path_of_weight(weight.name)
        if shown is None or (weight is not None and not weight.shared and self.builder.paths.is_taken(shown)):
            shown = self.path
        path = self.builder.paths.claim(shown)
        owner, _, name = path.rpartition(".")
        self.builder.folder(owner).add_module(name, module)
        return path

    def _tried(self, call: Call, args: Any, kwargs: dict[str, Any], trial: int) -> Any:
        try:
            with self.builder.mode, torch.no_grad():
                if isinstance(call.target, str):
                    return getattr(args[0], call.target)(*args[1:], **kwargs)
                target = call.target.eval() if isinstance(call.target, nn.Module) else call.target
                return target(*args, **kwargs)
        except Exception as error:  # torch raises whatever it likes on shapes and types that do not fit
            raise self._misfit(trial, reason_of(error)) from error

    def _misfit(self, trial: int, reason: str) -> UnsupportedFormError:
        if trial == 0:
            shapes = [list(given.trials[0].shape) for given in self.op.inputs if isinstance(given, Signal)]
            return UnsupportedFormError(f"torch cannot run it on {shapes} ({reason}); expected inputs that fit")
        return UnsupportedFormError(f"it fits one batch size only, that of the file ({reason}); {FIXED_BATCH_ADVICE}")


def _runs(parts: Sequence[tuple[Any, tuple[Any, ...]]], count: int = 1) -> list[tuple[Any, ...]]:
    """Return the parts in each trial."""
    return list(zip(*(trials for _, trials in parts), strict=True)) if parts else [()] * count


def _as_tensor(sizes: Sizes, op: Op) -> Call:
    """Return a call that puts computed sizes into a tensor, on the device of the network's input."""
    items = np.empty(sizes.arrays[0].size, dtype=object)
    for position, dim in enumerate(sizes.entries()):
        items[position] = whole(dim, op)
    dtype = torch.from_numpy(np.empty(0, dtype=sizes.arrays[0].dtype)).dtype
    return Call("new_tensor", (op.sources[0], items.reshape(sizes.arrays[0].shape).tolist()), {"dtype": dtype})


def _held(tensor: TensorProto) -> Constant:
    """Return the constant that an initializer is."""
    try:
        return Constant(numpy_helper.to_array(tensor), tensor.name, _is_float(tensor.data_type))
    except KeyError as error:
        raise UnsupportedFormError(
            f"initializer {tensor.name} is of the type number {tensor.data_type}, which ONNX does not have; expected a "
            "tensor of numbers. Export the model again"
        ) from error
    except ValueError as error:
        raise UnsupportedFormError(
            f"initializer {tensor.name} has the shape {list(tensor.dims)} and other data ({error}); expected data of "
            "its shape. Export the model again"
        ) from error


def _label(node: NodeProto) -> str:
    return f"{node.name or next(iter(node.output), '')} ({node.op_type})"


def _attribute(found: Any) -> Any:
    if isinstance(found, bytes):
        return found.decode("utf-8", "replace")
    if isinstance(found, Sequence) and not isinstance(found, str):
        return [_attribute(item) for item in found]
    return found


def _is_float(data_type: int) -> bool:
    dtype = DTYPES.get(data_type)
    return dtype is not None and dtype.is_floating_point
