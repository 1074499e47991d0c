"""Bad input: every mistake gets a message that helps, the right exit status, and no file is left behind."""

from __future__ import annotations

import errno
import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from commands import command
from lmh import convert, sites, zoo
from lmh.errors import AuditError

ZOO = ("zoo:digits-cnn", "-T", 2)
WEIGHTS = zoo.load("digits-cnn").state_dict()
FULL = OSError(errno.ENOSPC, "No space left on device")
FORBIDDEN = PermissionError(errno.EACCES, "Permission denied")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def contents() -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def refused(expected: int, *arguments: object) -> str:
    """Run a command that must fail and leave the folder as it was; return its message."""
    before = contents()
    status, out, err = command("convert", *arguments)
    assert (status, out) == (expected, ""), err
    assert "traceback" not in err.lower()
    assert contents() == before
    return err


def says(message: str, *words: str) -> None:
    assert [word for word in words if word not in message] == [], message


def network(*activations: nn.Module) -> nn.Sequential:
    """[N, 1, 8, 8] → [N, 10]."""
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), *activations, *head).eval()


def torch_bytes(value: object, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def zip_bytes(name: str, text: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, text)
    return buffer.getvalue()


def numpy_bytes(writer: Callable[..., None], *arrays: np.ndarray, **named: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    writer(buffer, *arrays, **named)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["is empty", "expected a model file", "again"]),
        (b"these are no weights\n", ["begins with", "a file of torch.save, a .safetensors", "state_dict"]),
        (torch_bytes(WEIGHTS)[:100], ["truncated or damaged", "expected a whole file", "Copy it again"]),
        (torch_bytes(WEIGHTS)[:-30], ["truncated or damaged", "expected a whole file", "Copy it again"]),
        (torch_bytes(WEIGHTS, legacy=True)[:10], ["cannot be read", "expected a whole file", "again"]),
        (torch_bytes(WEIGHTS, legacy=True)[:-30], ["cannot be read", "expected a whole file", "again"]),
        (safetensors.torch.save(WEIGHTS)[:-30], ["not a readable .safetensors", "again"]),
        (zip_bytes("a/readme", "hello"), ["an archive without a model", "expected", "Name the model file"]),
        (zip_bytes("a/data.pkl", "no pickle"), ["cannot be read", "expected a whole file"]),
        (torch_bytes(torch.zeros(3)), ["holds a Tensor", "expected a state_dict"]),
        (torch_bytes([torch.zeros(3)]), ["holds a list", "expected a state_dict"]),
        (torch_bytes({"epoch": 3, "lr": 0.1}), ["epoch, lr", "no state_dict", "Save model.state_dict()"]),
    ],
    ids=["empty", "text", "zip-cut-early", "zip-cut-late", "legacy-cut-early", "legacy-cut-late",
         "safetensors-cut", "archive-of-other-things", "archive-of-rubbish", "tensor", "list", "no-weights"],
)  # fmt: skip
def test_a_file_that_holds_no_model_is_refused_with_what_it_is(data: bytes, words: list[str]) -> None:
    Path("model.pt").write_bytes(data)
    says(refused(1, "model.pt", "-T", 2), "model.pt", *words)


def test_a_missing_file_and_a_folder_are_refused_by_name() -> None:
    says(refused(1, "gone.pt", "-T", 2), "gone.pt", "no such file", "zoo:NAME", "Check the path")
    Path("models").mkdir()
    says(refused(1, "models", "-T", 2), "models", "is a folder", "expected a model file", "Name the file")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("zoo:digits", ["'digits'", "nearest: digits-cnn", "lmh zoo list"]),
        ("zoo:cifar10-resnet56-a", ["no weights", "with weights: ", "digits-cnn", "--arch cifar10-resnet56-a"]),
        ("torchvision:resnet19", ["torchvision:resnet19", "nearest", "torchvision:resnet18"]),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, words: list[str]) -> None:
    says(refused(1, name, "-T", 2), *words)


class RunsCode:
    """Unpickling it makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.path.abspath("marker"),)


DANGEROUS: dict[str, Callable[[], bytes]] = {
    "zip": lambda: torch_bytes(RunsCode()),
    "zip-beside-weights": lambda: torch_bytes({"state_dict": WEIGHTS, "args": RunsCode()}),
    "legacy": lambda: torch_bytes(RunsCode(), legacy=True),
    "legacy-beside-weights": lambda: torch_bytes({"state_dict": WEIGHTS, "args": RunsCode()}, legacy=True),
    "bare-pickle": lambda: pickle.dumps(RunsCode()),
    "bare-pickle-protocol-2": lambda: pickle.dumps(RunsCode(), protocol=2),
}


@pytest.mark.parametrize("form", DANGEROUS)
def test_a_pickle_that_runs_code_is_not_run(form: str) -> None:
    Path("model.pt").write_bytes(DANGEROUS[form]())
    message = refused(1, "model.pt", "-T", 2)
    assert not Path("marker").exists()
    says(message, "model.pt", "run code", "--trust-pickle", "state_dict")
    if form == "zip":
        says(message, f"{os.mkdir.__module__}.mkdir")
    command("convert", "model.pt", "-T", 2, "--trust-pickle")
    assert Path("marker").exists(), "the file is harmless, so this test shows nothing"


def test_a_state_dict_of_an_unknown_architecture_is_refused() -> None:
    torch.save({"a.weight": torch.zeros(4, 3), "b.weight": torch.zeros(1000, 4)}, "model.pt")
    message = refused(1, "model.pt", "-T", 2)
    says(message, "model.pt", "2 tensors", "a.weight", "fit no architecture", "--module", "lmh.convert")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stem.0.weight": torch.zeros(24, 3, 3, 3)}, ["stem.0.weight", "[24, 3, 3, 3] instead of [24, 1"]),
        ({"stem.1.weight": None}, ["missing stem.1.weight"]),
        ({"extra.bias": torch.zeros(3)}, ["unexpected extra.bias"]),
    ],
    ids=["shape", "missing", "unexpected"],
)
def test_a_state_dict_that_does_not_fit_the_named_architecture_says_where(
    change: dict[str, Any], words: list[str]
) -> None:
    torch.save({key: value for key, value in {**WEIGHTS, **change}.items() if value is not None}, "model.pt")
    message = refused(1, "model.pt", "-T", 2, "--arch", "digits-cnn")
    says(message, "model.pt", "does not fit digits-cnn", "--arch", *words)


def test_a_sparse_weight_is_refused() -> None:
    torch.save({**WEIGHTS, "head.weight": WEIGHTS["head.weight"].to_sparse()}, "model.pt")
    says(refused(1, "model.pt", "-T", 2), "model.pt", "head.weight", "sparse")


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    bad = WEIGHTS["stem.0.weight"].clone()
    bad[0, 0, 0, 0], bad[1, 0, 0, 0] = float("nan"), float("inf")
    torch.save({**WEIGHTS, "stem.0.weight": bad}, "model.pt")
    message = refused(1, "model.pt", "-T", 2)
    says(message, "stem.0.weight", "2 of 216", "NaN or infinite", "expected finite", "checkpoint")


def test_a_network_without_activations_is_refused() -> None:
    with pytest.raises(AuditError, match=r"no activation that becomes a neuron.*expected at least one ReLU"):
        convert.convert(network(), 4, data=torch.rand(8, 1, 8, 8))
    torch.save(network(), "net.pt")
    message = refused(1, "net.pt", "-T", 4, "--input-size", "1,8,8")
    says(message, "no activation that becomes a neuron", "expected at least one ReLU", "as_neuron")


def test_every_unsupported_activation_is_listed_at_once() -> None:
    net = network(nn.GELU(), nn.SiLU(), nn.ReLU(), nn.Tanh())
    wanted = {"2": "nn.GELU", "3": "nn.SiLU", "5": "nn.Tanh"}
    with pytest.raises(AuditError) as caught:
        convert.convert(net, 4, data=torch.rand(8, 1, 8, 8))
    assert len(caught.value.problems) == len(wanted)
    torch.save(net, "net.pt")
    message = refused(1, "net.pt", "-T", 4, "--input-size", "1,8,8")
    says(message, "3 places cannot be converted")
    for path, name in wanted.items():
        for text in (str(caught.value), message):
            says(text, f"{path}: no rule for torch.{name} (supported: ReLU", f"{{{name}: as_neuron}}", "keep")


def test_the_rule_that_a_refusal_advises_makes_the_network_convert() -> None:
    images = torch.rand(8, 1, 8, 8)
    with pytest.raises(AuditError) as caught:
        convert.convert(network(nn.GELU()), 4, data=images)
    advised = re.search(r"rules=\{nn\.(\w+): as_neuron\}", str(caught.value))
    assert advised
    rules = {getattr(nn, advised[1]): convert.as_neuron}
    assert list(sites(convert.convert(network(nn.GELU()), 4, data=images, rules=rules).snn)) == ["2"]
    kept = convert.convert(network(nn.GELU(), nn.ReLU()), 4, data=images, rules={nn.GELU: convert.keep})
    assert kept.report.nodes() == {"converted": ["3"], "kept": ["2"], "refused": []}


def test_an_input_of_the_wrong_size_is_refused_and_the_advised_option_helps() -> None:
    torch.save(network(nn.ReLU()), "net.pt")
    says(refused(1, "net.pt", "-T", 2), "0: an input of shape", "3, 224, 224", "--input-size C,H,W")
    assert command("convert", "net.pt", "-T", 2, "--input-size", "1,8,8")[0] == 0


def test_thresholds_that_need_data_are_refused_without_and_found_with_data() -> None:
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)), "net.pt")
    message = refused(1, "net.pt", "-T", 2, "--input-size", "1,8,8")
    says(message, "2: not predicted by a BatchNorm before it", "without data", "--data")
    assert command("convert", "net.pt", "-T", 2, "--data", "digits", "--test-samples", 20)[0] == 0
    says(refused(1, *ZOO, "--calibration", "max"), "Max", "needs data and none was given", "--data")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-T", 0], ["--timesteps", "0 is not in the range 1<=x<=1024"]),
        (["-T", 1025], ["--timesteps", "1025 is not in the range 1<=x<=1024"]),
        (["-T", "four"], ["--timesteps", "'four'"]),
        (["--finetune", 1], ["--finetune needs --data"]),
        (["--data", "digits", "--finetune", 31], ["--finetune", "31", "0<=x<=30"]),
        (["--arch", "digits-cn"], ["--arch", "'digits-cn'", "nearest: digits-cnn"]),
        (["--arch", "torchvision:resnet19"], ["--arch", "torchvision:resnet18"]),
        (["--input-size", "1,a"], ["--input-size", "'1,a'", "3,224,224"]),
        (["--input-size", "a,b,c"], ["--input-size", "'a,b,c'", "3,224,224"]),
        (["--input-size", "1,0,8"], ["--input-size", "'1,0,8'", "3,224,224"]),
        (["--mean", "dark"], ["--mean", "'dark'", "0.5,0.5,0.5"]),
        (["--mean", "0.5,"], ["--mean", "'0.5,'", "0.5,0.5,0.5"]),
        (["--mean", "nan"], ["--mean", "nan"]),
        (["--std", "inf"], ["--std", "inf"]),
        (["--calibration", "median"], ["--calibration", "'median'", "minerror", "percentile:P", "batchnorm"]),
        (["--calibration", "percentile:101"], ["percentile:101", "above 0 and at most 100"]),
        (["--calibration", "percentile:most"], ["percentile:most", "percentile:99.9"]),
        (["--seed", -1], ["--seed", "-1"]),
        (["--seed", 2**70], ["--seed", str(2**70)]),
        (["--test-samples", 0], ["--test-samples", "0"]),
        (["--bogus"], ["--bogus"]),
    ],
    ids=str,
)
def test_bad_usage_exits_with_2_and_names_the_option(options: list[object], words: list[str]) -> None:
    torch.save(WEIGHTS, "model.pt")
    says(refused(2, "model.pt", "-T", 2, *options), "Usage: lmh convert", *words)


def test_the_nearest_architecture_that_a_refusal_names_is_the_right_one() -> None:
    torch.save(WEIGHTS, "model.pt")
    nearest = re.search(r"nearest: ([\w-]+)", refused(2, "model.pt", "-T", 2, "--arch", "digits-cn"))
    assert nearest
    assert command("convert", "model.pt", "-T", 2, "--arch", nearest[1])[0] == 0


def test_normalisation_that_does_not_fit_the_channels_is_refused() -> None:
    message = refused(2, *ZOO, "--mean", "0.5,0.5")
    says(message, "2 means", "1 deviations", "1 channels", "--mean and --std", "--input-size")
    says(refused(2, *ZOO, "--std", "0"), "std (0.0,)", "above 0")


_X, _Y = np.zeros((20, 8, 8, 1), np.uint8), np.arange(20) % 10
_BASE = {"x_train": _X, "y_train": _Y, "x_test": _X, "y_test": _Y}
_RGB = np.repeat(_X, 3, axis=3)
_SQUEEZED = bytearray(numpy_bytes(np.savez_compressed, **_BASE))
_SQUEEZED[60:80] = bytes(20)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_test": None, "y_test": None}, ["x_train, y_train", "not x_test, y_test"]),
        ({"x_train": _X.astype(np.float32)}, ["x_train is float32", "expected uint8 [N, H, W, C]"]),
        ({"x_train": _X[:0], "y_train": _Y[:0]}, ["x_train", "[0, 8, 8, 1]", "N ≥ 1"]),
        ({"x_train": _X[..., 0, 0]}, ["x_train", "[20, 8]", "expected uint8 [N, H, W, C]"]),
        ({"y_train": _Y[:5]}, ["y_train is int64 [5]", "expected whole numbers [20]"]),
        ({"y_train": _Y / 2}, ["y_train is float64", "expected whole numbers"]),
        ({"y_test": _Y - 1}, ["y_test", "label -1", "expected labels from 0"]),
        ({"classes": np.array(["cat", "dog"])}, ["labels go up to 9", "[2]", "[10]"]),
        ({"classes": np.array(10)}, ["classes"]),
        ({"y_test": _Y + 10}, ["a label is 19", "10 outputs", "expected labels below that"]),
        ({"x_train": _RGB, "x_test": _RGB}, ["images have 3 channels", "model takes 1", "--input-size"]),
        ({"x_train": np.array([{}])}, ["not a readable .npz of plain arrays", "numpy.savez"]),
    ],
    ids=["missing", "dtype", "no-samples", "dimensions", "label-count", "label-dtype", "label-below-0",
         "few-classes", "classes-scalar", "label-beyond-outputs", "channels", "objects"],
)  # fmt: skip
def test_arrays_that_do_not_fit_say_what_was_expected(change: dict[str, Any], words: list[str]) -> None:
    np.savez("set.npz", **{name: array for name, array in {**_BASE, **change}.items() if array is not None})
    says(refused(1, *ZOO, "--data", "npz:set.npz"), *words)


@pytest.mark.parametrize(
    "data",
    [b"", b"no arrays\n", numpy_bytes(np.savez, **_BASE)[:400], bytes(_SQUEEZED), numpy_bytes(np.save, _X)],
    ids=["empty", "text", "cut", "damaged", "npy"],
)
def test_a_file_that_is_no_npz_is_refused(data: bytes) -> None:
    Path("set.npz").write_bytes(data)
    says(refused(1, *ZOO, "--data", "npz:set.npz"), "set.npz", "not a readable .npz", "numpy.savez")


@pytest.mark.parametrize("spec", ["", "digit", "digits:more", "npz", "npz:", "cifar10:", "photos"])
def test_an_unknown_data_spec_is_refused_with_the_known_ones(spec: str) -> None:
    says(refused(2, *ZOO, "--data", spec), repr(spec), "not known", "digits", "npz:FILE", "folder:DIR")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("npz:gone.npz", ["gone.npz", "no such file", "x_train"]),
        ("folder:gone", ["gone", "no such folder", "train/"]),
        ("folder:empty", ["empty/train", "no class folders", "CLASS/IMAGE.png"]),
        ("folder:bare", ["bare/train", "no images", ".png"]),
        ("folder:broken", ["broken/train/a/1.png", "not a readable image", "Remove it"]),
        ("cifar10:empty", ["empty", "cifar10 was not found there", "download=True"]),
    ],
)
def test_data_that_is_not_there_is_refused_with_where_it_was_looked_for(spec: str, words: list[str]) -> None:
    for folder in ("empty", "bare/train/a", "bare/test/a", "broken/train/a", "broken/test/a"):
        Path(folder).mkdir(parents=True)
    for part in ("train", "test"):
        Path(f"broken/{part}/a/1.png").write_text("no pixels")
    says(refused(1, *ZOO, "--data", spec), *words)


@pytest.mark.parametrize("link", [None, "symlink_to", "hardlink_to"])
def test_the_source_is_never_overwritten(link: str | None) -> None:
    torch.save(WEIGHTS, "model.pt")
    output = Path("other.pt" if link else "model.pt")
    if link:
        getattr(output, link)(Path("model.pt").absolute())
    message = refused(2, "model.pt", "-T", 2, "--output", output)
    says(message, str(output), "is the source", "never overwritten", "another file")


def test_an_output_folder_that_is_missing_or_a_file_is_refused() -> None:
    Path("file").touch()
    for output in ("gone/x.safetensors", "file/x.safetensors"):
        message = refused(1, *ZOO, "--output", output)
        says(message, output, "cannot be written", "expected a writable folder", "--output")


@pytest.mark.parametrize("options", [[], ["--data", "digits", "--train-samples", 50, "--finetune", 1]])
@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("tempfile.NamedTemporaryFile", FORBIDDEN),
        ("tempfile.mkstemp", FULL),
        ("os.fsync", FULL),
        ("os.replace", FORBIDDEN),
    ],
)
def test_a_full_disk_or_a_forbidden_folder_keeps_the_old_file_and_leaves_no_other(
    call: str, error: OSError, options: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise error

    Path("out.safetensors").write_bytes(b"the old result")
    monkeypatch.setattr(call, fail)
    message = refused(1, *ZOO, *options, "--output", "out.safetensors")
    says(message, "out.safetensors", "cannot be written", error.strerror, "a writable folder", "--output")
