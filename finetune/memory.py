"""What a training step keeps for its backward pass, as a type."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from ..pages import keep_freed_memory, return_freed_memory
from ..recomputed import recompute


@dataclass(frozen=True)
class KeepAll:
    """Every layer keeps its input, the fastest."""

    def forward(self) -> AbstractContextManager[object]:
        """Return a context that changes nothing."""
        return nullcontext()

    def allocate(self) -> None:
        """Let the process keep freed memory."""
        keep_freed_memory()


@dataclass(frozen=True)
class Recompute:
    """Currents behind BatchNorm are computed again and spikes are kept as bits (:func:`lmh.recompute`).

    The gradients are the same bit for bit; docs/finetuning.md has time and memory.
    """

    def forward(self) -> AbstractContextManager[object]:
        """Return the context in which losses are computed."""
        return recompute()

    def allocate(self) -> None:
        """Let the process give freed memory back; before any tensor is made, to have huge pages."""
        return_freed_memory()


Memory = KeepAll | Recompute
