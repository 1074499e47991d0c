"""What a model file is, for ``lmh inspect``: its kind, what is in it, and whether it can be converted."""

from __future__ import annotations

import importlib
import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from .. import zoo
from ..artifact import file_digest
from ..errors import LMHError, SourceError, reason_of
from ..structures import input_count
from ..zoo.models import model_names, packaged
from ..zoo.registry import TORCHVISION
from .architectures import EmptyOnMeta
from .files import FileKind, kind_of_file
from .loading import load_source


def describe_file(
    path: Path, *, arch: str | None = None, entry: str | None = None, trust_pickle: bool = False,
    modules: Iterable[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Say what a model file of any kind holds; arguments as for :func:`lmh.convert.load_source`.

    Returns:
        ``file``, ``kind``, ``bytes``, ``sha256``; of the network in it ``architecture``, ``num_classes``,
        ``parameters``, ``layers`` (how many of each type); of a graph ``operators``; ``notices``; ``problem``, why it
        cannot be converted; and ``next``, what converts it. What does not apply is None or empty.

    Raises:
        SourceError: if the file is missing, or of no known kind.
    """
    kind = kind_of_file(path)
    modules = tuple(modules)
    known: dict[str, Any] = {
        "file": str(path),
        "kind": kind.value,
        "bytes": path.stat().st_size,
        "sha256": file_digest(path),
        "architecture": None,
        "num_classes": None,
        "parameters": None,
        "layers": {},
        "operators": _operators(path, kind),
        "notices": [],
        "problem": None,
        "next": None,
    }
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
        "next": _next(path, source.model, arch=arch, entry=entry, trust_pickle=trust_pickle, modules=modules),
    }


def describe_card(name: str) -> dict[str, Any]:
    """Say what an ANN of the zoo or of torchvision is made of; no weights are read or downloaded.

    Args:
        name: as :func:`lmh.zoo.card` takes it.

    Returns:
        ``architecture``, ``kind``, ``num_classes``, ``input_size``, ``parameters``, ``layers``, ``weights``, where they
        come from, and ``next``, what converts it.
    """
    card = zoo.card(name)
    with EmptyOnMeta():
        model = card.build(num_classes=card.num_classes)
    home, named, note = "the zoo", f"zoo:{name}", ""
    if name.startswith(TORCHVISION):
        home, named, weights = "torchvision", name, "torchvision's, downloaded when it is converted"
    elif name in model_names():
        place = "in this package" if packaged(zoo.model_card(name)) else "downloaded when they are wanted"
        weights = f"{place}; `lmh zoo show {name}` says how they were trained"
    else:
        named, note, weights = f"FILE --arch {card.name}", " (FILE: of weights)", "none"
    return {
        "architecture": card.name,
        "kind": f"an architecture of {home}",
        "num_classes": card.num_classes,
        "input_size": list(card.preprocessing.input_size),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": layer_counts(model),
        "weights": weights,
        "next": f"lmh-convert {named} --timesteps 4 --dry-run{note}",
    }


def card_lines(known: dict[str, Any]) -> list[str]:
    """Return :func:`describe_card`'s answer as lines for a terminal."""
    size = " × ".join(map(str, known["input_size"]))
    return [
        f"{known['architecture']}: {known['kind']}, {known['parameters']:,} parameters, "
        f"{known['num_classes']} classes, input {size}",
        f"layers: {_counted(known['layers'])}",
        f"weights: {known['weights']}",
        f"next: {known['next']}",
    ]


def _next(
    path: Path, model: nn.Module, *, arch: str | None, entry: str | None, trust_pickle: bool, modules: tuple[str, ...]
) -> str:
    """Return the command that converts a file with the options it was read with; or the call, for several inputs."""
    if input_count(model) > 1:
        options = {"arch": arch, "entry": entry, "trust_pickle": trust_pickle or None, "modules": modules or None}
        given = "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)
        return (
            "in Python, as the command takes one input: from lmh.convert import convert, load_source; "
            f"model = load_source({str(path)!r}{given}).model; convert(model, 4, data=…)"
        )
    named = {"--arch": arch, "--entry": entry}
    words = [word for name, value in named.items() if value is not None for word in (name, value)]
    words += ["--trust-pickle"] * trust_pickle + [word for name in modules for word in ("--module", name)]
    return shlex.join(["lmh-convert", str(path), "--timesteps", "4", *words, "--dry-run"])


def layer_counts(model: nn.Module) -> dict[str, int]:
    """Return how many modules of each type a network is made of, the commonest first.

    >>> layer_counts(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
    {'Linear': 2, 'ReLU': 1}
    """
    leaves = (module for module in model.modules() if not any(module.children()))
    return dict(Counter(type(module).__name__ for module in leaves).most_common())


def file_lines(known: dict[str, Any]) -> list[str]:
    """Return :func:`describe_file`'s answer as lines for a terminal."""
    lines = [f"{known['file']}: {known['kind']}, {known['bytes'] / 1e6:.1f} MB, sha256 {known['sha256'][:16]}…"]
    if known["operators"]:
        lines.append(f"operators: {_counted(known['operators'])}")
    if known["parameters"] is not None:
        name = known["architecture"] or "a network of its own"
        lines.append(f"network: {name}, {known['parameters']:,} parameters")
        lines.append(f"layers: {_counted(known['layers'])}")
    lines += known["notices"]
    if known["problem"]:
        return [*lines, f"cannot be converted: {known['problem']}"]
    return [*lines, f"next: {known['next']}"]


def _counted(values: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in values.items())


def _operators(path: Path, kind: FileKind) -> dict[str, int]:
    """Count the operators of an ONNX graph, or the nodes of a NIR graph."""
    if kind is FileKind.ONNX:
        import onnx  # slow to import, and few files need it

        model = onnx.load(path, load_external_data=False)
        return dict(Counter(node.op_type for node in model.graph.node).most_common())
    if kind is FileKind.NIR:
        try:
            graph = importlib.import_module("nir").read(path)
        except ImportError:
            return {}
        except (OSError, KeyError) as error:
            raise SourceError(
                f"{path}: a NIR graph that cannot be read ({reason_of(error)}); expected a whole one. Write it again."
            ) from error
        return dict(Counter(type(node).__name__ for node in graph.nodes.values()).most_common())
    return {}
