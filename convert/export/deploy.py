"""The copy of a spiking network that is exported: BatchNorm folded, neurons with constant coefficients."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ...errors import ArgumentError
from ...op_table import BATCHNORM_MODULES, SYNAPSE_MODULES
from ...ops import module_of
from ...shapes import node_values
from ...spiking import COEFFICIENTS, PerStep, SpikingSite, sites
from ...structures import SampleShape, Shape, as_sample_shape, batched, each_shape
from ...time_axis import Readout, TimeAxis, Timed, call, takes_events, time_axis
from ..paths import unique_path
from ..pipeline import Conversion
from ..storage import MANIFEST

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def network_of(network: Conversion | fx.GraphModule) -> fx.GraphModule:
    """Return the spiking network of what a user wants exported.

    Raises:
        ArgumentError: if it is none, or has no data.
    """
    snn = network.snn if isinstance(network, Conversion) else network
    if not isinstance(snn, fx.GraphModule) or not sites(snn):
        raise ArgumentError(
            f"export: got a {type(snn).__name__} without spiking sites; expected what lmh.convert.convert or load "
            "returned. Convert it first, and pass the network itself, not a wrapper around it (DDP, torch.compile)."
        )
    if any(tensor.device.type == "meta" for tensor in (*snn.parameters(), *snn.buffers())):
        raise ArgumentError("export: the network is on the meta device and has no values. Load its weights first.")
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
    time = time_axis(model)
    time.steps, time.readout, time.carry = time.timesteps, Readout.MEAN, False
    for module in model.modules():
        if isinstance(module, Timed):
            module.drop_state()
    return model


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
    """Return a test whether a node gives [N, C]; shapes are computed when first asked for."""
    values: dict[fx.Node, Any] = {}

    def flat(node: fx.Node) -> bool:
        if shape is not None and not values:
            with call(time_axis(model), Readout.MEAN, 1):
                values.update(node_values(model, input_shapes_of(model, shape, 2)))
        return node in values and values[node].ndim == 2

    return flat


def _foldable(source: fx.Node, norm: nn.Module) -> bool:
    layer: Any = module_of(source)
    if type(layer) not in SYNAPSE_MODULES or len(source.users) > 1 or norm.running_mean is None:
        return False
    hooked = layer._forward_hooks or layer._forward_pre_hooks or norm._forward_hooks or norm._forward_pre_hooks
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    grouped = isinstance(layer, _TRANSPOSED) and layer.groups > 1
    return not hooked and not grouped and outputs == norm.num_features


def _fold(model: fx.GraphModule, source: fx.Node, node: fx.Node, norm: Any) -> None:
    """Replace a layer and its BatchNorm by one layer; a layer called elsewhere too keeps its own weights there."""
    layer: Any = module_of(source)
    values = (layer.weight, layer.bias, norm.running_mean, norm.running_var)
    weight, bias, mean, variance = (None if value is None else value.double() for value in values)
    scale, shift = (None if value is None else value.double() for value in (norm.weight, norm.bias))
    fused = fuse_conv_bn_weights(
        cast(Tensor, weight), bias, cast(Tensor, mean), cast(Tensor, variance), norm.eps, scale, shift,
        isinstance(layer, _TRANSPOSED),
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


class FixedSite(Timed):
    """The neurons of a :class:`SpikingSite` with θ, λ, μ and the start as constants, for tracing by exporters.

    The equations are those of :func:`lmh.neurons.lmh_step`, bit for bit: products with 1 and sums with 0, of which
    IF and LIF are full, are left out.
    """

    def __init__(self, time: TimeAxis, site: SpikingSite) -> None:
        super().__init__(time)
        self.v_start: Tensor
        self.static = site.static
        self.per_step = isinstance(site.neuron.granularity, PerStep)
        theta = site.v_threshold.detach()
        values = {name: site.coefficient(name).detach() for name in COEFFICIENTS}
        start = site.v_init.detach() * (theta[0] if self.per_step else theta)
        for name, value in {"v_threshold": theta, "v_start": start, **values}.items():
            self.register_buffer(name, value.clone())
        self.silent = not bool(start.any())
        self.numbers = {
            name: number
            for name, value in values.items()
            for number in ((1.0,) if name == "lambda_d" else (0.0, 1.0))
            if bool((value == number).all())
        }

    def forward(self, current: Tensor) -> Tensor:
        """Run T steps: [T·N, *F], or [N, *F] where the site is static, to θ s of shape [T·N, *F]."""
        steps, ndim = self.time.steps, current.ndim
        dtype = torch.float32 if current.dtype in (torch.float16, torch.bfloat16) else current.dtype
        currents = (current,) * steps if self.static else self.unfold(current).unbind(0)
        dendrite: Tensor | None = None
        soma = None if self.silent else _aligned(self.v_start, ndim, dtype)
        outputs = []
        for t, step in enumerate(currents):
            fixed = {name: self._fixed(name, t, ndim, dtype) for name in ("v_threshold", *COEFFICIENTS)}
            dendrite = _sum([_product(fixed["mu_d"], dendrite), _product(fixed["mu_s"], soma), step.to(dtype)])
            membrane = _sum([_product(fixed["lambda_s"], soma), _product(fixed["lambda_d"], dendrite)])
            theta = fixed["v_threshold"]
            output = (membrane >= theta).to(dtype) * theta
            soma = membrane - output
            outputs.append(output.to(current.dtype))
        return torch.cat(outputs)

    def _fixed(self, name: str, t: int, ndim: int, dtype: torch.dtype) -> Any:
        """θ, λ or μ of step t, aligned with the current; the numbers 0 and 1 where they are that everywhere."""
        if name in self.numbers:
            return self.numbers[name]
        value: Tensor = getattr(self, name)
        return _aligned(value[t] if self.per_step else value, ndim, dtype)


def _aligned(value: Tensor, ndim: int, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.ndim == 0 else value.to(dtype).reshape(-1, *[1] * (ndim - 2))


def _product(factor: Tensor | float, potential: Tensor | None) -> Tensor | None:
    if isinstance(factor, Tensor):
        return None if potential is None else factor * potential
    return potential if factor else None


def _sum(terms: Sequence[Tensor | None]) -> Tensor:
    return functools.reduce(torch.add, [term for term in terms if term is not None])


def deployed(network: Conversion | fx.GraphModule, input_shape: Sequence[Any] | None = None) -> fx.GraphModule:
    """Return the copy that the tracing exporters take: BatchNorm folded, coefficients constant."""
    model = fold_batchnorm(network, input_shape=input_shape)
    for path, site in sites(model).items():
        model.set_submodule(path, FixedSite(site.time, site))
    return model


def random_inputs(snn: fx.GraphModule, sample_shape: Sequence[Any], batch: int, seed: int) -> tuple[Tensor, ...]:
    """Return normal random inputs of the network's dtype, each [N, *F] or [T, N, *F]."""
    dtype = next((p.dtype for p in snn.parameters() if p.is_floating_point()), torch.float32)
    generator = torch.Generator().manual_seed(seed)
    shapes = input_shapes_of(snn, sample_shape, batch)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
