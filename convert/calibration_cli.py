"""The command line of all that needs no labels: policies, corrections, reconstruction and diagnosis."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from ..calibrate import (
    BatchNormReestimation,
    BiasCorrection,
    BlockResult,
    Correction,
    InitialPotential,
    KLDivergence,
    LocalThresholdBalancing,
    Max,
    Percentile,
    Policy,
    Reconstruction,
    SpikingMinError,
    WeightRegression,
    automatic,
    blocks,
    diagnose,
)
from ..errors import ArgumentError
from ..terminal import Terminal
from ..zoo.images import Batches
from .pipeline import Conversion
from .refine import refine

DIAGNOSIS_SAMPLES = 128
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
        help=f"{POLICY_NAMES}. auto: minerror with data, batchnorm without.",
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
        "--diagnose", is_flag=True,
        help="Split the error of every site into what it inherits, clips, rounds and mistimes.",
    ),
)  # fmt: skip


def calibration_options(command: Any) -> Any:
    """Add the options that make a network agree with its ANN without labels, in the order of work."""
    for option in reversed(_CALIBRATION_OPTIONS):
        command = option(command)
    return command


def refined(
    conversion: Conversion,
    batches: Batches,
    corrections: tuple[Correction, ...],
    steps: int,
    seed: int,
    terminal: Terminal,
) -> Conversion:
    """Correct and reconstruct on the calibration samples, as far as that was asked for."""
    if corrections:
        with terminal.stage("correcting layer by layer", None):
            conversion = refine(conversion, batches, corrections=corrections)
    if steps:
        with terminal.stage("reconstructing", len(blocks(conversion.prepared))) as advance:

            def on_block(result: BlockResult) -> None:
                advance(1, "")
                change = f"error {result.before:.4f} to {result.after:.4f}"
                terminal.notice(f"block up to {result.block.sites[-1]}: {change}")

            settings = Reconstruction(steps=steps, seed=seed)
            conversion = refine(conversion, batches, reconstruction=settings, on_block=on_block)
    return conversion


def diagnosed(conversion: Conversion, batches: Batches, terminal: Terminal) -> dict[str, Any]:
    """Return the errors of all sites on the first calibration samples, as plain values."""
    shown = batches if batches.indices is None else replace(batches, indices=batches.indices[:DIAGNOSIS_SAMPLES])
    with terminal.stage("diagnosing", shown.count):
        return diagnose(conversion.prepared, conversion.snn, shown).to_json()
