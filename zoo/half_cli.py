"""``lmh zoo publish --half``: weights of convolutions and linear layers in float16, where no accuracy changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifact import read_tensors, write_tensors
from ..terminal import Terminal
from .cache import SUFFIX
from .data import check_kind_of_data, load_data
from .images import Batches
from .model_cards import ModelCard, SpikingCard
from .releases import card_of_file

UNCHANGED = 0.0005
"""Accuracies that differ by no more, 0.05 points, count as the same."""


def in_half(card: ModelCard, path: Path, folder: Path, data: str, terminal: Terminal) -> tuple[ModelCard, Path]:
    """Return a model in float16 with its card, or both as they came where that changes an accuracy.

    Both are measured here, as a quantised network's accuracy differs a little from CPU to CPU.

    Args:
        card: of the file.
        path: of the file.
        folder: for the smaller file.
        data: SPEC of the data set whose test split is measured on.
        terminal: says what was done.
    """
    small = folder / f"{card.name}{SUFFIX}"
    tensors, metadata = read_tensors(path)
    halves = {name: halved(name, tensor) for name, tensor in tensors.items()}
    write_tensors(small, halves, metadata)
    if isinstance(card, SpikingCard):
        before, measured = (measured_snn(file, data, terminal) for file in (path, small))
        was, now = before["snn_accuracy"], measured["snn_accuracy"]
    else:
        measured = None
        (was, _), (now, samples) = (_of_ann(card, file, data) for file in (path, small))
        record = {**metadata["record"], "accuracy": now, "test_samples": samples}
        write_tensors(small, halves, {**metadata, "record": record})
        was, now = [was], [now]
    words = f"accuracy {_percent(now)} % in float16 and {_percent(was)} % in float32"
    if max(abs(one - other) for one, other in zip(was, now, strict=True)) > UNCHANGED:
        terminal.notice(f"{card.name}: stays in float32; {words}.")
        return card, path
    terminal.notice(f"{card.name}: {words}; {small.stat().st_size:,} bytes instead of {path.stat().st_size:,}.")
    found = card_of_file(card.name, small, licence=card.licence, measured=measured)
    weights = replace(found.weights, location=card.weights.location)
    card = replace(card, weights=weights, samples=found.samples)
    if isinstance(card, SpikingCard) and isinstance(found, SpikingCard):
        return replace(card, accuracy=found.accuracy, firing_rate=found.firing_rate, energy=found.energy), small
    return replace(card, ann_accuracy=found.ann_accuracy), small


def halved(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of a state_dict in float16 if it is a layer's weight and has no value beyond float16's.

    What neurons and normalisations have stays as it is.

    >>> halved("fc.weight", torch.ones(2, 2)).dtype, halved("bn.weight", torch.ones(2)).dtype
    (torch.float16, torch.float32)
    """
    small = tensor.half()
    weight = name.rpartition(".")[2] == "weight" and tensor.ndim > 1 and tensor.dtype == torch.float32
    return small if weight and bool(small.isfinite().all()) else tensor


def measured_snn(file: Path, data: str, terminal: Terminal) -> dict[str, Any]:
    """Return what ``lmh report --json`` prints of a spiking network."""
    from ..convert.report_cli import Request, report

    return report(Request(str(file), data), terminal)


def _of_ann(card: ModelCard, file: Path, data: str) -> tuple[float, int]:
    """Return the accuracy of an ANN on the test split, and the number of its images."""
    from ..convert.loading import load_source
    from ..finetune.trainer import accuracy

    check_kind_of_data(data, card.preprocessing)
    test = load_data(data, input_size=card.preprocessing.input_size).test
    return accuracy(load_source(str(file), arch=card.architecture).model, Batches(test, card.preprocessing)), len(test)


def _percent(values: list[float]) -> str:
    return " / ".join(f"{100 * value:.2f}" for value in values)
