"""What happens to images between a data set and a network, in whole batches on tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError, DataError
from .augmentation import Augmentation, InTurn, chosen_rows


@dataclass(frozen=True)
class Preprocessing:
    """Input size and normalisation, x = (pixel/255 − mean)/std per channel.

    Attributes:
        input_size: (C, H, W) for images; networks of other signals have (C, *F) and take no data set.
        mean: per channel, in units of full brightness.
        std: per channel, likewise.
    """

    input_size: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        channels = self.input_size[0]
        if len(self.mean) != channels or len(self.std) != channels:
            raise ArgumentError(
                f"normalisation has {len(self.mean)} means and {len(self.std)} deviations for {channels} channels; "
                "expected one for each. Pass --mean and --std to fit --input-size."
            )
        if not (all(value > 0 for value in self.std) and all(map(math.isfinite, (*self.mean, *self.std)))):
            raise ArgumentError(f"mean is {self.mean} and std {self.std}; expected finite numbers, std above 0.")

    def described(self) -> dict[str, str]:
        """Return what a card says of it in words, by name."""
        return {"input": _sizes(self.input_size), "mean, std": f"{list(self.mean)}, {list(self.std)}"}

    def __call__(self, images: Tensor) -> Tensor:
        """Return normalised float32 [N, C, H, W] from uint8 [N, C, H, W], resized where sizes differ."""
        if images.ndim != 4:
            raise DataError(
                f"the samples are event frames {list(images.shape[1:])} and the model takes images "
                f"{list(self.input_size)}; expected images. Use --data digits, npz:FILE, cifar10:DIR or the like."
            )
        if images.shape[1] != self.input_size[0]:
            raise DataError(
                f"the images have {images.shape[1]} channels and the model takes {self.input_size[0]}; "
                "expected the same. Use data of the right kind, or name the model's input with --input-size C,H,W."
            )
        x = images.float() / 255
        if tuple(images.shape[2:]) != self.input_size[1:]:
            x = F.interpolate(x, self.input_size[1:], mode="bilinear", antialias=True)
        mean, std = (x.new_tensor(values).reshape(1, -1, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std


@dataclass(frozen=True)
class FramePreprocessing:
    """Input size of event frames, whose values are numbers of events and stay so: x = count.

    Attributes:
        input_size: (C, H, W) of a frame, C = 2 polarities.

    >>> FramePreprocessing((2, 2, 2))(torch.ones(3, 4, 2, 8, 8, dtype=torch.int16)).shape
    torch.Size([4, 3, 2, 2, 2])
    """

    input_size: tuple[int, ...]

    def described(self) -> dict[str, str]:
        """Return what a card says of it in words, by name."""
        return {"input": f"event frames, T × {_sizes(self.input_size)}"}

    def __call__(self, frames: Tensor) -> Tensor:
        """Return float32 [T, N, C, H, W] from whole numbers [N, T, C, H, W]; a smaller size has the means of areas."""
        if frames.ndim != 5:
            raise DataError(
                f"the samples are images {list(frames.shape[1:])} and the model takes event frames "
                f"{['T', *self.input_size]}; expected event frames. Use --data cifar10dvs:DIR, nmnist:DIR or "
                "dvsgesture:DIR."
            )
        if frames.shape[2] != self.input_size[0]:
            raise DataError(
                f"the frames have {frames.shape[2]} channels and the model takes {self.input_size[0]}; expected the "
                "same, two polarities. Name the model's input with --input-size 2,H,W."
            )
        x = frames.transpose(0, 1).float()
        if tuple(x.shape[3:]) != self.input_size[1:]:
            small = F.interpolate(x.flatten(0, 1), self.input_size[1:], mode="bilinear", antialias=True)
            x = small.unflatten(0, x.shape[:2])
        return x.contiguous()


def _sizes(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


AnyPreprocessing: TypeAlias = Preprocessing | FramePreprocessing
_KINDS: dict[str, type[AnyPreprocessing]] = {kind.__name__: kind for kind in (Preprocessing, FramePreprocessing)}


def preprocessing_of(plain: Mapping[str, Any]) -> AnyPreprocessing:
    """Rebuild a preprocessing from the values that files keep; more names than its own may be among them.

    Raises:
        KeyError: for a name that is missing, or a type that is not known.

    >>> preprocessing_of({"type": "FramePreprocessing", "input_size": [2, 48, 48], "assumed": []})
    FramePreprocessing(input_size=(2, 48, 48))
    """
    kind = _KINDS[plain.get("type", Preprocessing.__name__)]
    return kind(*(tuple(plain[item.name]) for item in fields(kind)))


class Split(Protocol):
    """One part of a data set."""

    @property
    def labels(self) -> Tensor | None:
        """Return int64 [n], or None."""
        ...

    def __len__(self) -> int:
        """Return n."""
        ...

    def images(self, indices: Tensor) -> Tensor:
        """Return uint8 [len(indices), C, H, W], or event frames, int16 [len(indices), T, 2, H, W]."""
        ...


@dataclass(frozen=True)
class Batches:
    """Batches of a split for a network: iterate as often as wanted.

    Yields (x, y) with x float32 [N, C, H, W] normalised and y int64 [N], or x alone without labels. Event frames are
    counts, x float32 [T, N, 2, H, W], and what augmentation draws for a sample is done to all its frames. Without
    a ``shuffle_seed`` the order is fixed; with one it is drawn anew for each epoch from (seed, epoch), and so
    is the augmentation, so that a resumed run sees the same batches.

    Attributes:
        split: the images, or event frames.
        preprocessing: what turns them into input.
        batch_size: the last batch may be smaller.
        indices: of the images to take; all unless given.
        augmentation: ``CropFlip()``, or several by ``InTurn``; none unless given.
        shuffle_seed: draw the order anew for each epoch.
        epoch: that order and augmentation are drawn for.
        start: the first batch to give; those before it are passed over without reading their images.
        rank: of this process among those that share each batch.
        world: number of those processes: each takes every ``world``-th image of a batch. A last batch with fewer
            images than processes is left out.
    """

    split: Split
    preprocessing: AnyPreprocessing
    batch_size: int = 128
    indices: Tensor | None = None
    augmentation: Augmentation | None = None
    shuffle_seed: int | None = None
    epoch: int = 0
    start: int = 0
    rank: int = 0
    world: int = 1

    def at_epoch(self, epoch: int) -> Batches:
        """Return the batches of another epoch."""
        return replace(self, epoch=epoch)

    def from_batch(self, index: int) -> Batches:
        """Return the batches from this one on, the same as when all are read."""
        return replace(self, start=index)

    def shard(self, rank: int, world: int) -> Batches:
        """Return the share of one of several processes: rows rank, rank + world, … of every batch."""
        return replace(self, rank=rank, world=world)

    def __len__(self) -> int:
        full, rest = divmod(self.count, self.batch_size)
        return full + (rest >= self.world)

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.split) if self.indices is None else len(self.indices)

    def __iter__(self) -> Iterator[Any]:
        order = torch.arange(len(self.split)) if self.indices is None else self.indices
        generator = torch.Generator()
        if self.shuffle_seed is not None:
            generator.manual_seed((self.shuffle_seed * 1_000_003 + self.epoch) % 2**63)
            order = order[torch.randperm(len(order), generator=generator)]
        augmentation = InTurn(()) if self.augmentation is None else self.augmentation
        mine = slice(self.rank, None, self.world)
        for index, chosen in enumerate(order.split(self.batch_size)):
            drawn = augmentation.draw(len(chosen), generator)
            if index < self.start or len(chosen) < self.world:
                continue
            images = self.split.images(chosen[mine])
            planes = augmentation.apply(images.flatten(1, -3), chosen_rows(drawn, mine))  # frames go as channels
            x = self.preprocessing(planes.reshape(images.shape))
            yield x if self.split.labels is None else (x, self.split.labels[chosen[mine]])


def seeded_order(split: Split, seed: int) -> Tensor:
    """Return a permutation of a split's indices; the first N of it are "the first N samples" of this seed.

    >>> from lmh.zoo import load_data
    >>> test = load_data("digits").test
    >>> order = seeded_order(test, seed=0)
    >>> len(order), len(test.images(order[:8]))
    (360, 8)
    """
    return torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
