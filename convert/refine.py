"""refine: corrections and reconstruction on top of a conversion, from unlabelled data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..arguments import check_batches, check_kind, split_batch
from ..calibrate import BlockResult, Correction, Reconstruction, changes, correct, reconstruct
from ..calibrate.correct import own_copy
from ..errors import ArgumentError
from ..records import Calibration, short_text
from .pipeline import Conversion, assemble


def refine(
    conversion: Conversion,
    data: Iterable[Any] | Tensor,
    *,
    corrections: Correction | Sequence[Correction] = (),
    reconstruction: Reconstruction | None = None,
    on_block: Callable[[BlockResult], None] | None = None,
) -> Conversion:
    """Correct a conversion layer by layer, then reconstruct it block by block; no labels.

    The order is fixed: policy, corrections, reconstruction, and only then any training of the whole network.

    Args:
        conversion: from :func:`convert`; not changed.
        data: batches [N, *F] (or tuples that begin with one), or one tensor; [T, N, *F] for event frames. Labels are
            not read.
        corrections: for example ``[WeightRegression(), SpikingMinError()]``; see :func:`lmh.calibrate.correct`.
        reconstruction: steps and learning rates; see :func:`lmh.calibrate.reconstruct`. None leaves it out.
        on_block: told of each block that is reconstructed.

    Returns:
        A conversion whose calibration names all that was done, in order, and holds every tensor that changed: with it
        as ``calibration=``, ``convert`` builds this network again.

    Raises:
        ArgumentError: for arguments of a wrong type, or what corrections and reconstruction refuse.
        CalibrationError: if the data has no sample, or values that are not finite.

    >>> import torch
    >>> from torch import nn
    >>> from lmh.calibrate import BiasCorrection
    >>> from lmh.convert import convert
    >>> ann, images = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.rand(64, 4)
    >>> refined = refine(convert(ann, 2, data=images), images, corrections=BiasCorrection())
    >>> refined.report.calibration
    'MinError(levels_per_step=0.5, base_levels=2, per channel) + BiasCorrection(), 64 samples'
    """
    check_kind("refine: conversion", conversion, Conversion, "what convert returned")
    check_has_weights("refine", conversion)
    if reconstruction is not None:
        check_kind("refine: reconstruction", reconstruction, Reconstruction, "Reconstruction(steps=200)")
    if not isinstance(data, Tensor):
        check_batches("refine: data", data)
        data = list(data)
    done = conversion
    if corrections:
        found = correct(done.snn, done.prepared, data, corrections, calibration=done.calibration)
        done = replayed(done, found)
    if reconstruction is not None:
        start = own_copy(done.snn)
        reconstruct(start, done.prepared, data, reconstruction, on_block=on_block)
        text = f"{done.calibration.policy} + {short_text(reconstruction)}"
        done = replayed(done, changes(start, done.prepared, text, _count(data)))
    return done


def check_has_weights(where: str, conversion: Conversion) -> None:
    """Refuse a conversion that was loaded without its ANN, which nothing can be compared with.

    Raises:
        ArgumentError: saying what to pass.
    """
    if not conversion.has_source_weights:
        raise ArgumentError(
            f"{where}: the conversion was loaded without the weights of its ANN; expected one that has them. Pass "
            "load_conversion(file, source=ann)."
        )


def replayed(conversion: Conversion, calibration: Calibration) -> Conversion:
    """Return a conversion with the network that another calibration makes; what was said about its graph stays said.

    Args:
        conversion: not changed.
        calibration: of the same ANN and neurons, such as :func:`lmh.calibrate.changes` returns.
    """
    made = assemble(conversion.prepared, calibration, conversion.recipe)
    report = replace(conversion.report, calibration=made.report.calibration)
    return replace(made, report=report, has_source_weights=conversion.has_source_weights)


def _count(data: Iterable[Any] | Tensor) -> int:
    batches = [data] if isinstance(data, Tensor) else data
    return sum(len(split_batch("refine: data", batch)[0][0]) for batch in batches)
