"""``lmh zoo``: what there is, where it came from, and how to make it again."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from ..artifact import versions, write_tensors
from ..cli import command_line
from ..errors import ArgumentError
from ..terminal import Terminal
from .data import load_data
from .images import Batches, seeded_order
from .models import ANNS, SNNS, card, list_models, record
from .registry import list_architectures

RECIPES = Path(__file__).parent / "recipes"


@click.group("zoo")
def zoo_group() -> None:
    """Networks of the zoo: list them, show how they came about, train them again."""


@zoo_group.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_command(as_json: bool) -> None:
    """List the zoo's architectures, trained ANNs and ready spiking networks."""
    found = {"architectures": list_architectures(), "models": list_models(), "spiking": list(SNNS)}
    if as_json:
        click.echo(json.dumps(found))
        return
    for kind, names in found.items():
        click.echo(f"{kind}: {', '.join(names)}")
    click.echo("Every torchvision classifier is there as torchvision:NAME.")


@zoo_group.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show_command(name: str, as_json: bool) -> None:
    """Show an architecture's input and, where it has weights, how they were trained."""
    found = card(name)
    shown: dict[str, Any] = {
        "name": found.name,
        "parameters": sum(p.numel() for p in found.build().parameters()),
        "num_classes": found.num_classes,
        **asdict(found.preprocessing),
        "training": record(name) if name in ANNS else None,
    }
    if as_json:
        click.echo(json.dumps(shown))
        return
    for key, value in shown.items():
        click.echo(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")


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
    out.mkdir(parents=True, exist_ok=True)
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
    batches = Batches(data.train, found.preprocessing, batch, chosen, found.augmentation, shuffle_seed=seed)
    with terminal.stage(f"training {found.name}", schedule.epochs * len(batches)) as advance:
        fit(
            model, batches, None, schedule, checkpoint=out / "training.safetensors",
            on_batch=lambda epoch, _index, loss: advance(1, f"epoch {epoch + 1}, loss {loss:.3f}"),
        )  # fmt: skip
    measured = accuracy(model, Batches(data.test, found.preprocessing))
    facts = {
        "recipe": settings,
        "accuracy": measured,
        "test_samples": len(data.test),
        "versions": versions(),
        "command": command_line(),
    }
    path = out / f"{found.name}.safetensors"
    write_tensors(path, model.state_dict(), {"record": facts})
    return path, measured
