"""Untrained networks: BatchNorm needs statistics before thresholds can be found."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .batches import split


def with_statistics(ann: nn.Module, batches: Sequence[Any]) -> nn.Module:
    """Return the ANN, with statistics in BatchNorm layers that have never seen a batch.

    An untrained network normalises by mean 0 and variance 1 in eval mode and by the batch in train mode, so thresholds
    that were found in the one would not fit the other.

    Args:
        ann: not changed; returned as it is if it has no such layer.
        batches: to take the statistics from.
    """
    if not any(map(_is_fresh, ann.modules())):
        return ann
    network = copy.deepcopy(ann).eval()
    layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm) and _is_fresh(layer)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = None  # a plain mean over the batches
        layer.train()
    with torch.no_grad():
        for batch in batches:
            network(*split("finetune: train", batch, network)[0])
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    return network.eval()


def _is_fresh(layer: nn.Module) -> bool:
    """Whether a BatchNorm has the statistics that it was built with; weights of old files count no batches either."""
    if not isinstance(layer, _BatchNorm) or layer.num_batches_tracked is None or layer.running_mean is None:
        return False
    assert layer.running_var is not None
    as_built = not layer.running_mean.any() and bool((layer.running_var == 1).all())
    return as_built and int(layer.num_batches_tracked) == 0
