"""How the values of a tensor [N, C, *F] lie in memory, as one flat axis."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Order:
    """How [N, C, *F] lies in memory, and the flat axis of its M values in that order.

    Attributes:
        shape: [N, C, *F].
        channels_last: whether the channels of a position lie side by side.
    """

    shape: torch.Size
    channels_last: bool

    @classmethod
    def of(cls, x: Tensor, batch: int | None = None) -> Order:
        """Return the order of ``x``, or of a part of it with a batch of that size.

        >>> Order.of(torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)).channels_last
        True
        """
        shape = x.shape if batch is None else torch.Size((batch, *x.shape[1:]))
        return cls(shape, x.ndim > 1 and x.movedim(1, -1).is_contiguous())

    @property
    def positions(self) -> int:
        """How many values a channel of a sample has."""
        return math.prod(self.shape[2:])

    def flatten(self, x: Tensor, *first: int) -> Tensor:
        """[N, C, *F] → [M], or [T·N, C, *F] → [T, M]; a view where ``x`` lies in this order."""
        x = x.movedim(1, -1) if self.channels_last else x
        return x.reshape(*first, math.prod(self.shape))

    def restore(self, x: Tensor, *first: int) -> Tensor:
        """[M] → [N, C, *F], or [T·M] → [T·N, C, *F]; a view."""
        batch, *rest = self.shape
        batch = math.prod(first) * batch
        return x.reshape(batch, *rest[1:], rest[0]).movedim(-1, 1) if self.channels_last else x.reshape(batch, *rest)

    def write_out(self, value: Tensor) -> Tensor:
        """[.., C] → [.., M]: a value per channel for each of its positions."""
        batch, channels = self.shape[:2]
        value = value.unsqueeze(-2 if self.channels_last else -1)
        axes = (self.positions, channels) if self.channels_last else (channels, self.positions)
        return value.unsqueeze(-3).expand(*value.shape[:-2], batch, *axes).flatten(-3)

    def sum_up(self, terms: Tensor) -> Tensor:
        """[.., M] → [.., C]: the sum over the values of each channel."""
        batch, channels = self.shape[:2]
        if self.channels_last:
            return terms.unflatten(-1, (batch * self.positions, channels)).sum(-2)
        return terms.unflatten(-1, (batch, channels, self.positions)).sum(-1).sum(-2)
