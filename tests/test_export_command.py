"""``lmh-convert --export`` and ``lmh export``: the files they write, beside the network and of the same answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from commands import command, succeed
from lmh.convert import load

nir = pytest.importorskip("nir")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_conversion_also_writes_the_formats_asked_for() -> None:
    formats = ("--export", "onnx", "--export", "pt2", "--export", "nir-project")
    exports = succeed("convert", "zoo:digits-cnn", "-T", 2, *formats, "--json").result["exports"]
    names = [f"digits-cnn-snn-T2.{ending}" for ending in ("onnx", "pt2", "nir")]
    assert [export["file"] for export in exports] == names
    assert exports[0]["lost"] == exports[1]["lost"] == {}
    assert exports[2]["lost"].keys() == {"stem.2", "block.relu1", "block.relu2", "down.2"}
    snn, x = load("digits-cnn-snn-T2.safetensors"), torch.randn(5, 1, 8, 8)
    (answer,) = onnxruntime.InferenceSession(names[0]).run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), snn(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.export.load(names[1]).module()(x), snn(x), rtol=1e-4, atol=1e-4)
    assert len(nir.read(names[2]).nodes) > 4


def test_without_export_the_list_is_empty() -> None:
    assert command("convert", "zoo:digits-cnn", "-T", 2, "--json").result["exports"] == []


@pytest.mark.parametrize("name", ["onnx", "pt2", "nir-project"])
def test_a_saved_network_is_exported_beside_itself(name: str) -> None:
    found = succeed("export", "zoo:digits-cnn-t4", "--to", name, "--json").result
    ending = name.partition("-")[0]
    assert (found["file"], found["format"]) == (f"digits-cnn-t4.{ending}", ending)
    assert Path(found["file"]).stat().st_size == found["bytes"]


def test_exact_nir_refuses_and_names_the_mode_that_does_not() -> None:
    status, out, err = command("export", "zoo:digits-cnn-t4", "--to", "nir")
    assert (status, out) == (1, "")
    assert "soft reset" in err
    assert "nir-project" in err
    assert not list(Path().iterdir())


def test_an_export_never_overwrites_what_was_read() -> None:
    command("convert", "zoo:digits-cnn", "-T", 2, "--output", "net.pt2")
    status, _, err = command("export", "net.pt2", "--to", "pt2", "--output", "net.pt2")
    assert status == 2
    assert "the network itself" in err
    Path("digits-cnn.onnx").write_bytes(b"my model")
    arguments = ("-T", 2, "--output", "digits-cnn.safetensors", "--export", "onnx")
    status, _, err = command("convert", "digits-cnn.onnx", *arguments)
    assert status == 2
    assert "digits-cnn.onnx is the source" in err


def test_an_export_that_is_refused_loses_nothing_else() -> None:
    refused = command("convert", "zoo:digits-cnn", "-T", 2, "--export", "nir", "--export", "onnx", "--json")
    result = refused.result
    assert refused.status == 1
    assert [export["format"] for export in result["exports"]] == ["onnx"]
    assert "soft reset" in result["failed_exports"]["nir"]
    status, out, _ = command("convert", "zoo:digits-cnn", "-T", 2, "--export", "nir")
    assert status == 1
    assert "Not exported to nir: " in out
    assert "Written: digits-cnn-snn-T2.safetensors" in out
