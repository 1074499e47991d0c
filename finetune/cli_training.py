"""What ``lmh finetune`` and ``lmh-convert --finetune`` share: a recipe carried out, shown and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import fx, nn

from ..arena import train_in_arena
from ..convert.cli import measured
from ..convert.cli_inputs import Inputs
from ..convert.pipeline import Conversion
from ..convert.storage import MANIFEST
from ..records import Evaluation
from ..terminal import Advance, Terminal
from ..zoo.images import Batches
from .api import Finetuned, finetune
from .checkpoint import Checkpoint
from .history import EpochResult
from .hybrid import taken_over
from .log import Log, LogWriter, Progress
from .recipe import TrainingRecipe


@dataclass(frozen=True)
class Training:
    """A training that a command asked for.

    Attributes:
        network: a conversion, or a spiking network.
        recipe: how.
        inputs: with the training batches.
        teacher: the ANN, or None.
        checkpoint: where it is kept until it is over.
        logs: besides the terminal.
    """

    network: Conversion | fx.GraphModule
    recipe: TrainingRecipe
    inputs: Inputs
    teacher: nn.Module | None
    checkpoint: Checkpoint
    logs: Sequence[Log] = ()

    @property
    def batches(self) -> Batches:
        """Return the training batches as the recipe wants them."""
        assert self.inputs.train is not None
        return replace(self.inputs.train, batch_size=self.recipe.batch_size, augmentation=self.recipe.augmentation)

    def run(self, terminal: Terminal) -> Finetuned:
        """Train, with a bar, and with tensors in the arena from now on."""
        train_in_arena(terminal)
        batches = self.batches
        terminal.notice(f"Samples: {self.inputs.training}.")
        stages = self.recipe.schedules if isinstance(self.network, Conversion) else (self.recipe.schedule,)
        with terminal.stage("fine-tuning", sum(stage.epochs for stage in stages) * len(batches)) as advance:
            return finetune(
                self.network,
                batches,
                self.inputs.val,
                strategy=self.recipe.strategy,
                schedule=self.recipe.schedule,
                teacher=self.teacher,
                checkpoint=self.checkpoint,
                logs=[_TerminalLog(terminal, advance, self.recipe), *self.logs],
            )

    def stages(self, tuned: Finetuned, terminal: Terminal) -> list[tuple[str, Evaluation]]:
        """Measure what came before the spiking network was trained: the QCFS network, as ANN and as SNN."""
        if tuned.conversion is None or tuned.stages[0].name != "QCFS":
            return []
        network = tuned.stages[0].network
        assert isinstance(network, fx.GraphModule)
        snn = taken_over(network, tuned.conversion).snn
        found = measured(snn, self.inputs.test, network, terminal, "measuring after QCFS")
        return [] if found is None else [("after QCFS", found)]

    def forget(self) -> None:
        """Delete the checkpoints: the result is written."""
        for file in files_of(self.checkpoint):
            file.unlink(missing_ok=True)

    def facts(self, tuned: Finetuned) -> dict[str, Any]:
        """Return what a manifest keeps of the training."""
        before = () if isinstance(self.network, Conversion) else self.network.meta.get(MANIFEST, {}).get("history", ())
        history = [*before, *(stage.to_json() for stage in tuned.stages)]
        epochs = sum(len(stage.history) for stage in tuned.stages)
        return {"training": self.recipe.to_json(), "history": history, "epochs": epochs}


def files_of(checkpoint: Checkpoint) -> tuple[Path, Path]:
    """Return the files of a training that is kept at a checkpoint, of both stages."""
    return Path(checkpoint.file), Path(checkpoint.of_stage("qcfs").file)


@dataclass(frozen=True)
class _TerminalLog:
    """The bar, and a line for each epoch.

    Attributes:
        terminal: where the lines go.
        advance: moves the bar.
        recipe: says how many epochs a stage has.
    """

    terminal: Terminal
    advance: Advance
    recipe: TrainingRecipe

    def open(self) -> LogWriter:
        """There is nothing to open."""
        return self

    def start(self, stage: str, position: Mapping[str, Any]) -> None:
        """Say so where a stage goes on from a checkpoint."""
        if position["epoch"] or position["batch"]:
            where = f"epoch {position['epoch'] + 1}, batch {position['batch'] + 1}"
            self.terminal.notice(f"{stage} goes on from its checkpoint at {where}.")

    def batch(self, progress: Progress) -> None:
        """Move the bar."""
        memory = "" if progress.memory_mb is None else f", {progress.memory_mb:.0f} MB"
        pace = f"{progress.images_per_second:.0f} images/s{memory}"
        self.advance(1, f"{progress.stage} epoch {progress.epoch + 1}, loss {progress.loss:.3f}, {pace}")

    def epoch(self, stage: str, result: EpochResult) -> None:
        """Print the line."""
        schedule = self.recipe.schedules[0 if stage == "QCFS" else -1]
        name = "QCFS epoch" if stage == "QCFS" else "epoch"
        measured = "" if result.val_accuracy is None else f", held-out accuracy {100 * result.val_accuracy:.2f} %"
        self.terminal.notice(f"{name} {result.epoch + 1} of {schedule.epochs}: loss {result.loss:.4f}{measured}")

    def close(self) -> None:
        """There is nothing to close."""
