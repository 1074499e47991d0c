"""Time slices: potentials go on, gradients do not; k = T is STBP."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nets
from lmh import LMH, PerChannel, PerStep, per_step, sites, zoo
from lmh.calibrate import Max
from lmh.convert import EventFrames, convert
from lmh.errors import ArgumentError
from lmh.finetune import (
    SLTT,
    STBP,
    TET,
    CrossEntropy,
    EverySlice,
    Hybrid,
    OncePerBatch,
    Schedule,
    TimeSliced,
    finetune,
)
from lmh.finetune.optimiser import optimiser
from lmh.finetune.steps import Stepper, Work
from lmh.finetune.strategies import Strategy
from lmh.neurons import Coefficients, State, lmh_step
from lmh.spiking import COEFFICIENTS, SpikingSite
from lmh.zoo import Batches, DataSet

T = 4


class Noted:
    """An optimiser that keeps every gradient it was given and, unless told, changes nothing."""

    def __init__(self, model: nn.Module, inner: torch.optim.Optimizer | None = None) -> None:
        self.model, self.inner = model, inner
        self.steps: list[dict[str, Tensor]] = []

    def zero_grad(self, set_to_none: bool) -> None:
        self.model.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        self.steps.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})
        if self.inner is not None:
            self.inner.step()


def gradients(snn: nn.Module, strategy: Strategy, work: Work, **settings: Any) -> list[dict[str, Tensor]]:
    noted = Noted(snn.train())
    schedule = Schedule(epochs=1, clip_norm=None, **settings)
    Stepper(snn, noted, schedule, strategy)(work)  # type: ignore[arg-type]
    return noted.steps


def work(net: nn.Module) -> Work:
    x = torch.rand(6, 4) if isinstance(net, nn.Sequential) and isinstance(net[0], nn.Linear) else torch.rand(6, 2, 8, 8)
    return Work((x.double(),), torch.tensor([0, 1, 2, 0, 1, 2]), None)


def spiking(net: nn.Module, **options: Any) -> nn.Module:
    data = work(net).inputs[0].float()
    snn = convert(net, T, data=data, **options).snn.double()
    for site in sites(snn).values():
        for name in COEFFICIENTS:
            nn.init.uniform_(getattr(site, f"raw_{name}"), -0.3, 0.3)
    return snn


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-12) -> bool:
    assert a.keys() == b.keys()
    return all(torch.allclose(a[n], b[n], rtol=0, atol=tolerance * max(1.0, float(b[n].abs().max()))) for n in a)


@pytest.mark.parametrize("loss", [CrossEntropy(), TET()])
@pytest.mark.parametrize("granularity", [PerChannel(), PerStep()])
@pytest.mark.parametrize("net", [nets.two_layers, nets.Residual, nets.conv_net])
def test_slices_of_all_steps_give_the_gradients_of_stbp(
    net: Any, granularity: PerChannel | PerStep, loss: CrossEntropy | TET
) -> None:
    snn = spiking(net(), neuron=LMH(granularity=granularity))
    outside = copy.deepcopy(snn).train()
    torch.manual_seed(1)
    batch = work(net())
    torch.manual_seed(2)  # of dropout
    for update in (EverySlice(), OncePerBatch()):
        torch.manual_seed(2)
        [ours] = gradients(copy.deepcopy(snn), TimeSliced(T, update), batch, loss=loss)
        torch.manual_seed(2)
        [plain] = gradients(copy.deepcopy(snn), STBP(), batch, loss=loss)
        assert close(ours, plain)
    torch.manual_seed(2)
    outputs = per_step(outside, *batch.inputs)
    assert batch.labels is not None
    loss(outputs if loss.per_step else outputs.mean(0), batch.labels).backward()  # type: ignore[arg-type]
    assert close(plain, {n: p.grad for n, p in outside.named_parameters() if p.grad is not None})


def by_hand(snn: nn.Module, batch: Work, k: int) -> list[dict[str, Tensor]]:
    """The gradients of two layers' slices, from the equations: one list entry a slice."""
    first, last = snn.get_submodule("0"), snn.get_submodule("2")
    [site] = sites(snn).values()
    found = []
    state = State(torch.zeros(0), torch.zeros(0))
    for start in range(0, T, k):
        snn.zero_grad()
        current = first(*batch.inputs)
        values = Coefficients(site.v_threshold, *site.coefficients())
        if start == 0:
            v_start = (site.v_init * site.v_threshold).expand(6, 8)
            state = State(torch.zeros(6, 8, dtype=torch.float64), v_start)
        outputs = []
        for _ in range(k):
            spikes, state = lmh_step(current, state, values, site.neuron.surrogate, site.neuron.backward_reset)
            outputs.append(last(spikes))
        state = State(state.v_dendrite.detach(), state.v_soma.detach())
        assert isinstance(batch.labels, Tensor)
        F.cross_entropy(torch.stack(outputs).mean(0), batch.labels).backward()
        found.append({n: p.grad.clone() for n, p in snn.named_parameters() if p.grad is not None})
    return found


@pytest.mark.parametrize("k", [1, 2])
class TestAgainstTheEquations:
    def test_each_slice_has_its_own_gradient(self, k: int) -> None:
        snn = spiking(nets.two_layers())
        batch = work(nets.two_layers())
        expected = by_hand(copy.deepcopy(snn), batch, k)
        found = gradients(snn, TimeSliced(k), batch)
        assert len(found) == T // k
        for ours, theirs in zip(found, expected, strict=True):
            assert close(ours, theirs)
        assert not close(*[{n: v for n, v in step.items() if n != "1.v_init"} for step in found[:2]], 1e-3)

    def test_once_a_batch_is_their_mean(self, k: int) -> None:
        snn = spiking(nets.two_layers())
        batch = work(nets.two_layers())
        slices = gradients(copy.deepcopy(snn), TimeSliced(k), batch)
        [once] = gradients(snn, TimeSliced(k, OncePerBatch()), batch)
        mean = {name: sum(step.get(name, torch.zeros(())) for step in slices) / len(slices) for name in once}
        assert close(once, mean)  # type: ignore[arg-type]

    def test_v_init_learns_in_the_first_slice_alone(self, k: int) -> None:
        slices = gradients(spiking(nets.two_layers()), TimeSliced(k), work(nets.two_layers()))
        assert ["1.v_init" in step for step in slices] == [True] + [False] * (T // k - 1)


def test_per_step_parameters_learn_in_the_slice_of_their_step() -> None:
    snn = spiking(nets.two_layers(), neuron=LMH(granularity=PerStep()))
    slices = gradients(snn, TimeSliced(2), work(nets.two_layers()))
    moved = [step["1.raw_lambda_d"] != 0 for step in slices]
    assert [found.tolist() for found in moved] == [[True, True, False, False], [False, False, True, True]]


def test_sltt_is_slices_of_one_step_with_one_update() -> None:
    snn, batch = spiking(nets.conv_net().eval()), work(nets.conv_net())
    torch.manual_seed(0)
    [ours] = gradients(copy.deepcopy(snn), SLTT(), batch)
    torch.manual_seed(0)
    [same] = gradients(copy.deepcopy(snn), TimeSliced(1, OncePerBatch()), batch)
    torch.manual_seed(0)
    [other] = gradients(copy.deepcopy(snn), STBP(), batch)
    assert close(ours, same)
    assert not close({n: other[n] for n in ours}, ours, 1e-3)


def test_no_state_is_left_behind_and_the_next_batch_starts_anew() -> None:
    snn, batch = spiking(nets.two_layers()), work(nets.two_layers())
    first = gradients(snn, TimeSliced(2), batch)
    second = gradients(snn, TimeSliced(2), batch)
    assert all(close(a, b, 0.0) for a, b in zip(first, second, strict=True))
    assert all(site._carried is None for site in sites(snn).values())


def test_weights_change_between_the_slices_and_the_threshold_is_kept() -> None:
    snn = spiking(nets.two_layers())
    schedule = Schedule(epochs=1, lr=0.1, neuron_lr=0.1)
    optimizer = optimiser(snn, schedule)
    noted = Noted(snn.train(), optimizer)
    seen: list[Tensor] = []
    [site] = sites(snn).values()
    site.register_forward_pre_hook(lambda module, _inputs: seen.append(_theta(module)))
    batch = work(nets.two_layers())
    Stepper(snn, noted, schedule, TimeSliced(2))(batch)  # type: ignore[arg-type]
    Stepper(snn, noted, schedule, TimeSliced(2))(batch)  # type: ignore[arg-type]
    assert len(seen) == len(noted.steps) == 4
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))
    assert not torch.equal(_theta(site), site.base_threshold.double())


def _theta(site: nn.Module) -> Tensor:
    assert isinstance(site, SpikingSite)
    return site.v_threshold.detach().clone()


def test_batch_norm_takes_in_every_slice() -> None:
    snn = spiking(nets.conv_net())
    gradients(snn, TimeSliced(2), work(nets.conv_net()))
    counted = {n: int(t) for n, t in snn.state_dict().items() if n.endswith("num_batches_tracked")}
    assert counted == {"1.num_batches_tracked": 2, "5.num_batches_tracked": 2}


def test_event_frames_are_cut_into_slices() -> None:
    frames, labels = torch.rand(T, 6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    snn = convert(nets.two_layers(), T, data=frames, encoding=EventFrames(), calibration=Max()).snn.double()
    batch = Work((frames.double(),), labels, None)
    slices = gradients(copy.deepcopy(snn), TimeSliced(2), batch)
    swapped = gradients(snn, TimeSliced(2), Work((frames[[0, 1, 3, 2]].double(),), labels, None))
    assert close(slices[0], swapped[0])
    assert not close(slices[1], swapped[1], 1e-6)


@pytest.mark.parametrize("k", [2, 3])
def test_it_learns_the_digits(digits: DataSet, digits_test: Batches, k: int) -> None:
    batches = Batches(digits.train, zoo.card("digits-cnn").preprocessing, 32, shuffle_seed=0)
    snn = convert(zoo.load("digits-cnn"), 6, data=batches).snn
    with torch.no_grad():
        snn.get_submodule("head").weight += 0.3 * torch.randn(10, 48)
    tuned = finetune(snn, batches, digits_test, strategy=TimeSliced(k), epochs=1)
    assert (tuned[-1].val_accuracy or 0) > 0.95


def test_a_hybrid_run_can_end_in_slices(digits: DataSet, digits_ann: nn.Module) -> None:
    batches = Batches(digits.train, zoo.card("digits-cnn").preprocessing, 32, torch.arange(64), shuffle_seed=0)
    hybrid = Hybrid(qcfs=Schedule(epochs=1, lr=0.01), then=TimeSliced(1))
    tuned = finetune(digits_ann, batches, timesteps=2, strategy=hybrid, epochs=1)
    assert [stage.name for stage in tuned.stages] == ["QCFS", "STBP"]


class TestWrongSlices:
    def test_a_slice_that_does_not_divide_is_refused_before_any_work(self, digits_ann: nn.Module) -> None:
        data = [(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))]
        snn = convert(digits_ann, 6, data=data).snn
        message = r"slices of 4 steps do not divide T = 6; expected one of 1, 2, 3, 6\. Choose one"
        with pytest.raises(ArgumentError, match=message):
            finetune(snn, data, strategy=TimeSliced(4))
        with pytest.raises(ArgumentError, match=message):
            finetune(digits_ann, data, timesteps=6, strategy=Hybrid(then=TimeSliced(4)))

    @pytest.mark.parametrize("steps", [0, 1.0, True, "2"])
    def test_steps_that_are_no_number(self, steps: Any) -> None:
        with pytest.raises(ArgumentError, match="expected a whole number of at least 1"):
            TimeSliced(steps)

    def test_an_update_that_is_none(self) -> None:
        with pytest.raises(ArgumentError, match=r"Pass EverySlice\(\) or OncePerBatch\(\)"):
            TimeSliced(2, OncePerBatch)  # type: ignore[arg-type]
