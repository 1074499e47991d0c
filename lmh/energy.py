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
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .op_table import CONTRACTIONS, Kind
from .ops import argument, kind_of, module_of, signal_input
from .records import LayerWork
from .spiking import SpikingSite
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
    """Return the nodes whose values are spikes: sites, and what only moves or selects their outputs."""
    found: set[fx.Node] = set()
    for node in snn.graph.nodes:
        moves = kind_of(node) in (Kind.SHAPE, Kind.MAXPOOL)
        sources = [source for source in node.all_input_nodes if kind_of(source) is not Kind.SIZE]
        if isinstance(module_of(node), SpikingSite) or (moves and sources and all(s in found for s in sources)):
            found.add(node)
    return found


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
    if node.target in CONTRACTIONS:  # every product that the sum holds counts 1
        return float(_with_unit_weights(node, torch.ones_like(x[:1], dtype=torch.float64)).sum())
    side = x if _is_transposed(node) else output
    return _weight(node)[0].numel() * math.prod(side.shape[1:])


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
    return module.weight if module is not None else _fixed_value(argument(node, 1, "weight"))  # type: ignore[return-value]


def _fixed_value(node: fx.Node) -> Any:
    """Compute a node that does not depend on the network's input: a parameter, or what is made from some."""
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(node.graph.owning_module)
    return _called(node, _fixed_value)


def _called(node: fx.Node, given: Callable[[fx.Node], Any]) -> Any:
    """Run one function, method or module on what ``given`` says that its inputs are."""
    args, kwargs = fx.map_arg(node.args, given), fx.map_arg(node.kwargs, given)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    module = module_of(node)
    called: Any = node.target if module is None else module
    return called(*args, **kwargs)


def _with_unit_weights(node: fx.Node, probe: Tensor) -> Tensor:
    module = module_of(node)
    if module is not None:
        state = {name: torch.ones_like(p, dtype=probe.dtype) for name, p in module.named_parameters()}
        return torch.func.functional_call(module, state, (probe,))
    signal = signal_input(node)

    def given(source: fx.Node) -> Any:
        if source is signal:
            return probe
        value = _fixed_value(source)
        return torch.ones_like(value, dtype=probe.dtype) if isinstance(value, Tensor) else value

    return _called(node, given)
