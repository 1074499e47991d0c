"""What ``lmh finetune`` and ``lmh-convert --finetune`` share: a recipe carried out, shown and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import fx, nn

from ..convert.cli_inputs import Inputs
from ..convert.pipeline import Conversion
from ..evaluation import evaluate
from ..records import Evaluation, plain_value
from ..terminal import Terminal
from ..zoo.images import Batches
from .api import Finetuned, finetune
from .checkpoint import Checkpoint
from .history import EpochResult
from .hybrid import taken_over
from .log import Log, LogWriter, Progress
from .recipe import TrainingRecipe
from .schedule import Schedule
from .strategies import STBP, Hybrid, Strategy

LONGEST_WARMUP = 100


def default_recipe(network: Conversion | nn.Module, epochs: int, batches: Batches, seed: int) -> TrainingRecipe:
    """Return the recipe where nothing else was asked for: hybrid for a conversion, STBP for a spiking network.

    Args:
        network: what is trained.
        epochs: in all.
        batches: training batches.
        seed: of training.
    """
    first = qcfs_epochs(epochs) if isinstance(network, Conversion) else 0
    if first == 0:
        schedule = Schedule(epochs=epochs, seed=seed)
        return TrainingRecipe(STBP(), schedule, batches.batch_size, batches.augmentation)
    qcfs, schedule = (gentle(count, len(batches), seed) for count in (first, epochs - first))
    return TrainingRecipe(Hybrid(qcfs=qcfs), schedule, batches.batch_size, batches.augmentation)


def qcfs_epochs(epochs: int) -> int:
    """Return how many of the epochs are the QCFS stage's, unless that is said.

    >>> [qcfs_epochs(epochs) for epochs in (1, 2, 4, 10, 30)]
    [0, 0, 1, 3, 10]
    """
    return epochs // 3


def gentle(epochs: int, batches: int, seed: int) -> Schedule:
    """Return a schedule for a network that is trained already: a small rate, reached slowly."""
    return Schedule(epochs=epochs, lr=0.01, seed=seed, warmup_steps=min(LONGEST_WARMUP, epochs * batches // 5))


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
        """Train, with a bar."""
        batches = self.batches
        terminal.notice(f"Samples: {self.inputs.training}.")
        with terminal.stage("fine-tuning", self.recipe.epochs * len(batches)) as advance:

            def show(progress: Progress) -> None:
                memory = "" if progress.memory_mb is None else f", {progress.memory_mb:.0f} MB"
                pace = f"{progress.images_per_second:.0f} images/s{memory}"
                advance(1, f"{progress.stage} epoch {progress.epoch + 1}, loss {progress.loss:.3f}, {pace}")

            return finetune(
                self.network,
                batches,
                self.inputs.val,
                strategy=self.recipe.strategy,
                schedule=self.recipe.schedule,
                teacher=self.teacher,
                checkpoint=self.checkpoint,
                on_progress=show,
                logs=[_TerminalLog(terminal, self.recipe.strategy, self.recipe.schedule), *self.logs],
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
        for checkpoint in (self.checkpoint, self.checkpoint.of_stage("qcfs")):
            Path(checkpoint.file).unlink(missing_ok=True)

    def facts(self, tuned: Finetuned) -> dict[str, Any]:
        """Return what a manifest keeps of the training."""
        history = [
            {
                "stage": stage.name,
                "epochs": [{**plain_value(result), "neurons": None} for result in stage.history],
            }
            for stage in tuned.stages
        ]
        last = {name: plain_value(values) for name, values in tuned[-1].neurons.items()}
        return {"training": self.recipe.to_json(), "history": history, "neurons": last, "epochs": self.recipe.epochs}


@dataclass(frozen=True)
class _TerminalLog:
    """One line on the terminal for each epoch."""

    terminal: Terminal
    strategy: Strategy
    schedule: Schedule

    def open(self) -> LogWriter:
        """Return the writer."""
        return _TerminalWriter(self)


class _TerminalWriter:
    def __init__(self, log: _TerminalLog) -> None:
        self.log = log

    def start(self, stage: str, position: Mapping[str, Any]) -> None:
        if position["epoch"] or position["batch"]:
            where = f"epoch {position['epoch'] + 1}, batch {position['batch'] + 1}"
            self.log.terminal.notice(f"{stage} goes on from its checkpoint at {where}.")

    def batch(self, progress: Progress) -> None:
        """The bar shows it."""

    def epoch(self, stage: str, result: EpochResult) -> None:
        strategy = self.log.strategy
        schedule = strategy.qcfs if stage == "QCFS" and isinstance(strategy, Hybrid) else self.log.schedule
        name = "QCFS epoch" if stage == "QCFS" else "epoch"
        measured = "" if result.val_accuracy is None else f", held-out accuracy {100 * result.val_accuracy:.2f} %"
        self.log.terminal.notice(f"{name} {result.epoch + 1} of {schedule.epochs}: loss {result.loss:.4f}{measured}")

    def close(self) -> None:
        """There is nothing to close."""


def measured(
    snn: fx.GraphModule, test: Batches | None, ann: nn.Module | None, terminal: Terminal, name: str
) -> Evaluation | None:
    """Measure a network on the test batches, with a bar; None without any."""
    if test is None:
        return None
    with terminal.stage(name, test.count) as advance:
        done = 0

        def on_batch(samples: int) -> None:
            nonlocal done
            advance(samples - done, f"{samples} samples")
            done = samples

        return evaluate(snn, test, ann=ann, on_batch=on_batch)
