"""Shelf: what nodes give for all samples, in memory up to a limit and in files beyond it."""

from __future__ import annotations

import os
import tempfile
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import CalibrationError

IN_MEMORY = 2**31  # bytes
WORTH_A_FILE = 2**20


class Shelf:
    """Holds tensors; those for which no memory is left are mapped files that nobody else sees.

    Args:
        limit: how many bytes stay in memory.
    """

    def __init__(self, limit: int = IN_MEMORY) -> None:
        self.limit = limit
        self.held = 0

    def keep(self, value: Any) -> Any:
        """Return ``value``, or the same with tensors whose data lie in files. What is no longer used is freed.

        Tensors on other devices than the CPU, expanded and small ones stay where they are.

        Raises:
            CalibrationError: if the disk is full.
        """
        return pytree.tree_map_only(Tensor, self._kept, value)

    def _kept(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        if tensor.device.type != "cpu" or 0 in tensor.stride() or size < WORTH_A_FILE:
            return tensor
        if self.held + size > self.limit:
            return _in_a_file(tensor)
        self.held += size
        weakref.finalize(tensor, self._freed, size)
        return tensor

    def _freed(self, size: int) -> None:
        self.held -= size


def _in_a_file(tensor: Tensor) -> Tensor:
    """Return a copy whose data lie in a file, in the order of ``tensor`` where its values lie side by side."""
    last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    stride = tensor.stride() if last else torch.empty(tensor.shape, device="meta").stride()
    size = tensor.numel() * tensor.element_size()
    handle, path = tempfile.mkstemp(prefix="lmh-")
    try:
        if hasattr(os, "posix_fallocate"):  # a full disk shows here, not as a crash when a page is written
            os.posix_fallocate(handle, 0, size)
        copy = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    except OSError as error:
        raise CalibrationError(
            f"calibration: {size / 1e6:.0f} MB of activations do not fit into {tempfile.gettempdir()} "
            f"({error.strerror}); expected room for what a layer gives for all samples and steps. Free some, set "
            "TMPDIR to a larger disk, or take fewer samples (--calibration-samples)."
        ) from error
    finally:
        os.close(handle)
        with suppress(PermissionError):  # where a mapped file cannot be removed it stays until the process ends
            os.unlink(path)
    return copy.as_strided(tensor.shape, stride).copy_(tensor)
