"""A published spiking network names the models of its release as the zoo does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from commands import command, succeed
from lmh.artifact import file_digest, read_snn
from lmh.convert import load
from lmh.zoo.models import download


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, home_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(download("digits-cnn"), "ann.safetensors")
    shutil.copy(download("digits-cnn"), "teacher.safetensors")
    options = ("--calibration-samples", 32, "--test-samples", 32, "--train-samples", 64, "--epochs", 1)
    succeed("finetune", "ann.safetensors", "-T", 2, "--data", "digits", "--strategy", "stbp", *options,
            "--teacher", "teacher.safetensors", "--output", "snn.safetensors")  # fmt: skip


def test_ann_and_teacher_of_the_release_are_named_as_in_the_zoo() -> None:
    before = read_snn(Path("snn.safetensors"))[1]
    assert Path(before["source"]["name"]).name == "ann.safetensors"
    succeed("zoo", "publish", "my-ann=ann.safetensors", "my-teacher=teacher.safetensors", "my-snn=snn.safetensors",
            "--data", "digits", "--out", "release")  # fmt: skip
    path = Path("release/my-snn.safetensors")
    after = read_snn(path)[1]
    assert (after["source"]["name"], after["teacher"]) == ("zoo:my-ann", "zoo:my-teacher")
    kept = {key: value for key, value in before.items() if key not in ("source", "teacher")}
    assert {key: after[key] for key in kept} == kept
    weights = json.loads(Path("release/my-snn.json").read_text())["weights"]
    assert (weights["sha256"], weights["size"]) == (file_digest(path), path.stat().st_size)

    for name in ("ann", "teacher", "snn"):
        Path(f"{name}.safetensors").unlink()
    succeed("zoo", "add", "release")
    assert load("zoo:my-snn").training is False
    assert "my-snn: good" in command("zoo", "verify", "my-snn").out
    measured = succeed("report", "zoo:my-snn", "--data", "digits", "--test-samples", 32, "--json").result
    assert measured["ann_accuracy"] > 0.9


def test_alone_it_stays_as_it_is() -> None:
    succeed("zoo", "publish", "my-snn=snn.safetensors", "--data", "digits", "--out", "release")
    assert Path("release/my-snn.safetensors").read_bytes() == Path("snn.safetensors").read_bytes()
