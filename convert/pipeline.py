"""convert: from a pretrained ANN to a spiking network in one call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..calibrate import FROM_QCFS, Policy, automatic, calibrate, refit, replay, stand_ins
from ..errors import ArgumentError
from ..ops import Kind, kind_of, label, module_of
from ..records import Calibration, Prepared, Report, Spike
from ..spiking import LMH, SpikingSite
from ..time_axis import TimeAxis
from .prepare import prepare
from .rules import ReluSurgery, Rules
from .spike import DirectCoding, Encoding, EventFrames, spike

REFIT_SAMPLES = 128


@dataclass(frozen=True)
class Recipe:
    """What a conversion was asked for, apart from the network and the data.

    Attributes:
        timesteps: T.
        neuron: preset, granularity, ranges and surrogate of the neurons.
        encoding: what the input is.
        sample_shape: shape of one input sample.
        keep: paths that stay analog.
        surgery: whether neurons stand in for what has no rule.
    """

    timesteps: int
    neuron: LMH = field(default_factory=LMH)
    encoding: Encoding = field(default_factory=DirectCoding)
    sample_shape: tuple[int, ...] = ()
    keep: tuple[str, ...] = ()
    surgery: bool = False


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` returns.

    Attributes:
        snn: the spiking network, an ``fx.GraphModule`` in eval mode that stands where the ANN stood.
        calibration: the thresholds it started from.
        report: what became of every node.
        recipe: what was asked for.
        prepared: the ANN in rewritten form, for other calibrations of it.
    """

    snn: fx.GraphModule
    calibration: Calibration
    report: Report
    recipe: Recipe
    prepared: Prepared


def convert(
    ann: nn.Module,
    timesteps: int,
    *,
    data: Iterable[Any] | Tensor | None = None,
    calibration: Policy | Calibration | None = None,
    example_input: Tensor | None = None,
    rules: Rules | None = None,
    neuron: LMH | None = None,
    encoding: Encoding | None = None,
    keep: Iterable[str] = (),
    surgery: ReluSurgery | None = None,
) -> Conversion:
    """Convert a pretrained ANN to a spiking network of LM-H neurons.

    Every ReLU and QCFS becomes LM-H neurons (the equations of :mod:`lmh.neurons`) that start as IF neurons;
    the network then returns the mean of its output over T steps.

    Args:
        ann: any traceable network of weighted layers, BatchNorm, pools, sums and rectifiers. Not changed.
        timesteps: T, 1 to 1024.
        data: images to find thresholds on, as batches [N, *F] (or tuples that begin with one) or one tensor;
            normalised as the ANN expects. Labels are not read.
        calibration: a policy, or the :class:`Calibration` of an earlier conversion. Unless given:
            :func:`lmh.calibrate.automatic`, which is MinError with data and BatchNormStatistics without.
        example_input: one batch [N, *F] that shows the input's shape; not needed with data.
        rules: from activation type to what becomes of it, for types of your own.
        neuron: preset, granularity and ranges; ``LMH()``, which is IF, unless given.
        encoding: ``DirectCoding()`` for images, ``EventFrames()`` for input [T, N, *F].
        keep: paths of nodes that stay analog, as the audit names them.
        surgery: ``ReluSurgery()`` lets neurons stand in for SiLU, GELU and the like, and keeps gates, softmax and
            normalisations analog; fine-tune afterwards. Unless given, all of them are refused.

    Returns:
        The spiking network with its calibration and report.

    Raises:
        ArgumentError: for T out of range, weights that are not finite, or an input that does not fit.
        AuditError: listing every node that no rule covers.
        CalibrationError: if thresholds cannot be found with what was given.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> conversion = convert(net, timesteps=4, data=torch.rand(16, 4))
    >>> conversion.snn(torch.rand(3, 4)).shape
    torch.Size([3, 2])
    """
    TimeAxis(timesteps)
    encoding = encoding or DirectCoding()
    data, example = _first_batch(data, example_input)
    sample_shape = tuple(example.shape[2:] if isinstance(encoding, EventFrames) else example.shape[1:])
    recipe = Recipe(timesteps, neuron or LMH(), encoding, sample_shape, tuple(keep), surgery is not None)
    prepared = prepare(ann, sample_shape, rules=rules, keep=recipe.keep, surgery=surgery)
    notices = []
    if isinstance(encoding, EventFrames) and data is not None:
        data = _frames(data)
    if data is not None and (strange := stand_ins(prepared)):
        images, data = _gathered(data, REFIT_SAMPLES)
        prepared = refit(prepared, images)
        notices.append(
            f"ReLUs stand in for {len(strange)} activations that are no rectifiers; BatchNorm and biases were refit on "
            f"{len(images)} samples. Fine-tune to win back the rest."
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


def assemble(prepared: Prepared, calibration: Calibration, recipe: Recipe, notices: tuple[str, ...] = ()) -> Conversion:
    """Build the spiking network of a prepared ANN from a known calibration: what loading and replaying use."""
    missing = [path for path in prepared.spiking if path not in calibration.v_threshold]
    if missing:
        raise ArgumentError(
            f"calibration: no threshold for {', '.join(missing)}; it was made for {len(calibration.v_threshold)} other "
            "sites. Calibrate this network."
        )
    snn = spike(prepared, calibration, recipe.neuron, recipe.encoding, recipe.timesteps)
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
    timed: set[fx.Node] = set()
    pools = []
    for node in snn.graph.nodes:
        if isinstance(module_of(node), SpikingSite) or timed & set(node.all_input_nodes):
            timed.add(node)
        if kind_of(node) is Kind.MAXPOOL and node in timed:
            pools.append(label(node))
    if pools:
        yield (
            f"{len(pools)} max-pools take the maximum of currents that vary in time ({', '.join(pools)}); "
            "their error does not vanish with T. Average pools have none."
        )
    levels = {found.levels for found in prepared.activations.values() if isinstance(found, Spike) and found.levels}
    if levels - {recipe.timesteps}:
        known = ", ".join(str(level) for level in sorted(levels))
        yield f"QCFS was trained with L = {known} and T is {recipe.timesteps}; they agree best where T = L."


def _first_batch(
    data: Iterable[Any] | Tensor | None, example_input: Tensor | None
) -> tuple[Iterable[Any] | None, Tensor]:
    """Return the data, still whole, and a batch that shows the input's shape."""
    if isinstance(data, Tensor):
        data = data.split(128)
    if example_input is None and data is None:
        raise ArgumentError(
            "convert: neither data= nor example_input= was given; expected one of them to show the input's shape. "
            "Pass example_input=torch.zeros(1, 3, 224, 224), say."
        )
    if example_input is not None:
        return data, example_input
    assert data is not None
    iterator: Iterator[Any] = iter(data)
    first = next(iterator, None)
    if first is None:
        raise ArgumentError("convert: data= gave no batch; expected at least one. Check the data set.")
    example = first if isinstance(first, Tensor) else first[0]
    return (chain([first], data) if isinstance(data, Iterator) else data), example


def _gathered(data: Iterable[Any], count: int) -> tuple[Tensor, Iterable[Any]]:
    """Return the first ``count`` samples or a few more as one batch, and the data, still whole."""
    batches: list[Any] = []
    images: list[Tensor] = []
    iterator = iter(data)
    while sum(map(len, images)) < count and (batch := next(iterator, None)) is not None:
        batches.append(batch)
        images.append(batch if isinstance(batch, Tensor) else batch[0])
    return torch.cat(images), (chain(batches, iterator) if isinstance(data, Iterator) else data)


def _frames(data: Iterable[Any]) -> Iterator[Tensor]:
    for batch in data:
        yield (batch if isinstance(batch, Tensor) else batch[0]).flatten(0, 1)
