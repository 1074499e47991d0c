"""deploy: the copy of a spiking network that answers fastest; and the copies that exporters take.

BatchNorm is folded into the weights in front of it, thresholds into the weights behind them, and the neurons have
constant coefficients (lmh/frozen.py). What does not depend on time is computed once in any network.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..errors import ArgumentError
from ..eval_mode import in_eval_mode
from ..frozen import FrozenSite
from ..int8 import SpikeLayer
from ..int8 import available as int8_layers_exist
from ..kernels import Kernel, use_kernel
from ..memory_order import store_weights
from ..op_table import BATCHNORM_MODULES, SYNAPSE_MODULES, Kind
from ..ops import kind_of, module_of, plain_sum
from ..shapes import node_values
from ..spiking import sites
from ..structures import SampleShape, Shape, as_sample_shape, batched, cast_floats, each_shape, example_tensor
from ..time_axis import Readout, Timed, call, takes_events, time_axis
from .freeze import TRANSPOSED, freeze_sites
from .paths import unique_path
from .pipeline import Conversion
from .storage import MANIFEST

_ROUNDS = 4


def network_of(network: Conversion | fx.GraphModule, where: str = "export") -> fx.GraphModule:
    """Return the spiking network of what a user wants exported or deployed.

    Args:
        network: what came.
        where: it came to, for errors.

    Raises:
        ArgumentError: if it is none, or has no data.
    """
    snn = network.snn if isinstance(network, Conversion) else network
    if not isinstance(snn, fx.GraphModule) or not sites(snn):
        raise ArgumentError(
            f"{where}: got a {type(snn).__name__} without spiking sites; expected what lmh.convert.convert or load "
            "returned. Convert it first, and pass the network itself, not a wrapper around it (DDP, torch.compile)."
        )
    if any(isinstance(site, FrozenSite) for site in sites(snn).values()):
        raise ArgumentError(
            "the network is deployed: its BatchNorm and thresholds are folded. Expected what convert or load returned. "
            "Pass that one."
        )
    if any(tensor.device.type == "meta" for tensor in (*snn.parameters(), *snn.buffers())):
        raise ArgumentError(f"{where}: the network is on the meta device and has no values. Load its weights first.")
    return snn


def sample_shape_of(network: Conversion | fx.GraphModule, input_shape: Sequence[Any] | None) -> SampleShape | None:
    """Return the shape of one input sample, without batch and time, or None where nothing tells it."""
    if input_shape is not None:
        return as_sample_shape(each_shape(input_shape))
    if isinstance(network, Conversion):
        return network.recipe.sample_shape
    manifest: Mapping[str, Any] = network.meta.get(MANIFEST, {})
    return as_sample_shape(each_shape(manifest["recipe"]["sample_shape"])) if manifest else None


def input_shapes_of(snn: fx.GraphModule, sample_shape: Sequence[Any], batch: int) -> tuple[Shape, ...]:
    """Return the shape of each whole input: [N, *F], or [T, N, *F] for event frames."""
    return batched(sample_shape, *([time_axis(snn).steps] if takes_events(snn) else []), batch)


def required_shape(network: Conversion | fx.GraphModule, input_shape: Sequence[Any] | None) -> SampleShape:
    """Return the shape of one input sample, or of one of each input.

    Raises:
        ArgumentError: if nothing tells it, or the network does not take it.
    """
    snn = at_rest(network_of(network))
    shape = sample_shape_of(network, input_shape)
    if shape is None:
        raise ArgumentError(
            "export: the network does not say what input it takes; expected a Conversion, a loaded network, or "
            "input_shape= of one sample without batch. Pass input_shape=(3, 224, 224), say."
        )
    with call(time_axis(snn), Readout.MEAN, 1):
        node_values(snn, input_shapes_of(snn, shape, 2))
    return shape


def at_rest(snn: fx.GraphModule) -> fx.GraphModule:
    """Return a copy on the CPU in eval mode that starts anew, runs T steps and returns their mean."""
    model = copy.deepcopy(snn).cpu().eval().requires_grad_(False)
    axis = time_axis(model)
    axis.steps, axis.readout, axis.carry = axis.timesteps, Readout.MEAN, False
    for module in model.modules():
        if isinstance(module, Timed):
            module.drop_state()
    return model


def deploy(
    network: Conversion | fx.GraphModule,
    *,
    example: Tensor | Sequence[Tensor] | None = None,
    input_shape: Sequence[Any] | None = None,
    dtype: torch.dtype | None = None,
    int8: bool = False,
) -> fx.GraphModule:
    """Return a copy of a spiking network for inference.

    1. BatchNorm is folded (:func:`fold_batchnorm`).
    2. Where nothing but weighted layers read the output θ s of a site, straight or through pools, flattening and
       dropout, θ goes into their weights, W' = W θ for each input channel, and the site gives s, 0 or 1.
    3. With ``int8``, convolutions [N, C, H, W] and linear layers that read a site, straight or flattened, take its
       spikes as whole numbers and have int8 weights, by output channel (lmh/int8.py); what else reads it gets θ s.
    4. The neurons are constants, and run as one pass over all steps, compiled where that is worth it. A residual sum in
       front of them becomes a part of that pass.
    5. With a ``dtype`` of 16 bits, weights and currents are of it; potentials stay float32.
    6. With an ``example``, channels first or channels last in memory: what was faster on it, in this process.

    The equations stay. Folding rounds the weights anew, so a potential can come to lie on the other side of θ: single
    spikes differ, and with them single outputs, by a few θ/T. 16 bits and int8 round more (:func:`spike_changes`).

    Args:
        network: from ``convert`` or ``load``; not changed. Keep it: a deployed one is not trained, saved or exported.
        example: an input, [N, *F] or [T, N, *F], or a sequence of several, such as will come later.
        input_shape: of one sample, without batch (a shape for each of several inputs); not needed for a Conversion or
            a loaded network, or with an ``example``. Without any of these, less is folded around linear layers.
        dtype: torch.float32, torch.bfloat16 or torch.float16; that of the network unless given. Inputs are cast to it
            and outputs back; a cast in the network itself (``x.float()``) stays.
        int8: round weights to int8, for x86 CPUs; around them float32 or bfloat16.

    Returns:
        An ordinary module, on the CPU and in eval mode. ``per_step``, ``carry_state`` and ``evaluate`` take it.

    Raises:
        ArgumentError: if it is not a spiking network, or deployed already; if there is no such dtype, or the network
            casts to another in between; if no layer can have int8 weights, or this machine has no product for them.

    >>> from lmh.convert import load
    >>> snn, x = load("zoo:digits-cnn-t4"), torch.rand(8, 1, 8, 8)
    >>> fast = deploy(snn, example=x)
    >>> torch.equal(fast(x).argmax(1), snn(x).argmax(1)), [site.binary for site in sites(fast).values()]
    (True, [False, True, True, True])
    """
    snn = network_of(network, "deploy")
    given = example_tensor(snn).dtype
    dtype = _checked_dtype(given if dtype is None else dtype, given, int8)
    examples = () if example is None else (example,) if isinstance(example, Tensor) else tuple(example)
    shape = sample_shape_of(network, input_shape)
    if shape is None and examples:
        shape = as_sample_shape([x.shape[2 if takes_events(snn) else 1 :] for x in examples])
    model = fold_batchnorm(network, input_shape=shape)
    freeze_sites(model, _flat_outputs(model, shape), int8=dtype if int8 else None)
    if int8 and not any(isinstance(module, SpikeLayer) for module in model.modules()):
        raise ArgumentError(
            "deploy: int8=True was asked for and no layer can have it; expected a convolution [N, C, H, W] or a linear "
            "layer that alone reads a site's spikes, straight or flattened, and is called once, with a θ that is the "
            f"same at every step. {'Leave' if shape else 'Pass example= too, for linear layers, or leave'} int8 out."
        )
    if dtype != given:
        _compute_in(model, dtype, given)
    _join_sums(model)
    model.graph.lint()
    model.recompile()
    model.meta.pop(MANIFEST, None)
    if dtype != given and shape is not None:
        _check_casts(model, shape, dtype, given)
    return _faster(model, examples) if examples else model


def spike_changes(network: Conversion | fx.GraphModule, deployed: fx.GraphModule, *inputs: Tensor) -> dict[str, float]:
    """Return how many spikes a deployed network has in other places, by site.

    Args:
        network: what was deployed, on the CPU.
        deployed: the copy.
        *inputs: as they take them.

    Returns:
        By the path of a site the share of its neurons and steps at which one network spikes and the other does not.

    Raises:
        ArgumentError: if the two have other sites.

    >>> from lmh.convert import load
    >>> snn, x = load("zoo:digits-cnn-t4"), torch.rand(8, 1, 8, 8)
    >>> changes = spike_changes(snn, deploy(snn, dtype=torch.bfloat16), x)
    >>> list(changes), all(0 <= share < 0.05 for share in changes.values())
    (['stem.2', 'block.relu1', 'block.relu2', 'down.2'], True)
    """
    snn = network_of(network, "spike_changes")
    if list(sites(snn)) != list(sites(deployed)):
        raise ArgumentError(
            f"spike_changes: the sites are {', '.join(sites(snn))} and {', '.join(sites(deployed))}; expected the "
            "same. Pass a network and the copy that deploy made of it."
        )
    before, after = _spikes(snn, inputs), _spikes(deployed, inputs)
    return {path: float((spikes ^ after[path]).float().mean()) for path, spikes in before.items()}


def _spikes(snn: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return which neurons spike at which step in one call, by site."""
    found: dict[str, Tensor] = {}
    handles = [
        site.register_forward_hook(lambda _, __, output, path=path: found.update({path: output > 0}))
        for path, site in sites(snn).items()
    ]
    try:
        with in_eval_mode(snn), torch.inference_mode():
            snn(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _checked_dtype(dtype: torch.dtype, given: torch.dtype, int8: bool) -> torch.dtype:
    """Return the dtype to compute in, or refuse it."""
    allowed = [torch.float32, torch.bfloat16] + ([] if int8 else [torch.float16, given])
    if dtype not in allowed:
        names = ", ".join(map(str, dict.fromkeys(allowed)))
        raise ArgumentError(
            f"deploy: dtype is {dtype}{' with int8=True' if int8 else ''}; expected one of {names}. "
            "Pass dtype=torch.bfloat16, say."
        )
    if int8 and not int8_layers_exist():
        raise ArgumentError(
            "deploy: int8=True was asked for and this build of torch has no oneDNN; expected one for x86 CPUs. Leave "
            "it out."
        )
    return dtype


def _join_sums(model: fx.GraphModule) -> None:
    """Let sites add two currents themselves, where nothing else reads the sum."""
    for node in [node for node in model.graph.nodes if isinstance(module_of(node), FrozenSite)]:
        [current] = node.args
        if plain_sum(current) and len(current.users) == 1:
            node.args = current.args
            model.graph.erase_node(current)


def _compute_in(model: fx.GraphModule, dtype: torch.dtype, given: torch.dtype) -> None:
    """Make weights and currents of another dtype, and outputs again of the one that was given."""
    for module in model.modules():
        if not isinstance(module, (FrozenSite, SpikeLayer)):
            for tensors in (module._parameters, module._buffers):
                cast = {name: cast_floats(value.data, dtype) for name, value in tensors.items() if value is not None}
                for name, value in cast.items():
                    tensors[name] = nn.Parameter(value, requires_grad=False) if tensors is module._parameters else value
    graph = model.graph
    for node in list(graph.nodes):
        if node.op == "placeholder":
            with graph.inserting_after(node):
                inside = graph.call_function(cast_floats, (node, dtype))
            node.replace_all_uses_with(inside, delete_user_cb=lambda user, inside=inside: user is not inside)
        elif kind_of(node) is Kind.OUTPUT:
            for source in [source for source in node.all_input_nodes if kind_of(source) is not Kind.OUTPUT]:
                with graph.inserting_before(node):
                    node.replace_input_with(source, graph.call_function(cast_floats, (source, given)))


def _check_casts(model: fx.GraphModule, shape: SampleShape, dtype: torch.dtype, given: torch.dtype) -> None:
    """Run one sample of zeros, which fails where the network computes with two dtypes."""
    try:
        with torch.inference_mode(), use_kernel(Kernel.EAGER):
            model(*(torch.zeros(size, dtype=given) for size in input_shapes_of(model, shape, 1)))
    except RuntimeError as error:
        raise ArgumentError(
            f"deploy: the network does not run in {dtype} ({error}); expected one without a cast or a constant of "
            "another dtype in its forward. Leave dtype out."
        ) from error


def fold_batchnorm(network: Conversion | fx.GraphModule, *, input_shape: Sequence[Any] | None = None) -> fx.GraphModule:
    """Return a deploy copy of a spiking network with BatchNorm folded into the weights in front of it.

    With eval statistics, per output channel c of the convolution or linear layer:

        W'_c = W_c γ_c / √(σ²_c + ε),   b'_c = (b_c − m_c) γ_c / √(σ²_c + ε) + β_c

    A BatchNorm stays as it is behind anything else, where another node reads the unnormalised output, without
    running statistics, behind a grouped transposed convolution or one with hooks, and behind a linear layer on
    [N, L, F], whose features it does not normalise (as long as the input's shape is unknown, behind any linear layer).

    Args:
        network: from ``convert`` or ``load``; not changed. Fine-tuning needs BatchNorm, so fold last.
        input_shape: of one sample, without batch (a shape for each of several inputs); not needed for a Conversion or
            a loaded network.

    Returns:
        The copy, on the CPU and in eval mode; its output equals the original's up to rounding.

    Raises:
        ArgumentError: if it is not a spiking network.
    """
    model = at_rest(network_of(network))
    shape = sample_shape_of(network, input_shape)
    flat = _flat_outputs(model, shape)
    for node in list(model.graph.nodes):
        norm = module_of(node)
        if type(norm) not in BATCHNORM_MODULES or norm is None:
            continue
        source = node.all_input_nodes[0]
        if _foldable(source, norm) and (not isinstance(module_of(source), nn.Linear) or flat(source)):
            _fold(model, source, node, norm)
    model.graph.lint()
    model.recompile()
    model.delete_all_unused_submodules()
    return model


def _flat_outputs(model: fx.GraphModule, shape: Sequence[Any] | None) -> Callable[[fx.Node], bool]:
    """Return a test whether a node of this graph gives [N, C]; none does where the shape of a sample is unknown."""
    values: dict[fx.Node, Any] = {}
    if shape is not None:
        with call(time_axis(model), Readout.MEAN, 1):
            values = node_values(model, input_shapes_of(model, shape, 2))
    return lambda node: node in values and values[node].ndim == 2


def _foldable(source: fx.Node, norm: nn.Module) -> bool:
    layer: Any = module_of(source)
    if type(layer) not in SYNAPSE_MODULES or len(source.users) > 1 or norm.running_mean is None:
        return False
    hooked = layer._forward_hooks or layer._forward_pre_hooks or norm._forward_hooks or norm._forward_pre_hooks
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    grouped = isinstance(layer, TRANSPOSED) and layer.groups > 1
    return not hooked and not grouped and outputs == norm.num_features


def _faster(model: fx.GraphModule, example: Sequence[Tensor]) -> fx.GraphModule:
    """Store weights and images in the order that takes less time."""
    taken: dict[bool, float] = {}
    for channels_last in (True, False):
        store_weights(model, channels_last=channels_last)
        times = []
        with torch.inference_mode():
            for _ in range(_ROUNDS):
                started = time.perf_counter()
                model(*example)
                times.append(time.perf_counter() - started)
        taken[channels_last] = min(times[1:])
    store_weights(model, channels_last=taken[True] < taken[False])
    return model


def _fold(model: fx.GraphModule, source: fx.Node, node: fx.Node, norm: Any) -> None:
    """Replace a layer and its BatchNorm by one layer; a layer called elsewhere too keeps its own weights there."""
    layer: Any = module_of(source)
    values = (layer.weight, layer.bias, norm.running_mean, norm.running_var)
    weight, bias, mean, variance = (None if value is None else value.double() for value in values)
    scale, shift = (None if value is None else value.double() for value in (norm.weight, norm.bias))
    fused = fuse_conv_bn_weights(
        cast(Tensor, weight), bias, cast(Tensor, mean), cast(Tensor, variance), norm.eps, scale, shift,
        isinstance(layer, TRANSPOSED),
    )  # fmt: skip
    folded = copy.deepcopy(layer)
    folded.weight, folded.bias = (nn.Parameter(value.to(layer.weight.dtype), False) for value in fused)
    path = str(source.target)
    if sum(other.target == path for other in model.graph.nodes) > 1:
        path = unique_path(model, path)
        source.target = path
    model.add_submodule(path, folded)
    node.replace_all_uses_with(source)
    model.graph.erase_node(node)


def deployed(network: Conversion | fx.GraphModule, input_shape: Sequence[Any] | None = None) -> fx.GraphModule:
    """Return the copy that the tracing exporters take: BatchNorm folded, coefficients constant."""
    model = fold_batchnorm(network, input_shape=input_shape)
    for path, site in sites(model).items():
        model.set_submodule(path, FrozenSite(site))
    return model


def random_inputs(snn: fx.GraphModule, sample_shape: Sequence[Any], batch: int, seed: int) -> tuple[Tensor, ...]:
    """Return normal random inputs of the network's dtype, each [N, *F] or [T, N, *F]."""
    dtype = example_tensor(snn).dtype
    generator = torch.Generator().manual_seed(seed)
    shapes = input_shapes_of(snn, sample_shape, batch)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
