"""Fine-tuning: it learns, it resumes exactly, it refuses what cannot work."""

from __future__ import annotations

import copy
from dataclasses import fields
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nets
from lmh import zoo
from lmh.calibrate import Max
from lmh.convert import EventFrames, convert
from lmh.errors import ArgumentError, TrainingError
from lmh.finetune import TET, CrossEntropy, Distillation, Schedule, finetune, fit
from lmh.finetune.batches import Feed
from lmh.finetune.losses import combined
from lmh.finetune.optimiser import neuron_parameters
from lmh.finetune.reporting import Watch
from lmh.finetune.strategies import STBP
from lmh.finetune.trainer import Task, accuracy, as_teacher, run
from lmh.zoo import Batches, CropFlip, DataSet


@pytest.fixture
def start(digits_calibration: Batches, digits_ann: nn.Module) -> nn.Module:
    return convert(digits_ann, 2, data=digits_calibration).snn


@pytest.fixture
def train(digits: DataSet) -> Batches:
    card = zoo.card("digits-cnn")
    return Batches(
        digits.train, card.preprocessing, 32, torch.arange(160), augmentation=CropFlip(1, False), shuffle_seed=3
    )


def test_fine_tuning_wins_accuracy_back(start: nn.Module, digits: DataSet, digits_test: Batches) -> None:
    with torch.no_grad():
        start.get_submodule("head").weight += 0.3 * torch.randn(10, 48)
    before = accuracy(start, digits_test)
    batches = Batches(digits.train, zoo.card("digits-cnn").preprocessing, 32, shuffle_seed=0)
    history = finetune(start, batches, digits_test, epochs=2)
    assert before < 0.95
    assert history[-1].val_accuracy == accuracy(start, digits_test)
    assert history[-1].val_accuracy is not None
    assert history[-1].val_accuracy > before
    assert not start.training


def test_every_neuron_parameter_moves(start: nn.Module, train: Batches) -> None:
    before = [parameter.detach().clone() for parameter in neuron_parameters(start)]
    finetune(start, train, epochs=1)
    assert len(before) == 4 * 6
    assert all(not torch.equal(a, b) for a, b in zip(before, neuron_parameters(start), strict=True))


@pytest.mark.parametrize("loss", [CrossEntropy(), TET()])
def test_a_broken_run_resumes_to_the_same_weights(
    start: nn.Module, train: Batches, tmp_path: Path, loss: CrossEntropy | TET
) -> None:
    schedule = Schedule(epochs=3, loss=loss)
    whole, broken, resumed = (copy.deepcopy(start) for _ in range(3))
    expected = finetune(whole, train, schedule=schedule)

    def stop(epoch: int, index: int, _loss: float) -> None:
        if (epoch, index) == (1, 2):
            raise KeyboardInterrupt

    file = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        finetune(broken, train, schedule=schedule, checkpoint=file, on_batch=stop)
    torch.manual_seed(99)
    history = finetune(resumed, train, schedule=schedule, checkpoint=file)
    assert nets.same(whole, resumed)
    assert not nets.same(whole, broken)
    assert history == expected


def test_a_checkpoint_of_other_settings_is_refused(start: nn.Module, train: Batches, tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"
    finetune(start, train, epochs=1, checkpoint=file)
    with pytest.raises(TrainingError, match="other settings"):
        finetune(start, train, epochs=2, checkpoint=file)


def test_a_checkpoint_of_another_network_is_refused(start: nn.Module, train: Batches, tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"
    finetune(start, train, epochs=1, checkpoint=file)
    other = convert(nets.conv_net(1), 2, example_input=torch.zeros(1, 1, 8, 8)).snn
    with pytest.raises(TrainingError, match="starting weights"):
        finetune(other, train, epochs=1, checkpoint=file)


def test_a_teacher_needs_no_labels(start: nn.Module, digits_ann: nn.Module, train: Batches) -> None:
    class Unlabelled:
        def at_epoch(self, epoch: int) -> list[Tensor]:
            return [x for x, _ in train.at_epoch(epoch)]

    history = finetune(start, Unlabelled(), epochs=3, teacher=digits_ann)
    assert history[-1].loss < history[0].loss
    assert not any(parameter.grad is not None for parameter in digits_ann.parameters())


def test_without_labels_or_teacher_it_is_refused(start: nn.Module, train: Batches) -> None:
    class Unlabelled:
        def at_epoch(self, epoch: int) -> list[Tensor]:
            return [x for x, _ in train.at_epoch(epoch)]

    with pytest.raises(ArgumentError, match="no labels and no teacher"):
        finetune(start, Unlabelled(), epochs=1)


def test_the_anns_own_training_runs_through_the_same_loop(train: Batches) -> None:
    ann = zoo.card("digits-cnn").build()
    history = fit(ann, train, None, Schedule(epochs=10, lr=0.05))
    assert history[-1].loss < 0.6 * history[0].loss


def test_a_loss_that_is_not_finite_stops_with_its_place(start: nn.Module, train: Batches, tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"

    class Poisoned:
        def at_epoch(self, epoch: int) -> list[tuple[Tensor, Tensor]]:
            batches = list(train.at_epoch(epoch))
            return batches if epoch == 0 else [(x * float("nan"), y) for x, y in batches]

    with pytest.raises(TrainingError, match=r"epoch 2, batch 1: the gradient is nan; it began in the batch.*Lower lr"):
        finetune(start, Poisoned(), epochs=3, checkpoint=file)
    assert file.exists()
    assert all(torch.isfinite(parameter).all() for parameter in start.parameters())


def test_labels_beyond_the_outputs_are_refused(start: nn.Module) -> None:
    class Wrong:
        def at_epoch(self, epoch: int) -> list[tuple[Tensor, Tensor]]:
            return [(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 10]))]

    with pytest.raises(TrainingError, match="label is 10 and the network has 10 outputs"):
        finetune(start, Wrong(), epochs=1)


def test_an_empty_training_set_is_refused(start: nn.Module) -> None:
    class Empty:
        def at_epoch(self, epoch: int) -> list[Tensor]:
            return []

    with pytest.raises(TrainingError, match="no batch"):
        finetune(start, Empty(), epochs=1)


def test_a_network_without_sites_is_refused(train: Batches) -> None:
    with pytest.raises(ArgumentError, match="Convert it first"):
        finetune(nets.two_layers(), train, epochs=1)


@pytest.mark.parametrize("bad", [{"epochs": 0}, {"epochs": 1, "lr": 0.0}, {"epochs": 1, "neuron_lr": -1.0}])
def test_settings_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match="expected"):
        Schedule(**bad)  # type: ignore[arg-type]


class TestLosses:
    def test_tet_is_its_formula(self) -> None:
        outputs, labels = torch.randn(3, 5, 4), torch.randint(4, (5,))
        each = torch.stack([F.cross_entropy(step, labels) for step in outputs]).mean()
        regulariser = (outputs - 1.0).square().mean()
        assert torch.allclose(TET(0.2)(outputs, labels), 0.8 * each + 0.2 * regulariser)

    def test_distillation_of_itself_is_zero_and_scales_with_temperature(self) -> None:
        a, b = torch.randn(6, 4), torch.randn(6, 4)
        assert float(Distillation()(a, a)) == pytest.approx(0, abs=1e-6)
        soft = F.kl_div((a / 3).log_softmax(1), (b / 3).softmax(1), reduction="batchmean")
        assert torch.allclose(Distillation(temperature=3.0)(a, b), 9 * soft, atol=1e-5)

    def test_the_weight_mixes_labels_and_teacher(self) -> None:
        outputs, labels, teacher = torch.randn(5, 4), torch.randint(4, (5,)), torch.randn(5, 4)
        hard, soft = CrossEntropy()(outputs, labels), Distillation(0.3)(outputs, teacher)
        mixed = combined(CrossEntropy(), Distillation(0.3), outputs, labels, teacher)
        assert torch.allclose(mixed, 0.7 * hard + 0.3 * soft)

    @pytest.mark.parametrize(
        "make", [lambda: TET(weight=2.0), lambda: Distillation(temperature=0.0), lambda: CrossEntropy(2.0)]
    )
    def test_values_out_of_range_are_refused(self, make: object) -> None:
        with pytest.raises(ArgumentError, match="expected"):
            make()  # type: ignore[operator]


class Recorded(nn.Module):
    """A teacher that notes its modes; a dropout and a frozen BatchNorm make them matter."""

    def __init__(self, ann: nn.Module) -> None:
        super().__init__()
        self.ann, self.dropout, self.modes = ann, nn.Dropout(0.5), set[bool]()

    def forward(self, x: Tensor) -> Tensor:
        self.modes |= {module.training for module in self.modules()}
        return self.dropout(self.ann(x))


class TestWhatTheCallerHolds:
    def test_the_teacher_has_its_modes_again(self, start: nn.Module, digits_ann: nn.Module, train: Batches) -> None:
        teacher = Recorded(digits_ann.train())
        teacher.ann.get_submodule("stem").eval()
        before = [module.training for module in teacher.modules()]
        finetune(start, train, epochs=1, teacher=teacher)
        assert teacher.modes == {False}
        assert [module.training for module in teacher.modules()] == before
        assert set(before) == {True, False}

    def test_also_after_an_error(self, start: nn.Module, digits_ann: nn.Module, train: Batches) -> None:
        def stop(_epoch: int, _index: int, _loss: float) -> None:
            raise KeyboardInterrupt

        torch.manual_seed(7)
        state = torch.get_rng_state()
        with pytest.raises(KeyboardInterrupt):
            finetune(start, train, epochs=1, teacher=digits_ann.train(), on_batch=stop)
        assert digits_ann.training
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_teacher_is_on_its_device_again(self, start: nn.Module, digits_ann: nn.Module) -> None:
        moves: list[str] = []

        class Moves(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.ann = digits_ann

            def to(self, device: torch.device) -> Moves:  # type: ignore[override]
                moves.append(str(device))
                return self

        with as_teacher(Moves(), torch.device("meta")):
            assert moves == ["meta"]
        assert moves == ["meta", "cpu"]

    def test_the_random_state_is_the_callers(self, start: nn.Module, train: Batches, tmp_path: Path) -> None:
        for seed in (1, 2):
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            finetune(copy.deepcopy(start), train, epochs=1, checkpoint=tmp_path / "run")
            assert torch.equal(torch.get_rng_state(), state)

    def test_the_schedules_seed_alone_decides(self) -> None:
        """Dropout and a shuffling loader draw from the run's own random state, whatever the caller's is."""
        data = TensorDataset(torch.rand(32, 2, 8, 8), torch.randint(3, (32,)))
        snn = convert(nets.conv_net(), 2, data=data.tensors[0]).snn
        runs = []
        for caller, seed in ((1, 0), (2, 0), (1, 5)):
            torch.manual_seed(caller)
            model = copy.deepcopy(snn)
            loader = DataLoader(data, batch_size=8, shuffle=True)
            finetune(model, loader, schedule=Schedule(epochs=1, seed=seed))
            runs.append(model)
        assert nets.same(runs[0], runs[1])
        assert not nets.same(runs[0], runs[2])

    def test_it_gives_what_a_reseeded_caller_got(self, start: nn.Module, train: Batches) -> None:
        """The same bits as the loop in the open, which seeds the caller's own state."""
        ours, open_loop = copy.deepcopy(start), copy.deepcopy(start)
        schedule = Schedule(epochs=2, seed=4)
        history = finetune(ours, train, schedule=schedule)
        task = Task("STBP", open_loop, Feed.of(train, schedule.seed, open_loop), None, schedule, STBP(), None)
        assert run(task, Watch()) == list(history)
        assert nets.same(ours, open_loop)


def test_event_frames_are_scored_per_sample() -> None:
    frames, labels = torch.rand(3, 20, 4), torch.randint(3, (20,))
    snn = convert(nets.two_layers(), 3, data=frames, encoding=EventFrames(), calibration=Max()).snn
    expected = float((snn(frames).argmax(1) == labels).double().mean())
    assert accuracy(snn, [(frames, labels)]) == expected
    history = finetune(snn, [(frames, labels)], [(frames, labels)], epochs=2)
    assert history[-1].val_accuracy == accuracy(snn, [(frames, labels)])


def test_which_outputs_a_loss_reads_belongs_to_its_type() -> None:
    assert (CrossEntropy.per_step, TET.per_step) == (False, True)
    for kind in (CrossEntropy, TET):
        with pytest.raises(TypeError, match="per_step"):
            kind(per_step=True)  # type: ignore[call-arg]
        assert "per_step" not in {item.name for item in fields(kind)}


def test_a_loss_of_the_users_own_trains(start: nn.Module, train: Batches) -> None:
    class LastStep:
        per_step: ClassVar[bool] = True

        def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
            assert outputs.shape[0] == 2
            return F.cross_entropy(outputs[-1], labels)

    assert finetune(start, train, schedule=Schedule(epochs=1, loss=LastStep()))[0].loss > 0


def test_a_network_without_parameters_is_refused(train: Batches) -> None:
    with pytest.raises(ArgumentError, match="ReLU has no parameters; expected some to train"):
        fit(nn.ReLU(), train, None, Schedule(epochs=1))
