"""The T steps of the neurons of a site, forwards and backwards, as plain functions of tensors.

The forward pass is :func:`lmh.neurons.lmh_step`, step by step. The backward pass runs these steps again and
then :func:`lmh.neurons.lmh_step_adjoint` from the last to the first, so no potential is kept between the two. Both
are run as they are (FUSED) or compiled (COMPILED): see lmh/kernels.py.

Inside of them the neurons of one step are R rows of K columns, as the current lies in memory: lmh/memory_order.py. So
neither pass moves data, channels_last or not, and one compilation serves every site. For a compiled pass every
coefficient is a column [R, 1] or a row [1, K], also one that all neurons share: a compiler that meets values without
rows takes them for one long axis, and splits the pass into several, each with its own way through memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .neurons import Coefficients, Moment, State, charge, lmh_step, lmh_step_adjoint, spikes
from .resets import Reset
from .surrogates import Surrogate

STEPS_A_BYTE = 8


@dataclass(frozen=True)
class Job:
    """What a pass is made for. Sizes are no part of it.

    Attributes:
        steps: T.
        surrogate: ds/du.
        reset: whether that passes the reset.
        static: the current is that of one step, taken T times.
        per_step: the first axis of every coefficient is T.
        normalised: the current comes as BatchNorm's input: lmh/batch_norm.py.
        shortcut: and a residual sum is added to that.
    """

    steps: int
    surrogate: Surrogate
    reset: Reset
    static: bool = False
    per_step: bool = False
    normalised: bool = False
    shortcut: bool = False

    def of_step(self, x: Tensor, t: int) -> Tensor:
        """The part of step t of what comes for every step, or once where static."""
        return x if self.static else x[t]

    def current(self, currents: Tensor, norm: Sequence[Tensor], t: int, dtype: torch.dtype) -> Tensor:
        """I of step t, in a dtype."""
        current = self.of_step(currents, t).to(dtype)
        if self.normalised:
            _, scale, shift = norm[0].unbind()
            current = current * scale + shift
        return current + self.of_step(norm[1], t).to(dtype) if self.shortcut else current

    def coefficients(self, v_threshold: Tensor, membrane: Tensor, t: int) -> Coefficients:
        """θ, λ and μ of step t."""
        theta, membrane = (v_threshold[t], membrane[:, t]) if self.per_step else (v_threshold, membrane)
        return Coefficients(theta, *membrane.unbind())


class Extra(NamedTuple):
    """What the forward pass gives beside the output: the last state, and the spikes as bits."""

    state: bool
    bits: bool


def forward_pass(
    job: Job,
    extra: Extra,
    currents: Tensor,
    v_dendrite: Tensor,
    v_soma: Tensor,
    v_threshold: Tensor,
    membrane: Tensor,
    *norm: Tensor,
) -> tuple[Tensor, ...]:
    """Run the T steps.

    Args:
        job: what is run.
        extra: what is wanted beside the output.
        currents: I, or BatchNorm's input x, [T, R, K], or [R, K] where static.
        v_dendrite: v_D[0], [] or [R, K].
        v_soma: v_S[0], [], [R, 1], [1, K] or [R, K].
        v_threshold: θ, [], [R, 1] or [1, K], behind an axis of T if per step.
        membrane: λ_S, λ_D, μ_S, μ_D, [4], [4, R, 1] or [4, 1, K], and T behind the 4 if per step.
        norm: if normalised, m, γ/σ and β − m γ/σ, [3, R, 1] or [3, 1, K]; with a shortcut, r, of the shape of x.

    Returns:
        θ s, [T·R, K] in the dtype of the current; if wanted, v_D[T] and v_S[T]; if wanted, the bits of :func:`packed`.
    """
    outputs, state = [], State(v_dendrite, v_soma)
    for t in range(job.steps):
        now = job.coefficients(v_threshold, membrane, t)
        current = job.current(currents, norm, t, now.v_threshold.dtype)
        output, state = lmh_step(current, state, now, job.surrogate, job.reset)
        outputs.append(output.to(currents.dtype))
    return torch.cat(outputs), *(state if extra.state else ()), *((packed(outputs),) if extra.bits else ())


def backward_pass(
    job: Job,
    wanted: tuple[bool, ...],
    grad_output: Tensor,
    currents: Tensor,
    v_dendrite: Tensor,
    v_soma: Tensor,
    v_threshold: Tensor,
    membrane: Tensor,
    *norm: Tensor,
) -> list[Tensor | None]:
    """Run the T steps again, and their adjoint.

    Args:
        job: what is run.
        wanted: whether the gradient of the current, of v_S[0], and of θ, λ_S, λ_D, μ_S and μ_D is.
        grad_output: g, [T, R, K].
        currents: as in :func:`forward_pass`, like all that follows.
        v_dendrite: v_D[0].
        v_soma: v_S[0].
        v_threshold: θ.
        membrane: λ and μ.
        norm: of BatchNorm and a shortcut.

    Returns:
        The gradients Ī of the current, [T·R, K] or [R, K], and of the others; None for what is not wanted. If
        normalised, Σ Ī and Σ Ī (x − m) too.
        Where one of these is [1, K] its gradient is [R, K], still to be summed over the rows; where it is [R, 1] or []
        its gradient is of its shape. The two sums are [R, K] or [R, 1] like the gradient of a θ per channel.
    """
    dtype = v_threshold.dtype
    moments, state = [], State(v_dendrite, v_soma)
    for t in range(job.steps):
        now = job.coefficients(v_threshold, membrane, t)
        v_dendrite, soma = charge(job.current(currents, norm, t, dtype), state, now)
        moments.append(Moment(state, v_dendrite, soma))
        state = State(v_dendrite, soma - spikes(soma, now.v_threshold) * now.v_threshold)
    zero = torch.zeros((), dtype=dtype, device=currents.device)
    after = State(zero, zero)
    to_current: list[Tensor] = []
    values = (v_threshold, *membrane.unbind())
    to_values: list[list[Tensor]] = [[] for _ in values]
    for t in reversed(range(job.steps)):
        now = job.coefficients(v_threshold, membrane, t)
        step = lmh_step_adjoint(grad_output[t].to(dtype), after, moments.pop(), now, job.surrogate, job.reset)
        after = step.before
        if wanted[0]:
            _collect(to_current, step.current, add=job.static)
        for want, terms, found in zip(wanted[2:], step.coefficients, to_values, strict=True):
            if want:
                _collect(found, terms(), add=not job.per_step)
    gradients: list[Tensor | None] = [None] * len(wanted)
    if wanted[0]:
        gradients[0] = torch.cat([part.to(currents.dtype) for part in to_current])
    if wanted[1]:
        gradients[1] = _summed(after.v_soma, v_soma, 0)
    for index, (found, value) in enumerate(zip(to_values, values, strict=True)):
        if found:
            sums = [_summed(terms, value, int(job.per_step)) for terms in found]
            gradients[2 + index] = torch.stack(sums) if job.per_step else sums[0]
    if job.normalised:
        mean = norm[0][0]
        centred = [job.of_step(currents, t).to(dtype) - mean for t in range(len(to_current))]
        products = [part * rest for part, rest in zip(to_current, centred, strict=True)]
        gradients += [_summed(sum(terms[1:], terms[0]), mean, 0) for terms in (to_current, products)]
    return gradients


def packed(outputs: Sequence[Tensor]) -> Tensor:
    """Return the spikes of all steps, a bit each.

    Args:
        outputs: θ s of every step, one shape.

    Returns:
        ⌈T/8⌉ of that shape, one behind the other, uint8: bit t mod 8 of byte ⌊t/8⌋ of a neuron is s[t].

    >>> packed([torch.tensor([0.5, 0.0]), torch.tensor([0.5, 0.5])])
    tensor([3, 2], dtype=torch.uint8)
    """
    codes = []
    for first in range(0, len(outputs), STEPS_A_BYTE):
        code, *others = (output.clone().gt_(0) for output in outputs[first : first + STEPS_A_BYTE])
        for bit, fired in enumerate(others, start=1):
            code = code + fired * 2**bit
        codes.append(code.to(torch.uint8))
    return torch.cat(codes)


def unpack_pass(job: Job, dtype: torch.dtype, bits: Tensor, v_threshold: Tensor) -> Tensor:
    """Return the output of :func:`forward_pass`, θ s [T·R, K] in a dtype, from its bits and its θ."""
    codes = bits.unflatten(0, (-(-job.steps // STEPS_A_BYTE), -1))
    outputs = []
    for t in range(job.steps):
        theta = (v_threshold[t] if job.per_step else v_threshold).to(dtype)
        outputs.append(((codes[t // STEPS_A_BYTE] >> t % STEPS_A_BYTE) & 1) * theta)
    return torch.cat(outputs)


def _collect(found: list[Tensor], terms: Tensor, *, add: bool) -> None:
    """Put the terms of an earlier step in front of those of the later ones, or add them."""
    if add and found:
        found[0] = found[0] + terms
    else:
        found.insert(0, terms)


def _summed(terms: Tensor, value: Tensor, first: int) -> Tensor:
    """The terms [R, K] of a gradient, summed over all neurons or over those of each row, if these share the value."""
    if value.ndim == first:
        return terms.sum()
    return terms.sum(-1, keepdim=True) if value.shape[-1] == 1 else terms
