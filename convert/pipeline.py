"""convert: from a pretrained ANN to a spiking network in one call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..arguments import (
    check_batches,
    check_kind,
    check_names,
    check_network,
    check_timesteps,
    refuse,
    split_batch,
)
from ..calibrate import Policy, automatic, calibrate, check_policy, refit, replay, stand_ins
from ..errors import ArgumentError
from ..readout import READOUTS, Average, MeanReadout
from ..records import FROM_QCFS, Calibration, Prepared, Report, Spike
from ..spiking import LMH, sites
from ..structures import SampleShape, as_sample_shape, input_count
from .maxpool import AveragePool, BeforeNeuron, Gated, MaxPool, WhereExact, pool_notices
from .normalisation import TEBN, Normalisation, PlainBatchNorm, TdBN, norm_notices
from .prepare import prepare
from .rules import ReluSurgery, Rules, StandIns, merged
from .spike import DirectCoding, Encoding, EventFrames, spike
from .tracing import check_not_spiking

REFIT_SAMPLES = 128


@dataclass(frozen=True)
class Recipe:
    """What a conversion was asked for, apart from the network and the data.

    Attributes:
        timesteps: T.
        neuron: preset, granularity, ranges and surrogate of the neurons.
        encoding: what the input is.
        sample_shape: shape of one input sample; of several inputs a shape for each.
        keep: paths that stay analog.
        surgery: the types that neurons stand in for where no rule applies; None refuses them.
        maxpool: what became of max-pools.
        normalisation: what became of BatchNorm layers.
        readout: how steps become one answer; all T of them count.
    """

    timesteps: int
    neuron: LMH = field(default_factory=LMH)
    encoding: Encoding = field(default_factory=DirectCoding)
    sample_shape: SampleShape = ()
    keep: tuple[str, ...] = ()
    surgery: StandIns | None = None
    maxpool: MaxPool = field(default_factory=BeforeNeuron)
    normalisation: Normalisation = field(default_factory=PlainBatchNorm)
    readout: Average = field(default_factory=MeanReadout)


@dataclass(frozen=True, repr=False)
class Conversion:
    """What :func:`convert` returns.

    Attributes:
        snn: the spiking network, an ``fx.GraphModule`` in eval mode that stands where the ANN stood.
        calibration: the thresholds it started from.
        report: what became of every node.
        recipe: what was asked for.
        prepared: the ANN in rewritten form, for other calibrations of it.
        has_source_weights: whether ``prepared`` has the ANN's weights; of a network loaded without its ANN it has not.
    """

    snn: fx.GraphModule
    calibration: Calibration
    report: Report
    recipe: Recipe
    prepared: Prepared
    has_source_weights: bool = True

    def __repr__(self) -> str:
        report = self.report
        return (
            f"Conversion(timesteps={report.timesteps}, sites={len(sites(self.snn))}, "
            f"calibration={report.calibration!r}, spiking_coverage={report.spiking_coverage:.3g}, "
            f"notices={report.notices})"
        )


def convert(
    ann: nn.Module,
    timesteps: int,
    *,
    data: Iterable[Any] | Tensor | None = None,
    calibration: Policy | Calibration | None = None,
    example_input: Tensor | Sequence[Tensor] | None = None,
    rules: Rules | None = None,
    neuron: LMH | None = None,
    encoding: Encoding | None = None,
    keep: Iterable[str] = (),
    surgery: ReluSurgery | None = None,
    maxpool: MaxPool | None = None,
    normalisation: Normalisation | None = None,
    readout: Average | None = None,
) -> Conversion:
    """Convert a pretrained ANN to a spiking network of LM-H neurons.

    Every ReLU and QCFS becomes LM-H neurons (the equations of :mod:`lmh.neurons`) that start as IF neurons;
    the network then returns the mean of its output over T steps. Networks may take several tensors and return several
    in tuples and dicts; what no neuron reaches comes out as it is, all else as a mean.

    Args:
        ann: any traceable network of weighted layers, BatchNorm, pools, sums and rectifiers. Not changed. Parameters
            of its forward with a default keep that, unless example_input gives tensors for them.
        timesteps: T, 1 to 1024.
        data: images to find thresholds on, as batches [N, *F] (or tuples that begin with one) or one tensor;
            normalised as the ANN expects. Labels are not read. For k inputs, batches that begin with k tensors.
        calibration: a policy, or the :class:`Calibration` of an earlier conversion. Unless given:
            :func:`lmh.calibrate.automatic`, which is MinError with data and BatchNormStatistics without.
        example_input: one batch [N, *F] that shows the input's shape, or a tuple of one for each input; not needed
            with data.
        rules: from activation type to what becomes of it, for types of your own.
        neuron: preset, granularity and ranges; ``LMH()``, which is IF, unless given.
        encoding: ``DirectCoding()`` for images, ``EventFrames()`` for input [T, N, *F].
        keep: paths of nodes that stay analog, as the audit names them; one for each call of a module.
        surgery: ``ReluSurgery()`` lets neurons stand in for SiLU, GELU and the like, and keeps gates, softmax and
            normalisations analog; fine-tune afterwards. Unless given, all of them are refused.
        maxpool: what becomes of max-pools: ``WhereExact()`` for images and ``Gated()`` for event frames unless given,
            ``BeforeNeuron()``, or ``AveragePool()``, which changes the function and wants fine-tuning.
        normalisation: what becomes of BatchNorm behind neurons: ``PlainBatchNorm()`` unless given, ``TEBN()`` or
            ``TdBN()``; all start as the same function where the network is trained.
        readout: ``MeanReadout()`` unless given, ``DelayedReadout(steps)`` or ``WeightedReadout(weights)``: how the
            outputs of T steps become one answer. T is the number of all steps that run, read or not.

    Returns:
        The spiking network with its calibration and report.

    Raises:
        ArgumentError: for T out of range, weights that are not finite, or an input that does not fit.
        AuditError: listing every node that no rule covers.
        CalibrationError: if thresholds cannot be found with what was given.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> conversion = convert(net, timesteps=4, data=torch.rand(16, 4))
    >>> conversion.snn(torch.rand(3, 4)).shape
    torch.Size([3, 2])
    """
    _check_ann(ann)
    check_timesteps(timesteps)
    encoding = DirectCoding() if encoding is None else encoding
    neuron = LMH() if neuron is None else neuron
    if maxpool is None:
        maxpool = Gated() if isinstance(encoding, EventFrames) else WhereExact()
    normalisation = PlainBatchNorm() if normalisation is None else normalisation
    readout = MeanReadout() if readout is None else readout
    kept = _checked_options(neuron, encoding, keep, surgery, rules, maxpool)
    check_kind("convert: normalisation", normalisation, (PlainBatchNorm, TEBN, TdBN), "TEBN()", "TdBN()")
    check_kind(
        "convert: readout", readout, READOUTS, "MeanReadout()", "DelayedReadout(2)", "WeightedReadout((1.0, 2.0))"
    )
    readout.check(timesteps)
    if calibration is not None and not isinstance(calibration, Calibration):
        check_policy("convert: calibration", calibration)
    data, examples = _first_batch(ann, data, example_input, encoding)
    inputs = len(examples)
    sample_shape = as_sample_shape([x.shape[2 if isinstance(encoding, EventFrames) else 1 :] for x in examples])
    replaced = None if surgery is None else StandIns.of(surgery)
    recipe = Recipe(timesteps, neuron, encoding, sample_shape, kept, replaced, maxpool, normalisation, readout)
    prepared = prepare(ann, sample_shape, rules=rules, keep=recipe.keep, surgery=surgery, maxpool=maxpool)
    notices = []
    if isinstance(encoding, EventFrames) and data is not None:
        data = single_frames("convert: data", data, inputs)
    if data is not None and (strange := stand_ins(prepared)):
        images, data = _gathered(data, inputs, REFIT_SAMPLES)
        prepared = refit(prepared, *images)
        notices.append(
            f"ReLUs stand in for {len(strange)} activations that are no rectifiers; BatchNorm and biases were refit on "
            f"{len(images[0])} samples. Fine-tune to win back the rest."
        )
    if not isinstance(calibration, Calibration):
        policy = calibration
        if policy is None:
            policy = automatic(data is not None)
        without = calibration is None and data is None
        calibration = calibrate(prepared, policy, timesteps, data)
        if without and calibration.policy != FROM_QCFS:
            notices.append("No data was given, so thresholds came from BatchNorm statistics; data gives better ones.")
    return assemble(prepared, calibration, recipe, tuple(notices))


def _check_ann(ann: nn.Module) -> None:
    if isinstance(ann, Conversion):
        check_not_spiking(ann.snn, ann)
    check_network("convert: ann", ann)
    check_not_spiking(ann, ann)


def _checked_options(
    neuron: LMH,
    encoding: Encoding,
    keep: Iterable[str],
    surgery: ReluSurgery | None,
    rules: Rules | None,
    maxpool: MaxPool,
) -> tuple[str, ...]:
    """Refuse options of a wrong type, a class in the place of a value above all; return the paths to keep."""
    check_kind("convert: neuron", neuron, LMH, "LMH(IF())", "LMH(LIF(0.5))")
    check_kind("convert: encoding", encoding, (DirectCoding, EventFrames), "DirectCoding()", "EventFrames()")
    pools = (WhereExact, BeforeNeuron, AveragePool, Gated)
    check_kind("convert: maxpool", maxpool, pools, *(f"{kind.__name__}()" for kind in pools))
    if surgery is not None:
        check_kind("convert: surgery", surgery, ReluSurgery, "ReluSurgery()")
    if rules is not None:
        check_kind("convert: rules", rules, Mapping, "rules={nn.GELU: as_neuron}")
        merged(rules)
    return check_names("convert: keep", keep)


def assemble(prepared: Prepared, calibration: Calibration, recipe: Recipe, notices: tuple[str, ...] = ()) -> Conversion:
    """Build the spiking network of a prepared ANN from a known calibration: what loading and replaying use.

    Args:
        prepared: from :func:`prepare`; not changed.
        calibration: θ₀ and v_init of every site.
        recipe: T, neurons and encoding.
        notices: for the report, before those that this step adds.

    Raises:
        ArgumentError: if the calibration was made for other sites.
        AuditError: if a node would mix time or batch with features.

    >>> import torch
    >>> from dataclasses import replace
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> first = convert(net, timesteps=4, data=torch.rand(16, 4))
    >>> longer = assemble(first.prepared, first.calibration, replace(first.recipe, timesteps=8))
    >>> longer.report.timesteps
    8
    """
    missing = [path for path in prepared.spiking if path not in calibration.v_threshold]
    if missing:
        raise ArgumentError(
            f"calibration: no threshold for {', '.join(missing)}; it was made for {len(calibration.v_threshold)} other "
            "sites. Calibrate this network."
        )
    recipe.readout.check(recipe.timesteps)
    snn = spike(
        prepared, calibration, recipe.neuron, recipe.encoding, recipe.timesteps, recipe.normalisation, recipe.readout
    )
    replay(snn, calibration)
    kept = [fate.path for fate in prepared.fates if fate.fate == "kept"]
    if kept:
        shown = ", ".join(kept[:8]) + (f" and {len(kept) - 8} more" if len(kept) > 8 else "")
        share = f"{100 * prepared.spiking_coverage:.1f} % of activation elements spike"
        notices = (*notices, f"{len(kept)} nodes stay analog: {shown}; {share}.")
    notices = (*notices, *_approximations(snn, prepared, recipe))
    source = f"{calibration.policy}, {calibration.samples} samples"
    report = Report(recipe.timesteps, source, prepared.fates, prepared.spiking_coverage, notices)
    return Conversion(snn, calibration, report, recipe, prepared)


def _approximations(snn: fx.GraphModule, prepared: Prepared, recipe: Recipe) -> Iterator[str]:
    """Say where the network differs from the ANN by more than the rounding of T steps."""
    yield from pool_notices(snn, prepared.fates)
    yield from norm_notices(snn, recipe.normalisation)
    if not isinstance(recipe.readout, MeanReadout):
        yield f"The answer is {recipe.readout.text(recipe.timesteps)}; T and the energy count all {recipe.timesteps}."
    levels = {found.levels for found in prepared.activations.values() if isinstance(found, Spike) and found.levels}
    if levels - {recipe.timesteps}:
        known = ", ".join(str(level) for level in sorted(levels))
        yield f"QCFS was trained with L = {known} and T is {recipe.timesteps}; they agree best where T = L."


def _first_batch(
    ann: nn.Module,
    data: Iterable[Any] | Tensor | None,
    example_input: Tensor | Sequence[Tensor] | None,
    encoding: Encoding,
) -> tuple[Iterable[Any] | None, tuple[Tensor, ...]]:
    """Return the data, still whole, and a batch of each input that shows its shape."""
    events = isinstance(encoding, EventFrames)
    examples = None if example_input is None else _checked_examples(example_input, events)
    inputs = input_count(ann) if examples is None else len(examples)
    if isinstance(data, Tensor):
        split_batch("convert: data", data, inputs)
        data = list(data.split(128, dim=1 if events else 0))
    elif data is not None:
        check_batches("convert: data", data)
    if examples is None and data is None:
        raise ArgumentError(
            "convert: neither data= nor example_input= was given; expected one of them to show the input's shape. "
            "Pass example_input=torch.zeros(1, 3, 224, 224), say."
        )
    if examples is not None:
        return data, examples
    assert data is not None
    iterator: Iterator[Any] = iter(data)
    first = next(iterator, None)
    if first is None:
        raise ArgumentError("convert: data= gave no batch; expected at least one. Check the data set.")
    examples = _checked_examples(split_batch("convert: data", first, inputs)[0], events)
    return (chain([first], data) if isinstance(data, Iterator) else data), examples


def _gathered(data: Iterable[Any], inputs: int, count: int) -> tuple[list[Tensor], Iterable[Any]]:
    """Return the first ``count`` samples or a few more, one batch for each input, and the data, still whole."""
    batches: list[Any] = []
    found: list[tuple[Tensor, ...]] = []
    iterator = iter(data)
    while sum(len(given[0]) for given in found) < count and (batch := next(iterator, None)) is not None:
        batches.append(batch)
        found.append(split_batch("convert: data", batch, inputs)[0])
    images = [torch.cat(parts) for parts in zip(*found, strict=True)]
    return images, (chain(batches, iterator) if isinstance(data, Iterator) else data)


def _checked_examples(examples: Tensor | Sequence[Tensor], events: bool) -> tuple[Tensor, ...]:
    """Return a tensor for each input; a plain tensor is that of a single input."""
    given = tuple(examples) if isinstance(examples, tuple | list) else (examples,)
    least, wanted = (2, "[T, N, *F]") if events else (1, "[N, *F]")
    if len(given) == 1:
        least += 1  # an input of one number for each sample comes beside others only
    if not given or not all(isinstance(x, Tensor) and x.ndim >= least for x in given):
        raise refuse(
            "convert: the example input",
            examples,
            f"a tensor {wanted}, or a tuple of one for each input",
            "Pass example_input=torch.zeros(1, 3, 224, 224), say, or (x1, x2)"
            + (", with T steps in front." if events else "."),
        )
    return given


def single_frames(where: str, data: Iterable[Any], inputs: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield batches of event frames [T, N, *F] as an ANN takes them, each frame by itself, [T·N, *F], without labels.

    Args:
        where: the batches were given, for errors.
        data: the batches.
        inputs: how many the network takes.
    """
    for batch in data:
        yield tuple(x.flatten(0, 1) for x in split_batch(where, batch, inputs)[0])
