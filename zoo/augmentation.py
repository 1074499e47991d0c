"""Augmentation of training images: first everything random is drawn, then it is applied.

What is drawn has one row for each image, so that a run that begins in the middle of an epoch draws what it passes over
and touches none of those images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import check_kind
from ..errors import ArgumentError
from ..torchvision_shim import torchvision

Drawn: TypeAlias = "tuple[Tensor | Drawn, ...]"


class Augmentation(Protocol):
    """What every augmentation offers."""

    def draw(self, count: int, generator: torch.Generator) -> Drawn:
        """Return what is random for ``count`` images: tensors [count, …], or tuples of them."""
        ...

    def apply(self, images: Tensor, drawn: Drawn) -> Tensor:
        """Return augmented images, [N, C, H, W] in the type in which they came; event frames have 2 T channels."""
        ...


def _tensors(drawn: Drawn) -> list[Tensor]:
    return [item for item in drawn if isinstance(item, Tensor)]


def _picked(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return [N, C, h, w], of each image its own rows [N, h] and columns [N, w]."""
    picked = images[torch.arange(len(images))[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class CropFlip:
    """Random crop after zero padding, and random horizontal flip, drawn for each image of a batch."""

    padding: int = 4
    flip: bool = True

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return augmented images of the same shape and type, [N, C, H, W]."""
        return self.apply(images, self.draw(len(images), generator))

    def draw(self, count: int, generator: torch.Generator) -> Drawn:
        """Return which images are mirrored, and how far down and right each is cut out."""
        mirrored = torch.rand(count, generator=generator) < 0.5 if self.flip else torch.zeros(count, dtype=torch.bool)
        if self.padding == 0:
            return (mirrored,)
        return mirrored, *torch.randint(0, 2 * self.padding + 1, (2, count, 1), generator=generator)

    def apply(self, images: Tensor, drawn: Drawn) -> Tensor:
        """Mirror and crop."""
        mirrored, *corner = _tensors(drawn)
        if self.flip:
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        if self.padding == 0:
            return images
        height, width = images.shape[2:]
        padded = F.pad(images, [self.padding] * 4)
        return _picked(padded, corner[0] + torch.arange(height), corner[1] + torch.arange(width))


@dataclass(frozen=True)
class Cutout:
    """A black square at a random place of each image, cut at its border (DeVries and Taylor, 2017).

    Attributes:
        size: of its side, in pixels. The paper's code takes 16 for CIFAR-10 and 8 for CIFAR-100.
    """

    size: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ArgumentError(f"Cutout: size is {self.size!r}; expected a whole number of pixels, such as 16.")

    def draw(self, count: int, generator: torch.Generator) -> Drawn:
        """Return the middle of each square, as shares of height and width."""
        return (torch.rand(count, 2, generator=generator),)

    def apply(self, images: Tensor, drawn: Drawn) -> Tensor:
        """Blacken the squares."""
        [middle] = _tensors(drawn)
        inside = []
        for axis, size in enumerate(images.shape[2:]):
            first = (middle[:, axis, None] * size).floor() - self.size // 2
            place = torch.arange(size)
            inside.append((place >= first) & (place < first + self.size))
        return images.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)


@dataclass(frozen=True)
class ForCIFAR10:
    """The policy that AutoAugment found on CIFAR-10; ``name`` is torchvision's."""

    name: ClassVar[str] = "cifar10"


@dataclass(frozen=True)
class ForImageNet:
    """The policy that AutoAugment found on ImageNet."""

    name: ClassVar[str] = "imagenet"


@dataclass(frozen=True)
class ForSVHN:
    """The policy that AutoAugment found on SVHN."""

    name: ClassVar[str] = "svhn"


Policy = ForCIFAR10 | ForImageNet | ForSVHN


ALIKE, LEAST = 4, 8
"""Images of a batch to a transform of AutoAugment, on average, and how many transforms there are if images suffice."""


@dataclass(frozen=True)
class AutoAugment:
    """AutoAugment (Cubuk et al., CVPR 2019) through torchvision.transforms.v2.

    A batch of N has N/4 random transforms, 8 at least, and each image one of them, drawn for it: what happens to an
    image is as random as ever, and torchvision takes the images of one transform together, in a quarter of the time.

    Attributes:
        policy: ``ForCIFAR10()``, ``ForImageNet()`` or ``ForSVHN()``.
    """

    policy: Policy = field(default_factory=ForCIFAR10)

    def __post_init__(self) -> None:
        kinds = (ForCIFAR10, ForImageNet, ForSVHN)
        check_kind("AutoAugment: policy", self.policy, kinds, "ForCIFAR10()", "ForImageNet()")

    def draw(self, count: int, generator: torch.Generator) -> Drawn:
        """Return the seed of each image's transform."""
        seeds = torch.randint(2**62, (max(-(-count // ALIKE), LEAST),), generator=generator)
        return (seeds[torch.randint(len(seeds), (count,), generator=generator)],)

    def apply(self, images: Tensor, drawn: Drawn) -> Tensor:
        """Run torchvision's transform under every seed.

        Raises:
            ArgumentError: for event frames.
        """
        if images.dtype != torch.uint8:
            raise ArgumentError(
                f"AutoAugment: the samples are {str(images.dtype).removeprefix('torch.')}, as event frames are; "
                "expected images, uint8. Use OneOf((Roll(), Rotate(), Cutout(16))), and leave out --autoaugment."
            )
        [seeds] = _tensors(drawn)
        transforms = torchvision().transforms
        transform = transforms.v2.AutoAugment(transforms.AutoAugmentPolicy(self.policy.name))
        found = torch.empty_like(images)
        with torch.random.fork_rng([]):
            for seed in seeds.unique().tolist():
                torch.manual_seed(seed)
                found[seeds == seed] = transform(images[seeds == seed])
        return found


@dataclass(frozen=True)
class Roll:
    """Each image moved by a random distance down and right; what leaves at one border comes in at the other.

    Attributes:
        share: of height and width, the farthest. The paper's code rolls 48 pixels by up to 5.
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share <= 1:
            raise ArgumentError(f"Roll: share is {self.share!r}; expected a share of the image up to 1, such as 0.1.")

    def draw(self, count: int, generator: torch.Generator) -> Drawn:
        """Return distances down and right, as shares of the farthest."""
        return (2 * torch.rand(count, 2, generator=generator) - 1,)

    def apply(self, images: Tensor, drawn: Drawn) -> Tensor:
        """Move each image by whole pixels."""
        [shares] = _tensors(drawn)
        picked = []
        for axis, size in enumerate(images.shape[2:]):
            moved = (shares[:, axis, None] * self.share * size).round().long()
            picked.append((torch.arange(size) - moved) % size)
        return _picked(images, *picked)


@dataclass(frozen=True)
class Rotate:
    """Each image turned about its middle by a random angle, the nearest pixel for each; black where there is none.

    Attributes:
        degrees: the largest angle, either way.
    """

    degrees: float = 15.0

    def __post_init__(self) -> None:
        if isinstance(self.degrees, bool) or not isinstance(self.degrees, int | float) or not 0 < self.degrees <= 180:
            raise ArgumentError(f"Rotate: degrees is {self.degrees!r}; expected an angle up to 180, such as 15.")

    def draw(self, count: int, generator: torch.Generator) -> Drawn:
        """Return angles, as shares of the largest."""
        return (2 * torch.rand(count, generator=generator) - 1,)

    def apply(self, images: Tensor, drawn: Drawn) -> Tensor:
        """Turn each image, as torchvision's ``rotate`` does by one angle for all."""
        [shares] = _tensors(drawn)
        angles = torch.deg2rad(self.degrees * shares)
        height, width = images.shape[2:]
        cos, sin, none = angles.cos(), angles.sin(), torch.zeros(len(images))
        turn = [torch.stack(row, 1) for row in ((cos, -sin * height / width, none), (sin * width / height, cos, none))]
        grid = F.affine_grid(torch.stack(turn, 1), list(images.shape), align_corners=False)
        turned = F.grid_sample(images.float(), grid, mode="nearest", align_corners=False)
        return turned.to(images.dtype)


@dataclass(frozen=True)
class OneOf:
    """For each image one of several augmentations, drawn with equal chances.

    Attributes:
        parts: such as ``(Roll(), Rotate(), Cutout(16))``, which the paper names for event frames.
    """

    parts: tuple[Augmentation, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ArgumentError("OneOf: parts is empty; expected augmentations, such as (Roll(), Rotate()).")

    def draw(self, count: int, generator: torch.Generator) -> Drawn:
        """Return which one each image gets, and what all of them draw."""
        choice = torch.randint(len(self.parts), (count,), generator=generator)
        return choice, *(part.draw(count, generator) for part in self.parts)

    def apply(self, images: Tensor, drawn: Drawn) -> Tensor:
        """Apply to each image its own."""
        choice, *rest = drawn
        assert isinstance(choice, Tensor)
        images = images.clone()
        for index, (part, own) in enumerate(zip(self.parts, rest, strict=True)):
            assert isinstance(own, tuple)
            rows = choice == index
            if rows.any():
                images[rows] = part.apply(images[rows], chosen_rows(own, rows))
        return images


@dataclass(frozen=True)
class InTurn:
    """Several augmentations, one after the other.

    Attributes:
        parts: such as ``(CropFlip(), AutoAugment(), Cutout(16))``, the paper's for CIFAR-10.
    """

    parts: tuple[Augmentation, ...]

    def draw(self, count: int, generator: torch.Generator) -> Drawn:
        """Return what each draws."""
        return tuple(part.draw(count, generator) for part in self.parts)

    def apply(self, images: Tensor, drawn: Drawn) -> Tensor:
        """Apply each."""
        for part, own in zip(self.parts, drawn, strict=True):
            assert isinstance(own, tuple)
            images = part.apply(images, own)
        return images


def chosen_rows(drawn: Drawn, rows: slice | Tensor) -> Drawn:
    """Return what was drawn for some of the images.

    >>> chosen_rows((torch.arange(4), (torch.ones(4, 2),)), slice(1, None, 2))
    (tensor([1, 3]), (tensor([[1., 1.],
            [1., 1.]]),))
    """
    return tuple(chosen_rows(item, rows) if isinstance(item, tuple) else item[rows] for item in drawn)
