"""Which architecture a state_dict belongs to, by the names and shapes of its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import zoo
from ..torchvision_shim import torchvision
from ..zoo.registry import TORCHVISION, Card, architecture

Shapes = Mapping[str, tuple[int, ...]]

SHOWN = 4

AUXILIARY = {"torchvision:googlenet": ("aux1.", "aux2."), "torchvision:inception_v3": ("AuxLogits.",)}
"""Heads that only training uses; checkpoints have them or not."""


@dataclass(frozen=True)
class Fit:
    """An architecture that has just these tensors.

    Attributes:
        card: the architecture.
        num_classes: that it has to be built with.
        prefix: of the names of its tensors in the state_dict.
        beside: names of the tensors that are not under the prefix.
    """

    card: Card
    num_classes: int
    prefix: str
    beside: tuple[str, ...]


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    """Return names and shapes of a state_dict, without BatchNorm's counters, which old files lack."""
    return {key: tuple(value.shape) for key, value in state.items() if not key.endswith("num_batches_tracked")}


def fits(shapes: Shapes, card: Card) -> list[Fit]:
    """Return how an architecture fits: for each prefix under which just its tensors are, with one number of classes."""
    found = []
    for prefix in _prefixes(shapes, card):
        under = _under(shapes, prefix, card)
        classes = _classes_in(under, card)
        if classes is not None:
            beside = tuple(key for key in shapes if not key.startswith(prefix))
            found.append(Fit(card, classes, prefix, beside))
    return found


def recognised(shapes: Shapes) -> list[Fit]:
    """Return every fit among the zoo's architectures and torchvision's classifiers."""
    return [fit for card in _candidates(shapes, _prefixes) for fit in fits(shapes, card)]


def nearest(shapes: Shapes) -> str:
    """Describe the architecture that shares most names, and most shapes, with the tensors; and what differs, if little.

    The tensors of another number of classes do not count as different.
    """
    best = max(_candidates(shapes, _starts), key=lambda card: _common(shapes, card))
    names, same = _common(shapes, best)
    total = len(_shapes(best.name, best.num_classes) or {})
    if not names:
        return "none of those has a tensor of the same name."
    lines = differences(shapes, best)
    if names < total and len(lines) > SHOWN:
        return (
            f"nearest is {best.name}, which shares {names} of its {total} names and {same} shapes "
            f"(--arch {best.name} lists what differs)."
        )
    return f"nearest is {best.name} with {_likeliest_classes(shapes, best)} classes; what differs: {some(lines)}."


def some(lines: list[str]) -> str:
    """Return the first lines as a part of a sentence, and how many more there are."""
    more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return "; ".join(lines[:SHOWN]) + more


def differences(shapes: Shapes, card: Card) -> list[str]:
    """Say what keeps tensors from fitting an architecture with the likeliest number of classes: a line for each."""
    return _differences(shapes, card, _likeliest_classes(shapes, card))


def _likeliest_classes(shapes: Shapes, card: Card) -> int:
    """Return the number of classes with which the fewest tensors differ."""
    usual = _shapes(card.name, card.num_classes) or {}
    got = _under(shapes, _likeliest_prefix(shapes, usual), card)
    heads = [key for key, shape in usual.items() if shape[:1] == (card.num_classes,) and got.get(key)]
    counts = dict.fromkeys([card.num_classes, *(got[key][0] for key in heads)])
    known = [count for count in counts if _shapes(card.name, count) is not None]
    return min(known, key=lambda count: len(_differences(shapes, card, count)), default=card.num_classes)


def _differences(shapes: Shapes, card: Card, num_classes: int) -> list[str]:
    wanted = _shapes(card.name, num_classes) or {}
    got = _under(shapes, _likeliest_prefix(shapes, wanted), card)
    return [
        *(f"missing {key}" for key in wanted if key not in got),
        *(f"unexpected {key}" for key in got if key not in wanted),
        *(
            f"{key} is {list(got[key])} instead of {list(wanted[key])}"
            for key in wanted
            if got.get(key, wanted[key]) != wanted[key]
        ),
    ]


def _common(shapes: Shapes, card: Card) -> tuple[int, int]:
    wanted = _shapes(card.name, card.num_classes) or {}
    got = _under(shapes, _likeliest_prefix(shapes, wanted), card)
    names = wanted.keys() & got.keys()
    return len(names), sum(wanted[key] == got[key] for key in names)


def _likeliest_prefix(shapes: Shapes, wanted: Shapes) -> str:
    """Return the prefix under which most of the wanted names are."""
    counts: Counter[str] = Counter({"": 1})
    for key in shapes:
        parts = key.split(".")
        for end in range(len(parts)):
            if ".".join(parts[end:]) in wanted:
                counts["".join(f"{part}." for part in parts[:end])] += 1
    return counts.most_common(1)[0][0]


def _under(shapes: Shapes, prefix: str, card: Card) -> Shapes:
    heads = AUXILIARY.get(card.name, ())
    under = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    return {key: shape for key, shape in under.items() if not key.startswith(heads)} if heads else under


def _starts(shapes: Shapes, card: Card) -> list[str]:
    """Return the prefixes under which an architecture's first tensor is."""
    first = next(iter(_shapes(card.name, card.num_classes) or {}), None)
    return [] if first is None else [key.removesuffix(first) for key in shapes if f".{key}".endswith(f".{first}")]


def _prefixes(shapes: Shapes, card: Card) -> list[str]:
    """Return the prefixes under which an architecture's first and last tensor are."""
    *_, last = _shapes(card.name, card.num_classes) or ("",)
    return [prefix for prefix in _starts(shapes, card) if prefix + last in shapes]


def _candidates(shapes: Shapes, begun: Callable[[Shapes, Card], list[str]]) -> Iterator[Card]:
    """Yield the zoo's architectures, and those of torchvision's families whose first member ``begun`` finds.

    The members of a family share the names of their first and last tensor, so that one of each family shows whether
    the others are worth building.
    """
    yield from map(architecture, zoo.list_architectures())
    for names in _families():
        cards = [architecture(TORCHVISION + name) for name in names]
        if begun(shapes, cards[0]):
            yield from cards


@lru_cache(maxsize=1)
def _families() -> list[list[str]]:
    """Return torchvision's classifiers by the file that defines them."""
    models = torchvision().models
    families: dict[str, list[str]] = {}
    for name in models.list_models(module=models):
        families.setdefault(models.get_model_builder(name).__module__, []).append(name)
    return list(families.values())


def _classes_in(got: Shapes, card: Card) -> int | None:
    """Return the number of classes with which an architecture has just these tensors, or None.

    The tensors that differ from the usual number of classes must all have it on axis 0.
    """
    usual = _shapes(card.name, card.num_classes)
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


class EmptyOnMeta(TorchFunctionMode):
    """Gives weights no memory. Other tensors are real, since constructors compute sizes with them (RegNet does)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is torch.empty and options.get("device") is None:
            options = {**options, "device": "meta"}
        return func(*args, **options)


@lru_cache(maxsize=512)
def _shapes(name: str, num_classes: int) -> Shapes | None:
    """Names and shapes of an architecture's tensors, or None if it cannot be built with so many classes."""
    try:
        with EmptyOnMeta():
            model = architecture(name).build(num_classes=num_classes)
    except (TypeError, ValueError, RuntimeError):
        return None
    return shapes_of(model.state_dict())
