"""What `lmh zoo train` starts from: the network that a recipe names, one that the user gave, or random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..artifact import is_there, make_folder, user_path, write_tensors
from ..errors import ArgumentError
from ..records import plain_value
from .model_cards import SpikingCard
from .models import model_card, model_names
from .recipe import Recipe
from .registry import architecture
from .releases import card_of_file
from .splits import DataSet

ANOTHER = "Name another folder with --out."


def fresh(recipe: Recipe, data: DataSet) -> nn.Module:
    """Build the architecture with the random weights of the seed."""
    torch.manual_seed(recipe.seed)
    return architecture(recipe.architecture).build(num_classes=len(data.classes))


def untrained(recipe: Recipe, out: Path) -> Path:
    """Return where an ANN of random weights is, until its spiking network is trained."""
    return out / recipe.name / "untrained.safetensors"


def start_of(recipe: Recipe, data: DataSet, out: Path) -> str:
    """Return where the network is that a recipe starts from, or write an ANN of random weights where it names none."""
    if recipe.start is None:
        path = untrained(recipe, out)
        make_folder(path.parent, ANOTHER)
        preprocessing = data.normalising(architecture(recipe.architecture).preprocessing)
        facts = {"preprocessing": plain_value(preprocessing)}
        write_tensors(path, fresh(recipe, data).state_dict(), {"record": facts}, ANOTHER)
        return str(path)
    return trained(recipe.start, recipe, data, out)


def trained(network: str, recipe: Recipe, data: DataSet, out: Path) -> str:
    """Return where a network is that a recipe names."""
    path = out / f"{network}.safetensors"
    if is_there(path):
        return str(path)
    if network in model_names():
        return f"zoo:{network}"
    other = "name another with --start" if network == recipe.start else "copy the recipe without its teacher"
    raise ArgumentError(
        f"{recipe.name} needs {network}, which is neither in {out} nor in the zoo. Train it first, by `lmh zoo train "
        f"{network} --data {data.name} --out {out}`, or {other}."
    )


def check_start(recipe: Recipe, data: DataSet, start: str) -> SpikingCard | None:
    """Refuse what the recipe's network cannot start from; return the card of a spiking network.

    Raises:
        ArgumentError: if it is of another architecture or T, or has other classes than the data.
    """
    from ..convert.loading import load_source

    if recipe.snn is None:
        source, known = load_source(start), None
        found = _words(None if source.card is None else source.card.name, source.num_classes)
        wanted = _words(recipe.architecture, len(data.classes))
    else:
        known = _spiking_card(recipe.snn, start)
        found = _words(known.architecture, known.num_classes, known.timesteps)
        wanted = _words(recipe.architecture, len(data.classes), recipe.timesteps)
    if found != wanted:
        raise ArgumentError(
            f"{start}: is {found}; {recipe.name} starts from {wanted}, for the classes of {data.name}. Name another "
            "with --start, or train this one by `lmh finetune`."
        )
    return known


def _words(architecture: str | None, num_classes: int | None, timesteps: int | None = None) -> str:
    steps = "" if timesteps is None else f" and T = {timesteps}"
    return f"{architecture or 'a module'} with {num_classes} classes{steps}"


def _spiking_card(name: str, start: str) -> SpikingCard:
    """Return what is known of a spiking network that a recipe starts from.

    Raises:
        ArgumentError: if it is none.
    """
    known = model_card(start) if start.startswith("zoo:") else card_of_file(name, user_path(start), licence="")
    if not isinstance(known, SpikingCard):
        raise ArgumentError(
            f"{start}: is an ANN; expected a spiking network, as the recipe's snn names one. Name another with --start."
        )
    return known
