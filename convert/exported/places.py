"""Where things of an exported program belong in the module tree that it came from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from .calls import Layer

_NEVER_READ = "num_batches_tracked"  # in eval mode


def module_stack(node: fx.Node) -> dict[str, tuple[str, str]]:
    """Return the modules whose forward made ``node``, outermost first: from call to path and type.

    The key tells calls of one module apart. torch.export marks nodes of its own by a stack that names no module.
    """
    stack = node.meta.get("nn_module_stack") or {}
    return {
        key: (re.sub(r"@\d+", "", path), kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}")
        for key, (path, kind) in stack.items()
        if not key.startswith("_empty")
    }


def maker(node: fx.Node) -> tuple[str, str]:
    """Return path and type of the module whose forward made ``node``; empty if torch.export made it."""
    return next(reversed(module_stack(node).values()), ("", ""))


def is_made_by(kind: type[nn.Module], name: str) -> bool:
    """Whether ``name`` is a torch.nn type of the same family as ``kind``."""
    if not name.startswith("torch.nn.modules."):
        return False
    found = getattr(nn, name.rpartition(".")[2], None)
    return isinstance(found, type) and (issubclass(found, kind) or issubclass(kind, found))


def tensors_of(program: ExportedProgram) -> dict[str, Tensor]:
    """Return all parameters, buffers and constants by dotted name; tied ones, which a file splits, are one object."""
    tensors: dict[str, Tensor] = {}
    seen: dict[Any, Tensor] = {}
    for name, value in (*program.state_dict.items(), *program.constants.items()):
        if not isinstance(value, Tensor):
            continue
        kind = isinstance(value, nn.Parameter)
        memory = (value.data_ptr(), value.shape, value.stride(), value.dtype, kind)
        where: Any = memory if _has_memory(value) else id(value)
        tensors[name] = seen.setdefault(where, value)
    return tensors


def _has_memory(value: Tensor) -> bool:
    return value.device.type != "meta" and value.numel() > 0


class Places:
    """The module tree of a program, as far as its names tell: tensors at their names, plain modules above them.

    Args:
        tensors: all tensors, by dotted name.
        nodes: the program's nodes.
        temporary: names of the buffers that a state_dict leaves out.
    """

    def __init__(self, tensors: Mapping[str, Tensor], nodes: Iterable[fx.Node], temporary: Iterable[str]) -> None:
        self.root = nn.Module()
        self.tensors = tensors
        self._temporary = set(temporary)
        self._owned: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            path, _, last = name.rpartition(".")
            self._owned.setdefault(path, {})[last] = tensor
            _register(_container(self.root, path), last, tensor, name not in self._temporary)
        paths = {path for node in nodes for path, _ in module_stack(node).values()}
        self._above = {above for path in (*paths, *self._owned) for above in _ancestors(path)}
        self._taken = paths | self._owned.keys() | self._above
        self._given: set[str] = set()
        self._hosted: dict[str, Layer] = {}

    def place(self, layer: Layer, node: fx.Node, names: Mapping[str, str]) -> str | None:
        """Put the module of ``layer`` into the tree.

        Args:
            layer: what ``node`` becomes.
            node: the node of the program.
            names: of the layer's tensors: from its own name for one to the dotted one.

        Returns:
            Its path; None where the layer is to be a function.
        """
        if layer.tensors:
            return self._host(layer, node, names) if len(names) == len(layer.tensors) else None
        path, kind = maker(node)
        of_module = is_made_by(layer.kind, kind) and path not in self._above and path not in self._owned
        if layer.otherwise is not None and not of_module:
            return None
        if not of_module:
            path = f"{path}.{layer.kind.__name__.lower()}" if path else layer.kind.__name__.lower()
        path = self._unique(path, first=of_module)
        _put(self.root, path, layer.kind(**layer.options))
        return path

    def restore_persistence(self, model: nn.Module) -> None:
        """Take out of the state_dict what was not in it: fx registers every buffer that a graph reads as persistent."""
        for name in self._temporary & {name for name, _ in model.named_buffers()}:
            path, _, last = name.rpartition(".")
            _register(model.get_submodule(path), last, self.tensors[name], persistent=False)

    def _unique(self, wanted: str, *, first: bool) -> str:
        path, count = wanted, 0
        while path in self._given or (path in self._taken and not (first and path == wanted)):
            count += 1
            path = f"{wanted}_{count}"
        self._given.add(path)
        return path

    def _host(self, layer: Layer, node: fx.Node, names: Mapping[str, str]) -> str | None:
        """Find the module that owns just these tensors under just these names, and give it the layer's type."""
        wanted = {own: self.tensors[name] for own, name in names.items()}
        candidates = [maker(node)[0], *(name.rpartition(".")[0] for name in names.values())]
        for path in dict.fromkeys(candidates):
            owned = {own: tensor for own, tensor in self._owned.get(path, {}).items() if own != _NEVER_READ}
            if path in self._above or owned.keys() != wanted.keys():
                continue
            if any(owned[own] is not tensor for own, tensor in wanted.items()):
                continue
            earlier = self._hosted.setdefault(path, layer)
            if (earlier.kind, earlier.options) != (layer.kind, layer.options):
                continue
            if earlier is layer:
                _put(self.root, path, self._filled(layer, path))
            return path
        return None

    def _filled(self, layer: Layer, path: str) -> nn.Module:
        with torch.device("meta"):
            module = layer.kind(**layer.options)
        if _NEVER_READ not in self._owned[path] and _NEVER_READ in module._buffers:
            module.register_buffer(_NEVER_READ, None)
        for own, tensor in self._owned[path].items():
            _register(module, own, tensor, f"{path}.{own}" not in self._temporary)
        return module


def _ancestors(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(len(parts))]


def _container(root: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else ():
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    return root


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    above, _, last = path.rpartition(".")
    parent = _container(root, above)
    parent.add_module(last, module)


def _register(module: nn.Module, name: str, tensor: Tensor, persistent: bool) -> None:
    module._parameters.pop(name, None)
    module._buffers.pop(name, None)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, tensor)
    else:
        module.register_buffer(name, tensor, persistent)
