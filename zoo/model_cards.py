"""Cards of models: what a file of weights is, how it came about and what it does. One JSON file for each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any

from ..errors import ArtifactError
from ..records import plain_value
from .images import AnyPreprocessing, preprocessing_of
from .transfer import Weights

FORMAT = "lmh-card"
VERSION = 1
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What is known of a trained ANN. What is not known is None.

    Attributes:
        name: as the user types it behind ``zoo:``.
        architecture: a name of the zoo's architectures, or ``torchvision:NAME``.
        num_classes: that it was built with.
        preprocessing: of its input.
        data: name of its data set, such as ``cifar10``.
        recipe: settings of its training.
        seed: of its training.
        ann_accuracy: on the test split, as a fraction of 1.
        samples: test images that accuracies were measured on.
        licence: of the weights, an SPDX identifier.
        command: that wrote the file.
        versions: of lmh, torch and Python then.
        weights: where the file is, its sha256 and size.
    """

    name: str
    architecture: str
    num_classes: int
    preprocessing: AnyPreprocessing
    data: str | None
    recipe: Mapping[str, Any]
    seed: int | None
    ann_accuracy: float | None
    samples: int | None
    licence: str
    command: str | None
    versions: Mapping[str, str]
    weights: Weights


@dataclass(frozen=True, kw_only=True)
class SpikingCard(ModelCard):
    """What is known of a spiking network; its ``ann_accuracy`` is its source's.

    Attributes:
        timesteps: T.
        accuracy: after t = 1…T steps, as fractions of 1.
        firing_rate: mean spikes per neuron and step, by site.
        energy: of one sample: ``snn_pj``, ``ann_pj``, ``synops``, ``snn_macs``, ``ann_macs``.
        stages: accuracies after t = 1…T of what it was before, by words such as ``training-free``; of a quantised ANN
            the one that it has.
    """

    timesteps: int
    accuracy: tuple[float, ...] | None
    firing_rate: Mapping[str, float] | None
    energy: Mapping[str, float] | None
    stages: Mapping[str, tuple[float, ...]]


_KINDS: dict[str, tuple[type, ...]] = {
    "name": (str,), "architecture": (str,), "num_classes": (int,), "data": (str, NoneType), "recipe": (dict,),
    "seed": (int, NoneType), "ann_accuracy": (float, int, NoneType), "samples": (int, NoneType), "licence": (str,),
    "command": (str, NoneType), "versions": (dict,), "timesteps": (int,), "accuracy": (list, NoneType),
    "firing_rate": (dict, NoneType), "energy": (dict, NoneType), "stages": (dict,),
}  # fmt: skip
_ENERGY = {"snn_pj", "ann_pj", "synops", "snn_macs", "ann_macs"}
_TYPES: dict[str, type[ModelCard]] = {kind.__name__: kind for kind in (ModelCard, SpikingCard)}


def card_json(card: ModelCard) -> dict[str, Any]:
    """Return a card as values that JSON can hold."""
    return {"format": FORMAT, "version": VERSION, **plain_value(card)}


def card_text(card: ModelCard) -> str:
    """Return a card as its file holds it."""
    return json.dumps(card_json(card), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_card(text: str, where: str) -> ModelCard:
    """Return the card that a JSON text holds.

    Args:
        text: as :func:`card_json` gives it.
        where: the text is from, for errors.

    Raises:
        ArtifactError: if it is no card, damaged, or of a later version than this code reads.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ArtifactError(f"{where}: not JSON ({error}); expected a model card. Fetch or write it again.") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ArtifactError(f"{where}: not a model card; expected what `lmh zoo publish` writes. Name such a file.")
    version = found.pop("version", None)
    if isinstance(version, int) and version > VERSION:
        raise ArtifactError(
            f"{where}: card version {version}; this lmh reads up to {VERSION}. Update lmh-convert: pip install -U "
            "lmh-convert."
        )
    kind = _TYPES.get(found.pop("type", ""))
    names = set() if kind is None else {item.name for item in fields(kind)}
    odd = sorted((found.keys() - {"format"}) ^ names)
    if kind is None or version != VERSION or odd:
        raise ArtifactError(
            f"{where}: a damaged card (version {version!r}; missing or unknown: {', '.join(odd[:5]) or 'nothing'}); "
            "expected what `lmh zoo publish` writes. Fetch or write it again."
        )
    try:
        values = {name: found[name] for name in names}
        values["preprocessing"] = preprocessing_of(found["preprocessing"])
        values["weights"] = _weights(found["weights"])
        wrong = [
            f"{name} is {values[name]!r}" for name in names & _KINDS.keys() if type(values[name]) not in _KINDS[name]
        ]
        if wrong:
            raise ValueError("; ".join(sorted(wrong)))
        if kind is SpikingCard:
            values |= _measured(found)
        card = kind(**values)
        if not (re.fullmatch(NAME, card.name) and re.fullmatch(r"[0-9a-f]{64}", card.weights.sha256)):
            raise ValueError(f"name {card.name!r}, sha256 {card.weights.sha256!r}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{where}: a damaged card ({error}). Fetch or write it again.") from error
    return card


def _measured(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a spiking network's card says of its accuracy, rates and energy."""
    accuracy, rates, energy = (plain[name] for name in ("accuracy", "firing_rate", "energy"))
    if accuracy is not None and len(accuracy) != plain["timesteps"]:
        raise ValueError(f"{len(accuracy)} accuracies for T = {plain['timesteps']}")
    if energy is not None and energy.keys() != _ENERGY:
        raise ValueError(f"energy has {', '.join(sorted(energy)) or 'nothing'}")
    return {
        "accuracy": None if accuracy is None else tuple(map(float, accuracy)),
        "firing_rate": None if rates is None else {name: float(rate) for name, rate in rates.items()},
        "energy": None if energy is None else {name: float(value) for name, value in energy.items()},
        "stages": {name: tuple(map(float, row)) for name, row in plain["stages"].items()},
    }


def _weights(plain: Mapping[str, Any]) -> Weights:
    return Weights(str(plain["location"]), str(plain["sha256"]), int(plain["size"]))


def read_card_file(path: Path) -> ModelCard:
    """Return the card in a file.

    Raises:
        ArtifactError: as :func:`read_card`, or if the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: not readable ({error}); expected a model card. Check the path.") from error
    return read_card(text, str(path))


def card_markdown(card: ModelCard) -> str:
    """Return a card as a page in Markdown, with the front matter that the Hugging Face Hub reads."""
    spiking = isinstance(card, SpikingCard)
    tags = ["spiking-neural-network", "lmh-convert"] if spiking else ["lmh-convert"]
    head = ["---", f"license: {card.licence.lower()}", "tags:", *(f"- {tag}" for tag in tags)]
    head += ["library_name: lmh-convert", "pipeline_tag: image-classification", "---"]
    what = f"a spiking network of LM-H neurons, T = {card.timesteps}" if isinstance(card, SpikingCard) else "an ANN"
    lines = [*head, "", f"# {card.name}", "", f"{card.architecture}, {what}.", ""]
    lines += [f"- {name}: {value}" for name, value in card_facts(card).items() if value is not None]
    if isinstance(card, SpikingCard) and card.accuracy is not None:
        steps = range(1, card.timesteps + 1)
        row = " | ".join(f"{100 * value:.2f}" for value in card.accuracy)
        lines += ["", f"| accuracy in %{_of(card)} | {' | '.join(f't = {t}' for t in steps)} |"]
        lines += ["| --- " * (card.timesteps + 1) + "|", f"| SNN | {row} |"]
    use = f'lmh.convert.load("zoo:{card.name}")' if spiking else f'lmh.zoo.load("{card.name}")'
    lines += ["", "```python", "import lmh.convert, lmh.zoo", use, "```"]
    if card.recipe:
        lines += ["", "Recipe:", "", "```json", json.dumps(card.recipe, indent=2, sort_keys=True), "```"]
    return "\n".join(lines) + "\n"


def card_facts(card: ModelCard) -> dict[str, str | None]:
    """Return what a card says in words, by name; None where it is not known."""
    found: dict[str, str | None] = {
        "data": card.data,
        "classes": str(card.num_classes),
        **card.preprocessing.described(),
        "seed": None if card.seed is None else str(card.seed),
        "ANN accuracy": None if card.ann_accuracy is None else f"{100 * card.ann_accuracy:.2f} %{_of(card)}",
    }
    if isinstance(card, SpikingCard):
        if card.firing_rate:
            mean = sum(card.firing_rate.values()) / len(card.firing_rate)
            found["firing rate"] = f"{mean:.3f} spikes per step, mean of {len(card.firing_rate)} sites"
        if card.energy:
            spent, of_ann = (card.energy[key] / 1e6 for key in ("snn_pj", "ann_pj"))
            found["energy"] = f"{spent:.3f} µJ a sample, the ANN {of_ann:.3f} µJ"
        for stage, accuracy in card.stages.items():
            found[stage] = f"{', '.join(f'{100 * value:.2f}' for value in accuracy)} %"
    versions = ", ".join(f"{name} {version}" for name, version in card.versions.items())
    return found | {
        "licence": card.licence,
        "size": f"{card.weights.size / 1e6:.2f} MB",
        "sha256": card.weights.sha256,
        "location": card.weights.location,
        "command": None if card.command is None else f"`{card.command}`",
        "versions": versions or None,
    }


def _of(card: ModelCard) -> str:
    return "" if card.samples is None else f", n = {card.samples}"
