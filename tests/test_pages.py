"""Freed memory stays with the process where the C library can be told so."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from lmh.pages import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back, told = faults(), keep_freed_memory()
faults()
print(given_back, told, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc has the setting")
def test_large_blocks_are_cleared_once_and_not_again() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    given_back, told, kept = done.stdout.split()
    if told == "False":
        pytest.skip("this C library has no mallopt")
    assert int(given_back) > 8 * 2**24 * 4 // 2**21
    assert int(kept) < int(given_back) / 4
