"""The training loop: SGD with a cosine schedule, one checkpoint an epoch, resumed exactly."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..arguments import check_batches, check_kind, check_labels, check_network, refuse, split_batch
from ..artifact import read_tensors, write_tensors
from ..errors import ArgumentError, ArtifactError, TrainingError
from ..records import plain_value
from ..spiking import SpikingSite
from ..structures import input_count, only_tensor
from ..time_axis import FoldEvents, per_step
from .losses import CrossEntropy, Distillation, Loss, combined


@runtime_checkable
class EpochBatches(Protocol):
    """Batches that can be drawn anew for each epoch, such as :class:`lmh.zoo.Batches`."""

    def at_epoch(self, epoch: int) -> Iterable[Any]:
        """Return the batches of one epoch, (x [N, *F], y [N]) or x alone; for k inputs (x1, …, xk, y)."""
        ...


@dataclass(frozen=True)
class _Repeated:
    """A loader that is iterated anew for each epoch."""

    loader: Iterable[Any]

    def at_epoch(self, epoch: int) -> Iterable[Any]:
        return self.loader


@dataclass(frozen=True)
class Schedule:
    """How a network is trained.

    Attributes:
        epochs: passes over the training data.
        lr: learning rate of the weights at the start, then half a cosine down to 0.
        neuron_lr: the same for θ, v_init, λ, μ.
        momentum: of SGD.
        weight_decay: of the weights; neuron parameters and BatchNorm have none.
        clip_norm: bound on the norm of the gradient, or None.
        loss: :class:`CrossEntropy` or :class:`TET`.
        distillation: used when a teacher is given.
        seed: of dropout and the like; the order of the data comes with the data.
    """

    epochs: int
    lr: float = 0.02
    neuron_lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip_norm: float | None = 5.0
    loss: Loss = field(default_factory=CrossEntropy)
    distillation: Distillation = field(default_factory=Distillation)
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 1:
            raise ArgumentError(f"epochs is {self.epochs!r}; expected a whole number of at least 1.")
        if not (0 < self.lr < math.inf and 0 <= self.neuron_lr < math.inf):
            raise ArgumentError(f"lr {self.lr} and neuron_lr {self.neuron_lr} came; expected lr > 0, neuron_lr ≥ 0.")
        if isinstance(self.loss, type) or not (callable(self.loss) and hasattr(self.loss, "per_step")):
            raise refuse("loss", self.loss, "a loss that says per_step", "Pass CrossEntropy() or TET().")
        check_kind("distillation", self.distillation, Distillation, "Distillation()")


@dataclass(frozen=True)
class EpochResult:
    """What one epoch did: mean loss over its samples, and accuracy on the validation batches (fraction of 1)."""

    epoch: int
    loss: float
    val_accuracy: float | None


class _DivergedError(ArithmeticError):
    """A loss or gradient that is not finite; the weights were not touched by it."""


OnBatch = Callable[[int, int, float], None]
OnEpoch = Callable[[EpochResult], None]


def fit(
    model: nn.Module,
    train: EpochBatches | Iterable[Any],
    val: Iterable[Any] | None,
    schedule: Schedule,
    *,
    teacher: nn.Module | None = None,
    checkpoint: str | Path | None = None,
    on_batch: OnBatch | None = None,
    on_epoch: OnEpoch | None = None,
) -> list[EpochResult]:
    """Train any network, spiking or not, in place, and leave it in eval mode.

    A checkpoint of a run with the same schedule is resumed; batches, schedule, momentum and random state go on
    as if the run had not been broken. The run has a random state of its own, from the schedule's seed: the caller's
    is as before when it ends, and so are the teacher's device and modes.

    Args:
        model: gives one tensor [N, C]; a spiking one also every step.
        train: training batches by epoch, or any loader that can be iterated again, such as a DataLoader; only the
            first kind resumes exactly.
        val: batches with labels to measure after each epoch.
        schedule: everything that decides the result.
        teacher: network whose outputs are distilled.
        checkpoint: file written after each epoch; None writes none.
        on_batch: told (epoch, batch, loss).
        on_epoch: told of each epoch that ends.

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
    _check_arguments(model, train, val, schedule, teacher)
    if checkpoint is not None:
        check_kind("finetune: checkpoint", checkpoint, (str, Path), 'checkpoint="run.safetensors"')
    source = train if isinstance(train, EpochBatches) else _Repeated(train)
    file = None if checkpoint is None else Path(checkpoint)
    device = next(model.parameters()).device
    with _own_random_state(device), _as_teacher(teacher, device):
        return _run(model, source, val, schedule, teacher, file, on_batch, on_epoch)


def _check_arguments(
    model: nn.Module,
    train: EpochBatches | Iterable[Any],
    val: Iterable[Any] | None,
    schedule: Schedule,
    teacher: nn.Module | None,
) -> None:
    check_network("finetune: the network", model)
    if next(model.parameters(), None) is None:
        raise ArgumentError(f"finetune: {type(model).__name__} has no parameters; expected some to train.")
    check_kind("finetune: schedule", schedule, Schedule, "Schedule(epochs=10)")
    if teacher is not None:
        check_network("finetune: teacher", teacher)
    for name, data in (("train", train), ("val", val)):
        where = f"finetune: {name}"
        if data is None and name == "val":
            continue
        if not isinstance(data, EpochBatches) or isinstance(data, type):
            check_batches(where, data)
        if isinstance(data, Tensor):
            raise refuse(where, data, "batches", "Pass DataLoader(TensorDataset(x, y), batch_size=128, shuffle=True).")
        if isinstance(data, Iterator):
            raise refuse(where, data, "batches that can be read once for each epoch", "Pass list(…) or a DataLoader.")


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Leave the random state of the caller, on the CPU and on the network's device, as it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield


@contextmanager
def _as_teacher(teacher: nn.Module | None, device: torch.device) -> Iterator[None]:
    """Put a network on the device in eval mode for the length of the block."""
    if teacher is None:
        yield
        return
    home = next((parameter.device for parameter in teacher.parameters()), device)
    modes = [(module, module.training) for module in teacher.modules()]
    try:
        teacher.to(device).eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
        teacher.to(home)


def _run(
    model: nn.Module,
    train: EpochBatches,
    val: Iterable[Any] | None,
    schedule: Schedule,
    teacher: nn.Module | None,
    checkpoint: Path | None,
    on_batch: OnBatch | None,
    on_epoch: OnEpoch | None,
) -> list[EpochResult]:
    optimizer = torch.optim.SGD(_groups(model, schedule), lr=schedule.lr, momentum=schedule.momentum)
    torch.manual_seed(schedule.seed)
    start = None if checkpoint is None else _fingerprint(model, train)
    history = _resume(model, optimizer, schedule, checkpoint, start)
    batches = _count(train.at_epoch(0))
    for epoch in range(len(history), schedule.epochs):
        model.train()
        total, seen = 0.0, 0
        for index, batch in enumerate(train.at_epoch(epoch)):
            inputs, y = _split("finetune: train", batch, model)
            _set_rate(optimizer, schedule, (epoch + index / batches) / schedule.epochs)
            try:
                loss = _step(model, optimizer, schedule, teacher, inputs, y)
            except _DivergedError as error:
                raise TrainingError(
                    f"epoch {epoch + 1}, batch {index + 1}: {error}; expected a finite number. "
                    "Lower lr or neuron_lr, or look for NaN in the data; a checkpoint of the last whole epoch is kept "
                    "if one was asked for."
                ) from error
            samples = _samples(model, inputs)
            total, seen = total + loss * samples, seen + samples
            if on_batch is not None:
                on_batch(epoch, index, loss)
        model.eval()
        history.append(EpochResult(epoch, total / seen, None if val is None else accuracy(model, val)))
        if checkpoint is not None:
            _save(model, optimizer, schedule, history, checkpoint, start)
        if on_epoch is not None:
            on_epoch(history[-1])
    return history


def accuracy(model: nn.Module, batches: Iterable[Any]) -> float:
    """Return the fraction of samples whose largest output is the label's; batches are (x, y)."""
    correct = count = 0
    with torch.no_grad():
        for batch in batches:
            inputs, y = _split("finetune: val", batch, model)
            if y is None:
                raise TrainingError("validation batches have no labels; expected (x, y). Pass val=None.")
            correct += int((only_tensor(model(*inputs), "finetune").argmax(1) == y).sum())
            count += len(y)
    if count == 0:
        raise TrainingError("the validation data gave no batch; expected at least one sample. Pass val=None.")
    return correct / count


def neuron_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return θ, v_init, λ and μ of every site."""
    return [
        p for module in model.modules() if isinstance(module, SpikingSite) for p in module.parameters(recurse=False)
    ]


def _groups(model: nn.Module, schedule: Schedule) -> list[dict[str, Any]]:
    neurons = neuron_parameters(model)
    known = {id(p) for p in neurons}
    others = [p for p in model.parameters() if id(p) not in known and p.requires_grad]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "lr": schedule.lr, "weight_decay": schedule.weight_decay},
        {"params": [p for p in others if p.ndim <= 1], "lr": schedule.lr, "weight_decay": 0.0},
        {"params": neurons, "lr": schedule.neuron_lr, "weight_decay": 0.0},
    ]
    return [{**group, "base_lr": group["lr"]} for group in groups]


def _set_rate(optimizer: torch.optim.Optimizer, schedule: Schedule, progress: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * 0.5 * (1 + math.cos(math.pi * progress))


def _split(where: str, batch: Any, model: nn.Module) -> tuple[list[Tensor], Tensor | None]:
    like = next(model.parameters())
    inputs, y = split_batch(where, batch, input_count(model))
    if y is not None:
        y = check_labels(where, y, _samples(model, inputs)).to(like.device)
    return [x.to(like) for x in inputs], y


def _samples(model: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Return N of inputs [N, *F], or [T, N, *F] where the network takes event frames."""
    return inputs[0].shape[int(any(isinstance(module, FoldEvents) for module in model.modules()))]


def _count(batches: Iterable[Any]) -> int:
    try:
        count = len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)
    except TypeError:  # a DataLoader over an IterableDataset has a __len__ that fails
        count = sum(1 for _ in batches)
    if count == 0:
        raise TrainingError("the training data gave no batch; expected at least one sample. Check --train-samples.")
    return count


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    teacher: nn.Module | None,
    inputs: Sequence[Tensor],
    y: Tensor | None,
) -> float:
    with torch.no_grad():
        target = None if teacher is None else only_tensor(teacher(*inputs), "finetune")
    returned = per_step(model, *inputs) if schedule.loss.per_step else model(*inputs)
    outputs = only_tensor(returned, "finetune")
    if y is not None and int(y.max()) >= outputs.shape[-1]:
        raise TrainingError(
            f"a label is {int(y.max())} and the network has {outputs.shape[-1]} outputs; expected labels below that. "
            "Use the data set that the network was made for."
        )
    loss = combined(schedule.loss, schedule.distillation, outputs, y, target)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if schedule.clip_norm is None else schedule.clip_norm)
    for what, value in (("loss", loss.detach()), ("gradient", norm)):
        if not torch.isfinite(value):
            raise _DivergedError(f"the {what} is {float(value)}")
    optimizer.step()
    return float(loss.detach())


def _fingerprint(model: nn.Module, train: EpochBatches) -> str:
    """Digest of where a run starts: the weights, the number of batches and the first of them."""
    batches = train.at_epoch(0)
    first = next(iter(batches), ())
    tensors = [first] if isinstance(first, Tensor) else [item for item in first if isinstance(item, Tensor)]
    digest = hashlib.sha256(str(_count(batches)).encode())
    for tensor in (*model.state_dict().values(), *tensors):
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _save(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    history: list[EpochResult],
    path: Path,
    start: str | None,
) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum.{name}"] = momentum
    tensors["random_state"] = torch.get_rng_state()
    facts = {"schedule": plain_value(schedule), "history": plain_value(history), "start": start}
    write_tensors(path, tensors, facts)


def _resume(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, path: Path | None, start: str | None
) -> list[EpochResult]:
    if path is None or not path.exists():
        return []
    try:
        tensors, metadata = read_tensors(path)
    except ArtifactError as error:
        raise TrainingError(f"{path}: not a checkpoint that can be read. Delete it to start anew.") from error
    if metadata.get("schedule") != plain_value(schedule) or metadata.get("start") != start:
        raise TrainingError(
            f"{path}: a checkpoint of a run with other settings, data or starting weights; expected the same. "
            "Delete it to start anew."
        )
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    for name, parameter in model.named_parameters():
        if f"momentum.{name}" in tensors:
            optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum.{name}"].to(parameter.device)
    torch.set_rng_state(tensors["random_state"])
    return [EpochResult(entry["epoch"], entry["loss"], entry["val_accuracy"]) for entry in metadata["history"]]
