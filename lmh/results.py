"""A job's result as plain values: what ``--json`` prints and the tables show. Unknown is None, never absent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import fx

from .energy import ASSUMPTIONS, picojoules, uncounted_text
from .records import Evaluation
from .spiking import COEFFICIENTS, PerStep, SpikingSite, sites
from .time_axis import time_axis

SATURATED = 0.99
"""Spikes per neuron and step from which on a channel says no more."""


def describe_network(
    snn: fx.GraphModule,
    *,
    source: str,
    calibration: str,
    nodes: Mapping[str, Sequence[str]],
    evaluation: Evaluation | None,
    training_free: Evaluation | None = None,
    stages: Sequence[tuple[str, Evaluation]] = (),
    diagnosis: Mapping[str, Any] | None = None,
    output: str | None = None,
    notices: Sequence[str] = (),
    spiking_coverage: float | None = None,
) -> dict[str, Any]:
    """Return the result of a conversion.

    Args:
        snn: the network.
        source: name of the ANN.
        calibration: where the thresholds came from.
        nodes: paths by fate: converted, kept, refused.
        evaluation: of the network as it is now, or None without data.
        training_free: of the network before fine-tuning, or None.
        stages: of what the network was on its way, by words such as ``after QCFS``, each beside its own ANN.
        diagnosis: the errors of all sites, :meth:`lmh.calibrate.Diagnosis.to_json`, or None.
        output: file that it was written to.
        notices: sentences for the user.
        spiking_coverage: share of activation elements that spike, 0 to 1, where it is known.
    """
    time = time_axis(snn)
    return {
        "source": source,
        "timesteps": time.timesteps,
        "readout": time.average.text(time.timesteps),
        "calibration": calibration,
        **_figures(evaluation),
        "training_free": _figures(training_free) if training_free else None,
        "stages": [{"name": name, **_figures(found)} for name, found in stages],
        "sites": [_site(path, site, evaluation) for path, site in sites(snn).items()],
        "nodes": {fate: list(paths) for fate, paths in nodes.items()},
        "spiking_coverage": spiking_coverage,
        "diagnosis": diagnosis,
        "energy": _energy(evaluation) if evaluation else None,
        "output": output,
        "report": None,
        "exports": [],
        "failed_exports": {},
        "notices": [*notices, *([uncounted_text(evaluation.uncounted)] if evaluation and evaluation.uncounted else [])],
    }


def _figures(evaluation: Evaluation | None) -> dict[str, Any]:
    names = ("samples", "ann_accuracy", "snn_accuracy", "agreement", "output_error")
    values = {name: getattr(evaluation, name, None) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _site(path: str, site: SpikingSite, evaluation: Evaluation | None) -> dict[str, Any]:
    theta = site.v_threshold.detach()
    if isinstance(site.neuron.granularity, PerStep):
        theta = theta.mean(0)  # [T] or [T, C]: the summary is over channels
    return {
        "path": path,
        "neuron": neuron_text(site),
        "channels": theta.numel(),
        "v_threshold": float(theta.mean()),
        "v_threshold_min": float(theta.min()),
        "v_threshold_max": float(theta.max()),
        **_rates(path, evaluation),
        **{name: float(value.detach().mean()) for name, value in zip(COEFFICIENTS, site.coefficients(), strict=True)},
    }


def _rates(path: str, evaluation: Evaluation | None) -> dict[str, float | None]:
    """What a site fires, and the shares of 1 of its channels that never do or at nearly every step."""
    if evaluation is None:
        return dict.fromkeys(("firing_rate", "silent_channels", "saturated_channels"))
    rates = evaluation.channel_rate[path]
    return {
        "firing_rate": evaluation.firing_rate[path],
        "silent_channels": sum(rate == 0 for rate in rates) / len(rates),
        "saturated_channels": sum(rate >= SATURATED for rate in rates) / len(rates),
    }


def neuron_text(site: SpikingSite) -> str:
    """Return ``IF`` or ``LIF`` for a site still at its preset, else ``LM-H`` with its mean λ and μ."""
    preset, found = site.neuron.preset, [value.detach() for value in site.coefficients()]
    if all(bool((value == getattr(preset, name)).all()) for name, value in zip(COEFFICIENTS, found, strict=True)):
        return type(preset).__name__
    symbols = ("λS", "λD", "μS", "μD")
    return f"LM-H {' '.join(f'{name} {float(value.mean()):.2f}' for name, value in zip(symbols, found, strict=True))}"


def _energy(evaluation: Evaluation) -> dict[str, Any]:
    layers = evaluation.layers
    snn, ann = picojoules(layers)
    return {
        "snn_pj": snn,
        "ann_pj": ann,
        "ratio": snn / ann if ann else None,
        "synops": sum(layer.accumulates for layer in layers),
        "snn_macs": sum(layer.macs for layer in layers),
        "ann_macs": sum(layer.ann_macs for layer in layers),
        "layers": [
            {**asdict(layer), **dict(zip(("snn_pj", "ann_pj"), picojoules([layer]), strict=True))} for layer in layers
        ],
        "uncounted": list(evaluation.uncounted),
        "assumptions": ASSUMPTIONS,
    }
