"""Files: tensors plus a JSON manifest in one ``.safetensors``; no pickle, no graph, never half a file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .errors import ArtifactError

FORMAT = "lmh-snn"
VERSION = 1
MANIFEST_KEYS = ("recipe", "calibration", "source", "sites", "structure")
ANOTHER_PLACE = "Choose another place, on the command line with --output."


def user_path(text: str | Path) -> Path:
    """Return a path that a user typed, with ``~`` for the home folder; one that cannot be expanded stays as it is."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def is_there(path: Path) -> bool:
    """Whether something has this path; False for names that no file system takes."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def make_folder(folder: Path, advice: str) -> None:
    """Make a folder, and those above it, unless it is there.

    Args:
        folder: to make.
        advice: how the user names another one.

    Raises:
        ArtifactError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"{folder}: cannot be made ({error.strerror or error}); expected a writable place for a folder. {advice}"
        ) from error


def check_writable(path: Path, advice: str) -> None:
    """Find out before the work whether a file can be written.

    Args:
        path: of the file.
        advice: what to do if it cannot, for the message.

    Raises:
        ArtifactError: if its folder or its name allows nothing to be written.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=path.parent):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(
            f"{path}: cannot be written ({reason}); expected a writable folder and a plain file name. {advice}"
        ) from error


def write_atomically(path: Path, data: bytes, advice: str = ANOTHER_PLACE) -> None:
    """Write a file so that at every moment either the old one or the whole new one is there.

    Args:
        path: of the file. What a link leads to is written; a device or pipe takes the bytes as they come.
        data: its bytes.
        advice: how the user names another place.

    Raises:
        ArtifactError: if the folder cannot be written or the disk is full; no partial file is left.
    """
    temporary = None
    try:
        target = path.resolve()
        if target.exists() and not target.is_file():
            target.write_bytes(data)
            return
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except (OSError, ValueError) as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise ArtifactError(
            f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); expected a writable folder with "
            f"{len(data) / 1e6:.1f} MB free. {advice}"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    advice: str = ANOTHER_PLACE,
) -> None:
    """Write tensors with JSON metadata, atomically.

    Args:
        path: of the file.
        tensors: any devices and layouts; stored contiguous.
        metadata: values that JSON can hold, one string each in the header.
        advice: how the user names another place.

    Raises:
        ArtifactError: as :func:`write_atomically`.
    """
    plain: dict[str, Tensor] = {}
    stored: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if storage in stored else value  # tied weights are written twice
        stored.add(storage)
    header = {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()}
    write_atomically(path, safetensors.torch.save(plain, header), advice)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote: tensors on the CPU, and the metadata.

    Raises:
        ArtifactError: if the file is missing or damaged.
    """
    if is_there(path) and path.is_dir():
        raise ArtifactError(f"{path}: is a folder; expected a .safetensors. Name the file in it.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such file; expected a .safetensors. Check the path.") from error
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not a readable .safetensors ({error}). Make or copy it again.") from error
    return tensors, {key: _from_json(value) for key, value in header.items()}


def read_metadata(path: Path) -> dict[str, Any]:
    """Read the metadata alone of a file that is a .safetensors."""
    with safetensors.safe_open(path, framework="pt") as file:
        return {key: _from_json(value) for key, value in (file.metadata() or {}).items()}


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def write_snn(path: Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Write a spiking network: its tensors, and the manifest that says how to build it again."""
    write_tensors(path, tensors, {"format": FORMAT, "version": VERSION, "manifest": manifest})


def read_snn(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a spiking network's tensors and manifest.

    Raises:
        ArtifactError: if the file is not one of ours, or of a later version.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise ArtifactError(
            f"{path}: holds tensors but no spiking network; expected a file written by lmh-convert. Convert it first: "
            f"lmh-convert {shlex.quote(str(path))} --timesteps 4."
        )
    version, manifest = metadata.get("version"), metadata.get("manifest")
    if isinstance(version, int) and version > VERSION:
        raise ArtifactError(f"{path}: format version {version}; this lmh reads up to {VERSION}. Update lmh-convert.")
    missing = [key for key in MANIFEST_KEYS if not isinstance(manifest, dict) or key not in manifest]
    if version != VERSION or missing or not isinstance(manifest, dict):
        raise ArtifactError(
            f"{path}: a damaged manifest (version {version!r}, without {', '.join(missing) or 'nothing'}); "
            "expected one written by lmh-convert. Make the file again."
        )
    return tensors, manifest


def file_digest(path: Path) -> str:
    """Return a file's sha256 as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    import platform

    from . import __version__

    return {"lmh": __version__, "torch": torch.__version__, "python": platform.python_version()}
