"""correct: in order, on every kind of network, the same each time; what it returns can be replayed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import nets
from lmh import LMH, QCFS, PerChannel, PerLayer, PerStep, per_step, sites
from lmh.calibrate import (
    BatchNormReestimation,
    BiasCorrection,
    Correction,
    InitialPotential,
    MinError,
    SpikingMinError,
    WeightRegression,
    changes,
    correct,
)
from lmh.calibrate.lockstep import Lockstep
from lmh.convert import Conversion, EventFrames, Gated, assemble, convert, load, save
from lmh.errors import ArgumentError, CalibrationError
from lmh.records import Calibration
from lmh.spiking import SpikingSite
from lmh.zoo import Batches

EVERYTHING = [WeightRegression(), BatchNormReestimation(), BiasCorrection(), SpikingMinError(), InitialPotential()]


def output_error(conversion: Conversion, x: Tensor) -> float:
    with torch.no_grad():
        expected = conversion.prepared.model(x)
        return float((conversion.snn(x) - expected).norm() / expected.norm())


class Grouped(nn.Module):
    """Depthwise, dilated, one-dimensional, transposed and linear layers on other axes, without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 8, 3, padding="same", groups=4, dilation=2, bias=False)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.line = nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")
        self.mix = nn.Linear(256, 12)
        self.fc = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.up(F.relu(self.depthwise(F.relu(self.stem(x))))))
        x = F.relu(self.line(x.flatten(2)))
        return self.fc(F.relu(self.mix(x)).flatten(1))


def qcfs_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), QCFS(4, 2.0), nn.Linear(8, 8), QCFS(4, 1.0, channels=8), nn.Linear(8, 2))


CASES = {
    "residual": (nets.Residual, (2, 8, 8), {}),
    "max-pool": (nets.conv_net, (2, 8, 8), {}),
    "gated max-pool": (nets.conv_net, (2, 8, 8), {"maxpool": Gated()}),
    "groups, axes, ReLU6": (Grouped, (2, 8, 8), {}),
    "qcfs": (qcfs_net, (4,), {}),
    "reused": (nets.Reused, (4,), {}),
    "spellings": (nets.Spellings, (4,), {}),
    "per layer": (nets.conv_net, (2, 8, 8), {"calibration": MinError(granularity=PerLayer())}),
    "per channel": (nets.conv_net, (2, 8, 8), {"neuron": LMH(granularity=PerChannel())}),
    "per step": (nets.Residual, (2, 8, 8), {"neuron": LMH(granularity=PerStep())}),
}


class TestCorrect:
    @pytest.mark.parametrize("timesteps", [1, 3])
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_everything_runs_on_every_kind_of_network_and_is_replayed(self, case: str, timesteps: int) -> None:
        kind, shape, options = CASES[case]
        ann, x = kind().eval(), torch.rand(24, *shape)
        conversion = convert(ann, timesteps, data=x, **options)
        before = {name: value.clone() for name, value in conversion.snn.state_dict().items()}
        source = {name: value.clone() for name, value in ann.state_dict().items()}
        first = correct(conversion.snn, conversion.prepared, x, EVERYTHING, calibration=conversion.calibration)
        again = correct(conversion.snn, conversion.prepared, x, EVERYTHING, calibration=conversion.calibration)
        assert json.dumps(first.to_json()) == json.dumps(again.to_json())
        assert all(torch.equal(value, before[name]) for name, value in conversion.snn.state_dict().items())
        assert all(torch.equal(value, source[name]) for name, value in ann.state_dict().items())
        assert first.timesteps == timesteps
        assert first.policy.startswith(conversion.calibration.policy + " + WeightRegression()")
        replayed = convert(ann, timesteps, data=x, **{**options, "calibration": first}).snn
        read = Calibration.from_json(json.loads(json.dumps(first.to_json())))
        reread = assemble(conversion.prepared, read, conversion.recipe).snn
        with torch.no_grad():
            assert bool(torch.isfinite(replayed(x)).all())
            assert torch.equal(replayed(x), reread(x))
        there = reread.state_dict()
        assert all(torch.equal(value, there[name]) for name, value in replayed.state_dict().items())

    def test_event_frames(self) -> None:
        frames = torch.rand(4, 16, 2, 8, 8)
        conversion = convert(nets.Deep(), 4, data=[frames], encoding=EventFrames())
        calibration = correct(conversion.snn, conversion.prepared, [frames], EVERYTHING)
        done = assemble(conversion.prepared, calibration, conversion.recipe)
        with torch.no_grad():
            target = conversion.prepared.model(frames.flatten(0, 1)).unflatten(0, (4, 16)).mean(0)
            errors = [float((snn(frames) - target).norm()) for snn in (conversion.snn, done.snn)]
        assert errors[1] < 0.5 * errors[0]
        assert calibration.samples == 16

    def test_several_inputs_and_outputs(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.out = nn.Linear(4, 12), nn.Linear(3, 12), nn.Linear(12, 2)

            def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
                hidden = F.relu(self.b(y) + F.relu(self.a(x)))
                return {"out": self.out(hidden), "hidden": hidden}

        x, y = torch.rand(64, 4), torch.rand(64, 3)
        conversion = convert(Two(), 2, data=[(x, y)])
        data = [(x[:40], y[:40], torch.zeros(40)), (x[40:], y[40:], torch.zeros(24))]
        calibration = correct(conversion.snn, conversion.prepared, data, EVERYTHING)
        done = assemble(conversion.prepared, calibration, conversion.recipe)
        with torch.no_grad():
            wanted = conversion.prepared.model(x, y)["out"]
            before, after = (float((snn(x, y)["out"] - wanted).norm()) for snn in (conversion.snn, done.snn))
        assert calibration.samples == 64
        assert after < 0.9 * before
        with pytest.raises(ArgumentError, match=r"correct: data: a batch .*as the network takes 2 inputs"):
            correct(conversion.snn, conversion.prepared, [(x,)], EVERYTHING)

    def test_later_corrections_see_earlier_ones(self, deep: Conversion) -> None:
        x = torch.rand(24, 2, 8, 8)
        seen: list[float] = []

        class Spy(Correction):
            def align(self, lockstep: Lockstep, layer: object) -> None:
                norm = lockstep.snn.get_submodule("norms.5")
                if getattr(layer, "home").target == "norms.5":  # noqa: B009
                    seen.append(float(norm.bias.detach().sum()))  # type: ignore[operator, union-attr]

        correct(deep.snn, deep.prepared, x, [Spy(), BiasCorrection(), Spy()])
        assert len(seen) == 2
        assert seen[0] != seen[1]

    def test_a_correction_of_ones_own_meets_every_layer_and_site_in_order(self, deep: Conversion) -> None:
        met: list[str] = []

        class Diary(Correction):
            def fit(self, lockstep: Lockstep, layer: object) -> None:
                met.append(f"fit {getattr(layer, 'synapse').target}")  # noqa: B009

            def charge(self, lockstep: Lockstep, node: fx.Node) -> None:
                met.append(f"charge {node.target}")

        correct(deep.snn, deep.prepared, torch.rand(2, 2, 8, 8), Diary())
        assert met[:4] == ["fit stem", "charge relu", "fit convs.0", "charge relu_1"]
        assert len(met) == 15

    def test_training_shows_in_changes(self, deep: Conversion) -> None:
        x = torch.rand(8, 2, 8, 8)
        snn = deep.snn.train()
        optimizer = torch.optim.SGD(snn.parameters(), lr=0.05)
        snn(x).square().sum().backward()
        optimizer.step()
        snn.eval()
        found = changes(snn, deep.prepared, "trained", 8)
        again = assemble(deep.prepared, found, deep.recipe).snn
        assert "norms.0.running_mean" in found.tensors
        assert any("raw_lambda_d" in name for name in found.tensors)
        with torch.no_grad():
            assert torch.equal(again(x), snn(x))

    def test_nothing_changed_is_an_empty_mapping(self, deep: Conversion) -> None:
        found = changes(deep.snn, deep.prepared, "none", 0)
        assert found.tensors == {}
        assert "tensors" not in found.to_json()

    def test_files_hold_what_was_corrected(self, deep: Conversion, tmp_path: Path) -> None:
        x = torch.rand(24, 2, 8, 8)
        calibration = correct(deep.snn, deep.prepared, x, EVERYTHING, calibration=deep.calibration)
        done = assemble(deep.prepared, calibration, deep.recipe)
        save(done, tmp_path / "snn.safetensors")
        loaded = load(tmp_path / "snn.safetensors", source=nets.Deep())
        with torch.no_grad():
            assert torch.equal(loaded(x), done.snn(x))
            assert torch.equal(per_step(loaded, x), per_step(done.snn, x))

    def test_the_digits_network_gains_at_two_steps(
        self, digits_ann: nn.Module, digits_calibration: Batches, digits_test: Batches
    ) -> None:
        conversion = convert(digits_ann, 2, data=digits_calibration)
        calibration = correct(
            conversion.snn, conversion.prepared, digits_calibration, [WeightRegression(), SpikingMinError()]
        )
        done = assemble(conversion.prepared, calibration, conversion.recipe)
        x = torch.cat([x for x, _ in digits_test])
        assert output_error(done, x) < 0.85 * output_error(conversion, x)

    def test_a_carried_state_does_no_harm(self, deep: Conversion) -> None:
        from lmh import carry_state

        x = torch.rand(6, 2, 8, 8)
        outside = correct(deep.snn, deep.prepared, x, SpikingMinError())
        with carry_state(deep.snn):
            deep.snn(x[:2])
            inside = correct(deep.snn, deep.prepared, x, SpikingMinError())
        assert json.dumps(outside.to_json()) == json.dumps(inside.to_json())


class TestRefusals:
    def test_what_is_no_correction(self, deep: Conversion) -> None:
        for bad in ("bias", [MinError()], []):
            with pytest.raises(ArgumentError, match=r"Pass \[WeightRegression\(\), SpikingMinError\(\)\]"):
                correct(deep.snn, deep.prepared, torch.rand(2, 2, 8, 8), bad)  # type: ignore[arg-type]

    def test_a_conversion_in_the_place_of_its_parts(self, deep: Conversion) -> None:
        x = torch.rand(2, 2, 8, 8)
        with pytest.raises(ArgumentError, match=r"correct: snn is a Conversion; .* Pass conversion\.snn"):
            correct(deep, deep.prepared, x, BiasCorrection())  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match=r"correct: prepared is a Deep; .* Pass conversion\.prepared"):
            correct(deep.snn, nets.Deep(), x, BiasCorrection())  # type: ignore[arg-type]

    def test_a_calibration_of_another_network(self, deep: Conversion) -> None:
        x = torch.rand(24, 2, 8, 8)
        calibration = correct(deep.snn, deep.prepared, x, WeightRegression())
        other = convert(nets.Residual(), 3, data=x)
        foreign = Calibration("x", 3, 0, other.calibration.v_threshold, other.calibration.v_init, calibration.tensors)
        with pytest.raises(ArgumentError, match="nothing of that name; expected a calibration of this ANN"):
            assemble(other.prepared, foreign, other.recipe)

    def test_neurons_of_another_granularity(self) -> None:
        x = torch.rand(16, 2, 8, 8)
        fine = convert(nets.Deep(), 3, data=x, neuron=LMH(granularity=PerChannel()))
        calibration = correct(fine.snn, fine.prepared, x, SpikingMinError(("lambda_s",)))
        with pytest.raises(ArgumentError, match=r"raw_lambda_s \[8\] came and the network has \[\].*neuron="):
            convert(nets.Deep(), 3, data=x, calibration=calibration)

    def test_currents_that_are_not_finite_name_the_site(self, deep: Conversion) -> None:
        site: SpikingSite = sites(deep.snn)["relu"]
        with torch.no_grad():
            deep.snn.get_submodule("norms.0").bias.fill_(float("nan"))  # type: ignore[operator, union-attr]
        assert site is not None
        with pytest.raises(CalibrationError, match=r"^relu_1: the current has NaN or infinite values"):
            correct(deep.snn, deep.prepared, torch.rand(4, 2, 8, 8), SpikingMinError())


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_corrects_as_the_cpu_does() -> None:
    x, ann = torch.rand(32, 2, 8, 8), nets.Deep()
    conversion = convert(ann, 3, data=x)
    cpu = correct(conversion.snn, conversion.prepared, x, [WeightRegression(), BiasCorrection()])
    there = convert(ann.cuda(), 3, data=x.cuda())
    cuda = correct(there.snn, there.prepared, x.cuda(), [WeightRegression(), BiasCorrection()])
    assert cpu.tensors.keys() == cuda.tensors.keys()
    assert all(torch.allclose(cuda.tensors[name].cpu(), cpu.tensors[name], atol=5e-2) for name in cpu.tensors)
