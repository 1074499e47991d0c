"""The neurons of a site as one autograd function over all steps, which keeps its input current and a few values.

Inside :func:`lmh.recomputed.recompute` not even that is kept where it can be computed again, but a bit for every spike.
Inside :func:`lmh.layers.fused_layers` BatchNorm and a residual sum may be in it too: lmh/batch_norm.py. What runs is in
lmh/passes.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .batch_norm import BATCH_NORM, Given, Norm, PendingCurrent, adjoint_pass, adjoint_values, linear
from .kernels import Kernel, compiles, plainly, program
from .memory_order import Order
from .neurons import Coefficients, State, lmh_run
from .passes import Extra, Job, backward_pass, forward_pass, unpack_pass
from .recomputed import Spikes, recomputing, source_of


@dataclass(frozen=True)
class _Call:
    """One call of a site: what is run, by which kernel, and the order of its tensors."""

    job: Job
    kernel: Kernel
    extra: Extra
    order: Order

    def run(self, function: Any, variant: Any, *tensors: Tensor) -> Any:
        """Run a pass by the kernel, without autograd and autocast."""
        compiled = self.kernel is Kernel.COMPILED
        pass_ = program(function, self.job, variant) if compiled else partial(function, self.job, variant)
        with plainly(tensors[0].device.type):
            return pass_(*(tensor.detach() for tensor in tensors))

    def rows(self, x: Tensor) -> Tensor:
        """A current, or what is of its shape, as rows and columns, [T, R, K], or [R, K] where static."""
        return self.order.flatten(x, *self.lead)

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

    def added(self, given: Given) -> list[Tensor]:
        """What the passes take for BatchNorm and a shortcut; nothing where the current itself is given."""
        values = [] if given.norm is None else [self.order.write_out(linear(given.norm), 1)]
        return values if given.shortcut is None else [*values, self.rows(given.shortcut)]

    def forward(self, given: Given, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The output, [T·N, C, *F]; if wanted, the last state, [N, C, *F]; if wanted, the bits.

        Args:
            given: with x [T·N, C, *F], or [N, C, *F] where static.
            values: of :meth:`written_out`.
        """
        output, *more = self.run(forward_pass, self.extra, self.rows(given.x), *values, *self.added(given))
        last = [self.order.restore(potential) for potential in more[:2]] if self.extra.state else []
        return self.order.restore(output, self.job.steps), *last, *(more[-1:] if self.extra.bits else [])

    def unpacked(self, dtype: torch.dtype, bits: Tensor, theta: Tensor) -> Tensor:
        """The output of :meth:`forward` from its bits and the θ of :meth:`written_out`; how I came plays no part."""
        plain = replace(self, job=replace(self.job, static=False, normalised=False, shortcut=False))
        return self.order.restore(plain.run(unpack_pass, dtype, bits, theta), self.job.steps)

    def backward(
        self, wanted: tuple[bool, ...], grad_output: Tensor, given: Given, values: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The gradients of the current, of its shape, and those of :func:`backward_pass`."""
        grad_output = self.order.flatten(grad_output, self.job.steps)
        found = self.run(backward_pass, wanted, grad_output, self.rows(given.x), *values, *self.added(given))
        if found[0] is not None:
            found[0] = self.order.restore(found[0], *self.lead)
        return found

    def norm_backward(
        self, norm: Norm, x: Tensor, to_current: Tensor, total: Tensor, centred: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of BatchNorm's input, of its shape, of γ and of β, from Ī and the sums of the backward pass."""
        total, centred = (self.order.sum_up(terms, 1) for terms in (total, centred))
        values = self.order.write_out(adjoint_values(norm, x.numel() / len(norm.mean), total, centred), 1)
        with plainly(x.device.type):
            to_x = program(adjoint_pass, BATCH_NORM, None)(self.rows(to_current), self.rows(x), values)
        return self.order.restore(to_x, *self.lead), centred / norm.deviation, total

    def summed(self, gradients: Sequence[Tensor | None], shapes: Sequence[torch.Size]) -> list[Tensor | None]:
        """The gradients of v_S[0], θ, λ and μ, summed up to their shapes."""
        firsts = (0, *[int(self.job.per_step)] * (len(shapes) - 1))
        return [
            gradient if gradient is None or gradient.shape == shape else self.order.sum_up(gradient, len(shape), first)
            for gradient, shape, first in zip(gradients, shapes, firsts, strict=True)
        ]


class _Neurons(torch.autograd.Function):
    """T steps of the neurons of a site as one node of the graph, with BatchNorm and the sum if they are given so."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        x: Tensor,
        shortcut: Tensor | None,
        mean: Tensor | None,
        deviation: Tensor | None,
        gain: Tensor | None,
        bias: Tensor | None,
        v_dendrite: Tensor,
        *others: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.sources = call, [None, None]
        values, ctx.shapes = call.written_out(v_dendrite, *others), [other.shape for other in others]
        output, *last = call.forward(_given(x, shortcut, mean, deviation, gain, bias), values)
        if call.extra.bits:
            unpacked = partial(call.unpacked, output.dtype, last.pop(), values[2])
            ctx.spikes = Spikes(output.shape, output.dtype, unpacked)
            ctx.sources = [tensor if tensor is None else source_of(tensor) for tensor in (x, shortcut)]
        kept = [None if again else tensor for tensor, again in zip((x, shortcut), ctx.sources, strict=True)]
        ctx.save_for_backward(*kept, mean, deviation, gain, bias, *values)
        ctx.mark_non_differentiable(*last)
        return output, *last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call, saved = ctx.call, ctx.saved_tensors
        kept = [again() if again else tensor for tensor, again in zip(saved, ctx.sources, strict=False)]
        given, values = _given(*kept, *saved[2:6]), saved[6:]
        _, current, _, _, _, _, _, _, *others = ctx.needs_input_grad
        to_current, *found = call.backward((current or call.job.normalised, *others), grads[0], given, values)
        to_others, sums = call.summed(found[: len(others)], ctx.shapes), found[len(others) :]
        if given.norm is None:
            return None, to_current, None, None, None, None, None, None, *to_others
        to_x, to_gain, to_bias = call.norm_backward(given.norm, given.x, to_current, *sums)
        to_shortcut = None if given.shortcut is None else to_current
        return None, to_x, to_shortcut, None, None, to_gain, to_bias, None, *to_others


def _given(x: Tensor, shortcut: Tensor | None, *norm: Any) -> Given:
    """The current, for which the four values of a BatchNorm are None, or what it is computed from."""
    return Given(x, shortcut, None if norm[0] is None else Norm(*norm))


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


def run_neurons(
    job: Job,
    currents: Tensor | PendingCurrent,
    start: State,
    values: Coefficients,
    *,
    kernel: Kernel,
    keep: bool,
) -> Ran:
    """Run T steps of the neurons of a site.

    On a CPU every kernel gives the same output bit for bit, as nothing but products, sums and comparisons makes it, in
    one order. The gradients agree up to rounding: sums run in another order. On a GPU the compiler may also contract a
    product and a sum, which can move a potential by its last digit across the threshold.

    Args:
        job: what is run.
        currents: I, [T·N, C, *F], or [N, C, *F] where static; or what it is computed from, which COMPILED does on its
            way through memory.
        start: v_D[0] and v_S[0]: a zero, and [] or [C]; or a state [N, C, *F], which gets no gradient.
        values: θ, λ_S, λ_D, μ_S, μ_D, each [] or [C], behind a first axis of T if per step; their dtype is that of
            the potentials.
        kernel: the program that is to run.
        keep: return the state after the last step; it has a gradient only by EAGER.

    Returns:
        The output, the last state if it is kept, and the kernel.

    >>> from lmh.resets import DetachedReset
    >>> from lmh.surrogates import Triangle
    >>> one, zero = torch.tensor(1.0), torch.tensor(0.0)
    >>> values = Coefficients(one, one, one, zero, zero)
    >>> job = Job(steps=4, surrogate=Triangle(), reset=DetachedReset(), static=True)
    >>> run_neurons(job, torch.tensor([[0.5]]), State(zero, one / 2), values, kernel=Kernel.FUSED, keep=False).output.mT
    tensor([[1., 0., 1., 0.]])
    """
    if isinstance(currents, PendingCurrent) and kernel is not Kernel.COMPILED:
        currents = currents.computed()
    given = currents.given() if isinstance(currents, PendingCurrent) else Given(currents)
    if kernel is Kernel.EAGER:
        return Ran(*_run_eagerly(job, given.x, start, values, keep), kernel)
    job = replace(job, normalised=given.norm is not None, shortcut=given.shortcut is not None)
    batch = len(given.x) if job.static else len(given.x) // job.steps
    call = _Call(job, kernel, Extra(keep, recomputing()), Order.of(given.x, batch))
    output, *last = _Neurons.apply(call, given.x, given.shortcut, *(given.norm or [None] * 4), *start, *values)
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
        job.reset,
    )
    return output.to(currents.dtype), last if keep else None
