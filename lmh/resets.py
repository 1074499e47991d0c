"""Resets: whether a gradient passes the soft reset v_S[t] = m_S[t] − θ s[t]. Potentials do not depend on it.

Let σ be the surrogate's ds/du. An IF neuron conserves charge, Σ θ s[t] = Σ I[t] + v_S[0] − v_S[T]. With the reset's
gradient the backward pass does so too: Σ θ s[t] changes with I[k] by 1 − Π (1 − σ[t]) over t ≥ k, which is between 0
and 1 for a surrogate that is nowhere above 1. Without it that is Σ σ[t] over t ≥ k, up to T: the earliest steps weigh
most, and more so with every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Reset(Protocol):
    """What every reset offers."""

    def taken_off(self, output: Tensor) -> Tensor:
        """Return what the reset takes off m_S[t]: ``output``, θ s[t], with a gradient or without."""
        ...

    def to_output(self, grad_output: Tensor, grad_soma: Tensor) -> Tensor:
        """Return the gradient of θ s[t], of the shape of both.

        Args:
            grad_output: g[t], what the next layer gives.
            grad_soma: v̄_S[t], what later steps give.
        """
        ...


@dataclass(frozen=True)
class DetachedReset:
    """No gradient passes the reset: ∂v_S[t]/∂m_S[t] = 1 (Hao et al., ICLR 2024)."""

    def taken_off(self, output: Tensor) -> Tensor:
        """Return the output without its gradient."""
        return output.detach()

    def to_output(self, grad_output: Tensor, grad_soma: Tensor) -> Tensor:
        """Return the gradient of the next layer."""
        return grad_output


@dataclass(frozen=True)
class AttachedReset:
    """The reset has the gradient of the spike that it follows: ∂v_S[t]/∂m_S[t] = 1 − ds/du (ours).

    >>> import torch
    >>> AttachedReset().to_output(torch.tensor(1.0), torch.tensor(0.25))
    tensor(0.7500)
    """

    def taken_off(self, output: Tensor) -> Tensor:
        """Return the output with its gradient."""
        return output

    def to_output(self, grad_output: Tensor, grad_soma: Tensor) -> Tensor:
        """Return the gradient of the next layer, less that of the potential from which the reset took the spike."""
        return grad_output - grad_soma
