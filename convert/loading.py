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
from ..artifact import file_digest
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
    """
    if name.startswith("zoo:"):
        card = zoo.card(name.removeprefix("zoo:"))
        return Source(zoo.load(card.name), name, card, card.num_classes)
    if name.startswith(TORCHVISION):
        return _from_torchvision(name)
    path = Path(name).expanduser()
    found = read_object(path, trust_pickle=trust_pickle)
    digest = file_digest(path)
    if isinstance(found, Mapping) and not _is_state_dict(found):
        found = _unwrapped(path, found)
    if isinstance(found, nn.Module):
        return Source(found.eval(), name, None, None, digest)
    if not isinstance(found, Mapping):
        raise SourceError(f"{path}: holds a {type(found).__name__}; expected a state_dict, a checkpoint or a module.")
    state = _stripped({key: value for key, value in found.items() if isinstance(value, Tensor)})
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


def _is_state_dict(found: Mapping[Any, Any]) -> bool:
    return bool(found) and all(isinstance(value, Tensor) for value in found.values())


def _unwrapped(path: Path, found: Mapping[Any, Any]) -> Any:
    for key in WRAPPERS:
        inner = found.get(key)
        if isinstance(inner, nn.Module) or (isinstance(inner, Mapping) and _is_state_dict(inner)):
            return inner
    if any(isinstance(value, Tensor) for value in found.values()):
        return found
    raise SourceError(
        f"{path}: a dict with the keys {', '.join(map(str, list(found)[:8])) or 'none'} and no state_dict; "
        f"expected one under {', '.join(WRAPPERS)}. Save model.state_dict()."
    )


def _stripped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _classes_in(state: Mapping[str, Tensor]) -> int | None:
    """The number of outputs of the last weighted layer in a state_dict."""
    weights = [tensor for tensor in state.values() if tensor.ndim >= 2]
    return weights[-1].shape[0] if weights else None


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
    wanted, classes = _shapes_of(state), _classes_in(state)
    models = torchvision().models
    for names in (zoo.list_architectures(), [TORCHVISION + name for name in models.list_models(module=models)]):
        fitting = [name for name in names if _shapes(name, classes or 1000) == wanted]
        if len(fitting) > 1:
            raise ArchitectureError(f"{path}: fits {', '.join(fitting)} alike; choose one with --arch.")
        if fitting:
            return zoo.card(fitting[0]), (f"Recognised {fitting[0]} with {classes} classes from names and shapes.",)
    near = _nearest(wanted)
    raise ArchitectureError(
        f"{path}: {len(wanted)} tensors ({', '.join(list(wanted)[:SHOWN])}, …) that fit no architecture of the zoo "
        f"or of torchvision; nearest is {near}. Name it with --arch, or convert the module with "
        "lmh.convert.convert(model, …)."
    )


def _nearest(wanted: Mapping[str, tuple[int, ...]]) -> str:
    def common(name: str) -> int:
        return len(wanted.keys() & (_shapes(name, zoo.card(name).num_classes) or {}).keys())

    best = max(zoo.list_architectures(), key=common)
    shapes = _shapes(best, zoo.card(best).num_classes) or {}
    return f"{best}, which shares {common(best)} of its {len(shapes)} names" if common(best) else "none of the zoo"


def _filled(path: Path, card: Card, state: dict[str, Tensor]) -> tuple[nn.Module, int]:
    """Build an architecture and load a state_dict into it."""
    for classes in (_classes_in(state), card.num_classes):
        shapes = None if classes is None else _shapes(card.name, classes)
        if classes is not None and shapes == _shapes_of(state):
            model = card.build(num_classes=classes)
            model.load_state_dict(state, strict=False)
            return model.eval(), classes
    raise ArchitectureError(_mismatch(path, card, state))


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


def module_source(model: nn.Module) -> Source:
    """Return the source record of a module that a program passed to :func:`convert`."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"source: got {type(model).__name__}; expected a file name or a torch.nn.Module.")
    kind = type(model)
    return Source(model, f"{kind.__module__}.{kind.__qualname__}", None, None)
