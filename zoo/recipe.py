"""Recipes: what a network of the zoo is trained from, on what and how, and the published figure beside it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from ..artifact import is_there, user_path
from ..errors import ArgumentError
from .model_cards import NAME
from .registry import nearest_names

RECIPES = Path(__file__).parent / "recipes"
_Fields = TypeVar("_Fields")


@dataclass(frozen=True, kw_only=True)
class Published:
    """A row of a table in Hao et al. 2024. Accuracies are in %, as printed there.

    Attributes:
        table: 1, 2 or 3.
        method: ``LM-H``, or the baseline's name.
        accuracy: after T steps.
        ann: of the ANN, where the table has it.
        qcfs: of QCFS at the same T, where the table has it.
    """

    table: int
    method: str
    accuracy: float
    ann: float | None = None
    qcfs: float | None = None

    def __post_init__(self) -> None:
        figures = [value for value in (self.accuracy, self.ann, self.qcfs) if value is not None]
        numbers = all(isinstance(value, int | float) and 0 < value < 100 for value in figures)
        if self.table not in (1, 2, 3) or not isinstance(self.method, str) or not numbers:
            raise ArgumentError(f"{self}: expected table 1, 2 or 3, a name, and accuracies in %.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network of the zoo is trained.

    Attributes:
        name: of the model that comes out, and of the file that holds the recipe.
        architecture: a name of :func:`lmh.zoo.list_architectures`.
        data: name of the data set, such as ``cifar10``.
        seed: of the first weights, the samples and the training; schedules have none of their own.
        training: a :class:`lmh.finetune.recipe.TrainingRecipe` as its ``to_json`` gives it; what is left out has its
            default.
        timesteps: T; None trains an ANN.
        ann: recipe of the ANN that a spiking network, or a QCFS network, starts from; None starts from random weights.
        snn: recipe of the spiking network that this one goes on from, with its neurons; there is no ann then.
        teacher: recipe of the ANN whose outputs a spiking network is distilled from; None takes the one it starts from.
        time_norm: what becomes of BatchNorm in a spiking network: ``plain``, ``tebn`` or ``tdbn``.
        samples: train on the first so many in the order of the seed; None takes all.
        published: the row that it repeats, or None.
    """

    name: str
    architecture: str
    data: str
    seed: int
    training: Mapping[str, Any]
    timesteps: int | None = None
    ann: str | None = None
    snn: str | None = None
    teacher: str | None = None
    time_norm: str = "plain"
    samples: int | None = None
    published: Published | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(NAME, self.name):
            raise ArgumentError(f"recipe {self.name!r}: expected letters, digits, dots and dashes. Rename the file.")
        named = (name for name in (self.ann, self.snn, self.teacher) if name is not None)
        texts = (self.architecture, self.data, *named)
        if not all(isinstance(text, str) for text in texts):
            raise ArgumentError(
                f"{self.name}: architecture, data, ann, snn and teacher are {texts}; expected names in quotes."
            )
        if self.snn is not None and (self.ann is not None or self.timesteps is None or self.time_norm != "plain"):
            raise ArgumentError(
                f"{self.name}: starts from the spiking network {self.snn}; expected its timesteps, and neither ann nor "
                "time_norm. Leave them out."
            )
        if self.teacher is not None and self.timesteps is None:
            raise ArgumentError(f"{self.name}: an ANN has no teacher but the one it starts from. Leave teacher out.")
        for name, value, least in (
            ("seed", self.seed, 0),
            ("timesteps", self.timesteps, 1),
            ("samples", self.samples, 1),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ArgumentError(f"{self.name}: {name} is {value!r}; expected a whole number of at least {least}.")
        if not isinstance(self.training, Mapping):
            raise ArgumentError(f"{self.name}: training is {self.training!r}; expected a table, [training].")

    @property
    def start(self) -> str | None:
        """Return the recipe of the network that this one starts from; None starts from random weights."""
        return self.ann or self.snn


def recipe_names() -> list[str]:
    """Return the names of the package's recipes.

    >>> "digits-cnn" in recipe_names()
    True
    """
    return sorted(file.stem for file in RECIPES.glob("*.toml"))


def read_recipe(name: str) -> Recipe:
    """Return a recipe by its name in the zoo or its TOML file, whose stem is then its name.

    Raises:
        ArgumentError: if there is none, or keys are missing or unknown.

    >>> read_recipe("digits-cnn").architecture
    'digits-cnn'
    """
    path = user_path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not is_there(path):
        near = nearest_names(name, recipe_names())
        raise ArgumentError(
            f"recipe {name!r} is not known; nearest: {near}. `lmh zoo list` shows all; your own file ends in .toml."
        )
    try:
        plain = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ArgumentError(f"{path}: not TOML ({error}). Compare with {RECIPES / 'digits-cnn.toml'}.") from error
    plain["name"] = path.stem
    if "published" in plain:
        plain["published"] = _filled(Published, plain["published"], f"{path}, [published]")
    return _filled(Recipe, plain, str(path))


def _filled(kind: type[_Fields], plain: Mapping[str, Any], where: str) -> _Fields:
    """Build a frozen type from a table of TOML."""
    if not isinstance(plain, Mapping):
        raise ArgumentError(f"{where}: is {plain!r}; expected a table. Compare with {RECIPES / 'digits-cnn.toml'}.")
    known = {item.name: item.default is MISSING for item in fields(kind)}  # type: ignore[arg-type]
    missing = [name for name, needed in known.items() if needed and name not in plain]
    odd = sorted(plain.keys() - known.keys())
    if missing or odd:
        raise ArgumentError(
            f"{where}: missing: {', '.join(missing) or 'nothing'}; unknown: {', '.join(odd) or 'nothing'}; expected "
            f"{', '.join(known)}. Compare with {RECIPES / 'digits-cnn.toml'}."
        )
    return kind(**plain)
