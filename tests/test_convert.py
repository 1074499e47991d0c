"""Conversion: every spelling becomes a site, the ANN's function is kept, the caller's model is untouched."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nets
from lmh import LIF, LMH, QCFS, PerChannel, PerLayer, PerStep, evaluate, sites, zoo
from lmh.calibrate import Max, automatic, calibrate
from lmh.convert import BeforeNeuron, as_neuron, assemble, convert, keep, prepare
from lmh.errors import ArgumentError, AuditError, CalibrationError
from lmh.records import Calibration


def centred_cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float(F.cosine_similarity((a - a.mean(0)).flatten(), (b - b.mean(0)).flatten(), dim=0))


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (nets.two_layers, (4,)),
        (nets.conv_net, (2, 8, 8)),
        (nets.Spellings, (4,)),
        (nets.Reused, (4,)),
        (nets.Dropped, (4,)),
        (nets.Residual, (2, 8, 8)),
    ],
)
def test_the_spiking_network_approaches_the_ann_as_t_grows(net: type[nn.Module], shape: tuple[int, ...]) -> None:
    ann = net().eval()
    x = torch.rand(64, *shape)
    with torch.no_grad():
        expected = ann(x.clone())
        errors = [
            float((convert(ann, timesteps, data=x, calibration=Max()).snn(x) - expected).abs().mean())
            for timesteps in (4, 32, 256)
        ]
    scale = float(expected.abs().mean())
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.03 * scale


def test_nine_spellings_give_nine_sites() -> None:
    conversion = convert(nets.Spellings(), 4, data=torch.rand(8, 4))
    assert len(sites(conversion.snn)) == 9
    assert len(conversion.report.nodes()["converted"]) == 9


def test_a_reused_module_gives_one_site_per_call() -> None:
    assert list(sites(convert(nets.Reused(), 4, data=torch.rand(8, 4)).snn)) == ["relu", "relu_1", "relu_2"]


def test_in_place_activations_with_dropped_results_are_kept() -> None:
    ann = nets.Dropped().eval()
    x = torch.randn(16, 4)
    prepared = prepare(ann, (4,))
    assert len(prepared.spiking) == 3
    assert torch.equal(prepared.model(x.clone()), ann(x.clone()))


def test_an_in_place_activation_on_a_view_that_is_read_again_is_refused() -> None:
    class OnView(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y.view(-1, 2, 2).relu_()
            return y + 1

    with pytest.raises(AuditError, match="view"):
        prepare(OnView(), (4,))


def test_the_callers_model_is_not_changed() -> None:
    ann = nets.conv_net().train()
    before = copy.deepcopy(ann.state_dict())
    modules = [type(module) for module in ann.modules()]
    convert(ann, 4, data=torch.rand(8, 2, 8, 8))
    assert all(torch.equal(before[key], value) for key, value in ann.state_dict().items())
    assert [type(module) for module in ann.modules()] == modules
    assert all(module.training for module in ann.modules())


def test_parameter_names_of_the_ann_survive(digits_ann: nn.Module) -> None:
    snn = convert(digits_ann, 4, example_input=torch.zeros(1, 1, 8, 8)).snn
    assert digits_ann.state_dict().keys() <= snn.state_dict().keys()


def test_site_paths_are_stable_dotted_paths(digits_ann: nn.Module) -> None:
    snn = convert(digits_ann, 4, example_input=torch.zeros(1, 1, 8, 8)).snn
    assert list(sites(snn)) == ["stem.2", "block.relu1", "block.relu2", "down.2"]


def test_an_in_place_dropout_is_no_obstacle() -> None:
    ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5, inplace=True), nn.Linear(8, 2)).eval()
    x = torch.rand(8, 4)
    snn = convert(ann, 64, data=x, calibration=Max()).snn
    assert torch.allclose(snn(x), ann(x), atol=0.05)


def test_functional_dropout_wakes_up_in_train_mode() -> None:
    class Functional(nn.Module):
        def __init__(self, aware: bool) -> None:
            super().__init__()
            self.a, self.b, self.aware = nn.Linear(4, 64), nn.Linear(64, 2), aware

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            x = F.dropout(x, 0.5, training=self.training) if self.aware else F.dropout(x)
            return self.b(x)

    x = torch.rand(8, 4)
    snn = convert(Functional(True), 4, data=x).snn
    assert torch.equal(snn(x), snn(x))
    assert not torch.equal(snn.train()(x), snn(x))
    with pytest.raises(AuditError, match=r"training=self\.training"):
        convert(Functional(False), 4, data=x)


def test_relu6_keeps_its_ceiling() -> None:
    ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU6(), nn.Linear(8, 8), nn.Hardtanh(0, 2), nn.Linear(8, 2)).eval()
    nn.init.constant_(ann[0].bias, 5.5)
    x = torch.rand(64, 4) * 4
    snn = convert(ann, 128, data=x, calibration=Max()).snn
    assert float(sites(snn)["1"].v_threshold.detach().max()) <= 6.0
    assert float(sites(snn)["3"].v_threshold.detach().max()) <= 2.0
    assert float((snn(x) - ann(x)).detach().abs().max()) < 0.1
    with pytest.raises(AuditError, match=r"^1 place.*\n.*1: Hardtanh from -1"):
        convert(nn.Sequential(nn.Linear(4, 8), nn.Hardtanh()), 4, data=x)


class Gelus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.b(self.act(self.a(x))))
        return (y * torch.relu(y)).cumsum(1)


def test_the_audit_lists_every_problem_at_once() -> None:
    with pytest.raises(AuditError) as caught:
        prepare(Gelus(), (4,))
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert "act: no rule for torch.nn.GELU (supported: ReLU, QCFS, ReLU6, Hardtanh)" in text
    assert "SiLU" in text
    assert "product of two signals" in text
    assert "cumsum" in text


def test_a_users_rule_makes_a_refused_activation_convert() -> None:
    ann = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 2))
    x = torch.rand(8, 4)
    with pytest.raises(AuditError):
        convert(ann, 4, data=x)
    conversion = convert(ann, 4, data=x, rules={nn.GELU: as_neuron, nn.SiLU: keep})
    assert conversion.report.nodes() == {"converted": ["1"], "kept": ["3"], "refused": []}
    assert "stay analog" in conversion.report.notices[-1]
    assert conversion.snn(x).shape == (8, 2)


def test_rules_that_are_no_rules_are_refused() -> None:
    with pytest.raises(ArgumentError, match="expected a module type and a function"):
        convert(nets.two_layers(), 4, data=torch.rand(8, 4), rules={"ReLU": as_neuron})  # type: ignore[dict-item]


def test_a_network_without_activations_is_refused() -> None:
    with pytest.raises(AuditError, match="no activation"):
        convert(nn.Sequential(nn.Linear(4, 2)), 4, data=torch.rand(8, 4))


def test_control_flow_on_values_is_refused_with_the_line() -> None:
    class Flow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x) if x.sum() > 0 else x

    with pytest.raises(AuditError, match=r"test_convert.py:\d+.*x.sum\(\) > 0"):
        convert(Flow(), 4, data=torch.rand(8, 4))


def test_a_graph_that_mixes_the_batch_is_refused_by_name() -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x).reshape(-1, 2)

    with pytest.raises(AuditError, match=r"reshape.*batch on axis 0"):
        prepare(Mixed(), (4,))


def test_a_shape_computed_from_the_batch_size_is_refused_by_name() -> None:
    class Computed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            n = x.size(0) * 1
            y = torch.relu(x)
            return torch.relu(y.view(n, 2, 2).flatten(1))

    assert convert(Computed(), 4, data=torch.rand(8, 4)).snn(torch.rand(5, 4)).shape == (5, 4)

    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            n = x.size(0) * 2
            y = torch.relu(x)
            return torch.relu(y.view(n, 2).reshape(-1, 4))

    with pytest.raises(AuditError, match="view"):
        convert(Doubled(), 4, data=torch.rand(8, 4))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_of_every_dimension_convert(dims: int) -> None:
    conv, norm = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1], (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1]
    ann = nn.Sequential(conv(1, 4, 3, padding=1), norm(4), nn.ReLU(), pool(2), conv(4, 4, 3, padding=1), nn.ReLU(),
                        nn.Flatten(), nn.Linear(4 * 2**dims, 2)).eval()  # fmt: skip
    x = torch.rand(32, 1, *[4] * dims)
    snn = convert(ann, 128, data=x, calibration=Max()).snn
    assert centred_cosine(snn(x), ann(x)) > 0.98


class TestMaxPool:
    def test_it_moves_before_the_neuron(self) -> None:
        ann = nets.conv_net().eval()
        prepared = prepare(ann, (2, 8, 8))
        order = [str(node.target) for node in prepared.model.graph.nodes]
        assert order.index("3") < order.index("2")

    def test_it_equals_the_maximum_of_the_rates_for_constant_currents(self) -> None:
        pool, relu = nn.MaxPool2d(2), nn.ReLU()
        x = torch.randn(16, 3, 8, 8)
        theta = Calibration("by hand", 8, 0, {"0": torch.tensor(1.0)}, {"0": torch.tensor(0.5)})
        moved = convert(nn.Sequential(relu, pool), 8, example_input=x, calibration=theta).snn
        plain = convert(nn.Sequential(relu), 8, example_input=x, calibration=theta).snn
        assert torch.equal(moved(x), pool(plain(x)))

    def test_an_activation_with_other_readers_keeps_its_own_site(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.relu = nn.Conv2d(1, 2, 1), nn.ReLU()

            def forward(self, x: Tensor) -> Tensor:
                y = self.relu(self.conv(x))
                return F.max_pool2d(y, 2).flatten(1).sum(1) + y.flatten(1).sum(1)

        ann = Two().eval()
        x = torch.rand(8, 1, 4, 4)
        snn = convert(ann, 64, data=x, calibration=Max()).snn
        assert set(sites(snn)) == {"relu", "relu_1"}
        assert torch.allclose(snn(x), ann(x), rtol=0.05)

    def test_behind_a_concat_every_branch_is_pooled(self) -> None:
        class Concat(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 3, 1)

            def forward(self, x: Tensor) -> Tensor:
                return F.max_pool2d(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1), 2).flatten(1)

        ann = Concat().eval()
        x = torch.rand(8, 1, 4, 4)
        snn = convert(ann, 64, data=x, calibration=Max()).snn
        assert len(sites(snn)) == 2
        assert float((snn(x) - ann(x)).detach().abs().max()) < 0.05

    def test_on_sums_of_spikes_it_is_refused_by_name(self) -> None:
        class Late(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return F.max_pool2d(F.relu(x) + F.relu(-x), 2)

        with pytest.raises(AuditError, match="max_pool2d: a max-pool reads the spikes of relu"):
            prepare(Late(), (1, 4, 4), maxpool=BeforeNeuron())


class TestQCFS:
    def test_it_hands_over_its_threshold(self) -> None:
        ann = nn.Sequential(nn.Conv2d(1, 3, 1), QCFS(4, 2.0, channels=3), nn.Flatten(), nn.Linear(12, 2))
        ann[1].raw_threshold.data = torch.tensor([0.1, 0.0, -0.2])
        snn = convert(ann, 4, example_input=torch.zeros(1, 1, 2, 2)).snn
        assert torch.equal(sites(snn)["1"].v_threshold, ann[1].v_threshold)

    @pytest.mark.parametrize("timesteps", [1, 2, 4, 8])
    def test_with_l_equal_t_the_first_site_is_exact(self, timesteps: int) -> None:
        ann = nn.Sequential(QCFS(timesteps, 2.0))
        x = torch.randint(-64, 96, (64, 5)) / 32.0
        snn = convert(ann, timesteps, example_input=x).snn
        assert torch.equal(snn(x), ann(x))


def test_calibration_can_be_replayed_and_saved_as_json() -> None:
    ann, x = nets.conv_net(), torch.rand(16, 2, 8, 8)
    first = convert(ann, 4, data=x)
    again = Calibration.from_json(first.calibration.to_json())
    second = convert(ann, 4, example_input=x, calibration=again)
    assert torch.equal(first.snn(x), second.snn(x))
    assert again.to_json() == first.calibration.to_json()


def test_a_calibration_of_another_network_is_refused() -> None:
    first = convert(nets.two_layers(), 4, data=torch.rand(8, 4))
    prepared = prepare(nets.conv_net(), (2, 8, 8))
    with pytest.raises(ArgumentError, match="no threshold for 2, 6"):
        assemble(prepared, first.calibration, first.recipe)


def test_prepare_calibrate_and_assemble_are_what_convert_does() -> None:
    ann, x = nets.conv_net(), torch.rand(16, 2, 8, 8)
    whole = convert(ann, 4, data=x)
    parts = assemble(prepare(ann, (2, 8, 8)), calibrate(prepare(ann, (2, 8, 8)), automatic(True), 4, x), whole.recipe)
    assert torch.equal(whole.snn(x), parts.snn(x))


@pytest.mark.parametrize("granularity", [PerLayer(), PerChannel(), PerStep()])
def test_neurons_start_as_asked(granularity: PerLayer | PerChannel | PerStep) -> None:
    x = torch.rand(8, 2, 8, 8)
    snn = convert(nets.conv_net(), 4, data=x, neuron=LMH(LIF(0.25), granularity)).snn
    assert all(bool((site.coefficients()[0] == 0.25).all()) for site in sites(snn).values())
    assert snn(x).shape == (8, 3)


def test_presets_outside_the_ranges_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"lambda_s is 2\.0"):
        LMH(LIF(2.0))


@pytest.mark.parametrize("timesteps", [0, -1, 1025, 2.5, "4"])
def test_timesteps_out_of_range_are_refused(timesteps: int) -> None:
    with pytest.raises(ArgumentError, match="1 to 1024"):
        convert(nets.two_layers(), timesteps, data=torch.rand(8, 4))


def test_without_data_or_example_the_shape_is_asked_for() -> None:
    with pytest.raises(ArgumentError, match="example_input"):
        convert(nets.two_layers(), 4)


def test_without_data_or_batchnorm_the_error_names_data() -> None:
    with pytest.raises(CalibrationError, match="--data"):
        convert(nets.two_layers(), 4, example_input=torch.zeros(1, 4))


def test_an_input_that_does_not_fit_is_refused_with_the_node() -> None:
    with pytest.raises(ArgumentError, match=r"0: an input of shape \['N', 1, 8, 8\] does not fit"):
        convert(nets.conv_net(), 4, data=torch.rand(8, 1, 8, 8))


def test_data_as_a_generator_is_read_once() -> None:
    x = torch.rand(64, 4)
    ann = nets.two_layers()
    whole = convert(ann, 4, data=x)
    streamed = convert(ann, 4, data=iter(x.split(8)))
    assert streamed.calibration.samples == 64
    assert torch.allclose(whole.calibration.v_threshold["1"], streamed.calibration.v_threshold["1"], rtol=0.06)


@pytest.mark.parametrize("name", zoo.list_models(data="digits"))
def test_every_model_of_the_digits_is_as_accurate_as_its_record(name: str) -> None:
    record = zoo.record(name)
    card = zoo.card(name)
    data = zoo.load_data(record["recipe"]["data"])
    batches = zoo.Batches(data.test, card.preprocessing)
    ann = zoo.load(name)
    result = evaluate(convert(ann, 4, data=batches).snn, batches, ann=ann)
    assert result.ann_accuracy == pytest.approx(record["accuracy"])
    assert result.samples == record["test_samples"]
    assert result.snn_accuracy is not None
    assert result.snn_accuracy[-1] > 0.95
