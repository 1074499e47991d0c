"""The trainer: rates, averages, early stopping, precision, and where a NaN began."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nets
from lmh import QCFS, sites, zoo
from lmh.artifact import read_tensors
from lmh.calibrate import Max
from lmh.convert import EventFrames, convert
from lmh.errors import ArgumentError, TrainingError
from lmh.finetune import (
    EMA,
    BFloat16,
    Checkpoint,
    EarlyStopping,
    Float32,
    FrozenBatchNorm,
    Schedule,
    finetune,
    fit,
)
from lmh.finetune.diagnosis import origin
from lmh.finetune.optimiser import copied
from lmh.finetune.trainer import accuracy
from lmh.zoo import Batches, DataSet

BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_bf16 = pytest.mark.skipif(not BF16, reason="this CPU has no bfloat16")


@pytest.fixture
def train(digits: DataSet) -> Batches:
    return Batches(digits.train, zoo.card("digits-cnn").preprocessing, 32, torch.arange(160), shuffle_seed=3)


@pytest.fixture
def start(digits_calibration: Batches, digits_ann: nn.Module) -> nn.Module:
    return convert(digits_ann, 2, data=digits_calibration).snn


class TestRates:
    def test_warm_up_then_cosine(self) -> None:
        found: list[float] = []
        schedule = Schedule(epochs=3, lr=0.1, warmup_steps=5)
        fit(
            nets.two_layers(),
            nets.two_layer_batches(),
            None,
            schedule,
            on_progress=lambda progress: found.append(progress.lr),
        )
        cosine = [0.05 * (1 + math.cos(math.pi * step / 12)) for step in range(12)]
        factors = [min(1, (step + 1) / 5) for step in range(12)]
        assert found == pytest.approx([a * b for a, b in zip(cosine, factors, strict=True)])

    def test_small_first_steps_leave_a_trained_network_near(self, digits_ann: nn.Module, train: Batches) -> None:
        def distance(steps: int) -> float:
            network = copy.deepcopy(digits_ann)
            fit(network, train, None, Schedule(epochs=1, lr=0.05, warmup_steps=steps))
            moved, still = (net.get_parameter("stem.0.weight").detach() for net in (network, digits_ann))
            return float((moved - still).norm())

        assert distance(50) < 0.5 * distance(0)

    @pytest.mark.parametrize("steps", [-1, 2.0, True])
    def test_warm_up_that_is_no_count_is_refused(self, steps: Any) -> None:
        with pytest.raises(ArgumentError, match="expected a whole number of batches"):
            Schedule(epochs=1, warmup_steps=steps)

    def test_thresholds_of_qcfs_have_the_neurons_rate_and_no_decay(self) -> None:
        network = nn.Sequential(nn.Linear(4, 8), QCFS(4, 1.0, channels=8), nn.Linear(8, 3))
        frozen = Schedule(epochs=1, neuron_lr=0.0, weight_decay=0.5)
        fit(network, nets.two_layer_batches(), None, frozen)
        assert not bool(network[1].raw_threshold.detach().any())  # type: ignore[union-attr, operator]


class TestAverage:
    def test_the_result_is_the_moving_average_of_the_weights(self) -> None:
        network = nets.two_layers()
        plain, averaged = copy.deepcopy(network), copy.deepcopy(network)
        batches, seen = nets.two_layer_batches(), [copied(network)]
        fit(plain, batches, None, Schedule(epochs=2), on_batch=lambda *_: seen.append(copied(plain)))
        fit(averaged, batches, None, Schedule(epochs=2, ema=EMA(0.6)))
        expected = dict(seen[0])
        for count, weights in enumerate(seen[1:]):
            decay = min(0.6, (1 + count) / (10 + count))
            expected = {name: decay * expected[name] + (1 - decay) * weights[name] for name in weights}
        assert all(torch.allclose(expected[n], t, atol=1e-6) for n, t in averaged.state_dict().items())
        assert not nets.same(plain, averaged)

    def test_validation_measures_the_average_and_training_goes_on_without_it(self, train: Batches) -> None:
        card = zoo.card("digits-cnn")
        network = card.build()
        schedule = Schedule(epochs=3, lr=0.05, ema=EMA(0.9))
        history = fit(network, train, train, schedule)
        assert history[-1].val_accuracy == accuracy(network, train)

    @pytest.mark.parametrize("decay", [0.0, 1.0, 1.5])
    def test_a_decay_that_is_none_is_refused(self, decay: float) -> None:
        with pytest.raises(ArgumentError, match=r"expected a number between 0 and 1, such as 0\.999"):
            EMA(decay)


class TestEarlyStopping:
    def test_it_stops_and_keeps_the_best(self, digits_ann: nn.Module, train: Batches) -> None:
        kept: list[dict[str, Tensor]] = []
        schedule = Schedule(epochs=6, lr=1e-6, neuron_lr=0, early_stopping=EarlyStopping(patience=2))
        history = fit(digits_ann, train, train, schedule, on_epoch=lambda _result: kept.append(copied(digits_ann)))
        assert len(history) == 3
        assert history[0].val_accuracy == history[2].val_accuracy
        assert all(torch.equal(kept[0][name], tensor) for name, tensor in digits_ann.state_dict().items())
        assert any(not torch.equal(kept[2][name], tensor) for name, tensor in digits_ann.state_dict().items())

    def test_a_run_that_stopped_stays_stopped_and_keeps_its_best(
        self, digits_ann: nn.Module, train: Batches, tmp_path: Path
    ) -> None:
        schedule = Schedule(epochs=6, lr=1e-6, neuron_lr=0, early_stopping=EarlyStopping(patience=2))
        first, again = copy.deepcopy(digits_ann), copy.deepcopy(digits_ann)
        expected = fit(first, train, train, schedule, checkpoint=tmp_path / "run")
        assert fit(again, train, train, schedule, checkpoint=tmp_path / "run") == expected
        assert nets.same(first, again)

    def test_it_needs_validation(self, train: Batches) -> None:
        with pytest.raises(ArgumentError, match=r"needs validation batches and val is None\. Pass val="):
            fit(nets.two_layers(), nets.two_layer_batches(), None, Schedule(epochs=1, early_stopping=EarlyStopping()))

    @pytest.mark.parametrize("bad", [{"patience": 0}, {"patience": 1.5}, {"least": 1.0}])
    def test_values_out_of_range_are_refused(self, bad: dict[str, Any]) -> None:
        with pytest.raises(ArgumentError, match="expected"):
            EarlyStopping(**bad)


class TestPrecision:
    @needs_bf16
    def test_bfloat16_trains_in_it_and_leaves_float32_weights(self, start: nn.Module, train: Batches) -> None:
        seen: set[torch.dtype] = set()
        layer = start.get_submodule("block.conv2")
        layer.register_forward_hook(lambda _m, _i, output: seen.add(output.dtype) if layer.training else None)
        before = copied(start)
        history = finetune(start, train, train, schedule=Schedule(epochs=1, precision=BFloat16()))
        assert seen == {torch.bfloat16}
        assert {tensor.dtype for tensor in start.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
        assert any(not torch.equal(before[name], tensor) for name, tensor in start.state_dict().items())
        assert (history[-1].val_accuracy or 0) > 0.9

    @pytest.mark.parametrize("last", [False, True])
    def test_images_and_weights_are_stored_as_asked(self, start: nn.Module, train: Batches, last: bool) -> None:
        seen: list[bool] = []
        block = start.get_submodule("block.conv1")
        assert isinstance(block, nn.Conv2d)
        block.register_forward_pre_hook(lambda _m, _i: seen.append(block.weight.is_contiguous(memory_format=LAST)))
        finetune(start, train, schedule=Schedule(epochs=1, precision=Float32(channels_last=last)))
        assert set(seen) == {last}
        assert block.weight.is_contiguous()

    def test_the_order_in_memory_changes_nothing_but_rounding(self, train: Batches) -> None:
        networks = []
        for last in (False, True):
            torch.manual_seed(0)
            network = zoo.card("digits-cnn").build().double()
            fit(network, train, None, Schedule(epochs=1, precision=Float32(channels_last=last)))
            networks.append(network)
        for a, b in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-9)

    def test_a_device_without_it_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        with pytest.raises(ArgumentError, match=r"this cpu does not compute in bfloat16.*Use Float32\(\)"):
            fit(nets.two_layers(), nets.two_layer_batches(), None, Schedule(epochs=1, precision=BFloat16()))

    def test_a_precision_by_name_is_refused(self) -> None:
        with pytest.raises(ArgumentError, match=r"the string 'bf16'.*Pass Float32\(\) or BFloat16\(\)"):
            Schedule(epochs=1, precision="bf16")  # type: ignore[arg-type]


LAST = torch.channels_last


class TestDistillation:
    def test_none_learns_from_the_labels_alone(self) -> None:
        ann, plain, without = (nets.two_layers() for _ in range(3))
        without.load_state_dict(plain.state_dict())
        batches = nets.two_layer_batches()
        fit(plain, batches, None, Schedule(epochs=1))
        fit(without, batches, None, Schedule(epochs=1, distillation=None), teacher=ann)
        assert nets.same(plain, without)

    def test_another_type_is_refused(self) -> None:
        with pytest.raises(ArgumentError, match=r"distillation is 0\.5.*Pass Distillation\(\) or None"):
            Schedule(epochs=1, distillation=0.5)  # type: ignore[arg-type]

    def test_a_teacher_of_frames_is_asked_for_each(self) -> None:
        frames, ann = torch.rand(3, 20, 4), nets.two_layers()
        snn = convert(ann, 3, data=frames, encoding=EventFrames(), calibration=Max()).snn
        history = finetune(snn, [frames], epochs=3, teacher=ann)
        assert history[-1].loss < history[0].loss


class TestWhereItBegan:
    """Every message says what is not finite and where that began, and the last good checkpoint stays."""

    def fails(self, network: nn.Module, batches: Any, message: str, **settings: Any) -> None:
        with pytest.raises(TrainingError, match=message):
            fit(network, batches, None, Schedule(epochs=1, **settings))

    def test_in_the_data(self) -> None:
        batches = nets.two_layer_batches()
        batches[2][0][0, 0] = float("nan")
        self.fails(nets.two_layers(), batches, r"epoch 1, batch 3: the loss is nan; it began in the batch, which holds")

    def test_in_a_weight(self) -> None:
        network = nets.two_layers()
        with torch.no_grad():
            network[2].bias[0] = float("inf")  # type: ignore[index, operator]
        self.fails(network, nets.two_layer_batches(), r"it began in the network's own 2\.bias")

    @pytest.mark.parametrize(("name", "symbol"), [("raw_threshold", "θ"), ("raw_lambda_d", "λ_D"), ("raw_mu_s", "μ_S")])
    def test_in_a_neurons_parameter(self, name: str, symbol: str) -> None:
        snn = convert(nets.two_layers(), 2, data=torch.rand(8, 4)).snn
        [site] = sites(snn).values()
        with torch.no_grad():
            getattr(site, name).fill_(float("nan"))
        self.fails(snn, nets.two_layer_batches(), rf"it began in the network's own {symbol} of 1;")

    def test_in_a_layer(self) -> None:
        class Log(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.log(x - 0.5)

        network = nn.Sequential(nn.Linear(4, 8), Log(), nn.ReLU(), nn.Linear(8, 3))
        self.fails(network, nets.two_layer_batches(), r"it began in the output of 1 \(Log\)")

    def test_in_a_gradient(self) -> None:
        class Root(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.sqrt(x * 0)

        network = nn.Sequential(nn.Linear(4, 8), Root(), nn.Linear(8, 3))
        self.fails(network, nets.two_layer_batches(), r"the gradient is nan; it began in the gradient of 0\.bias")

    def test_in_the_teacher(self) -> None:
        class Broken(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.full((len(x), 3), float("nan"))

        with pytest.raises(TrainingError, match="it began in the teacher's outputs"):
            fit(nets.two_layers(), nets.two_layer_batches(), None, Schedule(epochs=1), teacher=Broken())

    def test_in_an_update(self, tmp_path: Path) -> None:
        network = nets.two_layers()
        file = tmp_path / "run"
        with pytest.raises(TrainingError, match=r"batch \d: .*(is not finite after the update|it began in).*Lower lr"):
            fit(
                network,
                nets.two_layer_batches(),
                None,
                Schedule(epochs=1, lr=1e38, clip_norm=None, momentum=0.99),
                checkpoint=Checkpoint(file, steps=1),
            )
        if file.exists():
            assert all(torch.isfinite(tensor).all() for tensor in read_tensors(file)[0].values())

    def test_the_networks_statistics_are_not_touched_by_looking(self) -> None:
        network = nets.conv_net()
        with torch.no_grad():
            network[10].bias[0] = float("inf")  # type: ignore[index, operator]
        before = {name: buffer.clone() for name, buffer in network.named_buffers()}
        x = torch.rand(4, 2, 8, 8)
        network.train()
        network[10].bias.data.zero_()  # type: ignore[operator, union-attr]
        assert origin(network, [x], None) == "the loss itself"
        assert all(torch.equal(before[name], buffer) for name, buffer in network.named_buffers())


def test_a_loader_that_drops_a_last_small_batch_is_named() -> None:
    loader = DataLoader(TensorDataset(torch.rand(8, 4), torch.randint(3, (8,))), batch_size=16, drop_last=True)
    with pytest.raises(TrainingError, match=r"no batch.*drop_last=True a data set smaller than a batch gives none"):
        fit(nets.two_layers(), loader, None, Schedule(epochs=1))


def test_a_last_batch_of_one_sample_before_batch_norm_says_what_to_do() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    data = [(torch.rand(8, 4), torch.randint(3, (8,))), (torch.rand(1, 4), torch.tensor([0]))]
    with pytest.raises(TrainingError, match=r"epoch 1, batch 2: BatchNorm .* \(1 samples\).*FrozenBatchNorm\(\)"):
        fit(network, data, None, Schedule(epochs=1))
    fit(network, data, None, Schedule(epochs=1, batch_norm=FrozenBatchNorm()))


def test_a_teacher_of_other_classes_is_refused() -> None:
    data = [(torch.rand(8, 4), torch.randint(3, (8,)))]
    with pytest.raises(TrainingError, match=r"the teacher has 5 outputs and the network 3; expected the same\. Use"):
        fit(nets.two_layers(), data, None, Schedule(epochs=1), teacher=nn.Linear(4, 5))
