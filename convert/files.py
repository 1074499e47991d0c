"""What kind of model file this is, by its content; and reading it without running code from it."""

from __future__ import annotations

import importlib
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artifact import FORMAT, is_there, read_tensors
from ..errors import ArtifactError, SourceError, UnsafePickleError
from ..torchvision_shim import torchvision

TRUSTED_PREFIXES = ("torch.nn.modules.", "torchvision.", "lmh.")
TRUST_ADVICE = (
    "Only if you trust where the file comes from, pass --trust-pickle (trust_pickle=True), which lets it run "
    "code. Better: save the state_dict alone with torch.save(model.state_dict(), file)."
)


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
    except zipfile.BadZipFile as error:
        raise SourceError(
            f"{path}: a truncated or damaged archive ({error}); expected a whole file of torch.save. Copy it again."
        ) from error
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        return FileKind.TORCHSCRIPT
    if "data.pkl" in inner:
        return FileKind.TORCH_ZIP
    if "archive_format" in inner or any(name.startswith("models/") for name in inner):
        return FileKind.EXPORTED
    raise SourceError(f"{path}: an archive without a model; expected a file of torch.save. Name the model file itself.")


def read_object(path: Path, *, trust_pickle: bool = False) -> Any:
    """Return what a model file holds, a module or a dict, on the CPU.

    Classes of torch.nn, torchvision and this package are allowed in a pickle; nothing else that it names is
    imported or run unless ``trust_pickle`` is set.

    Raises:
        UnsafePickleError: if it names anything else.
        SourceError: if it cannot be read.
    """
    kind = kind_of_file(path)
    match kind:
        case FileKind.ONNX:
            from .onnx_import import import_onnx

            return import_onnx(path)
        case FileKind.SAFETENSORS:
            return _read_safetensors(path)
        case FileKind.TORCHSCRIPT | FileKind.EXPORTED:
            raise SourceError(
                f"{path}: {kind.value}, whose graph cannot be rewritten; expected a state_dict or a module. "
                "Save the original model with torch.save(model.state_dict(), file)."
            )
    if trust_pickle:
        return _load(path, weights_only=False)
    with _allowed(_module_classes(path) if kind is FileKind.TORCH_ZIP else []):
        return _load(path, weights_only=True)


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


def _load(path: Path, *, weights_only: bool) -> Any:
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=weights_only)
    except (ImportError, AttributeError) as error:
        raise SourceError(
            f"{path}: its pickle needs a class that cannot be imported ({error}); expected its module on the path. "
            "Set PYTHONPATH to the folder that holds the module."
        ) from error
    except pickle.UnpicklingError as error:
        if weights_only and "weights_only" in str(error).lower():
            raise UnsafePickleError(
                f"{path}: its pickle holds more than tensors, and reading it would run code from the file; expected a "
                f"state_dict. {TRUST_ADVICE}"
            ) from error
        raise SourceError(_unreadable(path, error)) from error
    except Exception as error:  # torch.load raises almost anything on damaged files
        raise SourceError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{path}: cannot be read ({reason}); expected a whole file of torch.save. Copy or save it again."


def _module_classes(path: Path) -> list[Any]:
    """Return the module classes that a pickle names; nothing of the pickle is run to find them.

    Raises:
        UnsafePickleError: naming everything outside the trusted packages.
    """
    try:
        with path.open("rb") as file:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception as error:
        raise SourceError(_unreadable(path, error)) from error
    classes = {name: _trusted_class(name) for name in names}
    unknown = sorted(name for name, found in classes.items() if found is None)
    if unknown:
        raise UnsafePickleError(
            f"{path}: its pickle names {', '.join(unknown)}; expected tensors and modules of torch.nn or torchvision "
            f"only. {TRUST_ADVICE}"
        )
    return list(classes.values())


def _trusted_class(name: str) -> Any | None:
    if not name.startswith(TRUSTED_PREFIXES):
        return None
    module_name, _, attribute = name.rpartition(".")
    if name.startswith("torchvision."):
        torchvision()
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError):
        return None
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


@contextmanager
def _allowed(classes: list[Any]) -> Iterator[None]:
    with torch.serialization.safe_globals(classes):
        yield
