"""What BatchNorm normalises by while a network trains, as a type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ArgumentError


@dataclass(frozen=True)
class LiveBatchNorm:
    """By the statistics of the batch, each process by its own share of it."""


@dataclass(frozen=True)
class FrozenBatchNorm:
    """By the statistics that the network came with, which stay; gain and bias learn."""


@dataclass(frozen=True)
class SyncedBatchNorm:
    """By the statistics of the batch over all processes; on GPUs alone, as torch has it for no other device."""


BatchNormMode = LiveBatchNorm | FrozenBatchNorm | SyncedBatchNorm


def check_batch_norm(mode: BatchNormMode, device: torch.device) -> None:
    """Refuse what the device cannot do.

    Raises:
        ArgumentError: saying what to use.
    """
    if isinstance(mode, SyncedBatchNorm) and device.type != "cuda":
        raise ArgumentError(
            f"SyncedBatchNorm: the network is on {device.type}, where torch has no synchronised BatchNorm; expected "
            "CUDA. Use LiveBatchNorm(), on the command line --batch-norm live."
        )


def set_modes(model: nn.Module, mode: BatchNormMode) -> None:
    """Put a network into train mode, with BatchNorm as asked."""
    model.train()
    if isinstance(mode, FrozenBatchNorm):
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


@contextmanager
def synchronised(model: nn.Module, mode: BatchNormMode) -> Iterator[None]:
    """Let every BatchNorm be ``torch.nn.SyncBatchNorm`` inside this block, with the same parameters and buffers."""
    if not isinstance(mode, SyncedBatchNorm):
        yield
        return
    originals = {path: module for path, module in model.named_modules() if path and isinstance(module, _BatchNorm)}
    for path, original in originals.items():
        model.set_submodule(path, nn.SyncBatchNorm.convert_sync_batchnorm(original))
    try:
        yield
    finally:
        for path, original in originals.items():
            stand_in = model.get_submodule(path)
            original.load_state_dict(stand_in.state_dict())
            model.set_submodule(path, original)
