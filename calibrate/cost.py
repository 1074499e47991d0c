"""What corrections cost, estimated before they begin from one run of the ANN."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..records import Prepared
from .regression import LARGEST, REGRESSABLE, WeightRegression

LIVE = 8
"""Tensors of the largest activation's size, one for each step, that a sample keeps alive; measured on ResNets."""


@dataclass(frozen=True)
class Cost:
    """An estimate, right to a factor of two or so.

    Attributes:
        operations: additions and multiplications.
        memory: bytes, on top of the network's.
    """

    operations: float
    memory: float


def correction_cost(prepared: Prepared, inputs: Sequence[Tensor], samples: int, timesteps: int) -> Cost:
    """Estimate what :class:`WeightRegression` and what comes with it cost.

    A layer with d inputs for each output solves least squares on r rows, each product twice: 4 r d². Beside that, ANN
    and spiking network run twice.

    Args:
        prepared: the ANN.
        inputs: one sample of each input, [1, *F].
        samples: N.
        timesteps: T.

    >>> from lmh.convert import prepare
    >>> prepared = prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), sample_shape=(4,))
    >>> correction_cost(prepared, [torch.zeros(1, 4)], 16, 2).memory
    8192.0
    """
    solved, multiplied, largest = 0.0, 0.0, 0

    def note(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal solved, multiplied, largest
        if not isinstance(output, Tensor):
            return
        largest = max(largest, output.numel())
        if isinstance(module, REGRESSABLE):
            width = module.weight[0].numel()
            solved += 4.0 * min(WeightRegression.rows, LARGEST // width) * width**2
            multiplied += 2.0 * output.numel() * width

    model = prepared.model
    with ExitStack() as stack, torch.no_grad():
        for module in model.modules():
            if not any(module.children()):
                stack.callback(module.register_forward_hook(note).remove)
        model(*inputs)
    return Cost(solved + 2 * samples * (1 + timesteps) * multiplied, 4.0 * LIVE * largest * timesteps * samples)
