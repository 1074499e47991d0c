"""What kind of model file this is, by its content; and reading it without running code from it."""

from __future__ import annotations

import zipfile
from enum import Enum
from pathlib import Path
from typing import Any

from torch import Tensor

from ..artifact import FORMAT, is_there, read_tensors
from ..errors import ArtifactError, SourceError
from .pickles import NO_TRUST, Trust, read_pickle

OLD_PROGRAM = "serialized_exported_program.json"
"""The entry that tells a torch.export archive of the layout before torch 2.8."""


class FileKind(Enum):
    """The kinds of file that are told apart."""

    TORCH_ZIP = "a file of torch.save"
    TORCH_LEGACY = "a file of torch.save in the format before torch 1.6"
    SAFETENSORS = "a .safetensors file"
    TORCHSCRIPT = "a TorchScript archive"
    EXPORTED = "a torch.export archive (.pt2)"
    ONNX = "an ONNX model"


def kind_of_file(path: Path) -> FileKind:
    """Tell a model file's kind by its content; the name does not matter.

    Raises:
        SourceError: if it is missing, empty, truncated, or nothing that torch writes.
    """
    if not is_there(path):
        raise SourceError(f"{path}: no such file; expected a model file, zoo:NAME or torchvision:NAME. Check the path.")
    if path.is_dir():
        raise SourceError(f"{path}: is a folder; expected a model file. Name the file in it.")
    with path.open("rb") as file:
        head = file.read(16)
    if not head:
        raise SourceError(f"{path}: is empty; expected a model file. Copy or save it again.")
    if head.startswith(b"PK"):
        return _zip_kind(path)
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return FileKind.SAFETENSORS
    if head[:1] == b"\x80":
        return FileKind.TORCH_LEGACY
    from .onnx_import import is_onnx  # onnx is slow to import, and few files need it

    if is_onnx(path):
        return FileKind.ONNX
    raise SourceError(
        f"{path}: begins with {head!r}, which no PyTorch file does; expected a file of torch.save or a .safetensors. "
        "Save the state_dict with torch.save(model.state_dict(), file)."
    )


def _zip_kind(path: Path) -> FileKind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:  # zipfile raises almost anything on a damaged directory
        raise SourceError(
            f"{path}: a truncated or damaged archive ({error}); expected a whole file of torch.save. Copy it again."
        ) from error
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        return FileKind.TORCHSCRIPT
    if "data.pkl" in inner:
        return FileKind.TORCH_ZIP
    if "archive_format" in inner or any(name.startswith("models/") for name in inner) or OLD_PROGRAM in names:
        return FileKind.EXPORTED
    raise SourceError(f"{path}: an archive without a model; expected a file of torch.save. Name the model file itself.")


def read_object(path: Path, trust: Trust = NO_TRUST) -> Any:
    """Return what a model file holds, a module or a dict, on the CPU.

    Args:
        path: the file.
        trust: what may be imported and run while it is read; by default nothing of the file's own.

    Raises:
        UnsafePickleError: if reading it needs more trust.
        SourceError: if it cannot be read, or holds no network that can be rewritten.
    """
    kind = kind_of_file(path)
    match kind:
        case FileKind.ONNX:
            from .onnx_import import import_onnx

            return import_onnx(path)
        case FileKind.SAFETENSORS:
            return _read_safetensors(path)
        case FileKind.EXPORTED:
            from .exported import read_exported

            return read_exported(path, trust_pickle=trust.pickle)
        case FileKind.TORCHSCRIPT:
            raise SourceError(
                f"{path}: is {kind.value}, whose graph cannot be rewritten; expected the network that it was made "
                "from. Build that network, give it the weights, model.load_state_dict(torch.jit.load(file)"
                ".state_dict()), and convert it, or save it with torch.save(model.state_dict(), file)."
            )
    return read_pickle(path, trust, legacy=kind is FileKind.TORCH_LEGACY)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors, metadata = read_tensors(path)
    except ArtifactError as error:
        raise SourceError(str(error)) from error
    if metadata.get("format") == FORMAT:
        raise SourceError(
            f"{path}: is a spiking network already; expected an ANN. Measure it with `lmh report {path} --data …`, "
            "or load it with lmh.convert.load."
        )
    return tensors
