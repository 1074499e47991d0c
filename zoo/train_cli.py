"""``lmh zoo train``: a recipe carried out to a network and its card. Any interruption is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..arena import train_in_arena
from ..artifact import is_there, make_folder, versions, write_atomically, write_tensors
from ..cli import command_line
from ..errors import ArgumentError
from ..records import plain_value
from ..terminal import Terminal
from ..verbosity import verbosity_options
from .data import ANY_DATA, check_kind_of_data, load_data
from .images import Batches, seeded_order
from .model_cards import SpikingCard, card_text, read_card_file
from .recipe import Recipe, read_recipe
from .registry import TORCHVISION, architecture
from .releases import card_of_file
from .splits import DataSet
from .starts_cli import ANOTHER, check_start, fresh, start_of, trained, untrained

if TYPE_CHECKING:
    from ..finetune.recipe import TrainingRecipe

EMBEDDED = ("digits",)
CLASSES = {"cifar10": 10, "cifar100": 100, "tinyimagenet": 200}
CHECKPOINT_MINUTES = 10.0


@click.command("train")
@click.argument("recipe")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True,
    help="Folder for weights, card and checkpoints.",
)  # fmt: skip
@click.option("--data", metavar="SPEC", help="Where the recipe's data set is. Embedded data needs none.")
@click.option(
    "--start", metavar="SOURCE",
    help="The network to start from; unless given, the one that the recipe names, in --out or the zoo.",
)  # fmt: skip
@click.option("--licence", default="Apache-2.0", show_default=True, help="Of the weights, an SPDX identifier.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to run."
)
@verbosity_options
@click.pass_context
def train_command(
    context: click.Context, recipe: str, out: Path, data: str | None, start: str | None, licence: str, device: str
) -> None:
    """Train an ANN or a spiking network by RECIPE, a name of the zoo or a TOML file, and write its card.

    A broken run goes on from its checkpoints in OUT when the same command is given again. A recipe in bfloat16 is
    carried out in float32 where the device has none; the card says in which.

    \b
    lmh zoo train digits-cnn --out runs/zoo
    lmh zoo train cifar10-resnet20 --data npz:cifar10.npz --out runs/zoo
    lmh zoo train cifar10-resnet20-qcfs4 --data npz:cifar10.npz --out runs/zoo
    lmh zoo train cifar10-resnet20-t4 --data npz:cifar10.npz --out runs/zoo
    """  # noqa: D301
    from ..convert.cli import device_of
    from ..finetune.precision import IN_FLOAT32, has_bfloat16, in_float32

    found = read_recipe(recipe)
    spec = _data_spec(found, data)
    if start is not None and found.timesteps is None and found.ann is None:
        raise click.UsageError(
            f"--start {start} came with a recipe that trains an ANN from random weights. Leave it out."
        )
    opened = _opened(found, spec)
    make_folder(out, ANOTHER)
    path = out / f"{found.name}.safetensors"
    place = path.with_suffix(".json")
    facts = {**plain_value(found), "data": spec, "start": start or found.start}
    if is_there(path) and is_there(place):
        _check_same(place, facts)
        click.echo(f"Trained already: {path}, {place}. Remove them to train again.")
        return
    terminal = Terminal()
    if not has_bfloat16(device_of(device)) and in_float32(facts) != facts:
        terminal.notice(IN_FLOAT32)
        found, facts = replace(found, training=in_float32(found.training)), in_float32(facts)
    measured, earlier = None, None
    if found.timesteps is None:
        if is_there(path) and not is_there(_checkpoint(path)):
            raise ArgumentError(
                f"{path}: is there without a card, and training would write over it; expected one of {found.name}, or "
                "none. Name another folder with --out, or remove it to train."
            )
        start = None if found.ann is None else start or start_of(found, opened, out)
        train_ann(found, opened, start, facts, path, terminal, device)
    else:
        start = start or start_of(found, opened, out)
        earlier = check_start(found, opened, start)
        if is_there(path):  # a run that ended before its card was written
            measured = _measured(found, path, spec, terminal)
        else:
            teacher = None if found.teacher is None else trained(found.teacher, found, opened, out)
            measured = train_snn(context, found, spec, start, teacher, path, device)
    made = card_of_file(found.name, path, licence=licence, measured=measured)
    made = replace(made, recipe=facts, data=found.data)
    if isinstance(made, SpikingCard) and facts["start"] is None:
        made = replace(made, ann_accuracy=None, stages={})  # of random weights
        untrained(found, out).unlink()
    elif isinstance(made, SpikingCard) and earlier is not None:
        made = replace(
            made, ann_accuracy=made.ann_accuracy or earlier.ann_accuracy, stages={**earlier.stages, **made.stages}
        )
    write_atomically(place, card_text(made).encode(), ANOTHER)
    _checkpoint(path).unlink(missing_ok=True)
    click.echo(f"Written: {path}, {place}")


def train_ann(
    recipe: Recipe,
    data: DataSet,
    start: str | None,
    facts: dict[str, Any],
    path: Path,
    terminal: Terminal,
    device: str,
) -> None:
    """Train an ANN and write its weights with their record.

    Args:
        recipe: with a plain strategy, ``STBP``.
        data: its data set.
        start: the ReLU network whose weights a QCFS network takes, and that it is distilled from; None starts from
            random weights.
        facts: of the recipe, for the record.
        path: of the file; the checkpoint is beside it until the card is written.
        terminal: for the bar.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ArgumentError: if the recipe's training is not one of an ANN.
    """
    from ..convert.cli import device_of
    from ..convert.loading import load_source
    from ..finetune import STBP, Checkpoint, fit
    from ..finetune.api import CALIBRATION_SAMPLES
    from ..finetune.hybrid import start_from_relu
    from ..finetune.trainer import accuracy

    train_in_arena(terminal)
    training = training_of(recipe)
    if training.strategy != STBP():
        raise ArgumentError(
            f"{recipe.name}: strategy is {training.strategy} and there is no timesteps; an ANN is trained by STBP. "
            'Name timesteps, or take strategy = {type = "STBP"}.'
        )
    model = fresh(recipe, data)
    chosen = seeded_order(data.train, recipe.seed)[: recipe.samples]
    source = None if start is None else load_source(start)
    teacher = None if source is None else source.model
    if source is not None and source.card is not None:
        preprocessing = source.card.preprocessing
    else:
        preprocessing = data.normalising(architecture(recipe.architecture).preprocessing)
    batches = Batches(
        data.train, preprocessing, training.batch_size, chosen, training.augmentation, shuffle_seed=recipe.seed
    )
    if teacher is not None:
        first = chosen[:CALIBRATION_SAMPLES]
        start_from_relu(model, teacher, Batches(data.train, preprocessing, len(first), first))
    model.to(device_of(device))
    with terminal.stage(f"training {recipe.name}", training.schedule.epochs * len(batches)) as advance:
        fit(
            model, batches, None, training.schedule, teacher=teacher,
            checkpoint=Checkpoint(_checkpoint(path), minutes=CHECKPOINT_MINUTES),
            on_batch=lambda epoch, _index, loss: advance(1, f"epoch {epoch + 1}, loss {loss:.3f}"),
        )  # fmt: skip
    measured = accuracy(model, Batches(data.test, preprocessing))
    record = {
        "recipe": facts,
        "data": recipe.data,
        "num_classes": len(data.classes),
        "preprocessing": plain_value(preprocessing),
        "accuracy": measured,
        "test_samples": len(data.test),
        "versions": versions(),
        "command": command_line(),
    }
    write_tensors(path, model.state_dict(), {"record": record}, ANOTHER)
    terminal.notice(f"{recipe.name}: accuracy {100 * measured:.2f} % on {len(data.test)} test samples.")


def train_snn(
    context: click.Context, recipe: Recipe, spec: str, start: str, teacher: str | None, path: Path, device: str
) -> dict[str, Any]:
    """Train a spiking network as ``lmh finetune`` does, and return its result.

    Args:
        context: of the running command.
        recipe: says T and how.
        spec: where its data set is.
        start: the ANN, or the spiking network, which keeps its neurons.
        teacher: the ANN that it is distilled from, or None for the same.
        path: of the file; a folder of that name without a suffix has recipe, log and checkpoints.
        device: ``auto``, ``cpu`` or ``cuda``.
    """
    from ..convert.normalisation import NORMALISATIONS
    from ..finetune.cli import finetune_command
    from ..finetune.recipe import write_recipe

    if recipe.time_norm not in NORMALISATIONS:
        raise ArgumentError(
            f"{recipe.name}: time_norm is {recipe.time_norm!r}; expected one of {', '.join(NORMALISATIONS)}."
        )
    folder = path.with_suffix("")
    make_folder(folder, ANOTHER)
    wanted = folder / "recipe.toml"
    write_recipe(training_of(recipe), wanted)
    converted: dict[str, Any] = {}
    if recipe.snn is None:
        arch = None if start.startswith(("zoo:", TORCHVISION)) else recipe.architecture
        converted = {"timesteps": recipe.timesteps, "time_norm": recipe.time_norm, "arch": arch}
    return context.invoke(
        finetune_command, network=start, teacher=teacher, data=spec, recipe=str(wanted), train_samples=recipe.samples,
        seed=recipe.seed, output=path, resume=folder, checkpoint_minutes=CHECKPOINT_MINUTES, device=device, **converted,
    )  # fmt: skip


def training_of(recipe: Recipe) -> TrainingRecipe:
    """Return the training of a recipe, with its seed, and the architecture's augmentation unless it names one.

    Raises:
        ArgumentError: naming a type or field that is not known, a value that its type refuses, or an idle teacher.
    """
    from ..finetune.recipe import TrainingRecipe

    training = TrainingRecipe.from_json({"type": "TrainingRecipe", **recipe.training}, recipe.name)
    if recipe.teacher is not None and training.schedule.distillation is None:
        raise ArgumentError(
            f"{recipe.name}: has the teacher {recipe.teacher} and no distillation; expected both or neither. Leave out "
            'teacher, or distillation = "none".'
        )
    if "augmentation" not in recipe.training:
        training = replace(training, augmentation=architecture(recipe.architecture).augmentation)
    return training.seeded(recipe.seed)


def _checkpoint(path: Path) -> Path:
    """Return where an ANN's training is kept until its card is written."""
    return path.with_name(f"{path.name}.training")


def _check_same(place: Path, facts: Mapping[str, Any]) -> None:
    """Refuse to train over a network of other settings; where its data lay does not count.

    Raises:
        ArgumentError: naming the settings that differ.
    """
    from ..finetune.precision import in_float32

    known = read_card_file(place).recipe
    odd = {
        key for key in {*known, *facts} - {"data"} if known.get(key) not in (facts.get(key), in_float32(facts).get(key))
    }
    if odd:
        raise ArgumentError(
            f"{place}: is there already, and its {', '.join(sorted(odd))} {'is' if len(odd) == 1 else 'are'} another; "
            "expected a network of this recipe, or none. Name another folder with --out, or remove it to train again."
        )


def _measured(recipe: Recipe, path: Path, spec: str, terminal: Terminal) -> dict[str, Any]:
    """Measure a spiking network that has no card yet.

    Raises:
        ArgumentError: if another training made it.
    """
    from ..convert.report_cli import Request, report
    from ..finetune.recipe import read_recipe as read_training

    if read_training(str(path)) != training_of(recipe):
        raise ArgumentError(
            f"{path}: is there without a card and of another training; expected one of {recipe.name}, or none. Name "
            "another folder with --out, or remove it to train."
        )
    return report(Request(str(path), spec), terminal)


def _data_spec(recipe: Recipe, given: str | None) -> str:
    """Return where the data set is; files and folders may hold any.

    Raises:
        click.UsageError: if it is missing, or another one.
    """
    if given is None and recipe.data not in EMBEDDED:
        raise click.UsageError(
            f"--data is missing: {recipe.name} is trained on {recipe.data}. Say where it is, as in --data "
            f"{recipe.data}:DIR or npz:FILE."
        )
    spec = given or recipe.data
    kind = spec.partition(":")[0]
    if kind not in (recipe.data, *ANY_DATA):
        raise click.UsageError(
            f"--data {spec} is not {recipe.data}, which {recipe.name} is trained on. Name that, or write a recipe of "
            "your own."
        )
    return spec


def _opened(recipe: Recipe, spec: str) -> DataSet:
    preprocessing = architecture(recipe.architecture).preprocessing
    check_kind_of_data(spec, preprocessing)
    data = load_data(spec, input_size=preprocessing.input_size, timesteps=recipe.timesteps)
    wanted = CLASSES.get(recipe.data, len(data.classes))
    if len(data.classes) != wanted:
        raise ArgumentError(
            f"{spec}: has {len(data.classes)} classes; expected the {wanted} of {recipe.data}, which {recipe.name} is "
            "trained on. Name that data set, or write a recipe of your own."
        )
    return data
