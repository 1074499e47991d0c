"""Published weights in float16."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import command, succeed
from lmh import zoo
from lmh.artifact import file_digest, read_tensors
from lmh.zoo import half_cli
from lmh.zoo.models import download


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, home_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def card_of(name: str) -> dict[str, Any]:
    return json.loads(Path("release", f"{name}.json").read_text())


def test_weights_are_halved_where_no_accuracy_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--data", "digits", "--half", "--out", "release")
    files = [f"{name}={download(f'digits-{name}')}" for name in ("cnn", "cnn-t4")]
    monkeypatch.setattr(half_cli, "UNCHANGED", 0.02)  # 7 of 360 images, as CPUs differ
    done = succeed("zoo", "publish", *files, *options)
    for name in ("cnn", "cnn-t4"):
        known, small = card_of(name), Path("release", f"{name}.safetensors")
        whole, halves = (read_tensors(path)[0] for path in (download(f"digits-{name}"), small))
        layers = {key for key, value in halves.items() if value.dtype == torch.float16}
        assert layers == {key for key, value in whole.items() if key.endswith("weight") and value.ndim > 1}
        assert all(torch.equal(halves[key], whole[key].half() if key in layers else whole[key]) for key in whole)
        assert known["weights"]["sha256"] == file_digest(small)
        assert small.stat().st_size < 0.65 * download(f"digits-{name}").stat().st_size
        assert re.search(rf"{name}: accuracy [\d./ ]+ % in float16 and [\d./ ]+ % in float32; [\d,]+ bytes", done.err)
    assert card_of("cnn")["ann_accuracy"] == pytest.approx(zoo.model_card("digits-cnn").ann_accuracy, abs=0.02)
    succeed("zoo", "add", "release")
    assert zoo.load("cnn").stem[0].weight.dtype == torch.float32
    found = succeed("report", "zoo:cnn-t4", "--data", "digits", "--json").result
    assert found["snn_accuracy"] == card_of("cnn-t4")["accuracy"]
    monkeypatch.setattr(half_cli, "halved", lambda name, tensor: 0 * tensor)
    done = succeed("zoo", "publish", files[0], *options)
    assert "cnn: stays in float32; accuracy" in done.err
    assert Path("release/cnn.safetensors").read_bytes() == download("digits-cnn").read_bytes()
    refused = command("zoo", "publish", files[0], "--half", "--out", "release")
    assert "--half needs --data: what float16 changes is measured" in refused.err


def test_a_value_beyond_float16_stays() -> None:
    assert half_cli.halved("fc.weight", torch.full((1, 2), 1e5)).dtype == torch.float32
