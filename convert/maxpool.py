"""Max-pools: ways to take a maximum of spikes, each a type with its stated exactness."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from ..gate import Accumulate, Increments
from ..op_table import ADAPTIVE_MAXPOOL_FUNCTIONS, Kind
from ..ops import argument, kind_of, label, module_of
from ..records import Keep, NodeFate, Spike
from ..spiking import SpikingSite
from ..time_axis import FoldEvents, TimeAxis, Timed
from .paths import TIME, unique_path


@dataclass(frozen=True)
class BeforeNeuron:
    """A max-pool behind an activation moves in front of it, and the neurons receive the maximum of the currents.

    For the ANN nothing changes: a monotone activation commutes with the maximum. For the spiking network, over T
    steps, it equals the maximum of the rates in the window exactly, for constant currents, where the rate grows with
    the current (IF and LIF; not every LM-H setting) and θ and v_init do not vary within the window. Where currents
    vary in time, as behind the first layer of neurons, the maximum of each step is too large on average, and that
    error does not vanish with T. It needs the fewest neurons.
    """


@dataclass(frozen=True)
class AveragePool:
    """Every max-pool becomes an average pool of the same window; padding does not count.

    The spiking network then averages the rates in the window exactly, at every T. But the network computes another
    function than the ANN: fine-tune it. Weighted layers behind it receive averages instead of spikes.
    """


@dataclass(frozen=True)
class Gated:
    """A max-pool stays behind its neurons, and passes a spike if its neuron had fired as often as any in the window.

    What has passed is, after every step t, the maximum of what came in, exactly: Σ_{τ≤t} y[τ] = max_i Σ_{τ≤t} x_i[τ]
    (:mod:`lmh.gate`). So it equals the maximum of the rates at every T, for any neuron, constant or varying currents
    and any input, spikes or not; what passes is again spikes of θ where θ does not vary within the window. Gating by
    accumulated spikes is of Rueckauer et al. (2017).
    """


@dataclass(frozen=True)
class WhereExact:
    """In front of the neurons where their currents are constant, as by ``BeforeNeuron``; everywhere else ``Gated``.

    So a stem's pool, the widest of a network, costs nothing, and no pool adds an error that T does not remove.
    """


MaxPool = BeforeNeuron | AveragePool | Gated | WhereExact

MAXPOOLS: Mapping[str, MaxPool] = MappingProxyType(
    {"before": BeforeNeuron(), "average": AveragePool(), "gated": Gated()}
)
"""The types by the names that the command line gives them."""

_AVERAGES: dict[Any, Any] = {
    nn.MaxPool1d: nn.AvgPool1d, nn.MaxPool2d: nn.AvgPool2d, nn.MaxPool3d: nn.AvgPool3d,
    nn.AdaptiveMaxPool1d: nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool2d: nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool3d: nn.AdaptiveAvgPool3d,
    F.max_pool1d: F.avg_pool1d, F.max_pool2d: F.avg_pool2d, F.max_pool3d: F.avg_pool3d,
    torch.max_pool1d: F.avg_pool1d, torch.max_pool2d: F.avg_pool2d, torch.max_pool3d: F.avg_pool3d,
    F.adaptive_max_pool1d: F.adaptive_avg_pool1d, F.adaptive_max_pool2d: F.adaptive_avg_pool2d,
    F.adaptive_max_pool3d: F.adaptive_avg_pool3d,
}  # fmt: skip


_ADAPTIVE = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)


def pool_sources(pool: fx.Node) -> list[fx.Node]:
    """Return the values that a max-pool reads, seen through a concat over channels."""
    source = pool.all_input_nodes[0]
    if is_channel_concat(source):
        return list(source.args[0])  # type: ignore[arg-type]
    return [source]


def is_channel_concat(node: fx.Node) -> bool:
    """Whether ``node`` joins tensors over axis 1."""
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and name in ("cat", "concat", "concatenate") and argument(node, 1, "dim", 0) == 1


def pool_problem(node: fx.Node, decisions: Mapping[fx.Node, Spike | Keep], maxpool: MaxPool) -> str | None:
    """Say why a node that is a max-pool cannot be converted as asked; None if it can or is none."""
    if kind_of(node) is not Kind.MAXPOOL:
        return None
    place = 2 if node.target in ADAPTIVE_MAXPOOL_FUNCTIONS else 6
    if getattr(module_of(node), "return_indices", False) or argument(node, place, "return_indices", False):
        return f"{label(node)}: max-pool with return_indices has no spiking form. Pool without indices."
    match maxpool:
        case Gated() | WhereExact():
            return None
        case AveragePool():
            return _average_problem(node)
        case BeforeNeuron():
            return _order_problem(node, decisions)


def _average_problem(pool: fx.Node) -> str | None:
    module = module_of(pool)
    dilation = getattr(module, "dilation", 1) if module is not None else argument(pool, 4, "dilation", 1)
    if dilation in (1, None) or (isinstance(dilation, tuple | list) and all(step == 1 for step in dilation)):
        return None
    return (
        f"{label(pool)}: a max-pool with dilation {dilation}, and there is no such average pool; expected dilation 1. "
        "Pass --maxpool gated or before (maxpool=Gated() or BeforeNeuron() in Python)."
    )


def _order_problem(pool: fx.Node, decisions: Mapping[fx.Node, Spike | Keep]) -> str | None:
    for source in pool_sources(pool):
        if isinstance(decisions.get(source), Spike) or kind_of(source) is Kind.MAXPOOL:
            continue
        spiking = _spikes_behind(source, decisions)
        if spiking is not None:
            return (
                f"{label(pool)}: a max-pool reads the spikes of {label(spiking)} through {label(source)}; expected "
                "it directly behind the activation, or behind a weighted layer. Move the pool, or pass "
                "--maxpool gated or average (maxpool=Gated() or AveragePool() in Python)."
            )
    return None


def _spikes_behind(node: fx.Node, decisions: Mapping[fx.Node, Spike | Keep]) -> fx.Node | None:
    """Return a spiking activation that reaches ``node`` without a weighted layer between."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if isinstance(decisions.get(current), Spike):
            return current
        if current in seen or kind_of(current) is Kind.SYNAPSE:
            continue
        seen.add(current)
        pending += current.all_input_nodes
    return None


def pool_fate(node: fx.Node, maxpool: MaxPool) -> str:
    """Return the fate of a node that needs no rule, for the report: ``averaged`` or ``unchanged``."""
    averaged = kind_of(node) is Kind.MAXPOOL and isinstance(maxpool, AveragePool)
    return "averaged" if averaged else "unchanged"


def place_pools(model: fx.GraphModule, by_path: Mapping[str, Spike | Keep], maxpool: MaxPool) -> dict[str, Any]:
    """Rewrite the max-pools of a graph whose activations are modules, and return the activations by path."""
    match maxpool:
        case BeforeNeuron():
            return _moved(model, by_path, lambda pool: True)
        case WhereExact():
            return _moved(model, by_path, lambda pool: all(_constant(x, by_path) for x in pool_sources(pool)))
        case AveragePool():
            for pool in [node for node in model.graph.nodes if kind_of(node) is Kind.MAXPOOL]:
                _average(model, pool)
    return dict(by_path)


def gated_pools(graph: fx.Graph, maxpool: MaxPool) -> frozenset[str]:
    """Return the names of the nodes that are gated where they run in time."""
    pools = (node.name for node in graph.nodes if kind_of(node) is Kind.MAXPOOL)
    return frozenset(pools if isinstance(maxpool, Gated | WhereExact) else ())


def gate_pools(model: fx.GraphModule, time: TimeAxis, pools: Iterable[fx.Node]) -> None:
    """Put the sums over time in front of each max-pool, and what they grew by behind it."""
    for pool in pools:
        source, users = pool.all_input_nodes[0], list(pool.users)
        with model.graph.inserting_before(pool):
            pool.replace_input_with(source, _call(model, Accumulate(time), source))
        with model.graph.inserting_after(pool):
            passed = _call(model, Increments(time), pool, source)
        for user in users:
            user.replace_input_with(pool, passed)


def _call(model: fx.GraphModule, module: Timed, *args: fx.Node) -> fx.Node:
    path = unique_path(model, f"{TIME}.{type(module).__name__}")
    model.add_submodule(path, module)
    return model.graph.call_module(path, args)


def answering_as(maxpool: MaxPool) -> AbstractContextManager[Any]:
    """Inside this block an ANN gives what its conversion is to give: with ``AveragePool()``, averages."""
    return _Averaging() if isinstance(maxpool, AveragePool) else nullcontext()


def pool_notices(snn: fx.GraphModule, fates: tuple[NodeFate, ...]) -> Iterator[str]:
    """Say where the max-pools make the spiking network another function than the ANN."""
    averaged = [fate.path for fate in fates if fate.fate == "averaged"]
    if averaged:
        yield (
            f"{len(averaged)} max-pools became average pools ({', '.join(averaged)}): the network computes another "
            "function than the ANN. Fine-tune it."
        )
    timed: set[fx.Node] = set()
    pools = []
    for node in snn.graph.nodes:
        if isinstance(module_of(node), SpikingSite | FoldEvents) or timed & set(node.all_input_nodes):
            timed.add(node)
        if (
            kind_of(node) is Kind.MAXPOOL
            and node in timed
            and not isinstance(module_of(node.all_input_nodes[0]), Accumulate)
        ):
            pools.append(label(node))
    if pools:
        yield (
            f"{len(pools)} max-pools take the maximum of currents that vary in time ({', '.join(pools)}); "
            "their error does not vanish with T. Gated max-pools and average pools have none: --maxpool gated "
            "(maxpool=Gated() in Python)."
        )


def _constant(activation: fx.Node, by_path: Mapping[str, Any]) -> bool:
    """Whether no other spiking activation is among the ancestors of one."""
    pending, seen = list(activation.all_input_nodes), set()
    while pending:
        node = pending.pop()
        if isinstance(by_path.get(str(node.target)), Spike):
            return False
        if node not in seen:
            seen.add(node)
            pending += node.all_input_nodes
    return True


def _moved(model: fx.GraphModule, by_path: Mapping[str, Any], wanted: Callable[[fx.Node], bool]) -> dict[str, Any]:
    """Put every max-pool behind a spiking activation, if it is wanted so, in front of it."""
    result = dict(by_path)
    for pool in list(model.graph.nodes):
        if kind_of(pool) is not Kind.MAXPOOL:
            continue
        source = pool.all_input_nodes[0]
        if not any(isinstance(result.get(str(node.target)), Spike) for node in pool_sources(pool)) or not wanted(pool):
            continue
        moved = {node: _pooled(model, pool, node, result) for node in pool_sources(pool)}
        with model.graph.inserting_before(pool):
            if is_channel_concat(source):
                joined = model.graph.node_copy(source, lambda node: node)
                joined.args = ([moved[node] for node in pool_sources(pool)], *source.args[1:])
                replacement = joined
            else:
                replacement = moved[source]
        pool.replace_all_uses_with(replacement)
        model.graph.erase_node(pool)
        model.graph.eliminate_dead_code()
    called = {str(node.target) for node in model.graph.nodes}
    return {path: decision for path, decision in result.items() if path in called}


def _pooled(model: fx.GraphModule, pool: fx.Node, source: fx.Node, by_path: dict[str, Any]) -> fx.Node:
    """Return act(pool(x)) for a spiking source act(x), else pool(source)."""
    graph = model.graph
    path = str(source.target)
    spiking = isinstance(by_path.get(path), Spike)
    read = source.args[0] if spiking else source
    behind = pool.all_input_nodes[0]
    with graph.inserting_before(pool):
        new_pool = graph.node_copy(pool, lambda node: read if node is behind else node)
        if not spiking:
            return new_pool
        new_path = path
        if len(source.users) > 1 or len(behind.users) > 1:
            new_path = unique_path(model, path)
            model.add_submodule(new_path, copy.deepcopy(model.get_submodule(path)))
            by_path[new_path] = by_path[path]
        activation = graph.call_module(new_path, (new_pool,))
    activation.meta = dict(source.meta)
    return activation


def _average(model: fx.GraphModule, pool: fx.Node) -> None:
    """Make a max-pool node an average pool: a module at the same path, or a function."""
    module: Any = module_of(pool)
    if module is None:
        pool.args, pool.kwargs = _arguments(pool.target, pool.args, pool.kwargs), {}
        pool.target = _AVERAGES[pool.target]
    elif isinstance(module, _ADAPTIVE):
        model.set_submodule(str(pool.target), _AVERAGES[type(module)](module.output_size))
    elif type(module) in _AVERAGES:  # else averaged already, for another call of it
        window = (module.kernel_size, module.stride, module.padding, module.ceil_mode)
        model.set_submodule(str(pool.target), _AVERAGES[type(module)](*window, count_include_pad=False))


def _arguments(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the arguments of an average pool for those of a max-pool function."""

    def window(
        input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: Any = False,
        return_indices: Any = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        return input, kernel_size, stride or None, padding, ceil_mode, False

    def adaptive(input: Any, output_size: Any, return_indices: Any = False) -> tuple[Any, ...]:
        return input, output_size

    return (adaptive if target in ADAPTIVE_MAXPOOL_FUNCTIONS else window)(*args, **kwargs)


class _Averaging(TorchFunctionMode):
    """Calls of max-pool functions, from modules too, average instead."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call ``func``, or the average pool in its place."""
        if func not in _AVERAGES:
            return func(*args, **(kwargs or {}))
        return _AVERAGES[func](*_arguments(func, args, kwargs or {}))
