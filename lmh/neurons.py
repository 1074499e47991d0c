"""The LM-H neuron: one pure step, and the run over T steps (Hao et al., ICLR 2024).

Per layer and step t, with input current I[t]:

    v_D[t] = μ_D v_D[t-1] + μ_S v_S[t-1] + I[t]        dendrite
    m_S[t] = λ_S v_S[t-1] + λ_D v_D[t]                 soma before firing
    s[t]   = H(m_S[t] − θ),  H(x) = 1 for x ≥ 0        spike
    v_S[t] = m_S[t] − θ s[t]                           soft reset
    output = θ s[t]

The equations, the detached soft reset and both presets are the paper's. The learnable θ, the surrogate
scaled by θ and the range of λ_S are ours (docs/design.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .surrogates import Surrogate


class Coefficients(NamedTuple):
    """θ, λ and μ of one step, each a scalar or of a shape that broadcasts against the current.

    Units: θ is in the unit of the current; the other four have none.
    """

    v_threshold: Tensor
    lambda_s: Tensor
    lambda_d: Tensor
    mu_s: Tensor
    mu_d: Tensor


class State(NamedTuple):
    """Potentials carried from one step to the next, in the unit of the current, shape of the current."""

    v_dendrite: Tensor
    v_soma: Tensor


class _Fire(torch.autograd.Function):
    """θ H(m − θ) with the surrogate in the backward pass.

    With u = (m − θ)/θ:  ∂out/∂m = ds/du,  ∂out/∂θ = s − (ds/du) m/θ.
    """

    @staticmethod
    def forward(ctx: Any, soma: Tensor, v_threshold: Tensor, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(soma, v_threshold)
        ctx.surrogate = surrogate
        return _heaviside(soma, v_threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad,) = grads
        soma, v_threshold = ctx.saved_tensors
        slope = ctx.surrogate((soma - v_threshold) / v_threshold)
        grad_threshold = None
        if ctx.needs_input_grad[1]:
            spikes = (soma >= v_threshold).to(soma.dtype)
            grad_threshold = (grad * (spikes - slope * soma / v_threshold)).sum_to_size(v_threshold.shape)
        return grad * slope, grad_threshold, None


def _heaviside(soma: Tensor, v_threshold: Tensor) -> Tensor:
    return (soma >= v_threshold).to(soma.dtype) * v_threshold


def fire(soma: Tensor, v_threshold: Tensor, surrogate: Surrogate) -> Tensor:
    """Return θ H(m_S − θ), of the shape of ``soma``; its gradient is the surrogate's.

    >>> from lmh.surrogates import Triangle
    >>> fire(torch.tensor([0.4, 0.5, 2.0]), torch.tensor(0.5), Triangle())
    tensor([0.0000, 0.5000, 0.5000])
    """
    if torch.is_grad_enabled() and (soma.requires_grad or v_threshold.requires_grad):
        return _Fire.apply(soma, v_threshold, surrogate)
    return _heaviside(soma, v_threshold)


def lmh_step(current: Tensor, state: State, coefficients: Coefficients, surrogate: Surrogate) -> tuple[Tensor, State]:
    """One step of the LM-H neuron, the equations at the top of this module.

    Args:
        current: I[t], shape [N, *F].
        state: v_D[t-1] and v_S[t-1], shape [N, *F].
        coefficients: θ, λ, μ of this step, broadcast against ``current``.
        surrogate: ds/du for the backward pass.

    Returns:
        θ s[t], shape [N, *F] in the unit of the current, and the state at t.

    >>> from lmh.surrogates import Triangle
    >>> one, zero = torch.tensor(1.0), torch.tensor(0.0)
    >>> start = State(torch.zeros(1), torch.tensor([0.5]))
    >>> lmh_step(torch.tensor([0.75]), start, Coefficients(one, one, one, zero, zero), Triangle())
    (tensor([1.]), State(v_dendrite=tensor([0.7500]), v_soma=tensor([0.2500])))
    """
    theta, lambda_s, lambda_d, mu_s, mu_d = coefficients
    v_dendrite = mu_d * state.v_dendrite + mu_s * state.v_soma + current
    soma = lambda_s * state.v_soma + lambda_d * v_dendrite
    output = fire(soma, theta, surrogate)
    return output, State(v_dendrite, soma - output.detach())


def lmh_run(
    current: Callable[[int], Tensor],
    steps: int,
    state: State,
    coefficients: Callable[[int], Coefficients],
    surrogate: Surrogate,
) -> tuple[Tensor, State]:
    """Run ``steps`` steps of :func:`lmh_step`.

    Args:
        current: gives I[k], shape [N, *F], for k = 0 … steps − 1.
        steps: how many steps, at least 1.
        state: the state before the first step.
        coefficients: gives θ, λ, μ of step k.
        surrogate: ds/du for the backward pass.

    Returns:
        θ s, time-major and folded, shape [steps·N, *F], and the state after the last step.
    """
    outputs = []
    for k in range(steps):
        output, state = lmh_step(current(k), state, coefficients(k), surrogate)
        outputs.append(output)
    return torch.cat(outputs), state
