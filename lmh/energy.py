"""Work and energy of a spiking network, from the spikes that it really fired.

Assumptions, which every report states:
    - a multiply-accumulate costs 4.6 pJ and an accumulate 0.9 pJ (32-bit floats in 45 nm, Horowitz 2014);
    - a weighted layer fed by spikes accumulates once for each spike and connection (SynOps); θ belongs to
      the weights;
    - a layer fed by other values (sums of spikes, averages, analog activations) multiplies at every step;
      one that does not depend on time (the stem) or runs on the time mean (the head) does so once;
    - a kept analog node counts the matrix products and convolutions inside it, at every step;
    - for event frames the ANN runs on each of the T frames;
    - memory traffic, neuron updates and idle power are not counted.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from .gate import Increments
from .int8 import SpikeLayer, Thresholded
from .op_table import CONTRACTIONS, DROPOUT_FUNCTIONS, IDENTITY_MODULES, Kind
from .ops import argument, kind_of, module_of, signal_input
from .records import LayerWork
from .spiking import PerStep, SpikingSite
from .time_axis import EnterTail, Timed

PICOJOULE_PER_MAC = 4.6
PICOJOULE_PER_ACCUMULATE = 0.9
ASSUMPTIONS = (
    "45 nm: 4.6 pJ per multiply-accumulate, 0.9 pJ per accumulate. The constant stem and the head on the time mean "
    "count once, layers fed by non-binary values and kept analog nodes count multiply-accumulates at every step, and "
    "for event frames the ANN runs on every frame. Memory traffic and neuron updates are not counted."
)
NO_PRODUCTS = (nn.LayerNorm, nn.RMSNorm, nn.Embedding)


def picojoules(layers: Sequence[LayerWork]) -> tuple[float, float]:
    """Return the energy of the SNN and of the ANN for one sample, in pJ.

    >>> picojoules([LayerWork("fc", ann_macs=10.0, accumulates=50.0, macs=0.0)])
    (45.0, 46.0)
    """
    snn = sum(PICOJOULE_PER_ACCUMULATE * layer.accumulates + PICOJOULE_PER_MAC * layer.macs for layer in layers)
    return snn, sum(PICOJOULE_PER_MAC * layer.ann_macs for layer in layers)


def binary_nodes(snn: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes whose values are spikes: sites, and what only moves, selects or gates their outputs."""
    found: set[fx.Node] = set()
    for node in snn.graph.nodes:
        module = module_of(node)
        moves = kind_of(node) in (Kind.SHAPE, Kind.MAXPOOL) or isinstance(module, Thresholded)
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
    if isinstance(module, (Thresholded, *IDENTITY_MODULES)) or spikes.target in DROPOUT_FUNCTIONS:
        return _has_one_threshold(spikes.all_input_nodes[0])
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
    if node.target in CONTRACTIONS:  # every product that the sum holds counts 1
        return float(_with_unit_weights(node, torch.ones_like(x[:1], dtype=torch.float64)).sum())
    side = x if _is_transposed(node) else output
    return _weight(node)[0].numel() * math.prod(side.shape[1:])


def analog_macs(call: Callable[..., Any], module: nn.Module | None, inputs: Any) -> float | None:
    """Return the multiply-accumulates of the matrix products and convolutions inside a kept node.

    Counted on shapes alone, as the audit ran the node too, by what each operation dispatches to.

    Args:
        call: takes ``inputs`` as its arguments.
        module: what the node calls, if it is a module.
        inputs: (args, kwargs) with real tensors, of the whole batch.

    Returns:
        The count for the batch; None if it cannot be known: a part of the module with a weight matrix (an LSTM, a
        kernel of one's own) ran without an operation that the counter knows.
    """
    counter = FlopCounterMode(display=False)
    silent: list[nn.Module] = []
    before: dict[nn.Module, int] = {}

    def enter(part: nn.Module, _args: Any) -> None:
        before[part] = counter.get_total_flops()

    def leave(part: nn.Module, _args: Any, _output: Any) -> None:
        if counter.get_total_flops() == before[part]:
            silent.append(part)

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operation, which the counter does not know
    try:
        with ExitStack() as stack:
            for part in [] if module is None else [part for part in module.modules() if _has_matrix(part)]:
                stack.callback(part.register_forward_pre_hook(enter).remove)
                stack.callback(part.register_forward_hook(leave).remove)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            args, kwargs = pytree.tree_map_only(Tensor, fake.from_tensor, inputs)
            stack.enter_context(counter)
            call(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return None if silent else counter.get_total_flops() / 2


def _has_matrix(part: nn.Module) -> bool:
    return not isinstance(part, NO_PRODUCTS) and any(p.ndim > 1 for p in part.parameters(recurse=False))


def uncounted_text(paths: Sequence[str]) -> str:
    """Return the sentence about kept modules whose work is not in the figures."""
    return (
        f"The work of {', '.join(paths)} could not be counted, so the energy of the ANN and of the spiking network is "
        "higher than given."
    )


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
    module = module.plain() if isinstance(module, SpikeLayer) else module
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
