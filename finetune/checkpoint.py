"""Checkpoints: everything that a run needs to go on as if it had not been broken, in one file, written atomically."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artifact import check_writable, read_tensors, user_path, write_tensors
from ..errors import ArgumentError, ArtifactError, TrainingError
from ..records import plain_value
from ..spiking import kernels_used
from .batches import Feed
from .distributed import Group
from .history import EpochResult, bare_path
from .optimiser import Average, momenta, set_momenta


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is kept, and how often beside the end of every epoch.

    Attributes:
        file: written atomically; a run with the same settings, data and starting weights goes on from it.
        steps: also after this many batches.
        minutes: also when this much time has passed since the last one.

    >>> Checkpoint("run.safetensors", minutes=10)
    Checkpoint(file='run.safetensors', steps=None, minutes=10)
    """

    file: str | Path
    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and (
            isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1
        ):
            raise ArgumentError(f"Checkpoint: steps is {self.steps!r}; expected a whole number of batches, or None.")
        if self.minutes is not None and not self.minutes > 0:
            raise ArgumentError(f"Checkpoint: minutes is {self.minutes}; expected a number above 0, or None.")

    def of_stage(self, name: str) -> Checkpoint:
        """Return the checkpoint of another stage of the same run, in a file beside this one.

        >>> str(Checkpoint("run.safetensors").of_stage("qcfs").file)
        'run-qcfs.safetensors'
        """
        path = Path(self.file)
        return Checkpoint(path.with_name(f"{path.stem}-{name}{path.suffix}"), self.steps, self.minutes)


@dataclass
class Training:
    """The changing state of a run.

    Attributes:
        model: being trained.
        optimizer: with its momenta.
        history: of the epochs that ended.
        epoch: that runs.
        batch: of that epoch that comes next.
        loss: sum over the epoch's samples so far.
        seen: number of those samples.
        average: of the weights, or None.
        best: tensors of the best epoch, or None.
        kernels: that ran each site in the last training step, by path.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    history: list[EpochResult] = field(default_factory=list)
    epoch: int = 0
    batch: int = 0
    loss: float = 0.0
    seen: int = 0
    average: Average | None = None
    best: dict[str, Tensor] | None = None
    kernels: dict[str, str] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, the random state among them."""
        parts: dict[str, Mapping[str, Tensor]] = {
            "model.": self.model.state_dict(),
            "momentum.": momenta(self.model, self.optimizer),
            "average.": self.average.values if self.average else {},
            "best.": self.best or {},
        }
        found = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            found["cuda_random_state"] = torch.cuda.get_rng_state(device)
        return {**found, "random_state": torch.get_rng_state()}

    def position(self) -> dict[str, Any]:
        """Return where in the data the run is."""
        return {"epoch": self.epoch, "batch": self.batch, "loss": self.loss, "seen": self.seen}

    def restore(self, tensors: Mapping[str, Tensor], position: Mapping[str, Any], history: list[EpochResult]) -> None:
        """Go back to what :meth:`tensors` and :meth:`position` said."""
        self.model.load_state_dict(_under(tensors, "model."))
        set_momenta(self.model, self.optimizer, _under(tensors, "momentum."))
        device = next(self.model.parameters()).device
        if self.average is not None:
            for name, value in _under(tensors, "average.").items():
                self.average.values[name].copy_(value)
        best = _under(tensors, "best.")
        self.best = {name: value.to(device) for name, value in best.items()} or None
        self.epoch, self.batch = position["epoch"], position["batch"]
        self.loss, self.seen = position["loss"], position["seen"]
        self.history = history
        torch.set_rng_state(tensors["random_state"])
        if device.type == "cuda" and "cuda_random_state" in tensors:  # there is none of a run begun on a CPU
            torch.cuda.set_rng_state(tensors["cuda_random_state"], device)


class Keeper:
    """Writes and reads one run's checkpoint.

    Args:
        checkpoint: where and how often.
        facts: what decides the run: settings and :func:`start_of`.
        group: whose rank 0 reads and writes.
    """

    def __init__(self, checkpoint: Checkpoint, facts: Mapping[str, Any], group: Group) -> None:
        self.checkpoint, self.facts, self.group = checkpoint, dict(facts), group
        self.path = user_path(checkpoint.file)
        if group.leads:
            check_writable(self.path, "Choose another place for the checkpoint.")
        self.written = time.monotonic()
        self.kernels: dict[str, str] | None = None

    def resume(self, training: Training) -> None:
        """Go on from the file, if there is one.

        Raises:
            TrainingError: if it cannot be read, or is of another run.
        """
        found = self.group.told(self._read() if self.group.leads else None)
        if found is not None:
            tensors, metadata = found
            history = [EpochResult.from_json(entry) for entry in metadata["history"]]
            training.restore(tensors, metadata["position"], history)
            self.kernels = metadata["kernels"] or None

    def note_kernels(self, training: Training) -> None:
        """Note what ran the neurons; warn, once, where it is not what ran before the resume, as without a compiler."""
        training.kernels = now = _kernels(training.model)
        before, self.kernels = self.kernels, None
        if before is None or before == now:
            return
        path = next(path for path in before if before[path] != now.get(path))
        warnings.warn(
            f"{self.path}: {path} ran by the kernel {before[path]} until the checkpoint and runs by {now.get(path)} "
            "now; the weights will be those of the unbroken run up to rounding, not bit for bit. Resume where "
            "torch.compile has the same compiler for that.",
            stacklevel=2,
        )

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if not self.path.exists():
            return None
        try:
            tensors, metadata = read_tensors(self.path)
        except ArtifactError as error:
            raise TrainingError(f"{self.path}: not a checkpoint that can be read. Delete it to start anew.") from error
        other = [name for name, value in self.facts.items() if metadata.get(name) != value]
        if other:
            raise TrainingError(
                f"{self.path}: a checkpoint of a run with other settings, data, teacher or starting weights (its "
                f"{' and '.join(other)} differs); expected the same. Give the command that it was begun with, or "
                "delete it to start anew."
            )
        return tensors, metadata

    def due(self, step: int) -> bool:
        """Whether steps or minutes ask for a file after so many batches."""
        if not self.group.leads:
            return False
        steps, minutes = self.checkpoint.steps, self.checkpoint.minutes
        by_steps = steps is not None and step % steps == 0
        return by_steps or (minutes is not None and time.monotonic() - self.written >= 60 * minutes)

    def write(self, training: Training) -> None:
        """Write the file; the one before it stays until the new one is whole.

        Raises:
            ArtifactError: if it cannot be written.
        """
        if not self.group.leads:
            return
        facts = {
            **self.facts,
            "position": training.position(),
            "history": _plain(training.history),
            "kernels": training.kernels,
        }
        write_tensors(self.path, training.tensors(), facts)
        self.written = time.monotonic()


def _kernels(model: nn.Module) -> dict[str, str]:
    return {bare_path(path): kernel.value for path, kernel in kernels_used(model).items() if kernel is not None}


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _plain(history: list[EpochResult]) -> list[dict[str, Any]]:
    return [plain_value(result) for result in history]


def start_of(model: nn.Module, feed: Feed, batches: int) -> str:
    """Return a digest of where a run starts: the weights, the number of batches and the first of them."""
    first = next(feed.epoch(0), ())
    tensors = [first] if isinstance(first, Tensor) else [item for item in first if isinstance(item, Tensor)]
    return digest_of((*model.state_dict().values(), *tensors), str(batches))


def digest_of(tensors: Iterable[Tensor], *words: str) -> str:
    """Return a digest of tensors, byte for byte, and of words."""
    digest = hashlib.sha256("".join(words).encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
