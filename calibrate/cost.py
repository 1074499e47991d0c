"""What corrections cost, estimated before they begin from one run of the ANN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..records import Prepared

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


def correction_cost(prepared: Prepared, inputs: Sequence[Tensor], samples: int, timesteps: int, rows: int) -> Cost:
    """Estimate what :class:`WeightRegression` and what comes with it cost.

    A layer with d inputs for each output solves least squares on so many rows, twice: 4 · rows · d². Beside that, ANN
    and spiking network run twice.

    Args:
        prepared: the ANN.
        inputs: one sample of each input, [1, *F].
        samples: N.
        timesteps: T.
        rows: of a regression, :attr:`WeightRegression.rows`.

    >>> from lmh.convert import prepare
    >>> prepared = prepare(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), sample_shape=(4,))
    >>> correction_cost(prepared, [torch.zeros(1, 4)], 16, 2, rows=1000)
    Cost(operations=329216.0, memory=8192.0)
    """
    solved, multiplied, largest = 0.0, 0.0, 0

    def note(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal solved, multiplied, largest
        if not isinstance(output, Tensor):
            return
        largest = max(largest, output.numel())
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim > 1:
            solved += 4.0 * rows * weight[0].numel() ** 2
            multiplied += 2.0 * output.numel() * weight[0].numel()

    model = prepared.model
    handles = [module.register_forward_hook(note) for module in model.modules() if not any(module.children())]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Cost(solved + 2 * samples * (1 + timesteps) * multiplied, 4.0 * LIVE * largest * timesteps * samples)
