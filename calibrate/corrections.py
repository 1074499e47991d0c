"""Corrections of a spiking network, layer by layer from input to output: what each of them does where it comes by.

:func:`lmh.calibrate.correct` walks the ANN and the spiking network side by side and offers every layer and every
site to every correction, just before it runs. Whatever a correction reads is what the corrected network gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..errors import ArgumentError, CalibrationError
from ..op_table import BATCHNORM_MODULES
from ..ops import module_of
from ..spiking import COEFFICIENTS, PerStep, SpikingSite
from .layers import Layer, shift, target
from .lockstep import Lockstep
from .sampling import places, values_at
from .simulation import alone, mean_output

LOWEST, HIGHEST = -0.5, 1.0
HALVINGS = 20
FACTORS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.2, 1.35, 1.5, 1.8)
SHIFTS = (-0.3, -0.15, -0.05, 0.05, 0.15, 0.3)
BENDS = (-0.2, -0.1, -0.05, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Correction:
    """A correction that does nothing; each kind overrides what it needs."""

    def fit(self, lockstep: Lockstep, layer: Layer) -> None:
        """Change weights, before the weighted sum of a layer runs."""

    def align(self, lockstep: Lockstep, layer: Layer) -> None:
        """Change what a layer adds and how it scales, before its BatchNorm runs, or else its weighted sum."""

    def charge(self, lockstep: Lockstep, node: fx.Node) -> None:
        """Change neurons, before they run at ``node``."""


@dataclass(frozen=True)
class BiasCorrection(Correction):
    """Every layer's bias so that the mean of each channel is the ANN's (Li et al. 2021, bias correction).

    With y the ANN's output of a layer and ŷ_t the spiking network's at step t, both behind a residual sum where the
    layer's output alone goes into one,

        b ← b + E[y] − E_t[ŷ_t]

    BatchNorm's bias takes it, or else its running mean, or the layer's own bias; a layer without any of them stays.
    """

    def align(self, lockstep: Lockstep, layer: Layer) -> None:
        """Shift the layer's output."""
        place = target(lockstep, layer)
        got = lockstep.received(place.node)
        amount = _channel_mean(place.wanted, layer.axis) - _channel_mean(got, layer.axis)
        shift(module_of(layer.home), amount)


@dataclass(frozen=True)
class BatchNormReestimation(Correction):
    """BatchNorm's running statistics from what the spiking network gives it (Li et al. 2021, BatchNorm calibration).

    Mean and variance are those of the mean current over T steps, for each channel over samples and places: the spread
    from step to step is no part of what the rates mean.
    """

    def align(self, lockstep: Lockstep, layer: Layer) -> None:
        """Set the running mean and variance, where the BatchNorm has them."""
        norm = module_of(layer.home)
        if not isinstance(norm, BATCHNORM_MODULES) or norm.running_mean is None or norm.running_var is None:
            return
        current = torch.cat([_rows(value) for value in lockstep.received(layer.home.all_input_nodes[0])])
        if len(current) > 1:
            norm.running_mean.copy_(current.mean(0))
            norm.running_var.copy_(current.var(0))


@dataclass(frozen=True)
class InitialPotential(Correction):
    """v_init so that the mean output of each channel is the ANN's mean activation (after Li et al. 2021).

    There the potential gains T times the mean error, once. Here the neurons are run on samples of their currents and
    v_init is found by bisection between −½ and 1 (in units of θ), since the mean output grows with it.

    Attributes:
        rows: how many places are looked at, over all samples.
    """

    rows: int = 8192

    def __post_init__(self) -> None:
        _check_rows(self, self.rows)

    def charge(self, lockstep: Lockstep, node: fx.Node) -> None:
        """Set v_init of the site."""
        site = _site(node)
        model, (current, wanted) = alone(site), _currents(lockstep, node, self.rows)
        goal = _over(site.v_init, wanted)
        low, high = torch.full_like(goal, LOWEST), torch.full_like(goal, HIGHEST)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            model.v_init.copy_(middle)
            short = _over(site.v_init, mean_output(model, current)) < goal
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        site.v_init.copy_((low + high) / 2)


@dataclass(frozen=True)
class SpikingMinError(Correction):
    """θ and v_init with the least squared error of what the neurons really answer (ours).

    :class:`MinError` takes the error of the quantised ReLU, which is what neurons answer to constant currents. Here
    the neurons are run for T steps on samples of the currents I that they receive in the spiking network,

        θ, v_init ← argmin E‖(1/T) Σ_t θ s[t] − a‖²,  a the ANN's activation,

    so clipping, rounding, the order of spikes and errors of earlier layers all count. Both are found for each channel
    (or layer, as they are) by a search over multiples of θ and shifts of v_init, from −½ to 1, in turn.

    Attributes:
        coefficients: which of λ_S, λ_D, μ_S, μ_D are searched too, by name, such as ``("lambda_s",)``: one for each
            channel or layer, as the network has them; those of every step stay.
        rounds: how often all are tried in turn.
        rows: how many places are looked at, over all samples.
    """

    coefficients: tuple[str, ...] = ()
    rounds: int = 2
    rows: int = 8192

    def __post_init__(self) -> None:
        _check_rows(self, self.rows)
        unknown = [name for name in self.coefficients if name not in COEFFICIENTS]
        if unknown or self.rounds < 1:
            raise ArgumentError(
                f"{self}: {', '.join(unknown) or f'rounds {self.rounds}'} came; expected coefficients among "
                f"{', '.join(COEFFICIENTS)} and at least 1 round."
            )

    def charge(self, lockstep: Lockstep, node: fx.Node) -> None:
        """Set θ and v_init of the site."""
        site = _site(node)
        search = _Search(alone(site), *_currents(lockstep, node, self.rows))
        for _ in range(self.rounds):
            search.over("base_threshold", lambda theta: [theta * by for by in FACTORS])
            search.over("v_init", lambda start: [(start + by).clamp(LOWEST, HIGHEST) for by in SHIFTS])
            for name in self.coefficients:
                search.over(f"raw_{name}", lambda raw: [raw + by for by in BENDS])
        site.load_state_dict(search.site.state_dict())


class _Search:
    """Tries values of one parameter after the other; every channel keeps the best that it has seen."""

    def __init__(self, site: SpikingSite, current: Tensor, wanted: Tensor) -> None:
        self.site, self.current, self.wanted = site, current, wanted
        self.error = self._errors()

    def _errors(self) -> Tensor:
        return (mean_output(self.site, self.current) - self.wanted).square().mean(0)

    def over(self, name: str, moves: Callable[[Tensor], list[Tensor]]) -> None:
        """Try what ``moves`` make of the parameter; one that is neither for the layer nor for channels stays."""
        parameter: Tensor = getattr(self.site, name)
        of_steps = isinstance(self.site.neuron.granularity, PerStep) and name.startswith("raw_")
        if of_steps or parameter.shape not in (torch.Size(), self.error.shape):
            return
        best = parameter.detach().clone()
        for moved in moves(best):
            parameter.copy_(moved)
            error = self._errors()
            better = error < self.error if parameter.ndim else error.sum() < self.error.sum()
            best = torch.where(better, moved, best)
            self.error = torch.where(better, error, self.error)
        parameter.copy_(best)


def _site(node: fx.Node) -> SpikingSite:
    site = module_of(node)
    assert isinstance(site, SpikingSite)
    return site


def _currents(lockstep: Lockstep, node: fx.Node, rows: int) -> tuple[Tensor, Tensor]:
    """Return samples of what a site receives, [T, R, C], and of what the ANN's activation gives there, [R, C]."""
    wanted, steps = lockstep.expected(node), lockstep.per_step(node.all_input_nodes[0])
    where = places([value.shape for value in wanted], rows)
    current = [torch.stack([values_at(t, chosen) for t in x]) for x, chosen in zip(steps, where, strict=True)]
    for value in current:
        if not torch.isfinite(value).all():
            raise CalibrationError(
                f"{node.target}: the current has NaN or infinite values; expected finite ones. Check weights and data."
            )
    return torch.cat(current, 1), torch.cat([values_at(a, chosen) for a, chosen in zip(wanted, where, strict=True)])


def _over(parameter: Tensor, values: Tensor) -> Tensor:
    """Return the mean of values [R, C] for each channel, or of all where the parameter is one for the layer."""
    return values.mean(0) if parameter.ndim else values.mean()


def _rows(value: Tensor, axis: int = 1) -> Tensor:
    """Return [N, C, *F] as rows [N·F, C]."""
    return value.movedim(axis, -1).flatten(0, -2)


def _channel_mean(values: list[Tensor], axis: int) -> Tensor:
    sums = [_rows(value, axis).double().sum(0) for value in values]
    return (torch.stack(sums).sum(0) / sum(len(_rows(value, axis)) for value in values)).to(values[0].dtype)


def _check_rows(correction: object, rows: int) -> None:
    if rows < 1:
        raise ArgumentError(f"{correction}: rows is {rows}; expected at least 1, and thousands for good statistics.")
