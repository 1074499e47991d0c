"""``lmh zoo``: what there is, where it came from, and how to make it again."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from ..artifact import make_folder, versions, write_tensors
from ..cli import command_line
from ..errors import ArgumentError, ArtifactError
from ..records import plain_value
from ..terminal import Terminal
from .data import check_kind_of_data, load_data
from .images import Batches, seeded_order
from .model_cards import ModelCard, SpikingCard, card_facts, card_json
from .models import card, list_models, model_card, model_names, readable_cards
from .registry import TORCHVISION, list_architectures
from .weights_cli import add_command, download_command, export_card_command, publish_command, verify_command

RECIPES = Path(__file__).parent / "recipes"


@click.group("zoo")
def zoo_group() -> None:
    """Networks of the zoo: list, show, download and verify them, train them again, publish your own."""


for command in (download_command, verify_command, export_card_command, add_command, publish_command):
    zoo_group.add_command(command)


@zoo_group.command("list")
@click.option("--family", help="Of one family only, such as resnet or torchvision.")
@click.option("--data", help="Models that were trained on this data set, such as cifar10.")
@click.option("--timesteps", "-T", type=click.IntRange(min=1), help="Spiking networks of this T.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_command(family: str | None, data: str | None, timesteps: int | None, as_json: bool) -> None:
    """List the zoo's architectures, trained ANNs and ready spiking networks."""
    architectures = list_architectures(family=family) if data is None and timesteps is None else []
    anns = list_models(family=family, data=data) if timesteps is None else []
    cards = list(readable_cards())
    steps = sorted({card.timesteps for card in cards if isinstance(card, SpikingCard)})
    wanted = steps if timesteps is None else [timesteps]
    spiking = [name for t in wanted for name in list_models(family=family, data=data, timesteps=t)]
    unreadable = [str(card) for card in cards if isinstance(card, ArtifactError)]
    if as_json:
        found = {"architectures": architectures, "models": anns, "spiking": spiking, "unreadable": unreadable}
        click.echo(json.dumps(found))
        return
    for kind in dict.fromkeys(card(name).family for name in architectures):
        click.echo(f"architectures, {kind}: {', '.join(name for name in architectures if card(name).family == kind)}")
    for name in (*anns, *spiking):
        click.echo(f"model {name}: {_short(model_card(name))}")
    for problem in unreadable:
        click.echo(f"not readable: {problem}", err=True)
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
    """Show an architecture, or a model: its input, how it was trained, what it does and where its weights are."""
    from ..convert.architectures import EmptyOnMeta

    name = name.removeprefix("zoo:")
    model = model_card(name) if name in model_names() else None
    found = card(name if model is None else model.architecture)
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
    }
    if as_json:
        click.echo(json.dumps(shown))
        return
    for key, value in shown.items():
        if key != "card":
            click.echo(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")
    if model is None:
        ours = not name.startswith(TORCHVISION)
        click.echo(f"weights: {'none here' if ours else 'of torchvision, downloaded when they are wanted'}")
        return
    if isinstance(model, SpikingCard):
        click.echo(f"timesteps: {model.timesteps}")
        accuracies = ", ".join(f"{100 * value:.2f}" for value in model.accuracy or ())
        click.echo(f"accuracy in % after t = 1…{model.timesteps}: {accuracies or 'not measured'}")
    for key, fact in card_facts(model).items():
        if fact is not None and key not in ("classes", "input", "mean, std"):
            click.echo(f"{key}: {fact}")
    click.echo(f"recipe: {json.dumps(model.recipe)}")


@zoo_group.command("train")
@click.argument("recipe")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for weights and checkpoint."
)
@click.option("--data", metavar="SPEC", help="In the place of the recipe's data.")
def train_command(recipe: str, out: Path, data: str | None) -> None:
    """Train an ANN by RECIPE, a name of the zoo or a TOML file. A broken run is resumed from OUT."""
    settings = read_recipe(recipe)
    if data is not None:
        settings["data"] = data
    make_folder(out, "Name another with --out.")
    path, accuracy = train(settings, out, Terminal())
    click.echo(f"{path}: accuracy {100 * accuracy:.2f} % on the test split")


def read_recipe(name: str) -> dict[str, Any]:
    """Return a recipe's settings by its name in the zoo or its file.

    Raises:
        ArgumentError: if there is none, or keys are missing or unknown.
    """
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.toml")))
        raise ArgumentError(f"recipe {name!r} is not known; expected one of {known}, or a .toml file.")
    try:
        settings = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ArgumentError(f"{path}: not TOML ({error}). Compare with {RECIPES / 'digits-cnn.toml'}.") from error
    expected = {"architecture", "data", "seed", "epochs", "batch_size", "lr", "weight_decay", "label_smoothing"}
    if settings.keys() - {"samples"} != expected:
        odd = ", ".join(sorted((settings.keys() - {"samples"}) ^ expected))
        wanted = ", ".join(sorted(expected))
        raise ArgumentError(f"{path}: keys missing or unknown: {odd}; expected {wanted}, and samples or not.")
    return settings


def train(settings: dict[str, Any], out: Path, terminal: Terminal) -> tuple[Path, float]:
    """Train an ANN, write its weights with their record, and return the file and its accuracy."""
    from ..finetune import CrossEntropy, Schedule, fit
    from ..finetune.trainer import accuracy

    found = card(settings["architecture"])
    check_kind_of_data(settings["data"], found.preprocessing)
    data = load_data(settings["data"], input_size=found.preprocessing.input_size)
    seed, batch = settings["seed"], settings["batch_size"]
    torch.manual_seed(seed)
    model = found.build(num_classes=len(data.classes))
    schedule = Schedule(
        epochs=settings["epochs"],
        lr=settings["lr"],
        weight_decay=settings["weight_decay"],
        loss=CrossEntropy(label_smoothing=settings["label_smoothing"]),
        seed=seed,
    )
    chosen = seeded_order(data.train, seed)[: settings["samples"]] if "samples" in settings else None
    preprocessing = data.normalising(found.preprocessing)
    batches = Batches(data.train, preprocessing, batch, chosen, found.augmentation, shuffle_seed=seed)
    with terminal.stage(f"training {found.name}", schedule.epochs * len(batches)) as advance:
        fit(
            model, batches, None, schedule, checkpoint=out / "training.safetensors",
            on_batch=lambda epoch, _index, loss: advance(1, f"epoch {epoch + 1}, loss {loss:.3f}"),
        )  # fmt: skip
    measured = accuracy(model, Batches(data.test, preprocessing))
    facts = {
        "recipe": settings,
        "num_classes": len(data.classes),
        "preprocessing": plain_value(preprocessing),
        "accuracy": measured,
        "test_samples": len(data.test),
        "versions": versions(),
        "command": command_line(),
    }
    path = out / f"{found.name}.safetensors"
    write_tensors(path, model.state_dict(), {"record": facts})
    return path, measured
