"""What a run did, epoch by epoch and stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from ..qcfs import QCFS
from ..spiking import COEFFICIENTS, PerStep, SpikingSite
from .batches import MeanOverFrames
from .schedule import Schedule

NeuronValues = Mapping[str, Mapping[str, tuple[float, ...]]]


@dataclass(frozen=True)
class EpochResult:
    """What one epoch did.

    Attributes:
        epoch: counted from 0.
        loss: mean over its samples.
        val_accuracy: on the validation batches, a fraction of 1; None without any.
        neurons: for each site, ``v_threshold``, ``v_init``, ``lambda_s``, ``lambda_d``, ``mu_s`` and ``mu_d`` after the
            epoch: the mean over channels, one value, or one for each step where the parameters have one.
    """

    epoch: int
    loss: float
    val_accuracy: float | None
    neurons: NeuronValues = field(default_factory=dict, repr=False)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> EpochResult:
        """Rebuild a result from plain values."""
        neurons = {
            site: {name: tuple(values) for name, values in found.items()} for site, found in plain["neurons"].items()
        }
        return cls(plain["epoch"], plain["loss"], plain["val_accuracy"], neurons)


@dataclass(frozen=True)
class Stage:
    """One stage of a training.

    Attributes:
        name: ``QCFS`` or ``STBP``.
        network: as this stage left it; the last stage's is the spiking network.
        schedule: that it followed.
        history: one result for each epoch.
    """

    name: str
    network: nn.Module = field(repr=False, compare=False)
    schedule: Schedule
    history: tuple[EpochResult, ...]

    def to_json(self) -> dict[str, Any]:
        """Return name and epochs as plain values, which manifests and reports keep."""
        return {"stage": self.name, "epochs": [asdict(result) for result in self.history]}


def neuron_values(network: nn.Module) -> NeuronValues:
    """Return θ, v_init, λ and μ of every site, and θ of every QCFS activation, as :class:`EpochResult` keeps them.

    >>> from lmh.convert import load
    >>> sorted(neuron_values(load("zoo:digits-cnn-t4"))["stem.2"])
    ['lambda_d', 'lambda_s', 'mu_d', 'mu_s', 'v_init', 'v_threshold']
    """
    return {
        path: _site_values(module) if isinstance(module, SpikingSite) else _qcfs_values(module)
        for path, module in neurons_of(network).items()
    }


def neurons_of(network: nn.Module) -> dict[str, SpikingSite | QCFS]:
    """Return the sites of a spiking network, or the QCFS activations of an ANN, by path without wrappers' names."""
    return {path: module for path, module in bare_modules(network).items() if isinstance(module, (SpikingSite, QCFS))}


def bare_modules(network: nn.Module) -> dict[str, nn.Module]:
    """Return all modules of a network by path without wrappers' names."""
    inner = "ann." if any(isinstance(module, MeanOverFrames) for module in network.modules()) else ""
    return {bare_path(path).removeprefix(inner): module for path, module in network.named_modules()}


def bare_path(path: str) -> str:
    """Return a path without the names that wrappers (DDP, torch.compile) put before it."""
    return path.removeprefix("module.").removeprefix("_orig_mod.")


def _site_values(site: SpikingSite) -> dict[str, tuple[float, ...]]:
    per_step = isinstance(site.neuron.granularity, PerStep)
    values = dict(zip(COEFFICIENTS, site.coefficients(), strict=True))
    return {
        "v_threshold": _means(site.v_threshold, per_step),
        "v_init": _means(site.v_init, per_step=False),
        **{name: _means(value, per_step) for name, value in values.items()},
    }


def _qcfs_values(layer: QCFS) -> dict[str, tuple[float, ...]]:
    return {"v_threshold": _means(layer.v_threshold, per_step=False)}


def _means(values: Tensor, per_step: bool) -> tuple[float, ...]:
    if per_step:
        return tuple(values.detach().flatten(1).mean(1).tolist() if values.ndim > 1 else values.detach().tolist())
    return (float(values.detach().mean()),)
