"""Policies that balance and compare distributions, against numpy; histograms beyond what float32 can count."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import nets
from histograms import histogram_of
from lmh import PerLayer
from lmh.calibrate import (
    BatchNormStatistics,
    KLDivergence,
    LocalThresholdBalancing,
    Max,
    MinError,
    Percentile,
    calibrate,
    policy_text,
)
from lmh.calibrate import histogram as calibrate_histogram
from lmh.calibrate.histogram import BINS, Histogram
from lmh.convert import prepare
from lmh.errors import ArgumentError, CalibrationError
from lmh.qcfs import quantize

NEW = [LocalThresholdBalancing(), KLDivergence()]


class TestLocalThresholdBalancing:
    @pytest.mark.parametrize("timesteps", [1, 2, 4, 8, 32])
    def test_clipping_and_rounding_are_in_balance(self, timesteps: int) -> None:
        x = torch.randn(50000, 1)
        theta = float(LocalThresholdBalancing().threshold(histogram_of(*x.split(1000)), timesteps))
        values = x.double().numpy()
        clipping = np.maximum(values - theta, 0).mean()
        rounding = theta / (12 * timesteps**2) * ((values > 0) & (values <= theta)).mean()
        assert clipping == pytest.approx(rounding, rel=0.03)

    @pytest.mark.parametrize("timesteps", [2, 4, 8, 16])
    def test_its_error_is_close_to_the_least(self, timesteps: int) -> None:
        histogram, x = histogram_of(values := torch.randn(50000, 1)), values.clamp_min(0)
        errors = [
            float((x - quantize(x, policy.threshold(histogram, timesteps), timesteps)).square().mean())
            for policy in (LocalThresholdBalancing(), MinError())
        ]
        assert errors[0] < 1.1 * errors[1]

    def test_channels_do_not_touch_each_other(self) -> None:
        x = torch.randn(20000, 2) * torch.tensor([1.0, 30.0])
        both = LocalThresholdBalancing().threshold(histogram_of(x), 4)
        for channel in range(2):
            alone = LocalThresholdBalancing().threshold(histogram_of(x[:, channel : channel + 1]), 4)
            assert torch.allclose(both[channel], alone[0])


class TestKLDivergence:
    @pytest.mark.parametrize("timesteps", [1, 4, 16])
    def test_it_finds_what_numpy_finds(self, timesteps: int) -> None:
        histogram = histogram_of(torch.randn(20000, 1) ** 3)
        counts, width = histogram.counts[0].numpy(), float(histogram.width)

        def divergence(bins: int) -> float:
            p = counts[:bins].copy()
            p[-1] += counts[bins:].sum()
            q = np.zeros(bins)
            cells = np.floor((np.arange(bins) + 0.5) / bins * timesteps + 0.5)
            for cell in range(timesteps + 1):
                filled = (cells == cell) & (counts[:bins] > 0)
                if filled.any():
                    q[filled] = counts[:bins][cells == cell].sum() / filled.sum()
            p, q = p / p.sum(), q / q.sum()
            there = p > 0
            return float((p[there] * np.log(p[there] / np.maximum(q[there], 1e-12))).sum())

        steps = range(BINS // 64, BINS + 1, BINS // 64)
        expected = min(min(steps, key=divergence) * width, float(histogram.maximum))
        assert float(KLDivergence().threshold(histogram, timesteps)) == pytest.approx(expected, rel=1e-5)

    def test_an_even_distribution_is_kept_whole(self) -> None:
        histogram = histogram_of((torch.arange(BINS * 8).reshape(-1, 1) + 1) / 8)
        assert KLDivergence().threshold(histogram, 8) == histogram.maximum

    def test_a_lone_outlier_does_not_decide(self) -> None:
        x = torch.rand(100000, 1)
        x[0] = 50.0
        assert float(KLDivergence().threshold(histogram_of(x), 8)) < 5

    @pytest.mark.parametrize("candidates", [0, BINS + 1])
    def test_numbers_of_candidates_out_of_range_are_refused(self, candidates: int) -> None:
        with pytest.raises(ArgumentError, match="expected 1 to 1024, such as 64"):
            KLDivergence(candidates)

    def test_they_name_themselves(self) -> None:
        assert policy_text(KLDivergence(32, PerLayer())) == "KLDivergence(candidates=32, per layer)"
        assert policy_text(LocalThresholdBalancing()) == "LocalThresholdBalancing(per channel)"


@pytest.mark.parametrize("policy", NEW, ids=policy_text)
class TestBoth:
    def test_theta_grows_with_t_and_stays_below_the_maximum(self, policy: MinError) -> None:
        histogram = histogram_of(torch.randn(50000, 1))
        thetas = [float(policy.threshold(histogram, timesteps)) for timesteps in (1, 2, 4, 8, 32)]
        assert all(a <= 1.1 * b for a, b in itertools.pairwise(thetas))
        assert thetas[0] < thetas[-1] <= float(histogram.maximum)

    def test_silent_channels_and_layers(self, policy: MinError) -> None:
        x = torch.rand(100, 3)
        x[:, 1] = -1
        assert [bool(value > 0) for value in policy.threshold(histogram_of(x), 4)] == [True, False, True]
        net = nets.two_layers()
        with torch.no_grad():
            net[0].weight.zero_()
            net[0].bias.fill_(-1)
        theta = calibrate(prepare(net, (4,)), policy, 4, torch.rand(8, 4)).v_threshold["1"]
        assert bool((theta == 1).all())

    def test_a_single_value_is_its_own_threshold(self, policy: MinError) -> None:
        theta = float(policy.threshold(histogram_of(torch.full((10, 1), 2.0)), 4))
        assert theta == pytest.approx(2, rel=2e-3)

    @pytest.mark.parametrize("per_layer", [False, True])
    def test_thresholds_have_the_granularity_asked_for(self, policy: MinError, per_layer: bool) -> None:
        chosen = type(policy)(granularity=PerLayer()) if per_layer else policy
        found = calibrate(prepare(nets.conv_net(), (2, 8, 8)), chosen, 4, torch.rand(32, 2, 8, 8)).v_threshold
        assert {path: tuple(theta.shape) for path, theta in found.items()} == (
            {"2": (), "6": ()} if per_layer else {"2": (6,), "6": (8,)}
        )

    def test_values_that_are_not_finite_name_the_site(self, policy: MinError) -> None:
        with pytest.raises(CalibrationError, match=r"^1: .*NaN or infinite"):
            calibrate(prepare(nets.two_layers(), (4,)), policy, 4, torch.full((2, 4), torch.nan))

    def test_the_predicted_distribution_will_do(self, policy: MinError) -> None:
        from lmh.calibrate.statistics import Moments, normal_histogram

        predicted = normal_histogram(Moments(torch.tensor([0.3]), torch.tensor([1.5])))
        measured = histogram_of(0.3 + 1.5**0.5 * torch.randn(200000, 1))
        a, b = (float(policy.threshold(histogram, 4)) for histogram in (predicted, measured))
        assert a == pytest.approx(b, rel=0.15)


class TestMoreThanFloatsCount:
    def test_sixteen_million_values_and_one_more(self) -> None:
        histogram = histogram_of(torch.ones(2, 1))
        histogram.counts[0, -1] = histogram.total = 2.0**24
        histogram.add(torch.ones(1, 1))
        assert histogram.counts[0, -1] == 2**24 + 1
        assert histogram.total == 2**24 + 1

    @pytest.mark.slow
    def test_a_percentile_of_twenty_million_values_is_exact_to_bin_width(self) -> None:
        generator = torch.Generator().manual_seed(1)
        histogram, parts = Histogram.empty(1, torch.device("cpu")), []
        for _ in range(10):
            parts.append(torch.randn(2_000_000, 1, generator=generator))
            histogram.add(parts[-1])
        ordered = np.sort(torch.cat(parts).clamp_min(0).numpy()[:, 0])
        assert len(ordered) > 2**24
        for percent in (60.0, 99.0, 99.999):
            exact = float(ordered[int(np.ceil(len(ordered) * percent / 100)) - 1])
            found = float(Percentile(percent).threshold(histogram, 4))
            assert abs(found - exact) <= 1.001 * float(histogram.width)


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("policy", [Max(), Percentile(99.0), MinError(), BatchNormStatistics(), *NEW], ids=policy_text)
def test_cuda_finds_the_thresholds_of_the_cpu(policy: MinError) -> None:
    x, net = torch.rand(64, 2, 8, 8), nets.conv_net()
    cpu = calibrate(prepare(net, (2, 8, 8)), policy, 4, x).v_threshold
    cuda = calibrate(prepare(net.cuda(), (2, 8, 8)), policy, 4, x.cuda()).v_threshold
    assert all(torch.allclose(cuda[path].cpu(), cpu[path], rtol=0.01) for path in cpu)


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4, 6)])
def test_the_size_of_a_chunk_makes_no_difference(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = []
    for size in (1, 30, 2**21):
        monkeypatch.setattr(calibrate_histogram, "CHUNK", size)
        histogram = Histogram.empty(3, x.device)
        histogram.add(x[:2], upper=2.0)
        histogram.add(x[2:] * 3, upper=2.0)
        found.append(histogram)
    assert float(found[0].counts.sum()) == float((x > 0).sum())
    assert float(found[0].maximum.max()) == 2.0
    for other in found[1:]:
        assert torch.equal(found[0].counts, other.counts)
        assert torch.equal(found[0].width, other.width)
        assert (found[0].total, other.total) == (x.numel() // 3,) * 2
