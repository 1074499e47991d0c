"""Which function imports which operator: one entry for each operator and each opset that changed it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from onnx import defs

from ...errors import ArgumentError
from .values import Op, Result

Importer = Callable[[Op], Result]

OLDEST_OPSET = 9


def newest_opset() -> int:
    """Return the newest opset that the installed onnx package defines."""
    return int(defs.onnx_opset_version())


class Key(NamedTuple):
    """What an entry is found by.

    Attributes:
        domain: "" for ONNX's own operators.
        op: the operator's name.
        since_version: the opset in which this version of the operator appeared.
    """

    domain: str
    op: str
    since_version: int


class Registry(Mapping[Key, Importer]):
    """Importing functions by :class:`Key`. Two for one key are an error, never an overwrite."""

    def __init__(self, *parts: Mapping[Key, Importer]) -> None:
        self._entries: dict[Key, Importer] = {}
        for part in parts:
            for key, importer in part.items():
                self._put(key, importer)

    def operator(self, *names: str, since: tuple[int, ...], domain: str = "") -> Callable[[Importer], Importer]:
        """Return a decorator that enters a function.

        Args:
            names: of the operators it imports.
            since: each ``since_version`` of those operators that it was written for.
            domain: of the operators; ONNX's own unless given.

        >>> registry = Registry()
        >>> @registry.operator("Relu", since=(6, 13, 14))
        ... def relu(op): ...
        >>> Key("", "Relu", 13) in registry
        True
        """

        def enter(importer: Importer) -> Importer:
            for name in names:
                for version in since:
                    self._put(Key(domain, name, version), importer)
            return importer

        return enter

    def _put(self, key: Key, importer: Importer) -> None:
        if key in self._entries:
            raise ArgumentError(
                f"{key}: is entered already, by {self._entries[key].__name__}; expected one function for each key. "
                f"Leave {importer.__name__} out, or change that one."
            )
        self._entries[key] = importer

    def find(self, domain: str, op: str, opset: int) -> tuple[Key, Importer] | None:
        """Return the entry for an operator as it is in an opset, or None."""
        if domain == "":
            try:
                version = defs.get_schema(op, opset, domain).since_version
            except defs.SchemaError:
                return None
        else:
            versions = [key.since_version for key in self if key[:2] == (domain, op) and key.since_version <= opset]
            version = max(versions, default=0)
        key = Key(domain, op, version)
        return (key, self._entries[key]) if key in self._entries else None

    def operators(self) -> list[str]:
        """Return the names of ONNX's own operators in it."""
        return sorted({key.op for key in self if not key.domain})

    def __getitem__(self, key: Key) -> Importer:
        return self._entries[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
