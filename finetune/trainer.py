"""The training loop: SGD with warm-up and a cosine schedule, resumed exactly from its last checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_kind, check_network
from ..errors import ArgumentError, TrainingError
from ..eval_mode import in_eval_mode
from ..records import plain_value
from ..spiking import sites
from ..structures import only_tensor
from ..surrogates import Surrogate
from .batch_norm import check_batch_norm, set_modes, synchronised
from .batches import EpochBatches, Feed, Inputs, MeanOverFrames, check_training_data, split, takes_frames
from .checkpoint import Checkpoint, Keeper, Training, digest_of, start_of
from .diagnosis import broken_tensor, origin
from .distributed import ALONE, Group
from .features import counterparts, mean_over_time, noted
from .history import EpochResult, neuron_values
from .log import Log, OnProgress, check_logs, opened
from .mixing import mixed
from .optimiser import Average, copied, optimiser, set_rate
from .precision import stored_for, stored_input, widened
from .randomness import drawn, own_random_state, seed_of
from .reporting import OnBatch, OnEpoch, Reporter, Watch
from .schedule import Schedule
from .steps import DivergedError, Stepper, Work, time_of
from .strategies import STBP, Strategy


@dataclass(frozen=True)
class Task:
    """What is trained, and on what.

    Attributes:
        stage: its name, for logs.
        model: the network.
        feed: training batches.
        val: batches to measure, or None.
        schedule: rates, loss and the rest.
        strategy: how gradients go through time.
        teacher: whose outputs are distilled, or None.
    """

    stage: str
    model: nn.Module
    feed: Feed
    val: Iterable[Any] | None
    schedule: Schedule
    strategy: Strategy
    teacher: nn.Module | None


def fit(
    model: nn.Module,
    train: EpochBatches | Iterable[Any],
    val: Iterable[Any] | None,
    schedule: Schedule,
    *,
    strategy: Strategy | None = None,
    teacher: nn.Module | None = None,
    checkpoint: Checkpoint | str | Path | None = None,
    on_batch: OnBatch | None = None,
    on_epoch: OnEpoch | None = None,
    on_progress: OnProgress | None = None,
    logs: Sequence[Log] = (),
) -> list[EpochResult]:
    """Train any network, spiking or not, in place, and leave it in eval mode.

    A checkpoint of a run with the same settings is resumed; batches, schedule, momentum and random state go on
    as if the run had not been broken. The run has a random state of its own, from the schedule's seed: the caller's
    is as before when it ends, and so are the teacher's device and modes.

    Args:
        model: gives one tensor [N, C]; a spiking one also every step.
        train: training batches by epoch, or any loader that can be iterated again, such as a DataLoader.
        val: batches with labels to measure after each epoch, in the precision of the weights.
        schedule: rates, loss, precision and the rest.
        strategy: for a spiking network; ``STBP()`` unless given.
        teacher: network whose outputs are distilled.
        checkpoint: file written after each epoch, or a :class:`Checkpoint` that says more; None writes none.
        on_batch: told (epoch, batch, loss).
        on_epoch: told of each epoch that ends.
        on_progress: told of every batch with a :class:`Progress`: pace, time left, memory.
        logs: ``JSONLines(file)``, ``TensorBoard(folder)``.

    Returns:
        One result for each epoch, those before a resume included.

    Raises:
        ArgumentError: for an argument of a wrong type, batches of another form, or a network that returns several
            tensors.
        TrainingError: if the loss is not finite, the data is empty, or the checkpoint is of another run.

    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> loader = DataLoader(TensorDataset(torch.rand(64, 4), torch.randint(2, (64,))), batch_size=16)
    >>> ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [result] = fit(ann, loader, loader, Schedule(epochs=1))
    >>> 0 <= result.val_accuracy <= 1
    True
    """
    watch = Watch(as_checkpoint(checkpoint), on_batch, on_epoch, on_progress, logs)
    return fit_stage("ANN", model, train, val, schedule, strategy or STBP(), teacher, watch)


def fit_stage(
    stage: str,
    model: nn.Module,
    train: EpochBatches | Iterable[Any],
    val: Iterable[Any] | None,
    schedule: Schedule,
    strategy: Strategy,
    teacher: nn.Module | None,
    watch: Watch,
) -> list[EpochResult]:
    """Check everything, then train: :func:`fit` for a stage of a name."""
    check_network("finetune: the network", model)
    device = _device(model)
    check_kind("finetune: schedule", schedule, Schedule, "Schedule(epochs=10)")
    if teacher is not None:
        check_network("finetune: teacher", teacher)
    check_training_data(train, val)
    check_logs(watch.logs)
    if schedule.early_stopping is not None and val is None:
        raise ArgumentError("finetune: early_stopping needs validation batches and val is None. Pass val=.")
    schedule.precision.check(device)
    check_batch_norm(schedule.batch_norm, device)
    group = Group.current()
    feed = Feed.of(train, schedule.seed, model, group)
    if val is not None:
        first = next(iter(drawn(val, seed_of(schedule.seed, "val", 0))), None)
        if first is not None:
            _labelled(first, model)
    if teacher is not None and takes_frames(model) and not takes_frames(teacher):
        teacher = MeanOverFrames(teacher)
    task = Task(stage, model, feed, val, schedule, strategy, teacher)
    with (
        own_random_state(device),
        as_teacher(teacher, device),
        stored_for(model, schedule.precision),
        synchronised(model, schedule.batch_norm),
        through(model, schedule.surrogate),
    ):
        return run(task, watch if group.leads else Watch(watch.checkpoint))


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    if first is None:
        raise ArgumentError(f"finetune: {type(model).__name__} has no parameters; expected some to train.")
    return first.device


def as_checkpoint(checkpoint: Checkpoint | str | Path | None) -> Checkpoint | None:
    """Return a checkpoint of what a caller may pass for one."""
    if checkpoint is None or isinstance(checkpoint, Checkpoint):
        return checkpoint
    check_kind("finetune: checkpoint", checkpoint, (str, Path), 'checkpoint="run.safetensors"')
    return Checkpoint(checkpoint)


@contextmanager
def through(model: nn.Module, surrogate: Surrogate | None) -> Iterator[None]:
    """Let every neuron have this surrogate inside this block, or its own for None.

    Raises:
        ArgumentError: if there are no neurons.
    """
    if surrogate is None:
        yield
        return
    own = {site: site.neuron for site in sites(model).values()}
    if not own:
        raise ArgumentError(
            f"finetune: surrogate {surrogate} came and {type(model).__name__} has no spiking neurons; expected a "
            "converted network. Leave it out for an ANN."
        )
    for site, neuron in own.items():
        site.neuron = replace(neuron, surrogate=surrogate)
    try:
        yield
    finally:
        for site, neuron in own.items():
            site.neuron = neuron


@contextmanager
def as_teacher(teacher: nn.Module | None, device: torch.device) -> Iterator[None]:
    """Put a network on the device in eval mode for the length of the block."""
    if teacher is None:
        yield
        return
    home = next((parameter.device for parameter in teacher.parameters()), device)
    try:
        with in_eval_mode(teacher.to(device)):
            yield
    finally:
        teacher.to(home)


def run(task: Task, watch: Watch) -> list[EpochResult]:
    """Train from the start, or from a checkpoint, to the end."""
    model, schedule = task.model, task.schedule
    training = Training(model, optimiser(model, schedule))
    if schedule.ema is not None:
        training.average = Average(model, schedule.ema.decay)
    group, time = task.feed.group, time_of(model)
    sliced = time is not None and task.strategy.slice_steps(time.timesteps) < time.timesteps
    stepper = Stepper(group.wrapped(model, some_unused=sliced), training.optimizer, schedule, task.strategy)
    torch.manual_seed(schedule.seed)
    batches = task.feed.count()
    keeper = None
    if watch.checkpoint is not None:
        start = group.told(start_of(model, task.feed, batches))
        taught = None if schedule.distillation is None else task.teacher
        teacher = None if taught is None else digest_of(taught.state_dict().values())
        facts = {**settings(schedule, task.strategy), "start": start, "teacher": teacher, "processes": group.world}
        keeper = Keeper(watch.checkpoint, facts, group)
        keeper.resume(training)
    with opened(watch.logs) as writers:
        reporter = Reporter(task.stage, schedule.epochs, batches, _device(model), watch, writers)
        reporter.start(training)
        while training.epoch < schedule.epochs and not _stopped(schedule, training.history):
            _epoch(task, training, stepper, reporter, keeper)
            reporter.epoch(training.history[-1])
    _leave_result(training, group)
    return training.history


def settings(schedule: Schedule, strategy: Strategy) -> dict[str, Any]:
    """Return schedule and strategy as plain values, what is not ours by its type's name."""
    return {"schedule": _named(plain_value(schedule)), "strategy": _named(plain_value(strategy))}


def _named(value: Any) -> Any:
    match value:
        case dict():
            return {key: _named(item) for key, item in value.items()}
        case list():
            return [_named(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _epoch(task: Task, training: Training, stepper: Stepper, reporter: Reporter, keeper: Keeper | None) -> None:
    model, schedule, epoch, group = task.model, task.schedule, training.epoch, task.feed.group
    set_modes(model, schedule.batch_norm)
    reporter.pace.begin()
    for batch in task.feed.epoch(epoch, training.batch):
        step = epoch * reporter.batches + training.batch
        inputs, y = split("finetune: train", batch, model)
        set_rate(training.optimizer, schedule.rate(step, reporter.batches))
        if group.world > 1:  # each process has its own dropout, and a resumed one needs no state of it
            torch.manual_seed(seed_of(schedule.seed, "rank", group.rank, step))
        own = inputs[0].shape[task.feed.axis]
        [count] = map(round, group.sums([own], inputs[0].device))
        work = replace(_work(task, inputs, y, seed_of(schedule.seed, "mixing", step)), weight=own * group.world / count)
        try:
            loss = stepper(work, step / (schedule.epochs * reporter.batches))
        except DivergedError as error:
            where = origin(model, work.inputs, work.target)
            raise _diverged(epoch, training.batch + 1, f"{error}; it began in {where}") from error
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise TrainingError(
                f"epoch {epoch + 1}, batch {training.batch + 1}: BatchNorm was given a single value for each channel "
                f"({count} samples); expected more. Use another batch size, drop_last=True, or FrozenBatchNorm()."
            ) from error
        if training.average is not None:
            training.average.update(model, step)
        if group.world > 1:
            loss = group.sums([loss * own / count], inputs[0].device)[0]
        training.loss, training.seen = training.loss + loss * count, training.seen + count
        training.batch += 1
        reporter.batch(training, loss, count)
        if keeper is not None:
            keeper.note_kernels(training)
            if keeper.due(step + 1):
                _check_tensors(training)
                keeper.write(training)
    _check_tensors(training)
    _end_epoch(task, training)
    if keeper is not None:
        keeper.write(training)


def _check_tensors(training: Training) -> None:
    """Refuse to go on, or to keep, what an update made infinite."""
    broken = broken_tensor(training.model)
    if broken is not None:
        raise _diverged(training.epoch, training.batch, f"{broken} is not finite after the update")


def _diverged(epoch: int, batch: int, what: str) -> TrainingError:
    return TrainingError(
        f"epoch {epoch + 1}, batch {batch}: {what}; expected finite numbers. Lower lr or "
        "neuron_lr, warm up, or look for NaN in the data; the last good checkpoint is kept if one was asked for."
    )


def _work(task: Task, inputs: Inputs, y: Tensor | None, seed: int) -> Work:
    """Mix a batch and show it to the teacher."""
    schedule, axis = task.schedule, task.feed.axis
    inputs, labels = mixed(inputs, y, schedule.mixing, seed, axis)
    if task.teacher is None or schedule.distillation is None:
        return Work(inputs, labels, None)
    wanted, precision = schedule.distils_features, schedule.precision
    sources = counterparts(task.model, task.teacher) if wanted else {}
    with torch.no_grad(), precision.autocast(inputs[0].device), noted(sources) as features:
        outputs = task.teacher(*(stored_input(x, precision) for x in inputs))
    found = mean_over_time(features, inputs[0].shape[axis]) if wanted else None
    return Work(inputs, labels, widened(only_tensor(outputs, "finetune")), found)


def _end_epoch(task: Task, training: Training) -> None:
    model, history, feed = task.model, training.history, task.feed
    model.eval()
    measured = None
    feed.group.share_buffers(model)
    with training.average.in_place(model) if training.average else nullcontext():
        feed.group.share_buffers(model)
        if task.val is not None:
            batches = drawn(task.val, seed_of(task.schedule.seed, "val", training.epoch))
            measured = accuracy(model, batches, feed.group, feed.axis)
        history.append(EpochResult(training.epoch, training.loss / training.seen, measured, neuron_values(model)))
        stopping = task.schedule.early_stopping
        if stopping is not None and stopping.best(_accuracies(history)) == len(history) - 1:
            training.best = copied(model)
    training.epoch, training.batch, training.loss, training.seen = training.epoch + 1, 0, 0.0, 0


def _accuracies(history: list[EpochResult]) -> list[float]:
    return [result.val_accuracy for result in history if result.val_accuracy is not None]


def _stopped(schedule: Schedule, history: list[EpochResult]) -> bool:
    return schedule.early_stopping is not None and schedule.early_stopping.over(_accuracies(history))


def _leave_result(training: Training, group: Group) -> None:
    """Leave the network that was asked for: the best, the average, or as it is."""
    if training.best is not None:
        training.model.load_state_dict(training.best)
    elif training.average is not None:
        training.model.load_state_dict(training.average.values)
        group.share_buffers(training.model)
    training.model.eval()


def _labelled(batch: Any, model: nn.Module) -> tuple[Inputs, Tensor]:
    """Return the inputs and the labels of a validation batch."""
    inputs, labels = split("finetune: val", batch, model)
    if labels is None:
        raise TrainingError("validation batches have no labels; expected (x, y). Pass val=None.")
    return inputs, labels


def accuracy(model: nn.Module, batches: Iterable[Any], group: Group | None = None, axis: int = 0) -> float:
    """Return the fraction of samples whose largest output is the label's; batches are (x, y).

    Args:
        model: gives [N, C].
        batches: whole ones, on every process.
        group: whose processes take a share of each.
        axis: of the inputs, where N is.
    """
    group, correct, count = group or ALONE, 0.0, 0.0
    with torch.no_grad():
        for batch in batches:
            whole, labels = _labelled(batch, model)
            *inputs, y = group.rows((*whole, labels), axis)
            if len(y):
                correct += int((only_tensor(model(*inputs), "finetune").argmax(1) == y).sum())
                count += len(y)
    correct, count = group.sums([correct, count], _device(model))
    if count == 0:
        raise TrainingError("the validation data gave no batch; expected at least one sample. Pass val=None.")
    return correct / count
