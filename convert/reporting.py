"""report_on: look at a converted network from all sides and put what is seen into one report."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, fx, nn

from ..arguments import check_kind
from ..artifact import versions
from ..calibrate import diagnose, observe
from ..calibrate.correct import own_copy
from ..calibrate.diagnose import DIAGNOSIS_SAMPLES
from ..evaluation import Outputs, evaluate
from ..records import Spike, plain_value
from ..report import ChangedSample, NetworkReport, Raster, graph_nodes
from ..report.records import BINS_PER_THRESHOLD, THRESHOLDS_SHOWN
from ..results import describe_network
from ..spiking import PerStep, sites
from ..structures import example_tensor
from ..time_axis import takes_events, time_axis
from .pipeline import Conversion
from .spike import EventFrames
from .storage import MANIFEST

CHANGED_SHOWN = 8
RASTER_SITES = 3
RASTER_NEURONS = 40
PICTURE_SIZE = 96


def report_on(
    conversion: Conversion,
    data: Iterable[Any] | Tensor | None = None,
    *,
    ann: nn.Module | None = None,
    name: str = "the network",
    classes: Sequence[str] = (),
    training: Iterable[Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> NetworkReport:
    """Measure a conversion and gather all that a report shows.

    Args:
        conversion: from :func:`lmh.convert.convert` or :func:`lmh.convert.storage.load_conversion`, its snn trained
            since or not; not changed.
        data: batches (x, y), or x alone, as for :func:`lmh.evaluate`; read once. Without data the report says so.
        ann: the source, for its accuracy and for the samples that it answers otherwise.
        name: of the network, for the title.
        classes: names, by label.
        training: what :func:`lmh.finetune.finetune` did to the network, its result's ``stages``; unless given, what a
            loaded file says of it.
        facts: more for the last section, such as ``{"data": "photos of 2025"}``.

    Raises:
        ArgumentError: for what :func:`lmh.evaluate` refuses.
        DataError: the same.

    >>> from lmh.convert import convert
    >>> ann, images = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.rand(64, 4)
    >>> report = report_on(convert(ann, timesteps=4, data=images), images, ann=ann)
    >>> report.result["samples"], list(report.activations), report.result["diagnosis"]["rows"][0]["path"]
    (64, ['1'], '1')
    """
    check_kind("report_on: conversion", conversion, Conversion, "what convert returned")
    watch = Watch(conversion)
    evaluation = None if data is None else evaluate(conversion.snn, data, ann=ann, on_outputs=watch)
    result = describe_network(
        conversion.snn,
        source=name,
        calibration=conversion.report.calibration,
        nodes=conversion.report.nodes(),
        evaluation=evaluation,
        diagnosis=watch.diagnosis(),
        notices=conversion.report.notices,
        spiking_coverage=conversion.report.spiking_coverage,
    )
    if training is None:
        history = conversion.snn.meta.get(MANIFEST, {}).get("history", ())
    else:
        history = [stage.to_json() for stage in training]
    return watch.report(result, classes=classes, history=history, facts=facts)


class Watch:
    """Looks on while :func:`lmh.evaluate` runs (``on_outputs``), then makes the report.

    Args:
        conversion: whose network is measured; the conversion's own network, or a copy of it for inference.

    Attributes:
        first: the first :data:`DIAGNOSIS_SAMPLES` samples, for what compares activations.
    """

    def __init__(self, conversion: Conversion) -> None:
        self.conversion = conversion
        self.confusion: Counter[tuple[int, int]] = Counter()
        self.changed: list[tuple[ChangedSample, tuple[Tensor, ...]]] = []
        self.first: list[tuple[Tensor, ...]] = []
        self.seen = 0

    def __call__(self, outputs: Outputs) -> None:
        """Count the answers of a batch and keep the first samples that the ANN answers otherwise."""
        answers, axis = outputs.snn.argmax(-1), _batch_axis(self.conversion)
        if outputs.labels is not None:
            self.confusion.update(zip(outputs.labels.tolist(), answers[-1].tolist(), strict=True))
        if outputs.ann is not None:
            ann = outputs.ann.argmax(-1)
            for row in (ann != answers[-1]).nonzero().flatten().tolist()[: CHANGED_SHOWN - len(self.changed)]:
                inputs = tuple(x.select(axis, row).cpu() for x in outputs.inputs)
                label = None if outputs.labels is None else int(outputs.labels[row])
                steps = tuple(answers[:, row].tolist())
                picture = _picture(inputs[0].sum(0) if axis else inputs[0])
                sample = ChangedSample(self.seen + row, label, int(ann[row]), steps, picture, ())
                self.changed.append((sample, inputs))
        if (wanted := DIAGNOSIS_SAMPLES - self.seen) > 0:
            self.first.append(tuple(x.narrow(axis, 0, min(wanted, x.shape[axis])).cpu() for x in outputs.inputs))
        self.seen += answers.shape[1]

    def diagnosis(self) -> dict[str, Any] | None:
        """Return the errors of all sites on the first samples, as plain values; None without samples or the ANN."""
        if not self.first or not self.conversion.has_source_weights:
            return None
        return diagnose(self.conversion.prepared, self.conversion.snn, self.first).to_json()

    def report(
        self,
        result: Mapping[str, Any],
        *,
        classes: Sequence[str] = (),
        history: Sequence[Mapping[str, Any]] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> NetworkReport:
        """Return what was seen, beside the job's result.

        Args:
            result: of :func:`lmh.results.describe_network`.
            classes: names, by label.
            history: of a training, as a manifest keeps it.
            facts: more than versions and recipe.
        """
        network = own_copy(self.conversion.snn)
        changed = (replace(sample, rasters=_rasters(network, inputs)) for sample, inputs in self.changed)
        known = self.first and self.conversion.has_source_weights
        return NetworkReport(
            result=result,
            activations=activation_shares(self.conversion, self.first) if known else {},
            confusion=tuple((*pair, count) for pair, count in sorted(self.confusion.items())),
            classes=tuple(classes),
            changed=tuple(changed),
            nodes=graph_nodes(self.conversion.snn, kept=result["nodes"].get("kept", ())),
            training=tuple(history),
            facts={**(facts or {}), "versions": versions(), "recipe": plain_value(self.conversion.recipe)},
        )


def activation_shares(conversion: Conversion, batches: Iterable[Any]) -> dict[str, tuple[float, ...]]:
    """Return where the ANN's activations lie, in units of θ: :attr:`NetworkReport.activations`."""
    prepared, neurons = conversion.prepared, sites(conversion.snn)
    bounds = {path: found.upper for path, found in prepared.activations.items() if isinstance(found, Spike)}
    looked_at: Iterable[Any] = batches
    if isinstance(conversion.recipe.encoding, EventFrames):
        looked_at = [tuple(x.flatten(0, 1) for x in inputs) for inputs in looked_at]
    histograms, _ = observe(prepared.model, bounds, looked_at)
    shares = {}
    for path, histogram in histograms.items():
        site = neurons[path]
        theta = site.v_threshold.detach().to(histogram.width)
        if isinstance(site.neuron.granularity, PerStep):
            theta = theta.mean(0)
        bins = (histogram.centers() / theta.reshape(-1, 1) * BINS_PER_THRESHOLD).long()
        counts = torch.zeros(BINS_PER_THRESHOLD * THRESHOLDS_SHOWN + 1, dtype=torch.float64)
        bins = bins.clamp(max=len(counts) - 1).flatten().cpu()
        counts.scatter_add_(0, bins, histogram.counts.flatten().double().cpu())
        shares[path] = tuple((counts / (histogram.total * len(histogram.width))).tolist())
    return shares


def _batch_axis(conversion: Conversion) -> int:
    return 1 if isinstance(conversion.recipe.encoding, EventFrames) else 0


def _picture(x: Tensor) -> str:
    """Return an image [C, H, W] as a small PNG in base64, from its smallest to its largest value; else nothing.

    Two channels are the polarities of events: blue and red.
    """
    if x.ndim == 3 and len(x) == 2:
        x = torch.stack([x[1], torch.zeros_like(x[0]), x[0]])
    if x.ndim != 3 or len(x) not in (1, 3):
        return ""
    low, high = x.min(), x.max()
    pixels = (255 * (x - low) / (high - low).clamp_min(1e-12)).round().to(torch.uint8)
    image = Image.fromarray(pixels.movedim(0, -1).squeeze(-1).numpy())
    image.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    with io.BytesIO() as stream:
        image.save(stream, format="PNG")
        return base64.b64encode(stream.getvalue()).decode()


def _rasters(snn: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[Raster, ...]:
    """Run one sample and return its spikes at the first site, the last, and one between."""
    steps, axis = time_axis(snn).timesteps, 1 if takes_events(snn) else 0
    paths = list(sites(snn))
    shown = list(dict.fromkeys(paths[place * (len(paths) - 1) // (RASTER_SITES - 1)] for place in range(RASTER_SITES)))
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        return lambda _site, _inputs, output: found.__setitem__(path, output.detach().flatten(1) != 0)

    handles = [snn.get_submodule(path).register_forward_hook(keep(path)) for path in shown]
    try:
        with torch.no_grad():
            snn(*(x.unsqueeze(axis).to(example_tensor(snn)) for x in inputs))
    finally:
        for handle in handles:
            handle.remove()
    return tuple(_raster(path, found[path].reshape(steps, -1)) for path in shown)


def _raster(path: str, fired: Tensor) -> Raster:
    """Return some of the neurons [T, K] that fired."""
    active = fired.any(0).nonzero().flatten()
    rows = active[torch.linspace(0, max(len(active) - 1, 0), min(RASTER_NEURONS, len(active))).long()]
    spikes = tuple((int(t), int(neuron)) for t, neuron in fired[:, rows].nonzero().tolist())
    return Raster(path, len(rows), fired.shape[1], spikes)
