"""Data sets as values: their parts, and images that are in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from .images import AnyPreprocessing, Preprocessing, Split


@dataclass(frozen=True)
class DataSet:
    """A data set.

    Attributes:
        name: the SPEC that named it.
        train: for calibration and training.
        test: for figures.
        classes: class names in the order of the labels.
        preprocessing: with its own mean and std, for networks that are trained on it; None where an architecture's do.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    preprocessing: Preprocessing | None = None

    def normalising(self, usual: AnyPreprocessing) -> AnyPreprocessing:
        """Return what an architecture usually does to its input, with the data set's own mean and std if it has any."""
        own = self.preprocessing
        if own is None or not isinstance(usual, Preprocessing) or len(usual.mean) != len(own.mean):
            return usual
        return replace(usual, mean=own.mean, std=own.std)


@dataclass(frozen=True)
class ArraySplit:
    """Images in memory, uint8 [N, C, H, W], labels int64 [N]."""

    pixels: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of a sample, (C, H, W)."""
        return tuple(self.pixels.shape[1:])

    def images(self, indices: Tensor) -> Tensor:
        """Return the chosen images, uint8 [n, C, H, W]."""
        return self.pixels[indices]
