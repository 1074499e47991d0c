"""``lmh inspect`` on files of every kind."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import onnx
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from commands import command, succeed
from lmh import zoo
from lmh.convert import convert, load_source
from lmh.convert.export import Project, export_nir, export_onnx, export_pt2
from lmh.errors import SourceError


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def inspected(*arguments: object) -> dict[str, Any]:
    return succeed("inspect", *arguments, "--json").result


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
    assert "is an export of a spiking network" in known["problem"]
    assert "convert the ANN that it came from" in known["problem"]
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
    for kind in ("no model file that is known", "torch.save", ".safetensors", "ONNX", ".pt2", "TorchScript"):
        assert kind in err
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
    options = ("--module", "my_net_of_inspect", "-T", 2, "--input-size", 4, "--json", "--dry-run")
    assert succeed("convert", "net.pt", *options).result["nodes"]["converted"] == ["r"]


def test_a_network_says_its_accuracies() -> None:
    line = next(
        line for line in succeed("inspect", "zoo:digits-cnn-t4").out.splitlines() if line.startswith("accuracy")
    )
    assert re.fullmatch(r"accuracy in % at t = 1…T, n = 360: ([\d.]+, ){3}[\d.]+; its ANN [\d.]+", line)
    assert "Nothing fits" in succeed("zoo", "list", "--data", "nosuch").err


def test_an_export_to_onnx_says_what_it_is_and_is_no_source() -> None:
    pytest.importorskip("onnxscript")
    snn = convert(zoo.load("digits-cnn"), 2, example_input=torch.zeros(1, 1, 8, 8))
    export_onnx(snn, "net.onnx")
    export_pt2(snn, "net.pt2")
    Path("net.nir").write_bytes(b"\x89HDF\r\n\x1a\n with nodes and edges")
    assert "convert the ANN that it came from" in inspected("net.onnx")["problem"]
    for file in ("net.onnx", "net.pt2", "net.nir"):
        with pytest.raises(SourceError, match=rf"{file}: is an export of a spiking network.*convert the ANN"):
            load_source(file, trust_pickle=True)
        status, _, err = command("export", file, "--to", "pt2", "--output", "out.pt2")
        assert status == 1
        assert "Name the .safetensors that it was exported from" in err


@pytest.mark.parametrize("verb", [("export", "--to", "pt2"), ("report", "--data", "digits")], ids=["export", "report"])
def test_a_file_of_another_kind_is_no_saved_network_and_the_advice_converts_it(verb: tuple[str, ...]) -> None:
    name, *options = verb
    torch.save(zoo.load("digits-cnn").state_dict(), "my net.pt")
    Path("empty.pt").touch()
    status, _, err = command(name, "my net.pt", *options)
    assert status == 1
    assert "my net.pt: is a file of torch.save; expected a spiking network that lmh-convert wrote" in err
    words = shlex.split(err.partition("Convert it first: ")[2].strip().removesuffix("."))
    assert words == ["lmh-convert", "my net.pt", "--timesteps", "4"]
    assert command("convert", *words[1:])[0] == 0
    status, _, err = command(name, "empty.pt", *options)
    assert status == 1
    assert "empty.pt: is empty; expected a spiking network" in err


def test_tensors_that_are_no_spiking_network_are_to_be_converted_first() -> None:
    safetensors.torch.save_file(zoo.load("digits-cnn").state_dict(), "net.safetensors")
    status, _, err = command("export", "net.safetensors", "--to", "pt2")
    assert status == 1
    assert "Convert it first: lmh-convert net.safetensors --timesteps 4." in err


def test_the_next_command_keeps_what_the_file_needed() -> None:
    program = torch.export.export(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), (torch.zeros(1, 4),)
    )
    torch.export.save(program, "net.pt2")
    step = inspected("net.pt2", "--trust-pickle")["next"]
    assert step == "lmh-convert net.pt2 --timesteps 4 --trust-pickle --dry-run"
    status, _, err = command("convert", *step.split()[1:], "--input-size", "4")
    assert status == 0, err


class Two(nn.Module):
    """Takes two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        return self.out(torch.relu(self.a(u) + self.b(v)))


def test_of_a_network_with_two_inputs_the_next_step_is_the_call() -> None:
    torch.onnx.export(Two().eval(), (torch.rand(2, 4), torch.rand(2, 5)), "two.onnx", dynamo=False)
    step = inspected("two.onnx")["next"]
    assert (
        "from lmh.convert import convert, load_source; model = load_source('two.onnx').model; convert(model, 4, "
        in step
    )
    converted = convert(load_source("two.onnx").model, 4, data=[(torch.rand(8, 4), torch.rand(8, 5))])
    assert len(converted.snn(torch.rand(2, 4), torch.rand(2, 5))) == 2


def test_an_architecture_is_described_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    known = inspected("torchvision:resnet18")
    assert (known["parameters"], known["num_classes"], known["input_size"]) == (11689512, 1000, [3, 224, 224])
    status, out, _ = command("inspect", "zoo:digits-cnn")
    assert status == 0
    for words in ("21,682 parameters, 10 classes, input 1 × 8 × 8", "4 Conv2d", "lmh zoo show digits-cnn"):
        assert words in out
    assert command("zoo", "show", "digits-cnn")[0] == 0
    assert command("convert", *inspected("zoo:digits-cnn")["next"].split()[1:])[0] == 0
    assert inspected("zoo:cifar10-resnet20-a")["next"].startswith("lmh-convert FILE --arch cifar10-resnet20-a ")
    assert "`lmh zoo list`" in command("inspect", "zoo:digits-cn")[2]


def test_missing_external_data_is_to_be_copied_beside_the_file() -> None:
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.zeros(1, 4)
    torch.onnx.export(net, (x,), "whole.onnx", dynamo=False)
    onnx.save_model(
        onnx.load("whole.onnx"), "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0
    )
    Path("net.data").rename("moved")
    with pytest.raises(SourceError, match=r"net\.onnx: its weights are in net\.data, .*Copy net\.data beside it\."):
        load_source("net.onnx")
    Path("moved").rename("net.data")
    torch.testing.assert_close(load_source("net.onnx").model(x), net(x))


def test_a_cut_archive_names_every_kind_that_is_read() -> None:
    torch.save(zoo.load("digits-cnn").state_dict(), "net.pt")
    Path("net.pt").write_bytes(Path("net.pt").read_bytes()[:2000])
    _, _, err = command("inspect", "net.pt")
    assert "zip file" not in err
    for kind in ("truncated or damaged", ".safetensors", "ONNX", ".pt2", "TorchScript", "Copy it again"):
        assert kind in err
