"""Max-pools by type: before the neuron, average, gated; each as exact as it says."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmh import LIF, LMH, evaluate, prefixes, sites
from lmh.calibrate import BatchNormStatistics, Max
from lmh.convert import (
    AveragePool,
    BeforeNeuron,
    Gated,
    convert,
    prepare,
)
from lmh.convert.maxpool import MaxPool
from lmh.errors import AuditError
from lmh.op_table import Kind
from lmh.ops import kind_of
from lmh.records import Calibration
from maxpool_nets import converted, second_layer
from reference import maxpool_numpy as reference

TYPES = [BeforeNeuron(), AveragePool(), Gated()]


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


class TestExactness:
    def test_before_the_neuron_is_exact_for_constant_currents(self) -> None:
        pool, x = nn.MaxPool2d(2), torch.randn(16, 3, 8, 8)
        theta = Calibration("by hand", 8, 0, {"0": torch.tensor(1.0)}, {"0": torch.tensor(0.5)})
        for maxpool in (BeforeNeuron(), Gated()):
            given_ = {"example_input": x, "calibration": theta, "maxpool": maxpool}
            moved = convert(nn.Sequential(nn.ReLU(), pool), 8, **given_).snn
            plain = convert(nn.Sequential(nn.ReLU()), 8, **given_).snn
            assert torch.equal(moved(x), pool(plain(x)))

    @pytest.mark.parametrize("neuron", [LMH(), LMH(LIF(0.5))])
    def test_gated_is_the_maximum_of_the_rates_at_every_t_for_varying_currents(self, neuron: LMH) -> None:
        ann, conversion, x = converted(Gated(), 32, neuron=neuron)
        cut = convert(ann[:4], 32, data=x, calibration=conversion.calibration, neuron=neuron).snn
        whole = convert(ann[:5], 32, data=x, calibration=conversion.calibration, neuron=neuron, maxpool=Gated()).snn
        rates = prefixes(cut, x)
        expected = F.max_pool2d(rates.flatten(0, 1), 2).unflatten(0, (32, -1))
        assert torch.allclose(prefixes(whole, x), expected, atol=1e-5)
        settings = {"calibration": conversion.calibration, "neuron": neuron, "maxpool": BeforeNeuron()}
        before = convert(ann[:5], 32, data=x, **settings).snn
        assert not torch.allclose(before(x), expected[-1], atol=1e-2)

    def test_the_error_of_gated_falls_with_t_and_that_of_before_does_not(self) -> None:
        def errors(maxpool: MaxPool) -> list[float]:
            found = []
            for timesteps in (16, 64, 256):
                ann, conversion, x = converted(maxpool, timesteps)
                found.append(relative(conversion.snn(x), ann(x)))
            return found

        before, gate = errors(BeforeNeuron()), errors(Gated())
        assert min(before) > 0.1
        assert gate[0] < 0.05
        assert gate[1] < 0.4 * gate[0]
        assert gate[2] < 0.4 * gate[1]

    def test_average_is_the_average_of_the_rates(self) -> None:
        x = torch.randint(-16, 32, (8, 3, 9, 9)) / 16.0
        theta = Calibration("by hand", 8, 0, {"0": torch.tensor(1.0)}, {"0": torch.tensor(0.5)})
        pool = nn.MaxPool2d(3, stride=2, padding=1)
        snn = convert(nn.Sequential(nn.ReLU(), pool), 8, example_input=x, calibration=theta, maxpool=AveragePool()).snn
        rates = convert(nn.Sequential(nn.ReLU()), 8, example_input=x, calibration=theta).snn(x)
        expected = reference.pooled(
            rates.numpy(force=True)[None], [reference.places(9, 3, 2, 1)] * 2, reference.average
        )
        assert np.allclose(snn(x).numpy(force=True), expected[0], atol=1e-6)

    def test_average_falls_to_the_ann_with_average_pools(self) -> None:
        ann, conversion, x = converted(AveragePool(), 256)
        twin = copy.deepcopy(ann)
        twin[4] = nn.AvgPool2d(2)
        assert relative(conversion.snn(x), twin(x)) < 0.01
        assert relative(conversion.snn(x), ann(x)) > 0.05


class Spelled(nn.Module):
    """A max-pool in one of its spellings, behind an activation."""

    def __init__(self, pool: Callable[[Tensor], Tensor], dims: int) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.conv, self.second, self.pool = conv(1, 3, 1), conv(3, 3, 1), pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(F.relu(self.second(F.relu(self.conv(x)))))


SPELLINGS: dict[str, tuple[int, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "module 1d": (1, nn.MaxPool1d(2), nn.AvgPool1d(2)),
    "module 2d, padded": (
        2, nn.MaxPool2d(3, 2, padding=1), nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
    ),
    "module 2d, rounded up": (2, nn.MaxPool2d(2, 3, ceil_mode=True), nn.AvgPool2d(2, 3, ceil_mode=True)),
    "module 3d": (3, nn.MaxPool3d(2), nn.AvgPool3d(2)),
    "adaptive module": (2, nn.AdaptiveMaxPool2d((2, 3)), nn.AdaptiveAvgPool2d((2, 3))),
    "F.max_pool1d": (1, lambda x: F.max_pool1d(x, 3, 1, 1), lambda x: F.avg_pool1d(x, 3, 1, 1, False, False)),
    "F.max_pool2d": (2, lambda x: F.max_pool2d(x, kernel_size=2), lambda x: F.avg_pool2d(x, 2)),
    "F.max_pool3d": (3, lambda x: F.max_pool3d(x, 2, stride=1), lambda x: F.avg_pool3d(x, 2, 1)),
    "torch.max_pool2d": (2, lambda x: torch.max_pool2d(x, 2), lambda x: F.avg_pool2d(x, 2)),
    "adaptive function": (2, lambda x: F.adaptive_max_pool2d(x, 1), lambda x: F.adaptive_avg_pool2d(x, 1)),
    "the whole image": (2, lambda x: F.max_pool2d(x, x.size()[2:]), lambda x: x.mean((2, 3), keepdim=True)),
}  # fmt: skip


class TestSpellings:
    @pytest.mark.parametrize("name", SPELLINGS)
    def test_average(self, name: str) -> None:
        dims, maximum, average = SPELLINGS[name]
        torch.manual_seed(0)
        ann = Spelled(maximum, dims).eval()
        x = torch.rand(4, 1, *[6] * dims)
        prepared = prepare(ann, x.shape[1:], maxpool=AveragePool())
        twin = Spelled(average, dims).eval()
        twin.load_state_dict(ann.state_dict())
        assert torch.allclose(prepared.model(x), twin(x), atol=1e-6)
        assert not any(kind_of(node) is Kind.MAXPOOL for node in prepared.model.graph.nodes)
        assert [fate.fate for fate in prepared.fates].count("averaged") == 1

    @pytest.mark.parametrize("name", SPELLINGS)
    def test_gated(self, name: str) -> None:
        dims, maximum, _ = SPELLINGS[name]
        torch.manual_seed(0)
        ann = Spelled(maximum, dims).eval()
        x = torch.rand(4, 1, *[6] * dims)
        conversion = convert(ann, 256, data=x, calibration=Max(), maxpool=Gated())
        assert len(sites(conversion.snn)) == 2
        assert relative(conversion.snn(x), ann(x)) < 0.02
        assert conversion.report.notices == ()

    def test_a_pool_called_twice_is_averaged_twice(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.pool = nn.Conv2d(1, 1, 1), nn.MaxPool2d(2)

            def forward(self, x: Tensor) -> Tensor:
                return self.pool(F.relu(self.conv(self.pool(F.relu(x)))))

        ann, x = Twice().eval(), torch.rand(4, 1, 8, 8)
        twin = copy.deepcopy(ann)
        twin.pool = nn.AvgPool2d(2)
        assert torch.allclose(prepare(ann, (1, 8, 8), maxpool=AveragePool()).model(x), twin(x), atol=1e-6)

    @pytest.mark.parametrize("maxpool", TYPES)
    def test_windows_of_one_value_only_leave_values_out(self, maxpool: MaxPool) -> None:
        """As at the top of a feature pyramid: F.max_pool2d(x, 1, 2)."""
        ann, x = second_layer(nn.MaxPool2d(1, 2)), torch.rand(16, 1, 8, 8)
        ann(x)
        conversion = convert(ann, 64, data=x, calibration=Max(), maxpool=maxpool)
        assert conversion.report.notices == ()
        assert relative(conversion.snn(x), ann(x)) < 0.05
        assert evaluate(conversion.snn, [x]).layers[2].macs == 0
        functional = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), Spelled(lambda y: F.max_pool2d(y, 1, 2), 2))
        functional[2].conv = nn.Conv2d(2, 3, 1)
        assert convert(functional, 4, example_input=x, calibration=BatchNormStatistics()).snn(x).shape == (16, 3, 4, 4)


class TestWhatIsRefused:
    def test_dilated_windows_cannot_be_averaged(self) -> None:
        for pool in (nn.MaxPool2d(2, dilation=2), lambda x: F.max_pool2d(x, 2, dilation=(1, 2))):
            ann = Spelled(pool, 2)
            with pytest.raises(
                AuditError,
                match=r"max-pool with dilation .*2\)?, and .* Pass --maxpool gated or before \(maxpool=Gated\(\)",
            ):
                prepare(ann, (1, 6, 6), maxpool=AveragePool())

    @pytest.mark.parametrize("maxpool", TYPES)
    def test_indices_are_refused(self, maxpool: MaxPool) -> None:
        for pool in (
            nn.MaxPool2d(2, return_indices=True),
            nn.MaxPool2d(1, return_indices=True),
            nn.AdaptiveMaxPool2d(2, return_indices=True),
        ):
            ann = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), pool)
            with pytest.raises(AuditError, match="2: max-pool with return_indices"):
                prepare(ann, (1, 6, 6), maxpool=maxpool)

    def test_sums_of_spikes_are_refused_before_the_neuron_and_gated_exactly(self) -> None:
        class Late(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 3, 1), nn.Conv2d(3, 3, 1)

            def forward(self, x: Tensor) -> Tensor:
                y = F.relu(self.a(x))
                return F.max_pool2d(y + F.relu(self.c(y)), 2)

        ann, x = Late().eval(), torch.rand(8, 1, 6, 6)
        with pytest.raises(AuditError, match=r"a max-pool reads the spikes of .*maxpool=Gated\(\) or AveragePool\(\)"):
            prepare(ann, (1, 6, 6), maxpool=BeforeNeuron())
        conversion = convert(ann, 256, data=x, calibration=Max(), maxpool=Gated())
        assert relative(conversion.snn(x), ann(x)) < 0.02
        assert convert(ann, 4, data=x, maxpool=AveragePool()).snn(x).shape == (8, 3, 3, 3)

    def test_a_pool_of_currents_is_gated_as_well(self) -> None:
        """conv, pool, relu: the maximum of currents that vary in time."""
        torch.manual_seed(0)
        ann = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
            nn.Flatten(), nn.Linear(96, 3),
        ).eval()  # fmt: skip
        x = torch.rand(32, 1, 8, 8)
        before, gate = (convert(ann, 256, data=x, calibration=Max(), maxpool=m) for m in (BeforeNeuron(), Gated()))
        assert "1 max-pools take the maximum of currents that vary in time (3)" in before.report.notices[0]
        assert "maxpool=Gated()" in before.report.notices[0]
        assert gate.report.notices == ()
        assert relative(gate.snn(x), ann(x)) < 0.3 * relative(before.snn(x), ann(x))
