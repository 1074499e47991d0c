"""What stands behind a BatchNorm that knows of time: a scale for every step (TEBN), or the threshold's (tdBN).

A BatchNorm on [T·N, C, *F] takes its statistics over all steps together, as both papers do. What they add to it is a
factor, and that is a module of its own here, so that the BatchNorm keeps its type, its name and its tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import StateError
from .time_axis import TimeAxis, Timed


class StepScale(Timed):
    """y[t] = p[t] x[t] with p learnable, 1 at the start (TEBN: Duan et al., NeurIPS 2022).

    Step t is absolute: inside ``carry_state`` the next call goes on where the last one ended.

    Args:
        time: the network's time axis; p has T values.

    >>> scale = StepScale(TimeAxis(2))
    >>> with torch.no_grad():
    ...     _ = scale.weight.copy_(torch.tensor([1.0, 0.5]))
    >>> scale(torch.ones(4, 1)).flatten().tolist()
    [1.0, 1.0, 0.5, 0.5]
    """

    def __init__(self, time: TimeAxis) -> None:
        super().__init__(time)
        self.weight = nn.Parameter(torch.ones(time.timesteps))
        self._done = 0

    def forward(self, x: Tensor) -> Tensor:
        """Scale every step of ``x``, [T·N, C, *F].

        Raises:
            StateError: beyond the last p.
        """
        begun, steps = self._done, self.time.steps
        if begun + steps > len(self.weight):
            raise StateError(
                f"steps {begun + 1} to {begun + steps} were asked for; TEBN's scales end at {len(self.weight)}. "
                f"Run at most {len(self.weight)} steps, or convert with more."
            )
        if self.time.carry:
            self._done = begun + steps
        scales = self.weight[begun : begun + steps].to(x.dtype)
        return torch.cat([scale * step for scale, step in zip(scales, self.unfold(x), strict=True)])

    def drop_state(self) -> None:
        """Begin at the first step again."""
        self._done = 0

    def extra_repr(self) -> str:
        """Return T, for the module's repr."""
        return f"timesteps={len(self.weight)}"


class ThresholdScale(Timed):
    """y = s x with a fixed s = α θ (tdBN: Zheng et al., AAAI 2021).

    Args:
        time: the network's time axis.
        scale: s, [] or [C].

    >>> ThresholdScale(TimeAxis(2), torch.tensor([2.0, 3.0]))(torch.ones(1, 2)).tolist()
    [[2.0, 3.0]]
    """

    def __init__(self, time: TimeAxis, scale: Tensor) -> None:
        super().__init__(time)
        self.scale: Tensor
        self.register_buffer("scale", scale.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Scale ``x``, [T·N, C, *F]."""
        scale = self.scale.to(x.dtype)
        return x * (scale.reshape(-1, *[1] * (x.ndim - 2)) if scale.ndim else scale)
