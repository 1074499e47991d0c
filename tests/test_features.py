"""Distillation of features: neurons' mean outputs beside the ANN's activations."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nets
from lmh import sites, zoo
from lmh.calibrate import Max
from lmh.convert import EventFrames, convert
from lmh.errors import ArgumentError
from lmh.finetune import STBP, BFloat16, Distillation, Hybrid, Schedule, TimeSliced, finetune
from lmh.finetune.features import counterparts, distance, mean_over_time, noted
from lmh.finetune.history import neurons_of
from lmh.finetune.optimiser import optimiser
from lmh.finetune.recipe import TrainingRecipe
from lmh.finetune.steps import Stepper, Work


def gaps(snn: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    with torch.no_grad(), noted(neurons_of(snn)) as ours, noted(counterparts(snn, teacher)) as theirs:
        snn(x), teacher(x)
        return float(distance(mean_over_time(ours, len(x)), mean_over_time(theirs, len(x))))


def test_the_loss_adds_the_mean_relative_distance_of_the_layers() -> None:
    torch.manual_seed(0)
    ann, x = nets.two_layers().double(), torch.rand(8, 4, dtype=torch.float64)
    conversion = convert(ann, 4, data=x, calibration=Max())
    snn = conversion.snn.double()
    teacher = conversion.prepared.model.double()
    outputs: dict[str, Tensor] = {}
    for path, site in sites(snn).items():
        site.register_forward_hook(lambda _m, _x, out, path=path: outputs.update({path: out}))
    student = snn(x)
    expected = torch.zeros((), dtype=torch.float64)
    for path in sites(snn):
        seen: list[Tensor] = []
        handle = teacher.get_submodule(path).register_forward_hook(lambda _m, _x, out, seen=seen: seen.append(out))
        target = teacher(x)
        handle.remove()
        rate = outputs[path].unflatten(0, (4, 8)).mean(0)
        expected = expected + (rate - seen[0]).square().sum() / seen[0].square().sum() / len(sites(snn))
    only = F.kl_div(F.log_softmax(student / 2, 1), F.log_softmax(target / 2, 1), reduction="batchmean", log_target=True)
    schedule = Schedule(epochs=1, distillation=Distillation(1.0, 2.0, features=0.5), lr=1e-9, neuron_lr=0)
    with torch.no_grad(), noted(counterparts(snn, teacher)) as features:
        logits = teacher(x)
    work = Work((x,), None, logits, mean_over_time(features, 8))
    loss = Stepper(snn, optimiser(snn, schedule), schedule, STBP())(work)
    assert loss == pytest.approx((4 * only + 0.5 * expected).item(), rel=1e-9)


@pytest.mark.parametrize("strategy", [STBP(), TimeSliced(2)], ids=str)
def test_training_without_labels_keeps_the_layers_close(strategy: STBP | TimeSliced) -> None:
    ann, card = zoo.load("digits-cnn"), zoo.card("digits-cnn")
    train = zoo.Batches(zoo.load_data("digits").train, card.preprocessing, 32, torch.arange(256), shuffle_seed=0)
    loader = [x for x, _ in train]
    conversion = convert(ann, 4, data=loader)
    x = loader[0]
    start = gaps(conversion.snn, conversion.prepared.model, x)
    found = {}
    for weight in (0.0, 10.0):
        snn = copy.deepcopy(conversion.snn)
        schedule = Schedule(epochs=3, distillation=Distillation(features=weight))
        finetune(snn, loader, schedule=schedule, strategy=strategy, teacher=conversion.prepared.model)
        found[weight] = gaps(snn, conversion.prepared.model, x)
    assert found[10.0] < start
    assert found[10.0] < 0.5 * found[0.0]


def test_hybrid_takes_the_prepared_ann_in_both_stages() -> None:
    ann = nets.two_layers()
    loader = DataLoader(TensorDataset(torch.rand(32, 4), torch.randint(3, (32,))), batch_size=8)
    schedule = Schedule(epochs=1, distillation=Distillation(features=1.0))
    tuned = finetune(ann, loader, timesteps=2, strategy=Hybrid(schedule), schedule=schedule)
    assert [stage.name for stage in tuned.stages] == ["QCFS", "STBP"]


def test_event_frames_and_bfloat16() -> None:
    frames = [(torch.rand(2, 6, 2, 8, 8), torch.arange(6) % 3) for _ in range(2)]
    conversion = convert(nets.conv_net(), 2, data=frames, encoding=EventFrames())
    kinds = [Schedule(epochs=1, distillation=Distillation(features=1.0))]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        kinds.append(Schedule(epochs=1, distillation=Distillation(features=1.0), precision=BFloat16()))
    for schedule in kinds:
        snn = copy.deepcopy(conversion.snn)
        assert finetune(snn, frames, schedule=schedule, teacher=conversion.prepared.model)[0].loss > 0


def test_a_teacher_without_the_layers_is_refused() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    ann, x = Functional().eval(), torch.rand(8, 4)
    snn = convert(ann, 2, data=x).snn
    schedule = Schedule(epochs=1, distillation=Distillation(features=1.0))
    with pytest.raises(ArgumentError, match=r"no module relu, one of 1; .*Pass conversion\.prepared\.model as teacher"):
        finetune(snn, [(x, torch.zeros(8, dtype=torch.long))], schedule=schedule, teacher=ann)
    with pytest.raises(ArgumentError, match="features is -1; expected a weight of at least 0"):
        Distillation(features=-1)


def test_a_child_named_ann_keeps_its_name() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ann = nets.two_layers()

        def forward(self, x: Tensor) -> Tensor:
            return self.ann(x)

    snn = convert(Holder(), 4, data=torch.rand(8, 4)).snn
    assert list(neurons_of(snn)) == list(sites(snn))
    assert all(path.startswith("ann.") for path in neurons_of(snn))


def test_a_recipe_of_hybrid_training_has_the_schedules_of_both_stages() -> None:
    first, last = Schedule(epochs=2, distillation=Distillation(features=0.5)), Schedule(epochs=3)
    recipe = TrainingRecipe(Hybrid(first), last, 32)
    assert (recipe.schedules, recipe.epochs) == ((first, last), 5)
    assert [schedule.distils_features for schedule in recipe.schedules] == [True, False]
    assert TrainingRecipe(STBP(), last, 32).schedules == (last,)
