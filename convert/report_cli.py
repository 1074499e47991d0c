"""``lmh report``: a saved network measured on data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from torch import fx

from .. import zoo
from ..arguments import split_batch
from ..errors import ArgumentError, LMHError
from ..evaluation import evaluate
from ..results import describe_network
from ..streaming import exit_curve
from ..structures import each_shape
from ..terminal import Terminal, print_result
from ..verbosity import verbosity_options
from ..zoo.data import check_kind_of_data
from ..zoo.images import AnyPreprocessing, Batches, FramePreprocessing, Preprocessing
from .cli_inputs import (
    DATA_HELP,
    MODULE_OPTION,
    SEED,
    TRUST_OPTION,
    NumbersType,
    assumption_notices,
    evaluation_batch,
    refuse_normalisation,
)
from .deploy import deploy, spike_changes
from .loading import load_again
from .page_cli import PAGE_HELP, PageType, page_of, watch_of
from .spike import EventFrames
from .storage import load_conversion, saved_manifest

FORMS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "int8": {"int8": True},
    "int8-bf16": {"int8": True, "dtype": torch.bfloat16},
}
"""What --deploy asks deploy for."""


@click.command("report")
@click.argument("file")
@click.option("--data", metavar="SPEC", help=DATA_HELP)
@click.option("--html", "page", type=PageType(), metavar="FILE.html", help=PAGE_HELP)
@click.option("--deploy", "form", type=click.Choice(list(FORMS)), help="Measure the copy for inference (deploy).")
@click.option(
    "--early-exit",
    "confidence",
    type=click.FloatRange(0, 1),
    metavar="P",
    help="Say also what samples give that leave once their softmax reaches P, and after how many steps.",
)
@click.option("--source", metavar="FILE", help="The ANN, where the saved network names none that can be built.")
@click.option("--test-samples", type=click.IntRange(min=1), help="Test images to measure on; all unless given.")
@click.option("--input-size", type=NumbersType(int, "3,224,224"), metavar="C,H,W", help="In place of the file's.")
@click.option("--mean", type=NumbersType(float, "0.5,0.5,0.5"), metavar="R,G,B", help="In place of the file's.")
@click.option("--std", type=NumbersType(float, "0.2,0.2,0.2"), metavar="R,G,B", help="In place of the file's.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the sample order.")
@TRUST_OPTION
@MODULE_OPTION
@verbosity_options
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output and nothing else there."
)
def report_command(as_json: bool, **options: Any) -> None:
    """Load the spiking network FILE, or zoo:NAME, and measure it on the test split of --data.

    \b
    lmh report digits-cnn-snn-T4.safetensors --data digits --html digits.html
    lmh report zoo:digits-cnn-t4 --data digits --deploy int8 --early-exit 0.9
    """  # noqa: D301
    names = ("input_size", "mean", "std")
    request = Request(overrides={name: options.pop(name) for name in names}, **options)
    if request.data is None:
        for option, wanted in {"--deploy": request.form, "--early-exit": request.confidence}.items():
            if wanted is not None:
                raise click.UsageError(f"{option} needs --data: it is measured on the test split.")
    terminal = Terminal(results=not as_json)
    result = report(request, terminal)
    if as_json:
        click.echo(json.dumps(result))
    else:
        print_result(terminal.out, result)


@dataclass(frozen=True)
class Request:
    """What a report is asked of; the fields are the command's options."""

    file: str
    data: str | None = None
    source: str | None = None
    test_samples: int | None = None
    seed: int = 0
    trust_pickle: bool = False
    modules: tuple[str, ...] = ()
    overrides: Mapping[str, tuple[Any, ...] | None] = field(default_factory=dict)
    form: str | None = None
    confidence: float | None = None
    page: Path | None = None

    def samples(self, manifest: Mapping[str, Any]) -> tuple[Batches | None, tuple[str, ...], list[str]]:
        """Open the test split: its batches, the names of its classes, and what the user should know."""
        if self.data is None:
            return None, (), []
        preprocessing, assumed = stored_preprocessing(manifest, self.overrides)
        check_kind_of_data(self.data, preprocessing)
        timesteps = manifest["recipe"]["timesteps"]
        data = zoo.load_data(self.data, input_size=preprocessing.input_size, timesteps=timesteps)
        order = zoo.seeded_order(data.test, self.seed)[: self.test_samples]
        notices = [*assumption_notices(preprocessing, assumed)]
        notices.append(f"Samples: test {len(order)} of {len(data.test)} in the order of seed {self.seed}.")
        batches = Batches(data.test, preprocessing, evaluation_batch(preprocessing, timesteps), order)
        return batches, data.classes, notices


def report(request: Request, terminal: Terminal) -> dict[str, Any]:
    """Measure a saved network, or with a ``form`` its copy for inference, and return the command's result."""
    manifest = saved_manifest(request.file)
    ann, notices = source_ann(manifest["source"], request.source, request.trust_pickle, request.modules)
    source = request.source if ann is None else ann
    conversion = load_conversion(request.file, source, trust_pickle=request.trust_pickle, modules=request.modules)
    batches, classes, known = request.samples(manifest)
    page = page_of(request.page, conversion)
    notices = [*conversion.report.notices, *notices, *known]
    snn, changes, leaving, evaluation = conversion.snn, None, None, None
    if batches is not None:
        if request.form is not None:
            snn, changes, said = deployed(snn, request.form, batches)
            notices.append(said)
        if request.confidence is not None:
            (leaving,) = exit_curve(snn, terminal.track(batches, "leaving early", batches.count), [request.confidence])
            after = f"{leaving.steps:.2f} of {manifest['recipe']['timesteps']} steps"
            notices.append(f"Early exit at {request.confidence:g}: {100 * leaving.accuracy:.2f} % after {after}.")
    for notice in notices:
        terminal.notice(notice)
    if batches is not None:
        shown = terminal.track(batches, "measuring", batches.count)
        evaluation = evaluate(snn, shown, ann=ann, on_outputs=watch_of(page))
    result = describe_network(
        snn,
        source=request.file,
        calibration=f"{manifest['calibration']['policy']}, {manifest['calibration']['samples']} samples",
        nodes=manifest.get("nodes", {"converted": manifest["sites"], "kept": [], "refused": []}),
        evaluation=evaluation,
        diagnosis=None if page is None else page.watch.diagnosis(),
        notices=notices,
        spiking_coverage=conversion.report.spiking_coverage,
    )
    early = None if leaving is None else asdict(leaving)
    result |= {"deployed": request.form, "spike_changes": changes, "early_exit": early}
    if page is not None:
        page.write(
            result, classes=classes, history=manifest.get("history", ()), made_by=manifest.get("command"),
            data=request.data, seed=request.seed, training=manifest.get("training"),
        )  # fmt: skip
    return result


def deployed(snn: fx.GraphModule, form: str, batches: Batches) -> tuple[fx.GraphModule, dict[str, float], str]:
    """Return the copy for inference, how many spikes it changes in the first batch, and that in words."""
    fast = deploy(snn, **FORMS[form])
    inputs, _ = split_batch("report: data", next(iter(batches)), 1)
    changes = spike_changes(snn, fast, *inputs)
    share = 100 * sum(changes.values()) / len(changes)
    said = (
        f"Measured: the copy for inference, in {form}; in the first {batches.batch_size} samples spikes differ at "
        f"{share:.2f} % of neurons and steps, on average over sites. The energy is that of 32 bits."
    )
    return fast, changes, said


def stored_preprocessing(
    manifest: Mapping[str, Any], overrides: Mapping[str, tuple[Any, ...] | None]
) -> tuple[AnyPreprocessing, list[str]]:
    """Return what turns images into input, and which of its fields nobody ever named.

    The command line comes first, then the file, then the architecture's card; a network that was saved by the
    API has the input size of its recipe.
    """
    architecture = manifest["source"]["architecture"]
    shapes = each_shape(manifest["recipe"]["sample_shape"])
    if len(shapes) > 1:
        raise click.UsageError(
            f"the network takes {len(shapes)} inputs; expected one of images, as --data has nothing else. "
            "Measure it in Python: lmh.evaluate(lmh.convert.load(file), batches)."
        )
    known: dict[str, Any] = {"input_size": shapes[0]}
    if architecture is not None:
        known |= vars(zoo.card(architecture).preprocessing)
    stored = manifest.get("preprocessing") or {}
    known |= {name: tuple(stored[name]) for name in ("input_size", "mean", "std") if name in stored}
    given = {name: value for name, value in overrides.items() if value is not None}
    assumed = [name for name in stored.get("assumed", []) if name not in given]
    if manifest["recipe"]["encoding"]["type"] == EventFrames.__name__:
        try:
            refuse_normalisation(given.get("mean"), given.get("std"))
        except ArgumentError as error:
            raise click.UsageError(str(error)) from error
        return FramePreprocessing({**known, **given}["input_size"]), assumed
    missing = [f"--{name}" for name in ("mean", "std") if name not in {**known, **given}]
    if missing:
        raise click.UsageError(
            f"the file does not say how its input is normalised; expected {' and '.join(missing)} on the command line."
        )
    try:
        preprocessing = Preprocessing(**{**known, **given})
    except ArgumentError as error:
        raise click.UsageError(str(error)) from error
    return preprocessing, assumed


def source_ann(
    record: dict[str, Any], source: str | None, trust_pickle: bool, modules: tuple[str, ...]
) -> tuple[Any, list[str]]:
    """Return the ANN to compare with, if it is at hand and still the one that was converted."""
    name = source or record["name"]
    if name is None:
        return None, []
    try:
        found = load_again(name, record, trust_pickle=trust_pickle, modules=modules)
    except LMHError as error:
        return None, [f"The source ANN is not at hand, so it is not measured: {error}"]
    if found.digest is not None and record["sha256"] not in (None, found.digest):
        return None, [f"{name} has changed since the conversion, so the ANN is not measured."]
    return found.model, []
