"""What the commands print: how much, how wide, and in colour or not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from commands import command, succeed
from lmh.verbosity import Verbosity, verbosity

REPORT = ("report", "zoo:digits-cnn-t4", "--data", "digits", "--test-samples", 20)
PROGRAMS = Path(sys.executable).parent


def test_quiet_leaves_results_and_errors() -> None:
    said = succeed(*REPORT)
    quiet = succeed(*REPORT, "--quiet")
    assert "Samples:" in said.err
    assert quiet.err == ""
    assert quiet.out == said.out
    failed = command("report", "gone.safetensors", "-q")
    assert failed.err.startswith("Error: gone.safetensors: no such file")
    assert verbosity() is Verbosity.QUIET
    assert "Samples:" in succeed(*REPORT).err  # the next command starts anew


def test_verbose_adds_every_layer_and_the_place_of_an_error() -> None:
    said = succeed(*REPORT, "-v")
    title = "Work and energy of every layer"
    assert title in said.out
    assert title not in succeed(*REPORT).out
    rows = re.findall(r"│ (?:stem|block|down|head)\S* +│ +([\d,]+) │ +([\d,]+) │ +([\d,]+) │", said.out)
    synops, _, ann = (sum(int(row[place].replace(",", "")) for row in rows) for place in range(3))
    energy = succeed(*REPORT, "--json").result["energy"]
    assert (len(rows), ann) == (5, energy["ann_macs"])
    assert synops == pytest.approx(energy["synops"], abs=5)
    failed = command("report", "gone.safetensors", "--verbose")
    assert failed.status == 1
    assert "Traceback" in failed.err
    assert "Traceback" not in command("report", "gone.safetensors").err


@pytest.mark.parametrize(("options", "quiet"), [(("-v", "-q"), True), (("-q", "-v"), False)])
def test_the_last_of_both_counts(options: tuple[str, str], quiet: bool) -> None:
    assert (succeed(*REPORT, *options).err == "") is quiet


@pytest.mark.parametrize(
    "name", ["convert", "export", "finetune", "report", "zoo download", "zoo publish", "zoo train"]
)
def test_every_command_that_works_for_long_has_both(name: str) -> None:
    said = succeed(*name.split(), "--help").out
    assert "--quiet" in said
    assert "--verbose" in said


def test_in_80_columns_and_without_colours_everything_fits() -> None:
    settings = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    words = [PROGRAMS / "lmh", *map(str, REPORT), "-v"]
    said = subprocess.run(words, env=settings, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    escapes = re.findall(r"\x1b\[[\d;]*m", said.stdout)
    assert not [found for found in escapes if re.search(r"[349]\d", found)]  # no colours; bold and dim may be
    plain = re.sub(r"\x1b\[[\d;]*m", "", said.stdout)
    assert max(len(line) for line in plain.splitlines()) <= 80


@pytest.mark.parametrize("program", ["lmh", "lmh-convert"])
def test_shells_complete_both_commands(program: str) -> None:
    variable = f"_{program.upper().replace('-', '_')}_COMPLETE"
    script = subprocess.run([PROGRAMS / program], env={**os.environ, variable: "zsh_source"}, capture_output=True)
    assert f"#compdef {program}".encode() in script.stdout
    words = {"COMP_WORDS": f"{program} --v", "COMP_CWORD": "1", variable: "bash_complete"}
    found = subprocess.run([PROGRAMS / program], env={**os.environ, **words}, capture_output=True, text=True)
    assert ("--verbose" if program == "lmh-convert" else "--version") in found.stdout


@pytest.mark.parametrize("name", ["convert", "export", "finetune", "report", "inspect", "zoo list", "zoo train"])
def test_help_has_examples(name: str) -> None:
    said = succeed(*name.split(), "--help").out.partition("\n")[2]  # behind the line of the usage
    assert re.search(r"^ +lmh(-convert)? .*\w", said, re.MULTILINE)
