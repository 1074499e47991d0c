"""Mean and variance of every activation from BatchNorm's parameters alone, without data.

Behind a BatchNorm, channel c has mean bias_c and variance weight_c². From there both are carried forward,
with values taken as independent and normal: through sums (they add), concat, linear nodes (weights, and
weights squared), average pools (mean kept, variance kept, as neighbours are alike), max-pools (moments of
the largest of k normal values) and activations (moments of the rectified normal).
"""

from __future__ import annotations

import math
import operator
import sys
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..op_table import (
    ADDITIONS,
    AVGPOOL_MODULES,
    BATCHNORM_MODULES,
    CASTS,
    DROPOUT_FUNCTIONS,
    DROPOUT_MODULES,
    INSTANCENORM_MODULES,
    MAXPOOL_MODULES,
    PAD_MODULES,
    PRODUCTS,
    QUOTIENTS,
    SYNAPSE_MODULES,
    UPSAMPLE_MODULES,
    Kind,
)
from ..ops import argument, kind_of, module_of
from ..records import Prepared, Spike
from ..shapes import node_values
from ..structures import batched
from .histogram import BINS, Histogram


class Moments(NamedTuple):
    """Mean and variance per channel, both [C]."""

    mean: Tensor
    variance: Tensor


def predicted_histograms(prepared: Prepared) -> tuple[dict[str, Histogram], list[str]]:
    """Return a histogram for every spiking activation whose statistics are known, and the other paths."""
    values = node_values(prepared.model, batched(prepared.sample_shape, 2))
    moments: dict[fx.Node, Moments | None] = {}
    known: dict[str, Histogram] = {}
    unknown: list[str] = []
    for node in prepared.model.graph.nodes:
        moments[node] = _carry(node, moments, values)
        if node.target in prepared.spiking:
            before = moments[node.all_input_nodes[0]]
            if before is None:
                unknown.append(str(node.target))
            else:
                decision = prepared.activations[str(node.target)]
                known[str(node.target)] = normal_histogram(
                    before, decision.upper if isinstance(decision, Spike) else math.inf
                )
    return known, unknown


def normal_histogram(moments: Moments, upper: float = math.inf) -> Histogram:
    """Return the positive part of a normal distribution as a histogram that reaches mean + 4 deviations.

    What lies above ``upper``, which the activation cuts off, counts in the last bin.
    """
    mean, deviation = moments.mean.double(), moments.variance.double().clamp_min(1e-12).sqrt()
    maximum = (mean + 4 * deviation).clamp(0, upper)
    result = Histogram.empty(len(mean), mean.device)
    result.width = (maximum / BINS).float()
    result.maximum = maximum.float()
    result.total = 1.0
    edges = torch.arange(BINS + 1, device=mean.device) * (maximum / BINS)[:, None]
    mass = torch.special.ndtr((edges - mean[:, None]) / deviation[:, None])
    result.counts = mass.diff(dim=1)
    result.counts[:, -1] += torch.where(maximum > 0, 1 - mass[:, -1], 0.0)
    return result


def rectified(moments: Moments) -> Moments:
    """Mean and variance of max(X, 0) for a normal X: μΦ(z) + σφ(z) and E[X₊²] − mean², z = μ/σ."""
    mean, deviation = moments.mean, moments.variance.clamp_min(1e-12).sqrt()
    z = mean / deviation
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    mass = torch.special.ndtr(z)
    first = mean * mass + deviation * density
    second = (mean * mean + moments.variance) * mass + mean * deviation * density
    return Moments(first, (second - first * first).clamp_min(0))


@lru_cache
def largest_of(count: int) -> tuple[float, float]:
    """Mean and variance of the largest of ``count`` independent standard normal values, by quadrature."""
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    mass = torch.special.ndtr(x) ** count
    weight, middle = mass.diff(), (x[1:] + x[:-1]) / 2
    mean = float((weight * middle).sum())
    return mean, float((weight * middle**2).sum()) - mean * mean


def _carry(node: fx.Node, moments: dict[fx.Node, Moments | None], values: dict[fx.Node, Any]) -> Moments | None:
    module = module_of(node)
    if module is not None and _is_running_norm(module):
        return _batchnorm(module)
    inputs = [moments[source] for source in node.all_input_nodes if kind_of(source) is not Kind.SIZE]
    known = [entry for entry in inputs if entry is not None]
    if not known or len(known) != len(inputs):
        return None
    shape = getattr(values[node], "shape", ())
    match kind_of(node):
        case Kind.ACTIVATION:
            return rectified(known[0])
        case Kind.SYNAPSE if isinstance(module, SYNAPSE_MODULES):
            return _weighted(module, known[0])
        case Kind.MAXPOOL:
            mean, variance = largest_of(_window(node, values))
            deviation = known[0].variance.sqrt()
            return Moments(known[0].mean + mean * deviation, known[0].variance * variance)
        case Kind.AFFINE if node.target in _ARITHMETIC:
            return _arithmetic(node, moments)
        case Kind.AFFINE | Kind.SHAPE if node.target is F.pad:
            return _padded(node, known[0], len(shape))
        case Kind.AFFINE | Kind.SHAPE if _keeps_channels(node):
            return _moved(node, known, shape)
    return None


_SUBTRACTS = {operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_", "subtract"}
_NEGATES = {operator.neg, torch.neg, torch.negative, "neg", "negative"}
_ARITHMETIC: set[Any] = {*_NEGATES, *ADDITIONS, *_SUBTRACTS, *PRODUCTS}
_FLATTENS: set[Any] = {torch.flatten, torch.reshape, "flatten", "view", "reshape"}
_KEEPS_CHANNELS: set[Any] = {
    torch.cat, torch.concat, torch.concatenate, torch.mean, "mean", F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
    F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.interpolate, torch.clone, torch.detach,
    "clone", "detach", "contiguous", "cpu", "cuda", *CASTS, *DROPOUT_FUNCTIONS, *_FLATTENS,
}  # fmt: skip
_KEEPS_CHANNELS_MODULES = (
    *AVGPOOL_MODULES, *MAXPOOL_MODULES, *PAD_MODULES, *UPSAMPLE_MODULES, *DROPOUT_MODULES, nn.Identity, nn.Flatten,
)  # fmt: skip


def _is_running_norm(module: nn.Module) -> bool:
    """Whether ``module`` normalises by statistics from training."""
    norms = (*BATCHNORM_MODULES, *INSTANCENORM_MODULES)
    return isinstance(module, norms) or _is_torchvisions(module, "FrozenBatchNorm2d")


def _is_torchvisions(module: nn.Module | None, name: str) -> bool:
    """Whether ``module`` is of torchvision.ops' type ``name``; without torchvision none is."""
    ops = sys.modules.get("torchvision.ops")
    return ops is not None and isinstance(module, getattr(ops, name))


def _keeps_channels(node: fx.Node) -> bool:
    """Whether axis 1 of the result holds the channels of the input, in their order, or all of them flattened."""
    module = module_of(node)
    if module is not None:
        return isinstance(module, _KEEPS_CHANNELS_MODULES) or _is_torchvisions(module, "StochasticDepth")
    if node.target is operator.getitem:
        parts = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(isinstance(part, slice) or part is Ellipsis for part in parts)
    return node.target in _KEEPS_CHANNELS


def _arithmetic(node: fx.Node, moments: dict[fx.Node, Moments | None]) -> Moments | None:
    """Carry moments through +, −, ×, ÷ and negation of signals and plain numbers."""
    if node.target in _NEGATES:
        entry = moments[node.all_input_nodes[0]]
        return None if entry is None else Moments(-entry.mean, entry.variance)
    if len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
        return None
    a, b = (moments[arg] if isinstance(arg, fx.Node) else arg for arg in node.args)
    if isinstance(a, Moments) and isinstance(b, Moments):
        if node.target not in ADDITIONS | _SUBTRACTS or len(a.mean) != len(b.mean):
            return None
        sign = 1 if node.target in ADDITIONS else -1
        return Moments(a.mean + sign * b.mean, a.variance + b.variance)
    signal, number = (a, b) if isinstance(a, Moments) else (b, a)
    if not isinstance(signal, Moments) or not isinstance(number, int | float):
        return None
    if node.target in ADDITIONS:
        return Moments(signal.mean + number, signal.variance)
    if node.target in _SUBTRACTS:
        return Moments(signal.mean - number if signal is a else number - signal.mean, signal.variance)
    factor = 1 / number if node.target in QUOTIENTS else number
    return Moments(signal.mean * factor, signal.variance * factor**2)


def _padded(node: fx.Node, before: Moments, ndim: int) -> Moments | None:
    """Carry moments through F.pad: new channels are 0, borders leave a channel's moments as they are."""
    pad = argument(node, 1, "pad")
    if not isinstance(pad, tuple | list) or argument(node, 3, "value") not in (None, 0, 0.0):
        return None
    first, last = pad[2 * (ndim - 2) : 2 * (ndim - 1)] or (0, 0)
    return Moments(*(nn.functional.pad(values, (first, last)) for values in before))


def _batchnorm(module: nn.Module) -> Moments | None:
    weight, bias = module.weight, module.bias
    if weight is None or bias is None:
        zeros = torch.zeros_like(module.running_mean) if module.running_mean is not None else None
        return None if zeros is None else Moments(zeros, torch.ones_like(zeros))
    return Moments(bias.detach(), weight.detach() ** 2)  # type: ignore[operator]


def _weighted(module: nn.Module, before: Moments) -> Moments | None:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    groups = int(getattr(module, "groups", 1))
    if "Transpose" in type(module).__name__:
        return None
    weight = weight.detach()
    kernel = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
    squared = (weight**2).flatten(2).sum(2) if weight.ndim > 2 else weight**2
    if len(before.mean) != kernel.shape[1] * groups:
        return None
    mean = _grouped(kernel, before.mean, groups)
    variance = _grouped(squared, before.variance, groups)
    return Moments(mean + bias.detach() if isinstance(bias, Tensor) else mean, variance)


def _grouped(matrix: Tensor, vector: Tensor, groups: int) -> Tensor:
    outputs = matrix.reshape(groups, -1, matrix.shape[1])
    return torch.einsum("goi,gi->go", outputs, vector.reshape(groups, -1)).flatten()


def _window(node: fx.Node, values: dict[fx.Node, Any]) -> int:
    before, after = values[node.all_input_nodes[0]], values[node]
    module = module_of(node)
    size = getattr(module, "kernel_size", None) if module is not None else argument(node, 1, "kernel_size")
    if isinstance(size, int):
        return size ** (before.ndim - 2)
    if isinstance(size, tuple):
        return math.prod(size)
    return max(1, round(before[0].numel() / after[0].numel()))


def _moved(node: fx.Node, known: list[Moments], shape: tuple[int, ...]) -> Moments | None:
    """Carry moments through pools, dropout, concat and flattening, where axis 1 tells what happened."""
    if isinstance(module_of(node), DROPOUT_MODULES):
        return known[0]
    if len(shape) < 2:
        return None
    mean, variance = (torch.cat([entry[i] for entry in known]) for i in (0, 1))
    if len(mean) == shape[1]:
        return Moments(mean, variance)
    flattens = node.target in _FLATTENS or isinstance(module_of(node), nn.Flatten)
    if flattens and len(known) == 1 and shape[1] % len(mean) == 0:
        repeats = shape[1] // len(mean)
        return Moments(mean.repeat_interleave(repeats), variance.repeat_interleave(repeats))
    return None
