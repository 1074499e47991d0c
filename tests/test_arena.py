"""The arena: tensors lie in it without overlap, freed blocks are used again, and what it keeps is bounded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from commands import succeed
from lmh.kernels import can_compile
from texts import ANN_RECIPE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the arena is made for Linux alone"),
    pytest.mark.skipif(not can_compile("cpu"), reason="no C++ compiler"),
]

SMALL = ("-T", 1, "--data", "digits", "--train-samples", 64, "--test-samples", 32)
BEGIN = """
import random, resource, sys, threading, torch
from lmh.arena import use_arena
used = use_arena()
MB = 2**20

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / MB

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt * resource.getpagesize() / MB
"""


def printed(code: str, **variables: str) -> list[str]:
    """What a process prints that begins with the arena."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code], capture_output=True, text=True, env=os.environ | variables
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_tensors_of_many_sizes_and_threads_keep_their_values() -> None:
    """Four threads make, check and drop 400 tensors each; the blocks of one would be seen in those of another."""
    code = """
def work(seed):
    numbers, kept = random.Random(seed), []
    for number in range(400):
        kept.append((seed * 1000 + number, torch.full((numbers.randrange(1, MB),), seed * 1000 + number)))
        if len(kept) > 20:
            value, tensor = kept.pop(numbers.randrange(20))
            right.append(bool((tensor == value).all()))
    right.extend(bool((tensor == value).all()) for value, tensor in kept)

right = []
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(used, len(right), all(right))
"""
    assert printed(code) == ["True", "1600", "True"]


def test_a_freed_block_is_used_again_without_new_pages() -> None:
    code = """
for _ in range(2):
    before = faults()
    for _ in range(8):
        torch.ones(16 * MB)
    found = faults() - before
print(found < 8)
"""
    assert printed(code) == ["True"]


def test_neighbouring_holes_are_one_and_hold_a_larger_block() -> None:
    code = """
blocks = [torch.ones(MB) for _ in range(16)]
end = blocks[-1].data_ptr() + 4 * MB
first = blocks[0].data_ptr()
for number in (3, 5, 4, 1, 2):
    blocks[number] = None
large = torch.ones(5 * MB)
print(first < large.data_ptr() < end)
"""
    assert printed(code) == ["True"]


def test_holes_do_not_pile_up() -> None:
    """Every second of 64 blocks is freed, for a block that fits into none of the holes: they give up their pages."""
    code = """
start = resident()
blocks = [torch.ones(MB) for _ in range(64)]
peak = resident() - start
blocks = blocks[::2]
large = torch.ones(32 * MB)
print(250 < peak < 270, resident() - start < 256 * 17 / 16 + 10)
"""
    assert printed(code) == ["True", "True"]


def test_a_forked_process_goes_on_with_blocks_of_its_own() -> None:
    code = """
from torch.multiprocessing import get_context

def child(connection):
    mine = torch.ones(MB) + shared
    connection.send(float(mine.sum()))

shared = torch.ones(MB)
here, there = get_context("fork").Pipe()
process = get_context("fork").Process(target=child, args=(there,))
process.start()
print(here.recv() == 2 * MB)
process.join()
print(process.exitcode)
"""
    assert printed(code) == ["True", "0"]


def test_a_tensor_from_before_goes_back_to_where_it_came_from() -> None:
    code = f"import torch\nold = torch.ones(2**22)\n{BEGIN}\ndel old\nprint(used, float(torch.ones(2**22).sum()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", str(float(2**22))]


def test_more_than_there_is_is_torchs_own_error() -> None:
    code = """
try:
    torch.empty(2**50)
except RuntimeError as error:
    print(used, "allocate" in str(error))
try:
    torch.UntypedStorage(-1)
except RuntimeError as error:
    print(str(error).split()[0])
"""
    used, refused, negative = printed(code)
    assert (used, refused) == ("True", "True")
    assert negative


def test_without_a_compiler_or_a_folder_all_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert printed("print(used, float(torch.ones(MB).sum()))", LMH_HOME=str(tmp_path), CXX="nonsense") == [
        "False",
        "1048576.0",
    ]
    assert printed("print(used)", LMH_HOME=str(tmp_path / "file")) == ["False"]
    assert printed("print(used)", LMH_HOME=str(tmp_path), CXX="false") == ["False"]
    assert list(tmp_path.rglob("*.so")) == []


def test_it_is_compiled_once(tmp_path: Path) -> None:
    assert printed("print(used)", LMH_HOME=str(tmp_path)) == ["True"]
    (library,) = tmp_path.rglob("*.so")
    assert printed("print(used)", LMH_HOME=str(tmp_path), CXX="nonsense") == ["True"]
    assert list(tmp_path.rglob("*.so")) == [library]


def test_where_addresses_count_it_is_not_used() -> None:
    code = """
resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
use_arena.cache_clear()
print(use_arena())
"""
    assert printed(code) == ["False"]


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (("finetune", "zoo:digits-cnn", *SMALL, "--epochs", 1, "--strategy", "stbp"), "finetune.cli_training"),
        (("convert", "zoo:digits-cnn", *SMALL, "--distill", 1), "convert.label_free_cli"),
        (("convert", "zoo:digits-cnn", *SMALL, "--reconstruct", 1), "convert.label_free_cli"),
        (("zoo", "train", "an-ann.toml", "--out", "out"), "zoo.train_cli"),
    ],
    ids=["finetune", "distill", "reconstruct", "an ANN"],
)
def test_training_asks_for_it(
    arguments: tuple[object, ...], where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[bool] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"lmh.{where}.train_in_arena", lambda terminal: asked.append(True))
    Path("an-ann.toml").write_text(ANN_RECIPE)
    succeed(*arguments)
    assert asked == [True]


def test_where_there_is_none_training_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lmh.arena.use_arena", lambda: False)
    done = succeed("finetune", "zoo:digits-cnn", *SMALL, "--epochs", 1, "--strategy", "stbp")
    assert "Training takes more memory than it needs" in done.err
