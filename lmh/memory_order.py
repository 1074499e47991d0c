"""How the values of a tensor [N, C, *F] lie in memory, as rows and columns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LONG_ENOUGH = 16  # values that a CPU with AVX-512 takes at once in float32


def store_weights(model: nn.Module, *, channels_last: bool) -> None:
    """Store the weights of convolutions channels last, or as torch makes them.

    Args:
        model: changed in place; its 4-D tensors, and the 5-D ones of 3-D convolutions.
        channels_last: which of the two.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim in (4, 5):
            last = torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d
            tensor.data = tensor.data.contiguous(memory_format=last if channels_last else torch.contiguous_format)


@dataclass(frozen=True)
class Order:
    """How [N, C, *F] lies in memory, and the R rows of K columns that it is in that order.

    A row is a channel of a sample where its values lie side by side and are long enough. Else it is a line of all
    channels, or a whole sample, and a channel is some of its columns.

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
    def channel_a_row(self) -> bool:
        """Whether every row is of one channel."""
        return not self.channels_last and math.prod(self.shape[2:]) >= LONG_ENOUGH

    @property
    def rows(self) -> int:
        """R."""
        if self.channel_a_row:
            return math.prod(self.shape[:2])
        return math.prod(self.shape[:1] + self.shape[2:3]) if self.channels_last else self.shape[0]

    @property
    def columns(self) -> int:
        """K."""
        if self.channel_a_row:
            return math.prod(self.shape[2:])
        return math.prod(self.shape[1:2] + self.shape[3:] if self.channels_last else self.shape[1:])

    def flatten(self, x: Tensor, *first: int) -> Tensor:
        """[N, C, *F] → [R, K], or [T·N, C, *F] → [T, R, K]; a view where ``x`` lies in this order."""
        x = x.movedim(1, -1) if self.channels_last else x
        return x.reshape(*first, self.rows, self.columns)

    def restore(self, x: Tensor, *first: int) -> Tensor:
        """[R, K] → [N, C, *F], or T of them, [T·N, C, *F]; a view."""
        batch, *rest = self.shape
        batch = math.prod(first) * batch
        return x.reshape(batch, *rest[1:], rest[0]).movedim(-1, 1) if self.channels_last else x.reshape(batch, *rest)

    def write_out(self, value: Tensor, first: int = 0) -> Tensor:
        """[] or [C] → [R, 1] or [1, K], as it broadcasts against rows and columns; behind ``first`` axes more."""
        lead = value.shape[:first]
        if value.ndim == first:
            return value[..., None, None].expand(*lead, self.rows, 1).contiguous()
        if self.channel_a_row:
            return value.unsqueeze(-2).expand(*lead, *self.shape[:2]).reshape(*lead, self.rows, 1)
        return value.unsqueeze(self._within).expand(*lead, *self._columns).reshape(*lead, 1, self.columns)

    def sum_up(self, terms: Tensor, ndim: int, first: int = 0) -> Tensor:
        """[R, 1] or [R, K] → [] or [C]: the sum over all that a value of ``ndim`` axes stands for."""
        if ndim == first:
            return terms.sum((-2, -1))
        if self.channel_a_row:
            return terms.squeeze(-1).unflatten(-1, self.shape[:2]).sum(-2)
        return terms.sum(-2).unflatten(-1, self._columns).sum(self._within)

    @property
    def _columns(self) -> tuple[int, int]:
        """The columns of a row of several channels, as the channels and the values of each, in their order."""
        channels = self.shape[1]
        within = self.columns // max(channels, 1)
        return (within, channels) if self.channels_last else (channels, within)

    @property
    def _within(self) -> int:
        """The axis of these two that is no channel."""
        return -2 if self.channels_last else -1
