"""SPIKE: sites in, time folded. The one place where a prepared ANN becomes a spiking network."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ..errors import AuditError
from ..op_table import Kind
from ..ops import follows_readout, kind_of, label
from ..readout import Average, MeanReadout
from ..records import Calibration, Prepared, Spike
from ..shapes import BATCHES, batch_use, node_values
from ..spiking import LMH, PerChannel, PerLayer, SpikingSite
from ..structures import batched
from ..time_axis import (
    EnterTail,
    FoldEvents,
    LeaveConstant,
    LeaveTail,
    LeaveTime,
    RepeatInTail,
    RepeatOverTime,
    TimeAxis,
    Timed,
)
from .maxpool import gate_pools
from .normalisation import Normalisation, PlainBatchNorm, place_norms
from .paths import TIME, unique_path
from .regions import Region, misfolded


@dataclass(frozen=True)
class DirectCoding:
    """Every input is one static tensor [N, *F] and a constant current (direct coding)."""


@dataclass(frozen=True)
class EventFrames:
    """Every input is a sequence of frames [T, N, *F]."""


Encoding = DirectCoding | EventFrames


_COMMUTES_WITH_MEAN = (Kind.SYNAPSE, Kind.AFFINE, Kind.SHAPE, Kind.SIZE)


def spike(
    prepared: Prepared,
    calibration: Calibration,
    neuron: LMH,
    encoding: Encoding,
    timesteps: int,
    normalisation: Normalisation | None = None,
    readout: Average | None = None,
) -> fx.GraphModule:
    """Replace the activations of a prepared ANN by LM-H neurons and fold time into the batch.

    Args:
        prepared: the network; not changed.
        calibration: θ₀ and v_init of every spiking activation.
        neuron: which neurons.
        encoding: what the input is.
        timesteps: T.
        normalisation: what becomes of BatchNorm layers; ``PlainBatchNorm()`` unless given.
        readout: how steps become one answer; ``MeanReadout()`` unless given.

    Returns:
        The spiking network in eval mode.

    Raises:
        AuditError: if a node would mix time or batch with features.
    """
    model = copy.deepcopy(prepared.model)
    time = TimeAxis(timesteps, average=MeanReadout() if readout is None else readout)
    regions = _regions(model.graph, prepared, encoding)
    pairs = _value_pairs(prepared)
    uses = {name: batch_use(pair) for name, pair in pairs.items()}
    exactly_n = {name for name, pair in pairs.items() if isinstance(pair[0], int) and pair == BATCHES}
    problems = [*_own_sizes(model.graph, regions, uses, exactly_n), *_returned_sizes(model.graph, regions, uses)]
    if problems:
        raise AuditError(problems)
    _insert_sites(model, regions, prepared, calibration, neuron, time)
    _Folding(model, time, regions, uses).run()
    timed = [node for node, region in regions.items() if region is Region.TIMED]
    place_norms(model, time, normalisation or PlainBatchNorm(), set(timed), calibration)
    gate_pools(model, time, [node for node in timed if node.name in prepared.gated])
    if isinstance(encoding, EventFrames):
        _fold_inputs(model, time)
    model.graph.eliminate_dead_code()
    model.graph.lint()
    model.recompile()
    model.delete_all_unused_submodules()
    model.eval()
    events = isinstance(encoding, EventFrames)
    problems = misfolded(model, time, {n.name: r for n, r in regions.items()}, prepared.sample_shape, events)
    if problems:
        raise AuditError(problems)
    return model


def _value_pairs(prepared: Prepared) -> dict[str, tuple[Any, Any]]:
    """The values of every node, by name, at the two batch sizes."""
    small, large = (node_values(prepared.model, batched(prepared.sample_shape, batch)) for batch in BATCHES)
    return {node.name: (small[node], large[node]) for node in small}


def _regions(graph: fx.Graph, prepared: Prepared, encoding: Encoding) -> dict[fx.Node, Region]:
    """Sort the nodes of the graph by where in time they run."""
    regions: dict[fx.Node, Region] = {}
    for node in graph.nodes:
        before = {regions[source] for source in node.all_input_nodes}
        spiking = isinstance(prepared.activations.get(str(node.target)), Spike)
        if spiking or Region.TIMED in before:
            regions[node] = Region.TIMED
        elif node.op == "placeholder":
            regions[node] = Region.TIMED if isinstance(encoding, EventFrames) else Region.CONSTANT
        else:
            regions[node] = Region.CONSTANT if Region.CONSTANT in before else Region.FREE
    for node in reversed(graph.nodes):
        kind = kind_of(node)
        if kind in (Kind.INPUT, Kind.OUTPUT) or regions[node] is not Region.TIMED or not node.users:
            continue
        if str(node.target) in prepared.activations:
            continue
        after = {Region.READOUT if kind_of(user) is Kind.OUTPUT else regions[user] for user in node.users}
        if after == {Region.READOUT} and (kind is Kind.READOUT or follows_readout(node)):
            regions[node] = Region.READOUT
        elif after <= {Region.TAIL, Region.READOUT} and kind in _COMMUTES_WITH_MEAN:
            regions[node] = Region.TAIL
    return regions


def _own_sizes(graph: fx.Graph, regions: dict[fx.Node, Region], uses: dict[str, str], exactly_n: set[str]) -> list[str]:
    """Let every timed node read the batch size off the tensor that it reshapes, not off another one."""
    problems = []
    for node in list(graph.nodes):
        if regions[node] in (Region.FREE, Region.CONSTANT) or kind_of(node) not in (Kind.SHAPE, Kind.AFFINE):
            continue
        for size in [arg for arg in node.all_input_nodes if uses[arg.name] == "size"]:
            reshapes = kind_of(node) is Kind.SHAPE
            batched = isinstance(node.args[0], fx.Node) and uses.get(node.args[0].name) == "batched"
            if reshapes and regions[size] is regions[node] and not (batched and size.name in exactly_n):
                continue  # a parameter expanded to the batch, or a whole shape; both are of this node's own time
            if not reshapes or size.name not in exactly_n or not batched:
                problems.append(
                    f"{label(node)}: uses {label(size)}, which carries the batch size, as a value; expected it only as "
                    "the first size of a view or reshape. Write y.view(y.size(0), -1) or y.flatten(1)."
                )
                continue
            with graph.inserting_before(node):
                own = graph.call_method("size", (node.args[0], 0))
            regions[own], uses[own.name] = regions[node], "size"
            node.replace_input_with(size, own)
    return problems


def _returned_sizes(graph: fx.Graph, regions: dict[fx.Node, Region], uses: dict[str, str]) -> list[str]:
    """Say where the network returns a number that carries T besides N."""
    outputs = {node for node in graph.nodes if kind_of(node) is Kind.OUTPUT}
    returned = {source for node in outputs for source in node.all_input_nodes} - outputs
    return [
        f"{label(node)}: returns a size that carries the batch size, read behind an activation where time is folded "
        "into the batch; expected it read off the input. Write x.size(0) with the input x."
        for node in graph.nodes
        if node in returned and uses[node.name] == "size" and regions[node] not in (Region.FREE, Region.CONSTANT)
    ]


def _insert_sites(
    model: fx.GraphModule,
    regions: dict[fx.Node, Region],
    prepared: Prepared,
    calibration: Calibration,
    neuron: LMH,
    time: TimeAxis,
) -> None:
    for node in model.graph.nodes:
        path = str(node.target)
        if not isinstance(prepared.activations.get(path), Spike):
            continue
        site = SpikingSite(
            time,
            calibration.v_threshold[path],
            calibration.v_init[path],
            neuron if prepared.channels[path] is not None else _without_channels(neuron),
            channels=prepared.channels[path],
            static=regions[node.all_input_nodes[0]] is not Region.TIMED,
        )
        device = next((p.device for p in prepared.model.parameters()), calibration.v_threshold[path].device)
        model.set_submodule(path, site.to(device))


def _without_channels(neuron: LMH) -> LMH:
    """One value for the layer, where channels do not lie on axis 1."""
    return replace(neuron, granularity=PerLayer()) if isinstance(neuron.granularity, PerChannel) else neuron


class _Folding:
    """Inserts the modules of :mod:`lmh.time_axis` at the borders between regions, one for each border."""

    def __init__(
        self, model: fx.GraphModule, time: TimeAxis, regions: dict[fx.Node, Region], uses: dict[str, str]
    ) -> None:
        self.model, self.time, self.regions, self.uses = model, time, regions, uses
        self.made: dict[tuple[fx.Node, type[Timed]], fx.Node] = {}

    def run(self) -> None:
        """Walk the graph once and rewire the inputs of every node outside the constant region."""
        for node in list(self.model.graph.nodes):
            if node.op == "placeholder" or self._is_site(node):
                continue
            if kind_of(node) is Kind.OUTPUT:
                for source in node.all_input_nodes:
                    node.replace_input_with(source, self._returned(source))
                continue
            region = self.regions[node]
            if region in (Region.FREE, Region.CONSTANT):
                continue
            for source in list(node.all_input_nodes):
                if self.uses.get(source.name) == "batched":
                    node.replace_input_with(source, self._crossed(source, region))

    def _returned(self, source: fx.Node) -> fx.Node:
        """Return ``source`` as the caller gets it: reduced over time where it is timed."""
        if kind_of(source) is Kind.OUTPUT or self.uses[source.name] != "batched":
            return source
        if self.regions[source] is Region.CONSTANT:
            return self._insert(source, LeaveConstant)
        return self._insert(self._crossed(source, Region.READOUT), LeaveTime)

    def _is_site(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self.model.get_submodule(str(node.target)), SpikingSite)

    def _crossed(self, source: fx.Node, region: Region) -> fx.Node:
        """Return ``source`` as a node of ``region`` needs it."""
        home = self.regions[source]
        if region is Region.TIMED:
            return self._insert(source, RepeatOverTime) if home is Region.CONSTANT else source
        value = source
        if home is Region.TIMED:
            value = self._insert(source, EnterTail)
        elif home is Region.CONSTANT:
            value = self._insert(source, RepeatInTail)
        if region is Region.READOUT and home is not Region.READOUT:
            value = self._insert(value, LeaveTail)
        return value

    def _insert(self, source: fx.Node, kind: type[Timed]) -> fx.Node:
        key = (source, kind)
        if key not in self.made:
            path = unique_path(self.model, f"{TIME}.{kind.__name__}")
            self.model.add_submodule(path, kind(self.time))
            with _inserting_behind(source):
                self.made[key] = self.model.graph.call_module(path, (source,))
        return self.made[key]


def _inserting_behind(source: fx.Node) -> AbstractContextManager[Any]:
    """Insert right behind ``source``, but behind all inputs if it is one."""
    graph = source.graph
    if source.op != "placeholder":
        return graph.inserting_after(source)
    return graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder"))


def _fold_inputs(model: fx.GraphModule, time: TimeAxis) -> None:
    for source in [node for node in model.graph.nodes if node.op == "placeholder" and node.users]:
        path = unique_path(model, f"{TIME}.FoldEvents")
        model.add_submodule(path, FoldEvents(time))
        with _inserting_behind(source):
            folded = model.graph.call_module(path, (source,))
        source.replace_all_uses_with(folded, delete_user_cb=lambda user, folded=folded: user is not folded)
