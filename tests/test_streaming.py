"""Inference in chunks of steps and with early exit, against one run of all steps."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from lmh import (
    LIF,
    LMH,
    DelayedReadout,
    Fit,
    PerStep,
    carry_state,
    early_exit,
    exit_curve,
    footprint,
    per_step,
    prefixes,
    sites,
    streamed,
    zoo,
)
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


def ending_in(last: nn.Module) -> tuple[fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    x = torch.rand(32, 4)
    return convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), last), T, data=x).snn, x


NETWORKS: dict[str, Callable[[], tuple[fx.GraphModule, Tensor]]] = {
    "images": lambda: (zoo_network(), digits()[0]),
    "deployed": lambda: (deploy(zoo_network()), digits()[0]),
    "leaks by step": lambda: (zoo_network(neuron=LMH(preset=LIF(0.8), granularity=PerStep())), digits()[0]),
    "gated max-pool": gated,
    "event frames": events,
    "softmax": lambda: ending_in(nn.Softmax(1)),
    "softmax in bfloat16": lambda: (deploy(ending_in(nn.Softmax(1))[0], dtype=torch.bfloat16), torch.rand(32, 4)),
    "log-softmax": lambda: ending_in(nn.LogSoftmax(1)),
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
    """``share``: of what one sample takes over all T steps. In float64, as convolutions of other batches round anew."""
    snn, x = NETWORKS[name]()
    snn = snn.eval()
    if "bfloat16" not in name:
        snn, x = snn.double(), x.double()
    sample = x[:, :1] if name == "event frames" else x[:1]
    whole = live_bytes(snn, [sample], T)
    fit = Fit(share * whole / 1e6)
    with torch.inference_mode():
        part = part_of(snn, [x], fit)
    count = x.shape[1] if name == "event frames" else len(x)
    if share < 1:
        assert part.samples == 1
        assert part.steps == 1 or live_bytes(snn, [sample], part.steps) <= share * whole
        assert 1 <= part.steps < T
    else:
        assert part == Part(min(int(share), count), T)
    assert torch.allclose(streamed(snn, x, chunk=fit), snn(x), atol=1e-5)
    assert streamed(snn, x, chunk=Fit()).shape == (count, *snn(x).shape[1:])


def test_the_bytes_between_nodes_are_counted_as_by_hand() -> None:
    """Two potentials and a sum of 8 neurons are kept; beside them live a mean and 100 answers, or spikes and a mean."""
    torch.manual_seed(0)
    snn = convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 100)), 4, data=torch.rand(16, 4)).snn.eval()
    sizes = {steps: live_bytes(snn, [torch.rand(1, 4)], steps) for steps in (1, 2, 20)}
    assert sizes == {steps: 4 * (3 * 8 + max(8 + 100, 8 * steps + 8)) for steps in sizes}


def test_what_fits_does_not_depend_on_how_much_is_handed_over_and_holds_for_every_number_of_steps() -> None:
    """The input outweighs all else for few steps, so that bytes do not grow with the first ones."""
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    snn = convert(ann, 64, data=torch.rand(4, 3, 40, 40), calibration=Max()).snn.eval()
    x = torch.rand(100, 3, 40, 40)
    with torch.inference_mode():
        for megabytes in (0.03, 0.05, 0.2):
            part = part_of(snn, [x[:50]], Fit(megabytes))
            assert part_of(snn, [x], Fit(megabytes)) == part
            used = part.samples * live_bytes(snn, [x[:1]], part.steps)
            assert part == Part(1, 1) or used <= 1e6 * megabytes


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"memory.max": "900", "memory.current": "700", "memory.stat": "anon 5\ninactive_file 300\n"}, [500.0]),
        ({"memory.max": "900", "memory.current": "1000", "memory.stat": "anon 5\n"}, [0.0]),
        ({"memory.max": "max", "memory.current": "700", "memory.stat": ""}, []),
        ({}, []),
    ],
)
def test_files_that_were_read_do_not_count_as_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], free: list[float]
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(footprint, "GROUPS", tmp_path)
    assert footprint._free_of_groups() == free


def test_a_deployed_network_keeps_no_more_for_longer_chunks() -> None:
    snn, x = NETWORKS["deployed"]()
    kept = []
    for steps in (1, 4):
        with torch.inference_mode(), carry_state(snn):
            per_step(snn, x, steps=steps)
            states = [potential for site in sites(snn).values() for potential in site._carried[0]]  # type: ignore[index]
            kept.append(sum(footprint._storages(states).values()))
    assert kept[0] == kept[1]


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
    leaves = (answers if name.startswith("softmax") else answers.softmax(2)).amax(2) >= confidence
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
        (lambda snn, x: streamed(snn, x, chunk=2.0), "chunk is 2.0; expected a whole number"),  # type: ignore[arg-type]
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
    with pytest.raises(ArgumentError, match=r"ends in sigmoid; expected logits \[N, classes\], or a softmax of them"):
        early_exit(ending_in(nn.Sigmoid())[0], torch.rand(2, 4), confidence=0.5)
    of_events, frames = events()
    for wrong in (torch.cat([frames, frames[:1]]), frames.transpose(0, 1)):
        for run in (streamed, lambda snn, x: early_exit(snn, x, confidence=0.5)):
            with pytest.raises(ArgumentError, match=rf"the first axis has {len(wrong)} steps; expected {T}, .*\[T, N"):
                run(of_events, wrong)
    with pytest.raises(DataError, match="has no labels"):
        exit_curve(snn, [x], [0.5])
    with pytest.raises(DataError, match="gave no batch"):
        exit_curve(snn, [], [0.5])
    with pytest.raises(ArgumentError, match="labels"):
        exit_curve(snn, [(x, y.float() + 0.5)], [0.5])
