"""Readable, stable and unique module paths from the names that an ONNX file holds."""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Iterable

from onnx import NodeProto

from ..paths import OF_GRAPHS

_WEIGHT = re.compile(r"([A-Za-z_0-9]\w*(?:\.\w+)*)\.weight")


def identifier(name: str) -> str:
    """Return a name as a Python identifier."""
    found = re.sub(r"\W+", "_", name).strip("_") or "value"
    return f"{found}_" if keyword.iskeyword(found) else f"_{found}" if found[0].isdigit() else found


def path_of_weight(name: str) -> str | None:
    """Return the module path that a weight's name shows: ``layer1.0.conv1`` of ``layer1.0.conv1.weight``."""
    found = _WEIGHT.fullmatch(name)
    return found.group(1) if found else None


def path_of_constant(name: str) -> str:
    """Return a path for a parameter or buffer of this name."""
    return _sanitised([part for part in re.split(r"[./]", name) if part]) or "constant"


def path_of_node(node: NodeProto) -> str:
    """Return the module path that a node's name or its exporter's notes show.

    torch's newer exporter notes the modules around a node (``['', 'layer1', 'layer1.0', 'layer1.0.relu', 'relu_1']``);
    the older one puts them into the name (``/layer1/layer1.0/relu/Relu``).
    """
    scopes = _noted_scopes(node)
    if len(scopes) > 1:
        return _sanitised((scopes[-2] or scopes[-1]).split(".")) or node.op_type.lower()
    parts = [part for part in node.name.split("/") if part]
    if parts and re.fullmatch(rf"{re.escape(node.op_type)}(_\d+)?", parts[-1]):
        last = parts.pop()
        if not parts:
            return last.lower()
    nested: list[str] = []
    for part in parts:
        if nested and part.startswith(f"{nested[-1]}."):
            nested[-1] = part
        else:
            nested.append(part)
    return _sanitised(".".join(nested).split(".")) or node.op_type.lower()


def _noted_scopes(node: NodeProto) -> list[str]:
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            try:
                scopes = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError):
                return []
            return [str(scope) for scope in scopes] if isinstance(scopes, list) else []
    return []


def _sanitised(parts: list[str]) -> str:
    cleaned = [re.sub(r"\W+", "_", part).strip("_") for part in parts]
    return ".".join(f"{part}_" if part in OF_GRAPHS else part for part in cleaned if part)


class Paths:
    """The module paths of one network, each given out once.

    Args:
        known: paths that will be wanted, so that what lies around them is not given to a module.

    >>> paths = Paths()
    >>> paths.claim("layer1.0.relu"), paths.claim("layer1.0.relu"), paths.claim("layer1.0.relu.pad")
    ('layer1.0.relu', 'layer1.0.relu_1', 'layer1.0.relu_pad')
    """

    def __init__(self, known: Iterable[str] = ()) -> None:
        self._leaves: set[str] = set()
        self._folders: set[str] = set()
        for path in known:
            self._enter(path)

    def _enter(self, path: str) -> None:
        parts = path.split(".")
        self._folders.update(".".join(parts[:length]) for length in range(1, len(parts)))

    def inside(self, path: str, name: str) -> str:
        """Return ``path``, or a path for ``name`` in it if it holds other modules: a function's place in a forward."""
        return f"{path}.{name}" if path in self._folders else path

    def is_taken(self, path: str) -> bool:
        """Whether a module or constant has this path already."""
        return path in self._leaves

    def claim(self, wanted: str) -> str:
        """Return ``wanted`` or the nearest path that is free; nothing is ever put inside a leaf."""
        base = ""
        for part in wanted.split("."):
            base = f"{base}_{part}" if base in self._leaves else f"{base}.{part}" if base else part
        path, count = base, 0
        while path in self._leaves or path in self._folders:
            count += 1
            path = f"{base}_{count}"
        self._leaves.add(path)
        self._enter(path)
        return path
