"""``lmh inspect``: what a file is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .. import zoo
from ..artifact import FORMAT, read_snn, read_tensors, user_path
from ..errors import ArtifactError, SourceError
from ..readout import READOUTS
from ..records import frozen_value
from ..zoo.registry import TORCHVISION
from .cli_inputs import source_options
from .describe import card_lines, describe_card, describe_file, file_lines
from .files import FileKind, kind_of_file


@click.command("inspect")
@click.argument("file")
@source_options
@click.option("--json", "as_json", is_flag=True, help="Print what is known as one JSON object.")
def inspect_command(file: str, as_json: bool, **options: Any) -> None:
    """Say what FILE is: a spiking network (or zoo:NAME), a model file of any kind, or an export. Nothing is run.

    torchvision:NAME, and zoo:NAME of an ANN, are described without weights.

    \b
    lmh inspect model.pt
    lmh inspect zoo:digits-cnn-t4 --json
    """  # noqa: D301
    ann = _ann(file)
    if ann is not None:
        described = describe_card(ann)
        click.echo(json.dumps(described) if as_json else "\n".join(card_lines(described)))
        return
    path = zoo.snn_path(file) if file.startswith("zoo:") else user_path(file)
    if not is_spiking(path):
        known = describe_file(path, **options)
        click.echo(json.dumps(known) if as_json else "\n".join(file_lines(known)))
        return
    tensors, manifest = read_snn(path)
    if as_json:
        click.echo(json.dumps(manifest))
        return
    recipe, source = manifest["recipe"], manifest["source"]
    count = sum(tensor.numel() for tensor in tensors.values())
    click.echo(f"{file}: {len(tensors)} tensors, {count} values, {path.stat().st_size} bytes")
    click.echo(f"source: {source['name']} ({source['architecture'] or 'a module of your own'})")
    click.echo(f"T = {recipe['timesteps']}, {recipe['encoding']['type']}, {recipe['neuron']['preset']['type']} start")
    if "readout" in recipe:  # files from before it have the mean
        readout = frozen_value(recipe["readout"], {kind.__name__: kind for kind in READOUTS})
        click.echo(f"answer: {readout.text(recipe['timesteps'])}")
    click.echo(f"calibration: {manifest['calibration']['policy']}, {manifest['calibration']['samples']} samples")
    click.echo(f"sites: {', '.join(manifest['sites'])}")
    if accuracies := _accuracies(manifest.get("metrics") or {}):
        click.echo(accuracies)
    for key in ("epochs", "seed", "data", "samples", "command", "versions"):
        if key in manifest:
            click.echo(f"{key}: {_text(manifest[key])}")


def _ann(file: str) -> str | None:
    """Return the name of an ANN that is named as ``torchvision:NAME`` or ``zoo:NAME``."""
    name = file.removeprefix("zoo:")
    named = name.startswith(TORCHVISION) or (file.startswith("zoo:") and not zoo.is_spiking(name))
    return name if named else None


def is_spiking(path: Path) -> bool:
    """Whether a file is one of ours, damaged or not."""
    try:
        return kind_of_file(path) is FileKind.SAFETENSORS and read_tensors(path)[1].get("format") == FORMAT
    except (SourceError, ArtifactError):
        return False


def _accuracies(metrics: dict[str, Any]) -> str:
    """Return what a network was measured at as a line; nothing where it was not."""
    if not metrics.get("snn_accuracy"):
        return ""
    ann = "" if metrics.get("ann_accuracy") is None else f"; its ANN {100 * metrics['ann_accuracy']:.2f}"
    steps = ", ".join(f"{100 * value:.2f}" for value in metrics["snn_accuracy"])
    return f"accuracy in % at t = 1…T, n = {metrics['samples']}: {steps}{ann}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
