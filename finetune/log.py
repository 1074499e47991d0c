"""Progress of a run: figures for a callback, and logs as JSON lines or for TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from ..arguments import refuse
from ..artifact import user_path
from ..errors import ArgumentError, ArtifactError
from .history import EpochResult


@dataclass(frozen=True)
class Progress:
    """Where a run is after a batch.

    Attributes:
        stage: ``QCFS``, ``STBP`` or ``ANN``.
        epoch: counted from 0.
        epochs: of the stage.
        batch: of the epoch, counted from 0.
        batches: of an epoch.
        loss: of the batch.
        lr: learning rate of the weights.
        images_per_second: since this process began the stage, validation left out.
        seconds_left: for the rest of the stage at that pace.
        memory_mb: the most that the process held: on a GPU of its memory, else resident; None where unknown.
    """

    stage: str
    epoch: int
    epochs: int
    batch: int
    batches: int
    loss: float
    lr: float
    images_per_second: float
    seconds_left: float
    memory_mb: float | None

    @property
    def step(self) -> int:
        """Return the batches done before this one."""
        return self.epoch * self.batches + self.batch


OnProgress = Callable[[Progress], None]


class Pace:
    """Counts images and the time that training takes."""

    def __init__(self) -> None:
        self.images = self.steps = 0
        self.seconds = 0.0
        self.last = time.perf_counter()

    def begin(self) -> None:
        """Start the clock; what was before does not count."""
        self.last = time.perf_counter()

    def add(self, images: int) -> None:
        """Count a batch that ends now."""
        now = time.perf_counter()
        self.images, self.steps, self.seconds = self.images + images, self.steps + 1, self.seconds + now - self.last
        self.last = now

    @property
    def images_per_second(self) -> float:
        """Return the mean so far."""
        return self.images / max(self.seconds, 1e-9)

    def left(self, steps: int) -> float:
        """Return the seconds that so many batches will take."""
        return steps * self.seconds / max(self.steps, 1)


def peak_memory_mb(device: torch.device) -> float | None:
    """Return the most memory that the process held so far, in megabytes (10⁶ bytes); None where it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


class LogWriter(Protocol):
    """What an open log takes."""

    def start(self, stage: str, position: Mapping[str, Any]) -> None:
        """Note that a stage begins, or goes on from a checkpoint."""
        ...

    def batch(self, progress: Progress) -> None:
        """Note a batch."""
        ...

    def epoch(self, stage: str, result: EpochResult) -> None:
        """Note an epoch that ended."""
        ...

    def close(self) -> None:
        """Finish the file."""
        ...


class Log(Protocol):
    """What every kind of log offers."""

    def open(self) -> LogWriter:
        """Begin to write, behind what is there already."""
        ...


def _check_every(log: JSONLines | TensorBoard) -> None:
    if isinstance(log.every, bool) or not isinstance(log.every, int) or log.every < 1:
        raise ArgumentError(f"{type(log).__name__}: every is {log.every!r}; expected a whole number of at least 1.")


@dataclass(frozen=True)
class JSONLines:
    """One JSON object a line, appended: ``{"event": "batch" | "epoch" | "start", "stage": …, …}``.

    After a resume, ``start`` says from where; batches behind that position come again and replace those before.

    Attributes:
        file: to append to.
        every: batches from one line to the next.
    """

    file: str | Path
    every: int = 1

    def __post_init__(self) -> None:
        _check_every(self)

    def open(self) -> LogWriter:
        """Open the file.

        Raises:
            ArtifactError: if it cannot be written.
        """
        path = user_path(self.file)
        try:
            stream = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise ArtifactError(
                f"{path}: the log cannot be written ({error.strerror}); expected a writable folder. Name another file."
            ) from error
        return _JSONLinesWriter(stream, self.every)


class _JSONLinesWriter:
    def __init__(self, stream: IO[str], every: int) -> None:
        self.stream, self.every = stream, every
        end = stream.seek(0, 2)
        if end:
            stream.seek(end - 1)
            if stream.read(1) != "\n":  # a run that was killed while it wrote
                stream.write("\n")

    def _write(self, event: str, **facts: Any) -> None:
        self.stream.write(json.dumps({"event": event, **facts}) + "\n")
        self.stream.flush()

    def start(self, stage: str, position: Mapping[str, Any]) -> None:
        self._write("start", stage=stage, epoch=position["epoch"], batch=position["batch"], time=time.time())

    def batch(self, progress: Progress) -> None:
        if progress.step % self.every == 0:
            self._write("batch", **asdict(progress))

    def epoch(self, stage: str, result: EpochResult) -> None:
        self._write("epoch", stage=stage, **asdict(result))

    def close(self) -> None:
        self.stream.close()


@dataclass(frozen=True)
class TensorBoard:
    """Curves for TensorBoard, one set for each stage: loss, rate, pace, accuracy, and θ, λ and μ of every site.

    Attributes:
        folder: for its event files.
        every: batches from one point to the next.
    """

    folder: str | Path
    every: int = 10

    def __post_init__(self) -> None:
        _check_every(self)

    def open(self) -> LogWriter:
        """Begin an event file.

        Raises:
            ArgumentError: if the package ``tensorboard`` is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ArgumentError(
                "TensorBoard: the package tensorboard is not installed; expected it beside torch. Run "
                "`pip install tensorboard`, or use JSONLines(file)."
            ) from error
        return _TensorBoardWriter(SummaryWriter(str(user_path(self.folder))), self.every)


class _TensorBoardWriter:
    def __init__(self, writer: Any, every: int) -> None:
        self.writer, self.every = writer, every

    def start(self, stage: str, position: Mapping[str, Any]) -> None:
        self.writer.add_text(f"{stage}/start", f"epoch {position['epoch']}, batch {position['batch']}")

    def batch(self, progress: Progress) -> None:
        if progress.step % self.every == 0:
            for name in ("loss", "lr", "images_per_second"):
                self.writer.add_scalar(f"{progress.stage}/{name}", getattr(progress, name), progress.step)

    def epoch(self, stage: str, result: EpochResult) -> None:
        self.writer.add_scalar(f"{stage}/epoch_loss", result.loss, result.epoch)
        if result.val_accuracy is not None:
            self.writer.add_scalar(f"{stage}/val_accuracy", result.val_accuracy, result.epoch)
        for site, values in result.neurons.items():
            for name, steps in values.items():
                for t, value in enumerate(steps, 1):
                    step = f"/t{t}" if len(steps) > 1 else ""
                    self.writer.add_scalar(f"{stage}/{name}/{site}{step}", value, result.epoch)

    def close(self) -> None:
        self.writer.close()


@contextmanager
def opened(logs: Sequence[Log]) -> Iterator[list[LogWriter]]:
    """Open all logs for the length of the block."""
    with ExitStack() as stack:
        writers = []
        for log in logs:
            writers.append(log.open())
            stack.callback(writers[-1].close)
        yield writers


def check_logs(logs: object) -> None:
    """Refuse what is no series of logs, before any work.

    Raises:
        ArgumentError: saying what to pass.
    """
    if isinstance(logs, (tuple, list)) and not any(isinstance(log, type) or not hasattr(log, "open") for log in logs):
        return
    raise refuse("finetune: logs", logs, "a series of logs", 'Pass [JSONLines("run.jsonl")], say.')
