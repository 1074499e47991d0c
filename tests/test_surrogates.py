"""Surrogate gradients: slopes and primitives against their formulas, and the gradient of one spike."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lmh.errors import ArgumentError
from lmh.neurons import fire
from lmh.surrogates import Arctan, Dspike, Rectangle, Sigmoid, Surrogate, Triangle
from reference import lmh_numpy as oracle

SURROGATES = [Triangle(), Triangle(0.5), Rectangle(), Sigmoid(), Arctan(), Dspike(), Dspike(1.0, 0.5)]
TOLERANCE = 1e-12


def _distance(ours: Tensor | np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference relative to max(1, |v|)."""
    return oracle.distance(ours.detach().numpy() if isinstance(ours, Tensor) else ours, theirs)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
@pytest.mark.parametrize("theta", [[0.5], [0.5, 1.0, 2.0]], ids=["one threshold", "threshold per channel"])
def test_gradient_of_fire_equals_the_closed_form(surrogate: Surrogate, theta: list[float]) -> None:
    generator = torch.Generator().manual_seed(3)
    soma = torch.randn(40, 3, dtype=torch.float64, generator=generator).requires_grad_()
    threshold = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(40, 3, dtype=torch.float64, generator=generator)
    output = fire(soma, threshold, surrogate)
    to_soma, to_threshold = torch.autograd.grad((output * weight).sum(), (soma, threshold))
    m, thresholds = soma.detach().numpy(), threshold.detach().numpy()
    slope, spikes = surrogate(torch.from_numpy(m / thresholds - 1)).numpy(), m >= thresholds
    assert torch.equal(output, fire(soma.detach(), threshold.detach(), surrogate))
    assert _distance(output, thresholds * spikes) == 0
    assert _distance(to_soma, weight.numpy() * slope) < TOLERANCE
    by_entry = weight.numpy() * (spikes - slope * m / thresholds)
    by_threshold = by_entry.sum(0) if len(theta) == 3 else by_entry.sum(keepdims=True)[0]
    assert _distance(to_threshold, by_threshold) < TOLERANCE


@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
def test_primitive_of_the_surrogate_rises_from_0_to_1_with_its_slope(surrogate: Surrogate) -> None:
    u, width = torch.linspace(-2.003, 2.001, 400, dtype=torch.float64), 1e-6
    numerical = (surrogate.primitive(u + width) - surrogate.primitive(u - width)) / (2 * width)
    assert _distance(surrogate(u), numerical.numpy()) < 1e-8
    ends = surrogate.primitive(torch.tensor([-1e9, 0.0, 1e9], dtype=torch.float64))
    assert _distance(ends, np.array([0.0, 0.5, 1.0])) < 1e-8


@pytest.mark.parametrize("temperature", [0.5, 3.0, 20.0])
def test_dspike_is_the_formula_of_its_authors(temperature: float) -> None:
    """For x in (0, 1) and a threshold of 1/2: a tanh(b (x − 1/2)) + 1/2 with ends 0 and 1."""
    x = np.linspace(0.001, 0.999, 200)
    expected = (np.tanh(temperature * (x - 0.5)) + np.tanh(temperature / 2)) / (2 * np.tanh(temperature / 2))
    u = torch.from_numpy((x - 0.5) / 0.5)
    assert _distance(Dspike(temperature).primitive(u), expected) < TOLERANCE


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"temperature": math.inf}, {"gamma": -1.0}])
def test_dspike_out_of_range_is_refused(bad: dict[str, float]) -> None:
    name = next(iter(bad))
    with pytest.raises(
        ArgumentError, match=rf"Dspike: {name} is .* expected a finite number above 0\. Pass Dspike\({name}="
    ):
        Dspike(**bad)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_triangle_is_the_formula_of_the_design(gamma: float) -> None:
    u = torch.linspace(-3, 3, 101, dtype=torch.float64)
    assert _distance(Triangle(gamma)(u), oracle.triangle_slope(u.numpy(), gamma)) < TOLERANCE
