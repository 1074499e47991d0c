"""How a network is trained, as one frozen value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..arguments import check_kind, refuse
from ..errors import ArgumentError
from ..surrogates import Surrogate
from .batch_norm import BatchNormMode, FrozenBatchNorm, LiveBatchNorm, SyncedBatchNorm
from .losses import CrossEntropy, Distillation, Loss
from .memory import KeepAll, Memory, Recompute
from .mixing import Mix
from .precision import BFloat16, Float32, Precision


@dataclass(frozen=True)
class EMA:
    """The network that comes out is the moving average of the weights: after every batch a ← d a + (1 − d) w.

    In the first batches d = (1 + n)/(10 + n), so that the start is forgotten. BatchNorm's statistics are averaged too.
    Validation measures the average.

    Attributes:
        decay: d, above 0 and below 1.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise ArgumentError(f"EMA: decay is {self.decay}; expected a number between 0 and 1, such as 0.999.")


@dataclass(frozen=True)
class EarlyStopping:
    """Stop when the accuracy on the validation batches has not risen for a while, and keep the best epoch's weights.

    Attributes:
        patience: epochs without a rise before training stops.
        least: what counts as a rise, in accuracy as a fraction of 1.
    """

    patience: int = 5
    least: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            raise ArgumentError(f"EarlyStopping: patience is {self.patience!r}; expected a whole number of at least 1.")
        if not 0 <= self.least < 1:
            raise ArgumentError(f"EarlyStopping: least is {self.least}; expected a fraction of 1, such as 0.001.")

    def best(self, accuracies: Sequence[float]) -> int:
        """Return the index of the epoch to keep.

        >>> EarlyStopping(least=0.01).best([0.8, 0.805, 0.9, 0.9])
        2
        """
        best = 0
        for index, accuracy in enumerate(accuracies):
            if accuracy > accuracies[best] + self.least:
                best = index
        return best

    def over(self, accuracies: Sequence[float]) -> bool:
        """Whether training stops after these epochs.

        >>> EarlyStopping(patience=2).over([0.8, 0.9, 0.9]), EarlyStopping(patience=2).over([0.8, 0.9, 0.9, 0.9])
        (False, True)
        """
        return bool(accuracies) and len(accuracies) - 1 - self.best(accuracies) >= self.patience


@dataclass(frozen=True)
class Schedule:
    """How a network is trained.

    Attributes:
        epochs: passes over the training data.
        lr: learning rate of the weights: up to it in ``warmup_steps``, then half a cosine down to 0.
        neuron_lr: the same for θ, v_init, λ, μ.
        momentum: of SGD.
        weight_decay: of the weights; neuron parameters and BatchNorm have none.
        clip_norm: bound on the norm of the gradient, or None.
        loss: :class:`CrossEntropy` or :class:`TET`.
        distillation: used when there is a teacher; None learns from the labels alone.
        seed: of dropout, of mixing, and of loaders that draw from the global random state.
        warmup_steps: batches in which the rates rise linearly. A trained network that starts at the full rate is thrown
            back.
        mixing: ways to mix the images of a batch, such as ``(Mixup(), CutMix())``; one is drawn for each batch. A
            teacher is shown the mixed images; labels are mixed in the loss.
        ema: average the weights, or None.
        early_stopping: stop when validation does not improve, or None.
        precision: ``Float32()`` or ``BFloat16()``.
        memory: ``KeepAll()``, or ``Recompute()``: less memory for more time, and the same weights.
        batch_norm: ``LiveBatchNorm()``, ``FrozenBatchNorm()``, or ``SyncedBatchNorm()`` over the processes of a group.
        surrogate: ds/du while this training runs, such as ``Triangle(2.0)``; None takes the neurons' own.
    """

    epochs: int
    lr: float = 0.02
    neuron_lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip_norm: float | None = 5.0
    loss: Loss = field(default_factory=CrossEntropy)
    distillation: Distillation | None = field(default_factory=Distillation)
    seed: int = 0
    warmup_steps: int = 0
    mixing: tuple[Mix, ...] = ()
    ema: EMA | None = None
    early_stopping: EarlyStopping | None = None
    precision: Precision = field(default_factory=Float32)
    memory: Memory = field(default_factory=KeepAll)
    batch_norm: BatchNormMode = field(default_factory=LiveBatchNorm)
    surrogate: Surrogate | None = None

    def __post_init__(self) -> None:
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 1:
            raise ArgumentError(f"epochs is {self.epochs!r}; expected a whole number of at least 1.")
        if not (0 < self.lr < math.inf and 0 <= self.neuron_lr < math.inf):
            raise ArgumentError(f"lr {self.lr} and neuron_lr {self.neuron_lr} came; expected lr > 0, neuron_lr ≥ 0.")
        if not (0 <= self.momentum < 1 and 0 <= self.weight_decay < math.inf):
            raise ArgumentError(
                f"momentum {self.momentum} and weight_decay {self.weight_decay} came; expected momentum from 0 to "
                "below 1, weight_decay ≥ 0."
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ArgumentError(f"clip_norm is {self.clip_norm}; expected a norm above 0, or None to clip nothing.")
        if isinstance(self.warmup_steps, bool) or not isinstance(self.warmup_steps, int) or self.warmup_steps < 0:
            raise ArgumentError(f"warmup_steps is {self.warmup_steps!r}; expected a whole number of batches.")
        if isinstance(self.loss, type) or not (callable(self.loss) and hasattr(self.loss, "per_step")):
            raise refuse("loss", self.loss, "a loss that says per_step", "Pass CrossEntropy() or TET().")
        if self.distillation is not None:
            check_kind("distillation", self.distillation, Distillation, "Distillation()", "None")
        if not isinstance(self.mixing, tuple) or any(isinstance(way, type) or not callable(way) for way in self.mixing):
            raise refuse("mixing", self.mixing, "a tuple of ways to mix", "Pass (Mixup(), CutMix()), or (Mixup(),).")
        if self.ema is not None:
            check_kind("ema", self.ema, EMA, "EMA()", "None")
        if self.early_stopping is not None:
            check_kind("early_stopping", self.early_stopping, EarlyStopping, "EarlyStopping()", "None")
        check_kind("precision", self.precision, (Float32, BFloat16), "Float32()", "BFloat16()")
        check_kind("memory", self.memory, (KeepAll, Recompute), "KeepAll()", "Recompute()")
        kinds = (LiveBatchNorm, FrozenBatchNorm, SyncedBatchNorm)
        check_kind("batch_norm", self.batch_norm, kinds, "LiveBatchNorm()", "FrozenBatchNorm()")
        if self.surrogate is not None and (isinstance(self.surrogate, type) or not callable(self.surrogate)):
            raise refuse("surrogate", self.surrogate, "a surrogate or None", "Pass Triangle(2.0), say.")

    @property
    def distils_features(self) -> bool:
        """Whether the teacher's activations are distilled too."""
        return self.distillation is not None and self.distillation.features > 0

    def rate(self, step: int, batches: int) -> float:
        """Return the factor on every learning rate for one batch.

        Args:
            step: batches done before it.
            batches: of an epoch.

        >>> schedule = Schedule(epochs=2, warmup_steps=4)
        >>> [round(schedule.rate(step, 10), 3) for step in (0, 3, 10, 20)]
        [0.25, 0.946, 0.5, 0.0]
        """
        epoch, batch = divmod(step, batches)
        cosine = 0.5 * (1 + math.cos(math.pi * ((epoch + batch / batches) / self.epochs)))
        return cosine * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else cosine
