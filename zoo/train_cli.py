"""``lmh zoo train``: a recipe carried out to a network and its card. Any interruption is resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from ..artifact import is_there, make_folder, versions, write_atomically, write_tensors
from ..cli import command_line
from ..errors import ArgumentError
from ..records import plain_value
from ..terminal import Terminal
from .data import check_kind_of_data, load_data
from .images import Batches, seeded_order
from .model_cards import card_text
from .models import card, model_names
from .recipe import Recipe, read_recipe
from .releases import card_of_file
from .splits import DataSet

if TYPE_CHECKING:
    from ..finetune.recipe import TrainingRecipe

EMBEDDED = ("digits",)
CHECKPOINT_MINUTES = 10.0


@click.command("train")
@click.argument("recipe")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True,
    help="Folder for weights, card and checkpoints.",
)  # fmt: skip
@click.option("--data", metavar="SPEC", help="Where the recipe's data set is. Embedded data needs none.")
@click.option(
    "--ann", metavar="SOURCE",
    help="The ANN that a spiking network starts from; unless given, what its recipe names, in --out or the zoo.",
)  # fmt: skip
@click.option("--licence", default="Apache-2.0", show_default=True, help="Of the weights, an SPDX identifier.")
@click.pass_context
def train_command(
    context: click.Context, recipe: str, out: Path, data: str | None, ann: str | None, licence: str
) -> None:
    """Train an ANN or a spiking network by RECIPE, a name of the zoo or a TOML file, and write its card.

    A broken run goes on from its checkpoints in OUT when the same command is given again.

    \b
    lmh zoo train digits-cnn --out runs/zoo
    lmh zoo train cifar10-resnet20 --data npz:cifar10.npz --out runs/zoo
    lmh zoo train cifar10-resnet20-t4 --data npz:cifar10.npz --out runs/zoo
    """  # noqa: D301
    found = read_recipe(recipe)
    if data is None and found.data not in EMBEDDED:
        raise click.UsageError(
            f"--data is missing: {found.name} is trained on {found.data}. Say where it is, as in --data "
            f"{found.data}:DIR or npz:FILE."
        )
    if ann is not None and found.timesteps is None:
        raise click.UsageError(f"--ann {ann} came with a recipe that trains an ANN. Leave it out.")
    spec = data or found.data
    make_folder(out, "Name another with --out.")
    path = out / f"{found.name}.safetensors"
    measured = None
    if found.timesteps is None:
        train_ann(found, spec, path, Terminal())
    else:
        source = ann or _ann_of(found, spec, out)
        measured = train_snn(context, found, spec, source, path)
    made = card_of_file(found.name, path, licence=licence, measured=measured)
    if found.timesteps is not None and ann is None and found.ann is None:
        made = replace(made, ann_accuracy=None)  # of random weights
    place = path.with_suffix(".json")
    write_atomically(place, card_text(made).encode())
    click.echo(f"Written: {path}, {place}")


def train_ann(recipe: Recipe, spec: str, path: Path, terminal: Terminal) -> None:
    """Train an ANN and write its weights with their record.

    Args:
        recipe: with a plain strategy, ``STBP``.
        spec: where its data set is.
        path: of the file; the checkpoint is beside it until it is written.
        terminal: for the bar.

    Raises:
        ArgumentError: if the recipe's training is not one of an ANN.
    """
    from ..finetune import STBP, Checkpoint, fit
    from ..finetune.trainer import accuracy

    training = training_of(recipe)
    if training.strategy != STBP():
        raise ArgumentError(
            f"{recipe.name}: strategy is {training.strategy} and there is no timesteps; an ANN is trained by STBP. "
            'Name timesteps, or take strategy = {type = "STBP"}.'
        )
    found = card(recipe.architecture)
    data = _opened(recipe, spec)
    torch.manual_seed(recipe.seed)
    model = found.build(num_classes=len(data.classes))
    chosen = seeded_order(data.train, recipe.seed)[: recipe.samples]
    preprocessing = data.normalising(found.preprocessing)
    batches = Batches(
        data.train, preprocessing, training.batch_size, chosen, training.augmentation, shuffle_seed=recipe.seed
    )
    checkpoint = path.with_name(f"{path.name}.training")
    with terminal.stage(f"training {recipe.name}", training.schedule.epochs * len(batches)) as advance:
        fit(
            model, batches, None, training.schedule,
            checkpoint=Checkpoint(checkpoint, minutes=CHECKPOINT_MINUTES),
            on_batch=lambda epoch, _index, loss: advance(1, f"epoch {epoch + 1}, loss {loss:.3f}"),
        )  # fmt: skip
    measured = accuracy(model, Batches(data.test, preprocessing))
    facts = {
        "recipe": {**plain_value(recipe), "data": spec},
        "num_classes": len(data.classes),
        "preprocessing": plain_value(preprocessing),
        "accuracy": measured,
        "test_samples": len(data.test),
        "versions": versions(),
        "command": command_line(),
    }
    write_tensors(path, model.state_dict(), {"record": facts})
    checkpoint.unlink(missing_ok=True)
    terminal.notice(f"{recipe.name}: accuracy {100 * measured:.2f} % on {len(data.test)} test samples.")


def train_snn(context: click.Context, recipe: Recipe, spec: str, ann: str, path: Path) -> dict[str, Any]:
    """Train a spiking network as ``lmh finetune`` does, and return what ``lmh report`` measures.

    Args:
        context: of the running command.
        recipe: says T and how.
        spec: where its data set is.
        ann: what it starts from.
        path: of the file; a folder of that name without a suffix has recipe, log and checkpoints.
    """
    from ..convert.report_cli import report
    from ..finetune.cli import finetune_command
    from ..finetune.recipe import write_recipe

    folder = path.with_suffix("")
    make_folder(folder, "Name another with --out.")
    wanted = folder / "wanted.toml"
    write_recipe(training_of(recipe), wanted)
    context.invoke(
        finetune_command, network=ann, data=spec, timesteps=recipe.timesteps, recipe=str(wanted),
        time_norm=recipe.time_norm, train_samples=recipe.samples, seed=recipe.seed, output=path, resume=folder,
        checkpoint_minutes=CHECKPOINT_MINUTES, arch=None if ann.startswith("zoo:") else recipe.architecture,
    )  # fmt: skip
    return report(str(path), spec, Terminal())


def training_of(recipe: Recipe) -> TrainingRecipe:
    """Return the training of a recipe, with the architecture's augmentation unless it names one.

    Raises:
        ArgumentError: naming a type or field that is not known, or a value that its type refuses.
    """
    from ..finetune.recipe import TrainingRecipe

    training = TrainingRecipe.from_json({"type": "TrainingRecipe", **recipe.training}, recipe.name)
    if "augmentation" in recipe.training:
        return training
    return replace(training, augmentation=card(recipe.architecture).augmentation)


def _ann_of(recipe: Recipe, spec: str, out: Path) -> str:
    """Return where the ANN is that a recipe names, or write one of random weights where it names none."""
    if recipe.ann is None:
        found, data = card(recipe.architecture), _opened(recipe, spec)
        torch.manual_seed(recipe.seed)
        path = out / f"{recipe.name}-untrained.safetensors"
        facts = {"preprocessing": plain_value(data.normalising(found.preprocessing))}
        write_tensors(path, found.build(num_classes=len(data.classes)).state_dict(), {"record": facts})
        return str(path)
    path = out / f"{recipe.ann}.safetensors"
    if is_there(path):
        return str(path)
    if recipe.ann in model_names():
        return f"zoo:{recipe.ann}"
    raise ArgumentError(
        f"{recipe.name} starts from the ANN {recipe.ann}, which is neither in {out} nor in the zoo. Train it first, by "
        f"`lmh zoo train {recipe.ann} --data {spec} --out {out}`, or name another with --ann."
    )


def _opened(recipe: Recipe, spec: str) -> DataSet:
    preprocessing = card(recipe.architecture).preprocessing
    check_kind_of_data(spec, preprocessing)
    return load_data(spec, input_size=preprocessing.input_size, timesteps=recipe.timesteps)
