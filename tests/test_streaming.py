"""Inference in chunks of steps and with early exit, against one run of all steps."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from lmh import LIF, LMH, DelayedReadout, Fit, PerStep, early_exit, exit_curve, prefixes, streamed, zoo
from lmh.calibrate import Max
from lmh.convert import EventFrames, Gated, convert, deploy
from lmh.errors import ArgumentError, DataError
from lmh.footprint import Part, live_bytes, part_of
from lmh.time_axis import time_axis
from maxpool_nets import converted

T = 8


def zoo_network(**options: object) -> fx.GraphModule:
    data = zoo.Batches(zoo.load_data("digits").train, zoo.card("digits-cnn").preprocessing, indices=torch.arange(128))
    return convert(zoo.load("digits-cnn"), T, data=data, **options).snn  # type: ignore[arg-type]


def digits(count: int = 64) -> tuple[Tensor, Tensor]:
    test = zoo.load_data("digits").test
    batches = zoo.Batches(test, zoo.card("digits-cnn").preprocessing, batch_size=count)
    return next(iter(batches))


def events() -> tuple[fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    frames = torch.rand(T, 32, 1, 8, 8)
    ann = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5))
    return convert(ann, T, data=[frames], calibration=Max(), encoding=EventFrames()).snn, frames


def gated() -> tuple[fx.GraphModule, Tensor]:
    _, conversion, x = converted(Gated(), T)
    return conversion.snn, x


NETWORKS: dict[str, Callable[[], tuple[fx.GraphModule, Tensor]]] = {
    "images": lambda: (zoo_network(), digits()[0]),
    "deployed": lambda: (deploy(zoo_network()), digits()[0]),
    "leaks by step": lambda: (zoo_network(neuron=LMH(preset=LIF(0.8), granularity=PerStep())), digits()[0]),
    "gated max-pool": gated,
    "event frames": events,
}


@pytest.mark.parametrize("chunk", [1, 3, T])
@pytest.mark.parametrize("name", NETWORKS)
def test_chunks_give_what_one_run_gives(name: str, chunk: int) -> None:
    snn, x = NETWORKS[name]()
    expected = snn(x)
    found = streamed(snn, x, chunk=chunk)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not found.requires_grad
    assert torch.equal(snn(x), expected)  # nothing is kept


@pytest.mark.parametrize("share", [0.3, 0.7, 3.5, 1e6])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_fits_gives_what_one_run_gives(name: str, share: float) -> None:
    """``share``: of what one sample takes over all T steps."""
    snn, x = NETWORKS[name]()
    snn = snn.eval()
    sample = x[:, :1] if name == "event frames" else x[:1]
    one, two = (live_bytes(snn, [sample], steps) for steps in (1, 2))
    whole = one + (two - one) * (T - 1)
    fit = Fit(share * whole / 1e6)
    with torch.inference_mode():
        part = part_of(snn, [x], fit)
    count = x.shape[1] if name == "event frames" else len(x)
    if share < 1:
        assert part.samples == 1
        assert one + (two - one) * (part.steps - 1) <= max(share * whole, one)
        assert 1 <= part.steps < T
    else:
        assert part == Part(min(int(share), count), T)
    assert torch.allclose(streamed(snn, x, chunk=fit), snn(x), atol=1e-5)
    assert streamed(snn, x, chunk=Fit()).shape == (count, *snn(x).shape[1:])


def test_the_bytes_between_nodes_are_counted_as_by_hand() -> None:
    """At the largest node live 8 spikes and 100 answers of every step, beside the states of 8 neurons."""
    torch.manual_seed(0)
    snn = convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 100)), 4, data=torch.rand(16, 4)).snn.eval()
    sizes = {steps: live_bytes(snn, [torch.rand(1, 4)], steps) for steps in (1, 2, 3)}
    states, values = 2 * 8, {steps: 8 * steps + 100 * steps for steps in sizes}  # v_D, v_S; spikes and answers
    assert sizes == {steps: 4 * (states + values[steps]) for steps in sizes}


def test_free_memory_that_is_unknown_must_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> str:
        raise OSError

    snn, x = NETWORKS["images"]()
    monkeypatch.setattr("pathlib.Path.read_text", unknown)
    monkeypatch.setattr("os.sysconf", unknown)
    with pytest.raises(ArgumentError, match=r"Pass Fit\(megabytes=2000\)"):
        streamed(snn, x, chunk=Fit())
    assert streamed(snn, x, chunk=Fit(megabytes=1)).shape == (len(x), 10)
    with pytest.raises(ArgumentError, match=r"the network is a Sequential; expected the fx\.GraphModule"):
        streamed(nn.Sequential(snn), x, chunk=Fit())
    assert streamed(snn, x[:0], chunk=Fit(megabytes=1)).shape == (0, 10)
    with pytest.raises(ArgumentError, match="megabytes is 0; expected a number above 0"):
        Fit(megabytes=0)


@pytest.mark.parametrize("confidence", [0.0, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_each_sample_leaves_where_its_own_run_says(name: str, confidence: float) -> None:
    snn, x = NETWORKS[name]()
    answers = prefixes(snn, x).detach()
    leaves = answers.softmax(2).amax(2) >= confidence
    leaves[-1] = True
    first = leaves.int().argmax(0)
    found = early_exit(snn, x, confidence=confidence)
    assert torch.equal(found.steps, first + 1)
    assert torch.allclose(found.outputs, answers[first, torch.arange(len(first))], atol=1e-5)


def test_some_digits_leave_early_and_some_do_not() -> None:
    steps = early_exit(zoo_network(), digits()[0], confidence=0.99).steps
    assert steps.min() < T / 2
    assert steps.max() > T / 2


def test_the_curve_is_what_early_exit_does() -> None:
    snn, (x, y) = zoo_network(), digits(100)
    confidences = [0.5, 0.9, 0.999]
    curve = exit_curve(snn, [(x[:60], y[:60]), (x[60:], y[60:])], confidences)
    for point, confidence in zip(curve, confidences, strict=True):
        found = early_exit(snn, x, confidence=confidence)
        assert point.samples == 100
        assert point.confidence == confidence
        assert point.steps == pytest.approx(float(found.steps.double().mean()))
        assert point.accuracy == pytest.approx(float((found.outputs.argmax(1) == y).double().mean()))
    assert curve[0].steps < curve[1].steps < curve[2].steps


def test_the_mode_of_every_module_stays() -> None:
    snn, (x, y) = zoo_network(), digits()
    snn.train()
    next(snn.children()).eval()
    modes = [module.training for module in snn.modules()]
    expected = copy.deepcopy(snn).eval()(x)
    assert torch.allclose(streamed(snn, x), expected, atol=1e-5)
    early_exit(snn, x, confidence=0.9)
    exit_curve(snn, [(x, y)], [0.9])
    assert [module.training for module in snn.modules()] == modes
    assert not time_axis(snn).carry


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda snn, x: streamed(snn, x, chunk=0), "chunk is 0; expected a whole number of steps, at least 1"),
        (lambda snn, x: early_exit(snn, x, confidence=90), "confidence is 90; expected a probability from 0 to 1"),
        (lambda snn, x: exit_curve(snn, [(x, x)], [-1.0]), "confidence is -1.0; expected a probability"),
        (lambda snn, x: streamed(nn.Linear(2, 2), x), "has no spiking sites"),
    ],
)
def test_wrong_values_are_refused(call: Callable[[nn.Module, Tensor], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        call(zoo_network(), digits()[0])


def test_other_networks_and_data_are_refused() -> None:
    snn, (x, y) = zoo_network(), digits()
    delayed = zoo_network(readout=DelayedReadout(2))
    with pytest.raises(ArgumentError, match=r"readout is Delayed.*Convert it with MeanReadout\(\)"):
        streamed(delayed, x)
    maps = convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), 4, data=torch.rand(8, 1, 6, 6)).snn
    with pytest.raises(ArgumentError, match=r"returns \['N', 2, 4, 4\]; expected logits"):
        early_exit(maps, torch.rand(2, 1, 6, 6), confidence=0.5)
    with pytest.raises(DataError, match="has no labels"):
        exit_curve(snn, [x], [0.5])
    with pytest.raises(DataError, match="gave no batch"):
        exit_curve(snn, [], [0.5])
    with pytest.raises(ArgumentError, match="labels"):
        exit_curve(snn, [(x, y.float() + 0.5)], [0.5])
