"""Calibration: streaming histograms, policies that know T, statistics without data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nets
from histograms import histogram_of
from lmh import PerLayer
from lmh.calibrate import BatchNormStatistics, Max, MinError, Percentile, automatic, calibrate, policy_text
from lmh.calibrate.histogram import BINS
from lmh.calibrate.statistics import Moments, largest_of, predicted_histograms, rectified
from lmh.convert import prepare
from lmh.errors import ArgumentError, CalibrationError
from lmh.qcfs import quantize


class TestHistogram:
    def test_counts_agree_with_numpy(self) -> None:
        x = torch.randn(4000, 3)
        histogram = histogram_of(*x.split(500))
        for channel in range(3):
            values = x[:, channel].numpy()
            edges = np.arange(BINS + 1) * float(histogram.width[channel])
            expected, _ = np.histogram(values[values > 0], edges)
            assert np.abs(np.cumsum(expected) - histogram.counts[channel].cumsum(0).numpy()).max() <= 2

    def test_the_range_doubles_without_losing_a_value(self) -> None:
        histogram = histogram_of(torch.full((10, 1), 0.01), torch.full((5, 1), 3.0), torch.full((2, 1), 1000.0))
        assert histogram.counts.sum() == 17
        assert histogram.counts[0, -1] + histogram.counts[0, BINS // 2 :].sum() >= 2
        assert histogram.maximum == 1000.0

    def test_order_of_batches_hardly_matters(self) -> None:
        x = torch.randn(1000, 2) * torch.tensor([1.0, 50.0])
        forward, backward = histogram_of(*x.split(10)), histogram_of(*x.flip(0).split(10))
        assert torch.equal(forward.maximum, backward.maximum)
        assert forward.total == backward.total == 1000
        for policy in (MinError(), Percentile(99.0)):
            a, b = policy.threshold(forward, 4), policy.threshold(backward, 4)
            assert torch.allclose(a, b, rtol=0.03)

    def test_merging_keeps_every_count(self) -> None:
        histogram = histogram_of(torch.rand(100, 4) * torch.tensor([1.0, 2.0, 4.0, 8.0]))
        merged = histogram.merged()
        assert merged.counts.sum() == histogram.counts.sum()
        assert merged.total == 400
        assert merged.maximum == histogram.maximum.max()

    def test_convolutional_activations_count_every_position(self) -> None:
        assert histogram_of(torch.rand(2, 3, 4, 5)).total == 40


class TestPolicies:
    def test_max_is_exact(self) -> None:
        x = torch.randn(300, 5)
        assert torch.equal(Max().threshold(histogram_of(x[:100], x[100:]), 4), x.amax(0))

    @pytest.mark.parametrize("percent", [50.0, 90.0, 99.0, 99.9, 100.0])
    def test_percentile_is_exact_to_bin_width(self, percent: float) -> None:
        x = torch.randn(20000, 2)
        histogram = histogram_of(*x.split(1000))
        rank = math.ceil(20000 * percent / 100 - 1e-9)
        expected = x.clamp_min(0).sort(0).values[rank - 1]
        difference = (Percentile(percent).threshold(histogram, 4) - expected).abs()
        assert bool((difference <= 1.001 * histogram.width).all())

    @pytest.mark.parametrize("percent", [0, -1, 100.1])
    def test_percentiles_out_of_range_are_refused(self, percent: float) -> None:
        with pytest.raises(ArgumentError, match="above 0 and at most 100"):
            Percentile(percent)

    @pytest.mark.parametrize("timesteps", [1, 2, 4, 16])
    def test_minerror_finds_the_least_error_of_the_true_values(self, timesteps: int) -> None:
        x = torch.randn(20000, 1)
        theta = float(MinError().threshold(histogram_of(x), timesteps))
        rectified_x = x.clamp_min(0)

        def error(value: float) -> float:
            return float(((rectified_x - quantize(rectified_x, torch.tensor(value), timesteps)) ** 2).mean())

        grid = np.linspace(0.05, float(x.max()), 300)
        assert error(theta) <= 1.01 * min(error(value) for value in grid)

    def test_minerror_grows_with_t(self) -> None:
        histogram = histogram_of(torch.randn(20000, 1))
        thetas = [float(MinError().threshold(histogram, timesteps)) for timesteps in (1, 2, 4, 8, 32)]
        assert thetas == sorted(thetas)
        assert thetas[0] < 0.6 * thetas[-1]

    def test_fewer_levels_give_the_threshold_of_a_smaller_t(self) -> None:
        histogram = histogram_of(torch.randn(20000, 1))
        for policy in (MinError, BatchNormStatistics):
            assert torch.equal(policy(0.5, 2.0).threshold(histogram, 16), policy().threshold(histogram, 10))

    def test_the_automatic_policy_is_minerror_with_t_levels_up_to_5(self) -> None:
        histogram = histogram_of(torch.randn(20000, 1))
        chosen = automatic(True)
        assert chosen == MinError(levels_per_step=0.5, base_levels=2.0)
        assert automatic(False) == BatchNormStatistics(levels_per_step=0.5, base_levels=2.0)
        for timesteps, levels in {1: 1, 4: 4, 5: 5, 6: 5, 8: 6, 16: 10}.items():
            assert torch.equal(chosen.threshold(histogram, timesteps), MinError().threshold(histogram, levels))

    @pytest.mark.parametrize("levels", [0.0, -1.0, float("nan"), float("inf")])
    def test_levels_out_of_range_are_refused(self, levels: float) -> None:
        with pytest.raises(ArgumentError, match="finite numbers"):
            MinError(levels)

    def test_policies_name_themselves(self) -> None:
        assert policy_text(Percentile(99.5, PerLayer())) == "Percentile(percent=99.5, per layer)"
        assert policy_text(MinError()) == "MinError(levels_per_step=1, base_levels=0, per channel)"


@pytest.mark.parametrize("policy", [Max(), Percentile(99.0), MinError(), BatchNormStatistics()])
@pytest.mark.parametrize("per_layer", [False, True])
def test_every_policy_gives_positive_thresholds_of_its_granularity(policy: object, per_layer: bool) -> None:
    if per_layer:
        policy = type(policy)(granularity=PerLayer())  # type: ignore[call-arg]
    prepared = prepare(nets.conv_net(), (2, 8, 8))
    calibration = calibrate(prepared, policy, 4, torch.rand(32, 2, 8, 8))  # type: ignore[arg-type]
    shapes = {path: tuple(theta.shape) for path, theta in calibration.v_threshold.items()}
    assert shapes == ({"2": (), "6": ()} if per_layer else {"2": (6,), "6": (8,)})
    assert all(bool((theta > 0).all()) for theta in calibration.v_threshold.values())
    assert all(bool((value == 0.5).all()) for value in calibration.v_init.values())


class TestDeadChannels:
    def test_a_silent_channel_takes_the_median_of_the_others(self) -> None:
        net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
        net[0].weight.data[2] = 0
        net[0].bias.data[2] = -1
        theta = calibrate(prepare(net, (4,)), Max(), 4, torch.rand(64, 4)).v_threshold["1"]
        assert theta[2] == theta[[0, 1, 3, 4]].sort().values[1] or theta[2] > 0

    def test_a_silent_layer_takes_one(self) -> None:
        net = nets.two_layers()
        net[0].weight.data.zero_()
        net[0].bias.data.fill_(-1)
        for policy in (Max(), MinError(granularity=PerLayer())):
            assert bool((calibrate(prepare(net, (4,)), policy, 4, torch.rand(8, 4)).v_threshold["1"] == 1).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_site(bad: float) -> None:
    x = torch.rand(8, 4)
    x[3, 1] = bad
    with pytest.raises(CalibrationError, match=r"^1: .*NaN or infinite"):
        calibrate(prepare(nets.two_layers(), (4,)), Max(), 4, x)


def test_a_policy_that_needs_data_says_so() -> None:
    with pytest.raises(CalibrationError, match=r"Percentile\(percent=99.9, per channel\) needs data.*--data"):
        calibrate(prepare(nets.two_layers(), (4,)), Percentile(), 4)


def test_data_without_a_batch_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no batch"):
        calibrate(prepare(nets.two_layers(), (4,)), Max(), 4, [])


class TestStatistics:
    def test_moments_of_the_rectified_normal(self) -> None:
        mean, variance = torch.tensor([0.5, -1.0, 2.0]).double(), torch.tensor([1.0, 4.0, 0.25]).double()
        sample = (mean + variance.sqrt() * torch.randn(400000, 3).double()).clamp_min(0)
        result = rectified(Moments(mean, variance))
        assert torch.allclose(result.mean, sample.mean(0), atol=0.01)
        assert torch.allclose(result.variance, sample.var(0), rtol=0.03)

    @pytest.mark.parametrize("count", [1, 4, 9])
    def test_moments_of_the_largest_of_k(self, count: int) -> None:
        sample = torch.randn(200000, count).amax(1)
        mean, variance = largest_of(count)
        assert mean == pytest.approx(float(sample.mean()), abs=0.01)
        assert variance == pytest.approx(float(sample.var()), rel=0.03)

    def test_behind_a_batchnorm_the_prediction_is_the_truth(self) -> None:
        net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU()).eval()
        x = torch.randn(50000, 8)
        with torch.no_grad():
            y = net[0](x)
            net[1].running_mean, net[1].running_var = y.mean(0), y.var(0)
            net[1].weight.uniform_(0.5, 2)
            net[1].bias.uniform_(-1, 1)
        prepared = prepare(net, (8,))
        predicted = calibrate(prepared, BatchNormStatistics(), 4).v_threshold["2"]
        measured = calibrate(prepared, MinError(), 4, x).v_threshold["2"]
        assert torch.allclose(predicted, measured, rtol=0.06)

    def test_they_reach_through_add_concat_pool_and_linear(self) -> None:
        class Through(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.na = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)
                self.b, self.nb = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)
                self.conv, self.fc = nn.Conv2d(8, 4, 1), nn.Linear(16, 3)

            def forward(self, x: Tensor) -> Tensor:
                a, b = self.na(self.a(x)), self.nb(self.b(x))
                y = torch.cat([torch.relu(a + b), torch.relu(b)], 1)
                y = torch.relu(self.conv(nn.functional.avg_pool2d(y, 2)))
                return torch.relu(self.fc(y.flatten(1)))

        histograms, unknown = predicted_histograms(prepare(Through(), (1, 4, 4)))
        assert unknown == []
        assert [len(h.width) for h in histograms.values()] == [4, 4, 4, 3]

    def test_without_batchnorm_the_paths_are_named(self) -> None:
        with pytest.raises(CalibrationError, match=r"^1: not predicted by a BatchNorm before it"):
            calibrate(prepare(nets.two_layers(), (4,)), BatchNormStatistics(), 4)
