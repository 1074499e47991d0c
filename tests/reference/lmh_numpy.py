"""The LM-H neuron, QCFS and a plain LIF in NumPy float64, written from the equations in the design.

Nothing here imports torch or lmh: it is what the library is compared with. Every ``wrong_*`` is a plausible
slip, and the tests show that the comparison notices it.

    v_D[t] = μ_D v_D[t-1] + μ_S v_S[t-1] + I[t]
    m_S[t] = λ_S v_S[t-1] + λ_D v_D[t]
    s[t]   = 1 where m_S[t] ≥ θ, else 0
    v_S[t] = m_S[t] − θ s[t],   v_D[0] = 0,   v_S[0] = v_init θ
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

RANGES = {"lambda_s": (0.0, 1.5), "lambda_d": (0.5, 1.5), "mu_s": (-0.5, 0.5), "mu_d": (-0.5, 0.5)}
IF_START = {"lambda_s": 1.0, "lambda_d": 1.0, "mu_s": 0.0, "mu_d": 0.0}


class Trajectory(NamedTuple):
    """Entry k of the first five is step t = k + 1, shape [T, N, C, ...]; ``start`` is v_S[0], [N, C, ...]."""

    spikes: Array
    outputs: Array
    membrane: Array
    v_dendrite: Array
    v_soma: Array
    start: Array


class Values(NamedTuple):
    """θ, λ and μ of one step, broadcast against [N, C, ...]."""

    theta: Array
    lambda_s: Array
    lambda_d: Array
    mu_s: Array
    mu_d: Array


Step = Callable[[Array, Array, Array, Values], tuple[Array, Array, Array, Array]]


def step(current: Array, v_dendrite: Array, v_soma: Array, p: Values) -> tuple[Array, Array, Array, Array]:
    """Return m_S[t], s[t], v_D[t] and v_S[t]."""
    dendrite = p.mu_d * v_dendrite + p.mu_s * v_soma + current
    membrane = p.lambda_s * v_soma + p.lambda_d * dendrite
    spikes = np.where(membrane - p.theta >= 0, 1.0, 0.0)
    return membrane, spikes, dendrite, membrane - p.theta * spikes


def wrong_dendrite_reads_later_soma(
    current: Array, v_dendrite: Array, v_soma: Array, p: Values
) -> tuple[Array, Array, Array, Array]:
    """A wrong step: the dendrite keeps μ_S v_S[t] where it should keep μ_S v_S[t-1]."""
    membrane, spikes, _, soma = step(current, v_dendrite, v_soma, p)
    return membrane, spikes, p.mu_d * v_dendrite + p.mu_s * soma + current, soma


def wrong_reset_without_theta(
    current: Array, v_dendrite: Array, v_soma: Array, p: Values
) -> tuple[Array, Array, Array, Array]:
    """A wrong step: a spike takes 1 from the soma where it should take θ."""
    membrane, spikes, dendrite, _ = step(current, v_dendrite, v_soma, p)
    return membrane, spikes, dendrite, membrane - spikes


def wrong_strict_threshold(
    current: Array, v_dendrite: Array, v_soma: Array, p: Values
) -> tuple[Array, Array, Array, Array]:
    """A wrong step: no spike where m_S = θ."""
    membrane, _, dendrite, _ = step(current, v_dendrite, v_soma, p)
    spikes = np.where(membrane > p.theta, 1.0, 0.0)
    return membrane, spikes, dendrite, membrane - p.theta * spikes


def _at(value: ArrayLike, t: int, ndim: int) -> Array:
    """A scalar, a [C] or row ``t`` of a [T, 1] or [T, C], so that it broadcasts against [N, C, ...]."""
    array = np.asarray(value, dtype=np.float64)
    if array.ndim == 2:
        array = array[t]
    return array if array.ndim == 0 else array.reshape((1, array.size) + (1,) * (ndim - 2))


def simulate(
    current: ArrayLike,
    theta: ArrayLike,
    lambda_s: ArrayLike = 1.0,
    lambda_d: ArrayLike = 1.0,
    mu_s: ArrayLike = 0.0,
    mu_d: ArrayLike = 0.0,
    v_init: ArrayLike = 0.5,
    rule: Step = step,
) -> Trajectory:
    """Run one neuron per entry of ``current`` [T, N, C, ...].

    θ, λ and μ are scalars, [C], or per step with the first of two axes time: [T, 1] or [T, C]. ``v_init`` is
    a scalar or [C], the fraction of the first step's θ that the soma starts from.
    """
    current = np.asarray(current, dtype=np.float64)
    ndim = current.ndim - 1
    given = (theta, lambda_s, lambda_d, mu_s, mu_d)
    soma = np.zeros(current.shape[1:]) + _at(v_init, 0, ndim) * _at(theta, 0, ndim)
    start, dendrite = soma, np.zeros(current.shape[1:])
    rows = []
    for t, now in enumerate(current):
        p = Values(*(_at(value, t, ndim) for value in given))
        membrane, spikes, dendrite, soma = rule(now, dendrite, soma, p)
        rows.append((spikes, p.theta * spikes, membrane, dendrite, soma))
    return Trajectory(*(np.stack(column) for column in zip(*rows, strict=True)), start)


def smooth_outputs(
    current: ArrayLike,
    parameters: Mapping[str, ArrayLike],
    base: Trajectory,
    base_theta: ArrayLike,
    primitive: Callable[[Array], Array],
    *,
    reset: Callable[[Array, Array], Array] = lambda frozen, smooth: frozen,
) -> Array:
    """θ s̃[t] of the smooth twin around ``base``, shape [T, N, C, ...].

    s̃ = S(u) + (s − S(u)) at the base point, with u = (m_S − θ)/θ and S the surrogate's primitive: an
    antiderivative that meets the spike at the base point. The soft reset takes off what it took at the base
    point (``reset`` chooses between that and the smooth θ s̃, through which a gradient passes).
    """
    current = np.asarray(current, dtype=np.float64)
    ndim = current.ndim - 1
    names = ("theta", "lambda_s", "lambda_d", "mu_s", "mu_d")
    soma = base.start * 0 + _at(parameters["v_init"], 0, ndim) * _at(parameters["theta"], 0, ndim)
    dendrite = base.start * 0
    outputs = []
    for t, now in enumerate(current):
        p = Values(*(_at(parameters[name], t, ndim) for name in names))
        dendrite = p.mu_d * dendrite + p.mu_s * soma + now
        membrane = p.lambda_s * soma + p.lambda_d * dendrite
        before = _at(base_theta, t, ndim)
        offset = base.spikes[t] - primitive((base.membrane[t] - before) / before)
        output = p.theta * (primitive((membrane - p.theta) / p.theta) + offset)
        soma = membrane - reset(base.outputs[t], output)
        outputs.append(output)
    return np.stack(outputs)


def sensitivities(
    current: ArrayLike,
    weight: ArrayLike,
    parameters: Mapping[str, ArrayLike],
    slope: Callable[[Array], Array],
    *,
    reset: Callable[[Array, Array], Array] = lambda soma, output: soma,
) -> dict[str, Array]:
    """The derivatives of Σ weight θ s, neuron by neuron, by differentiating the run forwards in time.

    Entry [k] of ``current``, ``theta``, ``lambda_s``, … is the derivative by that value at step k alone, shape
    [T, N, C, ...]; ``v_soma`` is the one by v_S[0]. ds/du is ``slope``(u). ``reset`` gives the derivative of v_S[t]
    from those of m_S[t] and of the output: no gradient passes the reset unless that says so.
    """
    current, weight = np.asarray(current, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    base = simulate(current, **parameters)
    names = ("theta", "lambda_s", "lambda_d", "mu_s", "mu_d")
    ndim = current.ndim - 1

    def run(name: str, k: int) -> Array:
        """Σ_t weight[t] ∂(θ s)[t] by ``name`` at step k."""
        by_soma = np.full(current.shape[1:], 1.0 if name == "v_soma" else 0.0)
        by_dendrite, total = np.zeros(current.shape[1:]), np.zeros(current.shape[1:])
        for t in range(len(current)):
            p = Values(*(_at(parameters[other], t, ndim) for other in names))
            soma = base.v_soma[t - 1] if t else base.start
            dendrite = base.v_dendrite[t - 1] if t else np.zeros_like(soma)
            here = 1.0 if t == k else 0.0
            by_dendrite = p.mu_d * by_dendrite + p.mu_s * by_soma
            by_dendrite = by_dendrite + here * {"current": 1.0, "mu_d": dendrite, "mu_s": soma}.get(name, 0.0)
            by_membrane = p.lambda_s * by_soma + p.lambda_d * by_dendrite
            by_membrane = by_membrane + here * {"lambda_s": soma, "lambda_d": base.v_dendrite[t]}.get(name, 0.0)
            steep = slope((base.membrane[t] - p.theta) / p.theta)
            by_output = steep * by_membrane
            if name == "theta":
                by_output = by_output + here * (base.spikes[t] - steep * base.membrane[t] / p.theta)
            total = total + weight[t] * by_output
            by_soma = reset(by_membrane, by_output)
        return total

    found = {name: np.stack([run(name, k) for k in range(len(current))]) for name in ("current", *names)}
    return {**found, "v_soma": run("v_soma", 0)}


def central_differences(
    f: Callable[[Mapping[str, Array]], float], point: Mapping[str, Array], width: float = 1e-6
) -> dict[str, Array]:
    """(f(x + h) − f(x − h)) / 2h for every entry of every named array."""
    slopes = {}
    for name, value in point.items():
        slope = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            up, down = value.copy(), value.copy()
            up[index] += width
            down[index] -= width
            slope[index] = (f({**point, name: up}) - f({**point, name: down})) / (2 * width)
        slopes[name] = slope
    return slopes


def bounded(raw: ArrayLike, preset: float, low: float, high: float) -> Array:
    """p + (high − p) tanh(raw/(high − p)) for raw ≥ 0 and p + (p − low) tanh(raw/(p − low)) below."""
    raw = np.asarray(raw, dtype=np.float64)
    room = np.where(raw >= 0, high - preset, preset - low)
    return preset + room * np.tanh(raw / room)


def parameters_from_raw(raw: Mapping[str, ArrayLike], base: ArrayLike, *, by_step: bool) -> dict[str, Array]:
    """θ = base exp(raw), λ and μ from the IF start, and v_init, as :func:`simulate` takes them."""
    values = {name: bounded(raw[f"raw_{name}"], IF_START[name], *RANGES[name]) for name in RANGES}
    values["theta"] = np.asarray(base, dtype=np.float64) * np.exp(raw["raw_threshold"])
    if by_step:
        values = {name: value.reshape(len(value), -1) for name, value in values.items()}
    return {**values, "v_init": np.asarray(raw["v_init"])}


def random_parameters(rng: np.random.Generator, shape: tuple[int, ...] = ()) -> dict[str, Array]:
    """θ in (0.5, 2), λ and μ in their ranges, of ``shape``, and a scalar v_init in (0, 1)."""
    values = {name: np.asarray(rng.uniform(low, high, shape)) for name, (low, high) in RANGES.items()}
    theta = np.asarray(rng.uniform(0.5, 2.0, shape))
    return {"theta": theta, **values, "v_init": np.asarray(rng.uniform(0, 1))}


def rate_losses(v_dendrite: Array, v_soma: Array, parameters: Mapping[str, ArrayLike]) -> tuple[Array, Array]:
    """δ_D[t] and δ_S[t], what each step of [T, N, C] keeps from the output: Σ θ s = Σ I − Σ (δ_D + δ_S)."""
    p = {name: np.asarray(value) for name, value in parameters.items()}
    start = np.zeros_like(v_soma[:1]) + p["v_init"] * p["theta"]
    soma_before = np.concatenate([start, v_soma[:-1]])
    dendrite_before = np.concatenate([np.zeros_like(v_dendrite[:1]), v_dendrite[:-1]])
    delta_d = (1 - p["lambda_d"]) * v_dendrite - p["mu_d"] * dendrite_before
    return delta_d, v_soma - (p["lambda_s"] + p["mu_s"]) * soma_before


def distance(ours: Array, theirs: Array) -> float:
    """The largest difference relative to max(1, |v|)."""
    if ours.shape != theirs.shape:
        raise ValueError(f"shapes {ours.shape} and {theirs.shape}")
    return float((np.abs(ours - theirs) / np.maximum(1.0, np.abs(theirs))).max())


def triangle_slope(u: ArrayLike, gamma: float) -> Array:
    """ds/du = max(0, 1 − |u|/γ)/γ."""
    return np.maximum(0.0, 1.0 - np.abs(u) / gamma) / gamma


def qcfs(x: ArrayLike, theta: ArrayLike, levels: int) -> Array:
    """θ clip(⌊x L/θ + 1/2⌋, 0, L)/L; θ broadcasts against ``x``."""
    x, theta = np.asarray(x, dtype=np.float64), np.asarray(theta, dtype=np.float64)
    return theta * np.clip(np.floor(x * levels / theta + 0.5), 0, levels) / levels


def wrong_qcfs_without_shift(x: ArrayLike, theta: ArrayLike, levels: int) -> Array:
    """A wrong QCFS: no 1/2 inside the floor."""
    x, theta = np.asarray(x, dtype=np.float64), np.asarray(theta, dtype=np.float64)
    return theta * np.clip(np.floor(x * levels / theta), 0, levels) / levels


def qcfs_slopes(x: ArrayLike, theta: ArrayLike, levels: int) -> tuple[Array, Array]:
    """∂q/∂x and ∂q/∂θ with the floor passed straight through, where the clip leaves no doubt.

    That is x in [0, θ], where q ≈ θ clip(x/θ + rounding), and x further than half a step θ/2L outside of it.
    """
    x, theta = np.asarray(x, dtype=np.float64), np.asarray(theta, dtype=np.float64)
    inside = np.where((x >= 0) & (x <= theta), 1.0, 0.0)
    return inside, (qcfs(x, theta, levels) - inside * x) / theta


def plain_lif(current: ArrayLike, theta: float, leak: float, start: float) -> Array:
    """Spikes of the textbook leaky neuron with soft reset: v ← leak v + I; if v ≥ θ: spike, v ← v − θ."""
    current = np.asarray(current, dtype=np.float64)
    spikes = np.zeros_like(current)
    for index in np.ndindex(current.shape[1:]):
        v = start
        for t in range(len(current)):
            v = leak * v + current[(t, *index)]
            if v >= theta:
                spikes[(t, *index)] = 1.0
                v = v - theta
    return spikes
