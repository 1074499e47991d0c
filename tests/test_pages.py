"""Freed memory stays with the process, or goes back, where the C library can be told so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from commands import succeed
from lmh.finetune import memory
from lmh.pages import HUGE_PAGES

COUNT = """
import resource, sys, torch
from lmh import pages

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

told = getattr(pages, sys.argv[1])()
faults()
print(told, faults())
"""


def page_faults(setting: str) -> int:
    """Page faults of eight blocks of 64 MiB, in pages of 4 KiB, in a process that begins with a setting."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT, setting], capture_output=True, text=True, check=True,
        env=os.environ | {HUGE_PAGES: "0"},
    )  # fmt: skip
    told, faults = done.stdout.split()
    if told == "False":
        pytest.skip("this C library has no mallopt")
    return int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc has the setting")
def test_large_blocks_are_cleared_once_or_each_time() -> None:
    all_pages = 8 * 2**24 * 4 // 2**12
    assert page_faults("keep_freed_memory") <= all_pages / 2
    assert page_faults("return_freed_memory") >= all_pages


def test_memory_is_given_back_where_a_recipe_recomputes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "return_freed_memory", lambda: asked.append(tmp_path.name))
    small = ("finetune", "zoo:digits-cnn", "-T", 1, "--data", "digits", "--train-samples", 64, "--test-samples", 32)
    once = ("--epochs", 1, "--strategy", "stbp")
    succeed(*small, *once)
    assert not asked
    succeed(*small, *once, "--recompute", "--save-recipe", "recipe.toml")
    assert len(asked) == 1
    succeed(*small, "--recipe", "recipe.toml")
    assert len(asked) == 2
