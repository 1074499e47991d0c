"""Pickled files: the user's own classes load where their module is named, and nothing else of a file runs."""

from __future__ import annotations

import argparse
import collections
import datetime
import importlib
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from commands import command
from lmh import convert, zoo
from lmh.convert.pickles import Trust, read_pickle
from lmh.errors import ArgumentError, SourceError, UnsafePickleError

MODULE = "users_pkg.network"
SOURCE = Path(__file__).with_name("users_network.py").read_text()


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package of the user's own in the current folder, with mine.pt pickled from it, and not imported now."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("users_pkg").mkdir()
    Path("users_pkg/__init__.py").touch()
    Path("users_pkg/network.py").write_text(SOURCE)
    Path("users_pkg/other.py").write_text("from pathlib import Path\nPath('other').touch()\n")
    sys.path.insert(0, str(tmp_path))
    importlib.invalidate_caches()
    torch.save(importlib.import_module(MODULE).build(), "mine.pt")
    forget()
    sys.path.remove(str(tmp_path))
    Path("imported").unlink()
    yield
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("users_pkg", "train_script")]:
        del sys.modules[name]


def saved(value: object, path: str = "model.pt", *, legacy: bool = False) -> str:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


class Call:
    """Unpickles by calling something that a pickle names."""

    def __init__(self, name: str, *arguments: object) -> None:
        self.name, self.arguments = name, arguments

    def pickled(self) -> bytes:
        """Return a pickle in torch.save's protocol; the name need not exist here."""
        module, _, attribute = self.name.rpartition(".")
        body = f"c{module}\n{attribute}\n".encode() + b"("
        for argument in self.arguments:
            text = str(argument).encode()
            body += b"X" + struct.pack("<I", len(text)) + text
        return b"\x80\x02" + body + b"tR."


def repickled(source: str, target: str, change: Callable[[bytes], bytes]) -> None:
    """Write a file of torch.save again with another pickle in it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith("/data.pkl") else old.read(name))


def zipped(pickled: bytes) -> None:
    torch.save({"a.weight": torch.zeros(2)}, "template.pt")
    repickled("template.pt", "model.pt", lambda _: pickled)


class TestUsersModules:
    def test_a_class_of_a_named_module_loads(self) -> None:
        source = convert.load_source("mine.pt", modules=(MODULE,))
        assert Path("imported").exists()
        assert type(source.model).__module__ == MODULE
        assert source.model.block.config.kind.name == "PLAIN"
        expected = importlib.import_module(MODULE).build()
        expected.load_state_dict(source.model.state_dict())
        x = torch.rand(3, 1, 8, 8)
        assert torch.equal(source.model(x), expected(x))
        assert convert.convert(source.model, 4, data=x).snn(x).shape == (3, 10)

    def test_without_its_name_it_is_refused_with_advice_that_works_and_not_imported(self) -> None:
        with pytest.raises(UnsafePickleError) as caught:
            convert.load_source("mine.pt")
        for part in (
            "mine.pt",
            f"{MODULE}.Mine",
            f"--module {MODULE}",
            "--trust-pickle",
            "run code",
            "save the module itself",
        ):
            assert part in str(caught.value)
        assert MODULE not in sys.modules
        assert not Path("imported").exists()

    @pytest.mark.parametrize("name", ["users_pkg", "users_pkg.other", "users_pkg.net"])
    def test_another_name_does_not_do(self, name: str) -> None:
        with pytest.raises(UnsafePickleError, match=rf"{MODULE}\.Mine"):
            convert.load_source("mine.pt", modules=(name,))
        assert not Path("imported").exists()
        assert not Path("other").exists(), "a named module is imported only for a class of its own"

    def test_the_path_is_as_it_was_afterwards(self) -> None:
        before = list(sys.path)
        convert.load_source("mine.pt", modules=(MODULE,))
        assert sys.path == before

    def test_a_class_that_a_script_defined_is_found_in_that_script(self) -> None:
        script = "import torch\nfrom torch import nn\n\n\nclass Net(nn.Sequential):\n    pass\n"
        Path("train_script.py").write_text(script)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU())
        torch.save(net, "net.pt")
        repickled("net.pt", "main.pt", lambda pickled: pickled.replace(
            b"ctorch.nn.modules.container\nSequential\n", b"c__main__\nNet\n"))  # fmt: skip
        with pytest.raises(UnsafePickleError, match=r"__main__\.Net.*--module my_script"):
            convert.load_source("main.pt")
        for trust_pickle in (False, True):
            model = convert.load_source("main.pt", modules=("train_script",), trust_pickle=trust_pickle).model
            assert type(model).__name__ == "Net"
            assert torch.equal(model[1].weight, net[1].weight)
        with pytest.raises(SourceError, match=r"cannot be imported.*--module my_script"):
            convert.load_source("main.pt", trust_pickle=True)
        with pytest.raises(UnsafePickleError, match=rf"None of {MODULE} defines that class"):
            convert.load_source("main.pt", modules=(MODULE,))

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("users_pkg/network.py", [r"'users_pkg/network\.py' is no module's name", r"Pass users_pkg\.network"]),
            ("", ["is no module's name"]),
            ("subprocess", ["'subprocess' is a module of Python itself", "the module that defines your network"]),
            ("os.path", ["is a module of Python itself"]),
        ],
    )
    def test_what_is_no_module_of_the_users_is_refused(self, name: str, words: list[str]) -> None:
        with pytest.raises(ArgumentError, match=".*".join(words)):
            convert.load_source("mine.pt", modules=(name,))

    def test_a_module_that_cannot_be_imported_says_why(self) -> None:
        Path("users_pkg/network.py").write_text("import no_such_package\n")
        with pytest.raises(SourceError, match=rf"--module {MODULE}: .*No module named 'no_such_package'.*PYTHONPATH"):
            convert.load_source("mine.pt", modules=(MODULE,))
        Path("users_pkg/network.py").unlink()
        importlib.invalidate_caches()
        forget()
        with pytest.raises(SourceError, match=rf"--module {MODULE}: cannot be imported.*Run in the folder"):
            convert.load_source("mine.pt", modules=(MODULE,))

    def test_the_commands_for_a_saved_network_take_it(self) -> None:
        model = convert.load_source("mine.pt", modules=(MODULE,)).model
        x = torch.rand(8, 1, 8, 8)
        conversion = convert.convert(model, 2, data=x)
        record = convert.load_source("mine.pt", modules=(MODULE,)).record()
        preprocessing = {"input_size": [1, 8, 8], "mean": [0.3], "std": [0.4]}
        convert.save(conversion, "snn.safetensors", source=record, preprocessing=preprocessing)
        with pytest.raises(UnsafePickleError, match=f"--module {MODULE}"):
            convert.load("snn.safetensors", "mine.pt")
        snn = convert.load("snn.safetensors", "mine.pt", modules=(MODULE,))
        assert torch.equal(snn(x), conversion.snn(x))
        report = ("report", "snn.safetensors", "--data", "digits", "--source", "mine.pt", "--test-samples", 20)
        status, _, message = command(*report)
        assert (status, f"--module {MODULE}" in message) == (1, True)
        assert command(*report, "--module", MODULE)[0] == 0

    def test_classes_that_a_module_only_imports_are_not_its_own(self) -> None:
        for name in ("Popen", "subprocess", "call", "Runner", "os", "F"):
            zipped(Call(f"{MODULE}.{name}", "/bin/true").pickled())
            with pytest.raises(UnsafePickleError, match=rf"{MODULE}\.{name};.* only networks and plain data classes"):
                convert.load_source("model.pt", modules=(MODULE,))

    def test_a_class_inside_another_needs_trust(self) -> None:
        sys.path.insert(0, str(Path.cwd()))
        torch.save(importlib.import_module(MODULE).Outer.Inner(), "inner.pt")
        with pytest.raises(UnsafePickleError, match=r"getattr.*--trust-pickle"):
            convert.load_source("inner.pt", modules=(MODULE,))
        assert type(convert.load_source("inner.pt", trust_pickle=True).model).__name__ == "Inner"

    def test_the_users_module_does_not_open_the_rest(self) -> None:
        zipped(Call("posix.mkdir", "marker").pickled())
        with pytest.raises(UnsafePickleError, match=r"posix\.mkdir"):
            convert.load_source("model.pt", modules=(MODULE,))
        assert not Path("marker").exists()
        assert not Path("imported").exists()


class RunsCode:
    """Unpickling it makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (str(Path("marker").absolute()),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("modules", [(), (MODULE,)], ids=["no-module", "module"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda bad: bad,
        lambda bad: {"state_dict": zoo.load("digits-cnn").state_dict(), "args": bad},
        lambda bad: {"model": [bad]},
        lambda bad: {"args": argparse.Namespace(value=bad), "model": {"fc.weight": torch.zeros(2, 2)}},
    ],
    ids=["alone", "beside-weights", "in-a-list", "in-a-namespace"],
)
def test_a_pickle_that_runs_code_is_not_run(wrap: Callable[[Any], Any], modules: tuple[str, ...], legacy: bool) -> None:
    saved(wrap(RunsCode()), legacy=legacy)
    with pytest.raises(UnsafePickleError, match="--trust-pickle"):
        convert.load_source("model.pt", modules=modules)
    assert not Path("marker").exists()
    read_pickle(Path("model.pt"), Trust(pickle=True), legacy=legacy)
    assert Path("marker").exists(), "the file is harmless, so this test shows nothing"


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_another_pickle_protocol_is_refused_without_trust(protocol: int) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    torch.save({"net": net, "bad": RunsCode()}, "model.pt", pickle_protocol=protocol)
    with pytest.raises(UnsafePickleError, match="--trust-pickle"):
        convert.load_source("model.pt")
    assert not Path("marker").exists()
    assert isinstance(convert.load_source("model.pt", trust_pickle=True).model, nn.Sequential)


BESIDE: dict[str, Callable[[], object]] = {
    "numpy-number": lambda: np.float64(0.5),
    "numpy-array": lambda: np.random.default_rng(0).random(3),
    "namespace": lambda: argparse.Namespace(lr=0.1, out=Path("runs"), schedule=[1, 2]),
    "path": lambda: Path("runs"),
    "date": lambda: datetime.datetime(2024, 5, 1),
    "defaultdict": lambda: collections.defaultdict(list, {"loss": [1.0, 2.0]}),
    "deque": lambda: collections.deque([1, 2], maxlen=5),
    "frozenset": lambda: frozenset({1, 2}),
    "optimizer": lambda: torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9),
    "torch-version": lambda: torch.__version__,
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", BESIDE)
def test_data_holders_beside_the_weights_do_not_matter(name: str, legacy: bool) -> None:
    net = zoo.load("digits-cnn")
    saved({"state_dict": net.state_dict(), "extra": BESIDE[name](), "more": [BESIDE[name]()]}, legacy=legacy)
    source = convert.load_source("model.pt")
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in source.model.state_dict().items())


def test_a_module_that_holds_a_stand_in_is_not_taken_for_what_was_saved() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    net.register_buffer("kept", torch.zeros(1))
    net.means = {"all": [np.float64(0.5)]}
    saved(net)
    with pytest.raises(UnsafePickleError, match=r"numpy.*scalar.*--trust-pickle"):
        convert.load_source("model.pt")
    assert convert.load_source("model.pt", trust_pickle=True).model.means == {"all": [0.5]}
    saved(np.float64(0.5))
    with pytest.raises(UnsafePickleError, match="numpy"):
        convert.load_source("model.pt")


def test_weights_that_nothing_but_a_stand_in_may_hold_are_refused_by_its_name() -> None:
    saved({"model": Call("lightning.pytorch.Trainer"), "epoch": 3})
    repickled("model.pt", "model.pt.new", lambda pickled: pickled.replace(
        f"c{__name__}\nCall\n".encode(), b"clightning.pytorch.trainer\nTrainer\n"))  # fmt: skip
    with pytest.raises(UnsafePickleError, match=r"names lightning\.pytorch\.trainer\.Trainer; .*--trust-pickle"):
        convert.load_source("model.pt.new")


@pytest.mark.parametrize(
    "net",
    [
        nn.DataParallel(nn.Sequential(nn.Linear(2, 2), nn.ReLU())),
        torch.optim.swa_utils.AveragedModel(nn.Sequential(nn.Linear(2, 2), nn.ReLU())),
    ],
    ids=["data-parallel", "averaged"],
)
def test_a_wrapped_module_is_unwrapped(net: nn.Module) -> None:
    saved(net)
    model = convert.load_source("model.pt").model
    assert type(model) is nn.Sequential
    assert torch.equal(model[0].weight, net.module[0].weight)


def test_functions_of_torch_that_a_module_keeps_are_allowed_and_others_are_not() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    net.function = F.relu
    saved(net)
    assert convert.load_source("model.pt").model.function is F.relu
    net.function = torch.hub.load
    saved(net)
    with pytest.raises(UnsafePickleError, match=r"torch\.hub\.load"):
        convert.load_source("model.pt")


def test_a_module_without_the_attributes_of_its_class_is_refused() -> None:
    saved(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    repickled("model.pt", "model.pt.new", lambda pickled: pickled.replace(b"_modules", b"_modulez"))
    with pytest.raises(SourceError, match=r"model\.pt\.new: its module is damaged, or of another version.*_modules"):
        convert.load_source("model.pt.new")


def test_half_precision_modules_become_single() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10)).half()
    saved({"model": net})
    source = convert.load_source("model.pt")
    assert {parameter.dtype for parameter in source.model.parameters()} == {torch.float32}
    assert source.notices == ("Weights in torch.float16 became float32.",)
    assert convert.convert(source.model, 2, data=torch.rand(8, 1, 8, 8)).snn(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_a_class_of_the_users_own_loads_with_trust() -> None:
    model = convert.load_source("mine.pt", trust_pickle=True).model
    assert type(model).__module__ == MODULE
    arguments = ("convert", "mine.pt", "-T", 2, "--input-size", "1,8,8", "--data", "digits", "--test-samples", 20)
    status, _, message = command(*arguments)
    assert (status, "--trust-pickle" in message) == (1, True)
    assert command(*arguments, "--trust-pickle")[0] == 0


def test_a_class_that_cannot_be_imported_is_named() -> None:
    Path("users_pkg/network.py").unlink()
    importlib.invalidate_caches()
    forget()
    with pytest.raises(SourceError, match=rf"mine\.pt.*cannot be imported.*{MODULE}.*PYTHONPATH"):
        convert.load_source("mine.pt", trust_pickle=True)


def test_a_bare_pickle_is_no_file_of_torch() -> None:
    Path("model.pt").write_bytes(pickle.dumps({"a.weight": [1.0]}, protocol=2))
    with pytest.raises(SourceError):
        convert.load_source("model.pt")
