"""``lmh inspect`` on files of every kind."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lmh import zoo
from lmh.cli import lmh, run
from lmh.convert import convert
from lmh.convert.export import Project, export_nir, export_pt2


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def command(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = run(lmh, list(map(str, arguments)))
    return status, out.getvalue(), err.getvalue()


def inspected(*arguments: object) -> dict[str, Any]:
    status, out, err = command("inspect", *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


def test_a_state_dict_is_recognised_and_its_layers_counted() -> None:
    torch.save(zoo.load("digits-cnn").state_dict(), "net.pt")
    known = inspected("net.pt")
    assert (known["kind"], known["architecture"], known["num_classes"]) == ("a file of torch.save", "digits-cnn", 10)
    assert known["parameters"] == 21682
    assert known["layers"]["Conv2d"] == 4
    assert known["problem"] is None
    status, out, _ = command("inspect", "net.pt")
    assert status == 0
    for words in ("21,682 parameters", "4 Conv2d", "Recognised digits-cnn", "lmh-convert net.pt --timesteps 4"):
        assert words in out


def test_a_module_of_torch_alone_needs_no_architecture() -> None:
    torch.save(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), "net.pt")
    known = inspected("net.pt")
    assert known["layers"] == {"Linear": 2, "ReLU": 1}
    assert known["architecture"] is None


def test_an_onnx_file_shows_its_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.zeros(1, 4)
    torch.onnx.export(net, (x,), "net.onnx", dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("n")},))
    known = inspected("net.onnx")
    assert known["kind"] == "an ONNX model"
    assert known["operators"] == {"Gemm": 2, "Relu": 1}
    assert known["layers"] == {"Linear": 2, "ReLU": 1}


def test_exports_of_a_spiking_network_say_why_they_are_no_source() -> None:
    snn = convert(zoo.load("digits-cnn"), 2, example_input=torch.zeros(1, 1, 8, 8))
    export_pt2(snn, "net.pt2")
    known = inspected("net.pt2")
    assert known["kind"] == "a torch.export archive (.pt2)"
    assert "--trust-pickle" in known["problem"]
    pytest.importorskip("nir")
    export_nir(snn, "net.nir", Project())
    known = inspected("net.nir")
    assert known["kind"] == "a NIR graph (HDF5)"
    assert known["operators"]["IF"] == 4
    assert "convert the ANN" in known["problem"]


def test_what_is_no_model_is_refused() -> None:
    Path("notes.pt").write_text("not a model")
    status, _, err = command("inspect", "notes.pt")
    assert status == 1
    assert "no PyTorch file" in err
    assert command("inspect", "missing.pt")[0] == 1


def test_a_damaged_network_of_ours_says_so() -> None:
    snn = Path(zoo.snn_path("zoo:digits-cnn-t4")).read_bytes()
    Path("net.safetensors").write_bytes(snn[:-100])
    status, out, _ = command("inspect", "net.safetensors")
    assert status == 0
    assert "cannot be converted" in out
    assert "Make or copy it again" in out


def test_the_users_own_class_is_read_with_module(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("my_net_of_inspect.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.a = nn.Linear(4, 2)\n        self.r = nn.ReLU()\n"
        "    def forward(self, x):\n        return self.r(self.a(x))\n"
    )
    monkeypatch.syspath_prepend(".")
    import my_net_of_inspect

    torch.save(my_net_of_inspect.Net(), "net.pt")
    assert "my_net_of_inspect" in inspected("net.pt")["problem"]
    assert inspected("net.pt", "--module", "my_net_of_inspect")["layers"] == {"Linear": 1, "ReLU": 1}
    status, out, err = command(
        "convert", "net.pt", "--module", "my_net_of_inspect", "-T", 2, "--input-size", 4, "--json", "--dry-run"
    )
    assert status == 0, err
    assert json.loads(out)["nodes"]["converted"] == ["r"]
