"""Time: folded and unfolded, hoisted, read out, carried."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nets
from lmh import LMH, PerStep, carry_state, per_step, prefixes, sites
from lmh.calibrate import Max
from lmh.convert import EventFrames, convert
from lmh.errors import ArgumentError, StateError
from lmh.time_axis import TimeAxis, time_axis


def spiking(timesteps: int = 4, **options: object) -> tuple[nn.Module, Tensor]:
    x = torch.rand(6, 2, 8, 8)
    return convert(nets.Residual(), timesteps, data=x, calibration=Max(), **options).snn.double(), x.double()


def shapes_seen(snn: nn.Module, x: Tensor, path: str) -> list[int]:
    seen: list[int] = []
    handle = snn.get_submodule(path).register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    snn(x)
    handle.remove()
    return seen


@pytest.mark.parametrize("training", [False, True])
def test_the_mean_of_the_steps_is_the_output(training: bool) -> None:
    snn, x = spiking()
    snn.train(training)
    for module in snn.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    steps = per_step(snn, x)
    assert steps.shape == (4, 6, 3)
    assert torch.allclose(steps.mean(0), snn(x), atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_prefixes_are_the_means_of_the_first_steps(training: bool) -> None:
    snn, x = spiking()
    snn.train(training)
    for module in snn.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    steps, means = per_step(snn, x), prefixes(snn, x)
    for t in range(1, 5):
        assert torch.allclose(means[t - 1], steps[:t].mean(0), atol=1e-12)


def test_a_prefix_does_not_depend_on_t() -> None:
    snn, x = spiking(8)
    assert torch.equal(per_step(snn, x)[:3], per_step(snn, x, steps=3))


def test_the_stem_runs_once_and_the_tail_on_the_mean() -> None:
    snn, x = spiking(4)
    assert shapes_seen(snn, x, "stem") == [6]
    assert shapes_seen(snn, x, "conv1") == [24]
    assert shapes_seen(snn, x, "fc") == [6]


def test_in_train_mode_the_tail_runs_at_every_step() -> None:
    snn, x = spiking(4)
    assert shapes_seen(snn.train(), x, "stem") == [6]
    assert shapes_seen(snn.train(), x, "fc") == [24]


def test_batchnorm_of_the_timed_part_sees_every_step() -> None:
    snn, x = spiking(4)
    snn.train()
    norm = snn.get_submodule("bn1")
    seen: list[Tensor] = []
    norm.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    norm.reset_running_stats()
    norm.momentum = 1.0
    snn(x)
    assert len(seen[0]) == 24
    assert torch.allclose(norm.running_mean, seen[0].mean((0, 2, 3)))


class ReadoutNet(nn.Module):
    """Ends in a log-softmax, which is no affine node."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log_softmax(self.b(torch.relu(self.a(x))), 1)


def test_a_softmax_at_the_end_reads_the_time_mean() -> None:
    x = torch.rand(5, 4)
    snn = convert(ReadoutNet(), 4, data=x).snn
    logits = snn.get_submodule("b")(torch.zeros(1, 8))
    assert torch.allclose(snn(x).exp().sum(1), torch.ones(5), atol=1e-6)
    assert torch.allclose(prefixes(snn, x)[-1], snn(x), atol=1e-6)
    assert torch.allclose(snn.train()(x), snn.eval()(x), atol=1e-6)
    assert logits.shape == (1, 3)


class HoistedSize(nn.Module):
    """Reads the batch size at the top and uses it below."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        y = torch.relu(self.a(x)).view(n, 2, 4).sum(1)
        return self.b(torch.relu(y).view(n, -1))


def test_a_batch_size_read_at_the_top_does_not_fold_time_into_features() -> None:
    x = torch.rand(5, 4)
    snn = convert(HoistedSize(), 4, data=x).snn
    assert snn(x).shape == (5, 3)
    assert per_step(snn, x).shape == (4, 5, 3)
    assert torch.allclose(per_step(snn, x).mean(0), snn(x), atol=1e-6)


def test_samples_of_a_batch_do_not_touch_each_other() -> None:
    snn, x = spiking()
    assert torch.allclose(snn(x)[[4, 1]], snn(x[[4, 1]]), atol=1e-12)


class TestEventFrames:
    def test_a_constant_sequence_equals_direct_coding(self) -> None:
        ann, x = nets.Residual(), torch.rand(6, 2, 8, 8)
        direct = convert(ann, 4, data=x)
        frames = x.expand(4, *x.shape)
        events = convert(ann, 4, example_input=frames, calibration=direct.calibration, encoding=EventFrames()).snn
        assert torch.allclose(events(frames), direct.snn(x), atol=1e-5)
        assert per_step(events, frames).shape == (4, 6, 3)

    def test_calibration_sees_every_frame(self) -> None:
        frames = torch.rand(4, 6, 2, 8, 8)
        conversion = convert(nets.Residual(), 4, data=[frames], encoding=EventFrames())
        assert conversion.calibration.samples == 24

    def test_a_wrong_number_of_frames_is_refused(self) -> None:
        frames = torch.rand(4, 6, 2, 8, 8)
        snn = convert(nets.Residual(), 4, data=[frames], encoding=EventFrames()).snn
        with pytest.raises(ArgumentError, match="has 3 steps; expected 4"):
            snn(frames[:3])


class TestCarryState:
    @pytest.mark.parametrize("k", [1, 2, 4])
    def test_slices_give_the_steps_of_one_run(self, k: int) -> None:
        snn, x = spiking(8)
        with carry_state(snn):
            slices = [per_step(snn, x, steps=k) for _ in range(8 // k)]
        assert torch.equal(torch.cat(slices), per_step(snn, x))

    def test_a_plain_call_goes_on_too_and_the_block_drops_the_state(self) -> None:
        snn, x = spiking(4)
        fresh = snn(x)
        with carry_state(snn):
            first, second = snn(x), snn(x)
        assert torch.equal(first, fresh)
        assert not torch.equal(second, fresh)
        assert torch.equal(snn(x), fresh)

    def test_gradients_stop_between_slices(self) -> None:
        snn, x = spiking(4)
        snn.zero_grad()
        with carry_state(snn):
            per_step(snn, x, steps=2).sum().backward()
            per_step(snn, x, steps=2).sum().backward()
        assert all(site.raw_threshold.grad is not None for site in sites(snn).values())

    def test_another_batch_is_refused(self) -> None:
        snn, x = spiking(4)
        with carry_state(snn):
            snn(x)
            with pytest.raises(StateError, match="same"):
                snn(x[:2])

    def test_a_second_block_is_refused(self) -> None:
        snn, _ = spiking(4)
        with carry_state(snn), pytest.raises(StateError, match="already open"), carry_state(snn):
            snn(torch.rand(1))

    def test_an_error_inside_closes_the_block(self) -> None:
        snn, x = spiking(4)

        def broken() -> None:
            with carry_state(snn):
                snn(x)
                raise KeyError

        with pytest.raises(KeyError):
            broken()
        assert not time_axis(snn).carry
        assert all(site._carried is None for site in sites(snn).values())

    def test_per_step_parameters_end_at_t(self) -> None:
        snn, x = spiking(4, neuron=LMH(granularity=PerStep()))
        with carry_state(snn):
            per_step(snn, x, steps=3)
            with pytest.raises(StateError, match="end at 4"):
                per_step(snn, x, steps=2)


def test_a_network_that_was_not_converted_is_refused() -> None:
    with pytest.raises(ArgumentError, match="Convert it first"):
        per_step(nets.two_layers(), torch.rand(2, 4))


@pytest.mark.parametrize("steps", [0, 1025])
def test_steps_out_of_range_are_refused(steps: int) -> None:
    snn, x = spiking(4)
    with pytest.raises(ArgumentError, match="1 to 1024"):
        per_step(snn, x, steps=steps)
    assert time_axis(snn).steps == TimeAxis(4).steps
