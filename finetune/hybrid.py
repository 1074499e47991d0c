"""The QCFS stage of hybrid training: a prepared ANN with QCFS in the place of its activations, and back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..calibrate import Correction, MinError, Reconstruction, calibrate, changes
from ..convert import Conversion, EventFrames, Recipe, assemble, convert, refine
from ..convert.pipeline import single_frames
from ..convert.refine import replayed
from ..errors import ArgumentError
from ..qcfs import QCFS
from ..records import FROM_QCFS, Calibration, Prepared
from ..structures import input_count
from .batches import MeanOverFrames


def calibrated(prepared: Prepared, recipe: Recipe, data: Iterable[Any]) -> Calibration:
    """Return the θ that the QCFS stage starts from: MinError with L = T levels, which is what QCFS quantises to.

    Args:
        prepared: the ANN.
        recipe: says T and whether the data is event frames.
        data: batches, normalised as the ANN expects.
    """
    if isinstance(recipe.encoding, EventFrames):
        data = single_frames("finetune: train", data, input_count(prepared.model))
    return calibrate(prepared, MinError(), recipe.timesteps, data)


def qcfs_network(prepared: Prepared, calibration: Calibration, timesteps: int) -> fx.GraphModule:
    """Return a copy of a prepared ANN whose spiking activations are QCFS with L = T and the θ of a calibration.

    Args:
        prepared: not changed.
        calibration: θ by path.
        timesteps: T.

    >>> from lmh.convert import convert
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> conversion = convert(net, 4, data=torch.rand(16, 4))
    >>> qcfs_network(conversion.prepared, conversion.calibration, 4).get_submodule("1")
    QCFS(levels=4)
    """
    network = copy.deepcopy(prepared.model)
    device = next((parameter.device for parameter in network.parameters()), None)
    for path in prepared.spiking:
        network.set_submodule(path, QCFS(timesteps, calibration.v_threshold[path]).to(device))
    return network.eval()


def start_from_relu(model: nn.Module, ann: nn.Module, data: Iterable[Any] | Tensor) -> None:
    """Give an architecture with QCFS the weights of a trained ReLU network, and the θ that MinError finds for it.

    Args:
        model: has QCFS where ``ann`` has an activation, under the same paths; changed in place.
        ann: in eval mode.
        data: training images as ``ann`` takes them, [N, *F], or batches of them.

    Raises:
        ArgumentError: if ``model`` has no QCFS, or other layers than ``ann``.

    >>> relu = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    >>> qcfs = nn.Sequential(nn.Linear(4, 8), QCFS(16, channels=8), nn.Linear(8, 2)).eval()
    >>> x = torch.rand(64, 4)
    >>> start_from_relu(qcfs, relu, x)
    >>> bool((qcfs(x) - relu(x)).abs().max() < 0.1)
    True
    """
    levels = next((module.levels for module in model.modules() if isinstance(module, QCFS)), None)
    if levels is None:
        raise ArgumentError(
            f"{type(model).__name__}: has no QCFS activation, so it cannot start from a ReLU network's thresholds; "
            "expected one with QCFS. Leave ann out of the recipe, or name such an architecture."
        )
    _check_layers(model, ann)
    found = convert(ann, levels, data=data, calibration=MinError())
    try:
        model.load_state_dict(qcfs_network(found.prepared, found.calibration, levels).state_dict())
    except RuntimeError as error:
        raise ArgumentError(
            f"{type(model).__name__}: its QCFS do not take the thresholds of this {type(ann).__name__} "
            f"({str(error).splitlines()[1].strip()}); expected QCFS(levels, channels=C), with a θ for each channel, "
            "where the other has its activations. Make them so."
        ) from error


def _check_layers(model: nn.Module, ann: nn.Module) -> None:
    """Refuse a network whose weights another does not take."""
    activations = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, QCFS))
    expected = {name: list(x.shape) for name, x in model.state_dict().items() if not name.startswith(activations)}
    found = {name: list(x.shape) for name, x in ann.state_dict().items()}
    for name in (*found, *expected):
        if found.get(name) != expected.get(name):
            raise ArgumentError(
                f"{type(model).__name__}: the weights of this {type(ann).__name__} do not fit: its {name} is "
                f"{found.get(name, 'missing')}; expected {expected.get(name, 'nothing of that name')}, as the layers "
                "must be the same but for ReLU in the place of QCFS. Name another ann."
            )


def over_frames(network: nn.Module, recipe: Recipe) -> nn.Module:
    """Return the network as it is trained: on event frames, its mean over T."""
    return MeanOverFrames(network) if isinstance(recipe.encoding, EventFrames) else network


def taken_over(network: fx.GraphModule, conversion: Conversion) -> Conversion:
    """Return the spiking network of a trained QCFS network: its weights, and its θ, from the IF start.

    Args:
        network: from :func:`qcfs_network`, trained.
        conversion: of the ANN that it was made from; its graph, recipe and report stay.

    >>> from lmh.convert import convert
    >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.rand(16, 4)
    >>> conversion = convert(net, 4, data=x)
    >>> network = qcfs_network(conversion.prepared, conversion.calibration, 4)
    >>> torch.allclose(taken_over(network, conversion).snn(x), network(x), atol=1e-5)
    True
    """
    model = copy.deepcopy(conversion.prepared.model)
    activations = tuple(f"{path}." for path in conversion.prepared.spiking)
    weights = {name: value for name, value in network.state_dict().items() if not name.startswith(activations)}
    model.load_state_dict(weights, strict=False)
    prepared = replace(conversion.prepared, model=model)
    return assemble(prepared, _calibration_of(network, conversion), conversion.recipe)


def corrected(
    network: fx.GraphModule,
    conversion: Conversion,
    data: Iterable[Any] | Tensor,
    corrections: Sequence[Correction] = (),
    reconstruction: Reconstruction | None = None,
) -> Conversion:
    """Return the spiking network of a trained QCFS network, corrected towards that network and not towards the ANN.

    Args:
        network: from :func:`qcfs_network`, trained.
        conversion: of the ANN that it was made from; its graph, recipe and report stay.
        data: images without labels, as for :func:`lmh.convert.refine`.
        corrections: layer by layer.
        reconstruction: block by block, after them.
    """
    beside = assemble(
        replace(conversion.prepared, model=network), _calibration_of(network, conversion), conversion.recipe
    )
    refined = refine(beside, data, corrections=corrections, reconstruction=reconstruction)
    found = changes(refined.snn, conversion.prepared, refined.calibration.policy, refined.calibration.samples)
    return replayed(conversion, found)


def _calibration_of(network: fx.GraphModule, conversion: Conversion) -> Calibration:
    """Return the θ of a trained QCFS network, from the IF start."""
    paths = conversion.prepared.spiking
    thresholds = {path: _qcfs(network, path).v_threshold.detach().clone() for path in paths}
    halves = {path: torch.full_like(theta, 0.5) for path, theta in thresholds.items()}
    found = conversion.calibration
    return Calibration(FROM_QCFS, found.timesteps, found.samples, thresholds, halves)


def _qcfs(network: fx.GraphModule, path: str) -> QCFS:
    module = network.get_submodule(path)
    assert isinstance(module, QCFS)
    return module
