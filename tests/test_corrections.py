"""Corrections: each does what its equation says, in order, the same each time; and what they return can be replayed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
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
from lmh.calibrate.lockstep import Lockstep, input_batches
from lmh.calibrate.simulation import alone, mean_output
from lmh.convert import Conversion, EventFrames, Gated, assemble, convert, load, save
from lmh.errors import ArgumentError, CalibrationError
from lmh.records import Calibration
from lmh.spiking import SpikingSite
from lmh.zoo import Batches

EVERYTHING = [WeightRegression(), BatchNormReestimation(), BiasCorrection(), SpikingMinError(), InitialPotential()]


class Deep(nn.Module):
    """Residual blocks with BatchNorm on [N, 2, 8, 8], random but lively. [N, 3] out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(6))
        self.fc = nn.Linear(8, 3)
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 1.0)
            nn.init.uniform_(norm.bias, -0.3, 0.3)
            nn.init.uniform_(norm.running_var, 0.05, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for index in range(0, 6, 2):
            out = F.relu(self.norms[index](self.convs[index](x)))
            x = F.relu(self.norms[index + 1](self.convs[index + 1](out)) + x)
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def deep() -> Conversion:
    return convert(Deep(), 3, data=torch.rand(32, 2, 8, 8))


def corrected(conversion: Conversion, data: Tensor, *corrections: Correction) -> Conversion:
    calibration = correct(conversion.snn, conversion.prepared, data, corrections, calibration=conversion.calibration)
    return assemble(conversion.prepared, calibration, conversion.recipe)


def output_error(conversion: Conversion, x: Tensor) -> float:
    with torch.no_grad():
        expected = conversion.prepared.model(x)
        return float((conversion.snn(x) - expected).norm() / expected.norm())


def site_errors(conversion: Conversion, x: Tensor) -> list[float]:
    """The relative squared error of every site's mean output."""
    lockstep, errors = Lockstep(conversion.prepared, conversion.snn, input_batches(conversion.snn, x)), []
    with torch.no_grad():
        for node in lockstep.nodes():
            if node.target in sites(conversion.snn):
                got, wanted = torch.cat(lockstep.received(node)), torch.cat(lockstep.expected(node))
                errors.append(float((got - wanted).square().sum() / wanted.square().sum()))
    return errors


class TestBiasCorrection:
    def test_every_layer_ends_at_the_anns_means(self, deep: Conversion) -> None:
        x = torch.rand(24, 2, 8, 8)
        done = corrected(deep, x, BiasCorrection())
        lockstep = Lockstep(done.prepared, done.snn, input_batches(done.snn, x))
        with torch.no_grad():
            for node in lockstep.nodes():
                if node.target in sites(done.snn):
                    current = node.all_input_nodes[0]
                    got, wanted = lockstep.received(current)[0], lockstep.expected(current)[0]
                    assert torch.allclose(got.mean((0, 2, 3)), wanted.mean((0, 2, 3)), atol=1e-5)
            assert torch.allclose(done.snn(x).mean(0), done.prepared.model(x).mean(0), atol=1e-5)

    def test_before_it_they_were_elsewhere(self, deep: Conversion) -> None:
        x = torch.rand(24, 2, 8, 8)
        with torch.no_grad():
            assert not torch.allclose(deep.snn(x).mean(0), deep.prepared.model(x).mean(0), atol=1e-3)

    def test_batches_make_no_difference(self, deep: Conversion) -> None:
        x = torch.rand(24, 2, 8, 8)
        whole = correct(deep.snn, deep.prepared, x, BiasCorrection())
        parts = correct(deep.snn, deep.prepared, [x[:7], (x[7:], "labels")], BiasCorrection())
        assert parts.tensors.keys() == whole.tensors.keys()
        assert all(torch.allclose(parts.tensors[name], whole.tensors[name], atol=1e-5) for name in whole.tensors)
        assert (whole.samples, parts.samples) == (24, 24)

    def test_without_a_bias_a_running_mean_takes_the_shift(self) -> None:
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False), nn.BatchNorm1d(3, affine=False))
        x = torch.rand(64, 4)
        done = corrected(convert(net, 2, data=x), x, BiasCorrection())
        assert set(done.calibration.tensors) == {"3.running_mean"}
        with torch.no_grad():
            assert torch.allclose(done.snn(x).mean(0), done.prepared.model(x).mean(0), atol=1e-5)

    def test_a_layer_without_either_stays(self) -> None:
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))
        x = torch.rand(64, 4)
        assert corrected(convert(net, 2, data=x), x, BiasCorrection()).calibration.tensors == {}


class TestBatchNormReestimation:
    def test_statistics_are_those_of_the_mean_current(self, deep: Conversion) -> None:
        x = torch.rand(24, 2, 8, 8)
        done = corrected(deep, x, BatchNormReestimation())
        assert set(done.calibration.tensors) == {
            f"norms.{index}.running_{name}" for index in range(6) for name in ("mean", "var")
        }
        received: list[Tensor] = []
        done.snn.get_submodule("convs.3").register_forward_hook(lambda _module, _args, output: received.append(output))
        with torch.no_grad():
            done.snn(x)
        current = received[0].unflatten(0, (3, -1)).mean(0).movedim(1, -1).flatten(0, -2)
        norm = done.snn.get_submodule("norms.3")
        assert torch.allclose(norm.running_mean, current.mean(0), atol=1e-5)  # type: ignore[arg-type]
        assert torch.allclose(norm.running_var, current.var(0), rtol=1e-4)  # type: ignore[arg-type]


class TestInitialPotential:
    def test_mean_outputs_are_the_anns_where_v_init_reaches(self, deep: Conversion) -> None:
        x = torch.rand(24, 2, 8, 8)
        done = corrected(deep, x, InitialPotential())
        assert done.calibration.tensors == {}
        lockstep = Lockstep(done.prepared, done.snn, input_batches(done.snn, x))
        reached = 0
        with torch.no_grad():
            for node in lockstep.nodes():
                site = sites(done.snn).get(str(node.target))
                if site is not None:
                    got, wanted = (
                        torch.cat(v).mean((0, 2, 3)) for v in (lockstep.received(node), lockstep.expected(node))
                    )
                    inside = (site.v_init > -0.49) & (site.v_init < 0.99)
                    assert torch.allclose(got[inside], wanted[inside], rtol=0.02, atol=2e-3)
                    assert bool((got[site.v_init > 0.99] <= wanted[site.v_init > 0.99] + 1e-3).all())
                    reached += int(inside.sum())
        assert reached > 30

    def test_one_potential_for_a_layer_stays_one(self) -> None:
        x = torch.rand(32, 2, 8, 8)
        conversion = convert(Deep(), 3, data=x, calibration=MinError(granularity=PerLayer()))
        done = corrected(conversion, x, InitialPotential())
        assert {value.shape for value in done.calibration.v_init.values()} == {torch.Size()}
        assert any(float(value) != 0.5 for value in done.calibration.v_init.values())


class TestSpikingMinError:
    def test_no_site_does_worse_on_what_it_saw(self, deep: Conversion) -> None:
        x = torch.rand(16, 2, 8, 8)
        first = sites(deep.snn)["relu"]
        done = corrected(deep, x, SpikingMinError(rows=16 * 64))
        with torch.no_grad():
            current = deep.snn.stem(x)  # type: ignore[operator]
            target, steps = current.clamp_min(0), current.expand(3, *current.shape)
            before, after = (
                (mean_output(alone(site), steps) - target).square().mean((0, 2, 3))
                for site in (first, sites(done.snn)["relu"])
            )
        assert bool((after <= before * (1 + 1e-5)).all())
        assert float(after.sum()) < float(before.sum())

    def test_a_bad_threshold_is_found_again(self) -> None:
        x = torch.rand(400, 4)
        conversion = convert(nets.two_layers(), 4, data=x)
        wrong = {path: theta * 1.7 for path, theta in conversion.calibration.v_threshold.items()}
        spoilt = assemble(
            conversion.prepared, Calibration("spoilt", 4, 0, wrong, conversion.calibration.v_init), conversion.recipe
        )
        done = corrected(spoilt, x, SpikingMinError())
        assert site_errors(done, x)[0] < 1.1 * site_errors(conversion, x)[0]
        assert site_errors(done, x)[0] < 0.8 * site_errors(spoilt, x)[0]

    def test_it_knows_the_order_of_spikes_where_minerror_does_not(self) -> None:
        """Early excitation and late inhibition: MinError's θ lets the neuron fire, the order of currents says no."""

        class Order(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(1, 2), nn.Linear(2, 1)
                with torch.no_grad():
                    self.a.weight.copy_(torch.tensor([[1.0], [1.0]]))
                    self.a.bias.zero_()
                    self.b.weight.copy_(torch.tensor([[1.0, -1.0]]))
                    self.b.bias.fill_(0.05)

            def forward(self, x: Tensor) -> Tensor:
                return F.relu(self.b(F.relu(self.a(x))))

        x = torch.full((64, 1), 0.25)
        conversion = convert(Order(), 4, data=x)
        theta = {"relu": torch.ones(2), "relu_1": torch.tensor([0.2])}
        early = {"relu": torch.tensor([0.75, 0.0]), "relu_1": torch.tensor([0.5])}
        start = assemble(conversion.prepared, Calibration("by hand", 4, 0, theta, early), conversion.recipe)
        done = corrected(start, x, SpikingMinError())
        assert site_errors(done, x)[1] < 0.5 * site_errors(start, x)[1]

    @pytest.mark.parametrize("granularity", [PerLayer(), PerChannel(), PerStep()])
    def test_coefficients_are_searched_as_the_network_has_them(
        self, granularity: PerLayer | PerChannel | PerStep
    ) -> None:
        x = torch.rand(16, 2, 8, 8)
        conversion = convert(Deep(), 3, data=x, neuron=LMH(granularity=granularity))
        plain = corrected(conversion, x, SpikingMinError())
        leaky = corrected(conversion, x, SpikingMinError(("lambda_s",)))
        changed = {name for name in leaky.calibration.tensors if name.endswith("raw_lambda_s")}
        assert bool(changed) == (not isinstance(granularity, PerStep))
        assert sum(site_errors(leaky, x)) < 1.05 * sum(site_errors(plain, x))

    @pytest.mark.parametrize(
        "options", [{"coefficients": ("lambda",)}, {"rounds": 0}, {"rows": 0}], ids=lambda options: next(iter(options))
    )
    def test_options_out_of_range_are_refused(self, options: dict[str, object]) -> None:
        with pytest.raises(ArgumentError, match="expected"):
            SpikingMinError(**options)  # type: ignore[arg-type]


class TestWeightRegression:
    def test_the_normal_equations_hold(self) -> None:
        """A linear layer behind one of neurons, solved by numpy from the spikes that came."""
        x, ridge, fluctuation, steps = torch.rand(200, 4), 0.05, 0.5, 3
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        conversion = convert(net, steps, data=x)
        done = corrected(conversion, x, WeightRegression(ridge, fluctuation, rounds=0))
        spikes: list[Tensor] = []
        sites(conversion.snn)["1"].register_forward_hook(lambda _module, _args, output: spikes.append(output))
        with torch.no_grad():
            conversion.snn(x)
            y = net(x).double().numpy()
        s = spikes[0].unflatten(0, (steps, -1)).double().numpy()
        mean = s.mean(0)
        centred, wanted = mean - mean.mean(0), y - y.mean(0)
        w0 = net[2].weight.detach().double().numpy().T
        noise = sum((step - mean).T @ (step - mean) for step in s) / s.shape[1] / steps
        # at the end of the network the mean over time runs once, so that nothing fluctuates
        for factor, agrees in ((0.0, True), (fluctuation / steps, False)):
            matrix = centred.T @ centred / len(mean) + factor * noise
            pull = ridge * np.trace(matrix) / 6
            weights = np.linalg.solve(matrix + pull * np.eye(6), centred.T @ wanted / len(mean) + pull * w0)
            close = np.allclose(done.calibration.tensors["2.weight"].numpy().T, weights, atol=1e-4)
            assert close == agrees
        bias = y.mean(0) - mean.mean(0) @ done.calibration.tensors["2.weight"].double().numpy().T
        assert np.allclose(done.calibration.tensors["2.bias"].numpy(), bias, atol=1e-4)

    def test_fluctuations_are_weighed_in_front_of_neurons(self) -> None:
        x, steps = torch.rand(300, 4), 4
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        conversion = convert(net, steps, data=x)
        restless = []
        for fluctuation in (0.0, 4.0):
            snn = corrected(conversion, x, WeightRegression(fluctuation=fluctuation)).snn
            current: list[Tensor] = []
            snn.get_submodule("2").register_forward_hook(
                lambda _module, _args, output, into=current: into.append(output)
            )
            with torch.no_grad():
                snn(x)
            restless.append(float(current[0].unflatten(0, (steps, -1)).var(0).mean()))
        assert restless[1] < 0.8 * restless[0]

    def test_it_beats_biases_alone_on_new_data(self, deep: Conversion) -> None:
        seen, unseen = torch.rand(128, 2, 8, 8), torch.rand(64, 2, 8, 8)
        biases = corrected(deep, seen, BiasCorrection())
        weights = corrected(deep, seen, WeightRegression())
        assert sum(site_errors(weights, unseen)) < sum(site_errors(biases, unseen)) < sum(site_errors(deep, unseen))

    def test_the_first_layer_stays(self, deep: Conversion) -> None:
        done = corrected(deep, torch.rand(64, 2, 8, 8), WeightRegression())
        assert not any(name.startswith("stem") for name in done.calibration.tensors)
        assert {f"convs.{index}.weight" for index in range(6)} <= set(done.calibration.tensors)

    def test_what_a_shortcut_brings_is_made_up_for_behind_the_sum(self, deep: Conversion) -> None:
        x = torch.rand(64, 2, 8, 8)
        with torch.no_grad():
            for value in sites(deep.snn)["relu"].parameters(recurse=False):
                value += 0.4 * (value.shape == sites(deep.snn)["relu"].v_init.shape)
        done = corrected(deep, x, WeightRegression(rounds=0))
        lockstep = Lockstep(done.prepared, done.snn, input_batches(done.snn, x))
        with torch.no_grad():
            for node in lockstep.nodes():
                if node.name in ("relu", "add"):
                    got, wanted = lockstep.received(node)[0], lockstep.expected(node)[0]
                    apart = float((got - wanted).mean((0, 2, 3)).abs().max())
                    assert apart > 0.05 if node.name == "relu" else apart < 0.01

    def test_targets_move_only_where_neurons_answer_the_same(self) -> None:
        from lmh.calibrate.regression import Rows, _System

        wanted = torch.tensor([[-2.0], [-2.0], [-2.0], [0.5], [3.0], [3.0], [3.0]])
        current = torch.tensor([[-3.0], [-1.0], [1.0], [0.7], [0.5], [2.0], [4.0]])
        rows = Rows(torch.rand(1, 7, 2), torch.zeros(1, 2, 2).double(), wanted, torch.zeros(()))
        system = _System(nn.Linear(2, 1), None, rows, 0.01, 0.0)
        moved = system.moved(current, torch.tensor(1.0))
        assert moved.flatten().tolist() == [-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0]

    def test_a_channel_that_batchnorm_silences_stays(self, deep: Conversion) -> None:
        ann = Deep()
        with torch.no_grad():
            ann.norms[2].weight[5] = 0.0  # type: ignore[index]
        x = torch.rand(32, 2, 8, 8)
        done = corrected(convert(ann, 3, data=x), x, WeightRegression())
        weight = done.calibration.tensors["convs.2.weight"]
        assert torch.equal(weight[5], ann.convs[2].weight[5])  # type: ignore[index]
        assert not torch.equal(weight[4], ann.convs[2].weight[4])  # type: ignore[index]
        assert all(bool(torch.isfinite(value).all()) for value in done.calibration.tensors.values())

    def test_dead_inputs_keep_the_system_solvable(self) -> None:
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
        with torch.no_grad():
            net[0].bias[:5] = -9.0
        x = torch.rand(16, 4)
        done = corrected(convert(net, 2, data=x), x, WeightRegression())
        assert all(bool(torch.isfinite(value).all()) for value in done.calibration.tensors.values())

    @pytest.mark.parametrize(
        "options",
        [{"ridge": 0.0}, {"ridge": float("nan")}, {"fluctuation": -1.0}, {"rounds": -1}, {"rows": 0}],
        ids=str,
    )
    def test_options_out_of_range_are_refused(self, options: dict[str, float]) -> None:
        with pytest.raises(ArgumentError, match="defaults suit most networks"):
            WeightRegression(**options)  # type: ignore[arg-type]


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
        assert first.policy.startswith(conversion.calibration.policy + " + WeightRegression(ridge=0.01")
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
        conversion = convert(Deep(), 4, data=[frames], encoding=EventFrames())
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
        done = corrected(deep, x, *EVERYTHING)
        save(done, tmp_path / "snn.safetensors")
        loaded = load(tmp_path / "snn.safetensors", source=Deep())
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
            correct(deep.snn, Deep(), x, BiasCorrection())  # type: ignore[arg-type]

    def test_a_calibration_of_another_network(self, deep: Conversion) -> None:
        x = torch.rand(24, 2, 8, 8)
        calibration = correct(deep.snn, deep.prepared, x, WeightRegression())
        other = convert(nets.Residual(), 3, data=x)
        foreign = Calibration("x", 3, 0, other.calibration.v_threshold, other.calibration.v_init, calibration.tensors)
        with pytest.raises(ArgumentError, match="nothing of that name; expected a calibration of this ANN"):
            assemble(other.prepared, foreign, other.recipe)

    def test_neurons_of_another_granularity(self) -> None:
        x = torch.rand(16, 2, 8, 8)
        fine = convert(Deep(), 3, data=x, neuron=LMH(granularity=PerChannel()))
        calibration = correct(fine.snn, fine.prepared, x, SpikingMinError(("lambda_s",)))
        with pytest.raises(ArgumentError, match=r"raw_lambda_s \[8\] came and the network has \[\].*neuron="):
            convert(Deep(), 3, data=x, calibration=calibration)

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
    x, ann = torch.rand(32, 2, 8, 8), Deep()
    conversion = convert(ann, 3, data=x)
    cpu = correct(conversion.snn, conversion.prepared, x, [WeightRegression(), BiasCorrection()])
    there = convert(ann.cuda(), 3, data=x.cuda())
    cuda = correct(there.snn, there.prepared, x.cuda(), [WeightRegression(), BiasCorrection()])
    assert cpu.tensors.keys() == cuda.tensors.keys()
    assert all(torch.allclose(cuda.tensors[name].cpu(), cpu.tensors[name], atol=5e-2) for name in cpu.tensors)
