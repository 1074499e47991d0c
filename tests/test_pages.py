"""Freed memory stays with the process, or goes back, where the C library can be told so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from commands import succeed
from lmh.finetune import cli

COUNT = """
import resource, torch
from lmh.pages import keep_freed_memory, return_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back, told = faults(), keep_freed_memory()
faults()
kept, asked = faults(), return_freed_memory()
print(given_back, told, kept, asked, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc has the setting")
def test_large_blocks_are_cleared_once_and_not_again_unless_they_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    given_back, told, kept, asked, given_back_again = done.stdout.split()
    if told == "False":
        pytest.skip("this C library has no mallopt")
    assert asked == "True"
    assert int(given_back) > 8 * 2**24 * 4 // 2**21
    assert int(kept) < int(given_back) / 4
    assert int(given_back_again) > int(given_back) / 2


def test_memory_is_given_back_where_a_recipe_recomputes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "return_freed_memory", lambda: asked.append(tmp_path.name))
    small = ("finetune", "zoo:digits-cnn", "-T", 1, "--data", "digits", "--train-samples", 64, "--test-samples", 32)
    once = ("--epochs", 1, "--strategy", "stbp")
    succeed(*small, *once)
    assert not asked
    succeed(*small, *once, "--recompute", "--save-recipe", "recipe.toml")
    assert len(asked) == 1
    succeed(*small, "--recipe", "recipe.toml")
    assert len(asked) == 2
