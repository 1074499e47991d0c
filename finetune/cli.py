"""``lmh finetune``: train a spiking network, or an ANN to one, by any strategy."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import fx, nn

from .. import zoo
from ..artifact import make_folder, user_path
from ..cli import command_line
from ..convert.cli import METRICS, check_output, default_output, device_of, measured
from ..convert.cli_inputs import DATA_HELP, SEED, Amounts, Inputs, NumbersType, open_inputs, source_options
from ..convert.inspect_cli import is_spiking
from ..convert.loading import Source, load_source
from ..convert.normalisation import NORMALISATIONS
from ..convert.pipeline import Conversion, convert, single_frames
from ..convert.report_cli import source_ann, stored_preprocessing
from ..convert.spike import EventFrames
from ..convert.storage import MANIFEST, load, save
from ..errors import ArgumentError, DataError, reason_of
from ..records import plain_value
from ..results import describe_network
from ..structures import only_tensor
from ..terminal import Terminal, print_result
from ..time_axis import MAX_TIMESTEPS, takes_events
from ..verbosity import verbosity_options
from ..zoo.data import check_kind_of_data
from .checkpoint import Checkpoint
from .cli_recipe import Wishes, recipe_options
from .cli_training import Training, files_of
from .distributed import Group, joined
from .fresh import with_statistics
from .log import JSONLines, Log, TensorBoard
from .precision import IN_FLOAT32
from .recipe import TrainingRecipe, write_recipe

_COUNT = click.IntRange(min=1)


@dataclass(frozen=True)
class Job:
    """What was asked for, apart from the recipe."""

    network: str
    timesteps: int | None
    data: str
    teacher: str | None
    source: str | None
    amounts: Amounts
    input_size: tuple[int, ...] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    device: torch.device
    arch: str | None
    entry: str | None
    trust_pickle: bool
    modules: tuple[str, ...]
    time_norm: str | None
    output: Path
    resume: Path | None
    checkpoint_steps: int | None
    checkpoint_minutes: float | None
    log: Path | None
    tensorboard: Path | None
    save_recipe: Path | None

    @property
    def checkpoint(self) -> Checkpoint:
        """Return where the training is kept until its result is written."""
        beside = self.output.with_name(f"{self.output.name}.training")
        file = beside if self.resume is None else user_path(self.resume) / "run.training"
        return Checkpoint(file, self.checkpoint_steps, self.checkpoint_minutes)

    @property
    def logs(self) -> list[Log]:
        """Return the logs that were asked for."""
        log = self.resume / "log.jsonl" if self.log is None and self.resume is not None else self.log
        logs: list[Log] = [] if log is None else [JSONLines(log)]
        return logs if self.tensorboard is None else [*logs, TensorBoard(self.tensorboard)]


@dataclass(frozen=True)
class Start:
    """What training starts from.

    Attributes:
        network: a conversion, or a spiking network.
        ann: the source, or None where it is not at hand.
        inputs: batches by purpose.
        record: of the source, for the manifest.
        calibration: where the thresholds came from.
        nodes: paths by fate.
        notices: for the user.
    """

    network: Conversion | fx.GraphModule
    ann: nn.Module | None
    inputs: Inputs
    record: dict[str, Any]
    calibration: str
    nodes: dict[str, list[str]]
    notices: tuple[str, ...]

    @property
    def snn(self) -> fx.GraphModule:
        """Return the spiking network as it is now."""
        return self.network.snn if isinstance(self.network, Conversion) else self.network


@click.command("finetune", context_settings={"max_content_width": 100})
@click.argument("network")
@click.option("--data", metavar="SPEC", help=DATA_HELP)
@click.option("--timesteps", "-T", type=click.IntRange(1, MAX_TIMESTEPS), help="Time steps T, for an ANN.")
@recipe_options
@click.option("--save-recipe", type=click.Path(dir_okay=False, path_type=Path), help="Write the recipe as TOML.")
@click.option("--time-norm", type=click.Choice(list(NORMALISATIONS)), help="Of an ANN's BatchNorm; plain unless given.")
@click.option("--teacher", metavar="SOURCE", help="In the place of the network's own ANN.")
@click.option("--source", metavar="FILE", help="The ANN of a spiking network that names none that can be built.")
@source_options
@click.option("--calibration-samples", type=_COUNT, default=512, show_default=True, help="Images for thresholds.")
@click.option("--train-samples", type=_COUNT, help="Training images; all unless given.")
@click.option("--test-samples", type=_COUNT, help="Test images to measure on; all unless given.")
@click.option("--input-size", type=NumbersType(int, "3,224,224"), metavar="C,H,W", help="Size of one input sample.")
@click.option("--mean", type=NumbersType(float, "0.5,0.5,0.5"), metavar="R,G,B", help="Mean of pixels in [0, 1].")
@click.option("--std", type=NumbersType(float, "0.2,0.2,0.2"), metavar="R,G,B", help="Deviation of pixels in [0, 1].")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to run."
)
@click.option("--seed", type=SEED, help="Of sample order and training; a recipe's own, else 0, unless given.")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Default: NETWORK-tuned.safetensors here."
)
@click.option(
    "--resume", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    help="Folder of this run: its checkpoints, recipe.toml and log.jsonl. Made where there is none; beside the output, "
    "checkpoints alone, unless given.",
)  # fmt: skip
@click.option("--checkpoint-steps", type=_COUNT, help="Write the checkpoint also after this many batches.")
@click.option("--checkpoint-minutes", type=click.FloatRange(min=0, min_open=True), help="Also after this much time.")
@click.option("--log", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="JSON lines, appended.")
@click.option("--tensorboard", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Event files.")
@verbosity_options
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output and nothing else there."
)
def finetune_command(
    network: str,
    data: str | None,
    calibration_samples: int,
    train_samples: int | None,
    test_samples: int | None,
    device: str,
    seed: int | None,
    timesteps: int | None,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> dict[str, Any]:
    """Fine-tune NETWORK: a spiking network from lmh-convert, or an ANN, which is converted first.

    A run that is cut goes on when the same command is given again. Several processes share the work under torchrun:
    torchrun --nproc-per-node 2 -m lmh finetune … --batch-size 128 has 64 images on each.

    \b
    lmh finetune digits-cnn-snn-T4.safetensors --data digits --epochs 5
    lmh finetune zoo:digits-cnn -T 4 --data digits --epochs 10 --strategy hybrid
    lmh finetune model.pt -T 6 --data folder:photos --strategy time-sliced --slice 2 --loss tet
    """  # noqa: D301
    if data is None:
        raise click.UsageError("--data is missing: training runs on its training split. Give a data set.")
    wishes = Wishes.of(options)
    seed = wishes.seed if seed is None else seed
    spiking = _spikes(network)
    if spiking and timesteps is not None:
        raise click.UsageError(f"-T {timesteps} came with a spiking network, whose own T stays. Leave it out.")
    if not spiking and timesteps is None:
        raise click.UsageError("-T is missing: an ANN needs the number of time steps, as in -T 4.")
    if spiking and options["time_norm"] is not None:
        raise click.UsageError("--time-norm is for an ANN; the network spikes already. Leave it out.")
    job = Job(
        network=network,
        data=data,
        timesteps=timesteps,
        amounts=Amounts(calibration_samples, train_samples, test_samples, seed),
        device=device_of(device),
        output=output or _default_output(network, timesteps),
        **options,
    )
    with joined(job.device) as own:
        leads = Group.current().leads
        terminal = Terminal(results=leads and not as_json)
        terminal.log.quiet = not leads
        result = run_job(replace(job, device=own), wishes, terminal)
    if leads and as_json:
        click.echo(json.dumps(result))
    elif leads:
        print_result(terminal.out, result)
    return result


def _spikes(network: str) -> bool:
    if network.startswith("zoo:"):
        return zoo.is_spiking(network)
    return is_spiking(user_path(network))


def _default_output(network: str, timesteps: int | None) -> Path:
    if timesteps is None:
        return Path(
            f"{network.removeprefix('zoo:') if network.startswith('zoo:') else Path(network).stem}-tuned.safetensors"
        )
    return default_output(network, timesteps)


def run_job(job: Job, wishes: Wishes, terminal: Terminal) -> dict[str, Any]:
    """Load, convert where needed, measure, train, measure, save. Return the result as plain values."""
    begun = any(file.exists() for file in files_of(job.checkpoint))
    if job.resume is not None:
        make_folder(user_path(job.resume), "Name another with --resume.")
        if not begun:
            terminal.notice(f"{job.resume}: there is no checkpoint yet; the run starts anew.")
    check_output(job.output, job.network, job.data)
    torch.manual_seed(job.amounts.seed)
    spiking = job.timesteps is None
    start, recipe = _from_snn(job, wishes, terminal) if spiking else _from_ann(job, wishes, terminal)
    if wishes.recipe is not None and recipe != (able := recipe.on(job.device)):
        start, recipe = replace(start, notices=(*start.notices, IN_FLOAT32)), able
    for notice in start.notices:
        terminal.notice(notice)
    if Group.current().leads:
        own = None if job.resume is None or begun else user_path(job.resume) / "recipe.toml"
        for file in (job.save_recipe, own):
            if file is not None:
                write_recipe(recipe, file)
    teacher = _teacher(job, start, recipe)
    training = Training(start.network, recipe, start.inputs, teacher, job.checkpoint, job.logs)
    before = measured(start.snn, start.inputs.test, start.ann, terminal, "measuring")
    tuned = training.run(terminal)
    stages = training.stages(tuned, terminal)
    assert isinstance(tuned.snn, fx.GraphModule)
    after = measured(tuned.snn, start.inputs.test, start.ann, terminal, "measuring again")
    if spiking and before is not None:
        stages = [("as loaded", replace(before, ann_accuracy=None)), *stages]
    result = describe_network(
        tuned.snn,
        source=job.network,
        calibration=start.calibration if tuned.conversion is None else tuned.conversion.report.calibration,
        nodes=start.nodes,
        evaluation=after,
        training_free=None if spiking else before,
        stages=stages,
        output=str(job.output),
        notices=start.notices,
        spiking_coverage=tuned.conversion.report.spiking_coverage if tuned.conversion else None,
    )
    if Group.current().leads:
        _save(job, start, training, tuned, result)
    return result


def _save(job: Job, start: Start, training: Training, tuned: Any, result: dict[str, Any]) -> None:
    inputs = start.inputs
    save(
        tuned.conversion or tuned.snn,
        job.output,
        source=start.record,
        metrics={key: result[key] for key in METRICS},
        seed=job.amounts.seed,
        command=command_line(),
        data=job.data,
        samples=f"{inputs.order}; {inputs.training}",
        nodes=result["nodes"],
        preprocessing={**plain_value(inputs.preprocessing), "assumed": list(inputs.assumed)},
        teacher=job.teacher or (None if training.teacher is None else start.record["name"]),
        **training.facts(tuned),
    )
    training.forget()


def _teacher(job: Job, start: Start, recipe: TrainingRecipe) -> nn.Module | None:
    if all(schedule.distillation is None for schedule in recipe.schedules):
        if job.teacher is not None:
            raise click.UsageError(f"--teacher {job.teacher} came with a recipe without distillation. Leave one out.")
        return None
    if job.teacher is None:
        features = any(schedule.distils_features for schedule in recipe.schedules)
        return start.network.prepared.model if features and isinstance(start.network, Conversion) else start.ann
    found = load_source(job.teacher, trust_pickle=job.trust_pickle, modules=job.modules)
    _check_teacher(job.teacher, found.model.eval(), start)
    return found.model.to(job.device)


def _check_teacher(name: str, teacher: nn.Module, start: Start) -> None:
    """Refuse a teacher of other inputs or outputs before anything is measured."""
    assert start.inputs.train is not None
    x = next(iter(replace(start.inputs.train, batch_size=2)))[0]
    if takes_events(start.snn):
        x = x.flatten(0, 1)
    wanted = start.record["num_classes"]
    try:
        with torch.no_grad():
            outputs = only_tensor(teacher(x), "finetune").shape[-1]
    except (RuntimeError, ValueError, TypeError) as error:
        raise click.UsageError(
            f"--teacher {name} cannot take what the network takes, {list(x.shape[1:])} ({reason_of(error)}). Name one "
            "for the same data."
        ) from error
    if wanted is not None and outputs != wanted:
        raise click.UsageError(
            f"--teacher {name} has {outputs} outputs and the network {wanted}. Name one for the same data."
        )


def _from_ann(job: Job, wishes: Wishes, terminal: Terminal) -> tuple[Start, TrainingRecipe]:
    """Convert the ANN to the neurons that the strategy starts from."""
    assert job.timesteps is not None
    source = load_source(
        job.network, arch=job.arch, entry=job.entry, trust_pickle=job.trust_pickle, modules=job.modules
    )
    source.model.to(job.device)
    inputs = _inputs(job, source, job.timesteps)
    assert inputs.train is not None
    assert inputs.calibration is not None
    recipe = wishes.recipe_for(spiking=False, batches=inputs.train, seed=job.amounts.seed)
    recipe.strategy.slice_steps(job.timesteps)
    samples = list(terminal.track(inputs.calibration, "calibrating", inputs.calibration.count))
    frames = isinstance(inputs.encoding, EventFrames)
    ann = with_statistics(source.model, list(single_frames("finetune: train", samples, 1)) if frames else samples)
    norm = NORMALISATIONS[job.time_norm or "plain"]
    conversion = convert(
        ann,
        job.timesteps,
        data=samples,
        neuron=recipe.strategy.neuron,
        encoding=inputs.encoding,
        normalisation=norm,
    )
    report = conversion.report
    notices = (*source.notices, *inputs.notices, *report.notices)
    start = Start(conversion, source.model, inputs, source.record(), report.calibration, report.nodes(), notices)
    return start, recipe


def _from_snn(job: Job, wishes: Wishes, terminal: Terminal) -> tuple[Start, TrainingRecipe]:
    """Load the spiking network, and its ANN where it is at hand."""
    snn = load(job.network, job.source, trust_pickle=job.trust_pickle, modules=job.modules).to(job.device)
    manifest = snn.meta[MANIFEST]
    record = manifest["source"]
    given = {name: getattr(job, name) for name in ("input_size", "mean", "std")}
    preprocessing, assumed = stored_preprocessing(manifest, given)
    named = record["architecture"]
    card = None if named is None else replace(zoo.card(named), preprocessing=preprocessing)
    source = Source(snn, job.network, card, record["num_classes"], record["sha256"])
    check_kind_of_data(job.data, preprocessing)
    known = replace(job, **vars(preprocessing))
    timesteps = manifest["recipe"]["timesteps"]
    inputs = replace(_inputs(known, source, timesteps), assumed=tuple(assumed))
    assert inputs.train is not None
    recipe = wishes.recipe_for(spiking=True, batches=inputs.train, seed=job.amounts.seed)
    recipe.strategy.slice_steps(timesteps)
    ann, notices = source_ann(record, job.source, job.trust_pickle, job.modules)
    found = manifest["calibration"]
    nodes = manifest.get("nodes", {"converted": manifest["sites"], "kept": [], "refused": []})
    calibration = f"{found['policy']}, {found['samples']} samples"
    if ann is not None:
        ann.to(job.device)
    elif job.teacher is None and recipe.schedule.distillation is not None:
        notices = [*notices, "There is no teacher: training learns from the labels alone."]
    return Start(snn, ann, inputs, record, calibration, nodes, (*inputs.notices, *notices)), recipe


def _inputs(job: Job, source: Source, timesteps: int) -> Inputs:
    try:
        inputs = open_inputs(
            source, job.data, timesteps, job.amounts, input_size=job.input_size, mean=job.mean, std=job.std
        )
    except ArgumentError as error:
        raise click.UsageError(str(error)) from error
    if inputs.train is None or getattr(inputs.train.split, "labels", None) is None:
        raise DataError(f"{job.data}: no labelled training samples; expected some to fine-tune on.")
    return inputs if Group.current().leads else replace(inputs, test=None)  # one process measures
