"""Sites for inference: constant neurons, and their thresholds in the weights of the layers that read them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..frozen import FrozenSite
from ..gate import Accumulate, Increments
from ..int8 import SpikeLinear, Thresholded, int8_kind
from ..op_table import (
    AVGPOOL_FUNCTIONS,
    AVGPOOL_MODULES,
    DROPOUT_FUNCTIONS,
    IDENTITY_MODULES,
    SYNAPSE_MODULES,
    Kind,
)  # fmt: skip
from ..ops import argument, kind_of, module_of, signal_input
from ..spiking import PerStep, SpikingSite, sites
from ..time_axis import EnterTail, LeaveTail
from .paths import unique_path

_PASSING: set[Any] = {
    *AVGPOOL_MODULES, *AVGPOOL_FUNCTIONS, *IDENTITY_MODULES, *DROPOUT_FUNCTIONS, EnterTail, LeaveTail, Accumulate,
    Increments,
}  # fmt: skip
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
IsFlat = Callable[[fx.Node], bool]


def freeze_sites(model: fx.GraphModule, flat: IsFlat, *, int8: torch.dtype | None) -> None:
    """Replace every site by a :class:`FrozenSite` that gives 0 and 1 where the layers behind it can hold its θ.

    Args:
        model: changed.
        flat: whether a node gives [N, C].
        int8: None, or the dtype of what layers with int8 weights give.
    """
    for path, site in sites(model).items():
        (node,) = (node for node in model.graph.nodes if node.target == path)
        layers = _int8_layers(node, site, flat) if int8 else []
        if int8 and layers:
            _to_int8(model, node, site, layers, int8)
        else:
            model.set_submodule(path, FrozenSite(site, binary=_fold_threshold(model, node, site, flat)))


def _int8_layers(node: fx.Node, site: SpikingSite, flat: IsFlat) -> list[tuple[fx.Node, bool]]:
    """Return the layers that read a site and can have int8 weights, and whether its output is flattened before."""
    if isinstance(site.neuron.granularity, PerStep):
        return []
    found = []
    for user in node.users:
        flattened = _flattens(user)
        layers = list(user.users) if flattened else [user]
        kinds = {int8_kind(module_of(layer)) for layer in layers}
        taken = kinds == {SpikeLinear} if flattened else None not in kinds
        if taken and all(_scalable(site, layer, flattened, flat) for layer in layers):
            found += [(layer, flattened) for layer in layers]
    return found


def _to_int8(
    model: fx.GraphModule,
    node: fx.Node,
    site: SpikingSite,
    layers: Sequence[tuple[fx.Node, bool]],
    dtype: torch.dtype,
) -> None:
    """Let these layers read spikes in uint8, and whatever else reads the site θ s."""
    path = str(node.target)
    for layer, flattened in layers:
        _scale(model, layer, site.v_threshold, flattened)
        module: Any = module_of(layer)
        kind = int8_kind(module)
        assert kind is not None
        model.set_submodule(str(layer.target), kind(module, dtype))
    reading = {layer.all_input_nodes[0] if flattened else layer for layer, flattened in layers}
    others = [user for user in node.users if user not in reading]
    if others:
        thresholded_path = unique_path(model, f"{path}_thresholded")
        model.add_submodule(thresholded_path, Thresholded(site.v_threshold, dtype))
        with model.graph.inserting_after(node):
            thresholded = model.graph.call_module(thresholded_path, (node,))
        node.replace_all_uses_with(thresholded, delete_user_cb=lambda user: user in others)
    model.set_submodule(path, FrozenSite(site, binary=True, uint8=True))


def _fold_threshold(model: fx.GraphModule, node: fx.Node, site: SpikingSite, flat: IsFlat) -> bool:
    """Take the θ of a site into the layers that read it, where they are all that does; return whether it was so."""
    layers = None if isinstance(site.neuron.granularity, PerStep) else _readers(node)
    if layers is None or not all(_scalable(site, *layer, flat) for layer in layers):
        return False
    for layer, flattened in dict.fromkeys(layers):  # a gate reads the site in two places
        _scale(model, layer, site.v_threshold, flattened)
    return True


def _readers(node: fx.Node, flattened: bool = False) -> list[tuple[fx.Node, bool]] | None:
    """Return the weighted layers that read a site, and whether its output is flattened before; None if others do."""
    found: list[tuple[fx.Node, bool]] = []
    for user in node.users:
        module = module_of(user)
        if type(module) in SYNAPSE_MODULES:
            found.append((user, flattened))
            continue
        flattens = _flattens(user)
        passes = flattens or type(module) in _PASSING or user.target in _PASSING or kind_of(user) is Kind.MAXPOOL
        behind = _readers(user, flattened or flattens) if passes else None
        if behind is None:
            return None
        found += behind
    return found or None


def _flattens(node: fx.Node) -> bool:
    """Whether a node makes [N, C·F] of [N, C, *F]."""
    module = module_of(node)
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    axes = argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1)
    return node.target in (torch.flatten, "flatten") and axes == (1, -1)


def _scalable(site: SpikingSite, layer: fx.Node, flattened: bool, flat: IsFlat) -> bool:
    """Whether a layer can take the θ of a site into its weights."""
    module: Any = module_of(layer)
    if sum(other.target == layer.target for other in layer.graph.nodes) > 1 or module._forward_pre_hooks:
        return False
    if site.v_threshold.numel() == 1:
        return True
    channels = len(site.v_threshold)
    if not isinstance(module, nn.Linear):
        return not flattened and bool(module.in_channels == channels)
    if flattened:
        return bool(module.in_features % channels == 0)
    return bool(module.in_features == channels) and flat(signal_input(layer))


def _scale(model: fx.GraphModule, layer: fx.Node, theta: Tensor, flattened: bool) -> None:
    """W' = W θ, for each input channel."""
    module: Any = copy.deepcopy(module_of(layer))
    weight = module.weight
    if theta.numel() > 1:
        if flattened:
            theta = theta.repeat_interleave(module.in_features // len(theta))
        elif isinstance(module, TRANSPOSED):
            theta = theta.reshape(-1, *[1] * (weight.ndim - 1))
        elif not isinstance(module, nn.Linear):
            groups = theta.reshape(module.groups, 1, -1).expand(-1, module.out_channels // module.groups, -1)
            theta = groups.reshape(module.out_channels, -1, *[1] * (weight.ndim - 2))
    scaled = weight.double() * theta.double()
    module.weight = nn.Parameter(scaled.to(weight.dtype), requires_grad=False)
    model.set_submodule(str(layer.target), module)
