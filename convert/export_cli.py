"""``lmh export``, and what ``lmh-convert --export`` shares with it: a spiking network as a file for other tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import click
from torch import fx

from ..artifact import user_path
from ..terminal import Terminal
from ..verbosity import verbosity_options
from .cli_inputs import MODULE_OPTION, TRUST_OPTION
from .export import Exact, Exported, Project, export_nir, export_onnx, export_pt2
from .pipeline import Conversion
from .storage import load

Exporter = Callable[[Conversion | fx.GraphModule, Path], Exported]

EXPORTERS: dict[str, tuple[str, Exporter]] = {
    "onnx": (".onnx", export_onnx),
    "pt2": (".pt2", export_pt2),
    "nir": (".nir", lambda network, file: export_nir(network, file, Exact())),
    "nir-project": (".nir", lambda network, file: export_nir(network, file, Project())),
}
SUFFIX, ZOO = ".safetensors", ".zoo"
FORMATS = click.Choice(list(EXPORTERS))
FORMATS_HELP = (
    "nir refuses what NIR cannot say exactly, such as a soft reset; nir-project writes the nearest neurons and lists "
    "what was lost."
)


def export_files(network: Path, formats: Sequence[str]) -> list[Path]:
    """Return the files that exports in these formats are written to: beside the network, by its name."""
    base = network.with_suffix("") if network.suffix in (SUFFIX, ZOO) else network
    return [base.with_name(base.name + EXPORTERS[name][0]) for name in formats]


def export_as(name: str, network: Conversion | fx.GraphModule, file: Path) -> Exported:
    """Write a network in one of the formats."""
    _, exporter = EXPORTERS[name]
    return exporter(network, file)


@click.command("export")
@click.argument("file")
@click.option("--to", "name", type=FORMATS, required=True, help=FORMATS_HELP)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Default: FILE with another ending.")
@click.option("--source", metavar="FILE", help="The ANN, where the saved network names none that can be built.")
@TRUST_OPTION
@MODULE_OPTION
@verbosity_options
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output and nothing else there."
)
def export_command(
    file: str,
    name: str,
    output: Path | None,
    source: str | None,
    trust_pickle: bool,
    modules: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write the spiking network FILE, or zoo:NAME, as ONNX, torch.export or NIR.

    \b
    lmh export resnet18-snn-T4.safetensors --to onnx
    lmh export zoo:digits-cnn-t4 --to nir-project --output digits.nir
    """  # noqa: D301
    base = Path(f"{file.removeprefix('zoo:')}{ZOO}") if file.startswith("zoo:") else user_path(file)
    target = output or export_files(base, [name])[0]
    if not file.startswith("zoo:") and target.exists() and target.samefile(base):
        raise click.UsageError(f"--output {target} is the network itself. Choose another file.")
    terminal = Terminal(results=not as_json)
    with terminal.stage("exporting", None):
        exported = export_as(name, load(file, source, trust_pickle=trust_pickle, modules=modules), target)
    if as_json:
        click.echo(json.dumps(exported.to_json()))
        return
    for line in exported.lines():
        terminal.out.print(line, markup=False, soft_wrap=True)
