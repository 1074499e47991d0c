"""Max-pools by type: before the neuron, average, gated; each as exact as it says."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from commands import command, succeed
from lmh import LIF, LMH, PerStep, carry_state, evaluate, per_step, prefixes, sites
from lmh.artifact import read_snn, write_snn
from lmh.calibrate import BatchNormStatistics, Max
from lmh.convert import (
    MAXPOOLS,
    AveragePool,
    BeforeNeuron,
    Conversion,
    EventFrames,
    Gated,
    convert,
    load,
    prepare,
    save,
)
from lmh.convert.export import Project, export_nir, export_onnx, export_pt2
from lmh.convert.maxpool import MaxPool
from lmh.errors import ArtifactError, AuditError, StateError
from lmh.finetune import finetune
from lmh.gate import Accumulate, Increments
from lmh.op_table import Kind
from lmh.ops import kind_of
from lmh.records import Calibration
from lmh.time_axis import TimeAxis
from lmh.torchvision_shim import torchvision
from reference import maxpool_numpy as reference

TYPES = [BeforeNeuron(), AveragePool(), Gated()]
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


def second_layer(pool: nn.Module | None = None) -> nn.Sequential:
    """[N, 1, 8, 8] → [N, 3]; the pool is behind the second activation, whose currents vary in time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), pool or nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3),
    ).eval()  # fmt: skip


def converted(maxpool: MaxPool, timesteps: int = 64, **options: Any) -> tuple[nn.Module, Conversion, Tensor]:
    ann, x = second_layer(), torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ann(x)
    return ann, convert(ann, timesteps, data=x, calibration=Max(), maxpool=maxpool, **options), x


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


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
        before = convert(ann[:5], 32, data=x, calibration=conversion.calibration, neuron=neuron).snn
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
            prepare(ann, (1, 6, 6))
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


class TestConversions:
    def test_the_names_of_the_command_line(self) -> None:
        assert list(MAXPOOLS.values()) == TYPES
        assert list(MAXPOOLS) == ["before", "average", "gated"]

    def test_average_says_that_it_changes_the_function(self) -> None:
        _, conversion, _ = converted(AveragePool(), 4)
        assert (
            "1 max-pools became average pools (4): the network computes another function"
            in (conversion.report.notices[0])
        )
        assert "Fine-tune it." in conversion.report.notices[0]

    def test_a_pool_of_constants_needs_no_gate(self) -> None:
        ann = nn.Sequential(nn.Conv2d(1, 2, 1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
        snn = convert(ann, 4, data=torch.rand(4, 1, 8, 8), maxpool=Gated()).snn
        assert not any(isinstance(module, Accumulate) for module in snn.modules())
        frames = torch.rand(4, 3, 1, 8, 8)
        events = convert(ann, 4, data=[frames], maxpool=Gated(), encoding=EventFrames())
        assert any(isinstance(module, Accumulate) for module in events.snn.modules())
        assert events.report.notices == ()
        plain = convert(ann, 4, data=[frames], encoding=EventFrames())
        assert "currents that vary in time" in plain.report.notices[0]

    def test_a_concat_and_an_activation_with_other_readers(self) -> None:
        class Inception(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1), nn.Conv2d(4, 4, 1)

            def forward(self, x: Tensor) -> Tensor:
                y = torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)
                return (F.max_pool2d(y, 2).flatten(1).sum(1) + self.c(y).flatten(1).sum(1))[:, None]

        ann, x = Inception().eval(), torch.rand(8, 1, 4, 4)
        gate = convert(ann, 128, data=x, calibration=Max(), maxpool=Gated())
        assert len(sites(gate.snn)) == 2  # four where the pool moves before the neurons
        assert torch.allclose(gate.snn(x), ann(x), rtol=0.05, atol=0.1)

    def test_spikes_that_pass_count_as_spikes(self) -> None:
        _, conversion, x = converted(Gated(), 16)
        third = evaluate(conversion.snn, [x]).layers[2]
        steps = per_step(conversion.snn, x)
        assert steps.shape == (16, 32, 3)
        assert third.macs == 0
        assert 0 < third.accumulates < 16 * third.ann_macs
        _, averaged, _ = converted(AveragePool(), 16)
        assert evaluate(averaged.snn, [x]).layers[2].accumulates == 0

    def test_values_of_several_thresholds_do_not(self) -> None:
        _, conversion, x = converted(Gated(), 4, neuron=LMH(granularity=PerStep()))
        assert evaluate(conversion.snn, [x]).layers[2].accumulates == 0

        class Sums(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), nn.Linear(32, 3)

            def forward(self, x: Tensor) -> Tensor:
                y = F.relu(self.a(x))
                z = F.max_pool2d(y + F.relu(self.b(y)), 2)
                return self.c(F.relu(self.b(z)).flatten(1))

        last = evaluate(convert(Sums(), 4, data=x, maxpool=Gated()).snn, [x]).layers
        assert [layer.accumulates > 0 for layer in last] == [False, True, False, False]

    @pytest.mark.parametrize("maxpool", TYPES)
    def test_slices_make_one_run(self, maxpool: MaxPool) -> None:
        _, conversion, x = converted(maxpool, 8)
        snn = conversion.snn
        whole = per_step(snn, x)
        with carry_state(snn):
            slices = [per_step(snn, x, steps=k) for k in (3, 1, 4)]
        assert torch.equal(torch.cat(slices), whole)
        assert torch.equal(per_step(snn, x), whole)

    def test_another_batch_inside_a_block_is_refused_by_the_gate(self) -> None:
        ann = nn.Sequential(nn.Conv2d(1, 2, 1), nn.MaxPool2d(2), nn.ReLU())
        frames = torch.rand(2, 3, 1, 4, 4)
        snn = convert(ann, 2, data=[frames], maxpool=Gated(), encoding=EventFrames()).snn
        with carry_state(snn):
            snn(frames)
            with pytest.raises(StateError, match=r"max-pool's input .*; expected the same. Open a new carry_state"):
                snn(frames[:, :2])

    @pytest.mark.parametrize("maxpool", TYPES)
    def test_save_load_copy_and_pickle(self, maxpool: MaxPool, tmp_path: Path) -> None:
        ann, conversion, x = converted(maxpool, 4)
        expected = conversion.snn(x)
        save(conversion, tmp_path / "a.safetensors")
        again = load(tmp_path / "a.safetensors", source=ann)
        assert torch.equal(again(x), expected)
        assert again.meta["lmh_manifest"]["recipe"]["maxpool"] == {"type": type(maxpool).__name__}
        assert torch.equal(copy.deepcopy(conversion.snn)(x), expected)
        buffer = io.BytesIO()
        torch.save(conversion.snn, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)

    def test_an_older_file_has_its_max_pools_before_the_neurons(self, tmp_path: Path) -> None:
        ann, conversion, x = converted(BeforeNeuron(), 4)
        path = save(conversion, tmp_path / "old.safetensors")
        tensors, manifest = read_snn(path)
        del manifest["recipe"]["maxpool"]
        write_snn(path, tensors, manifest)
        assert torch.equal(load(path, source=ann)(x), conversion.snn(x))

    @pytest.mark.parametrize("maxpool", TYPES)
    def test_training_through_it(self, maxpool: MaxPool) -> None:
        ann, conversion, x = converted(maxpool, 4)
        snn, y = conversion.snn, ann(x).argmax(1)
        snn.train()
        snn(x).square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in snn.parameters())
        history = finetune(snn, [(x, y)] * 4, epochs=4, teacher=ann)
        assert history[-1].loss < history[0].loss

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_to_another_dtype(self, dtype: torch.dtype) -> None:
        _, conversion, x = converted(Gated(), 4)
        out = conversion.snn.to(dtype)(x.to(dtype))
        assert out.dtype == dtype
        assert torch.isfinite(out).all()

    @pytest.mark.device
    @pytest.mark.parametrize("maxpool", TYPES)
    def test_on_meta(self, maxpool: MaxPool) -> None:
        ann, conversion, x = converted(maxpool, 4)
        given_ = {"calibration": conversion.calibration, "maxpool": maxpool}
        snn = convert(ann.to("meta"), 4, example_input=x.to("meta"), **given_).snn
        per_step(snn.train(), x.to("meta")).sum().backward()
        with carry_state(snn.eval()):
            assert snn(x.to("meta")).device.type == snn(x.to("meta")).device.type == "meta"

    @pytest.mark.device
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_on_cuda(self) -> None:
        x = spikes(64, 4, 3, 8, 8)
        time = TimeAxis(64)
        pool = nn.MaxPool2d(3, 2, padding=1)
        assert torch.equal(gated(time, pool)(x.cuda()).cpu(), gated(time, pool)(x))

    def test_exports(self, tmp_path: Path) -> None:
        _, conversion, x = converted(Gated(), 2)
        expected = conversion.snn(x)
        export_pt2(conversion, tmp_path / "a.pt2")
        assert torch.equal(torch.export.load(tmp_path / "a.pt2").module()(x), expected)
        export_onnx(conversion, tmp_path / "a.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
        assert torch.allclose(torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), expected, atol=1e-5)
        with pytest.raises(ArtifactError, match=r"time\.Accumulate: Accumulate has no NIR node"):
            export_nir(conversion, tmp_path / "a.nir", Project())

    @pytest.mark.slow
    def test_torch_compile_gives_the_same(self) -> None:
        _, conversion, x = converted(Gated(), 4)
        snn = conversion.snn.double()
        assert torch.allclose(torch.compile(snn)(x.double()), snn(x.double()), atol=1e-12)


class TestCommand:
    """``lmh-convert --maxpool``."""

    DATA = ("--data", "digits", "--input-size", "1,8,8", "--mean", "0.5", "--std", "0.5", "--calibration-samples", "64",
            "--test-samples", "40", "--json")  # fmt: skip

    @pytest.fixture
    def file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        monkeypatch.chdir(tmp_path)
        torch.manual_seed(0)
        layers = (nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.MaxPool2d(2))
        torch.save(nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 10)).eval(), "net.pt")
        return "net.pt"

    @pytest.mark.parametrize("name", MAXPOOLS)
    def test_the_name_is_the_type(self, file: str, name: str) -> None:
        result = succeed("convert", file, "-T", 4, "--maxpool", name, *self.DATA).result
        snn = load(result["output"], source=file)
        assert snn.meta["lmh_manifest"]["recipe"]["maxpool"]["type"] == type(MAXPOOLS[name]).__name__
        assert any(isinstance(module, Accumulate) for module in snn.modules()) == (name == "gated")
        assert any(isinstance(module, nn.AvgPool2d) for module in snn.modules()) == (name == "average")
        notices = " ".join(result["notices"])
        assert ("--maxpool gated" in notices) == (name == "before")
        assert ("became average pools" in notices) == (name == "average")

    @pytest.mark.parametrize("name", MAXPOOLS)
    def test_a_dry_run_uses_it(self, file: str, name: str) -> None:
        found = succeed("convert", file, "-T", 4, "--maxpool", name, "--dry-run", *self.DATA).result
        fates = {node["path"]: node["fate"] for node in found["fates"]}
        assert fates["4"] == ("averaged" if name == "average" else "unchanged")

    def test_the_advice_of_an_audit_works(self, file: str) -> None:
        layers = (nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AvgPool2d(1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10))
        torch.save(nn.Sequential(*layers).eval(), file)
        call = ("convert", file, "-T", 4, "--dry-run", *self.DATA)
        refused = command(*call)
        assert refused.status == 1
        assert "pass --maxpool gated or average" in refused.result["problems"][0]
        for name in ("gated", "average"):
            succeed(*call, "--maxpool", name)

    def test_help_says_what_each_means(self) -> None:
        shown = " ".join(succeed("convert", "--help").out.split())
        for part in ("[before|average|gated]", "before: the maximum of the currents", "gated: behind them", "average:"):
            assert part in shown
        status, _, err = command("convert", "net.pt", "-T", 4, "--maxpool", "max")
        assert status == 2
        assert "'max' is not one of 'before', 'average', 'gated'" in err


@pytest.mark.slow
def test_squeezenet_needs_the_gate() -> None:
    """Three max-pools behind layers of spikes: before the neurons the answers have nothing to do with the ANN's."""
    torch.manual_seed(0)
    x = F.interpolate(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)), size=64, mode="bilinear")
    ann = torchvision().models.squeezenet1_1(weights=None).eval()
    expected = ann(x)

    def correlation(maxpool: MaxPool) -> float:
        with torch.no_grad():
            got = convert(ann, 64, data=x, maxpool=maxpool).snn(x)
        pair = [(value - value.mean(0)).flatten() for value in (got, expected)]
        return float(torch.corrcoef(torch.stack(pair).detach())[0, 1])

    assert correlation(BeforeNeuron()) < 0.3
    assert correlation(Gated()) > 0.9
