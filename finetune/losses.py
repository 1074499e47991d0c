"""Losses over time. Each is a frozen type that says which outputs it reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError
from .mixing import MixedLabels


class Loss(Protocol):
    """What every loss offers.

    Attributes:
        per_step: whether it reads every step's output instead of the mean; a property of the type.
    """

    per_step: ClassVar[bool]

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return a scalar from outputs [N, C], or [T, N, C] if ``per_step``, and labels [N]."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of the mean output over time, the paper's loss.

    Attributes:
        label_smoothing: share of the target that is spread evenly over all classes.
    """

    label_smoothing: float = 0.0
    per_step: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            raise ArgumentError(f"CrossEntropy: label_smoothing is {self.label_smoothing}; expected 0 to 1.")

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the batch; outputs [N, C], labels [N]."""
        return F.cross_entropy(outputs, labels, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class TET:
    """Temporal efficient training (Deng et al., ICLR 2022): (1 − λ) mean_t CE(O[t], y) + λ mean_t (O[t] − φ)².

    Attributes:
        weight: λ, the share of the regulariser that pulls every output to φ.
        target: φ, in the unit of the logits.
    """

    weight: float = 0.05
    target: float = 1.0
    per_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ArgumentError(f"TET: weight is {self.weight}; expected 0 to 1.")

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss; outputs [T, N, C], labels [N]."""
        each = F.cross_entropy(outputs.flatten(0, 1), labels.repeat(len(outputs)))
        return (1 - self.weight) * each + self.weight * (outputs - self.target).square().mean()


@dataclass(frozen=True)
class Distillation:
    """Kullback-Leibler divergence to a teacher's softened classes (Hinton et al. 2015), τ² KL(teacher ‖ student).

    Attributes:
        weight: share of the whole loss, the rest goes to the labels.
        temperature: τ.
        features: weight of the features' share, which is added: the mean over layers of ‖r − a‖²/‖a‖² between the mean
            outputs r of the neurons and the teacher's activations a. It needs a teacher with a module at the path of
            every neuron, such as ``conversion.prepared.model``.
    """

    weight: float = 0.9
    temperature: float = 2.0
    features: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.features < math.inf:
            raise ArgumentError(f"Distillation: features is {self.features}; expected a weight of at least 0.")
        if not (0 <= self.weight <= 1 and self.temperature > 0):
            raise ArgumentError(
                f"Distillation: weight {self.weight} and temperature {self.temperature} came; expected a weight from "
                "0 to 1 and a temperature above 0."
            )

    def __call__(self, outputs: Tensor, teacher: Tensor) -> Tensor:
        """Return the divergence; outputs and teacher [N, C]."""
        student = F.log_softmax(outputs / self.temperature, 1)
        target = F.log_softmax(teacher / self.temperature, 1)
        return self.temperature**2 * F.kl_div(student, target, reduction="batchmean", log_target=True)


def combined(
    loss: Loss,
    distillation: Distillation | None,
    outputs: Tensor,
    labels: Tensor | MixedLabels | None,
    teacher: Tensor | None,
) -> Tensor:
    """Return the whole loss of a batch: labels, teacher, or both by ``distillation.weight``."""
    mean = outputs.mean(0) if loss.per_step else outputs
    if teacher is None or distillation is None:
        if labels is None:
            raise ArgumentError("finetune: the batches have no labels and no teacher= was given; expected one of them.")
        return _hard(loss, outputs, labels)
    if labels is None:
        return distillation(mean, teacher)
    hard = _hard(loss, outputs, labels) if distillation.weight < 1 else torch.zeros((), device=mean.device)
    return (1 - distillation.weight) * hard + distillation.weight * distillation(mean, teacher)


def _hard(loss: Loss, outputs: Tensor, labels: Tensor | MixedLabels) -> Tensor:
    if isinstance(labels, Tensor):
        return loss(outputs, labels)
    return labels.share * loss(outputs, labels.first) + (1 - labels.share) * loss(outputs, labels.second)
