"""A training's recipe as one frozen value, and as TOML that can be replayed."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..artifact import is_there, read_snn, user_path, write_atomically
from ..calibrate import MinError
from ..errors import ArgumentError, ArtifactError
from ..records import frozen_value, plain_value
from ..resets import AttachedReset, DetachedReset
from ..spiking import IF, LIF, LMH, PerChannel, PerLayer, PerStep, Ranges
from ..surrogates import Arctan, Dspike, Rectangle, Sigmoid, Triangle
from ..zoo.augmentation import (
    Augmentation,
    AutoAugment,
    CropFlip,
    Cutout,
    ForCIFAR10,
    ForImageNet,
    ForSVHN,
    InTurn,
    OneOf,
    Roll,
    Rotate,
)
from .batch_norm import FrozenBatchNorm, LiveBatchNorm, SyncedBatchNorm
from .losses import TET, CrossEntropy, Distillation
from .memory import KeepAll, Recompute
from .mixing import CutMix, Mixup
from .precision import BFloat16, Float32, has_bfloat16, in_float32
from .schedule import EMA, EarlyStopping, Schedule
from .strategies import SLTT, STBP, EverySlice, Hybrid, OncePerBatch, Progressive, Strategy, TimeSliced

NONE = "none"
"""How TOML, which has no null, says that a field is None."""


@dataclass(frozen=True)
class TrainingRecipe:
    """What decides a training, apart from the network, the data and the teacher.

    Attributes:
        strategy: how gradients go through time, and what comes before.
        schedule: of the spiking network's training.
        batch_size: images a step.
        augmentation: of the images; None leaves them.
    """

    strategy: Strategy
    schedule: Schedule
    batch_size: int
    augmentation: Augmentation | None = None

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ArgumentError(f"batch_size is {self.batch_size!r}; expected a whole number of at least 1.")

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """Return the schedules of all stages, in order."""
        return (self.strategy.qcfs, self.schedule) if isinstance(self.strategy, Hybrid) else (self.schedule,)

    @property
    def epochs(self) -> int:
        """Return the epochs of all stages."""
        return sum(schedule.epochs for schedule in self.schedules)

    def seeded(self, seed: int) -> TrainingRecipe:
        """Return the recipe with this seed in all stages."""
        strategy = self.strategy
        if isinstance(strategy, Hybrid):
            strategy = replace(strategy, qcfs=replace(strategy.qcfs, seed=seed))
        return replace(self, strategy=strategy, schedule=replace(self.schedule, seed=seed))

    def on(self, device: torch.device) -> TrainingRecipe:
        """Return the recipe as a device can carry it out: in float32 where it says bfloat16 and the device has none."""
        return self if has_bfloat16(device) else self.from_json(in_float32(self.to_json()), "recipe")

    def to_json(self) -> dict[str, Any]:
        """Return plain values that :meth:`from_json` reads back."""
        return plain_value(self)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any], where: str) -> TrainingRecipe:
        """Rebuild a recipe.

        Args:
            plain: from :meth:`to_json`, or a TOML file.
            where: for messages.

        Raises:
            ArgumentError: naming a type or field that is not known, or a value that its type refuses.
        """
        try:
            found = frozen_value(_without_none(plain), TYPES)
        except KeyError as error:
            raise ArgumentError(
                f"{where}: the type {error} is not known; expected types of lmh.finetune, such as {', '.join(_SHOWN)}."
            ) from error
        except TypeError as error:
            raise ArgumentError(
                f"{where}: {error}; expected the fields of lmh.finetune's types. Compare with the recipe that "
                "--save-recipe writes."
            ) from error
        except ArgumentError as error:
            raise ArgumentError(f"{where}: {error}") from error
        if not isinstance(found, cls):
            raise ArgumentError(
                f'{where}: no training recipe; expected type = "TrainingRecipe" with strategy, schedule and batch_size.'
            )
        return found


TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        TrainingRecipe, Schedule, STBP, TimeSliced, SLTT, Progressive, Hybrid, EverySlice, OncePerBatch,
        CrossEntropy, TET, Distillation, Mixup, CutMix, Float32, BFloat16, KeepAll, Recompute,
        LiveBatchNorm, FrozenBatchNorm, SyncedBatchNorm, EMA, EarlyStopping, MinError,
        LMH, IF, LIF, PerLayer, PerChannel, PerStep, Ranges, Triangle, Rectangle, Sigmoid, Arctan, Dspike,
        DetachedReset, AttachedReset,
        CropFlip, Cutout, AutoAugment, ForCIFAR10, ForImageNet, ForSVHN, InTurn,
        OneOf, Roll, Rotate,
    )
}  # fmt: skip
_SHOWN = ("Hybrid", "Progressive", "TimeSliced", "Schedule")


def _without_none(plain: Any) -> Any:
    if isinstance(plain, Mapping):
        return {key: _without_none(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_without_none(item) for item in plain]
    return None if plain == NONE else plain


def read_recipe(name: str) -> TrainingRecipe:
    """Return the recipe of a TOML file, or the one that a saved spiking network was trained by.

    Raises:
        ArgumentError: if there is none, or it cannot be read.
    """
    path = user_path(name)
    if not is_there(path):
        raise ArgumentError(f"{name}: no such recipe; expected a .toml file, or a network that was trained. Check it.")
    if path.suffix != ".toml":
        try:
            plain = read_snn(path)[1].get("training")
        except ArtifactError as error:
            raise ArgumentError(f"{name}: neither a .toml file nor a saved spiking network. ({error})") from error
        if plain is None:
            raise ArgumentError(f"{name}: was not trained by a recipe; expected a network from `lmh finetune`.")
        return TrainingRecipe.from_json(plain, name)
    try:
        plain = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ArgumentError(f"{name}: not TOML ({error}). Compare with what --save-recipe writes.") from error
    return TrainingRecipe.from_json(plain, name)


def write_recipe(recipe: TrainingRecipe, path: Path) -> None:
    """Write a recipe as TOML.

    Raises:
        ArtifactError: if the file cannot be written.
    """
    write_atomically(path, toml(recipe.to_json()).encode())


def toml(table: Mapping[str, Any]) -> str:
    """Return plain values as TOML; None becomes the text ``none``.

    >>> print(toml({"type": "A", "rate": 0.01, "ways": [{"type": "B"}], "inner": {"none": None}}), end="")
    type = "A"
    rate = 0.01
    ways = [{type = "B"}]
    <BLANKLINE>
    [inner]
    none = "none"
    """
    return _table(table, ())


def _table(table: Mapping[str, Any], path: tuple[str, ...]) -> str:
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    lines = [f"[{'.'.join(map(_key, path))}]"] if path else []
    lines += [f"{_key(key)} = {_value(value)}" for key, value in table.items() if key not in inner]
    blocks = ["\n".join(lines) + "\n", *(_table(value, (*path, key)) for key, value in inner.items())]
    return "\n".join(blocks)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def _value(value: Any) -> str:
    match value:
        case None:
            return json.dumps(NONE)
        case bool():
            return str(value).lower()
        case Mapping():
            return "{" + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(_value, value)) + "]"
        case str():
            return json.dumps(value)
    return repr(value)
