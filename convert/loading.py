"""From what a user names on the command line to an ANN: zoo, torchvision, or a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import zoo
from ..artifact import file_digest, user_path
from ..errors import ArchitectureError, ArgumentError, SourceError
from ..torchvision_shim import torchvision
from ..zoo.registry import TORCHVISION, Card
from .files import read_object

WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
PREFIXES = ("module.", "_orig_mod.")
SHOWN = 4


@dataclass(frozen=True)
class Source:
    """An ANN and where it came from.

    Attributes:
        model: in eval mode.
        name: as the user named it.
        card: of its architecture, or None for a module of the user's own.
        num_classes: that the architecture was built with.
        digest: sha256 of the file, or None.
        notices: what was recognised or assumed, in sentences.
    """

    model: nn.Module
    name: str
    card: Card | None
    num_classes: int | None
    digest: str | None = None
    notices: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Return what a manifest keeps to build the graph again."""
        return {
            "name": self.name,
            "architecture": self.card.name if self.card else None,
            "num_classes": self.num_classes,
            "sha256": self.digest,
        }


def load_source(name: str, *, arch: str | None = None, trust_pickle: bool = False) -> Source:
    """Return the ANN that a user names.

    Args:
        name: ``zoo:NAME``, ``torchvision:NAME``, or a file: a state_dict, a checkpoint dict that holds one, or a
            pickled module.
        arch: the architecture of a state_dict, a name of the zoo or ``torchvision:NAME``; recognised from keys
            and shapes unless given.
        trust_pickle: let the file's pickle run code.

    Raises:
        SourceError: if it cannot be found or read.
        ArchitectureError: if its tensors fit no architecture, or not the one named.
        ArgumentError: for an unknown name.

    >>> source = load_source("zoo:digits-cnn")
    >>> source.card.preprocessing.input_size, source.record()["architecture"]
    ((1, 8, 8), 'digits-cnn')
    """
    if arch is not None and name.startswith(("zoo:", TORCHVISION)):
        raise ArgumentError(f"arch={arch!r} came with {name}, which says its architecture. Leave it out.")
    if name.startswith("zoo:"):
        card = zoo.card(name.removeprefix("zoo:"))
        return Source(zoo.load(card.name), name, card, card.num_classes)
    if name.startswith(TORCHVISION):
        return _from_torchvision(name)
    path = user_path(name)
    found = _unwrapped(path, read_object(path, trust_pickle=trust_pickle))
    digest = file_digest(path)
    if isinstance(found, nn.Module):
        if arch is not None:
            raise ArgumentError(f"arch={arch!r} came with {path}, which holds a whole module. Leave it out.")
        return Source(found.eval(), name, None, None, digest)
    state = _stripped(_plain_tensors(path, found))
    card, notices = (zoo.card(arch), ()) if arch else _recognised(path, state)
    model, num_classes = _filled(path, card, state)
    return Source(model, name, card, num_classes, digest, notices)


def _from_torchvision(name: str) -> Source:
    card = zoo.card(name)
    try:
        model = zoo.load(name)
    except OSError as error:
        raise SourceError(
            f"{name}: its weights could not be downloaded ({error}); expected network access. Pass a weights file "
            f"with --arch {name} instead."
        ) from error
    return Source(model, name, card, card.num_classes)


def _unwrapped(path: Path, found: Any) -> nn.Module | Mapping[Any, Any]:
    """Return the module or state_dict that a file holds, at the top or under a trainer's key."""
    if isinstance(found, nn.Module):
        return found
    if not isinstance(found, Mapping):
        raise SourceError(f"{path}: holds a {type(found).__name__}; expected a state_dict, a checkpoint or a module.")
    for key in WRAPPERS:
        if isinstance(found.get(key), nn.Module | Mapping):
            return _unwrapped(path, found[key])
    if any(isinstance(value, Tensor) for value in found.values()):
        return found
    raise SourceError(
        f"{path}: a dict with the keys {', '.join(map(str, list(found)[:8])) or 'none'} and no state_dict; "
        f"expected one under {', '.join(WRAPPERS)}. Save model.state_dict()."
    )


def _plain_tensors(path: Path, found: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state_dict, without what else a trainer put among them."""
    state = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    for key, value in state.items():
        if value.layout is not torch.strided or value.is_complex() or value.is_quantized:
            raise SourceError(
                f"{path}: {key} is a {value.dtype} tensor in layout {value.layout}; expected plain real numbers. "
                "Save it dense and dequantised."
            )
    return state


def _stripped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the prefixes of wrappers (DataParallel, torch.compile), in whatever order they were put on."""
    for prefix in PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            return _stripped({key.removeprefix(prefix): value for key, value in state.items()})
    return state


def _classes_in(state: Mapping[str, Tensor], card: Card) -> int | None:
    """Return the number of classes with which an architecture has just this state_dict, or None.

    The tensors that differ from the usual number of classes must all have it on axis 0.
    """
    usual, got = _shapes(card.name, card.num_classes), _shapes_of(state)
    if usual is None or usual.keys() != got.keys():
        return None
    differing = [key for key in usual if usual[key] != got[key]]
    if not differing:
        return card.num_classes
    counts = {got[key][0] if got[key] else 0 for key in differing}
    fitting = all(usual[key][:1] == (card.num_classes,) for key in differing)
    if not fitting or len(counts) != 1:
        return None
    (classes,) = counts
    return classes if _shapes(card.name, classes) == got else None


@lru_cache(maxsize=256)
def _shapes(name: str, num_classes: int) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of an architecture's tensors, or None if it cannot be built with so many classes."""
    try:
        with torch.device("meta"):
            model = zoo.card(name).build(num_classes=num_classes)
    except (TypeError, ValueError, RuntimeError):
        return None
    return _shapes_of(model.state_dict())


def _shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items() if not key.endswith("num_batches_tracked")}


def _recognised(path: Path, state: dict[str, Tensor]) -> tuple[Card, tuple[str, ...]]:
    """Find the architectures whose tensors have these names and shapes: the zoo's first, then torchvision's."""
    models = torchvision().models
    for names in (zoo.list_architectures(), [TORCHVISION + name for name in models.list_models(module=models)]):
        cards = [zoo.card(name) for name in names]
        fitting = {card.name: classes for card in cards if (classes := _classes_in(state, card)) is not None}
        if len(fitting) > 1:
            raise ArchitectureError(f"{path}: fits {', '.join(fitting)} alike; choose one with --arch.")
        for name, classes in fitting.items():
            return zoo.card(name), (f"Recognised {name} with {classes} classes from names and shapes.",)
    raise ArchitectureError(
        f"{path}: {len(state)} tensors ({', '.join(list(state)[:SHOWN])}, …) that fit no architecture of the zoo "
        f"or of torchvision; nearest is {_nearest(_shapes_of(state))}. Name it with --arch, or convert the module with "
        "lmh.convert.convert(model, …)."
    )


def _nearest(wanted: Mapping[str, tuple[int, ...]]) -> str:
    """Describe the architecture of the zoo that shares most names, and most shapes, with ``wanted``."""

    def common(name: str) -> tuple[int, int]:
        shapes = _shapes(name, zoo.card(name).num_classes) or {}
        names = wanted.keys() & shapes.keys()
        return len(names), sum(wanted[key] == shapes[key] for key in names)

    best = max(zoo.list_architectures(), key=common)
    names, shapes = common(best)
    total = len(_shapes(best, zoo.card(best).num_classes) or {})
    return f"{best}, which shares {names} of its {total} names and {shapes} shapes" if names else "none of the zoo"


def _filled(path: Path, card: Card, state: dict[str, Tensor]) -> tuple[nn.Module, int]:
    """Build an architecture and load a state_dict into it."""
    classes = _classes_in(state, card)
    if classes is None:
        raise ArchitectureError(_mismatch(path, card, state))
    model = card.build(num_classes=classes)
    model.load_state_dict(state, strict=False)
    return model.eval(), classes


def _mismatch(path: Path, card: Card, state: dict[str, Tensor]) -> str:
    wanted = _shapes(card.name, card.num_classes) or {}
    got = _shapes_of(state)
    lines = [
        *(f"missing {key}" for key in wanted if key not in got),
        *(f"unexpected {key}" for key in got if key not in wanted),
        *(
            f"{key} is {list(got[key])} instead of {list(wanted[key])}"
            for key in wanted
            if got.get(key, wanted[key]) != wanted[key]
        ),
    ]
    more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return f"{path}: does not fit {card.name}: {'; '.join(lines[:SHOWN])}{more}. Choose another --arch."
