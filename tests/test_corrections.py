"""Corrections: each does what its equation says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nets
from lmh import LMH, PerChannel, PerLayer, PerStep, sites
from lmh.calibrate import (
    BatchNormReestimation,
    BiasCorrection,
    Correction,
    InitialPotential,
    MinError,
    SpikingMinError,
    WeightRegression,
    correct,
)
from lmh.calibrate.lockstep import Lockstep, input_batches
from lmh.calibrate.simulation import alone, mean_output
from lmh.convert import Conversion, assemble, convert
from lmh.errors import ArgumentError
from lmh.records import Calibration


def corrected(conversion: Conversion, data: Tensor, *corrections: Correction) -> Conversion:
    calibration = correct(conversion.snn, conversion.prepared, data, corrections, calibration=conversion.calibration)
    return assemble(conversion.prepared, calibration, conversion.recipe)


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
        conversion = convert(nets.Deep(), 3, data=x, calibration=MinError(granularity=PerLayer()))
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
        conversion = convert(nets.Deep(), 3, data=x, neuron=LMH(granularity=granularity))
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
        ann = nets.Deep()
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
