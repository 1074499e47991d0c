"""The options of ``lmh finetune`` that decide the training, and the recipe that they make."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import click
from click.core import ParameterSource

from ..errors import ArgumentError
from ..resets import AttachedReset, DetachedReset, Reset
from ..spiking import IF, LIF, LMH, PerChannel, PerStep
from ..surrogates import Arctan, Dspike, Rectangle, Sigmoid, Surrogate, Triangle
from ..zoo.augmentation import Augmentation, AutoAugment, Cutout, InTurn
from ..zoo.images import Batches
from .batch_norm import FrozenBatchNorm, LiveBatchNorm, SyncedBatchNorm
from .losses import TET, CrossEntropy, Distillation
from .memory import KeepAll, Memory, Recompute
from .mixing import CutMix, Mixup
from .precision import BFloat16, Float32
from .recipe import TrainingRecipe, read_recipe
from .schedule import EMA, EarlyStopping, Schedule
from .strategies import (
    SLTT,
    STBP,
    WIDER,
    EverySlice,
    Hybrid,
    OncePerBatch,
    Progressive,
    Strategy,
    TimeSliced,
    default_qcfs,
)

_RATE = click.FloatRange(min=0, min_open=True)
_SHARE = click.FloatRange(0, 1)
_COUNT = click.IntRange(min=1)
MIXES = {"mixup": Mixup(), "cutmix": CutMix()}
RESETS: dict[str, Reset] = {"attached": AttachedReset(), "detached": DetachedReset()}
BATCH_NORMS = {"live": LiveBatchNorm(), "frozen": FrozenBatchNorm(), "synced": SyncedBatchNorm()}
SURROGATES = {kind.__name__.lower(): kind for kind in (Triangle, Rectangle, Sigmoid, Arctan, Dspike)}


class SurrogateType(click.ParamType):
    """A surrogate by its name, and its first number behind a colon."""

    name = "surrogate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Surrogate:
        """Return the surrogate of a text."""
        if not isinstance(value, str):
            return value
        name, colon, number = value.partition(":")
        try:
            return SURROGATES[name](float(number)) if colon else SURROGATES[name]()
        except (KeyError, ValueError, ArgumentError):
            names = ", ".join(SURROGATES)
            self.fail(f"{value!r} is none of {names}, with a number above 0 as in triangle:2.", param, ctx)


_OPTIONS = (
    click.option("--epochs", type=_COUNT, help="In all stages together. 10 unless given."),
    click.option(
        "--strategy", type=click.Choice(["hybrid", "progressive", "stbp", "time-sliced", "sltt"]),
        help="hybrid for an ANN, stbp for a spiking network, unless given.",
    ),
    click.option("--slice", "slice_steps", type=_COUNT, metavar="K", help="Steps of a slice; time-sliced or hybrid."),
    click.option("--accumulate", is_flag=True, help="Update once a batch, not after each slice."),
    click.option("--qcfs-epochs", type=_COUNT, help="Of hybrid's first stage, out of --epochs."),
    click.option("--qcfs-lr", type=_RATE, help="Learning rate of hybrid's first stage."),
    click.option("--qcfs-warmup", type=click.IntRange(min=0), metavar="BATCHES", help="Of that stage."),
    click.option("--leak", type=click.FloatRange(0, 1, min_open=True), help="λ of progressive's LIF start; 0.5."),
    click.option(
        "--membrane", type=click.Choice(["layer", "channel", "step", "wider"]),
        help="λ and μ of an ANN's neurons: one for each layer, channel or step (θ too), or wider ranges; layer.",
    ),
    click.option(
        "--reset", type=click.Choice(list(RESETS)),
        help="Whether a gradient passes the reset; attached from an IF start, detached from a LIF start, unless given.",
    ),
    click.option(
        "--surrogate", type=SurrogateType(), metavar="NAME[:NUMBER]",
        help="triangle, rectangle, sigmoid, arctan or dspike, with its γ, α or b, such as triangle:2; the neurons' own "
        "unless given.",
    ),
    click.option("--lr", type=_RATE, help="Learning rate of the weights."),
    click.option("--neuron-lr", type=click.FloatRange(min=0), help="Learning rate of θ, v_init, λ and μ."),
    click.option("--warmup", type=click.IntRange(min=0), metavar="BATCHES", help="In which the rates rise."),
    click.option("--weight-decay", type=click.FloatRange(min=0), help="Of the weights."),
    click.option("--batch-size", type=_COUNT, help="32 to 128, by the number of images, unless given."),
    click.option("--loss", type=click.Choice(["ce", "tet"]), help="Cross-entropy of the mean, or of every step (TET)."),
    click.option("--tet-lambda", type=_SHARE, metavar="λ", help="Of TET's pull on logits, 0.05; 0 for large ones."),
    click.option("--label-smoothing", type=_SHARE, help="With --loss ce."),
    click.option("--distill", type=_SHARE, metavar="WEIGHT", help="Share of the teacher in the loss; 0.9."),
    click.option(
        "--distill-features", type=click.FloatRange(min=0), metavar="WEIGHT",
        help="Of the distance between the neurons' mean outputs and the ANN's activations; for an ANN.",
    ),
    click.option("--no-teacher", is_flag=True, help="Learn from the labels alone."),
    click.option("--temperature", type=_RATE, help="Of the teacher's outputs; 2."),
    click.option("--mix", type=click.Choice(list(MIXES)), multiple=True, help="Mix images; may be given twice."),
    click.option("--cutout", type=_COUNT, metavar="PIXELS", help="Blacken a square of each image."),
    click.option("--autoaugment", is_flag=True, help="AutoAugment's policy for CIFAR-10."),
    click.option("--ema", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="Average the weights."),
    click.option("--early-stopping", type=_COUNT, metavar="EPOCHS", help="Patience on the held-out samples."),
    click.option(
        "--batch-norm", type=click.Choice(list(BATCH_NORMS)),
        help="By the batch, by the network's own statistics, or by the batch over all GPUs; live unless given.",
    ),
    click.option("--recompute", is_flag=True, help="Less memory, more time, the same weights."),
    click.option("--amp", is_flag=True, help="Train in bfloat16 by autocast, channels last; neurons in fp32."),
    click.option("--channels-last", is_flag=True, help="Store activations channels last in fp32 too."),
    click.option(
        "--recipe", metavar="FILE", help="A .toml from --save-recipe, or a network that lmh finetune trained."
    ),
)  # fmt: skip
LONGEST_WARMUP = 100


def recipe_options(command: Any) -> Any:
    """Add the options that decide the training."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class Wishes:
    """What was asked for, by the names of the options; None where nothing was."""

    epochs: int | None = None
    strategy: str | None = None
    slice_steps: int | None = None
    accumulate: bool = False
    qcfs_epochs: int | None = None
    qcfs_lr: float | None = None
    qcfs_warmup: int | None = None
    leak: float | None = None
    membrane: str | None = None
    reset: str | None = None
    surrogate: Surrogate | None = None
    lr: float | None = None
    neuron_lr: float | None = None
    warmup: int | None = None
    weight_decay: float | None = None
    batch_size: int | None = None
    loss: str | None = None
    tet_lambda: float | None = None
    label_smoothing: float | None = None
    distill: float | None = None
    distill_features: float | None = None
    no_teacher: bool = False
    temperature: float | None = None
    mix: tuple[str, ...] = ()
    cutout: int | None = None
    autoaugment: bool = False
    ema: float | None = None
    early_stopping: int | None = None
    batch_norm: str | None = None
    amp: bool = False
    recompute: bool = False
    channels_last: bool = False
    recipe: str | None = None

    @classmethod
    def of(cls, options: dict[str, Any]) -> Wishes:
        """Take the wishes out of a command's options.

        Raises:
            click.UsageError: if a recipe came together with an option that it decides.
        """
        wishes = cls(**{field.name: options.pop(field.name) for field in fields(cls)})
        source = click.get_current_context().get_parameter_source
        given = [field.name for field in fields(cls) if source(field.name) is ParameterSource.COMMANDLINE]
        others = [name for name in given if name != "recipe"]
        if wishes.recipe is not None and others:
            flags = ", ".join(map(_flag, others))
            raise click.UsageError(
                f"--recipe {wishes.recipe} decides the training, and {flags} came with it. Leave one out."
            )
        wishes._check()
        return wishes

    def _check(self) -> None:
        """Refuse options that another one gives no meaning."""
        needs = {
            "slice_steps": ("time-sliced", "hybrid"), "accumulate": ("time-sliced", "hybrid"),
            "qcfs_epochs": ("hybrid", None), "qcfs_lr": ("hybrid", None), "qcfs_warmup": ("hybrid", None),
            "leak": ("progressive",),
        }  # fmt: skip
        for name, strategies in needs.items():
            value = getattr(self, name)
            if value is not None and value is not False and self.strategy not in strategies:
                raise click.UsageError(f"{_flag(name)} goes with --strategy {strategies[0]}. Add it, or leave it out.")
        if self.strategy == "time-sliced" and self.slice_steps is None:
            raise click.UsageError("--strategy time-sliced needs --slice K, a divisor of T.")
        if self.reset is not None and (self.strategy == "sltt" or self.slice_steps == 1):
            raise click.UsageError("--reset came with slices of one step, which hand no gradient on. Leave it out.")
        if self.accumulate and self.slice_steps is None:
            raise click.UsageError("--accumulate goes with --slice K. Add it, or leave it out.")
        if self.no_teacher and any(x is not None for x in (self.distill, self.distill_features, self.temperature)):
            raise click.UsageError("--no-teacher came with --distill… or --temperature. Leave one out.")
        if self.loss != "tet" and self.tet_lambda is not None:
            raise click.UsageError("--tet-lambda goes with --loss tet. Add it, or leave it out.")
        if self.loss == "tet" and self.label_smoothing is not None:
            raise click.UsageError("--label-smoothing goes with --loss ce. Leave one out.")

    @cached_property
    def _read(self) -> TrainingRecipe | None:
        """The recipe that was named."""
        return None if self.recipe is None else read_recipe(self.recipe)

    @property
    def seed(self) -> int:
        """The seed of the recipe that was named, or 0."""
        return 0 if self._read is None else self._read.schedule.seed

    @property
    def memory(self) -> Memory:
        """What the run keeps: all, unless a stage of it recomputes."""
        if self._read is None:
            return Recompute() if self.recompute else KeepAll()
        return next((each.memory for each in self._read.schedules if isinstance(each.memory, Recompute)), KeepAll())

    def recipe_for(self, *, spiking: bool, batches: Batches, seed: int) -> TrainingRecipe:
        """Return the recipe.

        Args:
            spiking: whether a spiking network is trained; hybrid is then STBP alone.
            batches: training batches, with the usual batch size and augmentation.
            seed: of training.

        Raises:
            ArgumentError: if a recipe file cannot be read.
            click.UsageError: if the epochs of the stages do not add up.
        """
        if self._read is not None:
            return self._read.seeded(seed)
        for name in ("qcfs_epochs", "qcfs_lr", "qcfs_warmup", "leak", "membrane", "reset", "distill_features"):
            if spiking and getattr(self, name) is not None:
                raise click.UsageError(f"{_flag(name)} is for an ANN; the network spikes already. Leave it out.")
        batches = replace(batches, batch_size=self.batch_size or batches.batch_size)
        strategy, schedule = self._stages(spiking, len(batches), seed)
        return TrainingRecipe(strategy, schedule, batches.batch_size, self._augmentation(batches.augmentation))

    def _stages(self, spiking: bool, batches: int, seed: int) -> tuple[Strategy, Schedule]:
        epochs = self.epochs or 10
        name = self.strategy or ("stbp" if spiking else "hybrid")
        neuron = self._neuron(LIF(0.5 if self.leak is None else self.leak) if name == "progressive" else IF())
        last: STBP | TimeSliced = STBP(neuron)
        if self.slice_steps is not None:
            last = TimeSliced(self.slice_steps, OncePerBatch() if self.accumulate else EverySlice(), neuron)
        plain = Schedule(epochs=epochs, seed=seed)
        match name:
            case "progressive":
                return Progressive(neuron), self._wished(plain, last=True)
            case "sltt":
                return SLTT(neuron), self._wished(plain, last=True)
            case "hybrid" if not spiking:
                first = self.qcfs_epochs or qcfs_epochs(epochs)
                if first >= epochs:
                    raise click.UsageError(
                        f"--qcfs-epochs {first} leaves nothing of --epochs {epochs} for the spiking network. Lower it."
                    )
                if first > 0:
                    qcfs = self._wished(replace(gentle(first, batches, seed), lr=default_qcfs().lr), last=False)
                    return Hybrid(qcfs, last), self._wished(gentle(epochs - first, batches, seed), last=True)
                if self.strategy == "hybrid" or self.qcfs_lr is not None or self.qcfs_warmup is not None:
                    raise click.UsageError(
                        f"hybrid training has no room for its QCFS stage in --epochs {epochs}: it takes a third of "
                        "them, or --qcfs-epochs. Pass that, more epochs, or --strategy stbp."
                    )
            case "hybrid":
                raise click.UsageError("--strategy hybrid is for an ANN; the network spikes already. Take stbp.")
        return last, self._wished(plain, last=True)

    def _neuron(self, start: IF | LIF) -> LMH:
        """Return the neurons that an ANN is converted to."""
        plain = LMH(start, reset=None if self.reset is None else RESETS[self.reset])
        match self.membrane:
            case "channel":
                return replace(plain, granularity=PerChannel())
            case "step":
                return replace(plain, granularity=PerStep())
            case "wider":
                return replace(plain, ranges=WIDER)
        return plain

    def _wished(self, schedule: Schedule, *, last: bool) -> Schedule:
        """Put what was asked for into a stage's schedule; TET and --lr are the spiking network's alone."""
        known = Distillation()
        wished: dict[str, Any] = {
            "lr": self.lr if last else self.qcfs_lr,
            "neuron_lr": self.neuron_lr,
            "warmup_steps": self.warmup if last or self.qcfs_warmup is None else self.qcfs_warmup,
            "weight_decay": self.weight_decay,
            "mixing": tuple(MIXES[name] for name in self.mix) or None,
            "ema": None if self.ema is None else EMA(self.ema),
            "early_stopping": None if self.early_stopping is None else EarlyStopping(self.early_stopping),
            "batch_norm": None if self.batch_norm is None else BATCH_NORMS[self.batch_norm],
            "memory": self.memory,
            "precision": BFloat16() if self.amp else Float32(self.channels_last),
            "distillation": Distillation(
                known.weight if self.distill is None else self.distill,
                self.temperature or known.temperature,
                self.distill_features or 0.0,
            ),
            "surrogate": self.surrogate if last else None,
            "loss": self._loss() if last else CrossEntropy(self.label_smoothing or 0.0),
        }
        found = replace(schedule, **{name: value for name, value in wished.items() if value is not None})
        return replace(found, distillation=None) if self.no_teacher else found

    def _loss(self) -> CrossEntropy | TET:
        if self.loss == "tet":
            return TET() if self.tet_lambda is None else TET(self.tet_lambda)
        return CrossEntropy(self.label_smoothing or 0.0)

    def _augmentation(self, usual: Augmentation | None) -> Augmentation | None:
        more: list[Augmentation] = [AutoAugment()] if self.autoaugment else []
        if self.cutout is not None:
            more.append(Cutout(self.cutout))
        return InTurn((*([] if usual is None else [usual]), *more)) if more else usual


def qcfs_epochs(epochs: int) -> int:
    """Return how many of the epochs are the QCFS stage's, unless that is said.

    >>> [qcfs_epochs(epochs) for epochs in (1, 2, 4, 10, 30)]
    [0, 0, 1, 3, 10]
    """
    return epochs // 3


def gentle(epochs: int, batches: int, seed: int) -> Schedule:
    """Return a schedule for a network that is trained already: a small rate, reached slowly."""
    return Schedule(epochs=epochs, lr=0.02, seed=seed, warmup_steps=min(LONGEST_WARMUP, epochs * batches // 5))


def _flag(name: str) -> str:
    return "--slice" if name == "slice_steps" else f"--{name.replace('_', '-')}"
