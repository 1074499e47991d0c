"""What ``lmh-convert`` does after the thresholds without labels: what was named, or the best of what ``auto`` tries."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click
import torch
import torch.nn.functional as F
from torch import nn

from ..arena import train_in_arena
from ..arguments import split_batch
from ..calibrate import USUAL_CORRECTIONS, BlockResult, Correction, Reconstruction, blocks
from ..calibrate.cost import Cost, correction_cost
from ..errors import LMHError
from ..structures import only_tensor
from ..terminal import Advance, Terminal
from ..zoo.images import Batches
from .calibration_cli import CORRECTIONS
from .pipeline import Conversion
from .refine import refine

if TYPE_CHECKING:
    from ..finetune import LabelFree, Progress

QCFS_EPOCHS = 3
"""Epochs of the quantised network for each through the spikes; at T = 4 about as long."""
HELD_OUT = 8
"""One calibration sample in so many decides what ``auto`` keeps."""
MOST_EPOCHS = 60
"""Through the spikes, however long the budget is."""
OPERATIONS_PER_MINUTE = 4e12
"""What corrections may cost without a budget, and with one for each minute; two cores take about that long."""
MEMORY = 4e9
"""Bytes that ``auto`` corrects in; above them a named correction gives a warning."""
LEAST_SAMPLES = 16
BATCH = 64
LEAST_BATCH = 16


@dataclass(frozen=True)
class Images:
    """Training images without their labels.

    Attributes:
        still: as they are.
        train: the same ones, augmented and in another order each epoch.
    """

    still: Batches
    train: Batches

    @classmethod
    def of(cls, still: Batches, train: Batches, timesteps: int) -> Images:
        """Return the calibration samples with the augmentation of the training batches; fewer at once for larger T."""
        pixels = still.preprocessing.input_size[1] * still.preprocessing.input_size[2]
        size = max(LEAST_BATCH, min(BATCH, 2**19 // (timesteps * pixels)))
        return cls(still, replace(train, indices=still.indices, batch_size=size))

    def parted(self) -> tuple[Images, Batches]:
        """Return most of the images, and the others, held out."""
        assert self.still.indices is not None
        most, last = self.still.indices.tensor_split([len(self.still.indices) * (HELD_OUT - 1) // HELD_OUT])
        seen = Images(replace(self.still, indices=most), replace(self.train, indices=most))
        return seen, replace(self.still, indices=last)


@dataclass(frozen=True)
class LabelFreeWork:
    """What was asked for after the thresholds.

    Attributes:
        corrections: layer by layer.
        reconstruct: steps for each block.
        distill: epochs through the spikes.
        budget: minutes for ``auto``; None leaves distillation out.
        auto: whether nothing was named, and no training with labels follows: that starts better from the thresholds.
        seed: of what is drawn.
    """

    corrections: tuple[Correction, ...]
    reconstruct: int
    distill: int
    budget: float | None
    auto: bool
    seed: int

    @classmethod
    def of(cls, options: dict[str, Any], seed: int) -> LabelFreeWork:
        """Take it out of a command's options.

        Raises:
            click.UsageError: for options that exclude each other.
        """
        corrections = tuple(CORRECTIONS[name] for name in options.pop("corrections"))
        reconstruct, distill, budget = (options.pop(name) for name in ("reconstruct", "distill", "budget"))
        if options["epochs"] and (distill or budget is not None):
            raise click.UsageError(
                "--finetune trains from the ANN with labels, and --distill or --budget without them. Leave one out."
            )
        if distill and options["calibration"]:
            raise click.UsageError(
                "--distill trains a quantised network first, whose thresholds MinError finds, so that --calibration "
                "would not count. Leave one out."
            )
        auto = not (options["calibration"] or corrections or reconstruct or distill or options["epochs"])
        if budget is not None and not auto:
            raise click.UsageError(
                "--budget lets auto choose what to do, and --calibration, --correct, --reconstruct or --distill came "
                "with it. Leave out --budget, or those."
            )
        return cls(corrections, reconstruct, distill, budget, auto, seed)

    @property
    def needing_data(self) -> Mapping[str, object]:
        """Return the options that work on images, with what was asked for."""
        return {
            "--correct": self.corrections,
            "--reconstruct": self.reconstruct,
            "--distill": self.distill,
            "--budget": self.budget,
        }

    def run(self, conversion: Conversion, images: Images, terminal: Terminal) -> Conversion:
        """Return the conversion after all that."""
        if self.auto:
            return _Automatic(images, self.budget, self.seed, terminal).best(conversion)
        reconstruction = Reconstruction(steps=self.reconstruct, seed=self.seed) if self.reconstruct else None
        if self.distill:
            settings = _settings(self.distill, QCFS_EPOCHS * self.distill, images, self.seed)
            settings = replace(
                settings, corrections=self.corrections or settings.corrections, reconstruction=reconstruction
            )
            return _distilled(conversion, images, settings, terminal)
        if self.corrections:
            conversion = _corrected(conversion, images, self.corrections, terminal)
        return _reconstructed(conversion, images, reconstruction, terminal) if reconstruction else conversion


def _settings(epochs: int, qcfs_epochs: int, images: Images, seed: int) -> LabelFree:
    from ..finetune import LabelFree

    usual, share = LabelFree(), images.train.batch_size / BATCH
    return LabelFree(epochs, qcfs_epochs, lr=usual.lr * share, qcfs_lr=usual.qcfs_lr * share, seed=seed)


def _corrected(
    conversion: Conversion, images: Images, corrections: tuple[Correction, ...], terminal: Terminal
) -> Conversion:
    memory = _cost(conversion, images).memory
    if memory > MEMORY:
        terminal.notice(
            f"Correcting keeps some {memory / 1e9:.0f} GB of activations of {images.still.count} samples in memory; "
            "--calibration-samples takes fewer."
        )
    with terminal.stage("correcting layer by layer", None):
        return refine(conversion, images.still, corrections=corrections)


def _cost(conversion: Conversion, images: Images) -> Cost:
    sample = torch.zeros((1, *images.still.preprocessing.input_size), device=next(conversion.snn.parameters()).device)
    return correction_cost(conversion.prepared, [sample], images.still.count, conversion.recipe.timesteps)


def _reconstructed(
    conversion: Conversion, images: Images, reconstruction: Reconstruction, terminal: Terminal
) -> Conversion:
    train_in_arena(terminal)
    with terminal.stage("reconstructing", len(blocks(conversion.prepared))) as advance:

        def on_block(result: BlockResult) -> None:
            advance(1, "")
            change = f"error {result.before:.4f} to {result.after:.4f}"
            terminal.notice(f"block up to {result.block.sites[-1]}: {change}")

        return refine(conversion, images.still, reconstruction=reconstruction, on_block=on_block)


def _distilled(conversion: Conversion, images: Images, settings: LabelFree, terminal: Terminal) -> Conversion:
    from ..finetune import distill

    train_in_arena(terminal)
    epochs = settings.epochs + settings.qcfs_epochs
    steps = epochs * len(images.train)
    terminal.notice(
        f"Distilling without labels: {images.train.count} images, {settings.qcfs_epochs} epochs quantised and "
        f"{settings.epochs} through the spikes, {steps} batches of {images.train.batch_size}."
    )
    with terminal.stage("distilling", steps) as advance:
        return distill(conversion, images.train, settings, still=images.still, on_progress=_shown(advance))


def _shown(advance: Advance) -> Any:
    def on_progress(progress: Progress) -> None:
        where = f"{progress.stage} epoch {progress.epoch + 1} of {progress.epochs}"
        advance(1, f"{where}, loss {progress.loss:.3f}, {progress.images_per_second:.0f} images/s")

    return on_progress


@dataclass(frozen=True)
class _Automatic:
    """Tries what usually helps, the cheap first, and keeps what comes nearest to the ANN on held-out images.

    Attributes:
        images: to work on and to hold out from.
        budget: minutes in all; None leaves distillation out.
        seed: of what is drawn.
        terminal: told what was found.
    """

    images: Images
    budget: float | None
    seed: int
    terminal: Terminal

    def best(self, conversion: Conversion) -> Conversion:
        """Return the best of the thresholds, the corrections and, with a budget, the distillation."""
        from ..finetune.hybrid import over_frames

        started = time.monotonic()
        most, held_out = self.images.parted()
        seen = self._affordable(conversion, most)
        if seen is None:
            return conversion
        tried = [conversion]
        try:
            tried.append(_corrected(conversion, seen, USUAL_CORRECTIONS, self.terminal))
            taken = time.monotonic() - started
            if self.budget is not None:  # distillation corrects too, so that time is needed once more
                tried += self._within(conversion, seen, 60 * self.budget - 2 * taken)
        except LMHError as error:
            self.terminal.notice(f"auto goes no further than {tried[-1].calibration.policy}: {error}")
        ann = over_frames(conversion.prepared.model, conversion.recipe)
        found = [_divergence(candidate.snn, ann, held_out) for candidate in tried]
        for candidate, divergence in zip(tried, found, strict=True):
            done = candidate.calibration.policy
            self.terminal.notice(f"auto: {done}: divergence {divergence:.4f} on {held_out.count} held-out samples")
        return tried[found.index(min(found))]

    def _affordable(self, conversion: Conversion, images: Images) -> Images | None:
        """Return as many images as memory has room for, or None where corrections cost too much or have too few."""
        count, indices = images.still.count, images.still.indices
        assert indices is not None
        if count < LEAST_SAMPLES:
            self.terminal.notice(
                f"auto leaves corrections out: they need {LEAST_SAMPLES} samples besides those held out, and there are "
                f"{count}. Give more images, or name --correct weights --correct thresholds."
            )
            return None
        fitting = min(count, int(count * MEMORY / max(_cost(conversion, images).memory, 1)))
        if fitting < LEAST_SAMPLES:
            self.terminal.notice(
                f"auto leaves corrections out: they need {LEAST_SAMPLES} samples, and {fitting} of {count} fit into "
                f"{MEMORY / 1e9:.0f} GB. --correct weights --correct thresholds does them anyway."
            )
            return None
        images = replace(images, still=replace(images.still, indices=indices[:fitting]))
        minutes = _cost(conversion, images).operations / OPERATIONS_PER_MINUTE
        if minutes > (self.budget or 1):
            needed = math.ceil(minutes)
            self.terminal.notice(
                f"auto leaves corrections out: they would take about {needed} min. --budget {needed} allows them."
            )
            return None
        return images

    def _within(self, conversion: Conversion, seen: Images, seconds: float) -> list[Conversion]:
        """Distil for about so many seconds, half of them quantised; return nothing if there is no time for it."""
        from ..finetune import seconds_per_epoch

        started = time.monotonic()
        quantised, spiking = seconds_per_epoch(conversion, seen.train)
        left = seconds - (time.monotonic() - started)
        qcfs_epochs, epochs = int(left / 2 / quantised), int(left / 2 / spiking)
        if epochs < 1:
            self.terminal.notice(
                f"--budget {self.budget:g} leaves no time to distil: an epoch takes {quantised:.1f} s quantised and "
                f"{spiking:.1f} s through the spikes. Raise it, or name --distill EPOCHS."
            )
            return []
        settings = _settings(min(epochs, MOST_EPOCHS), min(qcfs_epochs, QCFS_EPOCHS * MOST_EPOCHS), seen, self.seed)
        return [_distilled(conversion, seen, settings, self.terminal)]


@torch.no_grad()
def _divergence(snn: nn.Module, ann: nn.Module, batches: Batches) -> float:
    """Return the mean of KL(ANN ‖ SNN) over the classes that both give the samples."""
    device, total = next(ann.parameters()).device, 0.0
    for batch in batches:
        x = split_batch("auto", batch)[0][0].to(device)
        outputs = (only_tensor(network(x), "auto") for network in (ann, snn))
        wanted, given = (output.reshape(len(output), -1).log_softmax(1) for output in outputs)
        total += float(F.kl_div(given, wanted, reduction="sum", log_target=True))
    return total / batches.count
