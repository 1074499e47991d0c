"""``lmh zoo publish``: the ANN and the teacher of a spiking network by their names in the zoo, where all find them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..artifact import FORMAT, file_digest, read_tensors, write_tensors
from .cache import SUFFIX
from .model_cards import ModelCard


def with_named_origins(card: ModelCard, path: Path, names: Mapping[Path, str], folder: Path) -> tuple[ModelCard, Path]:
    """Return a spiking network that names models of its release as ``zoo:NAME``, or what came where it names none.

    Args:
        card: of the file.
        path: of the file.
        names: of the release's models by their files, absolute.
        folder: for the file that is written.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        return card, path
    manifest = metadata["manifest"]
    source, teacher = manifest["source"], manifest.get("teacher")
    known_source, known_teacher = _known(source["name"], names), _known(teacher, names)
    if known_source is None and known_teacher is None:
        return card, path
    if known_source is not None:  # whose card has the hash
        source = {**source, "name": known_source, "sha256": None}
    changed = {**manifest, "source": source, "teacher": known_teacher or teacher}
    file = folder / f"{card.name}-origins{SUFFIX}"
    write_tensors(file, tensors, {**metadata, "manifest": changed})
    return replace(card, weights=replace(card.weights, sha256=file_digest(file), size=file.stat().st_size)), file


def _known(origin: Any, names: Mapping[Path, str]) -> str | None:
    name = names.get(Path(origin).absolute()) if isinstance(origin, str) else None
    return None if name is None else f"zoo:{name}"
