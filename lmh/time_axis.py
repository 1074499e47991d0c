"""Time: folded into the batch between graph nodes, unfolded only inside a site.

A spiking network runs T steps in one forward call. Between nodes a tensor is either constant, [N, *F], or
timed, [T·N, *F] with time outermost. After the last site the affine tail of a network in eval mode runs on
the mean over time, [N, *F]. One :class:`TimeAxis`, shared by all modules of a network, says how many steps
the present call has and what it returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import ArgumentError, StateError
from .readout import Average, MeanReadout
from .structures import each_tensor

MAX_TIMESTEPS = 1024


class Readout(Enum):
    """What a forward call returns."""

    MEAN = "the answer: the mean over time, or another average of it, [N, *F]"
    PREFIXES = "the answer after steps 1…t, for every t, [T, N, *F]"
    PER_STEP = "every step, [T, N, *F]"
    RUNNING = "in eval mode, the answer after this call's steps and those before it in carry_state, [N, *F]"

    @property
    def once(self) -> bool:
        """Whether there is one answer, not one for each step."""
        return self in (Readout.MEAN, Readout.RUNNING)


@dataclass(eq=False)
class TimeAxis:
    """The time axis of one network.

    Attributes:
        timesteps: T, as converted.
        steps: steps of the present call; T outside :func:`per_step` with ``steps=``.
        readout: what the present call returns.
        carry: whether the sites keep their state for the next call.
        average: how steps become one answer, where the call does not return every step.
    """

    timesteps: int
    steps: int = 0
    readout: Readout = Readout.MEAN
    carry: bool = False
    average: Average = field(default_factory=MeanReadout)

    def __post_init__(self) -> None:
        if not (isinstance(self.timesteps, int) and 1 <= self.timesteps <= MAX_TIMESTEPS):
            raise ArgumentError(
                f"timesteps is {self.timesteps!r}; expected a whole number from 1 to {MAX_TIMESTEPS}. "
                "Most converted networks need 4 to 32."
            )
        self.steps = self.timesteps


class Timed(nn.Module):
    """A module that knows its network's time axis."""

    def __init__(self, time: TimeAxis) -> None:
        super().__init__()
        self.time = time

    def unfold(self, x: Tensor) -> Tensor:
        """Return [T·N, *F] as [T, N, *F], without a copy."""
        return x.unflatten(0, (self.time.steps, -1))

    def drop_state(self) -> None:
        """Forget what was kept for the next call; sites, gates and the tail's entrance keep something."""

    def keep_samples(self, which: Tensor) -> None:
        """Of what was kept for the next call, keep the samples where ``which``, [N], is True."""


class Border(Timed, ABC):
    """Stands between regions. A tuple, such as ``chunk`` gives, crosses part by part."""

    def forward(self, x: Any) -> Any:
        """Let a tensor, or every tensor in ``x``, cross."""
        return each_tensor(self.cross, x)

    @abstractmethod
    def cross(self, x: Tensor) -> Tensor:
        """Return one tensor as it is on the other side."""


class FoldEvents(Border):
    """The entrance of a network that takes frames over time: [T, N, *F] → [T·N, *F]."""

    def cross(self, x: Tensor) -> Tensor:
        """Fold time into the batch."""
        check_frames(x, self.time.steps)
        return x.flatten(0, 1)


def check_frames(x: Tensor, steps: int) -> None:
    """Refuse event frames of another number of steps.

    Raises:
        ArgumentError: if the first axis of ``x`` is not of that length.
    """
    if x.shape[0] != steps:
        raise ArgumentError(
            f"input: the first axis has {x.shape[0]} steps; expected {steps}, as this call runs that many. Pass frames "
            "as [T, N, …]."
        )


class RepeatOverTime(Border):
    """Where a constant meets a timed tensor: [N, *F] → [T·N, *F]."""

    def cross(self, x: Tensor) -> Tensor:
        """Repeat ``x`` for every step."""
        return x.repeat(self.time.steps, *[1] * (x.ndim - 1))


def _reduce(time: TimeAxis, x: Tensor) -> Tensor:
    """Mean over time of a folded tensor, or its mean over every prefix, folded again; weighted as the readout says."""
    unfolded = x.unflatten(0, (time.steps, -1))
    weights = time.average.weights(time.steps)
    if not any(weights):  # nothing has been read yet
        weights = MeanReadout().weights(time.steps)
    first = next(step for step, weight in enumerate(weights) if weight)
    if time.readout is Readout.MEAN:
        read, even = unfolded[first:], len(set(weights[first:])) == 1
        return read.mean(0) if even else (read * _column(weights[first:], x) / sum(weights)).sum(0)
    before = _column(range(1, first + 1), x)
    total = _column(accumulate(weights[first:]), x)
    answers = (unfolded[:first].cumsum(0) / before, (unfolded[first:] * _column(weights[first:], x)).cumsum(0) / total)
    return torch.cat(answers).flatten(0, 1)


def _column(values: Iterable[float], like: Tensor) -> Tensor:
    """Return a value for each step, [t, 1, …], to be multiplied with an unfolded tensor."""
    return torch.tensor([float(v) for v in values], device=like.device, dtype=like.dtype).reshape(-1, *[1] * like.ndim)


class EnterTail(Border):
    """Before the affine nodes behind the last site: the mean over time in eval mode.

    An affine node commutes with the mean, so it runs once instead of T times. In train mode, where
    BatchNorm and dropout see single steps, and for per-step outputs the tensor stays [T·N, *F].
    """

    def __init__(self, time: TimeAxis) -> None:
        super().__init__(time)
        self._so_far: tuple[list[Any], int] | None = None

    def forward(self, x: Any) -> Any:
        """Let a tensor, or every tensor in ``x``, cross; for a running answer with what crossed before."""
        if self.training or self.time.readout is not Readout.RUNNING:
            return super().forward(x)
        parts, structure = pytree.tree_flatten(x)
        before, begun = self._so_far or ([0.0] * len(parts), 0)
        sums = [
            total + self.unfold(part).sum(0, dtype=torch.promote_types(part.dtype, torch.float32))
            for total, part in zip(before, parts, strict=True)
        ]
        self._so_far = sums, begun + self.time.steps
        means = [(total / self._so_far[1]).to(part.dtype) for total, part in zip(sums, parts, strict=True)]
        return pytree.tree_unflatten(means, structure)

    def drop_state(self) -> None:
        """Forget the sum over the steps so far."""
        self._so_far = None

    def keep_samples(self, which: Tensor) -> None:
        """Keep the sums of the samples where ``which``, [N], is True."""
        if self._so_far is not None:
            sums, begun = self._so_far
            self._so_far = [total[which] for total in sums], begun

    def cross(self, x: Tensor) -> Tensor:
        """Reduce [T·N, *F] to [N, *F], to prefix means [T·N, *F], or pass it on."""
        if self.training or self.time.readout is Readout.PER_STEP:
            return x
        return _reduce(self.time, x)


class RepeatInTail(RepeatOverTime):
    """Where a constant meets the tail: repeated unless the tail runs on the mean."""

    def cross(self, x: Tensor) -> Tensor:
        """Repeat ``x`` for every step that the tail runs."""
        if self.training or not self.time.readout.once:
            return super().cross(x)
        return x


class LeaveTail(Border):
    """Behind the affine tail: the mean over time in train mode, where the tail ran step by step."""

    def cross(self, x: Tensor) -> Tensor:
        """Reduce what :class:`EnterTail` left unreduced."""
        if self.training and self.time.readout is not Readout.PER_STEP:
            return _reduce(self.time, x)
        return x


class LeaveTime(Border):
    """The exit of a network: [N, *F] as it is, or [T·N, *F] → [T, N, *F]."""

    def cross(self, x: Tensor) -> Tensor:
        """Give the result the shape that the caller asked for."""
        return x if self.time.readout.once else self.unfold(x)


class LeaveConstant(Border):
    """The exit of what no site reaches: [N, *F] as it is, or the same at every step, [T, N, *F]."""

    def cross(self, x: Tensor) -> Tensor:
        """Repeat ``x``, without a copy, where the caller asked for every step."""
        return x if self.time.readout.once else x.expand(self.time.steps, *x.shape)


def takes_events(snn: nn.Module) -> bool:
    """Whether the network was converted with ``EventFrames()`` and takes frames over time, [T, N, *F].

    >>> takes_events(nn.Sequential(FoldEvents(TimeAxis(4)))), takes_events(nn.Linear(2, 2))
    (True, False)
    """
    return any(isinstance(module, FoldEvents) for module in snn.modules())


def time_axis(snn: nn.Module) -> TimeAxis:
    """Return the time axis of a converted network, wrapped or not (DDP, torch.compile).

    Raises:
        ArgumentError: if ``snn`` holds no converted network.
    """
    if not isinstance(snn, nn.Module):
        advice = "Pass its .snn." if isinstance(getattr(snn, "snn", None), nn.Module) else "Convert an ANN first."
        raise ArgumentError(
            f"the network is a {type(snn).__name__}; expected the module that lmh.convert.convert made. {advice}"
        )
    for module in snn.modules():
        if isinstance(module, Timed):
            return module.time
    raise ArgumentError(
        f"{type(snn).__name__} has no spiking sites; expected a network made by lmh.convert.convert. Convert it first."
    )


@contextmanager
def call(time: TimeAxis, readout: Readout, steps: int | None) -> Iterator[None]:
    """Let the forward calls inside this block run ``steps`` steps (T if None) and return ``readout``."""
    before = time.readout, time.steps
    time.readout = readout
    time.steps = time.steps if steps is None else TimeAxis(steps).timesteps
    try:
        yield
    finally:
        time.readout, time.steps = before


def per_step(snn: nn.Module, *inputs: Tensor, steps: int | None = None) -> Any:
    """Run ``snn`` and return its output at every step.

    Args:
        snn: a converted network.
        *inputs: as ``snn`` takes them: [N, *F] each, or [T, N, *F] for a network converted with ``EventFrames()``.
        steps: how many steps to run, T unless given. Inside :func:`carry_state` each call runs the next ones.

    Returns:
        [steps, N, *out]; its mean over axis 0 is ``snn(x)`` up to rounding, unless the network ends in a softmax or
        has another readout (:mod:`lmh.readout`).
        A network that returns a tuple or a dict returns the same with a tensor [steps, N, *out] in each place:
        one that no neuron reaches is repeated, and what does not depend on the input stays as it is.

    Raises:
        ArgumentError: if ``snn`` is not a converted network or ``steps`` is out of range.

    >>> from lmh.convert import load
    >>> snn, x = load("zoo:digits-cnn-t4"), torch.zeros(2, 1, 8, 8)
    >>> outputs = per_step(snn, x)
    >>> outputs.shape, torch.allclose(outputs.mean(0), snn(x), atol=1e-5)
    (torch.Size([4, 2, 10]), True)
    """
    with call(time_axis(snn), Readout.PER_STEP, steps):
        return snn(*inputs)


def prefixes(snn: nn.Module, *inputs: Tensor, steps: int | None = None) -> Any:
    """Run ``snn`` once and return what it would have answered after every t ≤ T.

    Args:
        snn: a converted network.
        *inputs: as for :func:`per_step`.
        steps: how many steps to run, T unless given.

    Returns:
        [steps, N, *out]; entry t−1 is the answer after t steps, the last one is ``snn(x)``. Tuples and dicts as for
        :func:`per_step`.

    Raises:
        ArgumentError: as :func:`per_step`.

    >>> from lmh.convert import load
    >>> snn, x = load("zoo:digits-cnn-t4"), torch.zeros(2, 1, 8, 8)
    >>> answers = prefixes(snn, x)
    >>> answers.shape, torch.allclose(answers[1], per_step(snn, x)[:2].mean(0), atol=1e-5)
    (torch.Size([4, 2, 10]), True)
    """
    with call(time_axis(snn), Readout.PREFIXES, steps):
        return snn(*inputs)


@contextmanager
def carry_state(snn: nn.Module) -> Iterator[None]:
    """Keep the membrane state from call to call inside this block, detached between calls.

    For streaming, early exit and time slices: ``per_step(snn, x, steps=k)`` runs the next k steps. Leaving
    the block drops the state; outside of it every call starts anew.

    Raises:
        StateError: if a block is already open, or a call comes with another batch shape.

    >>> from lmh.convert import load
    >>> snn, x = load("zoo:digits-cnn-t4"), torch.zeros(2, 1, 8, 8)
    >>> with carry_state(snn):
    ...     outputs = torch.cat([per_step(snn, x, steps=1), per_step(snn, x, steps=3)])
    >>> torch.allclose(outputs, per_step(snn, x), atol=1e-5)
    True
    """
    time = time_axis(snn)
    if time.carry:
        raise StateError("carry_state: a block is already open for this network. Close it before opening another.")
    time.carry = True
    try:
        yield
    finally:
        time.carry = False
        for module in snn.modules():
            if isinstance(module, Timed):
                module.drop_state()
