"""Normalisation over time as a conversion option: BatchNorm as it is, tdBN or TEBN."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from ..errors import ArgumentError
from ..normalisation import StepScale, ThresholdScale
from ..op_table import BATCHNORM_MODULES, Kind
from ..ops import kind_of, module_of, signal_operands
from ..records import Calibration
from ..spiking import SpikingSite
from ..time_axis import TimeAxis, Timed
from .paths import unique_path


@dataclass(frozen=True)
class PlainBatchNorm:
    """BatchNorm as the ANN has it. Behind neurons it sees all T·N samples of a call together."""


@dataclass(frozen=True)
class TEBN:
    """Temporal effective BatchNorm (Duan et al., NeurIPS 2022): y[t] = p[t] (γ (x[t] − E x)/√(Var x + ε) + β).

    E and Var are over all steps of a call together; p, one number for each step and layer, learns from 1. So the
    network is the same function at the start.
    """


@dataclass(frozen=True)
class TdBN:
    """Threshold-dependent BatchNorm (Zheng et al., AAAI 2021): y = s (γ (x − E x)/√(Var x + ε) + β) with s = α θ.

    E and Var are over all steps of a call together, θ is the one that calibration found for the neurons that read y,
    and α is divided by √2 where a residual sum comes in between, all as in the paper, but that s does not multiply β
    there. In an untrained layer γ stays 1, and currents begin with a deviation of α θ. In a trained one γ and β are
    divided by s: the network is the same function at the start, and its gains learn in units of s.

    Attributes:
        alpha: α.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ArgumentError(f"TdBN: alpha is {self.alpha}; expected a finite number above 0, such as 1.")


Normalisation = PlainBatchNorm | TEBN | TdBN

NORMALISATIONS: Mapping[str, Normalisation] = MappingProxyType(
    {"plain": PlainBatchNorm(), "tebn": TEBN(), "tdbn": TdBN()}
)
"""The types by the names that the command line gives them."""


def place_norms(
    model: fx.GraphModule, time: TimeAxis, norm: Normalisation, timed: set[fx.Node], calibration: Calibration
) -> None:
    """Put the scale of TEBN or tdBN behind every BatchNorm that runs on single steps and is called once.

    Args:
        model: the spiking network, sites in place.
        time: its time axis.
        norm: which scale; ``PlainBatchNorm()`` changes nothing.
        timed: the nodes that run on single steps.
        calibration: θ of the sites.
    """
    if isinstance(norm, PlainBatchNorm):
        return
    calls = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
    for node in list(model.graph.nodes):
        if node not in timed or not _is_batch_norm(node) or calls.count(str(node.target)) > 1:
            continue
        scale = StepScale(time) if isinstance(norm, TEBN) else _threshold_scale(model, time, norm, node, calibration)
        if scale is None:
            continue
        layer: Any = module_of(node)
        path = unique_path(model, f"time.{str(node.target).replace('.', '_')}")
        users = list(node.users)
        model.add_submodule(path, scale.to(layer.running_var.device))
        with model.graph.inserting_after(node):
            scaled = model.graph.call_module(path, (node,))
        for user in users:
            user.replace_input_with(node, scaled)


def _is_batch_norm(node: fx.Node) -> bool:
    return type(module_of(node)) in BATCHNORM_MODULES


def _threshold_scale(
    model: fx.GraphModule, time: TimeAxis, norm: TdBN, node: fx.Node, calibration: Calibration
) -> Timed | None:
    """Return the scale behind a BatchNorm, whose gains it takes; None where no neurons read it, or it has no gains."""
    found = _reader(node)
    layer: Any = module_of(node)
    if found is None or layer.weight is None:
        return None
    path, summed = found
    theta = calibration.v_threshold[path]
    scale = norm.alpha * (theta if theta.numel() == layer.num_features else theta.mean())
    scale = (scale / math.sqrt(2) if summed else scale).to(layer.weight.device)
    with torch.no_grad():
        if not (bool((layer.weight == 1).all()) and bool((layer.bias == 0).all())):
            layer.weight.div_(scale)
            layer.bias.div_(scale)
    return ThresholdScale(time, scale)


def _reader(node: fx.Node) -> tuple[str, bool] | None:
    """Return the path of the first site behind a node, through sums and pools, and whether a sum is in between."""
    pending = [(user, False) for user in node.users]
    while pending:
        user, summed = pending.pop(0)
        if isinstance(module_of(user), SpikingSite):
            return str(user.target), summed
        kind = kind_of(user)
        if kind is Kind.AFFINE or kind is Kind.MAXPOOL:
            pending += [(after, summed or len(signal_operands(user)) > 1) for after in user.users]
    return None


def norm_notices(snn: fx.GraphModule, norm: Normalisation) -> Iterator[str]:
    """Say how many BatchNorm layers got a scale, and which kept to themselves."""
    if isinstance(norm, PlainBatchNorm):
        return
    layers = [node for node in snn.graph.nodes if _is_batch_norm(node)]
    plain = [
        str(node.target)
        for node in layers
        if not any(isinstance(module_of(user), StepScale | ThresholdScale) for user in node.users)
    ]
    name = "TEBN" if isinstance(norm, TEBN) else "tdBN"
    rest = ""
    if plain:
        stayed = f"{', '.join(dict.fromkeys(plain))} stayed as {'it is' if len(plain) == 1 else 'they are'}"
        rest = f"; {stayed}: constant in time, called more than once, or read by no neuron"
    yield f"{len(layers) - len(plain)} BatchNorm layers became {name}{rest}."
