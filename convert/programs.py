"""Weights out of TorchScript and torch.export archives, by their names, without running the programs in them.

torch.jit.load runs the ``__setstate__`` methods that an archive brings along, and operators of TorchScript can write
files; torch.export.load can unpickle. So the tensors are read here: raw bytes, and a pickle in which every name means
an object that only holds values.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SourceError, reason_of

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_EXPORTED_TYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
"""torch.export's numbers for types."""

_WEIGHTS = "data/weights/"
_CONFIG = "_weights_config.json"
_OLD_WEIGHTS = "serialized_state_dict.pt"


def script_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a TorchScript archive by their names in the module tree; empty if it was frozen.

    Raises:
        SourceError: if the archive is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.partition("/")[2] == "data.pkl")
            root = _Reader(archive, name.removesuffix("data.pkl")).load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise SourceError(_damaged(path, error)) from error
    return dict(_tensors(root, "", set()))


def exported_weights(path: Path) -> dict[str, Tensor]:
    """Return the parameters and buffers of a torch.export archive; empty if it has none that can be read so.

    Raises:
        SourceError: if the archive is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if _OLD_WEIGHTS in names:
                return torch.load(io.BytesIO(archive.read(_OLD_WEIGHTS)), map_location="cpu", weights_only=True)
            configs = [name for name in names if _WEIGHTS in name and name.endswith(_CONFIG)]
            if len(configs) != 1:
                return {}
            folder = configs[0].partition(_WEIGHTS)[0] + _WEIGHTS
            entries: Mapping[str, Any] = json.loads(archive.read(configs[0]))["config"]
            plain = {name: entry for name, entry in entries.items() if not entry["use_pickle"]}
            return {name: _exported_tensor(archive, folder, entry) for name, entry in plain.items()}
    except Exception as error:  # json, zipfile and torch each have their own
        raise SourceError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    reason = reason_of(error)
    return f"{path}: its weights cannot be read ({reason}); expected a whole archive. Copy or save it again."


def _exported_tensor(archive: zipfile.ZipFile, folder: str, entry: Mapping[str, Any]) -> Tensor:
    meta = entry["tensor_meta"]
    sizes, strides = ([size["as_int"] for size in meta[key]] for key in ("sizes", "strides"))
    data = archive.read(folder + entry["path_name"])
    return _tensor(data, _EXPORTED_TYPES[meta["dtype"]], meta["storage_offset"]["as_int"], sizes, strides)


def _tensor(data: bytes, dtype: torch.dtype, offset: int, size: Any, stride: Any) -> Tensor:
    """Return a tensor over raw bytes; torch checks that it does not reach beyond them."""
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.as_strided(tuple(size), tuple(stride), offset)


class _Held:
    """An object of the archive: it holds its attributes and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.attributes: Any = arguments

    def __new__(cls, *_arguments: Any) -> _Held:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


class _Reader(pickle.Unpickler):
    """Reads a module tree; no name of the pickle reaches a function or class of Python."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}data.pkl")))
        self._archive, self._folder = archive, folder

    def find_class(self, module_name: str, name: str, /) -> Any:
        """Return what a name means: tensors are made, a storage's type is noted, the rest holds values."""
        if (module_name, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuilt
        if (module_name, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return _STORAGES.get(name, _Held) if module_name == "torch" else _Held

    def persistent_load(self, pid: Any, /) -> tuple[torch.dtype, str]:
        """Return type and key of a storage."""
        _, dtype, key, *_ = pid
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("a storage of unknown type")
        return dtype, str(key)

    def _rebuilt(self, storage: tuple[torch.dtype, str], offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        dtype, key = storage
        return _tensor(self._archive.read(f"{self._folder}data/{key}"), dtype, offset, size, stride)


def _tensors(held: Any, prefix: str, above: set[int]) -> Iterator[tuple[str, Tensor]]:
    attributes = held.attributes if isinstance(held, _Held) else None
    if not isinstance(attributes, dict) or id(held) in above:
        return
    for name, value in attributes.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        else:
            yield from _tensors(value, f"{prefix}{name}.", above | {id(held)})
