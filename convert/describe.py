"""What a model file is, for ``lmh inspect``: its kind, what is in it, and whether it can be converted."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..artifact import file_digest, is_there
from ..errors import LMHError
from .files import FileKind, kind_of_file
from .loading import load_source

HDF5 = b"\x89HDF\r\n\x1a\n"
NIR_KIND = "a NIR graph (HDF5)"


def describe_file(
    path: Path, *, arch: str | None = None, entry: str | None = None, trust_pickle: bool = False,
    modules: Iterable[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Say what a model file of any kind holds; arguments as for :func:`lmh.convert.load_source`.

    Returns:
        ``file``, ``kind``, ``bytes``, ``sha256``; of the network in it ``architecture``, ``num_classes``,
        ``parameters``, ``layers`` (how many of each type); of a graph ``operators``; ``notices``; and ``problem``, why
        it cannot be converted. What does not apply is None or empty.

    Raises:
        SourceError: if the file is missing, or of no known kind.
    """
    kind = NIR_KIND if _is_hdf5(path) else kind_of_file(path).value
    known: dict[str, Any] = {
        "file": str(path),
        "kind": kind,
        "bytes": path.stat().st_size,
        "sha256": file_digest(path),
        "architecture": None,
        "num_classes": None,
        "parameters": None,
        "layers": {},
        "operators": _operators(path, kind),
        "notices": [],
        "problem": None,
    }
    if kind == NIR_KIND:
        return {**known, "problem": "an export of a spiking network; convert the ANN that it came from."}
    try:
        source = load_source(str(path), arch=arch, entry=entry, trust_pickle=trust_pickle, modules=modules)
    except LMHError as error:
        return {**known, "problem": str(error)}
    return {
        **known,
        "architecture": source.card.name if source.card else None,
        "num_classes": source.num_classes,
        "parameters": sum(parameter.numel() for parameter in source.model.parameters()),
        "layers": layer_counts(source.model),
        "notices": list(source.notices),
    }


def layer_counts(model: nn.Module) -> dict[str, int]:
    """Return how many modules of each type a network is made of, the commonest first.

    >>> layer_counts(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
    {'Linear': 2, 'ReLU': 1}
    """
    leaves = (module for module in model.modules() if not any(module.children()))
    return dict(Counter(type(module).__name__ for module in leaves).most_common())


def file_lines(known: dict[str, Any]) -> list[str]:
    """Return :func:`describe_file`'s answer as lines for a terminal."""

    def counts(values: dict[str, int]) -> str:
        return ", ".join(f"{count} {name}" for name, count in values.items())

    lines = [f"{known['file']}: {known['kind']}, {known['bytes'] / 1e6:.1f} MB, sha256 {known['sha256'][:16]}…"]
    if known["operators"]:
        lines.append(f"operators: {counts(known['operators'])}")
    if known["parameters"] is not None:
        name = known["architecture"] or "a network of its own"
        lines.append(f"network: {name}, {known['parameters']:,} parameters")
        lines.append(f"layers: {counts(known['layers'])}")
    lines += known["notices"]
    if known["problem"]:
        return [*lines, f"cannot be converted: {known['problem']}"]
    return [*lines, f"next: lmh-convert {known['file']} --timesteps 4 --dry-run"]


def _is_hdf5(path: Path) -> bool:
    if not is_there(path) or path.is_dir():
        return False
    with path.open("rb") as file:
        return file.read(len(HDF5)) == HDF5


def _operators(path: Path, kind: str) -> dict[str, int]:
    """Count the operators of an ONNX graph, or the nodes of a NIR graph."""
    if kind == FileKind.ONNX.value:
        model = importlib.import_module("onnx").load(path, load_external_data=False)
        return dict(Counter(node.op_type for node in model.graph.node).most_common())
    if kind == NIR_KIND:
        try:
            graph = importlib.import_module("nir").read(path)
        except ImportError:
            return {}
        return dict(Counter(type(node).__name__ for node in graph.nodes.values()).most_common())
    return {}
