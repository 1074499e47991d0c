"""Hybrid training: a QCFS stage of the ANN, then STBP of the spiking network that takes its weights and θ over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nets
from lmh import LIF, LMH, QCFS, evaluate, sites, zoo
from lmh.calibrate import Max
from lmh.convert import Conversion, EventFrames, convert, load, save
from lmh.errors import ArgumentError
from lmh.finetune import STBP, EpochResult, Finetuned, Hybrid, Schedule, finetune
from lmh.finetune.hybrid import qcfs_network, taken_over
from lmh.records import FROM_QCFS
from lmh.zoo import Batches, DataSet

SHORT = Hybrid(qcfs=Schedule(epochs=1, lr=0.01, warmup_steps=3))


@pytest.fixture
def train(digits: DataSet) -> Batches:
    return Batches(digits.train, zoo.card("digits-cnn").preprocessing, 32, torch.arange(160), shuffle_seed=3)


class Unlabelled:
    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def at_epoch(self, epoch: int) -> list[Tensor]:
        return [x for x, _ in self.batches.at_epoch(epoch)]


class TestTheStages:
    @pytest.fixture
    def tuned(self, digits_ann: nn.Module, train: Batches) -> Finetuned:
        return finetune(digits_ann, train, train, timesteps=2, strategy=SHORT, epochs=2)

    def test_both_are_there_with_their_history(self, tuned: Finetuned, train: Batches) -> None:
        first, second = tuned.stages
        assert [(stage.name, len(stage.history)) for stage in tuned.stages] == [("QCFS", 1), ("STBP", 2)]
        assert [result.epoch for result in tuned] == [0, 0, 1]
        assert first.schedule == SHORT.qcfs
        assert second.network is tuned.snn
        assert second.history[-1].val_accuracy == evaluate(tuned.snn, train).snn_accuracy[-1]  # type: ignore[index]

    def test_the_first_network_has_a_qcfs_for_each_site_with_as_many_levels_as_steps(self, tuned: Finetuned) -> None:
        found = {path: layer for path, layer in tuned.stages[0].network.named_modules() if isinstance(layer, QCFS)}
        assert list(found) == list(sites(tuned.snn))
        assert {layer.levels for layer in found.values()} == {2}
        assert all(bool(layer.raw_threshold.detach().any()) for layer in found.values())
        assert tuned.stages[0].history[0].neurons.keys() == found.keys()

    def test_the_neurons_start_from_its_thresholds(self, tuned: Finetuned) -> None:
        assert tuned.conversion is not None
        assert tuned.conversion.calibration.policy == FROM_QCFS
        for path, site in sites(tuned.snn).items():
            layer = tuned.stages[0].network.get_submodule(path)
            assert isinstance(layer, QCFS)
            assert torch.equal(site.base_threshold, layer.v_threshold.detach())
            assert bool(site.raw_threshold.detach().any())

    def test_the_network_is_saved_and_loaded(self, tuned: Finetuned, tmp_path: Path, train: Batches) -> None:
        assert tuned.conversion is not None
        file = save(tuned.conversion, tmp_path / "net.safetensors", source=_record())
        x = next(iter(train))[0]
        assert torch.equal(load(file)(x), tuned.snn(x))


def _record() -> dict[str, object]:
    return {"name": "zoo:digits-cnn", "architecture": "digits-cnn", "num_classes": 10, "sha256": None}


def test_it_beats_the_conversion_alone(digits: DataSet, digits_ann: nn.Module, digits_test: Batches) -> None:
    batches = Batches(digits.train, zoo.card("digits-cnn").preprocessing, 32, shuffle_seed=0)
    hybrid = Hybrid(qcfs=Schedule(epochs=2, lr=0.01, warmup_steps=20))
    tuned = finetune(digits_ann, batches, digits_test, timesteps=1, strategy=hybrid, epochs=1)
    plain = evaluate(convert(digits_ann, 1, data=batches).snn, digits_test).snn_accuracy
    assert plain is not None
    assert plain[0] < 0.7
    assert (tuned.stages[0].history[-1].val_accuracy or 0) > 0.93
    assert (tuned[-1].val_accuracy or 0) > 0.93


def test_the_ann_is_left_alone_and_teaches_without_labels(digits_ann: nn.Module, train: Batches) -> None:
    before = copy.deepcopy(digits_ann)
    tuned = finetune(digits_ann, Unlabelled(train), timesteps=2, strategy=SHORT, epochs=2)
    assert nets.same(before, digits_ann)
    assert all(parameter.grad is None for parameter in digits_ann.parameters())
    assert tuned[2].loss < tuned[1].loss


def test_a_conversion_says_what_is_converted_and_teaches(digits_ann: nn.Module, train: Batches) -> None:
    conversion = convert(digits_ann, 3, data=train, keep=["down.2"], calibration=Max())
    before = copy.deepcopy(conversion.snn)
    tuned = finetune(conversion, Unlabelled(train), strategy=SHORT, epochs=1)
    assert len(tuned.stages) == 2
    assert list(sites(tuned.snn)) == ["stem.2", "block.relu1", "block.relu2"]
    assert nets.same(before, conversion.snn)
    assert tuned.conversion is not None
    assert tuned.conversion.recipe == conversion.recipe


def test_a_conversion_is_trained_in_place_by_stbp(digits_ann: nn.Module, train: Batches) -> None:
    conversion = convert(digits_ann, 2, data=train)
    tuned = finetune(conversion, train, epochs=1)
    assert tuned.snn is conversion.snn
    assert tuned.conversion is conversion


def test_a_spiking_network_gets_stbp_alone(digits_ann: nn.Module, train: Batches) -> None:
    snn = convert(digits_ann, 2, data=train).snn
    ours, plain = copy.deepcopy(snn), copy.deepcopy(snn)
    tuned = finetune(ours, train, strategy=SHORT, epochs=1)
    assert [stage.name for stage in tuned.stages] == ["STBP"]
    assert tuned.conversion is None
    finetune(plain, train, epochs=1)
    assert nets.same(ours, plain)


def test_an_ann_without_a_strategy_gets_hybrid_training(train: Batches, digits_ann: nn.Module, tmp_path: Path) -> None:
    def stop(_result: EpochResult) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(digits_ann, train, timesteps=2, checkpoint=tmp_path / "run", on_epoch=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["run-qcfs"]
    stages = finetune(digits_ann, train, timesteps=2, strategy=STBP(), epochs=1).stages
    assert [found.name for found in stages] == ["STBP"]


@pytest.mark.parametrize("where", [0, 1])
def test_a_broken_stage_resumes_to_the_same_weights(
    digits_ann: nn.Module, train: Batches, tmp_path: Path, where: int
) -> None:
    hybrid = Hybrid(qcfs=Schedule(epochs=2, lr=0.01))
    calls = 0

    def stop(_epoch: int, _index: int, _loss: float) -> None:
        nonlocal calls
        calls += 1
        if calls == (7, 17)[where]:
            raise KeyboardInterrupt

    def tuned(on_batch: Callable[[int, int, float], None] | None, file: Path | None) -> Finetuned:
        return finetune(digits_ann, train, timesteps=2, strategy=hybrid, epochs=2, checkpoint=file, on_batch=on_batch)

    expected, file = tuned(None, None), tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        tuned(stop, file)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "run-qcfs.safetensors", *(["run.safetensors"] if where else [])
    ]  # fmt: skip
    resumed = tuned(None, file)
    assert nets.same(expected.snn, resumed.snn)
    assert expected == resumed
    assert nets.same(expected.stages[0].network, resumed.stages[0].network)


@pytest.mark.parametrize("net", [nets.Reused, nets.Spellings])
def test_every_call_of_an_activation_has_its_own(net: Callable[[], nn.Module]) -> None:
    conversion = convert(net(), 4, data=torch.rand(16, 4))
    network = qcfs_network(conversion.prepared, conversion.calibration, 4)
    layers = [layer for layer in network.modules() if isinstance(layer, QCFS)]
    assert len(layers) == len(sites(conversion.snn)) > 2
    assert len({id(layer) for layer in layers}) == len(layers)
    again = taken_over(network, conversion)
    assert nets.same(again.snn, conversion.snn)
    x = torch.rand(8, 4)
    assert torch.equal(again.snn(x), conversion.snn(x))


def test_weights_and_statistics_of_a_trained_network_are_taken_over(train: Batches, digits_ann: nn.Module) -> None:
    conversion = convert(digits_ann, 4, data=train)
    network = qcfs_network(conversion.prepared, conversion.calibration, 4)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.01)
    found, trained = taken_over(network, conversion).snn.state_dict(), network.state_dict()
    common = [name for name in found if name in trained and "threshold" not in name]
    assert len(common) > 20
    assert all(torch.equal(found[name], trained[name]) for name in common)


def test_a_network_that_was_qcfs_already_is_trained_with_the_levels_of_t() -> None:
    ann = nn.Sequential(nn.Linear(4, 8), QCFS(8, 2.0), nn.Linear(8, 8), QCFS(8, 1.0, channels=8), nn.Linear(8, 3))
    data = [(torch.rand(16, 4), torch.randint(3, (16,)))]
    tuned = finetune(ann, data, timesteps=2, strategy=SHORT, epochs=1)
    assert [layer.levels for layer in tuned.stages[0].network.modules() if isinstance(layer, QCFS)] == [2, 2]


def test_event_frames_go_through_both_stages() -> None:
    frames, labels = torch.rand(3, 20, 4), torch.randint(3, (20,))
    ann = nets.two_layers()
    conversion = convert(ann, 3, data=frames, encoding=EventFrames(), calibration=Max())
    tuned = finetune(conversion, [(frames, labels)], [(frames, labels)], strategy=SHORT, teacher=ann, epochs=2)
    assert tuned.snn(frames).shape == (20, 3)
    expected = float((tuned.snn(frames).argmax(1) == labels).double().mean())
    assert tuned[-1].val_accuracy == expected


class TestWrongCalls:
    def test_timesteps_of_a_network_that_spikes(self, train: Batches, digits_ann: nn.Module) -> None:
        conversion = convert(digits_ann, 2, data=train)
        for network in (conversion, conversion.snn):
            with pytest.raises(ArgumentError, match=r"timesteps is 4 and the network spikes already.*Leave it out"):
                finetune(network, train, timesteps=4)

    def test_an_ann_without_timesteps(self, train: Batches, digits_ann: nn.Module) -> None:
        with pytest.raises(ArgumentError, match=r"timesteps= was not given.*Convert it first, or name T"):
            finetune(digits_ann, train)

    @pytest.mark.parametrize("strategy", ["hybrid", Hybrid, 4])
    def test_what_is_no_strategy(self, train: Batches, digits_ann: nn.Module, strategy: object) -> None:
        with pytest.raises(ArgumentError, match=r"expected a strategy\. Pass STBP\(\), TimeSliced\(2\), Pro"):
            finetune(digits_ann, train, timesteps=2, strategy=strategy)  # type: ignore[arg-type]

    def test_a_start_that_is_not_if(self) -> None:
        with pytest.raises(ArgumentError, match=r"the neurons start as LIF.*expected IF\(\)"):
            Hybrid(then=STBP(LMH(LIF())))

    def test_a_schedule_that_is_none(self) -> None:
        with pytest.raises(ArgumentError, match=r"Hybrid: qcfs is 10; expected a value of type Schedule"):
            Hybrid(qcfs=10)  # type: ignore[arg-type]


def test_the_default_conversion_is_the_one_convert_makes(digits_ann: nn.Module, train: Batches) -> None:
    tuned = finetune(digits_ann, train, timesteps=2, strategy=STBP(), epochs=1)
    assert isinstance(tuned.conversion, Conversion)
    assert tuned.conversion.report.timesteps == 2
    assert tuned.conversion.calibration.samples == 160
