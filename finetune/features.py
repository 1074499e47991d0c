"""Distillation of features: the mean outputs of a network's neurons beside its teacher's activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from .history import bare_modules, neurons_of
from .precision import widened

Features = dict[str, Tensor]


def counterparts(network: nn.Module, teacher: nn.Module) -> dict[str, nn.Module]:
    """Return the teacher's module at the path of each of the network's neurons.

    Raises:
        ArgumentError: if there is none.
    """
    known, wanted = bare_modules(teacher), neurons_of(network)
    missing = [path for path in wanted if path not in known]
    if missing:
        raise ArgumentError(
            f"Distillation: features were asked for and the teacher has no module {missing[0]}, one of {len(missing)}; "
            "expected one at the path of every neuron. Pass conversion.prepared.model as teacher, the ANN in that form."
        )
    return {path: known[path] for path in wanted}


@contextmanager
def noted(modules: Mapping[str, nn.Module]) -> Iterator[Features]:
    """Note the output of each module inside this block, by path."""
    found: Features = {}

    def note(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            found[path] = output

        return hook

    with ExitStack() as stack:
        for path, module in modules.items():
            stack.callback(module.register_forward_hook(note(path)).remove)
        yield found


def mean_over_time(features: Features, batch: int) -> Features:
    """Return features [T·N, *F], or [N, *F], as means over T, in float32 where they were 16 bits wide."""
    found = {}
    for path, value in features.items():
        wide = widened(value)
        found[path] = wide if len(wide) == batch else wide.unflatten(0, (-1, batch)).mean(0)
    return found


def distance(features: Features, teacher: Features) -> Tensor:
    """Return the mean over layers of ‖r − a‖²/‖a‖², r a layer's mean output and a the teacher's activation.

    Raises:
        ArgumentError: if they are of another shape.

    >>> distance({"a": torch.tensor([[1.0, 0.0]])}, {"a": torch.tensor([[1.0, 1.0]])})
    tensor(0.5000)
    """
    parts = []
    for path, value in features.items():
        target = teacher[path]
        if value.shape != target.shape:
            raise ArgumentError(
                f"Distillation: {path} gives {list(value.shape)} and the teacher's {list(target.shape)}; expected the "
                "same. Pass conversion.prepared.model as teacher, the ANN in that form."
            )
        parts.append((value - target).square().sum() / target.square().sum().clamp_min(1e-12))
    return torch.stack(parts).mean()
