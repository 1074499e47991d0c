"""Which NIR neuron stands for the LM-H neurons of a site, and what it cannot say.

NIR's neurons are continuous in time and have no step of their own. They are taken here as its simulators take them, by
one forward Euler step of dt for each step of the network, from a potential of 0:

    IF       v[t] = v[t−1] + dt r I[t]
    LIF      v[t] = v[t−1] + (dt/τ) (v_leak − v[t−1] + r I[t])
    CubaLIF  i[t] = i[t−1] + (dt/τ_syn) (w_in I[t] − i[t−1]),   v[t] = v[t−1] + (dt/τ_mem) (v_leak − v[t−1] + r i[t])
    then     z[t] = 1 and v[t] = v_reset  where v[t] > v_threshold

Beside them the LM-H neuron, with v_D eliminated where μ_D = 0, is m[t] = Λ v_S[t−1] + λ_D I[t] with Λ = λ_S + λ_D μ_S.
So a site becomes

    T = 1, or Λ = μ_D = 0: nothing is kept     Threshold
    μ_D = 0, Λ = 1                             IF         r = 1/dt
    μ_D = 0, Λ < 1                             LIF        τ = dt/(1 − Λ), r = τ/dt
    μ_D > 0                                    CubaLIF    τ_syn = dt/(1 − μ_D), w_in = τ_syn/dt, the rest as LIF

with v_threshold = θ/λ_D, so that every current counts once, as platforms that ignore r expect, and v_reset at what a
soft reset leaves on average (:class:`Fit`). With ``ShiftedStart`` potentials are counted from v_init·θ: v_threshold,
v_reset and v_leak are lower by it. Spikes are unit spikes: the θ of the output is the business of the weights behind.
NIR fires above the threshold, LM-H neurons at it: the threshold is written as the float32 just below.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...spiking import PerStep, SpikingSite
from .nir_build import float32
from .nir_values import Array

SLOWEST = 1 - 2.0**-13

SOFT_RESET = "soft reset: a spike takes θ off the potential; NIR sets the potential to v_reset, here to {:.2g} θ"
START_KEPT = (
    "start at v_init·θ: NIR gives no start; written by counting potentials from there, so v_threshold, v_reset (and "
    "v_leak) are lower by it, which holds where a platform starts at 0"
)
START_DROPPED = "start at v_init·θ: NIR gives no start; this one starts at 0"
COUPLED = "coupled states: the dendrite reads the soma (μ_S) and keeps a part of that (μ_D); the part kept is dropped"
PER_STEP = "per-step parameters: they differ from step to step; NIR has one value, the mean over the steps"
GROWTH = "a potential that grows by itself (λ_S + λ_D μ_S > 1): taken as 1"
ALTERNATION = "a potential that alternates (λ_S + λ_D μ_S < 0): taken as 0"
NEGATIVE_DENDRITE = "μ_D < 0: a time constant below dt; taken as 0"
NO_LEAK = "no leak beside leaky channels or a synaptic time constant: a leak of 2⁻¹³ per step"


@dataclass(frozen=True)
class ShiftedStart:
    """Potentials are counted from v_init·θ: exact on platforms that start at 0 and heed v_reset and v_leak."""


@dataclass(frozen=True)
class ZeroStart:
    """The start is dropped; v_reset and v_leak are 0, as many platforms demand."""


Start = ShiftedStart | ZeroStart
MEAN_RESIDUAL = 1 / 3


@dataclass(frozen=True)
class Neuron:
    """A site in NIR.

    Attributes:
        node: the NIR node, parameters of the shape of one sample of the site.
        sign: what the current is to be multiplied by, 1 or −1.
        theta: of the output, shape [] or [C].
        lost: what the node cannot say.
    """

    node: Any
    sign: Array
    theta: Array
    lost: tuple[str, ...]


@dataclass(frozen=True)
class Fit:
    """How LM-H neurons are fitted to NIR's.

    Attributes:
        dt: length of a step, in the unit of NIR's time constants.
        start: what becomes of v_init.
        residual: the potential after a spike, in θ. A soft reset leaves what was above θ, between 0 and the current:
            for currents spread evenly over (0, θ), each giving spikes in proportion, a third of θ on average.
    """

    dt: float = 1.0
    start: Start = field(default_factory=ShiftedStart)
    residual: float = MEAN_RESIDUAL


def neuron_for(nir: Any, site: SpikingSite, shape: tuple[int, ...], fit: Fit) -> Neuron:
    """Return the NIR node for a site.

    Args:
        nir: the nir package.
        site: the site; θ, λ and μ as they are now.
        shape: of one sample of the site's current, [C, *F].
        fit: step, start and reset.
    """
    steps, dt, start = site.time.timesteps, fit.dt, fit.start
    lost: list[str] = []
    theta, lambda_s, lambda_d, mu_s, mu_d = _coefficients(site, steps, lost)
    first = site.v_threshold[0] if isinstance(site.neuron.granularity, PerStep) else site.v_threshold
    begin = _plain(site.v_init * first)
    gain, sign = np.where(lambda_d == 0, 1.0, np.abs(lambda_d)), np.sign(lambda_d)
    carried = lambda_s + lambda_d * mu_s

    def full(value: Array | float) -> Array:
        array = np.asarray(value, dtype=np.float64)
        aligned = array if array.ndim == 0 else array.reshape(-1, *[1] * (len(shape) - 1))
        return float32(np.broadcast_to(aligned, shape))

    if steps == 1 or not (carried.any() or mu_d.any()):
        threshold = (theta - carried * begin * (steps == 1)) / gain
        return Neuron(nir.Threshold(threshold=_just_below(full(threshold))), sign, theta, tuple(lost))
    if carried.any() or (mu_s.any() and mu_d.any()):
        lost.append(SOFT_RESET.format(fit.residual))
    if (carried * begin).any() or (mu_s * mu_d * begin).any():
        lost.append(START_KEPT if isinstance(start, ShiftedStart) else START_DROPPED)
    if (mu_d * mu_s).any():
        lost.append(COUPLED)
    leak, synapse = _within_nir(carried, mu_d, lost)
    rest = -begin / gain if isinstance(start, ShiftedStart) else np.zeros(())
    firing = {
        "v_threshold": _just_below(full(theta / gain + rest)),
        "v_reset": full(rest + fit.residual * theta / gain),
    }
    if not synapse.any() and (leak == 1).all():
        return Neuron(nir.IF(r=full(1 / dt), **firing), sign, theta, tuple(lost))
    if (leak == 1).any():
        lost.append(NO_LEAK)
        leak = np.minimum(leak, SLOWEST)
    tau = dt / (1 - leak)
    leaky = {"r": full(tau / dt), "v_leak": full(rest), **firing}
    if not synapse.any():
        return Neuron(nir.LIF(tau=full(tau), **leaky), sign, theta, tuple(lost))
    tau_syn = dt / (1 - synapse)
    node = nir.CubaLIF(tau_syn=full(tau_syn), tau_mem=full(tau), w_in=full(tau_syn / dt), **leaky)
    return Neuron(node, sign, theta, tuple(lost))


def _plain(value: Any) -> Array:
    return value.detach().cpu().double().numpy()


def _coefficients(site: SpikingSite, steps: int, lost: list[str]) -> tuple[Array, ...]:
    """θ, λ and μ, each of shape [] or [C]; per-step values as their mean."""
    values = [_plain(site.v_threshold), *map(_plain, site.coefficients())]
    if not isinstance(site.neuron.granularity, PerStep):
        return tuple(values)
    if any((value[:steps] != value[:1]).any() for value in values):
        lost.append(PER_STEP)
    return tuple(value[:steps].mean(0) for value in values)


def _within_nir(carried: Array, mu_d: Array, lost: list[str]) -> tuple[Array, Array]:
    """Bring what a step keeps of the potential into [0, 1], and of the dendrite into [0, 1)."""
    for present, loss in (
        ((carried > 1).any(), GROWTH),
        ((carried < 0).any(), ALTERNATION),
        ((mu_d < 0).any(), NEGATIVE_DENDRITE),
    ):
        if present:
            lost.append(loss)
    return np.clip(carried, 0, 1), np.clip(mu_d, 0, SLOWEST)


def _just_below(threshold: Array) -> Array:
    """The largest float32 below the threshold: above it is at or above the threshold."""
    return np.nextafter(threshold, np.float32(-np.inf))
