"""What nobody said must be said: assumed normalisation and sizes, and where ``lmh report`` gets them from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from commands import command, succeed
from lmh import convert, zoo
from lmh.artifact import read_snn

DIGITS = zoo.load_data("digits")
FAST = ("-T", 2, "--calibration-samples", 32, "--test-samples", 20, "--json")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def result(*arguments: object) -> dict[str, Any]:
    return succeed(*arguments).result


def manifest(file: str) -> dict[str, Any]:
    return read_snn(Path(file))[1]


def own_module(file: str) -> None:
    """A whole module of torch.nn's types, whose normalisation nothing says."""
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)), file)


def digits_npz(size: int) -> str:
    pixels = DIGITS.train.images(torch.arange(64)).float()
    images = torch.nn.functional.interpolate(pixels, (size, size)).byte().permute(0, 2, 3, 1).numpy()
    labels = np.arange(64) % 10
    np.savez("data.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    return "npz:data.npz"


def test_what_was_assumed_is_said_and_stays_with_the_file() -> None:
    own_module("own.pt")
    found = result("convert", "own.pt", "--data", "digits", *FAST)
    said = "Assumed, as nothing says it: input size 1,8,8, mean 0.5, std 0.5. Give --input-size, --mean, --std"
    assert any(said in notice for notice in found["notices"])
    assert manifest(found["output"])["preprocessing"]["assumed"] == ["input_size", "mean", "std"]
    again = result("report", found["output"], "--source", "own.pt", "--data", "digits", "--json")
    assert any(said in notice for notice in again["notices"])
    told = result("report", found["output"], "--source", "own.pt", "--data", "digits", "--mean", 0.3, "--json")
    assert not any("mean" in notice for notice in told["notices"])


def test_only_what_is_missing_is_assumed() -> None:
    own_module("own.pt")
    found = result("convert", "own.pt", "--data", "digits", "--mean", 0.3, *FAST)
    assert manifest(found["output"])["preprocessing"] == {
        "type": "Preprocessing", "input_size": [1, 8, 8], "mean": [0.3], "std": [0.5], "assumed": ["input_size", "std"],
    }  # fmt: skip
    known = result("convert", "zoo:digits-cnn", "--data", "digits", *FAST)
    assert manifest(known["output"])["preprocessing"]["assumed"] == []
    assert not any("Assumed" in notice for notice in known["notices"])


def test_images_that_are_resized_are_announced() -> None:
    found = result("convert", "zoo:digits-cnn", "--data", digits_npz(12), *FAST)
    assert any("resized from 12×12 to 8×8" in notice and "--input-size" in notice for notice in found["notices"])
    same = result("convert", "zoo:digits-cnn", "--data", digits_npz(8), *FAST)
    assert not any("resized" in notice for notice in same["notices"])


def test_the_samples_of_every_purpose_are_stated() -> None:
    tuned = ("--finetune", 1, "--train-samples", 100)
    done = succeed("convert", "zoo:digits-cnn", "--data", "digits", *tuned, *FAST)
    calibration = "calibration the first 32 of 1437 training samples, test 20 of 360, both in the order of seed 0"
    training = "fine-tuning on the first 100 of the same order, 500 after them held out"
    assert f"Samples: {calibration}." in done.err
    assert f"Samples: {training}." in done.err
    assert manifest(done.result["output"])["samples"] == f"{calibration}; {training}"


def test_a_network_that_the_api_saved_is_measured_once_its_normalisation_is_told() -> None:
    ann = zoo.load("digits-cnn")
    convert.save(convert.convert(ann, 2, example_input=torch.zeros(1, 1, 8, 8)), "api.safetensors")
    torch.save(ann, "ann.pt")
    arguments = ("report", "api.safetensors", "--source", "ann.pt", "--data", "digits")
    status, _, err = command(*arguments)
    assert status == 2
    assert "--mean and --std" in err
    card = zoo.card("digits-cnn").preprocessing
    found = result(*arguments, "--mean", card.mean[0], "--std", card.std[0], "--json")
    assert found["samples"] == 360
    assert found["ann_accuracy"] == zoo.record("digits-cnn")["accuracy"]
    assert found["snn_accuracy"][-1] > 0.5


def test_normalisation_that_does_not_fit_is_bad_usage_in_a_report_too() -> None:
    status, _, err = command("report", "zoo:digits-cnn-t4", "--data", "digits", "--mean", "0.5,0.5")
    assert status == 2
    assert "2 means" in err


def test_a_signal_of_another_form_converts_without_data_and_is_told_that_data_are_images() -> None:
    torch.save(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)), "mlp.pt")
    found = result("convert", "mlp.pt", "-T", 2, "--input-size", 4, "--json")
    assert [site["path"] for site in found["sites"]] == ["2"]
    status, _, err = command("convert", "mlp.pt", "-T", 2, "--input-size", 4, "--data", "digits")
    assert status == 1
    assert "expected C,H,W" in err


def test_a_test_class_that_training_does_not_have_is_refused_by_name() -> None:
    for part, name in (("train", "cat"), ("test", "cat"), ("test", "dog")):
        folder = Path("photos", part, name)
        folder.mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / "0.png")
    status, _, err = command("convert", "zoo:digits-cnn", "--data", "folder:photos", *FAST[:-1])
    assert status == 1
    assert "has the classes dog" in err


def test_a_dry_run_that_finds_problems_fails() -> None:
    torch.save(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), "tanh.pt")
    refused = command("convert", "tanh.pt", "-T", 2, "--input-size", 4, "--dry-run", "--json")
    assert refused.status == 1
    assert len(refused.result["problems"]) == 1
    succeed("convert", "zoo:digits-cnn", "-T", 2, "--dry-run")
