"""Lockstep: an ANN and its spiking network side by side over all batches, one node at a time.

Corrections walk a network from input to output. What a node reads is then already what the corrected network
gives, and one pass over the data serves all layers. What the live nodes give for all samples and steps is held in
memory, and in files where that is more than 2 GiB (calibrate/shelf.py); temporaries are those of one batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ..arguments import check_batches, split_batch
from ..errors import ArgumentError, CalibrationError
from ..records import Prepared
from ..spiking import sites
from ..structures import input_count
from ..time_axis import takes_events, time_axis
from .blocks import of_the_input
from .shelf import Shelf

BATCH = 128


class Lockstep:
    """The two networks, and what their live nodes gave for each batch.

    Args:
        prepared: the ANN.
        snn: the spiking network made from it, in eval mode; its parameters may change on the way.
        batches: the inputs of each batch, from :func:`input_batches`.

    Raises:
        ArgumentError: if the spiking network was made from another ANN.
    """

    def __init__(self, prepared: Prepared, snn: fx.GraphModule, batches: list[tuple[Tensor, ...]]) -> None:
        self.snn = snn
        self.timesteps = time_axis(snn).timesteps
        self._signals = of_the_input(snn.graph)
        self._twins = {node.name: node for node in prepared.model.graph.nodes}
        found = sites(snn)
        missing = [path for path in prepared.spiking if path not in found]
        if missing or not prepared.spiking:
            raise ArgumentError(
                f"the spiking network has no neurons at {', '.join(missing) or 'all'}; expected the network that was "
                "made from this ANN. Pass conversion.snn with conversion.prepared."
            )
        events = takes_events(snn)
        self.sizes = [batch[0].shape[1 if events else 0] for batch in batches]
        frames = [tuple(x.flatten(0, 1) for x in batch) if events else batch for batch in batches]
        self._shelf = Shelf()
        self._anns = [_started(prepared.model, batch) for batch in frames]
        self._snns = [_started(snn, batch) for batch in batches]

    def twin(self, node: fx.Node) -> fx.Node | None:
        """Return the ANN's node that a node of the spiking network stands for; None for modules of time."""
        return self._twins.get(node.name)

    def nodes(self) -> Iterator[fx.Node]:
        """Walk the spiking network. A node runs after it was given, so that its parameters can be set before."""
        ahead = iter(self._twins.values())
        done: set[fx.Node] = set()
        for node in self.snn.graph.nodes:
            twin = self.twin(node)
            while twin is not None and twin not in done:
                done.add(current := next(ahead))
                for interpreter in self._anns:
                    self._run(interpreter, current)
            yield node
            for interpreter in self._snns:
                self._run(interpreter, node)
                _forget(interpreter, node)
            for interpreter in self._anns:
                _forget(interpreter, twin)

    def _run(self, interpreter: fx.Interpreter, node: fx.Node) -> None:
        value = interpreter.run_node(node)
        interpreter.env[node] = value if node.op in ("placeholder", "get_attr") else self._shelf.keep(value)

    def per_step(self, node: fx.Node) -> list[Tensor]:
        """Return what a node of the spiking network gives at every step, [T, N, *F] for each batch.

        What does not depend on time comes T times, without a copy.
        """
        values = _values(self._snns, node)
        if node not in self._signals:
            return [value.expand(self.timesteps, *value.shape) for value in values]
        return [self._unfolded(value, size) for value, size in zip(values, self.sizes, strict=True)]

    def received(self, node: fx.Node) -> list[Tensor]:
        """Return the mean over time of what a node of the spiking network gives, [N, *F] for each batch.

        What does not depend on the input, such as a parameter, comes as it is.
        """
        values = _values(self._snns, node)
        if node not in self._signals:
            return values
        return [_mean(value, size) for value, size in zip(values, self.sizes, strict=True)]

    def expected(self, node: fx.Node) -> list[Tensor]:
        """Return what the ANN's node gives, [N, *F] for each batch; the mean over the frames of events."""
        values = _values(self._anns, self._twins[node.name])
        return [_mean(value, size) for value, size in zip(values, self.sizes, strict=True)]

    def _unfolded(self, value: Tensor, size: int) -> Tensor:
        if value.shape[0] == size:
            return value.expand(self.timesteps, *value.shape)
        return value.unflatten(0, (self.timesteps, size))


def _mean(value: Tensor, size: int) -> Tensor:
    return value if len(value) == size else value.unflatten(0, (-1, size)).mean(0)


def _started(model: fx.GraphModule, inputs: tuple[Tensor, ...]) -> fx.Interpreter:
    interpreter = fx.Interpreter(model)
    interpreter.extra_traceback = False
    interpreter.args_iter = iter(inputs)
    return interpreter


def _forget(interpreter: fx.Interpreter, node: fx.Node | None) -> None:
    """Free what nothing later reads."""
    for source in interpreter.user_to_last_uses.get(node, []) if node is not None else []:
        interpreter.env.pop(source, None)


def _values(interpreters: list[fx.Interpreter], node: fx.Node) -> list[Any]:
    """Return what a node gives for each batch, [N, *F] or folded [T·N, *F].

    A node that has not run yet, such as a shortcut that a later sum reads, is computed and not kept.
    """
    return [_value(interpreter, node, {}) for interpreter in interpreters]


def _value(interpreter: fx.Interpreter, node: fx.Node, found: dict[fx.Node, Any]) -> Any:
    if node in interpreter.env:
        return interpreter.env[node]
    if node not in found:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: _value(interpreter, source, found))
        found[node] = getattr(interpreter, node.op)(node.target, args, kwargs)
    return found[node]


def input_batches(snn: fx.GraphModule, data: Iterable[Any] | Tensor, where: str = "data") -> list[tuple[Tensor, ...]]:
    """Return calibration data as batches of the network's inputs on its device.

    Args:
        snn: the spiking network that takes them.
        data: batches [N, *F] (or tuples that begin with one for each input), or one tensor; [T, N, *F] for a network
            of event frames.
        where: the call, for messages.

    Raises:
        ArgumentError: for data of another form.
        CalibrationError: if there is no batch, or a value that is not finite.
    """
    if not isinstance(data, Tensor):
        check_batches(where, data)
    events, count, parameter = takes_events(snn), input_count(snn), next(snn.parameters())
    batches = []
    for batch in data.split(BATCH, 1 if events else 0) if isinstance(data, Tensor) else data:
        inputs, _ = split_batch(where, batch, count)
        if not all(torch.isfinite(x).all() for x in inputs):
            raise CalibrationError("input: the data has NaN or infinite values; expected finite ones. Check the data.")
        batches.append(tuple(x.to(parameter) for x in inputs))
    if not batches:
        raise CalibrationError("the calibration data gave no batch; expected at least one sample. Check the data set.")
    return batches
