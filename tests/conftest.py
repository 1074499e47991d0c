"""Fixtures: the zoo's network and data once a session, and the large data where it lies beside the project."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import nets
from lmh import kernels, use_arena, zoo
from lmh.convert import Conversion, convert
from lmh.zoo import Batches, DataSet, cache
from served import DATA
from unruly_server import Server, unruly_server

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # programs that a test starts: the cores belong to pytest's own processes
os.environ["LMH_HOME"] = str(Path(tempfile.gettempdir()) / f"lmh-tests-{os.getpid()}")  # not the user's own models


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["LMH_HOME"], ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data", default=os.environ.get("LMH_TEST_DATA"), help="folder with the CIFAR packs and weights")


@pytest.fixture(scope="session")
def data_folder(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--data")
    if folder is None or not Path(folder).is_dir():
        pytest.skip("needs the CIFAR data: pass --data FOLDER or set LMH_TEST_DATA")
    return Path(folder)


@pytest.fixture(scope="session")
def digits() -> DataSet:
    return zoo.load_data("digits")


@pytest.fixture
def digits_ann() -> nn.Module:
    return zoo.load("digits-cnn")


@pytest.fixture(scope="session")
def digits_test(digits: DataSet) -> Batches:
    return Batches(digits.test, zoo.card("digits-cnn").preprocessing)


@pytest.fixture(scope="session")
def digits_calibration(digits: DataSet) -> Batches:
    order = zoo.seeded_order(digits.train, 0)
    return Batches(digits.train, zoo.card("digits-cnn").preprocessing, indices=order[:256])


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a C++ compiler: for tests of other things, which would compile longer than they run."""
    monkeypatch.setattr(kernels, "can_compile", lambda device: False)


@pytest.fixture
def deep() -> Conversion:
    return convert(nets.Deep(), 3, data=torch.rand(32, 2, 8, 8))


@pytest.fixture
def home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of downloads, empty, in an environment that says nothing else about the network."""
    use_arena()  # what it compiles is in the home of all tests
    monkeypatch.setenv("LMH_HOME", str(tmp_path / "home"))
    for name in (*cache.OFFLINE, "HF_ENDPOINT", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that has the file of tests/served.py, and does what its script says."""
    with unruly_server({"/net.safetensors": DATA}) as running:
        yield running


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
