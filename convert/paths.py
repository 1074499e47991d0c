"""Names for modules that the passes add."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

TIME = "time"
"""The folder that the modules of a spiking network that know of time lie in."""
OF_GRAPHS = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))
"""The names that a graph has for itself and for being a module."""
RESERVED = OF_GRAPHS - frozenset(dir(nn.Module()))
"""What no part of a network can be called, as a graph has it for itself."""


def unique_path(model: nn.Module, wanted: str) -> str:
    """Return ``wanted``, or the first of ``wanted_1``, ``wanted_2``, … that names nothing in ``model``."""
    path, count = wanted, 0
    while _names_something(model, path):
        count += 1
        path = f"{wanted}_{count}"
    return path


def _names_something(model: nn.Module, path: str) -> bool:
    current: Any = model
    for part in path.split("."):
        if not hasattr(current, part):
            return False
        current = getattr(current, part)
    return True
