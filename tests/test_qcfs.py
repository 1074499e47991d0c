"""QCFS against the NumPy oracle in tests/reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmh.errors import ArgumentError
from lmh.kernels import Kernel, can_compile, use_kernel
from lmh.qcfs import QCFS, quantize
from reference import lmh_numpy as oracle

LEVELS = [1, 2, 3, 4, 8, 16]
few = settings(max_examples=30, deadline=None)


def _clear_of_the_clip(theta: float, levels: int) -> torch.Tensor:
    """Float64 inputs below, in and above [0, θ], none within half a step outside of it."""
    random = torch.rand(3, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(levels))
    margin = theta / (2 * levels) * 1.001
    return torch.cat([-margin - random[0], random[1] * theta, theta + margin + random[2]]).reshape(-1, 1)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("theta", [0.25, 1.0, 8.0])
def test_dyadic_values_equal_the_oracle_exactly(levels: int, theta: float) -> None:
    x = torch.arange(-128, 384) * (theta / 128)
    expected = oracle.qcfs(x.numpy(), theta, levels)
    ours = QCFS(levels, theta)(x)
    assert (ours.detach().numpy() == expected.astype(np.float32)).all()
    assert torch.equal(ours, quantize(x, torch.tensor(theta), levels))
    assert (expected != oracle.wrong_qcfs_without_shift(x.numpy(), theta, levels)).any()


@few
@given(st.integers(0, 1000), st.sampled_from(LEVELS), st.floats(0.01, 10.0))
def test_random_values_equal_the_oracle_in_float64(seed: int, levels: int, theta: float) -> None:
    unit = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = (unit * 2 - 0.5) * theta
    ours = quantize(x, torch.tensor(theta, dtype=torch.float64), levels).numpy()
    assert (np.abs(ours - oracle.qcfs(x.numpy(), theta, levels)) > 1e-12 * max(1.0, theta)).sum() <= 1
    wrong = oracle.wrong_qcfs_without_shift(x.numpy(), theta, levels)
    assert (np.abs(ours - wrong) > 1e-12 * max(1.0, theta)).sum() > 50


@pytest.mark.parametrize("levels", LEVELS)
def test_there_are_levels_plus_one_values_and_quantising_again_changes_none(levels: int) -> None:
    layer = QCFS(levels, 1.0)
    once = layer(torch.linspace(-1, 2, 1001)).detach()
    assert len(once.unique()) == levels + 1
    assert (once.min(), once.max()) == (0, 1)
    assert torch.equal(layer(once), once)


@pytest.mark.parametrize("levels", [1, 3, 4, 8])
@pytest.mark.parametrize("theta", [0.5, 1.7])
def test_gradient_passes_straight_through_the_floor(levels: int, theta: float) -> None:
    x = _clear_of_the_clip(theta, levels).requires_grad_()
    threshold = torch.full_like(x, theta, requires_grad=True)
    by_x, by_theta = torch.autograd.grad(quantize(x, threshold, levels).sum(), (x, threshold))
    expected_x, expected_theta = oracle.qcfs_slopes(x.detach().numpy(), theta, levels)
    assert np.abs(by_x.numpy() - expected_x).max() < 1e-12
    assert np.abs(by_theta.numpy() - expected_theta).max() < 1e-12
    assert set(expected_x.flatten()) == {0.0, 1.0}


def test_threshold_is_learnable_through_its_logarithm() -> None:
    layer = QCFS(4, 1.7).double()
    theta = layer.v_threshold.item()
    x = _clear_of_the_clip(theta, 4)
    layer(x).sum().backward()
    expected = theta * oracle.qcfs_slopes(x.numpy(), theta, 4)[1].sum()
    assert [name for name, _ in layer.named_parameters()] == ["raw_threshold"]
    assert abs(layer.raw_threshold.grad.item() - expected) < 1e-10 * abs(expected)


def test_training_moves_the_threshold_towards_the_largest_activation() -> None:
    layer, x = QCFS(4, 8.0), torch.linspace(0, 1, 64)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(100):
        optimiser.zero_grad()
        (layer(x) - x).square().mean().backward()
        optimiser.step()
    assert 0.7 < layer.v_threshold.item() < 1.5


@pytest.mark.parametrize("raw", [-80.0, -10.0, 3.0])
def test_threshold_stays_positive(raw: float) -> None:
    layer = QCFS(4, 1.0)
    with torch.no_grad():
        layer.raw_threshold.fill_(raw)
    assert layer.v_threshold.item() > 0
    assert layer(torch.ones(3)).isfinite().all()


def test_raw_threshold_of_zero_gives_the_start_exactly() -> None:
    assert torch.equal(QCFS(4, 0.3).v_threshold, torch.tensor(0.3))
    assert QCFS().v_threshold.item() == 8.0
    assert QCFS().levels == 4


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 2, 2)], ids=str)
def test_per_channel_thresholds_apply_to_axis_1(shape: tuple[int, ...]) -> None:
    layer = QCFS(4, 1.0, channels=3).double()
    theta = np.array([0.5, 1.0, 2.0])
    with torch.no_grad():
        layer.raw_threshold.copy_(torch.from_numpy(np.log(theta)))
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = oracle.qcfs(x.numpy(), theta.reshape(3, *[1] * (len(shape) - 2)), 4)
    assert layer.v_threshold.shape == (3,)
    assert np.abs(layer(x).detach().numpy() - expected).max() < 1e-12
    assert np.abs(expected - oracle.qcfs(x.numpy(), 1.0, 4)).max() > 0.1


@pytest.mark.parametrize("levels", [0, -1])
def test_levels_below_1_raise(levels: int) -> None:
    with pytest.raises(ArgumentError, match=f"levels is {levels}; expected at least 1"):
        QCFS(levels)


@pytest.mark.parametrize("theta", [0.0, -1.0, float("nan"), float("inf")])
def test_a_threshold_that_is_not_finite_and_positive_raises(theta: float) -> None:
    with pytest.raises(ArgumentError, match=f"v_threshold is {theta}; expected a finite number above 0"):
        QCFS(4, theta)


def _straight_through(x: torch.Tensor, theta: torch.Tensor, levels: int) -> torch.Tensor:
    """The definition under autograd: the floor passes its gradient on."""
    y = (x / theta).clamp(0, 1) * levels + 0.5
    y = y + (y.floor() - y).detach()
    return theta * (y / levels)


def _gradients(
    function: Callable[..., torch.Tensor], x: torch.Tensor, theta: torch.Tensor, weight: torch.Tensor
) -> list[torch.Tensor]:
    x, theta = x.detach().requires_grad_(), theta.detach().requires_grad_()
    out = function(x, theta, 4)
    return [out, *torch.autograd.grad((out * weight).sum(), (x, theta))]


THETAS = [(), (3, 1, 1), (1, 3, 1, 1), (5, 3, 4, 4), (4, 4)]


@pytest.mark.parametrize("shape", THETAS, ids=str)
@pytest.mark.parametrize("kernel", list(Kernel))
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
def test_every_kernel_gives_the_straight_through_gradient(
    shape: tuple[int, ...], kernel: Kernel, order: torch.memory_format
) -> None:
    if kernel is Kernel.COMPILED and not can_compile("cpu"):
        pytest.skip("no compiler")
    x = (torch.randn(5, 3, 4, 4, dtype=torch.float64) * 1.5).contiguous(memory_format=order)
    x[0, 0, 0] = torch.tensor([0.0, float("inf"), float("-inf"), 0.5], dtype=torch.float64)
    theta = torch.rand(shape, dtype=torch.float64) + 0.5
    weight = torch.randn_like(x)
    expected = _gradients(_straight_through, x.nan_to_num(posinf=99, neginf=-99), theta, weight)
    with use_kernel(kernel):
        ours = _gradients(quantize, x, theta, weight)
    assert torch.equal(ours[0], expected[0])
    assert torch.allclose(ours[1], expected[1], rtol=0, atol=1e-12)
    assert torch.allclose(ours[2], expected[2], rtol=0, atol=1e-12)


def test_it_keeps_the_input_and_the_threshold_alone() -> None:
    saved: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    x, theta = torch.randn(5, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        quantize(x, theta, 4)
    assert {tensor.data_ptr() for tensor in saved} == {x.data_ptr(), theta.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_are_quantised_in_single_precision(dtype: torch.dtype) -> None:
    x, theta = torch.randn(200, 3).to(dtype), torch.tensor([0.3, 1.0, 1.7])
    wide, narrow = (_gradients(quantize, value, theta, torch.ones(200, 3)) for value in (x.float(), x))
    assert (narrow[0].dtype, narrow[1].dtype, narrow[2].dtype) == (dtype, dtype, torch.float32)
    assert torch.equal(narrow[0], wide[0].to(dtype))
    assert torch.allclose(narrow[2], wide[2], rtol=1e-5)


def test_thresholds_of_a_layer_come_one_for_each_channel() -> None:
    layer = QCFS(4, torch.tensor([0.5, 2.0]))
    assert torch.equal(layer.v_threshold, torch.tensor([0.5, 2.0]))
    assert layer.raw_threshold.shape == (2,)
    with pytest.raises(ArgumentError, match=r"shape \[2\] and channels is 3; expected \[\] or \[3\]"):
        QCFS(4, torch.tensor([0.5, 2.0]), channels=3)
