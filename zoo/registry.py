"""The registry: every architecture by name, and which of them come with weights."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from ..errors import ArgumentError
from ..torchvision_shim import torchvision
from .augmentation import CropFlip
from .cifar_resnet import DEPTHS, CifarResNet
from .cifar_vgg import CifarVGG11
from .digits_cnn import DigitsCNN
from .images import Preprocessing

IMAGENET = Preprocessing((3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Card:
    """What is known of an architecture.

    Attributes:
        name: as the user types it, ``digits-cnn`` or ``torchvision:resnet18``.
        build: makes the network, with ``num_classes=`` where the family takes it.
        preprocessing: input size and normalisation that it was made for.
        augmentation: what its training applies to images.
        num_classes: of its usual data set.
        weights: file in the package that holds trained weights, or None.
    """

    name: str
    build: Callable[..., nn.Module]
    preprocessing: Preprocessing
    augmentation: CropFlip
    num_classes: int
    weights: str | None = None


_CARDS = [
    Card(
        "digits-cnn",
        DigitsCNN,
        Preprocessing((1, 8, 8), (0.3054,), (0.3760,)),
        CropFlip(padding=1, flip=False),
        10,
        weights="digits-cnn.safetensors",
    ),
    *(
        Card(
            f"cifar10-resnet{depth}-a",
            partial(CifarResNet, depth),
            Preprocessing((3, 32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            CropFlip(padding=4, flip=True),
            10,
        )
        for depth in DEPTHS
    ),
    Card(
        "cifar10-vgg11-bn",
        CifarVGG11,
        Preprocessing((3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        CropFlip(padding=4, flip=True),
        10,
    ),
]
CARDS = {card.name: card for card in _CARDS}
_WEIGHTS = Path(__file__).parent / "weights"
SNNS = {"digits-cnn-t4": "digits-cnn-snn-T4.safetensors"}
TORCHVISION = "torchvision:"


def list_models() -> list[str]:
    """Return the names that :func:`load` finds weights for.

    >>> "digits-cnn" in list_models()
    True
    """
    return [name for name, card in CARDS.items() if card.weights is not None]


def list_architectures() -> list[str]:
    """Return the names of the zoo's own architectures; torchvision's are ``torchvision:NAME``.

    >>> "cifar10-resnet20-a" in list_architectures()
    True
    """
    return list(CARDS)


def card(name: str) -> Card:
    """Return an architecture's card.

    Args:
        name: of the zoo, or ``torchvision:NAME``.

    Raises:
        ArgumentError: for an unknown name, with the nearest ones.

    >>> card("cifar10-resnet20-a").preprocessing.input_size
    (3, 32, 32)
    >>> card("torchvision:resnet18").num_classes
    1000
    """
    if name in CARDS:
        return CARDS[name]
    models = torchvision().models if name.startswith(TORCHVISION) else None
    if models is not None and name.removeprefix(TORCHVISION) in models.list_models(module=models):
        build = partial(_torchvision_model, name.removeprefix(TORCHVISION))
        return Card(name, build, IMAGENET, CropFlip(padding=0, flip=True), 1000)
    known = [*CARDS, *(TORCHVISION + other for other in models.list_models(module=models))] if models else list(CARDS)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    raise ArgumentError(
        f"architecture {name!r} is not known; nearest: {', '.join(near) or 'none'}. "
        "`lmh zoo list` shows the zoo; torchvision's classifiers are torchvision:NAME."
    )


def _torchvision_model(name: str, num_classes: int = 1000) -> nn.Module:
    auxiliary = name in ("googlenet", "inception_v3")  # their extra heads serve training only
    extra: dict[str, Any] = {"init_weights": False, "aux_logits": False} if auxiliary else {}
    return torchvision().models.get_model(name, weights=None, num_classes=num_classes, **extra)


def load(name: str) -> nn.Module:
    """Return a pretrained ANN in eval mode.

    Args:
        name: one of :func:`list_models`, or ``torchvision:NAME`` for torchvision's default weights.

    Raises:
        ArgumentError: for an unknown name, or one that has no weights here.

    >>> sum(p.numel() for p in load("digits-cnn").parameters())
    21682
    """
    found = card(name)
    if found.name.startswith(TORCHVISION):
        return torchvision().models.get_model(name.removeprefix(TORCHVISION), weights="DEFAULT").eval()
    if found.weights is None:
        raise ArgumentError(
            f"zoo:{name}: the zoo has this architecture but no weights for it; "
            f"with weights: {', '.join(list_models())}. Pass a weights file and --arch {name}."
        )
    model = found.build()
    with safe_open(_WEIGHTS / found.weights, framework="pt") as file:
        model.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    return model.eval()


def record(name: str) -> dict[str, Any]:
    """Return how a model's weights came about: recipe, seed, accuracy, as written by its training run.

    Args:
        name: one of :func:`list_models`.

    Raises:
        ArgumentError: for a model without weights.

    >>> record("digits-cnn")["accuracy"] > 0.99
    True
    """
    found = card(name)
    if found.weights is None:
        raise ArgumentError(
            f"zoo:{name} has no weights, so there is no record; with weights: {', '.join(list_models())}."
        )
    with safe_open(_WEIGHTS / found.weights, framework="pt") as file:
        return json.loads(file.metadata()["record"])


def snn_path(name: str) -> Path:
    """Return the file of a ready spiking network.

    Args:
        name: ``zoo:NAME`` of a spiking network.

    Raises:
        ArgumentError: for an unknown name.

    >>> snn_path("zoo:digits-cnn-t4").name
    'digits-cnn-snn-T4.safetensors'
    """
    file = SNNS.get(name.removeprefix("zoo:"))
    if file is None:
        raise ArgumentError(
            f"{name}: not a spiking network of the zoo; expected one of {', '.join('zoo:' + n for n in SNNS)}."
        )
    return _WEIGHTS / file
