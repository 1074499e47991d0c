"""TorchScript and torch.export files as sources: by their graph where that is safe, else by their weights alone."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._export.serde.serialize import serialize

from commands import command, succeed
from lmh import convert, sites, zoo
from lmh.convert.files import FileKind, kind_of_file
from lmh.convert.programs import exported_weights, script_weights
from lmh.errors import ArchitectureError, ArgumentError, LMHError, SourceError, UnsafePickleError
from lmh.torchvision_shim import torchvision

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def digits(num_classes: int = 10) -> nn.Module:
    """digits-cnn with weights of its own, so that nothing else can be loaded by mistake."""
    return zoo.card("digits-cnn").build(num_classes=num_classes).eval()


class Own(nn.Module):
    """[N, 1, 8, 8] → [N, 10], with weights that fit nothing known, and a decision on its input's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, 12), nn.Linear(12, 10)
        self.register_buffer("shift", torch.rand(12))

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 1
        return self.fc2(torch.relu(self.fc1(x.flatten(1)) + self.shift))


def scripted(net: nn.Module, path: Path) -> None:
    torch.jit.save(torch.jit.script(net), path)


def traced(net: nn.Module, path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.trace(net, torch.zeros(1, 1, 8, 8)), path)


def program(net: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(net, (torch.rand(2, 1, 8, 8),))


def exported(net: nn.Module, path: Path) -> None:
    with path.open("wb") as file:
        torch.export.save(program(net), file)


def exported_before(net: nn.Module, path: Path) -> None:
    """The layout of torch 2.1 to 2.7: entries without a folder around them."""
    artifact = serialize(program(net))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.8")
        archive.writestr("serialized_exported_program.json", artifact.exported_program)
        archive.writestr("serialized_state_dict.pt", artifact.state_dict)
        archive.writestr("serialized_constants.pt", artifact.constants)
        archive.writestr("serialized_example_inputs.pt", artifact.example_inputs)


SAVED: list[Callable[[nn.Module, Path], None]] = [scripted, traced, exported, exported_before]
EXPORTED = [exported, exported_before]


def named(function: Callable[..., None]) -> str:
    return function.__name__


@pytest.mark.parametrize("arch", [None, "digits-cnn"], ids=["recognised", "named"])
@pytest.mark.parametrize("name", ["net.pt", "net.pt2"])
@pytest.mark.parametrize("save", SAVED, ids=named)
def test_the_weights_of_a_known_architecture_are_enough(
    save: Callable[[nn.Module, Path], None], name: str, arch: str | None
) -> None:
    net = digits(num_classes=7)
    save(net, Path(name))
    source = convert.load_source(name, arch=arch)
    assert (source.card, source.num_classes) == (zoo.card("digits-cnn"), 7)
    assert source.model.state_dict().keys() == net.state_dict().keys()
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(source.model(x), net(x))
    kind = "TorchScript archive" if save in (scripted, traced) else "torch.export archive"
    assert f"Took the weights alone out of a {kind}" in source.notices[0]
    assert "was not checked" in source.notices[0]


def test_the_command_converts_them() -> None:
    scripted(digits(), Path("net.pt"))
    assert "Took the weights alone" in succeed("convert", "net.pt", "-T", 2).err
    assert convert.load("net-snn-T2.safetensors")(torch.rand(3, 1, 8, 8)).shape == (3, 10)


def test_nothing_of_a_program_is_run_for_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    for save in SAVED:
        save(digits(), Path("net.pt"))
        with monkeypatch.context() as patched:
            for owner, name in ((torch.jit, "load"), (torch.export, "load"), (torch._C, "import_ir_module")):
                patched.setattr(owner, name, lambda *_, **__: pytest.fail("loaded"))
            assert convert.load_source("net.pt").card is not None


def test_the_weights_are_those_that_torch_reads() -> None:
    models = torchvision().models
    net = models.shufflenet_v2_x0_5(weights=None, num_classes=3).eval()
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    tied[2].weight = tied[0].weight
    tied[0].bias.data = torch.arange(8, dtype=torch.float64)[::2]
    for model in (net, tied, nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1).half())):
        torch.jit.save(torch.jit.script(model), "net.pt")
        expected = torch.jit.load("net.pt").state_dict()
        got = script_weights(Path("net.pt"))
        assert got.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) and value.dtype == expected[key].dtype
                   for key, value in got.items())  # fmt: skip
    for save in EXPORTED:
        save(Own().eval(), Path("net.pt2"))
        kept = torch.export.load("net.pt2").state_dict
        weights = exported_weights(Path("net.pt2"))
        assert weights.keys() == kept.keys()
        assert all(torch.equal(value, kept[key]) for key, value in weights.items())


@pytest.mark.parametrize("save", [scripted, traced], ids=named)
@pytest.mark.parametrize("trust_pickle", [False, True])
def test_torchscript_of_ones_own_is_refused_with_a_way_out_that_works(
    save: Callable[[nn.Module, Path], None], trust_pickle: bool
) -> None:
    net = Own().eval()
    save(net, Path("net.pt"))
    with pytest.raises(SourceError) as caught:
        convert.load_source("net.pt", trust_pickle=trust_pickle)
    for part in (
        "net.pt: is a TorchScript archive",
        "cannot be rewritten",
        "expected the network that it was made from",
        "model.load_state_dict(torch.jit.load(file).state_dict())",
        "torch.save(model.state_dict(), file)",
    ):
        assert part in str(caught.value)
    again = Own().eval()
    again.load_state_dict(torch.jit.load("net.pt").state_dict())
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(again(x), net(x))
    assert len(sites(convert.convert(again, 2, data=x).snn)) == 1


def test_frozen_torchscript_has_no_weights_by_name_and_is_refused() -> None:
    torch.jit.save(torch.jit.freeze(torch.jit.script(digits())), "net.pt")
    assert script_weights(Path("net.pt")) == {}
    own = r"torch\.save\(model, file\) and pass --module my_pkg\.my_file.*lmh\.convert\.convert"
    with pytest.raises(SourceError, match=rf"is a TorchScript archive.*cannot be rewritten.*{own}"):
        convert.load_source("net.pt")


@pytest.mark.parametrize("save", EXPORTED, ids=named)
def test_an_exported_program_of_ones_own_is_converted_with_trust(save: Callable[[nn.Module, Path], None]) -> None:
    net = Own().eval()
    save(net, Path("net.pt2"))
    assert kind_of_file(Path("net.pt2")) is FileKind.EXPORTED
    with pytest.raises(UnsafePickleError, match=r"net\.pt2.*can run code.*--trust-pickle.*state_dict"):
        convert.load_source("net.pt2")
    source = convert.load_source("net.pt2", trust_pickle=True)
    assert (source.card, source.notices) == (None, ())
    assert source.model.state_dict().keys() == net.state_dict().keys()
    x = torch.rand(5, 1, 8, 8)
    assert torch.allclose(source.model(x), net(x), atol=1e-6)
    conversion = convert.convert(source.model, 4, data=x)
    assert conversion.snn(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    convert.save(conversion, "snn.safetensors", source=source.record())
    again = convert.load("snn.safetensors", "net.pt2", trust_pickle=True)
    assert torch.equal(again(x), conversion.snn(x))
    with pytest.raises(UnsafePickleError):
        convert.load("snn.safetensors", "net.pt2")


def test_the_command_converts_an_exported_program() -> None:
    exported(Own().eval(), Path("net.pt2"))
    arguments = ("convert", "net.pt2", "-T", 2, "--data", "digits", "--test-samples", 20)
    status, _, err = command(*arguments)
    assert status == 1
    assert "--trust-pickle" in err
    assert command(*arguments, "--trust-pickle").status == 0


def test_an_exported_program_is_taken_whole_with_trust_and_by_its_weights_with_an_architecture() -> None:
    net = digits()
    exported(net, Path("net.pt2"))
    assert convert.load_source("net.pt2", trust_pickle=True).card is None
    assert convert.load_source("net.pt2", trust_pickle=True, arch="digits-cnn").card == zoo.card("digits-cnn")
    with pytest.raises(ArchitectureError, match=r"net\.pt2: does not fit cifar10-resnet20-a: missing"):
        convert.load_source("net.pt2", trust_pickle=True, arch="cifar10-resnet20-a")


@pytest.mark.parametrize("save", SAVED, ids=named)
def test_a_program_has_no_entries(save: Callable[[nn.Module, Path], None]) -> None:
    save(digits(), Path("net.pt"))
    with pytest.raises(ArgumentError, match=r"entry='model' came with net\.pt.*no entries. Leave it out"):
        convert.load_source("net.pt", entry="model")


def rewritten(change: Callable[[str, bytes], bytes]) -> None:
    content = io.BytesIO(Path("net.pt").read_bytes())
    with zipfile.ZipFile(content) as old, zipfile.ZipFile("net.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


@pytest.mark.parametrize("save", SAVED, ids=named)
def test_a_damaged_program_is_refused_or_read_but_never_run_into_a_traceback(
    save: Callable[[nn.Module, Path], None],
) -> None:
    save(digits(), Path("net.pt"))
    whole = Path("net.pt").read_bytes()
    for position in range(30, len(whole), len(whole) // 40):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        for data in (bytes(damaged), whole[:position]):
            Path("net.pt").write_bytes(data)
            with suppress(LMHError):  # anything else is a failure
                convert.load_source("net.pt")


def test_weights_that_reach_beyond_their_bytes_are_refused() -> None:
    scripted(digits(), Path("net.pt"))
    rewritten(lambda name, data: data[:4] if name.endswith("/data/0") else data)
    with pytest.raises(SourceError, match=r"net\.pt: its weights cannot be read .*expected a whole archive"):
        convert.load_source("net.pt")
    exported(digits(), Path("net.pt"))

    def larger(name: str, data: bytes) -> bytes:
        if not name.endswith("weights_config.json"):
            return data
        config = json.loads(data)
        next(iter(config["config"].values()))["tensor_meta"]["sizes"][0]["as_int"] = 10**6
        return json.dumps(config).encode()

    rewritten(larger)
    with pytest.raises(SourceError, match=r"net\.pt: its weights cannot be read"):
        convert.load_source("net.pt")


def test_names_in_a_program_reach_no_function_of_python() -> None:
    scripted(digits(), Path("net.pt"))
    marker = str(Path("marker").absolute()).encode()
    body = b"\x80\x02cos\nmkdir\n(X" + len(marker).to_bytes(4, "little") + marker + b"tR."
    rewritten(lambda name, data: body if name.endswith("/data.pkl") else data)
    with pytest.raises(SourceError):
        convert.load_source("net.pt")
    assert not Path("marker").exists()
