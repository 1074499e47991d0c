"""Every command and code block of the README and of `make demo` runs."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from lmh.cli import lmh, run
from lmh.convert.cli import convert_command

pytestmark = pytest.mark.usefixtures("uncompiled")

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FINETUNING = (ROOT / "docs" / "finetuning.md").read_text()


def blocks(kind: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [shlex.split(line) for line in lines if Path(line.split(" ")[0]).name in ("lmh", "lmh-convert")]


def execute(words: list[str]) -> int:
    return run(convert_command if Path(words[0]).name == "lmh-convert" else lmh, words[1:])


def test_the_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    found = blocks("python")
    assert len(found) >= 3
    for block in found:
        exec(compile(block, "README.md", "exec"), names)
    assert len(names["sites"](names["conversion"].snn)) == 17  # type: ignore[operator, attr-defined]


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = README + (ROOT / "docs" / "zoo.md").read_text()
    found = [words for block in blocks("console", text) for words in commands(block)]
    found = [words for words in found if not {"npz:cifar10.npz", "cifar10dvs:data"} & {*words}]  # not at hand
    assert len(found) >= 4
    for words in found:
        assert execute(words) == 0, words


def test_the_python_block_on_fine_tuning_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [block] = blocks("python", FINETUNING)
    names: dict[str, object] = {}
    exec(compile(block, "finetuning.md", "exec"), names)
    assert Path("run.jsonl").exists()


def test_the_python_block_on_inference_runs() -> None:
    [block] = blocks("python", (ROOT / "docs" / "inference.md").read_text())
    names: dict[str, object] = {}
    exec(compile(block, "inference.md", "exec"), names)
    assert names["answers"].argmax(1).eq(names["labels"]).double().mean() > 0.97  # type: ignore[attr-defined]


def test_the_first_screen_holds_the_two_commands() -> None:
    screen = "\n".join(README.splitlines()[:24])
    assert "make demo" in screen
    assert "make test" in screen


def test_the_demo_converts_and_loads_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = subprocess.run(["make", "-n", "-o", ".venv/.installed", "demo"], cwd=ROOT, capture_output=True, text=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    found = commands(listed.stdout)
    assert [Path(words[0]).name for words in found] == ["lmh-convert", "lmh"]
    assert [execute(words) for words in found] == [0, 0]
    printed = capsys.readouterr().out
    tuned = [float(value) for value in re.findall(r"SNN, fine-tuned.*", printed)[0].replace("│", " ").split()[2:]]
    ann = float(re.findall(r"ANN.*?([\d.]+)", printed)[0])
    assert tuned[-1] >= ann - 1.0
    again = [float(value) for value in re.findall(r"│ SNN +│.*", printed)[0].replace("│", " ").split()[1:]]
    assert again == tuned
