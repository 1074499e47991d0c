"""The command line's values as types: readouts, sizes, and the batches that a job reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import click
import torch
from torch import Tensor

from .. import zoo
from ..errors import ArgumentError, DataError
from ..readout import Average, DelayedReadout, MeanReadout, WeightedReadout
from ..zoo.augmentation import Augmentation, CropFlip
from ..zoo.data import HELP, check_kind_of_data
from ..zoo.events import EventSplit, holds_events
from ..zoo.images import AnyPreprocessing, Batches, FramePreprocessing, Preprocessing, Split
from ..zoo.registry import IMAGENET
from ..zoo.splits import ArraySplit
from .loading import Source
from .spike import DirectCoding, Encoding, EventFrames

DATA_HELP = f"{HELP}."
SEED = click.IntRange(0, 2**63 - 1)
TRUST_OPTION = click.option(
    "--trust-pickle", is_flag=True, help="Let a pickled file run code. Only for files you trust."
)
MODULE_OPTION = click.option(
    "--module", "modules", multiple=True, metavar="NAME",
    help="Your module, as in my_pkg.my_file, whose classes a pickle names; may be given several times.",
)  # fmt: skip
_SOURCE_OPTIONS = (
    click.option("--arch", metavar="NAME", help="Architecture of a state_dict; recognised unless given."),
    click.option("--entry", metavar="KEY", help="What to take of a checkpoint that holds several sets of weights."),
    TRUST_OPTION,
    MODULE_OPTION,
)


def source_options(command: Any) -> Any:
    """Add the options that say how a model file is read, with the names of :func:`load_source`'s arguments."""
    for option in reversed(_SOURCE_OPTIONS):
        command = option(command)
    return command


class ReadoutType(click.ParamType):
    """``mean``, ``delayed:STEPS`` or ``weighted:W1,W2,…``."""

    name = "readout"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Average:
        """Return the readout."""
        if not isinstance(value, str):
            return value
        kind, _, option = value.partition(":")
        try:
            if kind == "delayed":
                return DelayedReadout(int(option))
            if kind == "weighted":
                return WeightedReadout(tuple(float(part) for part in option.split(",")))
        except ArgumentError as error:
            self.fail(str(error), param, ctx)
        except ValueError:
            self.fail(f"{value!r}: expected numbers, as in delayed:2 or weighted:1,2,3,4.", param, ctx)
        if value == "mean":
            return MeanReadout()
        self.fail(f"{value!r} is no readout; expected mean, delayed:STEPS or weighted:W1,W2,….", param, ctx)


class NumbersType(click.ParamType):
    """Numbers separated by commas."""

    def __init__(self, kind: type[int] | type[float], example: str) -> None:
        self.kind, self.example = kind, example
        self.name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """Return a tuple of numbers."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self.kind(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: expected numbers separated by commas, as in {self.example}.", param, ctx)
        finite = all(math.isfinite(number) for number in numbers)
        if not finite or (self.kind is int and min(numbers) < 1):
            what = "whole numbers above 0" if self.kind is int else "finite numbers"
            self.fail(f"{value!r}: expected {what}, as in {self.example}.", param, ctx)
        return numbers


@dataclass(frozen=True)
class Inputs:
    """What a job reads: batches by purpose, how samples become input, and which parts of that were assumed."""

    preprocessing: AnyPreprocessing
    assumed: tuple[str, ...]
    calibration: Batches | None
    train: Batches | None
    val: Batches | None
    test: Batches | None
    order: str | None
    training: str | None
    classes: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def encoding(self) -> Encoding:
        """Return what the input is to the spiking network."""
        return EventFrames() if isinstance(self.preprocessing, FramePreprocessing) else DirectCoding()

    @property
    def example(self) -> Tensor:
        """Return one sample as the spiking network takes it, of zeros: [1, C, H, W], or one frame [1, 1, C, H, W]."""
        axes = (1, 1) if isinstance(self.preprocessing, FramePreprocessing) else (1,)
        return torch.zeros((*axes, *self.preprocessing.input_size))


@dataclass(frozen=True)
class Amounts:
    """How many samples of each kind; None takes all."""

    calibration: int
    train: int | None
    test: int | None
    seed: int


def open_inputs(
    source: Source,
    spec: str | None,
    timesteps: int,
    amounts: Amounts,
    *,
    input_size: tuple[int, ...] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> Inputs:
    """Open the data; the notices say what was assumed.

    Raises:
        DataError: if the data is missing or does not fit.
        ArgumentError: if normalisation and input size disagree.
    """
    known = source.card.preprocessing if source.card else None
    if spec is not None and known is not None:
        check_kind_of_data(spec, known)
    size = input_size or (known.input_size if known else source.input_size)
    data = None if spec is None else zoo.load_data(spec, input_size=size or IMAGENET.input_size, timesteps=timesteps)
    assumed = []
    if size is None:
        size = IMAGENET.input_size
        if data is not None and isinstance(data.test, ArraySplit | EventSplit):
            size = data.test.shape
        assumed.append("input_size")
    preprocessing: AnyPreprocessing
    if isinstance(known, FramePreprocessing) or (spec is not None and holds_events(spec)):
        refuse_normalisation(mean, std)
        preprocessing = FramePreprocessing(size)
    else:
        if mean is None or std is None:
            fallback = known if known and known.input_size[0] == size[0] else _last_resort(size[0])
            if fallback is not known:
                assumed += [name for name, given in (("mean", mean), ("std", std)) if given is None]
            mean, std = mean or fallback.mean, std or fallback.std
        preprocessing = Preprocessing(size, mean, std)
    if data is None:
        notices = assumption_notices(preprocessing, [name for name in assumed if name == "input_size"])
        return Inputs(preprocessing, tuple(assumed), None, None, None, None, None, None, notices=notices)
    still = CropFlip(padding=0, flip=False)
    inputs = _batches(data, preprocessing, source.card.augmentation if source.card else still, timesteps, amounts)
    said = (*assumption_notices(preprocessing, assumed), *_resize_notice(data, preprocessing))
    return replace(inputs, assumed=tuple(assumed), classes=data.classes, notices=(*said, f"Samples: {inputs.order}."))


def refuse_normalisation(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Refuse what images have and event frames have not.

    Raises:
        ArgumentError: if either was given.
    """
    given = [name for name, value in (("--mean", mean), ("--std", std)) if value is not None]
    if given:
        raise ArgumentError(
            f"{' and '.join(given)} came with event frames, which are numbers of events and are not normalised. "
            "Leave it out."
        )


def assumption_notices(preprocessing: AnyPreprocessing, assumed: Sequence[str]) -> tuple[str, ...]:
    """Say what nobody named: ``assumed`` holds field names of :class:`Preprocessing`."""
    if not assumed:
        return ()
    values = ", ".join(f"{name.replace('_', ' ')} {_list(getattr(preprocessing, name))}" for name in assumed)
    options = ", ".join(f"--{name.replace('_', '-')}" for name in assumed)
    return (f"Assumed, as nothing says it: {values}. Give {options} if the model was trained otherwise.",)


def _resize_notice(data: zoo.DataSet, preprocessing: AnyPreprocessing) -> tuple[str, ...]:
    wanted = tuple(preprocessing.input_size[1:])
    if not isinstance(data.test, ArraySplit | EventSplit) or (have := data.test.shape[1:]) == wanted:
        return ()
    shown = ("×".join(map(str, size)) for size in (have, wanted))
    return ("Samples are resized from {} to {}, the model's input size; --input-size overrides it.".format(*shown),)


def _last_resort(channels: int) -> Preprocessing:
    if channels == len(IMAGENET.mean):
        return IMAGENET
    return Preprocessing((channels, 1, 1), (0.5,) * channels, (0.5,) * channels)


def _list(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def evaluation_batch(preprocessing: AnyPreprocessing, timesteps: int) -> int:
    """Return a batch size whose timed activations stay near the processor: fewer for larger images and T."""
    pixels = math.prod(preprocessing.input_size[1:])
    return max(4, min(256, 2**18 // (timesteps * pixels)))


def training_batch(count: int) -> int:
    """Return a batch size that gives a small data set about 100 steps an epoch: 32 to 128."""
    return max(32, min(128, count // 100))


def _batches(
    data: zoo.DataSet, preprocessing: AnyPreprocessing, augmentation: Augmentation, timesteps: int, amounts: Amounts
) -> Inputs:
    small = evaluation_batch(preprocessing, timesteps)
    order = zoo.seeded_order(data.train, amounts.seed)
    train = order[: amounts.train]
    held_out = order[len(train) : len(train) + 500]
    test = _test_order(data.test, amounts)
    calibration = order[: amounts.calibration]
    said = (
        f"calibration the first {len(calibration)} of {len(order)} training samples, test {len(test)} of "
        f"{len(data.test)}, both in the order of seed {amounts.seed}"
    )
    training = f"fine-tuning on the first {len(train)} of the same order, {len(held_out)} after them held out"
    return Inputs(
        preprocessing,
        (),
        Batches(data.train, preprocessing, small, calibration),
        Batches(data.train, preprocessing, training_batch(len(train)), train, augmentation, amounts.seed),
        Batches(data.train, preprocessing, small, held_out) if len(held_out) else None,
        Batches(data.test, preprocessing, small, test),
        said,
        training,
    )


def _test_order(split: Split, amounts: Amounts) -> Any:
    order = zoo.seeded_order(split, amounts.seed)[: amounts.test]
    if len(order) == 0:
        raise DataError("the test split has no samples; expected at least one. Check --data and --test-samples.")
    return order
