"""The neuron against the NumPy oracle in tests/reference, and the properties that its equations promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

from lmh.errors import ArgumentError, StateError
from lmh.kernels import Kernel, use_kernel
from lmh.neurons import Coefficients, State, lmh_run, lmh_step
from lmh.qcfs import QCFS
from lmh.resets import AttachedReset, DetachedReset, Reset
from lmh.spiking import IF, LIF, LMH, PerChannel, PerLayer, PerStep, SpikingSite, bounded
from lmh.surrogates import Surrogate, Triangle
from lmh.time_axis import FoldEvents, LeaveTime, TimeAxis, carry_state, per_step
from reference import lmh_numpy as oracle
from test_surrogates import SURROGATES

NAMES = ("lambda_s", "lambda_d", "mu_s", "mu_d")
RAWS = ("raw_threshold", *(f"raw_{name}" for name in NAMES), "v_init")
GRANULARITIES = [PerLayer(), PerChannel(), PerStep()]
WRONG_STEPS = [oracle.wrong_dendrite_reads_later_soma, oracle.wrong_reset_without_theta]
TOLERANCE = 1e-12
DYADIC = st.integers(-128, 256).map(lambda i: i / 64)
few = settings(max_examples=30, deadline=None)


def _distance(ours: Tensor | np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference relative to max(1, |v|)."""
    return oracle.distance(ours.detach().numpy() if isinstance(ours, Tensor) else ours, theirs)


def _coefficients(parameters: dict[str, np.ndarray]) -> Coefficients:
    """θ, λ and μ as tensors that broadcast against [N, C]."""
    return Coefficients(*(torch.as_tensor(parameters[name]) for name in ("theta", *NAMES)))


def _run_steps(current: np.ndarray, parameters: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The library's step, once per row of ``current`` [T, N, C]."""
    coefficients = _coefficients(parameters)
    soma = (torch.as_tensor(parameters["v_init"]) * coefficients.v_threshold).expand(current.shape[1:])
    state = State(torch.zeros(current.shape[1:], dtype=torch.float64), soma)
    rows = []
    for now in torch.from_numpy(current):
        output, state = lmh_step(now, state, coefficients, Triangle(), DetachedReset())
        rows.append((output, *state))
    columns = (torch.stack(column) for column in zip(*rows, strict=True))
    return dict(zip(("outputs", "v_dendrite", "v_soma"), columns, strict=True))


def _site(steps: int, *, theta: float | list[float] = 1.0, static: bool = False, **kind: Any) -> SpikingSite:
    """A float32 site for three channels at its start."""
    base, start, neuron = torch.tensor(theta), torch.tensor(0.5), LMH(**kind)
    return SpikingSite(TimeAxis(steps), base, start, neuron, channels=3, static=static)


def _random_site(timesteps: int, seed: int = 0, **options: Any) -> SpikingSite:
    """A float64 site for three channels whose parameters all differ from the start."""
    site = _site(timesteps, **options).double()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name in RAWS:
            getattr(site, name).add_(torch.randn_like(getattr(site, name)) * 0.3)
    return site


def _raw_values(site: SpikingSite) -> dict[str, np.ndarray]:
    return {name: getattr(site, name).detach().numpy().copy() for name in RAWS}


def _oracle_parameters(site: SpikingSite, raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """θ, λ, μ and v_init from raw values, by the design's formulas; per-step ones as [T, 1] or [T, C]."""
    by_step = isinstance(site.neuron.granularity, PerStep)
    return oracle.parameters_from_raw(raw, site.base_threshold.numpy(), by_step=by_step)


def _network(site: SpikingSite) -> nn.Sequential:
    """Frames [T, N, C] in, [T, N, C] out."""
    return nn.Sequential(FoldEvents(site.time), site, LeaveTime(site.time))


def _frames(timesteps: int, seed: int = 0) -> Tensor:
    """Float64 currents [T, 30, 3] around the threshold."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(timesteps, 30, 3, dtype=torch.float64, generator=generator) + 0.6


@pytest.mark.parametrize("timesteps", [1, 2, 5, 16])
@pytest.mark.parametrize("shape", [(), (3,)], ids=["scalar", "per-channel"])
def test_step_and_run_equal_the_oracle(timesteps: int, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(timesteps)
    current, parameters = rng.normal(0.4, 1.0, (timesteps, 50, 3)), oracle.random_parameters(rng, shape)
    expected, ours = oracle.simulate(current, **parameters), _run_steps(current, parameters)
    for name, trajectory in ours.items():
        assert _distance(trajectory, getattr(expected, name)) < TOLERANCE
    assert ((ours["outputs"] > 0).numpy() == expected.spikes).all()
    frames, coefficients = torch.from_numpy(current), _coefficients(parameters)
    start = State(torch.zeros(50, 3, dtype=torch.float64), torch.from_numpy(expected.start))
    folded, last = lmh_run(lambda k: frames[k], timesteps, start, lambda k: coefficients, Triangle(), DetachedReset())
    assert torch.equal(folded.unflatten(0, (timesteps, 50)), ours["outputs"])
    assert torch.equal(last.v_dendrite, ours["v_dendrite"][-1])
    assert torch.equal(last.v_soma, ours["v_soma"][-1])


@pytest.mark.parametrize("wrong", WRONG_STEPS)
def test_the_comparison_with_the_oracle_notices_a_wrong_step(wrong: object) -> None:
    rng = np.random.default_rng(5)
    current, parameters = rng.normal(0.4, 1.0, (16, 50, 3)), oracle.random_parameters(rng, (3,))
    twin, ours = oracle.simulate(current, **parameters, rule=wrong), _run_steps(current, parameters)
    assert _distance(ours["v_soma"], twin.v_soma) > 1e-3
    assert ((ours["outputs"] > 0).numpy() != twin.spikes).any()


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("theta", [0.75, [0.5, 1.0, 1.5]], ids=["one threshold", "threshold per channel"])
def test_site_of_every_granularity_equals_the_oracle(granularity: object, theta: float | list[float]) -> None:
    site = _random_site(16, granularity=granularity, theta=theta)
    current = np.random.default_rng(1).normal(0.4, 1.0, (16, 20, 3, 2))
    parameters = _oracle_parameters(site, _raw_values(site))
    shape = {PerLayer: (), PerChannel: (3,), PerStep: (16,)}[type(granularity)]
    assert all(value.shape == shape for value in site.coefficients())
    output = site(torch.from_numpy(current).flatten(0, 1)).unflatten(0, (16, 20))
    expected = oracle.simulate(current, **parameters)
    assert _distance(output, expected.outputs) < TOLERANCE
    assert ((output > 0).numpy() == expected.spikes).all()
    twin = oracle.simulate(current, **parameters, rule=oracle.wrong_dendrite_reads_later_soma)
    assert ((output > 0).numpy() != twin.spikes).any()


@pytest.mark.parametrize("timesteps", [1, 4, 16])
def test_rate_identity_holds(timesteps: int) -> None:
    rng = np.random.default_rng(timesteps)
    current, p = rng.normal(0.4, 1.0, (timesteps, 50, 3)), oracle.random_parameters(rng)
    ours = {name: value.numpy() for name, value in _run_steps(current, p).items()}
    dendrites, somas = oracle.rate_losses(ours["v_dendrite"], ours["v_soma"], p)
    assert _distance(ours["outputs"].sum(0), current.sum(0) - (dendrites + somas).sum(0)) < 1e-10
    assert _distance(ours["outputs"].sum(0), current.sum(0) - somas.sum(0)) > 1e-3


@pytest.mark.parametrize("timesteps", [1, 2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("theta", [0.25, 1.0, 4.0])
def test_if_preset_equals_qcfs_exactly_on_dyadic_currents(timesteps: int, theta: float) -> None:
    x = (torch.arange(-128, 384).reshape(-1, 1) * (theta / 128)).expand(-1, 3)
    mean = _site(timesteps, theta=theta, static=True)(x).detach().unflatten(0, (timesteps, -1)).mean(0)
    assert torch.equal(mean, QCFS(levels=timesteps, v_threshold=theta)(x))
    frames = np.broadcast_to(x.numpy(), (timesteps, *x.shape))
    spikes = oracle.simulate(frames, theta).spikes
    assert (mean.double().numpy() == (theta * spikes.sum(0) / timesteps).astype(np.float32)).all()
    strict = oracle.simulate(frames, theta, rule=oracle.wrong_strict_threshold).spikes
    assert (strict.sum(0) != spikes.sum(0)).any()


@pytest.mark.parametrize("timesteps", [4, 7, 16])
def test_if_preset_and_qcfs_spike_counts_agree_on_random_currents(timesteps: int) -> None:
    x = torch.rand(10000, 3, generator=torch.Generator().manual_seed(0)) * 1.5 - 0.25
    counts = (_site(timesteps, theta=0.7, static=True)(x) > 0).unflatten(0, (timesteps, -1)).sum(0)
    expected = (QCFS(levels=timesteps, v_threshold=0.7)(x) * timesteps / 0.7).round()
    assert int((counts != expected).sum()) <= 5
    assert int((counts - expected).abs().max()) <= 1


def test_a_gradient_passes_the_reset_from_an_if_start_alone_unless_that_is_said() -> None:
    assert LMH().backward_reset == AttachedReset()
    assert LMH(LIF()).backward_reset == DetachedReset()
    assert LMH(reset=DetachedReset()).backward_reset == DetachedReset()
    current = torch.rand(4, 1, 3, generator=torch.Generator().manual_seed(0)).double()

    def gradient(**options: object) -> torch.Tensor:
        given = current.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(_site(4, **options)(given.flatten(0, 1)).sum(), given)
        return gradient

    for preset, usual in ((IF(), AttachedReset()), (LIF(), DetachedReset())):
        other = DetachedReset() if usual == AttachedReset() else AttachedReset()
        assert torch.equal(gradient(preset=preset), gradient(preset=preset, reset=usual))
        assert not torch.allclose(gradient(preset=preset), gradient(preset=preset, reset=other))
    assert 0 <= gradient().min() <= gradient().max() <= 1  # charge is conserved
    assert gradient(reset=DetachedReset()).max() > 1


def test_lif_preset_equals_the_plain_lif() -> None:
    current = np.random.default_rng(2).normal(0.5, 0.8, (8, 30, 3))
    output = _site(8, theta=0.5, preset=LIF(0.7)).double()(torch.from_numpy(current).flatten(0, 1))
    spikes = (output > 0).unflatten(0, (8, 30)).numpy()
    assert (spikes == oracle.plain_lif(current, 0.5, 0.7, 0.25)).all()
    assert (spikes != oracle.plain_lif(current, 0.5, 1.0, 0.25)).any()


@pytest.mark.parametrize("preset", [IF(), LIF(), LIF(0.7)], ids=repr)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
def test_raw_values_of_zero_give_the_preset_exactly(preset: IF | LIF, granularity: object) -> None:
    site = _site(4, preset=preset, granularity=granularity, theta=0.3)
    assert (site.v_threshold == torch.tensor(0.3)).all()
    for name, value in zip(NAMES, site.coefficients(), strict=True):
        assert (value == torch.tensor(getattr(preset, name))).all()


@few
@given(st.floats(-1e6, 1e6), st.floats(0.01, 0.99), st.sampled_from([torch.float32, torch.float64]))
def test_bounded_stays_in_its_range_and_is_the_formula(raw: float, part: float, dtype: torch.dtype) -> None:
    for low, high in oracle.RANGES.values():
        preset = low + part * (high - low)
        limits = torch.tensor([(preset, preset - low, high - preset)], dtype=torch.float64)
        value = bounded(torch.tensor([raw], dtype=dtype), limits.to(dtype)).item()
        rounding = 4 * torch.finfo(dtype).eps
        assert low - rounding <= value <= high + rounding
        assert abs(value - oracle.bounded(np.float64(raw), preset, low, high)) <= rounding


def test_bounded_has_slope_one_at_zero_and_rises() -> None:
    limits = torch.tensor([(1.0, 1.0, 0.5)])
    raw = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(bounded(raw, limits), raw)
    assert slope.item() == 1.0
    assert (bounded(torch.linspace(-3, 3, 100)[None], limits).diff() > 0).all()


def test_threshold_and_gradients_stay_sound_for_very_negative_raw_values() -> None:
    site = _site(4)
    with torch.no_grad():
        site.raw_threshold.fill_(-80.0)
    current = torch.ones(8, 3, requires_grad=True)
    site(current).sum().backward()
    assert (site.v_threshold > 0).all()
    assert all(getattr(site, name).grad.isfinite().all() for name in RAWS)


def test_a_constant_current_equals_its_repetition() -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(_site(4, static=True)(x), _site(4)(x.repeat(4, 1)))


@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("kernel", [Kernel.EAGER, Kernel.FUSED], ids=lambda kernel: kernel.value)
@pytest.mark.parametrize("reset", [DetachedReset(), AttachedReset()], ids=repr)
def test_site_gradients_equal_those_of_the_smooth_twin(
    reset: Reset, kernel: Kernel, surrogate: Surrogate, granularity: object
) -> None:
    site = _random_site(5, seed=4, granularity=granularity, surrogate=surrogate, reset=reset)
    rng = np.random.default_rng(4)
    current, weight = rng.normal(0.4, 1.0, (5, 6, 3)), rng.normal(size=(5, 6, 3))
    with use_kernel(kernel):
        output = site(torch.from_numpy(current).flatten(0, 1)).unflatten(0, (5, 6))
    (output * torch.from_numpy(weight)).sum().backward()
    start = _oracle_parameters(site, _raw_values(site))
    base = oracle.simulate(current, **start)

    def primitive(u: np.ndarray) -> np.ndarray:
        return surrogate.primitive(torch.from_numpy(u)).numpy()

    def loss(raw: dict[str, np.ndarray], **options: object) -> float:
        twin = (current, _oracle_parameters(site, raw), base, start["theta"], primitive)
        return float((oracle.smooth_outputs(*twin, **options) * weight).sum())

    raw = _raw_values(site)
    detached = oracle.central_differences(loss, raw)
    attached = oracle.central_differences(lambda raw: loss(raw, reset=lambda _, smooth: smooth), raw)
    expected, wrong = (detached, attached) if reset == DetachedReset() else (attached, detached)
    for name in RAWS:
        assert _distance(getattr(site, name).grad, expected[name]) < 1e-6, name
    assert max(_distance(getattr(site, name).grad, wrong[name]) for name in RAWS) > 1e-2


def test_state_is_float32_and_the_output_bfloat16_under_bfloat16_currents() -> None:
    current = (torch.rand(32, 500, 3, generator=torch.Generator().manual_seed(5)) * 0.3).bfloat16()
    output = _site(32)(current.flatten(0, 1))
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, _site(32)(current.float().flatten(0, 1)).bfloat16())
    values = Coefficients(*torch.tensor([1, 1, 1, 0, 0]).bfloat16())
    start = State(torch.zeros(500, 3).bfloat16(), torch.full((500, 3), 0.5).bfloat16())
    coarse, _ = lmh_run(lambda k: current[k], 32, start, lambda k: values, Triangle(), DetachedReset())
    assert not torch.equal(output, coarse)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4], [5, 1]], ids=str)
def test_slices_with_carried_state_equal_one_run(granularity: object, sizes: list[int]) -> None:
    snn = _network(_random_site(6, granularity=granularity))
    frames = _frames(6)
    whole = per_step(snn, frames)
    with carry_state(snn):
        slices = [per_step(snn, part, steps=len(part)) for part in frames.split(sizes)]
    assert torch.equal(torch.cat(slices), whole)
    assert torch.equal(per_step(snn, frames), whole)
    cold = torch.cat([per_step(snn, part, steps=len(part)) for part in frames.split(sizes)])
    assert not torch.equal(cold, whole)


def test_carried_state_is_dropped_when_the_block_raises_and_holds_no_graph() -> None:
    snn = _network(_random_site(4))
    frames = torch.ones(4, 2, 3, dtype=torch.float64)
    whole = per_step(snn, frames)

    def train_and_fail() -> None:
        with carry_state(snn):
            per_step(snn, frames).sum().backward()
            per_step(snn, frames).sum().backward()
            raise KeyError

    with pytest.raises(KeyError):
        train_and_fail()
    assert torch.equal(per_step(snn, frames), whole)


def test_a_nested_block_raises_and_leaves_the_outer_one_open() -> None:
    snn = _network(_random_site(4))
    frames = _frames(4)
    with carry_state(snn):
        first = per_step(snn, frames[:2], steps=2)
        with pytest.raises(StateError, match=r"already open.*Close it"), carry_state(snn):
            pass
        second = per_step(snn, frames[2:], steps=2)
    assert torch.equal(torch.cat([first, second]), per_step(snn, frames))


def test_another_batch_shape_inside_a_block_raises() -> None:
    snn = _network(_random_site(4))
    with carry_state(snn):
        per_step(snn, torch.ones(4, 2, 3, dtype=torch.float64))
        with pytest.raises(StateError, match=r"\[2, 3\].*\[5, 3\].*Open a new carry_state block"):
            per_step(snn, torch.ones(4, 5, 3, dtype=torch.float64))


def test_per_step_parameters_refuse_to_run_past_their_end() -> None:
    snn = _network(_random_site(4, granularity=PerStep()))
    frames = torch.ones(5, 2, 3, dtype=torch.float64)
    with pytest.raises(StateError, match=r"end at 4.*Run at most 4 steps"):
        per_step(snn, frames, steps=5)
    with carry_state(snn):
        per_step(snn, frames[:3], steps=3)
        with pytest.raises(StateError, match="steps 4 to 5"):
            per_step(snn, frames[:2], steps=2)
        assert per_step(snn, frames[:1], steps=1).shape == (1, 2, 3)


@pytest.mark.parametrize("theta", [0.0, -1.0, float("nan"), float("inf")])
def test_a_threshold_that_is_not_finite_and_positive_raises(theta: float) -> None:
    with pytest.raises(ArgumentError, match="expected finite numbers, θ above 0"):
        _site(4, theta=theta)


def test_shapes_channels_and_presets_that_do_not_fit_raise() -> None:
    with pytest.raises(ArgumentError, match=r"\[2\]; expected \[\] or \[3\]"):
        _site(4, theta=[1.0, 2.0])
    with pytest.raises(ArgumentError, match="needs channels="):
        SpikingSite(TimeAxis(4), torch.tensor(1.0), torch.tensor(0.5), LMH(granularity=PerChannel()))
    with pytest.raises(ArgumentError, match="Widen it with ranges="):
        LMH(preset=LIF(2.0))


@few
@given(arrays(np.float64, (7, 3, 3), elements=DYADIC), st.sampled_from([0.5, 1.0, 2.0]))
def test_if_neuron_conserves_charge(current: np.ndarray, theta: float) -> None:
    parameters = {"theta": np.asarray(theta), "v_init": np.asarray(0.5)}
    ours = _run_steps(current, parameters | oracle.IF_START)
    kept = ours["v_soma"][-1] - theta / 2
    assert torch.equal(torch.from_numpy(current.sum(0)), ours["outputs"].sum(0) + kept)


@few
@given(st.integers(0, 1000), st.integers(1, 8), st.sampled_from(GRANULARITIES))
def test_a_shorter_run_is_a_prefix_of_a_longer_one(seed: int, steps: int, granularity: object) -> None:
    snn = _network(_random_site(8, seed, granularity=granularity))
    frames = _frames(8, seed)
    assert torch.equal(per_step(snn, frames[:steps], steps=steps), per_step(snn, frames)[:steps])


@few
@given(st.integers(0, 1000), st.permutations(range(30)), st.sampled_from(GRANULARITIES))
def test_permuting_the_batch_permutes_the_output(seed: int, order: list[int], granularity: object) -> None:
    snn = _network(_random_site(4, seed, granularity=granularity))
    frames = _frames(4, seed)
    assert torch.equal(per_step(snn, frames[:, order]), per_step(snn, frames)[:, order])
