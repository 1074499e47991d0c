"""The registry of models: which architectures and spiking networks come with weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from ..errors import ArgumentError
from ..torchvision_shim import torchvision
from .registry import TORCHVISION, Card, architecture

_WEIGHTS = Path(__file__).parent / "weights"
ANNS = {"digits-cnn": "digits-cnn.safetensors"}
SNNS = {"digits-cnn-t4": "digits-cnn-snn-T4.safetensors"}


def list_models() -> list[str]:
    """Return the names that :func:`load` finds weights for.

    >>> "digits-cnn" in list_models()
    True
    """
    return list(ANNS)


def card(name: str) -> Card:
    """Return the card of an architecture.

    >>> card("digits-cnn").num_classes
    10
    """
    return architecture(name, SNNS)


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
    if name not in ANNS:
        raise ArgumentError(
            f"zoo:{name}: the zoo has this architecture but no weights for it; "
            f"with weights: {', '.join(list_models())}. Pass a weights file and --arch {name}."
        )
    model = found.build()
    with safe_open(_WEIGHTS / ANNS[name], framework="pt") as file:
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
    card(name)
    if name not in ANNS:
        raise ArgumentError(
            f"zoo:{name} has no weights, so there is no record; with weights: {', '.join(list_models())}."
        )
    with safe_open(_WEIGHTS / ANNS[name], framework="pt") as file:
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
