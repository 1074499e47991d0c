"""Reading ``.pt2`` files of torch.export.save."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ...artifact import is_there
from ...errors import SourceError, UnsafePickleError, reason_of
from .importer import modules_from_export
from .quiet import quiet

_GRAPHS = ("models/", "serialized_exported_program.json")
_TRAINING = ("training", "train")
TOLERANCE = 1e-4


def read_exported(path: Path | str, *, trust_pickle: bool = False) -> fx.GraphModule:
    """Return the network in a ``.pt2`` file as a graph of torch.nn modules, on the CPU.

    torch.export.load can run code from the file, by pickled constants and by expressions that it evaluates, so
    that a stranger's file needs trust.

    Args:
        path: a file of torch.export.save.
        trust_pickle: let the file run code.

    Returns:
        The network in eval mode, as :func:`modules_from_export` gives it. Its output was compared with the
        program's on random numbers in the place of the example input that the file holds.

    Raises:
        UnsafePickleError: without ``trust_pickle``.
        SourceError: if the file cannot be read, or not by this version of torch.
        AuditError: if its program has no such graph.
    """
    path = Path(path)
    header = _header(path)
    if not trust_pickle:
        raise UnsafePickleError(
            f"{path}: is a torch.export archive, and reading it can run code from the file; expected your trust in it. "
            "Only if you trust where the file comes from, pass --trust-pickle (trust_pickle=True). "
            "Better: pass the model that it was exported from, or its state_dict."
        )
    _check_version(path, header)
    try:
        with quiet():
            program = torch.export.load(path)
    except Exception as error:  # torch.export.load raises almost anything
        raise SourceError(_unreadable(path, header, error)) from error
    model = modules_from_export(program)
    _check_equal(path, program, model)
    return model


def _header(path: Path) -> dict[str, Any]:
    """Return what the archive says of its program, without running anything of it.

    Raises:
        SourceError: if it is no torch.export archive, or damaged.
    """
    if not is_there(path) or path.is_dir():
        raise SourceError(f"{path}: no such file; expected a file of torch.export.save. Check the path.")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            names = archive.namelist()
            graphs = [name for name in names if name.endswith(".json") and any(part in name for part in _GRAPHS)]
            header = json.loads(archive.read(graphs[0])) if graphs and not broken else {}
    except Exception as error:  # zipfile raises almost anything on a damaged directory
        raise SourceError(
            f"{path}: a damaged archive, or none ({error}); expected a file of torch.export.save. Copy or export it "
            "again."
        ) from error
    if broken:
        raise SourceError(f"{path}: its part {broken} is damaged; expected a whole file. Copy or export it again.")
    if not graphs:
        compiled = any("aotinductor" in name for name in names)
        came = "a compiled package without a graph" if compiled else "an archive without an exported program"
        raise SourceError(
            f"{path}: is {came}; expected a file of torch.export.save. Save torch.export.export(model, …) with it."
        )
    return header if isinstance(header, dict) else {}


def _check_version(path: Path, header: dict[str, Any]) -> None:
    written, known = _schema(header), _known_schema()
    if written is not None and known is not None and written[0] != known[0]:
        raise SourceError(
            f"{path}: {_versions(header)}; expected the same major version of the format. Export it again with this "
            "torch, or install the torch that wrote it."
        )


def _schema(header: dict[str, Any]) -> tuple[int, int] | None:
    version = header.get("schema_version")
    if not isinstance(version, dict) or not all(isinstance(version.get(key), int) for key in ("major", "minor")):
        return None
    return version["major"], version["minor"]


def _known_schema() -> tuple[int, int] | None:
    try:
        from torch._export.serde.schema import SCHEMA_VERSION
    except ImportError:
        return None
    major, minor = SCHEMA_VERSION[:2]
    return int(major), int(minor)


def _versions(header: dict[str, Any]) -> str:
    """Say which torch wrote the file and which one reads it."""

    def shown(schema: tuple[int, int] | None) -> str:
        return f"{schema[0]}.{schema[1]}" if schema else "unknown"

    return (
        f"written by torch {header.get('torch_version', 'unknown')} (format {shown(_schema(header))}), read by "
        f"torch {torch.__version__} (format {shown(_known_schema())})"
    )


def _unreadable(path: Path, header: dict[str, Any], error: Exception) -> str:
    reason = reason_of(error)
    return (
        f"{path}: torch.export.load cannot read it ({reason}); {_versions(header)}; expected a whole file of "
        "torch.export.save. Export it again with this torch; if it names an operator of another package, import that "
        "package first."
    )


def _check_equal(path: Path, program: ExportedProgram, model: fx.GraphModule) -> None:
    """Compare the graph with the program on random numbers.

    Raises:
        SourceError: if they answer differently.
    """
    if program.example_inputs is None or _trains(program):
        return
    generator = torch.Generator().manual_seed(0)
    args, kwargs = pytree.tree_map_only(Tensor, lambda value: _random(value, generator), program.example_inputs)
    with torch.no_grad(), quiet():
        expected = pytree.tree_leaves(program.module()(*_fresh(args), **_fresh(kwargs)))
        got = pytree.tree_leaves(model(*_fresh(args), **_fresh(kwargs)))
    for one, other in zip(expected, got, strict=True):
        if isinstance(one, Tensor) and not torch.allclose(one, other, TOLERANCE, TOLERANCE * _scale(one), True):
            raise SourceError(
                f"{path}: the graph answers differently from the exported program; expected the same. Its operators "
                "do something that their modules do not: pass the model that it was exported from."
            )


def _random(value: Tensor, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point():
        return value
    return torch.randn(value.shape, generator=generator).to(value)


def _fresh(values: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, values)


def _scale(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 1.0


def _trains(program: ExportedProgram) -> bool:
    """Whether the program was exported in train mode, where its output is another one."""
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        for position, argument in enumerate(schema.arguments if schema else ()):
            if argument.name in _TRAINING and len(node.args) > position and node.args[position] is True:
                return True
    return False
