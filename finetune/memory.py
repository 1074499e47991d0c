"""What a training step keeps for its backward pass, as a type."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from ..recomputed import recompute


@dataclass(frozen=True)
class KeepAll:
    """Every layer keeps its input, the fastest."""

    def forward(self) -> AbstractContextManager[object]:
        """Return a context that changes nothing."""
        return nullcontext()


@dataclass(frozen=True)
class Recompute:
    """Currents behind BatchNorm are computed again and spikes are kept as bits (:func:`lmh.recompute`).

    The gradients are the same bit for bit; docs/finetuning.md has time and memory.
    """

    def forward(self) -> AbstractContextManager[object]:
        """Return the context in which losses are computed."""
        return recompute()


Memory = KeepAll | Recompute
