"""Strategies: how gradients go through time, and what comes before. Each is a frozen type.

STBP          through all T steps at once
TimeSliced    through slices of k steps, one after the other
Progressive   STBP from a LIF start; λ and μ are freed while it trains
Hybrid        the ANN as QCFS network first, then STBP from an IF start
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from ..arguments import check_kind
from ..errors import ArgumentError
from ..spiking import IF, LMH
from .schedule import Schedule


class Strategy(Protocol):
    """What training a spiking network asks of a strategy."""

    @property
    def neuron(self) -> LMH:
        """Return the neurons that an ANN is converted to."""
        ...

    def slice_steps(self, timesteps: int) -> int:
        """Return how many steps the gradient goes through at once, a divisor of ``timesteps``."""
        ...


@dataclass(frozen=True)
class STBP:
    """Spatio-temporal backpropagation: one loss on the mean over all T steps, the gradient through all of them.

    Attributes:
        neuron: what an ANN is converted to; a network that spikes already keeps its own.
    """

    neuron: LMH = field(default_factory=LMH)

    def slice_steps(self, timesteps: int) -> int:
        """Return T."""
        return timesteps


def default_qcfs() -> Schedule:
    """The QCFS stage unless another is given: small steps, as the network is trained already."""
    return Schedule(epochs=10, lr=0.01, warmup_steps=100)


@dataclass(frozen=True)
class Hybrid:
    """Hybrid training: a short QCFS stage of the ANN with L = T, then STBP from an IF start.

    The paper converts a QCFS network and trains it by STBP (Hao et al., ICLR 2024, Table 2). Here any ReLU network gets
    its QCFS activations, with a θ per channel from calibration, and is trained with them for a few epochs first; that
    costs an ANN's epoch each, not T times as much. A network that spikes already is trained by ``then`` alone.

    Attributes:
        qcfs: schedule of the QCFS stage.
        then: how the spiking network is trained.
    """

    qcfs: Schedule = field(default_factory=default_qcfs)
    then: STBP = field(default_factory=STBP)

    def __post_init__(self) -> None:
        check_kind("Hybrid: qcfs", self.qcfs, Schedule, "Schedule(epochs=10, lr=0.01, warmup_steps=100)")
        check_kind("Hybrid: then", self.then, STBP, "STBP()")
        if not isinstance(self.then.neuron.preset, IF):
            raise ArgumentError(
                f"Hybrid: the neurons start as {self.then.neuron.preset}; expected IF(), which equals QCFS with L = T."
            )

    @property
    def neuron(self) -> LMH:
        """Return the neurons of the second stage."""
        return self.then.neuron

    def slice_steps(self, timesteps: int) -> int:
        """Return what the second stage asks for."""
        return self.then.slice_steps(timesteps)
