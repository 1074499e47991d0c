"""FrozenSite: neurons that no longer learn, for inference and for export.

The equations are those of :func:`lmh.neurons.lmh_step`, bit for bit: products with 1 and sums with 0, of which IF and
LIF are full, are left out. Without gradients nothing is kept but the state, so all T steps are one pass over the
current; it is compiled where that is worth it (lmh/kernels.py). That pass can add a second current to the first; a sum
of 16 bits is then not rounded.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .kernels import MOST_COMPILED_STEPS, Kernel, choose, compiles, program
from .memory_order import Order
from .neurons import State
from .spiking import COEFFICIENTS, PerStep, SpikingSite, state_dtype
from .time_axis import Timed

NAMES = ("v_threshold", *COEFFICIENTS)
WORTH_COMPILING = 2**17  # from 2**15 on a compiled call is the faster one; here it is worth its compilation too


@dataclass(frozen=True)
class FrozenJob:
    """What a pass is made for.

    Attributes:
        steps: T.
        static: the current is that of one step, taken T times.
        per_step: the first axis of every value is T.
        binary: the output is s, not θ s.
        uint8: the output is uint8, not of the dtype of the current.
        numbers: the names of the coefficients that are 0 or 1 everywhere, and which.
        state: whether v_D[0] and v_S[0] are given; else they are 0.
        keep: whether the last state is wanted.
        summed: a second current is added to the first.
    """

    steps: int
    static: bool
    per_step: bool
    binary: bool
    uint8: bool
    numbers: tuple[tuple[str, float], ...]
    state: tuple[bool, bool]
    keep: bool
    summed: bool = False

    @property
    def forgets(self) -> bool:
        """Whether v_D[t−1] plays no part."""
        return _forgets(self.numbers)

    def part(self, steps: slice) -> FrozenJob:
        """The job of some of the steps; what is not at the end keeps the state, what is not at the beginning takes it.

        >>> job = FrozenJob(20, False, False, False, False, (), state=(False, True), keep=False)
        >>> job.part(slice(0, 20)) == job, job.part(slice(0, 16)).keep, job.part(slice(16, 32)).steps
        (True, True, 4)
        """
        stop = min(steps.stop, self.steps)
        state = (not self.forgets, True) if steps.start else self.state
        return replace(self, steps=stop - steps.start, state=state, keep=self.keep or stop < self.steps)


def _forgets(numbers: tuple[tuple[str, float], ...]) -> bool:
    """Whether μ_D is 0 everywhere."""
    return ("mu_d", 0.0) in numbers


def frozen_pass(job: FrozenJob, form: object, currents: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Run the T steps.

    Args:
        job: what is run.
        form: what tensors of another one would be compiled for anew; else without a meaning.
        currents: I, [T, *S], or [*S] where static, for any shape S of the neurons.
        tensors: if summed, the second current, of the shape of the first; of v_D[0] and v_S[0] what is given, and of θ,
            λ_S, λ_D, μ_S, μ_D what is no number; each of these broadcast against S, behind a first axis of T if per
            step (but the state).

    Returns:
        θ s or s, the steps one behind the other along the first axis of S, in the dtype of the current or uint8; if the
        last state is kept, v_D[T], unless it is forgotten, and v_S[T].
    """
    left = iter(tensors)
    added = [next(left)] if job.summed else []
    steps = [(now,) * job.steps if job.static else now.unbind(0) for now in (currents, *added)]
    dendrite, soma = (next(left) if given else None for given in job.state)
    numbers = dict(job.numbers)
    given = {name: next(left) for name in NAMES if name not in numbers}
    dtype = given["v_threshold"].dtype
    outputs = []
    for t, parts in enumerate(zip(*steps, strict=True)):
        now: dict[str, Tensor | float] = {
            **numbers,
            **{name: value[t] if job.per_step else value for name, value in given.items()},
        }
        theta = now["v_threshold"]
        dendrite = _sum(
            [_product(now["mu_d"], dendrite), _product(now["mu_s"], soma), _sum([part.to(dtype) for part in parts])]
        )
        membrane = _sum([_product(now["lambda_s"], soma), _product(now["lambda_d"], dendrite)])
        spikes = (membrane >= theta).to(dtype)
        output = spikes * theta
        soma = membrane - output
        outputs.append((spikes if job.binary else output).to(torch.uint8 if job.uint8 else currents.dtype))
    if not job.keep:
        return (torch.cat(outputs),)
    return torch.cat(outputs), *(() if job.forgets else (dendrite,)), soma


def _product(factor: Tensor | float, potential: Tensor | None) -> Tensor | None:
    if isinstance(factor, Tensor):
        return None if potential is None else factor * potential
    return potential if factor else None


def _sum(terms: Sequence[Tensor | None]) -> Tensor:
    return functools.reduce(torch.add, [term for term in terms if term is not None])


def _alike(one: object, other: object) -> bool:
    """Whether two summands are tensors of one shape and dtype; one may be a number."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    return (one.shape, one.dtype) == (other.shape, other.dtype)


class FrozenSite(SpikingSite):
    """The neurons of a :class:`SpikingSite` with θ, λ, μ and the start as constants.

    Args:
        site: whose neurons; not changed.
        binary: give s, 0 or 1, instead of θ s, where the next layers hold θ in their weights.
        uint8: give it in uint8; only with ``binary``.
    """

    def __init__(self, site: SpikingSite, *, binary: bool = False, uint8: bool = False) -> None:
        Timed.__init__(self, site.time)
        self.neuron, self.static = site.neuron, site.static
        self.binary, self.uint8 = binary, uint8
        theta = site.v_threshold.detach()
        values = {name: value.detach() for name, value in zip(COEFFICIENTS, site.coefficients(), strict=True)}
        self.theta: Tensor
        self.register_buffer("theta", theta.clone())
        self.register_buffer("v_init", site.v_init.detach().clone())
        for name, value in values.items():
            self.register_buffer(name, value.clone())
        self.silent = not bool(site.v_init.any())
        self.numbers = tuple(
            (name, number)
            for name, value in values.items()
            for number in ((1.0,) if name == "lambda_d" else (0.0, 1.0))
            if bool((value == number).all())
        )
        self.kernel = None
        self._carried = None

    @property
    def v_threshold(self) -> Tensor:
        """θ, shape [] or [C] (with a first axis of T for ``PerStep()``), in the unit of the current."""
        return self.theta

    def coefficients(self) -> tuple[Tensor, ...]:
        """Return λ_S, λ_D, μ_S and μ_D, each of shape [], [C] or [T]."""
        return tuple(getattr(self, name) for name in COEFFICIENTS)

    def forward(self, current: Tensor, other: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Run the neurons over the steps of this call, as :meth:`SpikingSite.forward`, without gradients.

        Args:
            current: [T·N, *F], or [N, *F] where the site is static; in the unit of θ.
            other: what is to be added to it, such as a block's shortcut.

        Returns:
            θ s or s, [T·N, *F], of the current's dtype or uint8. The state is float32 for 16-bit currents.

        Raises:
            StateError: as :meth:`SpikingSite.forward`.
        """
        if other is not None and not _alike(current, other):
            current, other = current + other, None
        steps = self.time.steps
        kernel = choose(current, steps=min(steps, MOST_COMPILED_STEPS), training=True, worth=WORTH_COMPILING)
        if other is not None and kernel is not Kernel.COMPILED:
            current, other = current + other, None
        dtype = state_dtype(current)
        start, begun = self._start(current, dtype)
        rests = self._carried is None
        state = (not rests and not _forgets(self.numbers), not (rests and self.silent))
        job = FrozenJob(
            steps,
            self.static,
            self._per_step,
            self.binary,
            self.uint8,
            self.numbers,
            state=state,
            keep=self.time.carry,
            summed=other is not None,
        )
        tensors = [potential for potential, given in zip(start, state, strict=True) if given]
        values = self._values(dtype, begun, steps)._asdict()
        tensors += [values[name] for name in NAMES if name not in dict(self.numbers)]
        first = [0] * sum(state) + [int(self._per_step)] * (len(tensors) - sum(state))
        if kernel is Kernel.COMPILED:
            kernel, (output, *last) = self._compiled(job, current, other, tensors, first)
        else:
            currents = current if self.static else self.unfold(current)
            output, *last = frozen_pass(job, None, currents, *map(partial(_aligned, ndim=current.ndim), tensors, first))
        if not torch.compiler.is_compiling():
            self.kernel = kernel
        if last:
            dendrite = start.v_dendrite if job.forgets else last[0]
            self._carried = State(dendrite.detach(), last[-1].detach()), begun + steps
        return output

    @property
    def _per_step(self) -> bool:
        return isinstance(self.neuron.granularity, PerStep)

    def _compiled(
        self, job: FrozenJob, current: Tensor, other: Tensor | None, tensors: list[Tensor], first: list[int]
    ) -> tuple[Kernel, list[Tensor]]:
        """Run compiled passes over rows and columns, each from the state in which the one before ended.

        Returns:
            The kernel, FUSED where a compilation failed; and the output and, if it is kept, the last state.
        """
        order = Order.of(current, len(current) if self.static else len(current) // job.steps)
        lead = () if self.static else (job.steps,)
        flat = [
            order.flatten(tensor) if tensor.ndim > max(1, axes + 1) else order.write_out(tensor, axes)
            for tensor, axes in zip(tensors, first, strict=True)
        ]
        form = current.dtype, order.channel_a_row, order.rows == 1, order.columns == 1
        currents = [order.flatten(each, *lead) for each in (current, other) if each is not None]
        state, values = flat[: sum(job.state)], flat[sum(job.state) :]
        kernel, outputs = Kernel.COMPILED, []
        for begin in range(0, job.steps, MOST_COMPILED_STEPS):
            now = slice(begin, begin + MOST_COMPILED_STEPS)
            part = job.part(now)
            output, *state = program(frozen_pass, part, form)(
                *(each if job.static else each[now] for each in currents),
                *state,
                *(value[now] if job.per_step else value for value in values),
            )
            outputs.append(output)
            kernel = kernel if compiles(part) else Kernel.FUSED
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return kernel, [order.restore(output, job.steps), *map(order.restore, state)]


def _aligned(value: Tensor, first: int, *, ndim: int) -> Tensor:
    """[] or [C] as it broadcasts against [N, C, *F], behind an axis more if ``first``; a state [N, C, *F] as it is."""
    if value.ndim in (0, ndim):
        return value
    return value.reshape(*value.shape[:first], *([-1] if value.ndim > first else [1]), *[1] * (ndim - 2))
