"""Sampling: rows of values at the same random places of every tensor that a layer or a site reads and gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def places(shapes: Sequence[Sequence[int]], rows: int, axis: int = 1) -> list[Tensor]:
    """Choose positions at random, the same number in every sample, about ``rows`` in all; always the same ones.

    Args:
        shapes: of each batch, [N, C, *F], or [N, *F, C] with ``axis`` −1.
        rows: how many positions to take over all samples.
        axis: where channels lie.

    Returns:
        For each batch [N, q], positions in the flattened *F.
    """
    generator = torch.Generator().manual_seed(0)
    samples = sum(shape[0] for shape in shapes)
    sizes = [math.prod(shape[1:]) // shape[axis] for shape in shapes]
    return [
        torch.rand(shape[0], size, generator=generator).argsort(1)[:, : max(1, rows // samples)]
        for shape, size in zip(shapes, sizes, strict=True)
    ]


def values_at(x: Tensor, where: Tensor, axis: int = 1) -> Tensor:
    """Return the values of [N, C, *F] at positions [N, q] as rows [N·q, C]."""
    flat = x.movedim(axis, 1).flatten(2) if x.ndim > 2 else x[..., None]
    index = where.to(x.device)[:, None].expand(-1, flat.shape[1], -1)
    return flat.gather(2, index).movedim(1, 2).flatten(0, 1)


def receptive_fields(module: nn.Module, x: Tensor, where: Tensor) -> Tensor:
    """Return what a weighted sum multiplies with its weights at positions [N, q] of its output.

    Args:
        module: a linear layer or a convolution.
        x: its input, [N, C, *F], or [N, *F, C] for a linear layer.
        where: from :func:`places` for its output.

    Returns:
        [N·q, groups, D], D = C/groups · kernel size: the dot product with the flattened weights is the output.
    """
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return values_at(x, where, -1)[:, None]
    x = _padded(module, x)
    for axis, size in enumerate(module.kernel_size):
        spread = module.dilation[axis]
        x = x.unfold(2 + axis, spread * (size - 1) + 1, module.stride[axis])[..., ::spread]
    positions = torch.unravel_index(where.flatten().to(x.device), x.shape[2 : 2 + len(module.kernel_size)])
    sample = torch.arange(len(x), device=x.device).repeat_interleave(where.shape[1])
    index: tuple[Any, ...] = (sample, slice(None), *positions)
    fields = x[index]
    return fields.reshape(len(fields), module.groups, -1)


def _padded(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    sides: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        total = module.dilation[axis] * (module.kernel_size[axis] - 1)
        match module.padding:
            case "same":
                sides += [total // 2, total - total // 2]
            case "valid":
                sides += [0, 0]
            case padding:
                sides += [int(padding[axis])] * 2
    return F.pad(x, sides, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
