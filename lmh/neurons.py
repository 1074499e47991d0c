"""The LM-H neuron: one pure step, its adjoint, and the run over T steps (Hao et al., ICLR 2024).

Per layer and step t, with input current I[t]:

    v_D[t] = μ_D v_D[t-1] + μ_S v_S[t-1] + I[t]        dendrite
    m_S[t] = λ_S v_S[t-1] + λ_D v_D[t]                 soma before firing
    s[t]   = H(m_S[t] − θ),  H(x) = 1 for x ≥ 0        spike
    v_S[t] = m_S[t] − θ s[t]                           soft reset
    output = θ s[t]

The equations and both presets are the paper's. The learnable θ, the surrogate scaled by θ and the range of λ_S are ours
(docs/design.md).

The adjoint runs the same steps backwards. Write x̄ for ∂L/∂x, g[t] for the gradient of the output, u = (m_S − θ)/θ and
σ for the surrogate's ds/du at u. Let ḡ[t] = g[t], as no gradient passes the paper's reset, or g[t] − v̄_S[t] where one
does (lmh/resets.py). Then

    m̄_S[t]   = σ[t] ḡ[t] + v̄_S[t]
    v̄_D[t]   = λ_D m̄_S[t] + μ_D v̄_D[t+1]
    v̄_S[t-1] = λ_S m̄_S[t] + μ_S v̄_D[t]
    Ī[t]     = v̄_D[t]
    λ̄_S = Σ m̄_S[t] v_S[t-1]     μ̄_S = Σ v̄_D[t] v_S[t-1]
    λ̄_D = Σ m̄_S[t] v_D[t]       μ̄_D = Σ v̄_D[t] v_D[t-1]
    θ̄   = Σ ḡ[t] (s[t] − σ[t] m_S[t]/θ)

from v̄_S[T] = v̄_D[T+1] = 0 on, with m_S/θ = u + 1. The sums run over t and over everything that shares a coefficient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .resets import Reset
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
        return spikes(soma, v_threshold) * v_threshold

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad,) = grads
        soma, v_threshold = ctx.saved_tensors
        slope = ctx.surrogate(over_threshold(soma, v_threshold))
        grad_threshold = None
        if ctx.needs_input_grad[1]:
            terms = grad * (spikes(soma, v_threshold) - slope * soma / v_threshold)
            grad_threshold = terms.sum_to_size(v_threshold.shape)
        return grad * slope, grad_threshold, None


def over_threshold(soma: Tensor, v_threshold: Tensor) -> Tensor:
    """Return u = (m_S − θ)/θ, of the shape of ``soma``.

    >>> over_threshold(torch.tensor([0.0, 0.5, 1.0]), torch.tensor(0.5))
    tensor([-1.,  0.,  1.])
    """
    return (soma - v_threshold) * v_threshold.reciprocal()


def spikes(soma: Tensor, v_threshold: Tensor) -> Tensor:
    """Return s = H(m_S − θ), 0 or 1, of the shape and dtype of ``soma``; without a gradient.

    >>> spikes(torch.tensor([0.4, 0.5, 2.0]), torch.tensor(0.5))
    tensor([0., 1., 1.])
    """
    # On a CPU a comparison in place is several times as fast as one to a mask that is then made numbers.
    return soma.detach().clone().ge_(v_threshold.detach())


def charge(current: Tensor, state: State, coefficients: Coefficients) -> tuple[Tensor, Tensor]:
    """Return v_D[t] and m_S[t], the potentials before the spike, of the shape of the current.

    >>> one, zero = torch.tensor(1.0), torch.tensor(0.0)
    >>> charge(torch.tensor([0.75]), State(zero, torch.tensor([0.5])), Coefficients(one, one, one, zero, zero))
    (tensor([0.7500]), tensor([1.2500]))
    """
    _, lambda_s, lambda_d, mu_s, mu_d = coefficients
    v_dendrite = mu_d * state.v_dendrite + mu_s * state.v_soma + current
    return v_dendrite, lambda_s * state.v_soma + lambda_d * v_dendrite


def fire(soma: Tensor, v_threshold: Tensor, surrogate: Surrogate) -> Tensor:
    """Return θ H(m_S − θ), of the shape of ``soma``; its gradient is the surrogate's.

    >>> from lmh.surrogates import Triangle
    >>> fire(torch.tensor([0.4, 0.5, 2.0]), torch.tensor(0.5), Triangle())
    tensor([0.0000, 0.5000, 0.5000])
    """
    if torch.is_grad_enabled() and (soma.requires_grad or v_threshold.requires_grad):
        return _Fire.apply(soma, v_threshold, surrogate)
    return spikes(soma, v_threshold) * v_threshold


def lmh_step(
    current: Tensor,
    state: State,
    coefficients: Coefficients,
    surrogate: Surrogate,
    reset: Reset,
) -> tuple[Tensor, State]:
    """One step of the LM-H neuron, the equations at the top of this module.

    Args:
        current: I[t], shape [N, *F].
        state: v_D[t-1] and v_S[t-1], shape [N, *F].
        coefficients: θ, λ, μ of this step, broadcast against ``current``.
        surrogate: ds/du for the backward pass.
        reset: whether that passes the reset.

    Returns:
        θ s[t], shape [N, *F] in the unit of the current, and the state at t.

    >>> from lmh.resets import DetachedReset
    >>> from lmh.surrogates import Triangle
    >>> one, zero = torch.tensor(1.0), torch.tensor(0.0)
    >>> start = State(torch.zeros(1), torch.tensor([0.5]))
    >>> lmh_step(torch.tensor([0.75]), start, Coefficients(one, one, one, zero, zero), Triangle(), DetachedReset())
    (tensor([1.]), State(v_dendrite=tensor([0.7500]), v_soma=tensor([0.2500])))
    """
    v_dendrite, soma = charge(current, state, coefficients)
    output = fire(soma, coefficients.v_threshold, surrogate)
    return output, State(v_dendrite, soma - reset.taken_off(output))


class Moment(NamedTuple):
    """What the adjoint of step t reads of the run: the state at t−1, and v_D[t] and m_S[t]."""

    before: State
    v_dendrite: Tensor
    soma: Tensor


class StepGradients(NamedTuple):
    """What one step of the adjoint gives.

    Attributes:
        current: Ī[t], the shape of the current.
        before: μ_D v̄_D[t] and v̄_S[t−1], the gradient of the state at t−1.
        coefficients: for θ, λ_S, λ_D, μ_S, μ_D a function that gives the step's terms of its sum, the shape of the
            current; a function, so that nothing is computed for a frozen one.
    """

    current: Tensor
    before: State
    coefficients: tuple[Callable[[], Tensor], ...]


def lmh_step_adjoint(
    grad_output: Tensor,
    after: State,
    moment: Moment,
    coefficients: Coefficients,
    surrogate: Surrogate,
    reset: Reset,
) -> StepGradients:
    """The adjoint of :func:`lmh_step`, the second set of equations at the top of this module.

    Args:
        grad_output: g[t], shape [N, *F].
        after: μ_D v̄_D[t+1] and v̄_S[t], the gradient of the state at t; zero at the last step.
        moment: the run at step t.
        coefficients: θ, λ, μ of this step.
        surrogate: ds/du.
        reset: whether that passes the reset.

    Returns:
        The gradients of the current, of the state at t−1, and of the coefficients.

    >>> from lmh.resets import DetachedReset
    >>> from lmh.surrogates import Triangle
    >>> one, zero = torch.tensor(1.0), torch.tensor(0.0)
    >>> moment = Moment(State(zero, torch.tensor(0.5)), torch.tensor([0.75]), torch.tensor([1.25]))
    >>> values = Coefficients(one, one, one, zero, zero)
    >>> after = State(zero, torch.tensor([1.0]))
    >>> lmh_step_adjoint(torch.tensor([2.0]), after, moment, values, Triangle(), DetachedReset()).current
    tensor([2.5000])
    """
    theta, lambda_s, lambda_d, mu_s, mu_d = coefficients
    before, v_dendrite, soma = moment
    u = over_threshold(soma, theta)
    grad_output = reset.to_output(grad_output, after.v_soma)
    by_spike = surrogate(u) * grad_output
    soma_bar = by_spike + after.v_soma
    dendrite_bar = lambda_d * soma_bar + after.v_dendrite
    terms = (
        lambda: grad_output * spikes(soma, theta) - by_spike * (u + 1),
        lambda: soma_bar * before.v_soma,
        lambda: soma_bar * v_dendrite,
        lambda: dendrite_bar * before.v_soma,
        lambda: dendrite_bar * before.v_dendrite,
    )
    return StepGradients(dendrite_bar, State(mu_d * dendrite_bar, lambda_s * soma_bar + mu_s * dendrite_bar), terms)


def lmh_run(
    current: Callable[[int], Tensor],
    steps: int,
    state: State,
    coefficients: Callable[[int], Coefficients],
    surrogate: Surrogate,
    reset: Reset,
) -> tuple[Tensor, State]:
    """Run ``steps`` steps of :func:`lmh_step`.

    Args:
        current: gives I[k], shape [N, *F], for k = 0 … steps − 1.
        steps: how many steps, at least 1.
        state: the state before the first step.
        coefficients: gives θ, λ, μ of step k.
        surrogate: ds/du for the backward pass.
        reset: whether that passes the reset.

    Returns:
        θ s, time-major and folded, shape [steps·N, *F], and the state after the last step.
    """
    outputs = []
    for k in range(steps):
        output, state = lmh_step(current(k), state, coefficients(k), surrogate, reset)
        outputs.append(output)
    return torch.cat(outputs), state
