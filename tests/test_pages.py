"""Freed memory stays with the process, where the C library can be told so."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNT = """
import resource, sys, torch
from lmh.pages import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

told = sys.argv[1] == "ask" and keep_freed_memory()
faults()
print(told, faults())
"""


def page_faults(*arguments: str) -> tuple[str, int]:
    """Page faults of eight blocks of 64 MiB, in pages of 4 KiB, and whether freed memory is kept."""
    done = subprocess.run([sys.executable, "-c", COUNT, *arguments], capture_output=True, text=True, check=True)
    told, faults = done.stdout.split()
    return told, int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc has the setting")
def test_large_blocks_are_cleared_once_or_each_time() -> None:
    all_pages = 8 * 2**24 * 4 // 2**12
    told, faults = page_faults("ask")
    if told == "False":
        pytest.skip("this C library has no mallopt")
    assert faults <= all_pages / 2
    assert page_faults("leave")[1] >= all_pages
