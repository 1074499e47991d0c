"""What kind of model file this is, by its content; and reading it without running code from it."""

from __future__ import annotations

import shlex
import zipfile
from enum import Enum
from pathlib import Path
from typing import Any

from torch import Tensor

from ..artifact import FORMAT, is_there, read_tensors
from ..errors import ArtifactError, SourceError
from .pickles import OWN_CLASS_ADVICE, Trust, read_pickle

EXPORT_MARK = ("lmh_format", "spiking-network")
"""Name and value of the note by which an export of a spiking network, ONNX or .pt2, says what it is."""

HDF5 = b"\x89HDF\r\n\x1a\n"
EXPECTED = "a file of torch.save, a .safetensors, an ONNX model, a torch.export archive (.pt2) or a TorchScript archive"

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
    NIR = "a NIR graph (HDF5)"


def kind_of_file(path: Path) -> FileKind:
    """Tell a model file's kind by its content; the name does not matter.

    Raises:
        SourceError: if it is missing, empty, truncated, or of none of these kinds.
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
    if head.startswith(HDF5):
        content = path.read_bytes()
        if b"nodes" in content and b"edges" in content:
            return FileKind.NIR
        raise SourceError(
            f"{path}: an HDF5 file, as Keras writes, and no NIR graph; expected {EXPECTED}. Export the network to ONNX."
        )
    if head[:1] == b"\x80":
        return FileKind.TORCH_LEGACY
    from .onnx_import import is_onnx  # onnx is slow to import, and few files need it

    if is_onnx(path):
        return FileKind.ONNX
    raise SourceError(
        f"{path}: begins with {head!r} and is cut short or no model file that is known; expected {EXPECTED}. "
        "Copy it again, or save the state_dict with torch.save(model.state_dict(), file)."
    )


def _zip_kind(path: Path) -> FileKind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:  # zipfile raises almost anything on a damaged directory
        raise SourceError(
            f"{path}: a truncated or damaged archive; expected a whole file: {EXPECTED}. Copy it again."
        ) from error
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        return FileKind.TORCHSCRIPT
    if "data.pkl" in inner:
        return FileKind.TORCH_ZIP
    if "archive_format" in inner or any(name.startswith("models/") for name in inner) or OLD_PROGRAM in names:
        return FileKind.EXPORTED
    raise SourceError(f"{path}: an archive without a model; expected {EXPECTED}. Name the model file itself.")


def refuse_export(path: Path, kind: FileKind) -> None:
    """Refuse as a source what says of itself that it was exported from a spiking network.

    Raises:
        SourceError: if it does.
    """
    if is_export(path, kind):
        raise SourceError(
            f"{path}: is an export of a spiking network, {kind.value}; expected an ANN: convert the ANN that it came "
            "from."
        )


def is_export(path: Path, kind: FileKind) -> bool:
    """Whether a file was exported from a spiking network; an ONNX or .pt2 file says it by :data:`EXPORT_MARK`."""
    name, value = EXPORT_MARK
    try:
        match kind:
            case FileKind.NIR:
                return True
            case FileKind.ONNX:
                import onnx  # slow to import, and few files need it

                model = onnx.load(path, load_external_data=False)
                return any((entry.key, entry.value) == EXPORT_MARK for entry in model.metadata_props)
            case FileKind.EXPORTED:
                with zipfile.ZipFile(path) as archive:
                    notes = [entry for entry in archive.namelist() if entry.rpartition("/")[2] == name]
                    return any(archive.read(entry) == value.encode() for entry in notes)
    except Exception:  # a damaged file: whoever reads it whole says what is wrong with it
        return False
    return False


def check_saved(path: Path) -> None:
    """Refuse, as a saved spiking network, a file of another kind; what is missing or damaged is left to the reader.

    Raises:
        ArtifactError: if it is no .safetensors.
    """
    if not is_there(path) or path.is_dir():
        return
    wanted = "expected a spiking network that lmh-convert wrote, a .safetensors"
    try:
        kind = kind_of_file(path)
    except SourceError as error:
        if path.suffix == ".safetensors":
            return
        came = "is empty" if path.stat().st_size == 0 else "is no whole model file of a known kind"
        raise ArtifactError(f"{path}: {came}; {wanted}. Name or copy the file again.") from error
    if is_export(path, kind):
        raise ArtifactError(
            f"{path}: is an export of a spiking network, {kind.value}; {wanted}. Name the .safetensors that it was "
            "exported from."
        )
    if kind is not FileKind.SAFETENSORS:
        raise ArtifactError(
            f"{path}: is {kind.value}; {wanted}. Convert it first: lmh-convert {shlex.quote(str(path))} --timesteps 4."
        )


def read_object(path: Path, kind: FileKind, trust: Trust) -> Any:
    """Return what a model file holds, a module or a dict, on the CPU.

    Args:
        path: the file.
        kind: of the file, which :func:`refuse_export` let pass.
        trust: what may be imported and run while it is read.

    Raises:
        UnsafePickleError: if reading it needs more trust.
        SourceError: if it cannot be read, or holds no network that can be rewritten.
    """
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
                ".state_dict()), and convert it, or save it with torch.save(model.state_dict(), file). "
                f"{OWN_CLASS_ADVICE}"
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
