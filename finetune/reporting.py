"""Who is told of a run: callbacks, logs, and where it is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .checkpoint import Checkpoint, Training
from .history import EpochResult
from .log import Log, LogWriter, OnProgress, Pace, Progress, peak_memory_mb

OnBatch = Callable[[int, int, float], None]
OnEpoch = Callable[[EpochResult], None]


@dataclass(frozen=True)
class Watch:
    """Who is told, and where the run is kept.

    Attributes:
        checkpoint: None keeps nothing.
        on_batch: told (epoch, batch, loss).
        on_epoch: told of each epoch that ends.
        on_progress: told of every batch, with its pace.
        logs: that note batches and epochs.
    """

    checkpoint: Checkpoint | None = None
    on_batch: OnBatch | None = None
    on_epoch: OnEpoch | None = None
    on_progress: OnProgress | None = None
    logs: Sequence[Log] = ()


class Reporter:
    """Tells everyone that watches a stage.

    Args:
        stage: its name.
        epochs: of the stage.
        batches: of an epoch.
        device: whose memory counts.
        watch: the callbacks.
        writers: open logs.
    """

    def __init__(
        self, stage: str, epochs: int, batches: int, device: torch.device, watch: Watch, writers: Sequence[LogWriter]
    ) -> None:
        self.stage, self.epochs, self.batches = stage, epochs, batches
        self.device, self.watch, self.writers = device, watch, writers
        self.pace = Pace()

    def start(self, training: Training) -> None:
        """Tell the logs from where the run goes on."""
        for writer in self.writers:
            writer.start(self.stage, training.position())

    def batch(self, training: Training, loss: float, images: int) -> None:
        """Tell of the batch that ended."""
        self.pace.add(images)
        batch = training.batch - 1
        if self.watch.on_batch is not None:
            self.watch.on_batch(training.epoch, batch, loss)
        if self.watch.on_progress is None and not self.writers:
            return
        progress = Progress(
            stage=self.stage,
            epoch=training.epoch,
            epochs=self.epochs,
            batch=batch,
            batches=self.batches,
            loss=loss,
            lr=training.optimizer.param_groups[0]["lr"],
            images_per_second=self.pace.images_per_second,
            seconds_left=self.pace.left(self.epochs * self.batches - training.epoch * self.batches - training.batch),
            memory_mb=peak_memory_mb(self.device),
        )
        for writer in self.writers:
            writer.batch(progress)
        if self.watch.on_progress is not None:
            self.watch.on_progress(progress)

    def epoch(self, result: EpochResult) -> None:
        """Tell of the epoch that ended."""
        for writer in self.writers:
            writer.epoch(self.stage, result)
        if self.watch.on_epoch is not None:
            self.watch.on_epoch(result)
