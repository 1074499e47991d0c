"""Work and energy of a spiking network, from the spikes that it really fired.

Assumptions, which every report states:
    - a multiply-accumulate costs 4.6 pJ and an accumulate 0.9 pJ (32-bit floats in 45 nm, Horowitz 2014);
    - a weighted layer fed by spikes accumulates once for each spike and connection (SynOps); θ belongs to
      the weights;
    - a layer fed by other values (sums of spikes, averages, analog activations) multiplies at every step;
      one that does not depend on time (the stem) or runs on the time mean (the head) does so once;
    - memory traffic, neuron updates and idle power are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .gate import Increments
from .ops import Kind, argument, kind_of, module_of
from .records import LayerWork
from .spiking import PerStep, SpikingSite
from .time_axis import EnterTail, Timed

PICOJOULE_PER_MAC = 4.6
PICOJOULE_PER_ACCUMULATE = 0.9
ASSUMPTIONS = (
    "45 nm: 4.6 pJ per multiply-accumulate, 0.9 pJ per accumulate. The constant stem and the head on the time mean "
    "count once, layers fed by non-binary values count multiply-accumulates at every step. Memory traffic and neuron "
    "updates are not counted."
)


def picojoules(layers: Sequence[LayerWork]) -> tuple[float, float]:
    """Return the energy of the SNN and of the ANN for one sample, in pJ.

    >>> picojoules([LayerWork("fc", ann_macs=100.0, accumulates=50.0, macs=0.0)])
    (45.0, 460.0)
    """
    snn = sum(PICOJOULE_PER_ACCUMULATE * layer.accumulates + PICOJOULE_PER_MAC * layer.macs for layer in layers)
    return snn, sum(PICOJOULE_PER_MAC * layer.ann_macs for layer in layers)


def binary_nodes(snn: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes whose values are spikes: sites, and what only moves, selects or gates their outputs."""
    found: set[fx.Node] = set()
    for node in snn.graph.nodes:
        module = module_of(node)
        moves = kind_of(node) in (Kind.SHAPE, Kind.MAXPOOL)
        sources = [source for source in node.all_input_nodes if kind_of(source) is not Kind.SIZE]
        if isinstance(module, Increments):
            binary = _has_one_threshold(node.all_input_nodes[1])
        else:
            binary = isinstance(module, SpikingSite) or (moves and bool(sources) and all(s in found for s in sources))
        if binary:
            found.add(node)
    return found


def _has_one_threshold(spikes: fx.Node) -> bool:
    """Whether a window of a gate holds spikes of one θ: sites, or channels of them, whose θ stays as it is over time.

    What passes is then spikes of that θ; else it is their differences.
    """
    module = module_of(spikes)
    if isinstance(module, SpikingSite):
        return not isinstance(module.neuron.granularity, PerStep)
    if isinstance(module, Increments):
        return _has_one_threshold(spikes.all_input_nodes[1])
    joins = spikes.target in (torch.cat, torch.concat, torch.concatenate) and argument(spikes, 1, "dim", 0) == 1
    return joins and all(_has_one_threshold(source) for source in spikes.all_input_nodes)


def tail_nodes(snn: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes that run on the time mean."""
    found: set[fx.Node] = set()
    for node in snn.graph.nodes:
        behind = isinstance(module_of(node), EnterTail) or any(source in found for source in node.all_input_nodes)
        if behind and (not isinstance(module_of(node), Timed) or isinstance(module_of(node), EnterTail)):
            found.add(node)
    return found


def dense_macs(node: fx.Node, x: Tensor, output: Tensor) -> float:
    """Return the multiply-accumulates of a weighted layer for one entry of its batch, padding included.

    Args:
        node: the layer.
        x: its input, [N, *F].
        output: its output, [N, *G].
    """
    weight = _weight(node)
    side = x if _is_transposed(node) else output
    return weight[0].numel() * math.prod(side.shape[1:])


def fan_out(node: fx.Node, x: Tensor) -> Tensor:
    """Return how many outputs each input element of a weighted layer reaches, shape of one entry of ``x``.

    Found as the gradient of the layer's sum with all weights at 1, so it is exact at borders, for strides,
    groups and dilation.
    """
    with torch.enable_grad():
        probe = torch.zeros_like(x[:1], dtype=torch.float32).requires_grad_()
        (grad,) = torch.autograd.grad(_with_unit_weights(node, probe).sum(), probe)
    return grad[0]


def _is_transposed(node: fx.Node) -> bool:
    module = module_of(node)
    name = type(module).__name__ if module is not None else getattr(node.target, "__name__", "")
    return "ranspose" in name


def _weight(node: fx.Node) -> Tensor:
    module = module_of(node)
    if module is not None:
        return module.weight  # type: ignore[return-value]
    return _parameter(node, argument(node, 1, "weight"))


def _parameter(node: fx.Node, source: fx.Node) -> Tensor:
    value: Any = node.graph.owning_module
    for part in str(source.target).split("."):
        value = getattr(value, part)
    return value


def _with_unit_weights(node: fx.Node, probe: Tensor) -> Tensor:
    module = module_of(node)
    if module is not None:
        state = {name: torch.ones_like(p, dtype=torch.float32) for name, p in module.named_parameters()}
        return torch.func.functional_call(module, state, (probe,))
    unit = torch.ones_like(_weight(node), dtype=torch.float32)
    options = {key: value for key, value in node.kwargs.items() if key not in ("weight", "bias", "input")}
    rest = [None if isinstance(value, fx.Node) else value for value in node.args[2:]]
    return node.target(probe, unit, *rest, **options)  # type: ignore[operator]
