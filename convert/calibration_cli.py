"""The command line of all that needs no labels: policies, corrections, reconstruction and diagnosis."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from ..calibrate import (
    BatchNormReestimation,
    BiasCorrection,
    Correction,
    InitialPotential,
    KLDivergence,
    LocalThresholdBalancing,
    Max,
    Percentile,
    Policy,
    SpikingMinError,
    WeightRegression,
    automatic,
    diagnose,
)
from ..calibrate.diagnose import DIAGNOSIS_SAMPLES
from ..errors import ArgumentError
from ..terminal import Terminal
from ..zoo.images import Batches
from .pipeline import Conversion

POLICIES: dict[str, Policy] = {
    "max": Max(),
    "minerror": automatic(True),
    "batchnorm": automatic(False),
    "balancing": LocalThresholdBalancing(),
    "kl": KLDivergence(),
}
POLICY_NAMES = "auto, max, percentile:P, minerror, balancing, kl or batchnorm"
CORRECTIONS: dict[str, Correction] = {
    "weights": WeightRegression(),
    "biases": BiasCorrection(),
    "batchnorm": BatchNormReestimation(),
    "thresholds": SpikingMinError(),
    "v_init": InitialPotential(),
}


class PolicyType(click.ParamType):
    """``auto``, ``percentile:P`` or a name of :data:`POLICIES`; None stands for auto."""

    name = "policy"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Policy | None:
        """Return the policy."""
        if not isinstance(value, str):
            return value
        kind, _, option = value.partition(":")
        if value == "auto":
            return None
        if value in POLICIES:
            return POLICIES[value]
        if kind == "percentile":
            try:
                return Percentile(float(option)) if option else Percentile()
            except (ValueError, ArgumentError):
                self.fail(
                    f"{value!r}: expected a percentage above 0 and at most 100, as in percentile:99.9.", param, ctx
                )
        self.fail(f"{value!r} is no policy; expected {POLICY_NAMES}.", param, ctx)


_CALIBRATION_OPTIONS = (
    click.option(
        "--calibration", type=PolicyType(), default="auto", show_default=True, metavar="POLICY",
        help=f"{POLICY_NAMES}. auto: batchnorm without data; with data minerror, then what --correct weights and "
        "thresholds do, if the outputs on held-out calibration samples come nearer to the ANN's by it; minerror alone "
        "before --finetune.",
    ),
    click.option(
        "--calibration-samples", type=click.IntRange(min=1), default=512, show_default=True,
        help="Training images to calibrate on, for all that needs no labels.",
    ),
    click.option(
        "--correct", "corrections", type=click.Choice(list(CORRECTIONS)), multiple=True,
        help="Then correct layer by layer from input to output; may be repeated, each layer meets them in this order. "
        "weights: least squares; biases, batchnorm: means and variances; thresholds: θ and v_init; v_init alone.",
    ),
    click.option(
        "--reconstruct", type=click.IntRange(min=0), default=0, metavar="STEPS",
        help="Then fit neurons and weights block by block, by this many steps of gradient descent each; no labels.",
    ),
    click.option(
        "--distill", type=click.IntRange(min=0), default=0, metavar="EPOCHS",
        help="Train the whole network to give the ANN's outputs, on the calibration samples without labels: 3 epochs "
        "of a quantised network for each of these, corrections towards it (weights and thresholds unless named), then "
        "these through the spikes.",
    ),
    click.option(
        "--budget", type=click.FloatRange(min=0, min_open=True), metavar="MINUTES",
        help="Let auto do what it finds useful in about this time, distillation included.",
    ),
    click.option(
        "--diagnose", is_flag=True,
        help="Split the error of every site into what it inherits, clips, rounds and mistimes.",
    ),
)  # fmt: skip


def calibration_options(command: Any) -> Any:
    """Add the options that make a network agree with its ANN without labels, in the order of work."""
    for option in reversed(_CALIBRATION_OPTIONS):
        command = option(command)
    return command


def diagnosed(conversion: Conversion, batches: Batches, terminal: Terminal) -> dict[str, Any]:
    """Return the errors of all sites on the first calibration samples, as plain values."""
    shown = batches if batches.indices is None else replace(batches, indices=batches.indices[:DIAGNOSIS_SAMPLES])
    with terminal.stage("diagnosing", shown.count):
        return diagnose(conversion.prepared, conversion.snn, shown).to_json()
