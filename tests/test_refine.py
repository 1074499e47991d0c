"""refine and its command line: corrections, then reconstruction, named in order and replayed from file and value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nets
from commands import command, succeed
from lmh import convert as conversion_module
from lmh import sites
from lmh.artifact import read_snn
from lmh.calibrate import (
    BiasCorrection,
    BlockResult,
    InitialPotential,
    Max,
    Reconstruction,
    SpikingMinError,
    WeightRegression,
)
from lmh.convert import Conversion, EventFrames, convert, refine
from lmh.convert.calibration_cli import CORRECTIONS
from lmh.errors import ArgumentError, CalibrationError
from lmh.records import short_text

QUICK = Reconstruction(steps=20, batch_size=16)
ARGUMENTS = ("convert", "zoo:digits-cnn", "-T", 2)
DATA = ("--data", "digits", "--calibration-samples", 96, "--test-samples", 60)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(48, 2, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def first(images: Tensor) -> Conversion:
    torch.manual_seed(0)
    return convert(nets.conv_net().eval(), 3, data=images)


def same(one: nn.Module, other: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(one(x), other(x))


def error(conversion: Conversion, x: Tensor) -> float:
    with torch.no_grad():
        wanted = conversion.prepared.model(x)
        return float((conversion.snn(x) - wanted).square().sum() / wanted.square().sum())


class TestRefine:
    def test_what_was_done_is_named_in_order_and_replayed(self, first: Conversion, images: Tensor) -> None:
        done = refine(first, images, corrections=[BiasCorrection(), InitialPotential()], reconstruction=QUICK)
        names = [part.partition("(")[0] for part in done.calibration.policy.split(" + ")]
        assert names == ["MinError", "BiasCorrection", "InitialPotential", "Reconstruction"]
        assert done.report.calibration == f"{done.calibration.policy}, 48 samples"
        assert any(name.endswith("raw_threshold") for name in done.calibration.tensors), done.calibration.tensors.keys()
        again = convert(first.prepared.model, 3, data=images, calibration=done.calibration)
        assert same(again.snn, done.snn, images)
        assert not same(first.snn, done.snn, images)

    def test_the_first_conversion_stays_and_its_notices_are_not_repeated(self, images: Tensor) -> None:
        first = convert(nets.conv_net().eval(), 3, example_input=images[:1], calibration=Max(), data=images)
        before = {name: value.clone() for name, value in first.snn.state_dict().items()}
        done = refine(first, images, corrections=BiasCorrection(), reconstruction=QUICK)
        assert all(torch.equal(value, before[name]) for name, value in first.snn.state_dict().items())
        assert done.report.notices == first.report.notices

    def test_each_stage_brings_the_network_closer(self, first: Conversion, images: Tensor) -> None:
        corrected = refine(first, images, corrections=[WeightRegression(), SpikingMinError()])
        assert error(corrected, images) < 0.8 * error(first, images)
        told: list[BlockResult] = []
        refine(first, images, reconstruction=QUICK, on_block=told.append)
        assert any(result.after < result.before for result in told)

    def test_an_iterator_serves_both_stages(self, first: Conversion, images: Tensor) -> None:
        corrections = [BiasCorrection()]
        once = refine(first, iter([(images, "labels")]), corrections=corrections, reconstruction=QUICK)
        assert same(once.snn, refine(first, images, corrections=corrections, reconstruction=QUICK).snn, images)

    @pytest.mark.parametrize(
        "stage", [{"corrections": SpikingMinError()}, {"reconstruction": Reconstruction(1, neuron_lr=0, weight_lr=0)}]
    )
    def test_each_stage_goes_on_from_the_network_as_it_is(self, stage: dict[str, Any]) -> None:
        first = convert(nets.two_layers(), 3, data=torch.rand(48, 4))
        first.snn.get_parameter("2.bias").data.add_(1)
        done = refine(first, torch.rand(48, 4), **stage)
        assert torch.equal(done.snn.get_parameter("2.bias"), first.snn.get_parameter("2.bias"))

    def test_without_any_stage_it_is_the_same(self, first: Conversion, images: Tensor) -> None:
        assert refine(first, images) is first

    def test_every_block_is_told_of(self, first: Conversion, images: Tensor) -> None:
        told: list[BlockResult] = []
        refine(first, images, reconstruction=QUICK, on_block=told.append)
        assert [path for result in told for path in result.block.sites] == list(sites(first.snn))

    def test_event_frames_are_corrected_and_not_reconstructed(self) -> None:
        frames = torch.rand(3, 8, 2, 8, 8)
        first = convert(nets.conv_net().eval(), 3, data=[frames], encoding=EventFrames())
        assert refine(first, [frames], corrections=BiasCorrection()).calibration.samples == 8
        with pytest.raises(ArgumentError, match="reconstruct: the network takes event frames"):
            refine(first, [frames], reconstruction=QUICK)

    def test_what_is_wrong_is_refused_with_advice(self, first: Conversion, images: Tensor) -> None:
        with pytest.raises(ArgumentError, match=r"refine: conversion is .*Pass what convert returned"):
            refine(first.snn, images, corrections=BiasCorrection())  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match=r"reconstruction is 200; .*Pass Reconstruction\(steps=200\)"):
            refine(first, images, reconstruction=200)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="refine: data is the string 'digits'"):
            refine(first, "digits", corrections=BiasCorrection())
        with pytest.raises(CalibrationError, match="at least one sample"):
            refine(first, [], corrections=BiasCorrection())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestCommand:
    def test_stages_come_in_their_fixed_order_and_stay_with_the_file(self, folder: Path) -> None:
        options = ("--reconstruct", 5, "--correct", "weights", "--correct", "thresholds", "--calibration", "balancing")
        done = succeed(*ARGUMENTS, *DATA, *options, "--json")
        result, err = done.result, done.err
        names = [part.partition("(")[0] for part in result["calibration"].split(" + ")]
        assert names == ["LocalThresholdBalancing", "WeightRegression", "SpikingMinError", "Reconstruction"]
        assert result["calibration"].endswith("Reconstruction(steps=5), 96 samples")
        assert err.index("calibrating") < err.index("correcting layer by layer") < err.index("block up to stem.2")
        _, manifest = read_snn(folder / result["output"])
        assert result["calibration"].startswith(manifest["calibration"]["policy"])
        assert manifest["calibration"]["samples"] == 96
        snn = conversion_module.load(result["output"])
        assert snn.meta["lmh_manifest"]["calibration"] == manifest["calibration"]
        report = succeed("report", result["output"], *DATA[:2], "--test-samples", 60, "--json").result
        assert report["snn_accuracy"] == result["snn_accuracy"]

    def test_corrections_pay(self, folder: Path) -> None:
        def output_error(*options: object) -> float:
            return succeed(*ARGUMENTS, *DATA, *options, "--json").result["output_error"]

        corrected = output_error("--correct", "weights", "--correct", "thresholds")
        assert corrected < 0.92 * output_error("--calibration", "minerror")

    @pytest.mark.parametrize("name", CORRECTIONS)
    def test_every_correction_works_by_name(self, name: str, folder: Path) -> None:
        result = succeed(*ARGUMENTS, *DATA, "--correct", name, "--json").result
        assert f" + {short_text(CORRECTIONS[name])}, 96 samples" in result["calibration"]
        assert result["snn_accuracy"][-1] > 0.5

    @pytest.mark.parametrize(("name", "shown"), [("balancing", "LocalThresholdBalancing"), ("kl", "KLDivergence")])
    def test_the_policies_of_this_page_work_by_name(self, name: str, shown: str, folder: Path) -> None:
        result = succeed(*ARGUMENTS, *DATA, "--calibration", name, "--json").result
        assert result["calibration"].startswith(f"{shown}(")
        assert result["snn_accuracy"][-1] > 0.5

    def test_diagnose_prints_a_row_for_each_site(self, folder: Path) -> None:
        result = succeed(*ARGUMENTS, *DATA, "--diagnose", "--json").result
        diagnosis: dict[str, Any] = result["diagnosis"]
        assert (diagnosis["timesteps"], diagnosis["samples"]) == (2, 96)
        assert [row["path"] for row in diagnosis["rows"]] == [site["path"] for site in result["sites"]]
        for row in diagnosis["rows"]:
            parts = sum(row[cause] for cause in ("inherited", "clipping", "rounding", "timing"))
            assert row["total"] == pytest.approx(parts)
        status, out, _ = command(*ARGUMENTS, *DATA, "--diagnose")
        assert status == 0
        assert all(word in out for word in ("inherited", "clipping", "rounding", "timing", "n = 96"))
        row = next(line for line in out.splitlines() if "down.2" in line and f"{100 * parts:.1f}" in line)
        assert f"{100 * diagnosis['rows'][-1]['timing']:.1f}" in row

    @pytest.mark.parametrize("option", [("--correct", "weights"), ("--reconstruct", 5), ("--diagnose",)])
    def test_without_data_they_are_refused(self, option: tuple[object, ...], folder: Path) -> None:
        status, _, err = command(*ARGUMENTS, *option)
        assert status == 2
        assert f"{option[0]} needs --data" in err
        assert list(folder.iterdir()) == []

    def test_an_unknown_correction_names_the_known_ones(self, folder: Path) -> None:
        status, _, err = command(*ARGUMENTS, *DATA, "--correct", "bias")
        assert status == 2
        assert all(name in err for name in CORRECTIONS)
