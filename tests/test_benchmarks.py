"""Every benchmark runs with --quick and ends in one JSON object."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parent.parent / "benchmarks").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_it_runs_quickly_and_prints_its_figures(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LMH_TEST_DATA", raising=False)  # digits will do
    known = {"--threads": "1", "--device": "cpu"}
    options = [word for name, value in known.items() if f'"{name}"' in script.read_text() for word in (name, value)]
    command = [sys.executable, script, "--quick", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert lines[0].startswith("seed")
    assert json.loads(lines[-1])
