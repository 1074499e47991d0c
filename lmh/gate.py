"""A max-pool that runs in time: what it has passed on is, after every step, the maximum of what came in.

Between t = 1 and T the pool's input at place i of a window sums up to A_i[t] = Σ_{τ≤t} x_i[τ]. What passes at step t is

    y[t] = max_i A_i[t] − max_i A_i[t−1],   A_i[0] = 0,   so that   Σ_{τ≤t} y[τ] = max_i A_i[t]

exactly, at every t and for any input. For spikes of one θ this is a gate: a spike passes if its neuron had fired as
often as any in the window, else it is dropped. Gating max-pools by accumulated spikes is of Rueckauer et al. (2017),
whose gate passes the spikes of one neuron, the one that leads. That every neuron in the lead may pass one is ours:
with the first of those that tie, two neurons that fire in turn pass no spike, or all of both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import StateError
from .time_axis import TimeAxis, Timed


class _Kept(Timed):
    """Keeps the last step of what it gave, for the next call inside ``carry_state``."""

    def __init__(self, time: TimeAxis) -> None:
        super().__init__(time)
        self._carried: Tensor | None = None

    def last(self, step: Tensor) -> Tensor:
        """Return what was kept for a tensor like ``step``, zeros at the start.

        Raises:
            StateError: if it is of another shape.
        """
        if self._carried is None:
            return torch.zeros_like(step)
        if self._carried.shape != step.shape:
            raise StateError(
                f"the carried state has shape {list(self._carried.shape)} and the max-pool's input "
                f"{list(step.shape)}; expected the same. Open a new carry_state block for each batch."
            )
        return self._carried

    def keep(self, step: Tensor) -> None:
        """Keep ``step`` if state is carried."""
        if self.time.carry:
            self._carried = step.detach()

    def drop_state(self) -> None:
        """Forget what was kept."""
        self._carried = None

    def keep_samples(self, which: Tensor) -> None:
        """Keep what was kept of the samples where ``which``, [N], is True."""
        self._carried = None if self._carried is None else self._carried[which]


class Accumulate(_Kept):
    """Before a gated max-pool: A[t] = A[t−1] + x[t] at every step, [T·N, *F].

    In float64, where sums of up to 2²⁹ equal float32 values are exact: neurons that fired equally often tie.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the sums so far."""
        steps = self.unfold(x.double())
        sums = steps.cumsum(0) + self.last(steps[0])
        self.keep(sums[-1])
        return sums.flatten(0, 1)


class Increments(_Kept):
    """Behind a gated max-pool: y[t] = M[t] − M[t−1] of the maxima M, [T·N, *G]."""

    def forward(self, maxima: Tensor, like: Tensor) -> Tensor:
        """Return what passes at each step, of the dtype of ``like``, the pool's input."""
        steps = self.unfold(maxima)
        increments = steps.diff(dim=0, prepend=self.last(steps[0])[None])
        self.keep(steps[-1])
        return increments.flatten(0, 1).to(like.dtype)
