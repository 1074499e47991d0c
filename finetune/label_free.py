"""Distillation without labels: the whole spiking network learns from the ANN that it was made of.

ANN → quantised network, distilled → its spiking network, corrected towards it → distilled through the spikes

A quantised network with L = T loses only what clipping and rounding cost, and an epoch of it costs an epoch of the ANN.
Corrections then win back most of what the order of spikes costs; they aim at the quantised network and not at the ANN,
which no network of so few levels can follow. The last stage learns the rest through time. BatchNorm keeps the ANN's
statistics throughout, as those of some hundred images are worse. Order and composition are ours.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import Tensor

from ..arguments import check_kind, split_batch
from ..calibrate import USUAL_CORRECTIONS, Correction, Reconstruction, changes
from ..calibrate.correct import own_copy
from ..convert import Conversion, refine
from ..convert.refine import check_has_weights, replayed
from ..errors import ArgumentError
from ..records import FROM_QCFS
from ..structures import each_shape, input_count
from .batch_norm import FrozenBatchNorm
from .batches import EpochBatches, Feed, check_training_data
from .hybrid import calibrated, corrected, over_frames, qcfs_network
from .log import Log, OnProgress, Progress
from .losses import Distillation
from .mixing import CutMix, Mix, Mixup
from .precision import Float32, Precision
from .reporting import Watch
from .schedule import Schedule
from .strategies import STBP
from .trainer import fit_stage

LONGEST_WARMUP = 50
TIMED_BATCHES = 4
"""The first of them pays for compilation and is not counted."""


@dataclass(frozen=True)
class LabelFree:
    """How :func:`distill` trains. Its rates are for batches of 64 images.

    Attributes:
        epochs: passes over the images through the spikes; 0 leaves that stage out.
        qcfs_epochs: passes with QCFS in the place of the neurons; 0 leaves that stage out.
        corrections: of the spiking network, towards the quantised one.
        reconstruction: after the corrections, towards the same; None leaves it out.
        lr: learning rate of the weights through the spikes.
        qcfs_lr: learning rate of the weights in the quantised network.
        neuron_lr: learning rate of θ, v_init, λ and μ.
        temperature: of the distillation.
        precision: ``Float32()`` or ``BFloat16()``.
        seed: of mixing; the order of the images is the data's.
    """

    epochs: int = 20
    qcfs_epochs: int = 60
    corrections: tuple[Correction, ...] = USUAL_CORRECTIONS
    reconstruction: Reconstruction | None = None
    lr: float = 0.005
    qcfs_lr: float = 0.01
    neuron_lr: float = 0.001
    temperature: float = 2.0
    precision: Precision = field(default_factory=Float32)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.qcfs_epochs < 0 or self.epochs + self.qcfs_epochs < 1:
            raise ArgumentError(f"{self}: expected at least one epoch, and none below 0.")

    def schedule(self, epochs: int, lr: float, batches: int, mixing: tuple[Mix, ...]) -> Schedule:
        """Return how a stage is trained whose epochs have so many batches."""
        return Schedule(
            epochs=epochs,
            lr=lr,
            neuron_lr=self.neuron_lr,
            weight_decay=0.0,
            distillation=Distillation(weight=1.0, temperature=self.temperature),
            seed=self.seed,
            warmup_steps=min(LONGEST_WARMUP, epochs * batches // 5),
            mixing=mixing,
            precision=self.precision,
            batch_norm=FrozenBatchNorm(),
        )


@dataclass(frozen=True)
class Unlabelled:
    """Batches without their labels, several epochs of them."""

    source: EpochBatches
    inputs: int

    def at_epoch(self, epoch: int) -> _InputsAlone:
        """Return the inputs of an epoch's batches."""
        return _InputsAlone(self.source.at_epoch(epoch), self.inputs)


@dataclass(frozen=True)
class _InputsAlone:
    """The inputs of batches, as many as there are."""

    batches: Iterable[Any]
    inputs: int

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in self.batches:
            yield split_batch("distill: data", batch, self.inputs)[0]

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def distill(
    conversion: Conversion,
    data: EpochBatches | Iterable[Any],
    settings: LabelFree | None = None,
    *,
    still: Iterable[Any] | Tensor | None = None,
    on_progress: OnProgress | None = None,
    logs: tuple[Log, ...] = (),
) -> Conversion:
    """Train a conversion to give its ANN's outputs, on images without labels.

    Args:
        conversion: from :func:`lmh.convert.convert`; not changed. The quantised network starts from the ANN, so what
            made it better before is kept only with ``qcfs_epochs=0``.
        data: batches [N, *F], or (x, y) of which y is not read; several epochs of an augmented loader, such as
            :class:`lmh.zoo.Batches`, or any that can be read again and again.
        settings: epochs, rates, and what comes between the stages.
        still: the images that thresholds and corrections are found on, as one tensor or batches; those of ``data``
            unless given. Pass them without augmentation.
        on_progress: told of every batch of both stages.
        logs: ``JSONLines(file)``, ``TensorBoard(folder)``.

    Returns:
        A conversion whose calibration names all that was done and holds every tensor that changed: with it as
        ``calibration=``, ``convert`` builds this network again.

    Raises:
        ArgumentError: for data that is no batches or can be read only once.
        TrainingError: if the loss is not finite, or the data is empty.

    >>> import torch
    >>> from torch import nn
    >>> from lmh.convert import convert
    >>> images, ann = torch.rand(64, 8), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> conversion = distill(convert(ann, 2, data=images), [images], LabelFree(epochs=2, qcfs_epochs=2))
    >>> again = convert(ann, 2, data=images, calibration=conversion.calibration)
    >>> torch.equal(again.snn(images), conversion.snn(images))
    True
    """
    settings = LabelFree() if settings is None else settings
    check_kind("distill: conversion", conversion, Conversion, "what convert returned")
    check_has_weights("distill", conversion)
    check_kind("distill: settings", settings, LabelFree, "LabelFree(epochs=20)")
    check_training_data(data, None)
    prepared, recipe = conversion.prepared, conversion.recipe
    feed = Feed.of(data, settings.seed, over_frames(prepared.model, recipe))
    images = list(feed.epoch(0)) if still is None else still
    train = Unlabelled(feed.source, input_count(prepared.model))
    images_only = all(len(shape) == 3 for shape in each_shape(recipe.sample_shape))
    mixing: tuple[Mix, ...] = (Mixup(), CutMix()) if images_only else (Mixup(),)
    batches = feed.count()
    watch = Watch(on_progress=on_progress, logs=logs)
    corrections, reconstruction = settings.corrections, settings.reconstruction
    if settings.qcfs_epochs:
        calibration = calibrated(prepared, recipe, images)
        network = qcfs_network(prepared, calibration, recipe.timesteps)
        schedule = settings.schedule(settings.qcfs_epochs, settings.qcfs_lr, batches, mixing)
        fit_stage("QCFS", over_frames(network, recipe), train, None, schedule, STBP(), prepared.model, watch)
        found = corrected(network, conversion, images, corrections, reconstruction)
        quantised = f"{calibration.policy} + QCFS({settings.qcfs_epochs} epochs)"
        done = found.calibration.policy.replace(FROM_QCFS, quantised, 1)
    else:
        found = refine(conversion, images, corrections=corrections, reconstruction=reconstruction)
        done = found.calibration.policy
    snn = own_copy(found.snn)
    if settings.epochs:
        schedule = settings.schedule(settings.epochs, settings.lr, batches, mixing)
        fit_stage("STBP", snn, train, None, schedule, STBP(), prepared.model, watch)
        done += f" + STBP({settings.epochs} epochs)"
    return replayed(conversion, changes(snn, prepared, done, found.calibration.samples))


def seconds_per_epoch(conversion: Conversion, data: EpochBatches | Iterable[Any]) -> tuple[float, float]:
    """Time a few batches of :func:`distill`, on copies; return the seconds of an epoch, quantised and through spikes.

    Args:
        conversion: not changed.
        data: as for :func:`distill`.

    >>> import torch
    >>> from torch import nn
    >>> from lmh.convert import convert
    >>> images, ann = torch.rand(64, 8), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> quantised, spiking = seconds_per_epoch(convert(ann, 2, data=images), images.split(16))
    >>> quantised > 0 and spiking > 0
    True
    """
    feed = Feed.of(data, 0, over_frames(conversion.prepared.model, conversion.recipe))
    ends: dict[str, list[float]] = {"QCFS": [], "STBP": []}

    def note(progress: Progress) -> None:
        ends[progress.stage].append(time.perf_counter())

    few = list(islice(feed.epoch(0), TIMED_BATCHES))
    few += few[-1:] * (TIMED_BATCHES - len(few))
    distill(conversion, few, LabelFree(epochs=1, qcfs_epochs=1, corrections=()), on_progress=note)
    batches = feed.count()
    quantised, spiking = (batches * (times[-1] - times[0]) / (len(times) - 1) for times in ends.values())
    return quantised, spiking
