"""One batch of training: forward, loss, backward, update."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..layers import fused_layers
from ..spiking import SpikingSite
from ..structures import only_tensor
from ..time_axis import Readout, TimeAxis, Timed, call, carry_state
from .batches import Inputs, batch_axis, takes_frames
from .features import Features, distance, mean_over_time, neurons_of, noted
from .losses import combined
from .mixing import MixedLabels
from .precision import stored_input, widened
from .schedule import Schedule
from .strategies import EverySlice, Strategy


@dataclass(frozen=True)
class Work:
    """A batch as training sees it.

    Attributes:
        inputs: each [N, *F], or [T, N, *F] for event frames.
        labels: [N], mixed ones, or None.
        target: the teacher's outputs, [N, C], or None.
        features: the teacher's activations by path, or None.
        weight: of its loss; the mean over the processes of a group is 1, so that samples count alike.
    """

    inputs: Inputs
    labels: Tensor | MixedLabels | None
    target: Tensor | None
    features: Features | None = None
    weight: float = 1.0


class DivergedError(ArithmeticError):
    """A loss or gradient that is not finite; the weights were not touched by it."""


class Stepper:
    """Trains a network by one batch after the other.

    Args:
        model: the network, spiking or not.
        optimizer: of its parameters.
        schedule: loss, precision and the rest.
        strategy: how the gradient goes through time.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, strategy: Strategy
    ) -> None:
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.time = time_of(model)
        self.events = takes_frames(model)
        self.device = next(model.parameters()).device
        self.steps = strategy.slice_steps(self.time.timesteps) if self.time else 0
        self.strategy = strategy
        self.every_slice = isinstance(strategy.update, EverySlice)
        self.sources = neurons_of(model)
        self.neurons = [
            (name, parameter)
            for module in model.modules()
            if isinstance(module, SpikingSite)
            for name, parameter in module.named_parameters(recurse=False)
        ]

    def __call__(self, work: Work, progress: float = 0.0) -> float:
        """Train by one batch and return its loss.

        Args:
            work: the batch.
            progress: share of the training that is done, 0 to 1.

        Raises:
            DivergedError: if loss or gradient is not finite.
            TrainingError: for labels beyond the outputs.
        """
        slices = self.time.timesteps // self.steps if self.time else 1
        losses = []
        with carry_state(self.model) if slices > 1 else nullcontext():
            for index in range(slices):
                if index == 0 or self.every_slice:
                    self.optimizer.zero_grad(set_to_none=True)
                loss = self._loss(work, index)
                weight = work.weight / (1 if self.every_slice else slices)
                (loss if weight == 1 else loss * weight).backward()
                losses.append(loss.detach())
                if index == slices - 1 or self.every_slice:
                    self._freeze(self.strategy.frozen(progress))
                    self._update(losses)
        return sum(map(float, losses)) / slices

    def _loss(self, work: Work, index: int) -> Tensor:
        per_step = self.schedule.loss.per_step
        inputs = tuple(stored_input(x, self.schedule.precision) for x in work.inputs)
        watched = self.sources if work.features is not None else {}
        precision = self.schedule.precision.autocast(self.device)
        with self.schedule.memory.forward(), precision, fused_layers(self.model), noted(watched) as features:
            if self.time is None:
                returned = self.model(*inputs)
            else:
                if self.events and self.steps < self.time.timesteps:
                    inputs = tuple(x[index * self.steps : (index + 1) * self.steps] for x in inputs)
                with call(self.time, Readout.PER_STEP if per_step else Readout.MEAN, self.steps):
                    returned = self.model(*inputs)
        outputs = only_tensor(returned, "finetune")
        if index == 0:
            _check_classes(work.labels, outputs.shape[-1])
            _check_teacher(work.target, outputs)
        outputs = widened(outputs)
        loss = combined(self.schedule.loss, self.schedule.distillation, outputs, work.labels, work.target)
        if work.features is None or self.schedule.distillation is None:
            return loss
        means = mean_over_time(features, inputs[0].shape[batch_axis(self.model)])
        return loss + self.schedule.distillation.features * distance(means, work.features)

    def _freeze(self, beginnings: tuple[str, ...]) -> None:
        """Drop the gradients of neuron parameters that do not learn yet; the optimiser then passes them over."""
        for name, parameter in self.neurons:
            if name.startswith(beginnings):
                parameter.grad = None

    def _update(self, losses: list[Tensor]) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        for what, value in (*(("loss", loss) for loss in losses), ("gradient", norm)):
            if not torch.isfinite(value):
                raise DivergedError(f"the {what} is {float(value)}")
        if self.schedule.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.schedule.clip_norm, norm)
        self.optimizer.step()


def time_of(model: nn.Module) -> TimeAxis | None:
    """Return the time axis of a spiking network, None for others."""
    return next((module.time for module in model.modules() if isinstance(module, Timed)), None)


def _check_teacher(target: Tensor | None, outputs: Tensor) -> None:
    if target is not None and target.shape[-1] != outputs.shape[-1]:
        raise TrainingError(
            f"the teacher has {target.shape[-1]} outputs and the network {outputs.shape[-1]}; expected the same. Use a "
            "teacher that was trained on the same classes."
        )


def _check_classes(labels: Tensor | MixedLabels | None, classes: int) -> None:
    if labels is None:
        return
    largest = int((labels if isinstance(labels, Tensor) else labels.first).max())
    if largest >= classes:
        raise TrainingError(
            f"a label is {largest} and the network has {classes} outputs; expected labels below that. "
            "Use the data set that the network was made for."
        )
