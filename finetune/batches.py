"""The batches of a training: by epoch, checked, on the network's device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from ..arguments import check_batches, check_labels, refuse, split_batch
from ..errors import TrainingError
from ..structures import input_count, only_tensor
from ..time_axis import takes_events
from .distributed import ALONE, Group, Shardable
from .randomness import drawn, seed_generators, seed_of

Inputs = tuple[Tensor, ...]


@runtime_checkable
class EpochBatches(Protocol):
    """Batches that can be drawn anew for each epoch, such as :class:`lmh.zoo.Batches`."""

    def at_epoch(self, epoch: int) -> Iterable[Any]:
        """Return the batches of one epoch, (x [N, *F], y [N]) or x alone; for k inputs (x1, …, xk, y)."""
        ...


@runtime_checkable
class Skippable(Protocol):
    """Batches that can begin in the middle without making those before, such as :class:`lmh.zoo.Batches`."""

    def from_batch(self, index: int) -> Iterable[Any]:
        """Return the batches from this one on, the same as when all are read."""
        ...


@dataclass(frozen=True)
class Repeated:
    """A loader that is iterated anew for each epoch."""

    loader: Iterable[Any]

    def at_epoch(self, epoch: int) -> Iterable[Any]:
        """Return the loader; its order comes from the random state."""
        return self.loader


@dataclass(frozen=True)
class Feed:
    """Training batches under the seed of a run: the same whenever the same epoch is asked for.

    Attributes:
        source: the batches.
        seed: of loaders that draw from the global random state.
        group: whose processes share each batch.
        axis: of the inputs, where N is.
        inputs: how many the network takes.
    """

    source: EpochBatches
    seed: int
    group: Group = ALONE
    axis: int = 0
    inputs: int = 1

    @classmethod
    def of(cls, train: EpochBatches | Iterable[Any], seed: int, model: nn.Module, group: Group = ALONE) -> Feed:
        """Return the feed of anything that gives batches for a network."""
        source = train if isinstance(train, EpochBatches) else Repeated(train)
        return cls(source, seed, group, batch_axis(model), input_count(model))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Yield this process's share of the batches of an epoch, from one of them on."""
        batches, seed = self.source.at_epoch(epoch), seed_of(self.seed, "data", epoch)
        seed_generators(batches, seed)
        if start and isinstance(batches, Skippable):
            batches, start = batches.from_batch(start), 0
        if self.group.world == 1 or isinstance(batches, Shardable):
            return islice(drawn(self.group.share(batches), seed), start, None)
        return islice(self._rows(drawn(batches, seed)), start, None)

    def _rows(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Cut this process's rows out of whole batches; one with fewer rows than processes is left out everywhere."""
        for batch in batches:
            inputs, _ = split_batch("finetune: train", batch, self.inputs)
            if inputs[0].shape[self.axis] >= self.group.world:
                yield self.group.rows(batch, self.axis)

    def count(self) -> int:
        """Return the number of batches of an epoch.

        Raises:
            TrainingError: if there is none.
        """
        batches = self.group.share(self.source.at_epoch(0))
        try:
            count = len(batches) if isinstance(batches, Sized) else sum(1 for _ in self.epoch(0))
        except TypeError:  # a DataLoader over an IterableDataset has a __len__ that fails
            count = sum(1 for _ in self.epoch(0))
        if count == 0:
            raise TrainingError(
                "the training data gave no batch; expected at least one. Check the number of samples "
                "(--train-samples); with drop_last=True a data set smaller than a batch gives none."
            )
        return count

    def first(self, count: int) -> list[Any]:
        """Return the first batches of epoch 0, until they hold that many samples or there are no more."""
        found: list[Any] = []
        have = 0
        for batch in self.epoch(0):
            inputs, _ = split_batch("finetune: train", batch, self.inputs)
            found.append(batch)
            have += inputs[0].shape[self.axis]
            if have >= count:
                break
        return found


def check_training_data(train: object, val: object) -> None:
    """Refuse training and validation data that gives no batches, or gives them only once.

    Raises:
        ArgumentError: saying what to pass.
    """
    for name, data in (("train", train), ("val", val)):
        where = f"finetune: {name}"
        if data is None and name == "val":
            continue
        if not isinstance(data, EpochBatches) or isinstance(data, type):
            check_batches(where, data)
        if isinstance(data, Tensor):
            raise refuse(where, data, "batches", "Pass DataLoader(TensorDataset(x, y), batch_size=128, shuffle=True).")
        if isinstance(getattr(data, "sampler", None), DistributedSampler):
            raise refuse(
                where, data, "whole batches, of which each process takes its rows",
                "Leave out the DistributedSampler, and pass shuffle=True.",
            )  # fmt: skip
        if isinstance(data, Iterator):
            raise refuse(where, data, "batches that can be read once for each epoch", "Pass list(…) or a DataLoader.")


def takes_frames(model: nn.Module) -> bool:
    """Whether a network, spiking or an ANN in :class:`MeanOverFrames`, takes frames [T, N, *F]."""
    return takes_events(model) or any(isinstance(module, MeanOverFrames) for module in model.modules())


def batch_axis(model: nn.Module) -> int:
    """Return where N is in a network's inputs."""
    return int(takes_frames(model))


def split(where: str, batch: Any, model: nn.Module) -> tuple[Inputs, Tensor | None]:
    """Return the inputs and the labels of a batch, checked, in the network's dtype and on its device.

    Raises:
        ArgumentError: for a batch of another form.
    """
    like = next(model.parameters())
    inputs, y = split_batch(where, batch, input_count(model))
    if y is not None:
        y = check_labels(where, y, inputs[0].shape[batch_axis(model)]).to(like.device)
    return tuple(x.to(like) for x in inputs), y


class MeanOverFrames(nn.Module):
    """An ANN on event frames: its mean output over T, as the spiking network's is.

    Args:
        ann: takes [N, *F].
    """

    def __init__(self, ann: nn.Module) -> None:
        super().__init__()
        self.ann = ann

    def forward(self, *frames: Tensor) -> Tensor:
        """Return [N, C] from frames [T, N, *F]."""
        output = only_tensor(self.ann(*(x.flatten(0, 1) for x in frames)), "finetune")
        return output.unflatten(0, frames[0].shape[:2]).mean(0)
