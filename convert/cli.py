"""The command ``lmh-convert``: from a model file to a spiking network, measured and written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from torch import fx, nn

from .. import __version__
from ..artifact import check_writable, is_there, user_path
from ..calibrate import Policy
from ..cli import command_line, run
from ..errors import ArgumentError, DataError, LMHError
from ..evaluation import Outputs, evaluate
from ..readout import Average
from ..records import Evaluation, plain_value
from ..results import describe_network
from ..terminal import Terminal, print_fates, print_result
from ..time_axis import MAX_TIMESTEPS
from ..verbosity import verbosity_options
from ..zoo.images import Batches
from .calibration_cli import calibration_options, diagnosed
from .cli_inputs import DATA_HELP, SEED, Amounts, Inputs, NumbersType, ReadoutType, open_inputs, source_options
from .export_cli import FORMATS, FORMATS_HELP, export_as, export_files
from .label_free_cli import Images, LabelFreeWork
from .loading import Source, load_source
from .maxpool import MAXPOOLS, MaxPool
from .normalisation import NORMALISATIONS, Normalisation
from .page_cli import PAGE_HELP, Page, PageType, page_of, watch_of
from .pipeline import Conversion, convert
from .prepare import examine
from .rules import ReluSurgery
from .storage import save

if TYPE_CHECKING:
    from ..finetune.cli_training import Training

_POSITIVE = click.IntRange(min=1)
METRICS = ("samples", "ann_accuracy", "snn_accuracy", "agreement", "output_error", "training_free", "stages")
"""What a manifest keeps of a command's result."""


@dataclass(frozen=True)
class Job:
    """What was asked for on the command line."""

    source: str
    timesteps: int
    data: str | None
    arch: str | None
    calibration: Policy | None
    without_labels: LabelFreeWork
    diagnose: bool
    amounts: Amounts
    input_size: tuple[int, ...] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    epochs: int
    device: torch.device
    entry: str | None
    trust_pickle: bool
    modules: tuple[str, ...]
    output: Path
    keep: tuple[str, ...]
    surgery: ReluSurgery | None
    maxpool: MaxPool | None
    normalisation: Normalisation
    readout: Average
    exports: tuple[str, ...]
    report: Path | None


@click.command("lmh-convert", context_settings={"max_content_width": 100})
@click.version_option(__version__, prog_name="lmh-convert")
@click.argument("source")
@click.option("--timesteps", "-T", type=click.IntRange(1, MAX_TIMESTEPS), required=True, help="Time steps T.")
@click.option("--data", metavar="SPEC", help=DATA_HELP)
@source_options
@calibration_options
@click.option("--train-samples", type=_POSITIVE, help="Training images to fine-tune on; all unless given.")
@click.option("--test-samples", type=_POSITIVE, help="Test images to measure on; all unless given.")
@click.option("--input-size", type=NumbersType(int, "3,224,224"), metavar="C,H,W", help="Size of one input sample.")
@click.option("--mean", type=NumbersType(float, "0.5,0.5,0.5"), metavar="R,G,B", help="Mean of pixels in [0, 1].")
@click.option("--std", type=NumbersType(float, "0.2,0.2,0.2"), metavar="R,G,B", help="Deviation of pixels in [0, 1].")
@click.option(
    "--finetune",
    "epochs",
    type=click.IntRange(0, 30),
    default=0,
    metavar="EPOCHS",
    help="Train with labels, at most 30 epochs; from 3 on a third of them in a QCFS stage of the ANN.",
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to run."
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of sample order and training.")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Default: SOURCE-snn-T4.safetensors here."
)
@click.option("--keep", multiple=True, metavar="PATH", help="Leave this node analog; may be given several times.")
@click.option(
    "--surgery",
    type=click.Choice(["relu"]),
    help="Let neurons stand in for SiLU, GELU and the like, and keep gates and normalisations analog.",
)
@click.option(
    "--maxpool", type=click.Choice(["auto", *MAXPOOLS]), default="auto", show_default=True,
    help="before: the maximum of the currents, in front of the neurons; gated: behind them, what passes adds up to the "
    "maximum of the rates, at every T; average: an average pool instead, another function, to be fine-tuned; auto: "
    "before where currents are constant, else gated.",
)  # fmt: skip
@click.option(
    "--time-norm", "normalisation", type=click.Choice(list(NORMALISATIONS)), default="plain", show_default=True,
    help="What becomes of BatchNorm behind neurons, to be fine-tuned.",
)  # fmt: skip
@click.option(
    "--readout", type=ReadoutType(), default="mean", show_default=True,
    metavar="mean|delayed:STEPS|weighted:W1,W2,…",
    help="How the outputs of T steps become one answer. delayed: the first STEPS are run and not read; T counts them.",
)  # fmt: skip
@click.option(
    "--export", "exports", type=FORMATS, multiple=True, help=f"Also write this format; may be repeated. {FORMATS_HELP}"
)
@click.option("--report", type=PageType(), metavar="FILE.html", help=PAGE_HELP)
@click.option("--dry-run", is_flag=True, help="Only say what would become of every node; convert nothing.")
@verbosity_options
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output and nothing else there."
)
def convert_command(
    source: str,
    timesteps: int,
    calibration_samples: int,
    train_samples: int | None,
    test_samples: int | None,
    device: str,
    seed: int,
    output: Path | None,
    as_json: bool,
    surgery: str | None,
    maxpool: str,
    normalisation: str,
    dry_run: bool,
    **options: Any,
) -> int:
    """Convert SOURCE to a spiking network of LM-H neurons.

    SOURCE is zoo:NAME, torchvision:NAME, or a file: a state_dict (.pt, .safetensors), a trainer's checkpoint, a pickled
    module, ONNX, torch.export, or TorchScript with the weights of a known architecture.

    \b
    lmh-convert zoo:digits-cnn --timesteps 4 --data digits --finetune 3
    lmh-convert model.pt --timesteps 4
    lmh-convert resnet.pth --arch torchvision:resnet18 --timesteps 8 --data folder:photos
    """  # noqa: D301
    job = Job(
        source=source,
        timesteps=timesteps,
        without_labels=LabelFreeWork.of(options, seed),
        amounts=Amounts(calibration_samples, train_samples, test_samples, seed),
        device=device_of(device),
        output=output or default_output(source, timesteps),
        surgery=ReluSurgery() if surgery == "relu" else None,
        maxpool=MAXPOOLS.get(maxpool),
        normalisation=NORMALISATIONS[normalisation],
        **options,
    )
    if job.data is None:
        for option, wanted in {
            **job.without_labels.needing_data,
            "--diagnose": job.diagnose,
            "--finetune": job.epochs,
        }.items():
            if wanted:
                raise click.UsageError(f"{option} needs --data: it works on images of the training split.")
    try:
        job.readout.check(timesteps)
    except ArgumentError as error:
        raise click.BadParameter(str(error), param_hint="--readout") from error
    terminal = Terminal(results=not as_json)
    result = audit_job(job, terminal) if dry_run else run_job(job, terminal)
    if as_json:
        click.echo(json.dumps(result))
    elif dry_run:
        print_fates(terminal.out, result)
    else:
        print_result(terminal.out, result)
    return 1 if result.get("problems") or result.get("failed_exports") else 0


def default_output(source: str, timesteps: int) -> Path:
    """Return SOURCE-snn-T4.safetensors in the current folder."""
    name = source.rpartition(":")[2] if source.startswith(("zoo:", "torchvision:")) else Path(source).stem
    return Path(f"{name}-snn-T{timesteps}.safetensors")


def device_of(name: str) -> torch.device:
    """Return the device that ``--device`` names."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise click.UsageError(
            "--device cuda: this torch sees no CUDA device. Use --device cpu, or install a CUDA build."
        )
    return torch.device("cuda" if name != "cpu" and available else "cpu")


def run_job(job: Job, terminal: Terminal) -> dict[str, Any]:
    """Load, convert, measure, fine-tune, save. Return the result as plain values."""
    check_output(job.output, job.source, job.data, job.exports)
    torch.manual_seed(job.amounts.seed)
    source, inputs = _open(job, terminal)
    source.model.to(job.device)
    conversion = _convert(job, source, inputs, terminal)
    if inputs.calibration is not None and inputs.train is not None:
        images = Images.of(inputs.calibration, inputs.train, job.timesteps)
        conversion = job.without_labels.run(conversion, images, terminal)
    for notice in conversion.report.notices:
        terminal.notice(notice)
    page = None if job.epochs else page_of(job.report, conversion)
    before = measured(conversion.snn, inputs.test, source.model, terminal, "measuring", watch_of(page))
    after, stages = None, []
    facts: dict[str, Any] = {"epochs": 0}
    training = _training(job, conversion, source, inputs) if job.epochs else None
    if training is not None:
        tuned = training.run(terminal)
        stages = training.stages(tuned, terminal)
        conversion, facts = tuned.conversion or conversion, training.facts(tuned)
        page = page_of(job.report, conversion)
        after = measured(conversion.snn, inputs.test, source.model, terminal, "measuring again", watch_of(page))
    result = describe_network(
        conversion.snn,
        source=job.source,
        calibration=conversion.report.calibration,
        nodes=conversion.report.nodes(),
        evaluation=after or before,
        training_free=before if after else None,
        stages=stages,
        diagnosis=_diagnosis(job, conversion, inputs, terminal, page),
        output=str(job.output),
        notices=(*inputs.notices, *conversion.report.notices),
        spiking_coverage=conversion.report.spiking_coverage,
    )
    save(
        conversion,
        job.output,
        source=source.record(),
        metrics={key: result[key] for key in METRICS},
        seed=job.amounts.seed,
        command=command_line(),
        data=job.data,
        samples=f"{inputs.order}; {inputs.training}" if job.epochs else inputs.order,
        nodes=result["nodes"],
        preprocessing={**plain_value(inputs.preprocessing), "assumed": list(inputs.assumed)},
        **facts,
    )
    if training is not None:
        training.forget()
    for name, file in zip(job.exports, export_files(job.output, job.exports), strict=True):
        try:
            with terminal.stage(f"exporting to {name}", None):
                result["exports"].append(export_as(name, conversion, file).to_json())
        except LMHError as error:  # the network is saved, and other formats may do
            result["failed_exports"][name] = str(error)
    if page is not None:
        page.write(
            result, classes=inputs.classes, history=facts.get("history", ()), data=job.data, seed=job.amounts.seed,
            samples=inputs.order, training=facts.get("training"),
        )  # fmt: skip
    return result


def _diagnosis(
    job: Job, conversion: Conversion, inputs: Inputs, terminal: Terminal, page: Page | None
) -> dict[str, Any] | None:
    """Return the errors of all sites: on calibration samples if that was asked for, else what a page shows."""
    if job.diagnose and inputs.calibration is not None:
        return diagnosed(conversion, inputs.calibration, terminal)
    return None if page is None else page.watch.diagnosis()


def audit_job(job: Job, terminal: Terminal) -> dict[str, Any]:
    """Say what would become of every node, whether it can be converted or not."""
    source, inputs = _open(job, terminal)
    fates, problems = examine(
        source.model, inputs.preprocessing.input_size, keep=job.keep, surgery=job.surgery, maxpool=job.maxpool
    )
    nodes = {fate: [node.path for node in fates if node.fate == fate] for fate in ("converted", "kept", "refused")}
    found = {"source": job.source, "fates": plain_value(fates), "nodes": nodes, "problems": problems}
    return {**found, "notices": list(inputs.notices)}


def _open(job: Job, terminal: Terminal) -> tuple[Source, Inputs]:
    """Load the source, open its data and say what was assumed."""
    source = _load(job)
    try:
        inputs = open_inputs(
            source, job.data, job.timesteps, job.amounts, input_size=job.input_size, mean=job.mean, std=job.std
        )
    except ArgumentError as error:
        raise click.UsageError(str(error)) from error
    inputs = replace(inputs, notices=(*source.notices, *inputs.notices))
    for notice in inputs.notices:
        terminal.notice(notice)
    return source, inputs


def check_output(output: Path, source: str, data: str | None, exports: Sequence[str] = ()) -> None:
    """Find out before the work whether the result can be written."""
    inputs = {"the source": user_path(source), "the data": user_path((data or "").partition(":")[2])}
    files = (output, *export_files(output, exports))
    doubled = [str(file) for file in files if files.count(file) > 1]
    if doubled:
        raise click.UsageError(f"{doubled[0]} would be written twice. Name another --output, or leave out an --export.")
    for file in files:
        for what, path in inputs.items():
            if is_there(path) and is_there(file) and file.samefile(path):
                raise click.UsageError(
                    f"{file} is {what}, which is never overwritten. Choose another file with --output."
                )
    check_writable(output, "Choose another --output.")


def _load(job: Job) -> Source:
    try:
        return load_source(
            job.source, arch=job.arch, entry=job.entry, trust_pickle=job.trust_pickle, modules=job.modules
        )
    except ArgumentError as error:
        if job.arch is None:
            raise
        raise click.BadParameter(str(error), param_hint="--arch") from error


def _convert(job: Job, source: Source, inputs: Inputs, terminal: Terminal) -> Conversion:
    data = None
    if inputs.calibration is not None and (job.calibration is None or job.calibration.needs_data):
        data = terminal.track(inputs.calibration, "calibrating", inputs.calibration.count)
    return convert(
        source.model,
        job.timesteps,
        data=data,
        calibration=job.calibration,
        example_input=inputs.example,
        encoding=inputs.encoding,
        keep=job.keep,
        surgery=job.surgery,
        maxpool=job.maxpool,
        normalisation=job.normalisation,
        readout=job.readout,
    )


def measured(
    snn: fx.GraphModule,
    test: Batches | None,
    ann: nn.Module | None,
    terminal: Terminal,
    name: str,
    on_outputs: Callable[[Outputs], None] | None = None,
) -> Evaluation | None:
    """Measure a network on the test batches, with a bar; None without any."""
    if test is None:
        return None
    with terminal.stage(name, test.count) as advance:
        done = 0

        def on_batch(samples: int) -> None:
            nonlocal done
            advance(samples - done, f"{samples} samples")
            done = samples

        return evaluate(snn, test, ann=ann, on_batch=on_batch, on_outputs=on_outputs)


def _training(job: Job, conversion: Conversion, source: Source, inputs: Inputs) -> Training:
    """Return the training that ``--finetune`` asks for, with the recipe that ``lmh finetune`` has by default."""
    from ..finetune import Checkpoint
    from ..finetune.cli_recipe import Wishes
    from ..finetune.cli_training import Training

    if inputs.train is None or getattr(inputs.train.split, "labels", None) is None:
        raise DataError(f"{job.data}: no labelled training samples; expected some for --finetune.")
    work = job.without_labels  # what was named there would be lost in a QCFS stage, which starts from the ANN
    named = job.calibration is not None or work.corrections or work.reconstruct
    wishes = Wishes(epochs=job.epochs, strategy="stbp" if named else None)
    recipe = wishes.recipe_for(spiking=False, batches=inputs.train, seed=job.amounts.seed)
    checkpoint = Checkpoint(job.output.with_name(f"{job.output.name}.training"))
    return Training(conversion, recipe, inputs, source.model, checkpoint)


def main() -> None:
    """Entry point of ``lmh-convert``."""
    sys.exit(run(convert_command))
