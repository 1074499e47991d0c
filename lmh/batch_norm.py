"""BatchNorm as a part of the neurons behind it: its statistics, and its adjoint.

A layer of a spiking network in training is a convolution, BatchNorm, often a residual sum, and neurons. The compiled
passes of lmh/passes.py compute the current from the convolution's output x as they read it,

    I = γ (x − m)/σ + β + r        r: what the residual sum adds, if there is one

so that neither BatchNorm's output nor the sum is ever written, and the backward pass sums Ī and Ī (x − m) beside the
neurons' own gradients. From these follows, with sums over all n values of a channel and all steps,

    γ̄ = Σ Ī (x − m)/σ      β̄ = Σ Ī      r̄ = Ī      x̄ = γ/σ (Ī − β̄/n − (x − m)/σ γ̄/n)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .kernels import plainly, program
from .memory_order import Order

BATCH_NORM = "BatchNorm"


class Norm(NamedTuple):
    """A BatchNorm as one batch meets it, [C] each: m and σ = √(variance + ε), in float32 or wider, γ and β."""

    mean: Tensor
    deviation: Tensor
    gain: Tensor
    bias: Tensor


class Given(NamedTuple):
    """What the neurons of a site are given: their current, or what it is computed from.

    Attributes:
        x: the current, or BatchNorm's input, [T·N, C, *F].
        shortcut: r, of the shape of x, or None.
        norm: None where x is the current.
    """

    x: Tensor
    shortcut: Tensor | None = None
    norm: Norm | None = None


@dataclass(frozen=True)
class PendingCurrent:
    """The current of a site before it is computed: BatchNorm of x, and what a residual sum adds.

    Attributes:
        norm: the BatchNorm, with γ and β, in train mode.
        x: its input, [T·N, C, *F].
        shortcut: r, of the shape of x, or None.
    """

    norm: _BatchNorm
    x: Tensor
    shortcut: Tensor | None = None

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient is wanted of anything that the current is computed from."""
        return any(
            given is not None and given.requires_grad for given in (self.x, self.shortcut, *self.norm.parameters())
        )

    def __add__(self, other: Tensor) -> PendingCurrent | Tensor:
        """Add r, once; a second one, or one of another shape, is added to the computed current."""
        alike = isinstance(other, Tensor) and (other.shape, other.dtype) == (self.x.shape, self.x.dtype)
        return replace(self, shortcut=other) if alike and self.shortcut is None else self.computed() + other

    add = __radd__ = __add__

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take part in torch's own sums, from either side."""
        if function not in (torch.add, Tensor.add, Tensor.__add__) or kwargs:
            return NotImplemented
        one, other = args
        return one + other if isinstance(one, cls) else other + one

    def computed(self) -> Tensor:
        """Return I, [T·N, C, *F], as BatchNorm itself gives it; its running statistics learn of x."""
        current = _BatchNorm.forward(self.norm, self.x)
        return current if self.shortcut is None else current + self.shortcut

    def given(self) -> Given:
        """Return what the current is computed from; BatchNorm's running statistics learn of x."""
        norm = self.norm
        mean, deviation = self.measured()
        return Given(self.x, self.shortcut, Norm(mean, deviation, norm.weight, norm.bias))

    def measured(self) -> tuple[Tensor, Tensor]:
        """Return m and σ of x, [C], in float32 or wider; BatchNorm's running statistics learn of x.

        In one pass: sums over each sample and channel of what is left of x when the first value there is taken away,
        so that a mean far from 0 costs no digits.
        """
        norm = self.norm
        with plainly(self.x.device.type):
            x, axis = self.x.detach().flatten(2), 2
            if Order.of(self.x).channels_last:
                x, axis = x.movedim(1, -1), 1
            size, count = x.shape[axis], self.x.numel() / self.x.shape[1]
            first, total, squares = (found.double() for found in program(moments_pass, BATCH_NORM, axis)(x))
            means = first + total / size
            mean = means.mean(0)
            within = (squares - total.square() / size).clamp_min(0).mean(0) / size
            variance = within + (means - mean).square().mean(0)
            if norm.track_running_stats and norm.running_mean is not None and norm.running_var is not None:
                share = norm.momentum or 0.0
                if norm.num_batches_tracked is not None:
                    norm.num_batches_tracked.add_(1)
                    share = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
                norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
                norm.running_var.lerp_((variance * count / (count - 1)).to(norm.running_var.dtype), share)
            wide = torch.promote_types(norm.weight.dtype, torch.float32)
            return mean.to(wide), (variance + norm.eps).sqrt().to(wide)


def moments_pass(job: object, axis: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first value of each sample and channel, and the sums of x without it and of the square of that.

    Args:
        job: without a meaning; as every pass has one.
        axis: of the positions P.
        x: [M, C, P] or [M, P, C].

    Returns:
        [M, C] each, in float32 or wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    first = x.narrow(axis, 0, 1).to(wide)
    rest = x.to(wide) - first
    return first.squeeze(axis), rest.sum(axis), rest.square().sum(axis)


def adjoint_pass(job: object, form: object, gradient: Tensor, x: Tensor, values: Tensor) -> Tensor:
    """x̄ = γ/σ Ī − slope (x − m) − offset.

    Args:
        job: without a meaning.
        form: without a meaning.
        gradient: Ī, [T, R, K] or [R, K].
        x: of that shape.
        values: γ/σ, m, slope and offset, [4, R, 1] or [4, 1, K].

    Returns:
        x̄, of the shape and dtype of x.
    """
    scale, mean, slope, offset = values.unbind()
    return (scale * gradient - slope * (x.to(values.dtype) - mean) - offset).to(x.dtype)


def linear(norm: Norm) -> Tensor:
    """Return m, γ/σ and β − m γ/σ, [3, C].

    >>> linear(Norm(*torch.tensor([[1.0], [2.0], [4.0], [0.5]]))).mT
    tensor([[ 1.0000,  2.0000, -1.5000]])
    """
    scale = norm.gain.detach() / norm.deviation
    return torch.stack([norm.mean, scale, norm.bias.detach() - norm.mean * scale])


def adjoint_values(norm: Norm, count: float, total: Tensor, centred: Tensor) -> Tensor:
    """Return γ/σ, m, and slope and offset of :func:`adjoint_pass`, [4, C].

    Args:
        norm: the BatchNorm.
        count: n.
        total: Σ Ī, [C].
        centred: Σ Ī (x − m), [C].
    """
    scale = norm.gain.detach() / norm.deviation
    slope = scale * centred / (count * norm.deviation.square())
    return torch.stack([scale, norm.mean, slope, scale * total / count])
