"""``lmh zoo``: what there is, where it came from, and how to make it again."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from ..errors import ArtifactError
from ..records import plain_value
from .model_cards import ModelCard, SpikingCard, card_facts, card_json
from .models import list_models, model_card, model_names, readable_cards
from .recipe import read_recipe, recipe_names
from .registry import TORCHVISION, architecture, list_architectures
from .results import results_command
from .train_cli import train_command
from .weights_cli import add_command, download_command, export_card_command, publish_command, verify_command


@click.group("zoo")
def zoo_group() -> None:
    """Networks of the zoo: list, show, download and verify them, train them again, publish your own."""


for command in (
    download_command, verify_command, export_card_command, add_command, publish_command, train_command, results_command
):  # fmt: skip
    zoo_group.add_command(command)


@zoo_group.command("list")
@click.option("--family", help="Of one family only, such as resnet or torchvision.")
@click.option("--data", help="Models that were trained on this data set, such as cifar10.")
@click.option("--timesteps", "-T", type=click.IntRange(min=1), help="Spiking networks of this T.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_command(family: str | None, data: str | None, timesteps: int | None, as_json: bool) -> None:
    """List the zoo's architectures, recipes, trained ANNs and ready spiking networks.

    \b
    lmh zoo list --data digits --timesteps 4
    """  # noqa: D301
    architectures = list_architectures(family=family) if data is None and timesteps is None else []
    anns = list_models(family=family, data=data) if timesteps is None else []
    cards = list(readable_cards())
    steps = sorted({card.timesteps for card in cards if isinstance(card, SpikingCard)})
    wanted = steps if timesteps is None else [timesteps]
    spiking = [name for t in wanted for name in list_models(family=family, data=data, timesteps=t)]
    unreadable = [str(card) for card in cards if isinstance(card, ArtifactError)]
    recipes = [
        found
        for found in map(read_recipe, recipe_names())
        if data in (None, found.data)
        and timesteps in (None, found.timesteps)
        and family in (None, architecture(found.architecture).family)
    ]
    if as_json:
        found = {
            "architectures": architectures,
            "recipes": [recipe.name for recipe in recipes],
            "models": anns,
            "spiking": spiking,
            "unreadable": unreadable,
        }
        click.echo(json.dumps(found))
        return
    families = {name: architecture(name).family for name in architectures}
    for kind in dict.fromkeys(families.values()):
        click.echo(f"architectures, {kind}: {', '.join(name for name in architectures if families[name] == kind)}")
    for recipe in recipes:
        what = "an ANN" if recipe.timesteps is None else f"T = {recipe.timesteps}"
        click.echo(f"recipe {recipe.name}: {recipe.architecture}, {recipe.data}, {what}")
    for name in (*anns, *spiking):
        click.echo(f"model {name}: {_short(model_card(name))}")
    for problem in unreadable:
        click.echo(f"not readable: {problem}", err=True)
    if not (families or recipes or anns or spiking):
        click.echo("Nothing fits; `lmh zoo list` without options shows all that there is.", err=True)
    if family is None and data is None and timesteps is None:
        click.echo("Every torchvision classifier is there as torchvision:NAME.")


def _short(known: ModelCard) -> str:
    """Return a model in a line."""
    parts = [known.architecture, known.data or "no data set"]
    if isinstance(known, SpikingCard):
        parts.append(f"T = {known.timesteps}")
    accuracy = known.ann_accuracy
    if isinstance(known, SpikingCard):
        accuracy = None if known.accuracy is None else known.accuracy[-1]
    if accuracy is not None:
        parts.append(f"{100 * accuracy:.2f} %")
    return ", ".join([*parts, f"{known.weights.size / 1e6:.2f} MB"])


@zoo_group.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show_command(name: str, as_json: bool) -> None:
    """Show an architecture, a recipe or a model: its input, how it was trained, what it does, where its weights are.

    \b
    lmh zoo show digits-cnn-t4
    """  # noqa: D301
    from ..convert.architectures import EmptyOnMeta

    name = name.removeprefix("zoo:")
    recipe = plain_value(read_recipe(name)) if name in recipe_names() else None
    if recipe is not None and name not in (*model_names(), *list_architectures()):
        click.echo(json.dumps(recipe) if as_json else "\n".join(f"{key}: {json.dumps(recipe[key])}" for key in recipe))
        return
    model = model_card(name) if name in model_names() else None
    found = architecture(name if model is None else model.architecture, [*model_names(), *recipe_names()])
    preprocessing = found.preprocessing if model is None else model.preprocessing
    classes = found.num_classes if model is None else model.num_classes
    with EmptyOnMeta():
        parameters = sum(p.numel() for p in found.build(num_classes=classes).parameters())
    shown: dict[str, Any] = {
        "name": name,
        "architecture": found.name,
        "family": found.family,
        "parameters": parameters,
        "num_classes": classes,
        "input": preprocessing.described()["input"],
        **asdict(preprocessing),
        "card": None if model is None else card_json(model),
        "recipe": recipe,
    }
    if as_json:
        click.echo(json.dumps(shown))
        return
    for key, value in shown.items():
        if key not in ("card", "recipe"):
            click.echo(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")
    if model is None:
        ours = not name.startswith(TORCHVISION)
        click.echo(f"weights: {'none here' if ours else 'of torchvision, downloaded when they are wanted'}")
        if recipe is not None:
            click.echo(f"recipe: {json.dumps(recipe)}")
            click.echo(f"to train it: lmh zoo train {name} --data {recipe['data']}:DIR or npz:FILE --out FOLDER")
        return
    if isinstance(model, SpikingCard):
        click.echo(f"timesteps: {model.timesteps}")
        accuracies = ", ".join(f"{100 * value:.2f}" for value in model.accuracy or ())
        click.echo(f"accuracy in % after t = 1…{model.timesteps}: {accuracies or 'not measured'}")
    for key, fact in card_facts(model).items():
        if fact is not None and key not in ("classes", "input", "mean, std"):
            click.echo(f"{key}: {fact}")
    click.echo(f"recipe: {json.dumps(model.recipe)}")
