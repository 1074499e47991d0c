"""Parameters by kind, their learning rates, and the moving average of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..qcfs import QCFS
from ..spiking import SpikingSite
from .schedule import Schedule


def neuron_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return θ, v_init, λ and μ of every site, and θ of every QCFS activation."""
    return [
        parameter
        for module in model.modules()
        if isinstance(module, (SpikingSite, QCFS))
        for parameter in module.parameters(recurse=False)
    ]


def optimiser(model: nn.Module, schedule: Schedule) -> torch.optim.SGD:
    """Return SGD with the weights, the biases and gains, and the neurons' parameters as groups of their own."""
    neurons = neuron_parameters(model)
    known = {id(p) for p in neurons}
    others = [p for p in model.parameters() if id(p) not in known and p.requires_grad]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "lr": schedule.lr, "weight_decay": schedule.weight_decay},
        {"params": [p for p in others if p.ndim <= 1], "lr": schedule.lr, "weight_decay": 0.0},
        {"params": neurons, "lr": schedule.neuron_lr, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [{**group, "base_lr": group["lr"]} for group in groups], lr=schedule.lr, momentum=schedule.momentum
    )


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to its base times a factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def momenta(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the momentum of every parameter that has one, by name."""
    found = {name: optimizer.state.get(p, {}).get("momentum_buffer") for name, p in model.named_parameters()}
    return {name: value for name, value in found.items() if value is not None}


def set_momenta(model: nn.Module, optimizer: torch.optim.Optimizer, values: Mapping[str, Tensor]) -> None:
    """Give parameters the momentum that :func:`momenta` returned."""
    for name, parameter in model.named_parameters():
        if name in values:
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(values[name])


class Average:
    """The moving average of a network's tensors (:class:`EMA`).

    Args:
        model: whose present tensors it starts from.
        decay: d.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = copied(model)

    @torch.no_grad()
    def update(self, model: nn.Module, count: int) -> None:
        """Take in the tensors after ``count`` batches."""
        decay = min(self.decay, (1 + count) / (10 + count))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                self.values[name].lerp_(tensor, 1 - decay)
            else:
                self.values[name].copy_(tensor)

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Let the network have the average inside this block."""
        own = copied(model)
        model.load_state_dict(self.values)
        try:
            yield
        finally:
            model.load_state_dict(own)


def copied(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all tensors of a network."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
