"""Readouts: how the outputs of T steps become one answer.

With o[t] the output at step t and weights w[t] ≥ 0, the answer after t steps is

    y[t] = Σ_{τ≤t} w[τ] o[τ] / Σ_{τ≤t} w[τ]

and the mean of o[1…t] as long as all weights so far are 0. All T steps are run and count, whatever they weigh: nothing
is read at a hidden T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import ArgumentError


@dataclass(frozen=True)
class MeanReadout:
    """The mean over all steps, w = 1."""

    def weights(self, steps: int) -> tuple[float, ...]:
        """Return w[1…steps]."""
        return (1.0,) * steps

    def check(self, timesteps: int) -> None:
        """Accept every T."""

    def text(self, timesteps: int) -> str:
        """Say what is read."""
        return f"the mean over all {timesteps} steps"


@dataclass(frozen=True)
class DelayedReadout:
    """The mean over what comes behind the first ``steps`` steps, which are run and not read: w = 0, then 1.

    Deep layers spike before all of their evidence has come; reading later leaves those spikes out (delayed evaluation,
    Hwang et al. 2021).

    Attributes:
        steps: how many are not read, fewer than T.
    """

    steps: int

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ArgumentError(
                f"DelayedReadout: {self.steps!r} steps; expected a whole number from 1. "
                "Pass DelayedReadout(2), or MeanReadout() to read all."
            )

    def weights(self, steps: int) -> tuple[float, ...]:
        """Return w[1…steps]."""
        return tuple(float(step > self.steps) for step in range(1, steps + 1))

    def check(self, timesteps: int) -> None:
        """Refuse a T that leaves nothing to read.

        Raises:
            ArgumentError: saying what to pass.
        """
        if self.steps >= timesteps:
            raise ArgumentError(
                f"{self}: nothing is left to read at timesteps={timesteps}; expected fewer steps than that. "
                f"Pass timesteps={self.steps + timesteps} to read {timesteps} behind the delay; all of them count."
            )

    def text(self, timesteps: int) -> str:
        """Say what is read."""
        return f"the mean over steps {self.steps + 1} to {timesteps} of {timesteps}"


@dataclass(frozen=True)
class WeightedReadout:
    """A weighted mean over all steps.

    Attributes:
        values: w[1…T], finite and at least 0, not all of them 0; only their ratios matter.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = isinstance(self.values, tuple) and all(isinstance(value, int | float) for value in self.values)
        if not numbers or not all(0 <= value < math.inf for value in self.values) or not any(self.values):
            raise ArgumentError(
                f"WeightedReadout: {self.values!r} came; expected a tuple of one finite weight of at least 0 for each "
                "step, not all 0. Pass WeightedReadout((1.0, 2.0, 3.0, 4.0)) for T = 4, say."
            )

    def weights(self, steps: int) -> tuple[float, ...]:
        """Return w[1…steps]; behind T the last one goes on."""
        return (*self.values, *self.values[-1:] * (steps - len(self.values)))[:steps]

    def check(self, timesteps: int) -> None:
        """Refuse a T that has not one weight for each step.

        Raises:
            ArgumentError: saying what to pass.
        """
        if len(self.values) != timesteps:
            raise ArgumentError(
                f"WeightedReadout: {len(self.values)} weights came for timesteps={timesteps}; expected one for each "
                f"step. Pass {timesteps} weights; steps that should not be read weigh 0."
            )

    def text(self, timesteps: int) -> str:
        """Say what is read."""
        shown = ", ".join(f"{value:g}" for value in self.values[:8]) + (", …" if len(self.values) > 8 else "")
        return f"the mean over all {timesteps} steps with weights {shown}"


Average = MeanReadout | DelayedReadout | WeightedReadout
READOUTS = (MeanReadout, DelayedReadout, WeightedReadout)
