"""Fine-tuning: STBP through all T steps of a converted network.

Strategies will be types of their own beside :class:`Schedule`; plain STBP is what runs here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..arguments import check_kind, check_network
from ..time_axis import time_axis
from .losses import TET, CrossEntropy, Distillation
from .trainer import EpochBatches, EpochResult, OnBatch, OnEpoch, Schedule, fit

__all__ = ["TET", "CrossEntropy", "Distillation", "EpochResult", "Schedule", "finetune", "fit"]


def finetune(
    snn: nn.Module,
    train: EpochBatches | Iterable[Any],
    val: Iterable[Any] | None = None,
    *,
    epochs: int | None = None,
    schedule: Schedule | None = None,
    teacher: nn.Module | None = None,
    checkpoint: str | Path | None = None,
    on_batch: OnBatch | None = None,
    on_epoch: OnEpoch | None = None,
) -> list[EpochResult]:
    """Fine-tune a converted network in place by STBP: all weights, θ, v_init, λ and μ learn through all T steps.

    Args:
        snn: from :func:`lmh.convert.convert` or :func:`lmh.convert.load`.
        train: training batches (x, y), or x alone with a teacher; a DataLoader or :class:`lmh.zoo.Batches`.
        val: batches to measure after each epoch.
        epochs: short for ``Schedule(epochs=…)``, or on top of ``schedule``; 10 if neither is given.
        schedule: learning rates, loss and the rest.
        teacher: the source ANN, whose outputs are then distilled.
        checkpoint: file to write after each epoch and to resume from.
        on_batch: told (epoch, batch, loss).
        on_epoch: told of each epoch that ends.

    Returns:
        One result for each epoch.

    Raises:
        ArgumentError: if ``snn`` has no spiking sites, or an argument is of a wrong type.
        TrainingError: as :func:`fit`.

    >>> import torch
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from lmh.convert import convert
    >>> x, y = torch.rand(64, 4), torch.randint(2, (64,))
    >>> ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> snn = convert(ann, timesteps=4, data=x).snn
    >>> loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    >>> history = finetune(snn, loader, epochs=2, teacher=ann)
    >>> [result.epoch for result in history], history[1].loss < history[0].loss
    ([0, 1], True)
    """
    check_network("finetune: snn", snn)
    time_axis(snn)
    if schedule is not None:
        check_kind("finetune: schedule", schedule, Schedule, "Schedule(epochs=10)")
    if schedule is None:
        schedule = Schedule(epochs=10 if epochs is None else epochs)
    elif epochs is not None:
        schedule = replace(schedule, epochs=epochs)
    return fit(snn, train, val, schedule, teacher=teacher, checkpoint=checkpoint, on_batch=on_batch, on_epoch=on_epoch)
