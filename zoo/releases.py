"""Releases: a folder of weights, cards and an index with their hashes, which one person uploads and others add."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from ..artifact import FORMAT as SNN_FORMAT
from ..artifact import file_digest, is_there, make_folder, read_snn, read_tensors, user_path, write_atomically
from ..errors import ArgumentError, ArtifactError, DownloadError
from ..records import FROM_QCFS
from .cache import SUFFIX, offline, resting_place
from .data import data_name
from .images import AnyPreprocessing, preprocessing_of
from .locations import PACKAGE, LocalFile, Packaged, parsed_location
from .model_cards import NAME, ModelCard, SpikingCard, card_markdown, card_text, read_card, read_card_file
from .models import added
from .registry import CARDS, Card, architecture
from .transfer import Weights, small_file

INDEX = "index.json"
INDEX_FORMAT = "lmh-zoo"
INDEX_VERSION = 1
ANOTHER, ANOTHER_HOME = "Name another folder with --out.", "Choose another folder with LMH_HOME."


def card_of_file(
    name: str, path: Path, *, licence: str, base: str = "", measured: Mapping[str, Any] | None = None
) -> ModelCard:
    """Return the card of a file of weights: the one beside it, or one made from what its writer put into it.

    Args:
        name: that the model shall have.
        path: of what ``lmh zoo train`` wrote, or of a saved spiking network.
        licence: of the weights.
        base: address of the folder that it will lie in; unless given, the card's own folder.
        measured: of a spiking network, what ``lmh report --json`` prints.

    Raises:
        ArgumentError: for a name that no file can have.
        ArtifactError: if the file does not say what it is made of, or nobody else could build it again.
    """
    if not re.fullmatch(NAME, name):
        raise ArgumentError(
            f"name {name!r}: expected letters, digits, dots, dashes, as in cifar10-resnet20-t4. Rename."
        )
    if path.suffix != SUFFIX:
        raise ArtifactError(
            f"{path}: expected a {SUFFIX} file, as other formats can run code. Train or convert it here."
        )
    tensors, metadata = read_tensors(path)
    weights = Weights(f"{base}{name}{SUFFIX}", file_digest(path), path.stat().st_size)
    beside = card_beside(path, weights.sha256)
    if beside is not None:
        return replace(beside, name=name, licence=licence, weights=weights)
    if metadata.get("format") == SNN_FORMAT:
        return _spiking_card(name, path, licence, weights, measured)
    facts = metadata.get("record")
    if not isinstance(facts, dict) or "recipe" not in facts:
        raise ArtifactError(
            f"{path}: {len(tensors)} tensors without a record of how they came about; expected what `lmh zoo train` "
            "or lmh-convert wrote. Train it by a recipe."
        )
    recipe = facts["recipe"]
    found = architecture(recipe["architecture"])
    return ModelCard(
        name=name,
        architecture=found.name,
        num_classes=facts.get("num_classes", found.num_classes),
        preprocessing=_preprocessing(facts, found),
        data=facts.get("data") or data_name(recipe["data"]),
        recipe=recipe,
        seed=recipe["seed"],
        ann_accuracy=facts["accuracy"],
        samples=facts["test_samples"],
        licence=licence,
        command=facts["command"],
        versions=facts["versions"],
        weights=weights,
    )


def _spiking_card(
    name: str, path: Path, licence: str, weights: Weights, measured: Mapping[str, Any] | None
) -> SpikingCard:
    manifest = read_snn(path)[1]
    source = manifest["source"]
    if source["architecture"] is None:
        raise ArtifactError(
            f"{path}: was made from {source['name'] or 'a module'}, not from an architecture of the zoo, so nobody "
            "else could build it; expected one of `lmh zoo list`. Export it as ONNX or pt2 instead."
        )
    figures = dict(manifest.get("metrics") or {})
    figures |= {key: value for key, value in (measured or {}).items() if value is not None}
    energy, accuracy = (measured or {}).get("energy"), figures.get("snn_accuracy")
    rates = {site["path"]: site["firing_rate"] for site in (measured or {}).get("sites", [])}
    return SpikingCard(
        name=name,
        architecture=source["architecture"],
        num_classes=source["num_classes"],
        preprocessing=_preprocessing(manifest, architecture(source["architecture"])),
        data=None if manifest.get("data") is None else data_name(manifest["data"]),
        recipe={key: manifest[key] for key in ("calibration", "training", "epochs") if key in manifest},
        seed=manifest.get("seed"),
        ann_accuracy=figures.get("ann_accuracy"),
        samples=figures.get("samples"),
        licence=licence,
        command=manifest.get("command"),
        versions=manifest.get("versions", {}),
        weights=weights,
        timesteps=manifest["recipe"]["timesteps"],
        accuracy=None if accuracy is None else tuple(accuracy),
        firing_rate=rates or None,
        energy=None if energy is None else {
            key: energy[key] for key in ("snn_pj", "ann_pj", "synops", "snn_macs", "ann_macs")
        },
        stages=_stages(manifest),
    )  # fmt: skip


def _stages(manifest: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Return what a network's file says of what it was before; one that was made of a QCFS network was that."""
    metrics = manifest.get("metrics") or {}
    free, earlier = metrics.get("training_free"), list(metrics.get("stages", []))
    if free and not earlier and manifest["calibration"]["policy"] == FROM_QCFS:
        earlier = [{**free, "name": "after QCFS"}]
    elif free:
        earlier.insert(0, {**free, "name": "training-free", "ann_accuracy": None})
    found: dict[str, tuple[float, ...]] = {}
    for stage in earlier:
        if stage["ann_accuracy"] is not None:
            found[f"{stage['name']}, quantised ANN"] = (stage["ann_accuracy"],)
        if stage["snn_accuracy"] is not None:
            found[stage["name"]] = tuple(stage["snn_accuracy"])
    return found


def _preprocessing(facts: Mapping[str, Any], found: Card) -> AnyPreprocessing:
    """Return what a file says of its input, or the architecture's."""
    stored = facts.get("preprocessing")
    return found.preprocessing if stored is None else preprocessing_of(stored)


def card_beside(path: Path, digest: str) -> ModelCard | None:
    """Return the card that ``lmh zoo train`` wrote beside a file of weights, if it is that file's."""
    place = path.with_suffix(".json")
    try:
        card = read_card_file(place) if is_there(place) else None
    except ArtifactError:  # another file of that name
        return None
    return card if card is not None and card.weights.sha256 == digest else None


def publish(cards: Sequence[tuple[ModelCard, Path]], folder: Path) -> Path:
    """Write a release: weights, a JSON card and a page for each model, and an index with all hashes.

    A release that is there already is extended.

    Args:
        cards: each with its file.
        folder: made unless it is there.

    Returns:
        The index's path.

    Raises:
        ArtifactError: if something cannot be written, or the index that is there is damaged.
    """
    make_folder(folder, ANOTHER)
    index = folder / INDEX
    models = _index(index.read_text(encoding="utf-8"), str(index)) if is_there(index) else {}
    for card, path in cards:
        text, weights = card_text(card), card.name + SUFFIX
        write_atomically(folder / weights, path.read_bytes(), ANOTHER)
        write_atomically(folder / f"{card.name}.json", text.encode(), ANOTHER)
        write_atomically(folder / f"{card.name}.md", card_markdown(card).encode(), ANOTHER)
        models[card.name] = {
            "card": f"{card.name}.json",
            "card_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "weights": weights,
            "sha256": card.weights.sha256,
            "size": card.weights.size,
        }
    found = {"format": INDEX_FORMAT, "version": INDEX_VERSION, "models": models}
    write_atomically(index, (json.dumps(found, indent=2, sort_keys=True) + "\n").encode(), ANOTHER)
    lines = sorted({f"{entry['sha256']}  {entry['weights']}\n" for entry in models.values()})
    lines += sorted(f"{entry['card_sha256']}  {entry['card']}\n" for entry in models.values())
    write_atomically(folder / "SHA256SUMS", "".join(lines).encode(), ANOTHER)
    return index


def add(address: str) -> list[ModelCard]:
    """Take the cards of a release, so that its models can be named as the package's are.

    Args:
        address: of its index or of one card: a path, or as weights are located.

    Returns:
        The cards that were added or replaced.

    Raises:
        DownloadError: if it cannot be had, or a card has another hash than the index says.
        ArtifactError: if it is neither, damaged, or newer than this code.
        ArgumentError: for a location of another kind, or a name of the package's own.
    """
    where = _address(address)
    text = _small_text(where)
    if _is_index(text):
        cards = []
        for name, entry in _index(text, where).items():
            beside = _beside(where, entry["card"])
            inner = _small_text(beside)
            if hashlib.sha256(inner.encode()).hexdigest() != entry["card_sha256"]:
                raise DownloadError(
                    f"{beside}: its sha256 is not the one in {where}; expected {entry['card_sha256']}. Nothing was "
                    f"added. Tell whoever published {name}."
                )
            cards.append(_placed(read_card(inner, beside), beside))
    else:
        cards = [_placed(read_card(text, where), where)]
    for card in cards:
        if card.name in CARDS and (isinstance(card, SpikingCard) or card.architecture != card.name):
            raise ArgumentError(
                f"{where}: {card.name} is the name of an architecture, and this model is not an ANN of it; expected "
                "another name. Rename it there."
            )
        if is_there(PACKAGE / f"{card.name}.json"):
            raise ArgumentError(
                f"{where}: {card.name} is a model of the package; expected another name. Rename it there."
            )
    make_folder(added(), ANOTHER_HOME)
    for card in cards:
        write_atomically(added() / f"{card.name}.json", card_text(card).encode(), ANOTHER_HOME)
    return cards


def _address(text: str) -> str:
    if re.match(r"(https?|file|hf):", text):
        return text
    path = user_path(text)
    return (path / INDEX if is_there(path) and path.is_dir() else path).resolve().as_uri()


def _beside(where: str, name: str) -> str:
    """Return the address of a file in the folder of another, unless it is an address itself."""
    if re.match(r"(https?|file|hf|package):", name):
        return name
    if where.startswith("hf:"):
        file, _, revision = where.partition("@")
        return f"{file.rpartition('/')[0]}/{name}" + (f"@{revision}" if revision else "")
    return urljoin(where, name)


def _placed(card: ModelCard, where: str) -> ModelCard:
    """Return a card whose weights are located from anywhere."""
    location = _beside(where, card.weights.location)
    placed = replace(card, weights=replace(card.weights, location=location))
    resting_place(placed.weights)
    return placed


def _small_text(where: str) -> str:
    """Return the text of a small file at an address."""
    source = parsed_location(where)
    if isinstance(source, Packaged):
        raise ArgumentError(f"{where}: the package's cards are there already; expected another address.")
    if not isinstance(source, LocalFile) and (variable := offline()):
        raise DownloadError(f"{where}: {variable} forbids to ask for it; expected a path. Unset {variable}.")
    try:
        return small_file(source).decode()
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{where}: not a text; expected an index or a card in JSON. Name such a file.") from error


def _is_index(text: str) -> bool:
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("format") == INDEX_FORMAT


def _index(text: str, where: str) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ArtifactError(f"{where}: not an index; expected what `lmh zoo publish` writes. Take another folder.")
    version, models = found.get("version"), found.get("models", {})
    if isinstance(version, int) and version > INDEX_VERSION:
        raise ArtifactError(
            f"{where}: index version {version}; this lmh reads up to {INDEX_VERSION}. Update lmh-convert."
        )
    kinds = {"card": str, "card_sha256": str, "weights": str, "sha256": str, "size": int}
    if (
        version != INDEX_VERSION
        or not isinstance(models, dict)
        or not all(
            isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
            for entry in models.values()
        )
    ):
        raise ArtifactError(f"{where}: a damaged index; expected what `lmh zoo publish` writes. Publish it again.")
    return models
