"""A histogram of given values, as calibration fills it."""

from __future__ import annotations

import torch
from torch import Tensor

from lmh.calibrate.histogram import Histogram


def histogram_of(*batches: Tensor) -> Histogram:
    histogram = Histogram.empty(batches[0].shape[1], torch.device("cpu"))
    for batch in batches:
        histogram.add(batch)
    return histogram
