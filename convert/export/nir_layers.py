"""What a weighted layer or BatchNorm of torch says, as NIR's nodes take it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ...ops import argument
from .nir_values import Array, NoNodeError


def normalisation(module: Any) -> tuple[Array, Array]:
    """Return the factor and the constant of each channel that a BatchNorm applies with eval statistics, [C] each.

    Raises:
        NoNodeError: if it has no running statistics.
    """
    if module.running_mean is None:
        raise NoNodeError("normalises by its batch, which no NIR node does")
    scale = torch.rsqrt(module.running_var.double() + module.eps)
    scale = scale if module.weight is None else scale * module.weight.double()
    shift = -module.running_mean.double() * scale
    shift = shift if module.bias is None else shift + module.bias.double()
    return scale.detach().numpy(), shift.detach().numpy()


def conv_options(node: fx.Node, module: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Return stride, padding, dilation and groups of a convolution over one or two axes, module or function.

    Raises:
        NoNodeError: if it is another, or pads in a way that NIR does not.
    """
    kinds = {nn.Conv1d: 1, nn.Conv2d: 2, F.conv1d: 1, F.conv2d: 2}
    axes = kinds.get(type(module) if module is not None else node.target)
    if axes is None or getattr(module, "padding_mode", "zeros") != "zeros":
        raise NoNodeError("has no NIR node")
    names = (("stride", 3, 1), ("padding", 4, 0), ("dilation", 5, 1), ("groups", 6, 1))
    stride, padding, dilation, groups = (
        getattr(module, name) if module is not None else argument(node, position, name, default)
        for name, position, default in names
    )
    stride, dilation = (item if isinstance(item, tuple | list) else (item,) * axes for item in (stride, dilation))
    if padding == "same":
        weight = module.weight if module is not None else None
        reach = [] if weight is None else [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if not reach or any(size % 2 for size in reach):
            raise NoNodeError("pads both ends differently (padding='same'), which NIR's convolutions do not")
        padding = tuple(size // 2 for size in reach)
    padding = (0,) * axes if padding == "valid" else padding
    padding = padding if isinstance(padding, tuple | list) else (padding,) * axes
    return tuple(stride), tuple(padding), tuple(dilation), int(groups)
