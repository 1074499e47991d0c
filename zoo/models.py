"""The registry of models: the ANNs and spiking networks that come with weights, and how their weights are had."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors import safe_open
from torch import nn

from ..artifact import is_there, read_tensors
from ..errors import ArgumentError, ArtifactError, DownloadError
from ..home import home
from ..terminal import Terminal
from ..torchvision_shim import torchvision
from .cache import fetched, offline
from .locations import PACKAGE, Packaged, parsed_location
from .model_cards import ModelCard, SpikingCard, read_card_file
from .registry import TORCHVISION, Card, architecture, list_architectures, nearest_names


def added() -> Path:
    """Return the folder of the cards that the user added."""
    return home() / "cards"


def model_names() -> dict[str, Path]:
    """Return the names of all models and the files of their cards: the package's, and those that the user added."""
    folders = [added(), PACKAGE] if is_there(added()) else [PACKAGE]
    found = {path.stem: path for folder in folders for path in folder.glob("*.json")}
    return dict(sorted(found.items()))


def model_card(name: str) -> ModelCard:
    """Return a model's card: a :class:`SpikingCard` for a spiking network.

    Args:
        name: with ``zoo:`` before it or not.

    Raises:
        ArgumentError: for an unknown name, with the nearest ones.
        ArtifactError: if the card is damaged, or newer than this code.

    >>> model_card("digits-cnn-t4").timesteps
    4
    """
    plain, known = name.removeprefix("zoo:"), model_names()
    if plain not in known:
        near = nearest_names(plain, known)
        raise ArgumentError(
            f"model {plain!r} is not known; nearest: {near}. `lmh zoo list` shows what there is; `lmh zoo add ADDRESS` "
            "takes the cards of a release."
        )
    return _read(known[plain], known[plain].stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _read(path: Path, changed: int) -> ModelCard:
    return read_card_file(path)


def packaged(card: ModelCard) -> bool:
    """Whether a model's weights came with the package."""
    return isinstance(parsed_location(card.weights.location), Packaged)


def download(name: str, terminal: Terminal | None = None) -> Path:
    """Return a model's file, downloaded unless it is there, and checked.

    Args:
        name: of an ANN, a spiking network, or ``torchvision:NAME``.
        terminal: shows the progress; a new one unless given.

    Raises:
        ArgumentError: for an unknown name, with the nearest ones.
        DownloadError: if it cannot be had whole and unaltered.

    >>> download("digits-cnn").name
    'digits-cnn.safetensors'
    """
    if name.startswith(TORCHVISION):
        card(name)
        return _torchvision_file(name.removeprefix(TORCHVISION))
    return fetched(model_card(name).weights, terminal)


def readable_cards() -> Iterator[ModelCard | ArtifactError]:
    """Yield every model's card, or the error that it cannot be read with."""
    for name in model_names():
        try:
            yield model_card(name)
        except ArtifactError as error:
            yield error


def list_models(*, family: str | None = None, data: str | None = None, timesteps: int | None = None) -> list[str]:
    """Return the names of the ANNs that :func:`load` finds weights for, or of the spiking networks of some T.

    Args:
        family: of their architecture, as :func:`list_architectures` takes it.
        data: name of the data set that they were trained on, such as ``cifar10``.
        timesteps: of spiking networks; unless given, the ANNs are listed.

    Raises:
        ArgumentError: for an unknown family.

    >>> list_models(data="digits"), list_models(data="digits", timesteps=4)
    (['digits-cnn'], ['digits-cnn-t4'])
    """
    architectures = None if family is None else set(list_architectures(family=family))
    found = []
    for card in readable_cards():
        if isinstance(card, ArtifactError):
            continue
        steps = card.timesteps if isinstance(card, SpikingCard) else None
        wanted = architectures is None or card.architecture in architectures
        if wanted and steps == timesteps and data in (None, card.data):
            found.append(card.name)
    return found


def is_spiking(name: str) -> bool:
    """Whether a name is of a spiking network of the zoo.

    >>> is_spiking("zoo:digits-cnn-t4"), is_spiking("zoo:digits-cnn")
    (True, False)
    """
    return name.removeprefix("zoo:") in model_names() and isinstance(model_card(name), SpikingCard)


def card(name: str) -> Card:
    """Return an architecture's card; by the name of an ANN, with that model's input and number of classes.

    Args:
        name: of the zoo, or ``torchvision:NAME``.

    Raises:
        ArgumentError: for an unknown name, with the nearest ones.

    >>> card("cifar10-resnet20-a").preprocessing.input_size
    (3, 32, 32)
    >>> card("torchvision:resnet18").num_classes
    1000
    """
    if name not in (known := model_names()):
        return architecture(name, known)
    if is_spiking(name):
        raise ArgumentError(
            f"{name!r} is a spiking network already; expected an ANN or an architecture. Load it with "
            f'lmh.convert.load("zoo:{name}"), or measure it with `lmh report zoo:{name} --data …`.'
        )
    model = model_card(name)
    found = replace(architecture(model.architecture), preprocessing=model.preprocessing)
    if model.num_classes == found.num_classes:
        return found
    return replace(found, num_classes=model.num_classes, build=partial(found.build, num_classes=model.num_classes))


def load(name: str) -> nn.Module:
    """Return a pretrained ANN in eval mode. Its weights are downloaded unless they are there.

    Args:
        name: one of :func:`list_models`, or ``torchvision:NAME`` for torchvision's default weights.

    Raises:
        ArgumentError: for an unknown name, or one that has no weights here.
        DownloadError: if its weights cannot be had whole and unaltered.
        ArtifactError: if they do not fit the architecture.

    >>> sum(p.numel() for p in load("digits-cnn").parameters())
    21682
    """
    found = card(name)
    if name.startswith(TORCHVISION):
        _torchvision_file(name.removeprefix(TORCHVISION))
        return torchvision().models.get_model(name.removeprefix(TORCHVISION), weights="DEFAULT").eval()
    if name not in model_names():
        raise ArgumentError(
            f"zoo:{name}: the zoo has this architecture but no weights for it; "
            f"with weights: {', '.join(list_models())}. Pass a weights file and --arch {name}."
        )
    path = fetched(model_card(name).weights)
    model = found.build(num_classes=found.num_classes)
    try:
        model.load_state_dict(read_tensors(path)[0])
    except RuntimeError as error:
        raise ArtifactError(
            f"{path}: does not fit {found.name} with {found.num_classes} classes; expected the weights of zoo:{name}. "
            "Tell whoever published the card."
        ) from error
    return model.eval()


def _torchvision_file(name: str) -> Path:
    """Return the file of torchvision's default weights; its weights API downloads it and checks the hash."""
    weights = torchvision().models.get_model_weights(name).DEFAULT
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(weights.url).path).name
    if is_there(file):
        return file
    variable = offline()
    if variable is not None:
        raise DownloadError(
            f"torchvision:{name}: its weights are not in {file.parent}, and {variable} forbids to download them; "
            f"expected {file.name} there. Unset {variable} once, or copy the file there."
        )
    try:
        weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise DownloadError(
            f"torchvision:{name}: its weights could not be downloaded ({error}); expected network access. Copy them to "
            f"{file}, or pass a weights file with --arch torchvision:{name}."
        ) from error
    return file


def record(name: str) -> dict[str, Any]:
    """Return how a model's weights came about: recipe, seed, accuracy, as written by its training run.

    Args:
        name: one of :func:`list_models`.

    Raises:
        ArgumentError: for a model without weights.
        DownloadError: if its weights cannot be had.

    >>> record("digits-cnn")["accuracy"] > 0.99
    True
    """
    card(name)
    if name not in model_names():
        raise ArgumentError(
            f"zoo:{name} has no weights, so there is no record; with weights: {', '.join(list_models())}."
        )
    with safe_open(fetched(model_card(name).weights), framework="pt") as file:
        return json.loads(file.metadata()["record"])


def snn_path(name: str) -> Path:
    """Return the file of a ready spiking network, downloaded unless it is there.

    Args:
        name: ``zoo:NAME`` of a spiking network.

    Raises:
        ArgumentError: for an unknown name.
        DownloadError: if it cannot be had whole and unaltered.

    >>> snn_path("zoo:digits-cnn-t4").name
    'digits-cnn-t4.safetensors'
    """
    if not is_spiking(name):
        spiking = [card.name for card in readable_cards() if isinstance(card, SpikingCard)]
        near = nearest_names(name.removeprefix("zoo:"), spiking)
        raise ArgumentError(
            f"{name}: not a spiking network of the zoo; nearest: {near}. `lmh zoo list` shows what there is."
        )
    return fetched(model_card(name).weights)
