"""Diagnosis: constructed networks where one cause alone is at work, and parts that add up."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nets
from lmh import LMH, PerStep
from lmh.calibrate import Diagnosis, Max, SpikingMinError, diagnose
from lmh.calibrate.diagnose import CAUSES
from lmh.convert import Conversion, EventFrames, assemble, convert
from lmh.errors import ArgumentError, CalibrationError
from lmh.records import Calibration

STEPS = 4


class Chain(nn.Module):
    """Two sites: a = relu(x), and relu(w · a + c). [N, 2] → [N, outputs]."""

    def __init__(self, weight: list[list[float]]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, len(weight))
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(2))
            self.first.bias.zero_()
            self.second.weight.copy_(torch.tensor(weight))
            self.second.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))))


def spiking(net: nn.Module, x: Tensor, theta: list[list[float]], v_init: list[list[float]]) -> Conversion:
    conversion = convert(net, STEPS, data=x, calibration=Max())
    values = [
        {path: torch.tensor(value) for path, value in zip(("relu", "relu_1"), given, strict=True)}
        for given in (theta, v_init)
    ]
    calibration = Calibration("by hand", STEPS, 0, *values)
    return assemble(conversion.prepared, calibration, conversion.recipe)


HALF = [[0.5, 0.5], [0.5, 0.5]]


def shares(diagnosis: Diagnosis, site: int) -> dict[str, float]:
    row = diagnosis.rows[site]
    return {cause: getattr(row, cause) for cause in CAUSES}


def only(cause: str, value: float) -> dict[str, float]:
    return {name: pytest.approx(value if name == cause else 0.0, abs=1e-6) for name in CAUSES}


class TestOneCauseAlone:
    def test_clipping(self) -> None:
        """a = 2 and 1, θ = 1: half of the first is lost; everything else lies on the grid of quarters."""
        x = torch.tensor([[2.0, 1.0]])
        found = spiking(Chain([[0.5, 0.0], [0.0, 0.5]]), x, [[1.0, 1.0], [1.0, 1.0]], HALF)
        assert shares(diagnose(found.prepared, found.snn, x), 0) == only("clipping", 1 / 5)

    def test_rounding(self) -> None:
        """a = 0.3 becomes one spike of four, 0.25; a = 0.5 is exact."""
        x = torch.tensor([[0.3, 0.5]])
        found = spiking(Chain([[1.0, 0.0], [0.0, 1.0]]), x, [[1.0, 1.0], [1.0, 1.0]], HALF)
        assert shares(diagnose(found.prepared, found.snn, x), 0) == only("rounding", 0.05**2 / (0.09 + 0.25))

    def test_inherited(self) -> None:
        """The spiking network's second layer adds a quarter that the ANN's does not."""
        x = torch.tensor([[0.25, 0.5]])
        found = spiking(Chain([[1.0, 0.0], [0.0, 1.0]]), x, [[1.0, 1.0], [1.0, 1.0]], HALF)
        with torch.no_grad():
            found.snn.second.bias += torch.tensor([0.25, 0.0])  # type: ignore[operator, union-attr]
        diagnosis = diagnose(found.prepared, found.snn, x)
        assert shares(diagnosis, 0) == only("timing", 0.0)
        assert shares(diagnosis, 1) == only("inherited", 0.25**2 / (0.0625 + 0.25))

    def test_timing(self) -> None:
        """Excitation comes at the first step and inhibition at the last: a spike that the mean of 0 would not give."""
        x = torch.tensor([[0.25, 0.25]])
        found = spiking(Chain([[1.0, -1.0], [1.0, 0.0]]), x, [[1.0, 1.0], [1.0, 1.0]], [[0.75, 0.0], [0.5, 0.5]])
        diagnosis = diagnose(found.prepared, found.snn, x)
        assert shares(diagnosis, 0) == only("rounding", 0.0)
        assert shares(diagnosis, 1) == only("timing", 0.25**2 / 0.25**2)

    def test_an_exact_network_has_none(self) -> None:
        x = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
        found = spiking(Chain([[1.0, 0.0], [0.0, 1.0]]), x, [[1.0, 1.0], [1.0, 1.0]], HALF)
        assert all(row.total == 0 for row in diagnose(found.prepared, found.snn, x).rows)


CASES = {
    "pools": (nets.conv_net, {}),
    "residual": (nets.Residual, {}),
    "per step": (nets.Residual, {"neuron": LMH(granularity=PerStep())}),
    "maximum": (nets.Residual, {"calibration": Max()}),
}


class TestParts:
    @pytest.mark.parametrize("case", CASES)
    def test_shares_add_up_to_the_error_of_the_site(self, case: str) -> None:
        kind, options = CASES[case]
        ann, x = kind().eval(), torch.rand(20, 2, 8, 8)
        conversion = convert(ann, 3, data=x, **options)
        answers: dict[str, Tensor] = {}
        for row in diagnose(conversion.prepared, conversion.snn, x).rows:
            for model in (conversion.prepared.model, conversion.snn):
                model.get_submodule(row.path).register_forward_hook(
                    lambda _module, _args, output, name=(row.path, model is conversion.snn): answers.update(
                        {name: output}
                    )
                )
        diagnosis = diagnose(conversion.prepared, conversion.snn, x)
        with torch.no_grad():
            conversion.prepared.model(x)
            conversion.snn(x)
        for row in diagnosis.rows:
            a, o = answers[row.path, False], answers[row.path, True].unflatten(0, (3, -1)).mean(0)  # type: ignore[index]
            assert row.total == pytest.approx(float((o - a).square().sum() / a.square().sum()), rel=1e-4, abs=1e-7)
            assert row.inherited + row.clipping + row.rounding + row.timing == pytest.approx(row.total, abs=1e-9)
            assert all(part >= 0 for part in row.alone)

    def test_the_first_site_inherits_and_mistimes_nothing(self) -> None:
        ann, x = nets.conv_net().eval(), torch.rand(20, 2, 8, 8)
        first = diagnose(*(lambda c: (c.prepared, c.snn))(convert(ann, 4, data=x)), x).rows[0]
        assert (first.inherited, first.timing) == (0, 0)
        assert first.clipping > 0
        assert first.rounding > 0

    def test_max_clips_nothing(self) -> None:
        x = torch.rand(40, 4)
        conversion = convert(nets.two_layers(), 4, data=x, calibration=Max())
        (row,) = diagnose(conversion.prepared, conversion.snn, x).rows
        assert row.clipping == pytest.approx(0, abs=1e-6)

    def test_event_frames_that_differ_are_a_matter_of_timing(self) -> None:
        frames = torch.zeros(2, 1, 2)
        frames[0, 0, 0], frames[1, 0, 0], frames[:, 0, 1] = 1.0, -1.0, 1.0
        net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        with torch.no_grad():
            net[0].weight.copy_(torch.eye(2))
            net[0].bias.zero_()
        conversion = convert(net, 2, data=[frames], calibration=Max(), encoding=EventFrames())
        (row,) = diagnose(conversion.prepared, conversion.snn, [frames]).rows
        # the ANN's mean activation is ½, the mean current 0; the neuron spikes once in two steps as it should
        assert row.total == pytest.approx(0, abs=1e-9)
        assert row.timing == pytest.approx(0, abs=1e-9)

    def test_a_silent_site_has_finite_figures(self) -> None:
        net = nets.two_layers()
        with torch.no_grad():
            net[0].weight.zero_()
            net[0].bias.fill_(-1)
        x = torch.rand(8, 4)
        conversion = convert(net, 4, data=x)
        assert diagnose(conversion.prepared, conversion.snn, x).rows[0].total == 0

    def test_the_network_is_left_as_it_was(self) -> None:
        x = torch.rand(8, 2, 8, 8)
        conversion = convert(nets.Residual(), 3, data=x)
        before = conversion.snn(x)
        diagnose(conversion.prepared, conversion.snn, x)
        assert torch.equal(conversion.snn(x), before)

    def test_a_correction_shows(self) -> None:
        from lmh.calibrate import correct

        x = torch.rand(64, 2, 8, 8)
        conversion = convert(nets.conv_net(), 3, data=x)
        calibration = correct(conversion.snn, conversion.prepared, x, SpikingMinError())
        done = assemble(conversion.prepared, calibration, conversion.recipe)
        before, after = (diagnose(found.prepared, found.snn, x).rows[-1].total for found in (conversion, done))
        assert after < before


class TestText:
    def test_lines_are_a_table_of_one_row_for_each_site(self) -> None:
        x = torch.tensor([[0.3, 0.5]])
        found = spiking(Chain([[1.0, 0.0], [0.0, 1.0]]), x, [[1.0, 1.0], [1.0, 1.0]], HALF)
        diagnosis = diagnose(found.prepared, found.snn, x)
        lines = diagnosis.lines()
        assert len(lines) == 3
        assert lines[0].split() == ["site", "error", *CAUSES]
        assert lines[1].split()[:4] == ["relu", "0.7", "%", "0.0"]
        assert lines[1].split()[7:9] == ["0.7", "%"]
        assert len({len(line) for line in lines}) == 1
        assert (diagnosis.timesteps, diagnosis.samples) == (4, 1)

    def test_bad_data_and_a_wrong_network_are_refused(self) -> None:
        x = torch.rand(8, 4)
        conversion = convert(nets.two_layers(), 4, data=x)
        with pytest.raises(CalibrationError, match="NaN or infinite"):
            diagnose(conversion.prepared, conversion.snn, torch.full((2, 4), torch.nan))
        with pytest.raises(CalibrationError, match="at least one sample"):
            diagnose(conversion.prepared, conversion.snn, [])
        other = convert(nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), 4, data=x)
        with pytest.raises(ArgumentError, match=r"Pass conversion\.snn with conversion.prepared"):
            diagnose(conversion.prepared, other.snn, x)
