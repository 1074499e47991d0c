"""Random states of a run: the model's, and one for each pass over the data, so that a resumed run repeats both."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_END = object()


def seed_of(*parts: object) -> int:
    """Return a seed from 0 to 2**63 − 1 that these parts decide.

    >>> seed_of(0, "data", 3) == seed_of(0, "data", 3), seed_of(0, "data", 3) == seed_of(0, "data", 4)
    (True, False)
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) & (2**63 - 1)


@dataclass(frozen=True)
class RandomState:
    """The state of the generators that data loaders and augmentations draw from: torch's, numpy's and Python's."""

    torch_state: Tensor
    numpy_state: Any
    python_state: Any

    @classmethod
    def current(cls) -> RandomState:
        """Return the process's own."""
        return cls(torch.get_rng_state(), np.random.get_state(), random.getstate())

    @classmethod
    def seeded(cls, seed: int) -> RandomState:
        """Return the state after seeding."""
        return cls(
            torch.Generator().manual_seed(seed).get_state(),
            np.random.RandomState(seed % 2**32).get_state(),
            random.Random(seed).getstate(),
        )

    def restore(self) -> None:
        """Make it the process's own."""
        torch.set_rng_state(self.torch_state)
        np.random.set_state(self.numpy_state)
        random.setstate(self.python_state)


@contextmanager
def own_random_state(device: torch.device) -> Iterator[None]:
    """Leave the random state of the caller, on the CPU and on the network's device, as it was."""
    before = RandomState.current()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            before.restore()


def seed_generators(loader: object, seed: int) -> None:
    """Seed the generators of a loader's own, which draw its order in the place of the global ones."""
    samplers = (getattr(loader, name, None) for name in ("sampler", "batch_sampler"))
    for owner in (loader, *samplers):
        if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
            generator.manual_seed(seed)


def drawn(batches: Iterable[Any], seed: int) -> Iterator[Any]:
    """Yield the batches, each made under a random state of its own, which starts from ``seed``.

    What runs between two batches, such as dropout, neither disturbs it nor is disturbed by it.
    """
    own = RandomState.seeded(seed)
    iterator: Iterator[Any] | None = None
    while True:
        outer = RandomState.current()
        own.restore()
        try:
            iterator = iter(batches) if iterator is None else iterator
            batch = next(iterator, _END)
            own = RandomState.current()
        finally:
            outer.restore()
        if batch is _END:
            return
        yield batch
