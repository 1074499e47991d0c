"""Distillation without labels: in Python, and what ``lmh-convert`` makes of ``--distill``, ``--budget`` and auto."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nets
from commands import command, succeed
from lmh import zoo
from lmh.calibrate import Reconstruction
from lmh.calibrate.cost import correction_cost
from lmh.convert import Conversion, EventFrames, convert, label_free_cli, load
from lmh.errors import ArgumentError
from lmh.finetune import LabelFree, Progress, distill, seconds_per_epoch
from lmh.zoo import Batches

QUICK = LabelFree(epochs=1, qcfs_epochs=2)
DATA = ("--data", "digits", "--calibration-samples", 128, "--test-samples", 90)


@pytest.fixture(scope="module")
def digits() -> Batches:
    data = zoo.load_data("digits")
    order = zoo.seeded_order(data.train, 0)[:256]
    return Batches(data.train, zoo.card("digits-cnn").preprocessing, 64, order, shuffle_seed=0)


@pytest.fixture(scope="module")
def conversion(digits: Batches) -> Conversion:
    return convert(zoo.load("digits-cnn"), 1, data=digits)


def divergence(conversion: Conversion, x: Tensor) -> float:
    with torch.no_grad():
        wanted, given = (network(x).log_softmax(1) for network in (conversion.prepared.model, conversion.snn))
    return float((wanted.exp() * (wanted - given)).sum(1).mean())


def same(first: Conversion, second: Conversion) -> bool:
    there = second.snn.state_dict()
    return all(torch.equal(value, there[name]) for name, value in first.snn.state_dict().items())


class TestDistill:
    def test_each_stage_brings_the_network_nearer_to_its_ann(self, conversion: Conversion, digits: Batches) -> None:
        test = zoo.load_data("digits").test
        x = digits.preprocessing(test.images(torch.arange(len(test))))
        corrected = distill(conversion, digits, LabelFree(epochs=0, qcfs_epochs=10))
        through = distill(conversion, digits, LabelFree(epochs=20, qcfs_epochs=10))
        found = [divergence(stage, x) for stage in (conversion, corrected, through)]
        assert found[1] < 0.4 * found[0]
        assert found[2] < 0.85 * found[1]

    def test_labels_are_not_read_and_nothing_is_changed(self, conversion: Conversion, digits: Batches) -> None:
        before = {name: value.clone() for name, value in conversion.snn.state_dict().items()}
        modes = {name: module.training for name, module in conversion.prepared.model.named_modules()}
        first = distill(conversion, digits, QUICK)
        wrong = [(x, torch.full((len(x),), 10_000)) for x, _ in digits]
        plain = [x for x, _ in digits]
        others = [distill(conversion, found, QUICK) for found in (wrong, plain)]
        assert same(*others)
        assert same(first, distill(conversion, digits, QUICK))
        assert not same(first, others[0])  # the order of each epoch is drawn anew by Batches alone
        assert all(torch.equal(value, before[name]) for name, value in conversion.snn.state_dict().items())
        assert {name: module.training for name, module in conversion.prepared.model.named_modules()} == modes

    def test_the_calibration_names_what_was_done_and_replays_it(self, digits: Batches) -> None:
        ann = zoo.load("digits-cnn")
        first = convert(ann, 2, data=digits)
        settings = replace(QUICK, reconstruction=Reconstruction(steps=3))
        found = distill(first, digits, settings)
        names = [part.partition("(")[0] for part in found.calibration.policy.split(" + ")]
        assert names == ["MinError", "QCFS", "WeightRegression", "SpikingMinError", "Reconstruction", "STBP"]
        assert (found.calibration.samples, found.report.timesteps) == (256, 2)
        assert same(convert(ann, 2, data=digits, calibration=found.calibration), found)

    def test_batchnorm_keeps_the_statistics_of_the_ann(self, conversion: Conversion, digits: Batches) -> None:
        found = distill(conversion, digits, QUICK).snn.state_dict()
        kept = {name: value for name, value in conversion.snn.state_dict().items() if "running" in name}
        assert kept
        assert all(torch.equal(value, found[name]) for name, value in kept.items())

    def test_without_the_quantised_stage_it_goes_on_from_the_conversion(
        self, conversion: Conversion, digits: Batches
    ) -> None:
        still = LabelFree(epochs=1, qcfs_epochs=0, corrections=(), lr=1e-12, neuron_lr=0.0)
        once = distill(conversion, digits, QUICK)
        again = distill(once, digits, still)
        there = again.snn.state_dict()
        for name, value in once.snn.state_dict().items():
            assert torch.allclose(value, there[name], atol=1e-6), name
        assert again.calibration.policy == f"{once.calibration.policy} + STBP(1 epochs)"

    def test_vectors_and_event_frames(self) -> None:
        mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        x = torch.rand(32, 4)
        assert distill(convert(mlp, 2, data=x), [x], QUICK).snn(x).shape == (32, 2)
        frames = torch.rand(3, 8, 2, 8, 8)
        events = convert(nets.conv_net().eval(), 3, data=[frames], encoding=EventFrames())
        found = distill(events, [frames, frames], QUICK)
        assert found.snn(frames).shape == events.snn(frames).shape
        assert found.calibration.samples == 16

    def test_progress_counts_every_batch_of_both_stages(self, conversion: Conversion, digits: Batches) -> None:
        told: list[Progress] = []
        distill(conversion, digits, QUICK, on_progress=told.append)
        assert [progress.stage for progress in told] == ["QCFS"] * 8 + ["STBP"] * 4

    def test_thresholds_come_from_the_still_images(self, conversion: Conversion, digits: Batches) -> None:
        noise = [torch.randn(64, *digits.preprocessing.input_size)]
        settings = LabelFree(epochs=1, qcfs_epochs=1, corrections=(), lr=1e-12, qcfs_lr=1e-12, neuron_lr=0.0)
        found = distill(conversion, noise, settings, still=digits)
        assert same(found, distill(conversion, digits, settings, still=list(digits)))
        assert not same(found, distill(conversion, noise, settings))

    def test_what_is_wrong_is_refused_with_advice(self, conversion: Conversion, digits: Batches) -> None:
        with pytest.raises(ArgumentError, match=r"distill: conversion is .*Pass what convert returned"):
            distill(conversion.snn, digits)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match=r"settings is 20; .*Pass LabelFree\(epochs=20\)"):
            distill(conversion, digits, 20)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="batches that can be read once for each epoch"):
            distill(conversion, iter(digits))
        with pytest.raises(ArgumentError, match="at least one epoch"):
            LabelFree(epochs=0, qcfs_epochs=0)

    def test_an_epoch_is_timed_without_changing_anything(self, conversion: Conversion, digits: Batches) -> None:
        before = {name: value.clone() for name, value in conversion.snn.state_dict().items()}
        quantised, spiking = seconds_per_epoch(conversion, digits)
        assert quantised > 0
        assert spiking > 0
        assert all(torch.equal(value, before[name]) for name, value in conversion.snn.state_dict().items())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
class TestCommand:
    def test_distill_says_images_and_steps_and_is_replayed_from_the_file(self) -> None:
        done = succeed("convert", "zoo:digits-cnn", "-T", 1, *DATA, "--distill", 2, "--json")
        assert "128 images, 6 epochs quantised and 2 through the spikes, 16 batches of 64" in done.err
        names = [part.partition("(")[0] for part in done.result["calibration"].split(" + ")]
        assert names == ["MinError", "QCFS", "WeightRegression", "SpikingMinError", "STBP"]
        again = succeed("report", done.result["output"], "--data", "digits", "--test-samples", 90, "--json").result
        assert again["snn_accuracy"] == done.result["snn_accuracy"]
        assert len(load(done.result["output"]).meta["lmh_manifest"]["sites"]) == 4

    def test_named_corrections_and_reconstruction_come_between_its_stages(self) -> None:
        options = ("--distill", 1, "--correct", "biases", "--reconstruct", 2)
        result = succeed("convert", "zoo:digits-cnn", "-T", 2, *DATA, *options, "--json").result
        names = [part.partition("(")[0] for part in result["calibration"].split(" + ")]
        assert names == ["MinError", "QCFS", "BiasCorrection", "Reconstruction", "STBP"]

    def test_auto_keeps_what_has_the_least_divergence_on_held_out_samples(self) -> None:
        done = succeed("convert", "zoo:digits-cnn", "-T", 1, *DATA, "--json")
        said = dict(re.findall(r"auto: (.*): divergence ([\d.]+) on 16 held-out", done.err))
        assert len(said) == 2
        assert done.result["calibration"].startswith(min(said, key=lambda name: float(said[name])))
        assert "SpikingMinError" in done.result["calibration"]
        assert done.result["calibration"].endswith("112 samples")

    def test_a_budget_is_spent_on_distillation(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(label_free_cli, "MOST_EPOCHS", 4)
        done = succeed("convert", "zoo:digits-cnn", "-T", 1, *DATA, "--budget", 60, "--json")
        assert "12 epochs quantised and 4 through the spikes" in done.err
        said = dict(re.findall(r"auto: (.*): divergence ([\d.]+) on 16 held-out", done.err))
        assert [name.rpartition(" + ")[2] for name in said][1:] == ["SpikingMinError()", "STBP(4 epochs)"]
        assert done.result["calibration"].startswith(min(said, key=lambda name: float(said[name])))

    def test_a_budget_that_is_too_small_says_what_an_epoch_takes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(label_free_cli, "OPERATIONS_PER_MINUTE", 1e30)
        done = succeed("convert", "zoo:digits-cnn", "-T", 1, *DATA, "--budget", 0.001, "--json")
        assert "leaves no time to distil: an epoch takes" in done.err
        assert "STBP" not in done.result["calibration"]

    @pytest.mark.parametrize("option", [("--distill", 1), ("--budget", 1)])
    def test_without_data_they_are_refused(self, option: tuple[object, ...]) -> None:
        status, _, err = command("convert", "zoo:digits-cnn", "-T", 2, *option)
        assert status == 2
        assert f"{option[0]} needs --data" in err

    def test_auto_leaves_the_network_to_training_with_labels(self) -> None:
        done = succeed("convert", "zoo:digits-cnn", "-T", 1, *DATA, "--finetune", 1, "--train-samples", 64, "--json")
        assert done.result["calibration"] == "MinError(levels_per_step=0.5, base_levels=2, per channel), 128 samples"

    @pytest.mark.parametrize("named", [("--distill", 1), ("--budget", 1)])
    def test_labels_and_no_labels_exclude_each_other(self, named: tuple[object, ...]) -> None:
        status, _, err = command("convert", "zoo:digits-cnn", "-T", 2, *DATA, "--finetune", 1, *named)
        assert status == 2
        assert "--finetune trains from the ANN with labels, and --distill or --budget without them" in err

    @pytest.mark.parametrize("named", [("--calibration", "max"), ("--distill", 1), ("--correct", "biases")])
    def test_a_budget_and_what_it_decides_do_not_go_together(self, named: tuple[object, ...]) -> None:
        status, _, err = command("convert", "zoo:digits-cnn", "-T", 2, *DATA, "--budget", 1, *named)
        assert status == 2
        assert "Leave out --budget, or those" in err

    def test_auto_leaves_out_what_would_take_long_or_much_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        small = ("convert", "zoo:digits-cnn", "-T", 1, *DATA, "--json")
        monkeypatch.setattr(label_free_cli, "OPERATIONS_PER_MINUTE", 1e9)
        slow = succeed(*small)
        assert re.search(r"corrections out: they would take about \d+ min. --budget \d+ allows them", slow.err)
        monkeypatch.setattr(label_free_cli, "MEMORY", 1e5)
        large = succeed(*small)
        assert re.search(r"corrections out: they need 16 samples, and \d of 112 fit into 0 GB", large.err)
        for done in (slow, large):
            assert done.result["calibration"].endswith("per channel), 128 samples")
        named = succeed(*small, "--correct", "biases")
        assert "--calibration-samples takes fewer" in named.err


def test_the_estimate_of_memory_is_of_the_right_size() -> None:
    prepared = convert(zoo.load("digits-cnn"), 4, example_input=torch.zeros(1, 1, 8, 8)).prepared
    cost = correction_cost(prepared, [torch.zeros(1, 1, 8, 8)], 100, 4)
    largest = 32 * 8 * 8  # of block.relu1, in floats
    assert cost.memory % (largest * 4 * 4 * 100) == 0
    assert cost.memory == 2 * correction_cost(prepared, [torch.zeros(1, 1, 8, 8)], 100, 2).memory
