"""The gated max-pool alone, against a slow reference that follows each window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lmh.gate import Accumulate, Increments
from lmh.time_axis import TimeAxis
from reference import maxpool_numpy as reference

THETA = 0.3  # no dyadic number: sums of it round


def gated(time: TimeAxis, pool: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A gated max-pool of [T, N, *F], as a conversion puts it together."""
    before, behind = Accumulate(time), Increments(time)

    def run(x: Tensor) -> Tensor:
        folded = x.flatten(0, 1)
        return behind(pool(before(folded)), folded).unflatten(0, (len(x), -1))

    return run


def spikes(*shape: int, rate: float = 0.4) -> Tensor:
    return THETA * (torch.rand(shape) < rate).float()


class TestGateAgainstTheReference:
    @pytest.mark.parametrize(
        ("dims", "options"),
        [
            (1, {"kernel_size": 2}),
            (2, {"kernel_size": 2}),
            (3, {"kernel_size": 2}),
            (1, {"kernel_size": 3, "stride": 2, "padding": 1}),
            (2, {"kernel_size": 3, "stride": 2, "padding": 1}),
            (2, {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
            (2, {"kernel_size": 2, "stride": 1, "dilation": 2}),
        ],
    )
    def test_it_passes_what_the_reference_passes(self, dims: int, options: dict[str, Any]) -> None:
        x = spikes(24, 2, 3, *[6] * dims)
        pool = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[dims](**options)
        got = gated(TimeAxis(24), pool)(x)
        kernel, ceil = options["kernel_size"], options.get("ceil_mode", False)
        stride, padding = options.get("stride", kernel), options.get("padding", 0)
        axis = reference.places(6, kernel, stride, padding, options.get("dilation", 1), ceil)
        expected = reference.pooled(x.numpy(), [axis] * dims, reference.gate)
        assert np.array_equal(got.numpy(), expected.astype(np.float32))
        assert set(got.unique().tolist()) == {0.0, float(torch.tensor(THETA))}

    def test_an_adaptive_pool_is_gated_too(self) -> None:
        x = spikes(16, 2, 3, 6, 6)
        got = gated(TimeAxis(16), nn.AdaptiveMaxPool2d(2))(x)
        expected = reference.pooled(x.numpy(), [reference.places(6, 3, 3)] * 2, reference.gate)
        assert np.array_equal(got.numpy(), expected.astype(np.float32))

    def test_for_other_values_it_is_the_growth_of_the_largest_sum(self) -> None:
        x = torch.randn(24, 2, 3, 6, dtype=torch.float64)
        got = gated(TimeAxis(24), nn.MaxPool1d(3))(x)
        expected = reference.pooled(x.numpy(), [reference.places(6, 3, 3)], reference.growth_of_the_maximum)
        assert np.allclose(got.numpy(), expected, atol=1e-12)

    @settings(deadline=None, max_examples=50)
    @given(st.integers(1, 40), st.integers(0, 2**31 - 1), st.floats(0.02, 0.98))
    def test_after_every_step_the_sum_that_passed_is_the_largest_sum(self, steps: int, seed: int, rate: float) -> None:
        torch.manual_seed(seed)
        x = spikes(steps, 2, 1, 4, 4, rate=rate)
        got = gated(TimeAxis(steps), nn.MaxPool2d(2))(x)
        counts = (x != 0).float().cumsum(0)
        assert torch.equal((got != 0).float().cumsum(0), F.max_pool2d(counts.flatten(0, 1), 2).reshape(got.shape))

    @pytest.mark.parametrize(
        ("rule", "passed"),
        [
            (reference.gate, 0.5),
            (reference.first_of_the_lead, 1.0),
            (reference.first_of_the_lead_before, 0.0),
        ],
    )
    def test_one_neurons_gate_passes_all_or_nothing_of_two_that_fire_in_turn(
        self, rule: reference.Rule, passed: float
    ) -> None:
        """Why every neuron in the lead may pass a spike: the rates are 1/2 each, and so is their maximum."""
        first, second = np.arange(64) % 2 == 1, np.arange(64) % 2 == 0
        window = np.stack([first, second], -1)[:, None, None].astype(float)
        assert rule(window).mean() == passed
        got = gated(TimeAxis(64), nn.MaxPool1d(2))(torch.tensor(window)).mean()
        assert float(got) == 0.5

    def test_its_gradient_is_that_of_the_largest_sum(self) -> None:
        x = torch.rand(5, 2, 1, 4, dtype=torch.float64, requires_grad=True)
        run = gated(TimeAxis(5), nn.MaxPool1d(2))
        weight = torch.rand(5, 2, 1, 2, dtype=torch.float64)
        (got,) = torch.autograd.grad((run(x) * weight).sum(), x)
        tops = F.max_pool1d(x.cumsum(0).flatten(0, 1), 2).unflatten(0, (5, 2))
        (expected,) = torch.autograd.grad(((tops - F.pad(tops, (0,) * 6 + (1, 0))[:-1]) * weight).sum(), x)
        assert torch.allclose(got, expected, atol=1e-12)

    def test_slices_go_on_where_the_last_one_ended(self) -> None:
        time = TimeAxis(12)
        run, x = gated(time, nn.MaxPool2d(2)), spikes(12, 2, 1, 4, 4)
        whole = run(x)
        time.carry = True
        parts = []
        for part in x.split([5, 1, 6]):
            time.steps = len(part)
            parts.append(run(part))
        assert torch.equal(torch.cat(parts), whole)

    @pytest.mark.device
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_on_cuda(self) -> None:
        x = spikes(64, 4, 3, 8, 8)
        time = TimeAxis(64)
        pool = nn.MaxPool2d(3, 2, padding=1)
        assert torch.equal(gated(time, pool)(x.cuda()).cpu(), gated(time, pool)(x))
