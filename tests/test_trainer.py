"""The trainer: rates, averages, early stopping, precision, mixing, and where a NaN began."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
    TET,
    BFloat16,
    Checkpoint,
    CrossEntropy,
    CutMix,
    Distillation,
    EarlyStopping,
    Float32,
    FrozenBatchNorm,
    Mixup,
    Schedule,
    finetune,
    fit,
)
from lmh.finetune.diagnosis import origin
from lmh.finetune.losses import combined
from lmh.finetune.mixing import MixedLabels, mixed
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


def data() -> list[tuple[Tensor, Tensor]]:
    return [(torch.rand(16, 4), torch.randint(3, (16,))) for _ in range(4)]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class TestRates:
    def test_warm_up_then_cosine(self) -> None:
        found: list[float] = []
        schedule = Schedule(epochs=3, lr=0.1, warmup_steps=5)
        fit(nets.two_layers(), data(), None, schedule, on_progress=lambda progress: found.append(progress.lr))
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
        fit(network, data(), None, frozen)
        assert not bool(network[1].raw_threshold.detach().any())  # type: ignore[union-attr, operator]


class TestAverage:
    def test_the_result_is_the_moving_average_of_the_weights(self) -> None:
        network = nets.two_layers()
        plain, averaged = copy.deepcopy(network), copy.deepcopy(network)
        batches, seen = data(), [copied(network)]
        fit(plain, batches, None, Schedule(epochs=2), on_batch=lambda *_: seen.append(copied(plain)))
        fit(averaged, batches, None, Schedule(epochs=2, ema=EMA(0.6)))
        expected = dict(seen[0])
        for count, weights in enumerate(seen[1:]):
            decay = min(0.6, (1 + count) / (10 + count))
            expected = {name: decay * expected[name] + (1 - decay) * weights[name] for name in weights}
        assert all(torch.allclose(expected[n], t, atol=1e-6) for n, t in averaged.state_dict().items())
        assert not same(plain, averaged)

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
        assert same(first, again)

    def test_it_needs_validation(self, train: Batches) -> None:
        with pytest.raises(ArgumentError, match=r"needs validation batches and val is None\. Pass val="):
            fit(nets.two_layers(), data(), None, Schedule(epochs=1, early_stopping=EarlyStopping()))

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
            fit(nets.two_layers(), data(), None, Schedule(epochs=1, precision=BFloat16()))

    def test_a_precision_by_name_is_refused(self) -> None:
        with pytest.raises(ArgumentError, match=r"the string 'bf16'.*Pass Float32\(\) or BFloat16\(\)"):
            Schedule(epochs=1, precision="bf16")  # type: ignore[arg-type]


LAST = torch.channels_last


class TestMixing:
    def test_mixup_is_its_formula(self) -> None:
        x, labels = torch.rand(8, 3, 4, 4), torch.arange(8)
        (out,), soft = mixed((x,), labels, (Mixup(),), 5, 0)
        assert isinstance(soft, MixedLabels)
        assert torch.equal(soft.first, labels)
        assert torch.allclose(out, soft.share * x + (1 - soft.share) * x[soft.second])

    def test_cutmix_has_every_pixel_from_one_of_both_and_counts_them(self) -> None:
        x, labels = torch.rand(8, 3, 8, 8), torch.arange(8)
        for seed in range(20):
            (out,), soft = mixed((x,), labels, (CutMix(),), seed, 0)
            assert isinstance(soft, MixedLabels)
            own = (out == x).all(1)
            partner = (out == x[soft.second]).all(1)
            assert bool((own | partner).all())
            strangers = soft.second != labels
            assert float(own[strangers].double().mean()) == pytest.approx(soft.share)

    def test_shares_are_spread_as_alpha_says(self) -> None:
        def shares(alpha: float) -> Tensor:
            found = []
            for seed in range(400):
                _, soft = mixed((torch.zeros(2, 3),), torch.arange(2), (Mixup(alpha),), seed, 0)
                assert isinstance(soft, MixedLabels)
                found.append(soft.share)
            return torch.tensor(found)

        even, edged = shares(1.0), shares(0.1)
        assert float(even.mean()) == pytest.approx(0.5, abs=0.05)
        assert float(even.var()) == pytest.approx(1 / 12, abs=0.01)
        assert float(edged.var()) == pytest.approx(0.25 / 1.2, abs=0.02)

    @pytest.mark.parametrize("way", [Mixup(), CutMix()])
    def test_several_inputs_are_mixed_alike(self, way: Mixup | CutMix) -> None:
        x = torch.rand(8, 3, 8, 8)
        (a, b), _ = mixed((x, 2 * x), torch.arange(8), (way,), 3, 0)
        assert torch.allclose(b, 2 * a)
        assert not torch.equal(a, x)

    def test_event_frames_are_mixed_along_their_batch(self) -> None:
        x = torch.rand(3, 8, 2, 4, 4)
        (out,), soft = mixed((x,), torch.arange(8), (Mixup(),), 1, 1)
        assert isinstance(soft, MixedLabels)
        assert torch.allclose(out, soft.share * x + (1 - soft.share) * x[:, soft.second])

    @pytest.mark.parametrize("loss", [CrossEntropy(0.1), TET(0.2)])
    def test_mixed_labels_are_soft_targets(self, loss: CrossEntropy | TET) -> None:
        outputs = torch.randn(3, 6, 4) if loss.per_step else torch.randn(6, 4)
        first, second = torch.randint(4, (6,)), torch.randint(4, (6,))
        ours = combined(loss, None, outputs, MixedLabels(first, second, 0.3), None)
        soft = 0.3 * F.one_hot(first, 4).float() + 0.7 * F.one_hot(second, 4).float()
        if isinstance(loss, CrossEntropy):
            assert torch.allclose(ours, F.cross_entropy(outputs, soft, label_smoothing=0.1))
        else:
            each = F.cross_entropy(outputs.flatten(0, 1), soft.repeat(3, 1))
            assert torch.allclose(ours, 0.8 * each + 0.2 * (outputs - 1).square().mean())

    def test_a_teacher_is_shown_the_mixed_images_and_needs_no_labels(self) -> None:
        shown: list[Tensor] = []

        class Teacher(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                shown.append(x)
                return x[:, :3]

        students: list[Tensor] = []
        student = nets.two_layers()
        student.register_forward_pre_hook(lambda _m, inputs: students.append(inputs[0]))
        batches = [x for x, _ in data()]
        fit(student, batches, None, Schedule(epochs=1, mixing=(Mixup(),)), teacher=Teacher())
        assert len(shown) == 4
        assert all(torch.equal(a, b) for a, b in zip(shown, students, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(shown, batches, strict=True))

    def test_both_ways_are_drawn(self) -> None:
        x = torch.rand(4, 1, 8, 8)
        ways = {bool((mixed((x,), None, (Mixup(), CutMix()), seed, 0)[0][0] == x).any()) for seed in range(20)}
        assert ways == {True, False}

    def test_cutmix_of_what_is_no_image_is_refused(self) -> None:
        with pytest.raises(ArgumentError, match=r"shape \[16, 4\]; expected images.*Use Mixup\(\)"):
            fit(nets.two_layers(), data(), None, Schedule(epochs=1, mixing=(CutMix(),)))

    @pytest.mark.parametrize("mixing", [Mixup(), (Mixup,), ["mixup"], ("mixup",)])
    def test_what_is_no_tuple_of_ways_is_refused(self, mixing: Any) -> None:
        with pytest.raises(ArgumentError, match=r"expected a tuple of ways to mix\. Pass \(Mixup\(\), CutMix\(\)\)"):
            Schedule(epochs=1, mixing=mixing)

    @pytest.mark.parametrize("kind", [Mixup, CutMix])
    @pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf])
    def test_an_alpha_out_of_range_is_refused(self, kind: type, alpha: float) -> None:
        with pytest.raises(ArgumentError, match=r"alpha is .*expected a finite number above 0"):
            kind(alpha)


class TestDistillation:
    def test_none_learns_from_the_labels_alone(self) -> None:
        ann, plain, without = (nets.two_layers() for _ in range(3))
        without.load_state_dict(plain.state_dict())
        batches = data()
        fit(plain, batches, None, Schedule(epochs=1))
        fit(without, batches, None, Schedule(epochs=1, distillation=None), teacher=ann)
        assert same(plain, without)

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
        batches = data()
        batches[2][0][0, 0] = float("nan")
        self.fails(nets.two_layers(), batches, r"epoch 1, batch 3: the loss is nan; it began in the batch, which holds")

    def test_in_a_weight(self) -> None:
        network = nets.two_layers()
        with torch.no_grad():
            network[2].bias[0] = float("inf")  # type: ignore[index, operator]
        self.fails(network, data(), r"it began in the network's own 2\.bias")

    @pytest.mark.parametrize(("name", "symbol"), [("raw_threshold", "θ"), ("raw_lambda_d", "λ_D"), ("raw_mu_s", "μ_S")])
    def test_in_a_neurons_parameter(self, name: str, symbol: str) -> None:
        snn = convert(nets.two_layers(), 2, data=torch.rand(8, 4)).snn
        [site] = sites(snn).values()
        with torch.no_grad():
            getattr(site, name).fill_(float("nan"))
        self.fails(snn, data(), rf"it began in the network's own {symbol} of 1;")

    def test_in_a_layer(self) -> None:
        class Log(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.log(x - 0.5)

        network = nn.Sequential(nn.Linear(4, 8), Log(), nn.ReLU(), nn.Linear(8, 3))
        self.fails(network, data(), r"it began in the output of 1 \(Log\)")

    def test_in_a_gradient(self) -> None:
        class Root(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.sqrt(x * 0)

        network = nn.Sequential(nn.Linear(4, 8), Root(), nn.Linear(8, 3))
        self.fails(network, data(), r"the gradient is nan; it began in the gradient of 0\.bias")

    def test_in_the_teacher(self) -> None:
        class Broken(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.full((len(x), 3), float("nan"))

        with pytest.raises(TrainingError, match="it began in the teacher's outputs"):
            fit(nets.two_layers(), data(), None, Schedule(epochs=1), teacher=Broken())

    def test_in_an_update(self, tmp_path: Path) -> None:
        network = nets.two_layers()
        file = tmp_path / "run"
        with pytest.raises(TrainingError, match=r"batch \d: .*(is not finite after the update|it began in).*Lower lr"):
            fit(
                network,
                data(),
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


def test_the_mixing_is_of_the_schedules_seed() -> None:
    networks = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        network = nets.two_layers()
        fit(network, [(torch.ones(4, 4).cumsum(0), torch.tensor([0, 1, 2, 0]))], None,
            Schedule(epochs=2, mixing=(Mixup(),), seed=seed))  # fmt: skip
        networks.append(network)
    assert same(networks[0], networks[1])
    assert not same(networks[0], networks[2])


def test_distillation_weighs_labels_and_teacher_of_mixed_batches() -> None:
    outputs, teacher = torch.randn(6, 4), torch.randn(6, 4)
    labels = MixedLabels(torch.randint(4, (6,)), torch.randint(4, (6,)), 0.25)
    ours = combined(CrossEntropy(), Distillation(0.4), outputs, labels, teacher)
    hard = 0.25 * F.cross_entropy(outputs, labels.first) + 0.75 * F.cross_entropy(outputs, labels.second)
    assert torch.allclose(ours, 0.6 * hard + 0.4 * Distillation(0.4)(outputs, teacher))


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
