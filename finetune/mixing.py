"""Mixing the images of a batch with each other: mixup and CutMix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ArgumentError


class Mix(Protocol):
    """What every way of mixing offers."""

    def __call__(self, x: Tensor, partner: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
        """Return the mixed batch, of the shape of ``x``, and the share of it that is still ``x``'s, 0 to 1."""
        ...


def _beta(alpha: float, generator: torch.Generator) -> float:
    """Draw from Beta(α, α)."""
    a, b = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator=generator).tolist()
    return a / (a + b) if a + b > 0 else 0.5


def _check_alpha(kind: str, alpha: float) -> None:
    if not (0 < alpha < math.inf):
        raise ArgumentError(f"{kind}: alpha is {alpha}; expected a finite number above 0. Usual are 0.2 to 1.")


@dataclass(frozen=True)
class Mixup:
    """x ← s x + (1 − s) x′ with s from Beta(α, α), once a batch (Zhang et al., ICLR 2018).

    Attributes:
        alpha: 1 draws every share alike, a small one mixes little.

    >>> mixed, share = Mixup()(torch.zeros(2, 3), torch.ones(2, 3), torch.Generator().manual_seed(0))
    >>> torch.allclose(mixed, torch.full((2, 3), 1 - share))
    True
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        _check_alpha("Mixup", self.alpha)

    def __call__(self, x: Tensor, partner: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
        """Return the mixed batch and the share of ``x``."""
        share = _beta(self.alpha, generator)
        return share * x + (1 - share) * partner, share


@dataclass(frozen=True)
class CutMix:
    """A box of each image is its partner's; it covers 1 − s of the image, s from Beta(α, α) (Yun et al., ICCV 2019).

    The box is cut at the border, and the share that is returned is the one that was left.

    Attributes:
        alpha: as for :class:`Mixup`.

    >>> x, partner = torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8)
    >>> mixed, share = CutMix()(x, partner, torch.Generator().manual_seed(0))
    >>> float(1 - mixed.mean()) == share
    True
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        _check_alpha("CutMix", self.alpha)

    def __call__(self, x: Tensor, partner: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
        """Return the mixed batch, [N, C, H, W] or [T, N, C, H, W], and the share of ``x``.

        Raises:
            ArgumentError: for a batch without two axes of pixels.
        """
        if x.ndim < 4:
            raise ArgumentError(
                f"CutMix: the batch has shape {list(x.shape)}; expected images [N, C, H, W]. Use Mixup()."
            )
        height, width = x.shape[-2:]
        side = math.sqrt(1 - _beta(self.alpha, generator))
        middle = torch.rand(2, generator=generator).tolist()
        (top, bottom), (left, right) = (
            _interval(place, side, size) for place, size in zip(middle, (height, width), strict=True)
        )
        mixed = x.clone()
        mixed[..., top:bottom, left:right] = partner[..., top:bottom, left:right]
        return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _interval(middle: float, side: float, size: int) -> tuple[int, int]:
    low, high = (middle * size + sign * side * size / 2 for sign in (-1, 1))
    return max(0, round(low)), min(size, round(high))


@dataclass(frozen=True)
class MixedLabels:
    """The labels of a mixed batch. Losses that are linear in the target take them as soft targets.

    Attributes:
        first: [N], whole numbers.
        second: of the partners, [N].
        share: of the first in the target, 0 to 1.
    """

    first: Tensor
    second: Tensor
    share: float


def mixed(
    inputs: tuple[Tensor, ...], labels: Tensor | None, ways: tuple[Mix, ...], seed: int, batch_axis: int
) -> tuple[tuple[Tensor, ...], Tensor | MixedLabels | None]:
    """Mix a batch by one of the ways, drawn from the seed, each sample with another one of the batch.

    Args:
        inputs: each [N, *F], or [T, N, *F] with ``batch_axis`` 1; all are mixed alike.
        labels: [N], or None where a teacher says what the mixed images show.
        ways: what to choose from; none leaves the batch as it is.
        seed: decides way, partners and share.
        batch_axis: where N is.
    """
    if not ways:
        return inputs, labels
    generator = torch.Generator().manual_seed(seed)
    way = ways[int(torch.randint(len(ways), (), generator=generator))]
    order = torch.randperm(inputs[0].shape[batch_axis], generator=generator).to(inputs[0].device)
    state = generator.get_state()
    found = []
    for x in inputs:
        generator.set_state(state)
        found.append(way(x, x.index_select(batch_axis, order), generator))
    share = found[0][1]
    return tuple(x for x, _ in found), None if labels is None else MixedLabels(labels, labels[order], share)
