"""The neurons of a site as one autograd function over all steps, which keeps its input current and a few values.

Inside :func:`lmh.recomputed.recompute` not even that is kept where it can be computed again, but a bit for every spike.

The forward pass is :func:`lmh.neurons.lmh_step`, step by step. The backward pass runs these steps again and
then :func:`lmh.neurons.lmh_step_adjoint` from the last to the first, so no potential is kept between the two. Both
passes are plain functions of tensors, run as they are (FUSED) or compiled (COMPILED): see lmh/kernels.py.

Inside of them the neurons of one step are R rows of K columns, as the current lies in memory: lmh/memory_order.py. So
neither pass moves data, channels_last or not, and one compilation serves every site. For a compiled pass every
coefficient is a column [R, 1] or a row [1, K], also one that all neurons share: a compiler that meets values without
rows takes them for one long axis, and splits the pass into several, each with its own way through memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import Kernel, compiles, program
from .memory_order import Order
from .neurons import Coefficients, Moment, State, charge, lmh_run, lmh_step, lmh_step_adjoint, spikes
from .recomputed import Spikes, packed, recomputing, source_of
from .surrogates import Surrogate


@dataclass(frozen=True)
class Job:
    """What a pass is made for. Sizes are no part of it.

    Attributes:
        steps: T.
        surrogate: ds/du.
        static: the current is that of one step, taken T times.
        per_step: the first axis of every coefficient is T.
    """

    steps: int
    surrogate: Surrogate
    static: bool = False
    per_step: bool = False

    def current(self, currents: Tensor, t: int) -> Tensor:
        """I of step t."""
        return currents if self.static else currents[t]

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
) -> tuple[Tensor, ...]:
    """Run the T steps.

    Args:
        job: what is run.
        extra: what is wanted beside the output.
        currents: I, [T, R, K], or [R, K] where static.
        v_dendrite: v_D[0], [] or [R, K].
        v_soma: v_S[0], [], [R, 1], [1, K] or [R, K].
        v_threshold: θ, [], [R, 1] or [1, K], behind an axis of T if per step.
        membrane: λ_S, λ_D, μ_S, μ_D, [4], [4, R, 1] or [4, 1, K], and T behind the 4 if per step.

    Returns:
        θ s, [T·R, K] in the dtype of the current; if wanted, v_D[T] and v_S[T]; if wanted, the bits of :func:`packed`.
    """
    outputs, state = [], State(v_dendrite, v_soma)
    for t in range(job.steps):
        now = job.coefficients(v_threshold, membrane, t)
        current = job.current(currents, t).to(now.v_threshold.dtype)
        output, state = lmh_step(current, state, now, job.surrogate)
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

    Returns:
        The gradients of the current, [T·R, K] or [R, K], and of the others; None for what is not wanted.
        Where one of these is [1, K] its gradient is [R, K], still to be summed over the rows; where it is [R, 1] or []
        its gradient is of its shape.
    """
    dtype = v_threshold.dtype
    moments, state = [], State(v_dendrite, v_soma)
    for t in range(job.steps):
        now = job.coefficients(v_threshold, membrane, t)
        v_dendrite, soma = charge(job.current(currents, t).to(dtype), state, now)
        moments.append(Moment(state, v_dendrite, soma))
        state = State(v_dendrite, soma - spikes(soma, now.v_threshold) * now.v_threshold)
    zero = torch.zeros((), dtype=dtype, device=currents.device)
    after = State(zero, zero)
    to_current: list[Tensor] = []
    values = (v_threshold, *membrane.unbind())
    to_values: list[list[Tensor]] = [[] for _ in values]
    for t in reversed(range(job.steps)):
        now = job.coefficients(v_threshold, membrane, t)
        step = lmh_step_adjoint(grad_output[t].to(dtype), after, moments.pop(), now, job.surrogate)
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
    return gradients


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


@dataclass(frozen=True)
class _Call:
    """One call of a site: what is run, by which kernel, and the order of its tensors."""

    job: Job
    kernel: Kernel
    extra: Extra
    order: Order

    def run(self, function: Any, variant: Any, *tensors: Tensor) -> Any:
        """Run a pass by the kernel, without autograd and autocast, which would only make it compile again."""
        compiled = self.kernel is Kernel.COMPILED
        pass_ = program(function, self.job, variant) if compiled else partial(function, self.job, variant)
        device = tensors[0].device.type
        cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        plain = torch.autocast(device, enabled=False) if cast else nullcontext()
        with torch.no_grad(), plain:
            return pass_(*(tensor.detach() for tensor in tensors))

    def current(self, currents: Tensor) -> Tensor:
        """I as rows and columns, [T, R, K], or [R, K] where static."""
        return self.order.flatten(currents, *self.lead)

    def written_out(self, v_dendrite: Tensor, v_soma: Tensor, theta: Tensor, *membrane: Tensor) -> list[Tensor]:
        """v_D[0], v_S[0], θ, and λ and μ together, as they broadcast against rows and columns; without gradients."""
        if v_dendrite.ndim > 0:
            state = [self.order.flatten(v_dendrite), self.order.flatten(v_soma)]
        else:
            state = [v_dendrite, self.broadcast(v_soma, 0)]
        first = int(self.job.per_step)
        values = [*state, self.broadcast(theta, first), self.broadcast(torch.stack(membrane), first + 1)]
        return [value.detach() for value in values]

    def broadcast(self, value: Tensor, first: int) -> Tensor:
        """A value for all neurons or for each channel, behind ``first`` axes, as a pass takes it."""
        plain = value.ndim == first and self.kernel is not Kernel.COMPILED
        return value if plain else self.order.write_out(value, first)

    @property
    def lead(self) -> tuple[int, ...]:
        """The axis in front of the neurons of a current."""
        return () if self.job.static else (self.job.steps,)

    def forward(self, currents: Tensor, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The output, [T·N, C, *F]; if wanted, the last state, [N, C, *F]; if wanted, the bits.

        Args:
            currents: I, [T·N, C, *F], or [N, C, *F] where static.
            values: of :meth:`written_out`.
        """
        output, *more = self.run(forward_pass, self.extra, self.current(currents), *values)
        last = [self.order.restore(potential) for potential in more[:2]] if self.extra.state else []
        return self.order.restore(output, self.job.steps), *last, *(more[-1:] if self.extra.bits else [])

    def backward(
        self, wanted: tuple[bool, ...], grad_output: Tensor, currents: Tensor, values: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The gradients of the current, of its shape, and those of :func:`backward_pass`."""
        grad_output = self.order.flatten(grad_output, self.job.steps)
        found = self.run(backward_pass, wanted, grad_output, self.current(currents), *values)
        if found[0] is not None:
            found[0] = self.order.restore(found[0], *self.lead)
        return found

    def summed(self, gradients: Sequence[Tensor | None], shapes: Sequence[torch.Size]) -> list[Tensor | None]:
        """The gradients of v_S[0], θ, λ and μ, summed up to their shapes."""
        firsts = (0, *[int(self.job.per_step)] * (len(shapes) - 1))
        return [
            gradient if gradient is None or gradient.shape == shape else self.order.sum_up(gradient, len(shape), first)
            for gradient, shape, first in zip(gradients, shapes, firsts, strict=True)
        ]


class _Neurons(torch.autograd.Function):
    """T steps of the neurons of a site as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, call: _Call, currents: Tensor, v_dendrite: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        ctx.call, ctx.source = call, None
        ctx.values, ctx.shapes = call.written_out(v_dendrite, *others), [other.shape for other in others]
        output, *last = call.forward(currents, ctx.values)
        if call.extra.bits:
            theta, bits = others[1].detach(), last.pop()
            ctx.spikes = Spikes(bits, theta, call.job.per_step, call.job.steps, call.order, output.dtype)
            ctx.source = source_of(currents)
        ctx.save_for_backward(None if ctx.source else currents)
        ctx.mark_non_differentiable(*last)
        return output, *last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, current, _, *others = ctx.needs_input_grad
        (kept,) = ctx.saved_tensors
        currents = ctx.source() if kept is None else kept
        to_current, *to_others = ctx.call.backward((current, *others), grads[0], currents, ctx.values)
        return None, to_current, None, *ctx.call.summed(to_others, ctx.shapes)


class Ran(NamedTuple):
    """What a call gives.

    Attributes:
        output: θ s, [T·N, C, *F] in the dtype of the current.
        state: that after the last step, if it was asked for.
        kernel: the program that ran; FUSED where a compilation was asked for and failed.
    """

    output: Tensor
    state: State | None
    kernel: Kernel


def run_neurons(job: Job, currents: Tensor, start: State, values: Coefficients, *, kernel: Kernel, keep: bool) -> Ran:
    """Run T steps of the neurons of a site.

    On a CPU every kernel gives the same output bit for bit, as nothing but products, sums and comparisons makes it, in
    one order. The gradients agree up to rounding: sums run in another order. On a GPU the compiler may also contract a
    product and a sum, which can move a potential by its last digit across the threshold.

    Args:
        job: what is run.
        currents: I, [T·N, C, *F], or [N, C, *F] where static.
        start: v_D[0] and v_S[0]: a zero, and [] or [C]; or a state [N, C, *F], which gets no gradient.
        values: θ, λ_S, λ_D, μ_S, μ_D, each [] or [C], behind a first axis of T if per step; their dtype is that of
            the potentials.
        kernel: the program that is to run.
        keep: return the state after the last step; it has a gradient only by EAGER.

    Returns:
        The output, the last state if it is kept, and the kernel.

    >>> from lmh.surrogates import Triangle
    >>> one, zero = torch.tensor(1.0), torch.tensor(0.0)
    >>> values = Coefficients(one, one, one, zero, zero)
    >>> job = Job(steps=4, surrogate=Triangle(), static=True)
    >>> run_neurons(job, torch.tensor([[0.5]]), State(zero, one / 2), values, kernel=Kernel.FUSED, keep=False).output.mT
    tensor([[1., 0., 1., 0.]])
    """
    if kernel is Kernel.EAGER:
        return Ran(*_run_eagerly(job, currents, start, values, keep), kernel)
    batch = currents.shape[0] if job.static else currents.shape[0] // job.steps
    call = _Call(job, kernel, Extra(keep, recomputing()), Order.of(currents, batch))
    output, *last = _Neurons.apply(call, currents, *start, *values)
    ran = Kernel.COMPILED if kernel is Kernel.COMPILED and compiles(job) else Kernel.FUSED
    return Ran(output, State(*last) if keep else None, ran)


def _run_eagerly(
    job: Job, currents: Tensor, start: State, values: Coefficients, keep: bool
) -> tuple[Tensor, State | None]:
    """The plain loop, which autograd and tracers see step by step."""

    def aligned(value: Tensor) -> Tensor:
        return value.reshape(-1, *[1] * (currents.ndim - 2)) if value.ndim == 1 else value

    now = (currents,) * job.steps if job.static else currents.unflatten(0, (job.steps, -1)).unbind(0)
    if start.v_dendrite.ndim == 0:
        start = State(*(aligned(potential).expand(now[0].shape) for potential in start))
    output, last = lmh_run(
        lambda k: now[k].to(values.v_threshold.dtype),
        job.steps,
        start,
        lambda k: Coefficients(*(aligned(value[k] if job.per_step else value) for value in values)),
        job.surrogate,
    )
    return output.to(currents.dtype), last if keep else None
