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
from ..spiking import IF, LIF, LMH, PerStep, Ranges
from .schedule import Schedule


@dataclass(frozen=True)
class EverySlice:
    """One update of the weights after each slice, as in the paper's online training."""


@dataclass(frozen=True)
class OncePerBatch:
    """One update after the last slice, by the mean of the slices' gradients."""


Update = EverySlice | OncePerBatch


class Strategy(Protocol):
    """What training a spiking network asks of a strategy."""

    @property
    def neuron(self) -> LMH:
        """Return the neurons that an ANN is converted to."""
        ...

    @property
    def update(self) -> Update:
        """Return when the weights change."""
        ...

    def slice_steps(self, timesteps: int) -> int:
        """Return how many steps the gradient goes through at once, a divisor of ``timesteps``."""
        ...

    def frozen(self, progress: float) -> tuple[str, ...]:
        """Return the beginnings of the names of site parameters that do not learn yet.

        Args:
            progress: share of the training that is done, 0 to 1.
        """
        ...


class _AllLearn:
    """Every parameter learns from the start."""

    def frozen(self, progress: float) -> tuple[str, ...]:
        """Return none."""
        return ()


class _AllSteps:
    """The gradient goes through all steps at once."""

    @property
    def update(self) -> Update:
        """There is one slice, so both mean the same."""
        return OncePerBatch()

    def slice_steps(self, timesteps: int) -> int:
        """Return T."""
        return timesteps


@dataclass(frozen=True)
class STBP(_AllSteps, _AllLearn):
    """Spatio-temporal backpropagation: one loss on the mean over all T steps, the gradient through all of them.

    Attributes:
        neuron: what an ANN is converted to; a network that spikes already keeps its own.
    """

    neuron: LMH = field(default_factory=LMH)


@dataclass(frozen=True)
class TimeSliced(_AllLearn):
    """Online training in slices of k steps (Hao et al., ICLR 2024, Table 3).

    The potentials go on from slice to slice, the gradient does not: they are detached at the start of each. The loss of
    a slice is that of the mean over its own k outputs, and memory is that of k steps. k = T is STBP.

    BatchNorm sees k·N samples at a time, so its running statistics take in T/k batches for one of STBP.

    Attributes:
        steps: k, a divisor of T.
        update: ``EverySlice()``, or ``OncePerBatch()``, which updates by the mean gradient of all slices.
        neuron: as for :class:`STBP`.
    """

    steps: int
    update: Update = field(default_factory=EverySlice)
    neuron: LMH = field(default_factory=LMH)

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ArgumentError(f"TimeSliced: steps is {self.steps!r}; expected a whole number of at least 1.")
        check_kind("TimeSliced: update", self.update, (EverySlice, OncePerBatch), "EverySlice()", "OncePerBatch()")

    def slice_steps(self, timesteps: int) -> int:
        """Return k.

        Raises:
            ArgumentError: if it does not divide T.

        >>> TimeSliced(2).slice_steps(6)
        2
        """
        if timesteps % self.steps:
            divisors = ", ".join(str(k) for k in range(1, timesteps + 1) if timesteps % k == 0)
            raise ArgumentError(
                f"TimeSliced: slices of {self.steps} steps do not divide T = {timesteps}; expected one of {divisors}. "
                "Choose one of them, or convert with another T."
            )
        return self.steps


@dataclass(frozen=True)
class SLTT(_AllLearn):
    """Spatial learning through time (Meng et al., ICCV 2023): no gradient from step to step, one update a batch.

    This is ``TimeSliced(1, OncePerBatch())`` under its name, the baseline of the paper's Table 3.

    Attributes:
        neuron: as for :class:`STBP`.
    """

    neuron: LMH = field(default_factory=LMH)

    @property
    def update(self) -> Update:
        """Return one update a batch."""
        return OncePerBatch()

    def slice_steps(self, timesteps: int) -> int:
        """Return 1."""
        return 1


WIDER = Ranges(lambda_s=(0.0, 2.0), lambda_d=(0.0, 2.0), mu_s=(-1.0, 1.0), mu_d=(-1.0, 1.0))
"""Intervals twice as wide as the paper's for λ_D and μ."""


def _lif_start() -> LMH:
    return LMH(LIF())


@dataclass(frozen=True)
class Progressive(_AllSteps):
    """Progressive STBP: neurons start as LIF, and their membrane parameters are freed while the network trains.

    The start and the order, from LIF to LM-H, are the paper's (Hao et al., ICLR 2024, Figure 3); when λ and μ are freed
    is ours. θ and v_init learn from the start. Training from scratch is the same call with an untrained ANN.

    Attributes:
        neuron: what an ANN is converted to; ``LMH(LIF(leak))`` chooses another leak, ``LMH(LIF(), PerChannel())``
            another granularity. A network that spikes already keeps its own.
        lambda_from: share of the training after which λ_S and λ_D learn, 0 to 1.
        mu_from: the same for μ_S and μ_D.
    """

    neuron: LMH = field(default_factory=_lif_start)
    lambda_from: float = 0.1
    mu_from: float = 0.3

    def __post_init__(self) -> None:
        check_kind("Progressive: neuron", self.neuron, LMH, "LMH(LIF(0.5))")
        for name in ("lambda_from", "mu_from"):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(f"Progressive: {name} is {getattr(self, name)}; expected a share from 0 to 1.")

    @classmethod
    def wider(cls, leak: float = 0.5) -> Progressive:
        """Return the strategy with the wider ranges :data:`WIDER`.

        The paper's "radical version" is defined in no public text; this and :meth:`per_step` are readings of it.
        """
        return cls(LMH(LIF(leak), ranges=WIDER))

    @classmethod
    def per_step(cls, leak: float = 0.5) -> Progressive:
        """Return the strategy with λ, μ and θ of their own for every step."""
        return cls(LMH(LIF(leak), PerStep()))

    def frozen(self, progress: float) -> tuple[str, ...]:
        """Return λ and μ, as long as they are frozen.

        >>> Progressive().frozen(0.0), Progressive().frozen(0.2), Progressive().frozen(0.5)
        (('raw_lambda', 'raw_mu'), ('raw_mu',), ())
        """
        waiting = {"raw_lambda": self.lambda_from, "raw_mu": self.mu_from}
        return tuple(name for name, start in waiting.items() if progress < start)


def default_qcfs() -> Schedule:
    """The QCFS stage unless another is given: small steps, as the network is trained already."""
    return Schedule(epochs=10, lr=0.01, warmup_steps=100)


@dataclass(frozen=True)
class Hybrid(_AllLearn):
    """Hybrid training: a short QCFS stage of the ANN with L = T, then STBP from an IF start.

    The paper converts a QCFS network and trains it by STBP (Hao et al., ICLR 2024, Table 2). Here any ReLU network gets
    its QCFS activations, with a θ per channel from calibration, and is trained with them for a few epochs first; that
    costs an ANN's epoch each, not T times as much. It starts from the ANN, so of a conversion that was corrected or
    calibrated otherwise nothing is left; ``STBP()`` keeps that. A network that spikes already is trained by ``then``
    alone.

    Attributes:
        qcfs: schedule of the QCFS stage.
        then: how the spiking network is trained: ``STBP()``, ``TimeSliced(k)`` or ``SLTT()``.
    """

    qcfs: Schedule = field(default_factory=default_qcfs)
    then: STBP | TimeSliced | SLTT = field(default_factory=STBP)

    def __post_init__(self) -> None:
        check_kind("Hybrid: qcfs", self.qcfs, Schedule, "Schedule(epochs=10, lr=0.01, warmup_steps=100)")
        check_kind("Hybrid: then", self.then, (STBP, TimeSliced, SLTT), "STBP()", "TimeSliced(2)")
        if not isinstance(self.then.neuron.preset, IF):
            raise ArgumentError(
                f"Hybrid: the neurons start as {self.then.neuron.preset}; expected IF(), which equals QCFS with L = T."
            )

    @property
    def neuron(self) -> LMH:
        """Return the neurons of the second stage."""
        return self.then.neuron

    @property
    def update(self) -> Update:
        """Return what the second stage asks for."""
        return self.then.update

    def slice_steps(self, timesteps: int) -> int:
        """Return what the second stage asks for."""
        return self.then.slice_steps(timesteps)
