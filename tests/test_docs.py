"""The documentation: every Python block and every command of its guides runs, and its pages build without a warning."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lmh import zoo
from lmh.cli import lmh, run
from lmh.convert.cli import convert_command
from lmh.finetune.precision import has_bfloat16
from lmh.finetune.recipe import TrainingRecipe
from lmh.zoo import train_cli
from lmh.zoo.recipe import Recipe
from lmh.zoo.train_cli import training_of

pytestmark = pytest.mark.usefixtures("uncompiled")

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GUIDES = sorted(path.name for path in DOCS.glob("*.md") if path.name != "zoo.md")
SMALLER = {
    "--budget 10": "--budget 0.1", "--distill 20": "--distill 1", "--finetune 3": "--finetune 1",
    "--qcfs-epochs 12": "--qcfs-epochs 1", "--qcfs-epochs 6": "--qcfs-epochs 1", "--epochs 30": "--epochs 2",
    "--epochs 10": "--epochs 2", "--epochs 5": "--epochs 1", "--loss tet": "--loss tet --epochs 1",
    "torchrun": "torchrun --standalone",
}  # fmt: skip
IN_TEST_README = ("finetuning.md", "inference.md")
"""Their Python blocks run there, where what comes of them is checked."""
BEFORE = {
    "finetuning.md": ["convert zoo:digits-cnn -T 4 --data digits"],
    "inference.md": ["convert net.pt -T 4 --data folder:photos"],
}
SOURCE_FOLDERS = ("lmh", "convert", "calibrate", "finetune", "zoo")


def blocks(kind: str, page: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the guides' commands name, made small: networks, pictures in photos, and CIFAR-10."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=4), nn.BatchNorm2d(8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip
    for name in ("net.pt", "model.pt"):
        torch.save(net, tmp_path / name)
    weights = {f"module.{name}": value for name, value in zoo.card("cifar10-resnet20-a").build().state_dict().items()}
    torch.save(weights, tmp_path / "cifar10-resnet20-idelbayev.th")
    pixels = {f"x_{part}": generator.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8) for part in ("train", "test")}
    labels = {f"y_{part}": np.arange(40) % 10 for part in ("train", "test")}
    np.savez(tmp_path / "cifar10.npz", classes=np.array(list("abcdefghij")), **pixels, **labels)
    for part in ("train", "test"):
        for kind in ("cat", "dog"):
            place = tmp_path / "photos" / part / kind
            place.mkdir(parents=True)
            for index in range(16):
                Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in GUIDES if blocks("python", page) and page not in IN_TEST_README])
def test_the_python_blocks_of_a_guide_run_in_order(page: str, folder: Path) -> None:
    names: dict[str, object] = {"__name__": "guide"}
    for block in blocks("python", page):
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", [page for page in GUIDES if blocks("console", page)])
def test_the_commands_of_a_guide_run(page: str, folder: Path) -> None:
    for words in BEFORE.get(page, ()):
        assert run(lmh, words.split()) == 0
    for block in blocks("console", page):
        for line in block.replace("\\\n", " ").splitlines():
            text = line.partition("#")[0].strip()
            for long, short in SMALLER.items():
                text = text.replace(long, short)
            words = [word for word in shlex.split(text) if word != "--amp" or has_bfloat16(torch.device("cpu"))]
            if words[:1] == ["lmh-convert"]:
                assert run(convert_command, words[1:]) == 0, line
            elif words[:1] == ["lmh"]:
                assert run(lmh, words[1:]) == 0, line
            elif words[:1] == ["torchrun"]:
                done = subprocess.run(
                    [Path(sys.executable).parent / words[0], *words[1:]], capture_output=True, text=True
                )
                assert done.returncode == 0, done.stderr
            elif words[:1] == ["python"]:  # tests/test_benchmarks.py runs it
                assert (ROOT / words[1]).is_file(), line
            else:
                assert words[:2] == ["pip", "install"], line


@pytest.mark.slow
def test_the_zoos_commands_on_cifar10_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other commands of zoo.md run in tests/test_readme.py and tests/test_event_training.py."""

    def shorter(recipe: Recipe) -> TrainingRecipe:
        training = training_of(recipe)
        return replace(training, schedule=replace(training.schedule, epochs=2))

    monkeypatch.setattr(train_cli, "training_of", shorter)
    lines = [line for block in blocks("console", "zoo.md") for line in block.splitlines() if "npz:" in line]
    *training, publishing = [shlex.split(line.partition("#")[0]) for line in lines]
    assert [words[:3] for words in training] == [["lmh", "zoo", "train"]] * 3
    for words in training:
        assert run(lmh, words[1:]) == 0, words
    for name, copy in (("cifar10-resnet20", "runs/cifar10-resnet20"), ("cifar10-resnet20-t4", "snn")):
        for suffix in (".safetensors", ".json"):
            shutil.copy(f"runs/zoo/{name}{suffix}", f"{copy}{suffix}")
    assert publishing[:3] == ["lmh", "zoo", "publish"]
    assert run(lmh, publishing[1:]) == 0
    assert {path.name for path in Path("release").iterdir()} > {"index.json", "SHA256SUMS", "my-resnet20-t4.md"}


@pytest.mark.slow
@pytest.mark.parametrize(("script", "options", "said"), [
    ("resnet_on_digits", ["--epochs", 1, "--train-samples", 128, "--tune", 1], r"SNN, fine-tuned, t = 1…4: [\d.]+,"),
    ("own_activation", ["--epochs", 6, "--tune", 1], r"Refused: .*no rule for .*SNN, fine-tuned: [789]\d\.\d\d %"),
])  # fmt: skip
def test_an_example_runs(script: str, options: list[object], said: str, tmp_path: Path) -> None:
    words = [sys.executable, ROOT / "examples" / f"{script}.py", *map(str, options)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(said, done.stdout, re.DOTALL), done.stdout


def test_the_messages_in_the_troubleshooting_guide_are_those_of_the_code() -> None:
    code = "".join(path.read_text() for name in SOURCE_FOLDERS for path in (ROOT / name).rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a sentence over several lines
    text = (DOCS / "troubleshooting.md").read_text()
    tables = re.findall(r"^\| message .*?\n((?:\|.*\n)+)", text, re.MULTILINE)
    found = [message for table in tables for message in re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)]
    assert len(found) > 12
    assert [message for message in found if message not in code] == []


@pytest.mark.parametrize("package", ["lmh", "lmh.convert", "lmh.calibrate", "lmh.finetune", "lmh.zoo", "lmh.report"])
def test_every_public_name_is_in_the_reference(package: str) -> None:
    page = (DOCS / "api" / f"{package.rpartition('.')[2]}.md").read_text()
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}
    assert not {*importlib.import_module(package).__all__} - shown


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if "results" not in path.parts}
    assert pages == set(re.findall(r"[\w/-]+\.md", text))


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    program = Path(sys.executable).parent / "mkdocs"
    if not program.is_file():
        pytest.skip("needs mkdocs-material and mkdocstrings: pip install '.[docs]'")
    assert subprocess.run(["make", "types"], cwd=ROOT, capture_output=True).returncode == 0
    words = [program, "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api" / "convert" / "index.html").read_text()
    assert "Convert a pretrained ANN to a spiking network of LM-H neurons." in page
    assert ":func:" not in page
