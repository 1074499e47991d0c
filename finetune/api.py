"""finetune: one call for every strategy, from an ANN or from a spiking network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from torch import nn

from ..arguments import check_kind, check_network, check_timesteps, refuse
from ..convert import Conversion, convert
from ..errors import ArgumentError
from ..spiking import sites
from .batches import EpochBatches, Feed, check_training_data
from .checkpoint import Checkpoint
from .fresh import with_statistics
from .history import EpochResult, Stage
from .hybrid import calibrated, over_frames, qcfs_network, taken_over
from .log import Log, OnProgress
from .reporting import OnBatch, OnEpoch, Watch
from .schedule import Schedule
from .strategies import STBP, Hybrid, Strategy
from .trainer import as_checkpoint, fit_stage

CALIBRATION_SAMPLES = 512


@dataclass(frozen=True, repr=False)
class Finetuned(Sequence[EpochResult]):
    """What :func:`finetune` returns; as a sequence, the results of all epochs in order.

    Attributes:
        snn: the trained spiking network.
        stages: what was trained, in order: ``QCFS`` and ``STBP``, or ``STBP`` alone.
        conversion: of the network, where an ANN or a conversion was given; :func:`lmh.convert.save` takes it.
    """

    snn: nn.Module = field(compare=False)
    stages: tuple[Stage, ...]
    conversion: Conversion | None = field(default=None, compare=False)

    @property
    def history(self) -> tuple[EpochResult, ...]:
        """Return the results of all epochs of all stages."""
        return tuple(result for stage in self.stages for result in stage.history)

    def __len__(self) -> int:
        return len(self.history)

    @overload
    def __getitem__(self, index: int) -> EpochResult: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[EpochResult, ...]: ...
    def __getitem__(self, index: int | slice) -> EpochResult | tuple[EpochResult, ...]:
        return self.history[index]

    def __iter__(self) -> Iterator[EpochResult]:
        return iter(self.history)

    def __repr__(self) -> str:
        stages = ", ".join(f"{stage.name}: {len(stage.history)} epochs" for stage in self.stages)
        return f"Finetuned({stages}, {self.history[-1]})"


def finetune(
    network: nn.Module | Conversion,
    train: EpochBatches | Iterable[Any],
    val: Iterable[Any] | None = None,
    *,
    timesteps: int | None = None,
    strategy: Strategy | None = None,
    epochs: int | None = None,
    schedule: Schedule | None = None,
    teacher: nn.Module | None = None,
    checkpoint: Checkpoint | str | Path | None = None,
    on_batch: OnBatch | None = None,
    on_epoch: OnEpoch | None = None,
    on_progress: OnProgress | None = None,
    logs: Sequence[Log] = (),
) -> Finetuned:
    """Fine-tune a spiking network in place, or make one of an ANN: all weights, θ, v_init, λ and μ learn.

    Weights that are frozen (``requires_grad=False``), in an ANN too, stay as they are.

    Args:
        network: a spiking network from :func:`lmh.convert.convert` or :func:`lmh.convert.load`, trained in place; or an
            ANN, which is not changed and needs ``timesteps``; or a :class:`lmh.convert.Conversion`, which says all that
            a conversion can be asked for.
        train: training batches (x, y), or x alone with a teacher; a DataLoader or :class:`lmh.zoo.Batches`.
        val: batches to measure after each epoch.
        timesteps: T, for an ANN.
        strategy: ``STBP()``, ``TimeSliced(k)``, ``Progressive()`` or ``Hybrid()``. Unless given: ``Hybrid()`` for an
            ANN, ``STBP()`` otherwise.
        epochs: short for ``Schedule(epochs=…)``, or on top of ``schedule``; 10 if neither is given. ``Hybrid``'s first
            stage has a schedule of its own.
        schedule: learning rates, loss and the rest.
        teacher: the source ANN, whose outputs are then distilled. ``Hybrid`` takes the ANN that it starts from unless
            another is given; ``Schedule(distillation=None)`` learns from the labels alone.
        checkpoint: file to write after each epoch and to resume from, or a :class:`Checkpoint` that says more. The
            QCFS stage has its own beside it.
        on_batch: told (epoch, batch, loss).
        on_epoch: told of each epoch that ends.
        on_progress: told of every batch with a :class:`Progress`: stage, pace, time left, memory.
        logs: ``JSONLines(file)``, ``TensorBoard(folder)``.

    Returns:
        The network, the conversion where there was one, and the history by stage.

    Raises:
        ArgumentError: if ``network`` has no spiking sites and no ``timesteps``, or an argument is of a wrong type.
        TrainingError: as :func:`fit`.

    >>> import torch
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from lmh.convert import convert
    >>> x, y = torch.rand(64, 4), torch.randint(2, (64,))
    >>> ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    >>> snn = convert(ann, timesteps=4, data=x).snn
    >>> tuned = finetune(snn, loader, epochs=2, teacher=ann)
    >>> tuned.snn is snn, [result.epoch for result in tuned], tuned[1].loss < tuned[0].loss
    (True, [0, 1], True)
    >>> hybrid = finetune(ann, loader, timesteps=4, strategy=Hybrid(qcfs=Schedule(epochs=2)), epochs=3)
    >>> [(stage.name, len(stage.history)) for stage in hybrid.stages], hybrid.snn(x).shape
    ([('QCFS', 2), ('STBP', 3)], torch.Size([64, 2]))
    """
    if not isinstance(network, Conversion):
        check_network("finetune: network", network)
    spiking = isinstance(network, nn.Module) and bool(sites(network))
    if strategy is None:
        strategy = STBP() if spiking or isinstance(network, Conversion) else Hybrid()
    _check_strategy(strategy)
    if schedule is not None:
        check_kind("finetune: schedule", schedule, Schedule, "Schedule(epochs=10)")
    if schedule is None:
        schedule = Schedule(epochs=10 if epochs is None else epochs)
    elif epochs is not None:
        schedule = replace(schedule, epochs=epochs)
    check_training_data(train, val)
    watch = Watch(as_checkpoint(checkpoint), on_batch, on_epoch, on_progress, logs)
    call = _Call(train, val, schedule, teacher, watch)
    if isinstance(network, nn.Module) and spiking:
        _check_no_timesteps(timesteps)
        return Finetuned(network, (call.stbp(network, strategy),))
    conversion = _conversion(network, timesteps, strategy, call)
    strategy.slice_steps(conversion.recipe.timesteps)
    if not isinstance(strategy, Hybrid):
        return Finetuned(conversion.snn, (call.stbp(conversion.snn, strategy),), conversion)
    if teacher is None:
        features = schedule.distils_features or strategy.qcfs.distils_features
        ann = conversion.prepared.model if features or isinstance(network, Conversion) else network
        call = replace(call, teacher=ann)
    first, conversion = call.qcfs(conversion, strategy)
    return Finetuned(conversion.snn, (first, call.stbp(conversion.snn, strategy)), conversion)


def _check_strategy(strategy: object) -> None:
    if isinstance(strategy, type) or not hasattr(strategy, "slice_steps"):
        raise refuse(
            "finetune: strategy", strategy, "a strategy", "Pass STBP(), TimeSliced(2), Progressive() or Hybrid()."
        )


def _check_no_timesteps(timesteps: int | None) -> None:
    if timesteps is not None:
        raise ArgumentError(
            f"finetune: timesteps is {timesteps} and the network spikes already; its own T stays. Leave it out, or "
            "pass the ANN."
        )


def _conversion(network: Any, timesteps: int | None, strategy: Strategy, call: _Call) -> Conversion:
    """Return the conversion that training starts from."""
    if isinstance(network, Conversion):
        _check_no_timesteps(timesteps)
        return network
    if timesteps is None:
        raise ArgumentError(
            f"finetune: {type(network).__name__} has no spiking sites and timesteps= was not given; expected a network "
            "made by lmh.convert.convert, or an ANN with timesteps=4, say. Convert it first, or name T."
        )
    check_timesteps(timesteps)
    samples = call.samples(network)
    return convert(with_statistics(network, samples), timesteps, data=samples, neuron=strategy.neuron)


@dataclass(frozen=True)
class _Call:
    """The arguments that all stages share."""

    train: EpochBatches | Iterable[Any]
    val: Iterable[Any] | None
    schedule: Schedule
    teacher: nn.Module | None
    watch: Watch

    def samples(self, model: nn.Module) -> list[Any]:
        """Return the batches that thresholds are found on."""
        return Feed.of(self.train, self.schedule.seed, model).first(CALIBRATION_SAMPLES)

    def stbp(self, snn: nn.Module, strategy: Strategy) -> Stage:
        """Train the spiking network."""
        history = fit_stage("STBP", snn, self.train, self.val, self.schedule, strategy, self.teacher, self.watch)
        return Stage("STBP", snn, self.schedule, tuple(history))

    def qcfs(self, conversion: Conversion, strategy: Hybrid) -> tuple[Stage, Conversion]:
        """Train the ANN with QCFS activations, and return it with the spiking network that takes it over."""
        recipe = conversion.recipe
        calibration = calibrated(conversion.prepared, recipe, self.samples(conversion.prepared.model))
        network = qcfs_network(conversion.prepared, calibration, recipe.timesteps)
        trained = over_frames(network, recipe)
        checkpoint = self.watch.checkpoint
        watch = replace(self.watch, checkpoint=checkpoint and checkpoint.of_stage("qcfs"))
        history = fit_stage("QCFS", trained, self.train, self.val, strategy.qcfs, STBP(), self.teacher, watch)
        stage = Stage("QCFS", network, strategy.qcfs, tuple(history))
        return stage, taken_over(network, replace(conversion, calibration=calibration))
