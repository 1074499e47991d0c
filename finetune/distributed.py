"""Several processes that train one network: each takes its share of every batch (torchrun, DistributedDataParallel)."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..errors import TrainingError

PATIENCE = timedelta(hours=12)
"""How long processes wait for the one that measures and writes."""


@runtime_checkable
class Shardable(Protocol):
    """Batches that make one process's share alone, such as :class:`lmh.zoo.Batches`."""

    def shard(self, rank: int, world: int) -> Iterable[Any]:
        """Return rows rank, rank + world, … of every batch."""
        ...


@dataclass(frozen=True)
class Group:
    """The processes that train together.

    Attributes:
        rank: of this one, from 0.
        world: number of them.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Group:
        """Return the group of ``torch.distributed``, or a process alone.

        >>> Group.current()
        Group(rank=0, world=1)
        """
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def leads(self) -> bool:
        """Whether this process reports and writes."""
        return self.rank == 0

    def wrapped(self, model: nn.Module, *, some_unused: bool) -> nn.Module:
        """Return the network as it is trained: with its gradients averaged over the processes.

        Args:
            model: the same on every process; it takes the weights of rank 0.
            some_unused: whether a backward pass may leave out parameters.
        """
        if self.world == 1:
            return model
        return DistributedDataParallel(model, find_unused_parameters=some_unused)

    def share(self, batches: Iterable[Any]) -> Iterable[Any]:
        """Return batches that make this process's share alone if they can; :meth:`rows` cuts the others."""
        if self.world > 1 and isinstance(batches, Shardable):
            return batches.shard(self.rank, self.world)
        return batches

    def rows(self, batch: Any, axis: int) -> Any:
        """Return this process's rows of a batch, a tensor or tuple of them; labels have theirs on axis 0."""
        if self.world == 1:
            return batch
        if isinstance(batch, Tensor):
            return batch[(slice(None),) * (axis if batch.ndim > 1 else 0) + (slice(self.rank, None, self.world),)]
        return tuple(self.rows(item, axis) if isinstance(item, Tensor) else item for item in batch)

    def sums(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Return the sums of values over all processes."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers of rank 0, such as BatchNorm's statistics."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def told(self, value: Any) -> Any:
        """Return what rank 0 has, on every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]


ALONE = Group()
"""A process that trains by itself."""


def launched() -> bool:
    """Whether torchrun started this process among others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, for the length of the block; a process alone stays alone.

    Args:
        device: cpu or cuda.

    Yields:
        The device of this process.

    Raises:
        TrainingError: if there are more processes than GPUs.
    """
    if not launched():
        yield device
        return
    if device.type == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            raise TrainingError(
                f"process {local} of this machine has no GPU: there are {count}. Start torchrun with "
                f"--nproc-per-node {count}, or add --device cpu."
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield device
    finally:
        gc.collect()  # DistributedDataParallel in a cycle would keep the group and abort the process at its exit
        dist.destroy_process_group()
