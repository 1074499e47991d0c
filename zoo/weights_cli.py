"""``lmh zoo download``, ``verify``, ``export-card``, ``add`` and ``publish``: weights and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from ..artifact import FORMAT, file_digest, is_there, read_tensors, user_path, write_atomically
from ..errors import ArgumentError, ArtifactError
from ..terminal import Terminal
from ..verbosity import verbosity_options
from .cache import SUFFIX, is_whole, resting_place
from .half_cli import in_half, measured_snn
from .locations import parsed_location
from .model_cards import ModelCard, card_json, card_markdown
from .models import download, model_card, packaged, readable_cards
from .origins_cli import with_named_origins
from .releases import add, card_beside, card_of_file, publish

JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.command("download")
@click.argument("names", nargs=-1, metavar="NAME…")
@click.option("--all", "every", is_flag=True, help="All models of the zoo.")
@JSON
@verbosity_options
def download_command(names: tuple[str, ...], every: bool, as_json: bool) -> None:
    """Download the weights of models, or of torchvision:NAME, unless they are there, and print where they are."""
    if bool(names) == every:
        raise click.UsageError("expected names of models, or --all.")
    terminal = Terminal(results=not as_json)
    found = []
    for name in [card.name for card in _readable()] if every else names:
        file = download(name.removeprefix("zoo:"), terminal)
        found.append({"name": name, "file": str(file), "sha256": file_digest(file), "size": file.stat().st_size})
    _print({"models": found}, [f"{entry['name']}: {entry['file']}" for entry in found], as_json)


@click.command("verify")
@click.argument("names", nargs=-1, metavar="[NAME…]")
@JSON
def verify_command(names: tuple[str, ...], as_json: bool) -> int:
    """Check the sha256 of all weights that are here, or of some. A wrong file of the cache is removed."""
    cards = [model_card(name) for name in names] if names else _readable()
    found = [_verified(card) for card in cards]
    lines = [f"{entry['name']}: {entry['state']} ({entry['file']})" for entry in found]
    _print({"models": found}, lines, as_json)
    return int(any(entry["state"].startswith("wrong") for entry in found))


def _readable() -> list[ModelCard]:
    """Return every card that can be read, and name the others on standard error."""
    cards = list(readable_cards())
    for card in cards:
        if isinstance(card, ArtifactError):
            click.echo(f"not readable: {card}", err=True)
    return [card for card in cards if not isinstance(card, ArtifactError)]


def _verified(card: ModelCard) -> dict[str, Any]:
    weights = card.weights
    file = resting_place(weights)
    state = "absent"
    if is_whole(file, weights):
        state = "good"
    elif is_there(file) and packaged(card):
        state = "wrong; install lmh-convert again"
    elif is_there(file):
        try:
            file.unlink()
            state = "wrong, removed; `lmh zoo download` fetches it again"
        except OSError as error:
            state = f"wrong, and cannot be removed ({error.strerror or error})"
    return {"name": card.name, "state": state, "file": str(file), "sha256": weights.sha256}


@click.command("export-card")
@click.argument("name")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write, unless it is printed.")
@click.option("--json", "as_json", is_flag=True, help="As JSON in the place of Markdown.")
def export_card_command(name: str, output: Path | None, as_json: bool) -> None:
    """Print a model's card as a page in Markdown, as the Hugging Face Hub shows it."""
    card = model_card(name)
    text = json.dumps(card_json(card), ensure_ascii=False) + "\n" if as_json else card_markdown(card)
    if output is None:
        click.echo(text, nl=False)
    else:
        write_atomically(output, text.encode())


@click.command("add")
@click.argument("address")
@JSON
def add_command(address: str, as_json: bool) -> None:
    """Take the cards of a release: its index or one card, at a path, https://…, file://… or hf:ORG/REPO/FILE."""
    cards = add(address)
    _print({"models": [card_json(card) for card in cards]}, [f"{card.name}: added" for card in cards], as_json)


@click.command("publish")
@click.argument("files", nargs=-1, required=True, metavar="[NAME=]FILE…")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of the release.")
@click.option("--base", metavar="URL", help="Where the folder will lie; unless given, cards find files beside them.")
@click.option("--licence", default="Apache-2.0", show_default=True, help="Of the weights, an SPDX identifier.")
@click.option(
    "--data", metavar="SPEC", help="Measure spiking networks that have no card beside them on its test split."
)
@click.option("--half", is_flag=True, help="Weights in float16 where no accuracy on --data changes, by 0.05 points.")
@JSON
@verbosity_options
def publish_command(
    files: tuple[str, ...], out: Path, base: str | None, licence: str, data: str | None, half: bool, as_json: bool
) -> None:
    """Write a release: a folder with weights, a card for each, and an index with their hashes, ready to be uploaded.

    Spiking networks whose ANN or teacher is a FILE too name it by its name in the zoo.
    """
    if half and data is None:
        raise click.UsageError("--half needs --data: what float16 changes is measured on its test split.")
    terminal = Terminal(results=not as_json)
    folder = "" if base is None else base if base.endswith(("/", ":")) else f"{base}/"
    cards: list[tuple[ModelCard, Path]] = []
    for text in files:
        name, _, file = text.rpartition("=")
        path = user_path(file)
        if folder:
            parsed_location(f"{folder}x{SUFFIX}")
        measured = None
        if data is not None and card_beside(path, file_digest(path)) is None:
            measured = _measured(path, data, terminal)
        cards.append((card_of_file(name or path.stem, path, licence=licence, base=folder, measured=measured), path))
    doubled = {card.name for card, _ in cards if [other.name for other, _ in cards].count(card.name) > 1}
    if doubled:
        raise ArgumentError(f"{', '.join(sorted(doubled))}: named twice; expected a name for each. Pass NAME=FILE.")
    names = {path.absolute(): card.name for card, path in cards}
    with TemporaryDirectory() as made:
        if half:
            assert data is not None
            cards = [in_half(card, path, Path(made), data, terminal) for card, path in cards]
        cards = [with_named_origins(card, path, names, Path(made)) for card, path in cards]
        index = publish(cards, out)
    lines = [f"{card.name}: {out / card.name}{SUFFIX}" for card, _ in cards] + [f"Written: {index}"]
    _print({"index": str(index), "models": [card_json(card) for card, _ in cards]}, lines, as_json)


def _measured(path: Path, data: str, terminal: Terminal) -> dict[str, Any] | None:
    if read_tensors(path)[1].get("format") != FORMAT:
        return None
    return measured_snn(path, data, terminal)


def _print(result: dict[str, Any], lines: list[str], as_json: bool) -> None:
    click.echo(json.dumps(result, ensure_ascii=False) if as_json else "\n".join(lines))
