"""The registry of architectures: every one by name, the zoo's own and torchvision's classifiers."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ..errors import ArgumentError
from ..torchvision_shim import torchvision
from .augmentation import Augmentation, CropFlip, Cutout, InTurn, OneOf, Roll, Rotate
from .cifar_resnet import DEPTHS, CifarResNet, qcfs, resnet18, resnet19, resnet20, wide_resnet19
from .cifarnet import CIFARNet
from .digits_cnn import DigitsCNN
from .images import AnyPreprocessing, FramePreprocessing, Preprocessing
from .ms_resnet import MSResNet34
from .sew_resnet import sew_resnet18, sew_resnet34
from .vgg import vgg11, vgg13, vgg16, vgg_dvs

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET = Preprocessing((3, 224, 224), IMAGENET_MEAN, IMAGENET_STD)
CIFAR10 = Preprocessing((3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
TINY_IMAGENET = Preprocessing((3, 64, 64), IMAGENET_MEAN, IMAGENET_STD)
EVENTS = FramePreprocessing((2, 48, 48))
TORCHVISION = "torchvision:"
TRANSFORMING = ("googlenet", "inception_v3")
"""Those of torchvision whose pretrained networks undo ImageNet's normalisation and apply their own."""


@dataclass(frozen=True)
class Card:
    """What is known of an architecture.

    Attributes:
        name: as the user types it, ``digits-cnn`` or ``torchvision:resnet18``.
        family: that it belongs to, such as ``resnet`` or ``torchvision``.
        build: makes the network, with ``num_classes=`` where the family takes it.
        preprocessing: input size and normalisation that it was made for.
        augmentation: what its training applies to images.
        num_classes: of its usual data set.
    """

    name: str
    family: str
    build: Callable[..., nn.Module]
    preprocessing: AnyPreprocessing
    augmentation: Augmentation
    num_classes: int


_DIGITS = Preprocessing((1, 8, 8), (0.3054,), (0.3760,))
_FOUR, _FLIP = CropFlip(padding=4, flip=True), CropFlip(padding=0, flip=True)
_MOVED = InTurn((_FLIP, OneOf((Roll(), Rotate(), Cutout(16)))))  # the paper's for CIFAR10-DVS, at 128×128
_SHARED = Preprocessing((3, 32, 32), IMAGENET_MEAN, IMAGENET_STD)  # of the widely shared option-A weights
_CARDS = [
    Card("digits-cnn", "digits", DigitsCNN, _DIGITS, CropFlip(padding=1, flip=False), 10),
    Card("cifar10-resnet18", "resnet", resnet18, CIFAR10, _FOUR, 10),
    Card("cifar10-resnet19", "resnet", resnet19, CIFAR10, _FOUR, 10),
    Card("cifar10-resnet19-wide", "resnet", wide_resnet19, CIFAR10, _FOUR, 10),
    Card("cifar10-resnet20", "resnet", resnet20, CIFAR10, _FOUR, 10),
    Card("cifar10-resnet20-qcfs4", "resnet", partial(resnet20, activation=qcfs), CIFAR10, _FOUR, 10),
    *(Card(f"cifar10-resnet{depth}-a", "resnet", partial(CifarResNet, depth), _SHARED, _FOUR, 10) for depth in DEPTHS),
    Card("cifar10-vgg11-bn", "vgg", vgg11, CIFAR10, _FOUR, 10),
    Card("cifar10-vgg13-bn", "vgg", vgg13, CIFAR10, _FOUR, 10),
    Card("cifar10-vgg16-bn", "vgg", vgg16, CIFAR10, _FOUR, 10),
    Card("cifar10-cifarnet", "cifarnet", CIFARNet, CIFAR10, _FOUR, 10),
    Card("tinyimagenet-vgg13-bn", "vgg", partial(vgg13, num_classes=200, side=64), TINY_IMAGENET, _FLIP, 200),
    Card("cifar10dvs-vgg", "vgg", vgg_dvs, EVENTS, _MOVED, 10),
    Card("cifar10dvs-resnet19", "resnet", partial(resnet19, inputs=2), EVENTS, _MOVED, 10),
    Card("imagenet-sew-resnet18", "sew-resnet", sew_resnet18, IMAGENET, _FLIP, 1000),
    Card("imagenet-sew-resnet34", "sew-resnet", sew_resnet34, IMAGENET, _FLIP, 1000),
    Card("imagenet-ms-resnet34", "ms-resnet", MSResNet34, IMAGENET, _FLIP, 1000),
]
CARDS = {card.name: card for card in _CARDS}


def list_architectures(*, family: str | None = None) -> list[str]:
    """Return the names of the zoo's own architectures, or of one family; torchvision's are ``torchvision:NAME``.

    Args:
        family: such as ``resnet``; ``torchvision`` gives torchvision's classifiers.

    Raises:
        ArgumentError: for an unknown family, with the nearest ones.

    >>> list_architectures(family="sew-resnet")
    ['imagenet-sew-resnet18', 'imagenet-sew-resnet34']
    >>> "torchvision:resnet18" in list_architectures(family="torchvision")
    True
    """
    if family is None:
        return list(CARDS)
    if family == TORCHVISION[:-1]:
        return [TORCHVISION + name for name in _classifiers()]
    families = list(dict.fromkeys(card.family for card in CARDS.values()))
    if family not in families:
        known = ", ".join([*families, TORCHVISION[:-1]])
        raise ArgumentError(f"family {family!r} is not known; expected one of {known}. Leave it out to list all.")
    return [name for name, card in CARDS.items() if card.family == family]


def architecture(name: str, others: Iterable[str] = ()) -> Card:
    """Return an architecture's card.

    Args:
        name: of the zoo, or ``torchvision:NAME``.
        others: names that may have been meant as well.

    Raises:
        ArgumentError: for an unknown name, with the nearest ones.

    >>> architecture("cifar10-resnet20-a").preprocessing.input_size
    (3, 32, 32)
    >>> architecture("torchvision:resnet18").num_classes
    1000
    """
    if name in CARDS:
        return CARDS[name]
    of_torchvision = _classifiers()
    if name.startswith(TORCHVISION) and name.removeprefix(TORCHVISION) in of_torchvision:
        plain = name.removeprefix(TORCHVISION)
        return Card(name, TORCHVISION[:-1], partial(_torchvision_model, plain), _torchvision_input(plain), _FLIP, 1000)
    near = nearest_names(name, [*CARDS, *others, *(TORCHVISION + other for other in of_torchvision)])
    raise ArgumentError(
        f"architecture {name!r} is not known; nearest: {near}. "
        "`lmh zoo list` shows the zoo; torchvision's classifiers are torchvision:NAME."
    )


def nearest_names(name: str, known: Iterable[str]) -> str:
    """Return the known names that a user may have meant, as a part of a sentence.

    >>> nearest_names("resnet-20", ["cifar10-resnet20", "digits-cnn"])
    'cifar10-resnet20'
    """
    return ", ".join(difflib.get_close_matches(name, dict.fromkeys(known), n=3, cutoff=0.3)) or "none"


def _classifiers() -> list[str]:
    models = torchvision().models
    return models.list_models(module=models)


def _torchvision_input(name: str) -> Preprocessing:
    """Return the input that torchvision's default weights were trained for."""
    preset = torchvision().models.get_model_weights(name).DEFAULT.transforms()
    (side,) = preset.crop_size
    return Preprocessing((3, side, side), tuple(preset.mean), tuple(preset.std))


def _torchvision_model(name: str, num_classes: int = 1000) -> nn.Module:
    """Return a network that torchvision's default weights fit, without the extra heads that serve training only."""
    extra: dict[str, Any] = {}
    if name in TRANSFORMING:
        extra = {"init_weights": False, "aux_logits": False, "transform_input": True}
    elif name == "vit_h_14":
        extra = {"image_size": _torchvision_input(name).input_size[-1]}
    return torchvision().models.get_model(name, weights=None, num_classes=num_classes, **extra)
