"""From a file, or a model in memory, to a checked ONNX model that holds nothing but plain nodes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import ModelProto, TensorProto, inliner

from ...artifact import is_there
from ...errors import SourceError
from .registry import OLDEST_OPSET, newest_opset

ADVICE = "Export it again with torch.onnx.export, or check it with onnx.checker.check_model"
_IR_VERSION, _GRAPH = (1, 0), (7, 2)


def is_onnx(path: Path) -> bool:
    """Whether a file is an ONNX model, by its content: a protobuf message with the fields of one.

    Only the heads of its fields are read, so that the size of the model does not matter.

    Args:
        path: of the file.
    """
    try:
        with path.open("rb") as file:
            fields = _fields(file, path.stat().st_size)
    except OSError:
        return False
    return fields is not None and {_IR_VERSION, _GRAPH} <= fields


def _fields(file: BinaryIO, size: int) -> set[tuple[int, int]] | None:
    """Return the numbers and wire types of a protobuf message's fields, or None if it is none."""
    found: set[tuple[int, int]] = set()
    while file.tell() < size:
        tag = _varint(file)
        if tag is None or tag >> 3 == 0:
            return None
        found.add((tag >> 3, tag & 7))
        match tag & 7:
            case 0:
                if _varint(file) is None:
                    return None
            case 2:
                length = _varint(file)
                if length is None or file.tell() + length > size:
                    return None
                file.seek(length, 1)
            case _:
                return None
    return found


def _varint(file: BinaryIO) -> int | None:
    number = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return None
        number |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return number
    return None


def read_model(source: Path | str | ModelProto) -> tuple[ModelProto, str]:
    """Return a valid model without model-local functions, and what to call it in messages.

    ``ai.onnx`` is written as the empty domain throughout.

    Args:
        source: a file, whose external data is read too, or a model in memory, which is not changed.

    Raises:
        SourceError: if it is no ONNX model, not a valid one, or of an opset that is not known.
    """
    if isinstance(source, ModelProto):
        return _plain(copy.deepcopy(source), "the ONNX model", None), "the ONNX model"
    where, source = str(source), Path(source)
    if not is_there(source):
        raise SourceError(f"{where}: no such file; expected an ONNX model. Check the path.")
    if source.is_dir():
        raise SourceError(f"{where}: is a folder; expected an ONNX model. Name the .onnx file in it.")
    if not is_onnx(source):
        raise SourceError(
            f"{where}: is not an ONNX model, or not a whole one; expected a protobuf message with a graph. "
            "Export it again with torch.onnx.export, or copy it again."
        )
    try:
        model = onnx.load(source, load_external_data=False)
    except Exception as error:  # protobuf and onnx raise their own kinds
        raise _invalid(where, error) from error
    return _plain(model, where, source), where


def _plain(model: ModelProto, where: str, file: Path | None) -> ModelProto:
    _check_opset(model, where)
    if file is None:
        _check_inside(model, where)
    else:
        _check_beside(model, file)
    try:
        if _unalias(model) or file is None:
            onnx.checker.check_model(model)
        else:
            onnx.checker.check_model(file)
        if model.functions:
            model = inliner.inline_local_functions(model)
        if file is not None:
            onnx.load_external_data_for_model(model, str(file.parent))
    except Exception as error:  # onnx.checker.ValidationError, or what reading external data raises
        raise _invalid(where, error) from error
    _check_text(model, where)
    if model.graph.sparse_initializer:
        raise SourceError(
            f"{where}: has sparse initializers ({model.graph.sparse_initializer[0].values.name}, …); expected dense "
            "ones. Export the model with dense weights."
        )
    return model


def _check_text(model: ModelProto, where: str) -> None:
    """Refuse names that are no UTF-8: protobuf hands them out as bytes."""
    graph = model.graph
    named = [*graph.node, *graph.initializer, *graph.input, *graph.output]
    texts = [entry.name for entry in named]
    texts += [text for node in graph.node for text in (node.op_type, node.domain, *node.input, *node.output)]
    damaged = next((text for text in texts if not isinstance(text, str)), None)
    if damaged is not None:
        raise SourceError(
            f"{where}: is not a valid ONNX model (the name {damaged!r} is no UTF-8); expected text. {ADVICE}."
        )


def _check_inside(model: ModelProto, where: str) -> None:
    outside = [tensor.name for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    if outside:
        raise SourceError(
            f"{where}: the data of {len(outside)} initializers ({outside[0]}, …) is in a file of its own; expected it "
            "with the model. Pass the path of the .onnx file instead."
        )


def _check_beside(model: ModelProto, file: Path) -> None:
    """Refuse a model whose weights are in another file of its folder that is not there."""
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    names = dict.fromkeys(entry.value for entry in entries if entry.key == "location")
    missing = [name for name in names if Path(name).name == name and not is_there(file.parent / name)]
    if missing:
        raise SourceError(
            f"{file}: its weights are in {', '.join(missing)}, which is not in the folder {file.parent}; expected the "
            f"files side by side. Copy {', '.join(missing)} beside it."
        )


def _unalias(model: ModelProto) -> bool:
    """Write ONNX's own domain as the empty string, its other spelling, and return whether there was need to."""
    bodies = [(model.opset_import, model.graph.node), *((body.opset_import, body.node) for body in model.functions)]
    found = [item for opsets, nodes in bodies for item in (*opsets, *nodes) if item.domain == "ai.onnx"]
    for item in found:
        item.domain = ""
    return bool(found)


def _check_opset(model: ModelProto, where: str) -> None:
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)
    if opset is not None and not OLDEST_OPSET <= opset <= newest_opset():
        raise SourceError(
            f"{where}: has opset {opset}; expected {OLDEST_OPSET} to {newest_opset()}. Convert it with "
            "onnx.version_converter.convert_version, or update the onnx package."
        )


def _invalid(where: str, error: Exception) -> SourceError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    return SourceError(
        f"{where}: is not a valid ONNX model ({reason}); expected one that onnx.checker accepts. {ADVICE}."
    )
