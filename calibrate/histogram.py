"""Streaming histograms of activations: constant memory, one pass, any loader."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import split_batch
from ..errors import CalibrationError
from ..structures import input_count

BINS = 1024
SMALLEST = 1e-30
"""Values up to here count as 0: the width of their bins would vanish in float32."""
CHUNK = 2**21  # values counted at a time: temporaries of some 40 MB


class Histogram:
    """Counts of max(x, 0) per channel in ``BINS`` equal bins from 0; the range doubles when it must.

    Attributes:
        counts: [C, BINS], how many values (or what probability) lie in each bin; zeros and negative
            values are in ``total`` only.
        width: [C], a channel's bin width, in the unit of the activation; 0 before the first positive value.
        total: number of values per channel.
        maximum: [C], exact.
    """

    def __init__(self, counts: Tensor, width: Tensor, total: float, maximum: Tensor) -> None:
        self.counts, self.width, self.total, self.maximum = counts, width, total, maximum

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> Histogram:
        """Return a histogram that has seen nothing."""
        zeros = torch.zeros(channels, device=device)
        return cls(torch.zeros(channels, BINS, device=device, dtype=torch.float64), zeros, 0.0, zeros.clone())

    def add(self, x: Tensor, upper: float = math.inf) -> None:
        """Count a batch.

        Args:
            x: pre-activations [N, C, *F].
            upper: larger values count as this one.

        Raises:
            CalibrationError: for NaN or infinite values.
        """
        channels, x = x.shape[1], x.detach()
        top = x.amax([axis for axis in range(x.ndim) if axis != 1]).float()
        if not (torch.isfinite(top).all() and torch.isfinite(x.amin())):
            raise CalibrationError("the activation has NaN or infinite values; expected finite ones. Check the data.")
        self._grow(top.clamp(0, upper))
        self.total += x.numel() // channels
        shape = (1, -1, *[1] * (x.ndim - 2))
        scale = torch.where(self.width > 0, 1 / self.width.clamp_min(1e-38), torch.zeros_like(self.width))
        first = torch.arange(channels, device=x.device) * (BINS + 1)  # each channel has a bin for what is not positive
        for part in x.split(max(1, CHUNK // x[0].numel())):
            values = part.float().clamp_max(upper) if upper < math.inf else part.float()
            index = (values * scale.reshape(shape)).ceil_().clamp_(0, BINS).long().add_(first.reshape(shape))
            counted = torch.bincount(index.flatten(), minlength=channels * (BINS + 1))
            self.counts += counted.reshape(channels, BINS + 1)[:, 1:]

    def _grow(self, top: Tensor) -> None:
        """Make every channel's range reach ``top`` by doubling, which merges pairs of bins exactly."""
        self.maximum = torch.maximum(self.maximum, top)
        top = torch.where(top > SMALLEST, top, 0)
        fresh = (self.width == 0) & (top > 0)
        self.width = torch.where(fresh, top / BINS, self.width)
        while (short := top > self.width * BINS * (1 + 1e-6)).any():
            merged = self.counts[short].reshape(-1, BINS // 2, 2).sum(2)
            self.counts[short] = torch.cat([merged, torch.zeros_like(merged)], 1)
            self.width = torch.where(short, self.width * 2, self.width)

    def centers(self) -> Tensor:
        """Return the middle of every bin, [C, BINS]."""
        return (torch.arange(BINS, device=self.width.device, dtype=self.width.dtype) + 0.5) * self.width[:, None]

    def merged(self) -> Histogram:
        """Return one histogram [1, BINS] of all channels; values move by at most half a bin."""
        width = self.width.max().reshape(1)
        result = Histogram.empty(1, self.width.device)
        result.width, result.total = width, self.total * len(self.width)
        result.maximum = self.maximum.max().reshape(1)
        if width > 0:
            index = (self.centers() / width).long().clamp_(max=BINS - 1)
            result.counts[0].scatter_add_(0, index.flatten(), self.counts.flatten())
        return result


def observe(model: nn.Module, bounds: Mapping[str, float], batches: Iterable[Any]) -> tuple[dict[str, Histogram], int]:
    """Run ``model`` over the data and count what each activation receives.

    Args:
        model: a prepared network.
        bounds: its activations to watch, and the largest value that each gives.
        batches: tensors [N, *F], or tuples that begin with one for each input.

    Returns:
        A histogram for each path, and the number of samples seen.

    Raises:
        ArgumentError: for batches of another form.
        CalibrationError: for values that are not finite, with the activation's path, or without any sample.
    """
    histograms: dict[str, Histogram] = {}

    def watch(path: str, x: Tensor) -> None:
        if path not in histograms:
            histograms[path] = Histogram.empty(x.shape[1], x.device)
        try:
            histograms[path].add(x, bounds[path])
        except CalibrationError as error:
            raise CalibrationError(f"{path}: {error}") from None

    samples = 0
    parameter = next(model.parameters(), torch.empty(()))
    with ExitStack() as stack, torch.no_grad():
        for path in bounds:
            handle = model.get_submodule(path).register_forward_pre_hook(
                lambda _module, args, path=path: watch(path, args[0])
            )
            stack.callback(handle.remove)
        count = input_count(model)
        for batch in batches:
            inputs, _ = split_batch("calibrate: data", batch, count)
            model(*(x.to(parameter) for x in inputs))
            samples += len(inputs[0])
    if samples == 0:
        raise CalibrationError("the calibration data gave no batch; expected at least one sample. Check the data set.")
    return histograms, samples
