"""All benchmarks, one after the other, and what they printed in benchmarks/results.md.

    make bench
    python benchmarks/all.py --only inference --only training

Takes hours on two cores. A script is run as its own docstring says, without options; what it prints, but the last line
of figures for programs, comes into the file under its name, and the sections of scripts that were not run stay as they
are. One that fails says so there, and the others go on. Prints the names, and as the last line one JSON object: the
figures of every script by its name.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch

from lmh import __version__
from lmh.artifact import write_atomically

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path.name != Path(__file__).name)
RESULTS = HERE / "results.md"
QUICK = ("streaming_memory",)
HEAD = """# Results

Written by `python benchmarks/all.py`; each section by the script of its name, when and on the machine that it says.
"""


def machine() -> str:
    """The processor, as far as the system tells it, and the versions that a figure depends on."""
    found = re.search(r"model name\s*:\s*(.+)", _text(Path("/proc/cpuinfo")))
    facts = (
        found.group(1) if found else platform.processor() or platform.machine(),
        f"{os.cpu_count()} CPUs ({torch.backends.cpu.get_cpu_capability()})",
        torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        f"Python {platform.python_version()}, torch {torch.__version__}, lmh {__version__}",
    )
    return ", ".join(facts)


def run(name: str, quick: bool) -> tuple[str, dict[str, Any] | None]:
    """Run a script; return its section's text and its figures, None where it failed."""
    options = ["--quick"] if quick else []
    started = datetime.now(UTC)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / f"{name}.py"), *options]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    *lines, last = done.stdout.strip().splitlines() or [""]
    minutes = (datetime.now(UTC) - started).total_seconds() / 60
    shown = " ".join(["python", f"benchmarks/{name}.py", *options])
    head = f"`{shown}`, {started:%Y-%m-%d %H:%M} UTC, {minutes:.0f} min.\n{machine()}"
    try:
        figures = json.loads(last) if done.returncode == 0 else None
    except json.JSONDecodeError:
        figures = None
    if figures is None:
        *_, reason = done.stderr.strip().splitlines() or [f"exit status {done.returncode}, no figures"]
        return f"{head}\n\nNot run: {reason}", None
    return f"{head}\n\n```text\n" + "\n".join(lines) + "\n```", figures


def sections(text: str) -> dict[str, str]:
    """The sections of a results file by the name of their script."""
    _, *found = re.split(r"^## (\w+)$", text, flags=re.MULTILINE)
    return {name: body.strip() for name, body in zip(found[::2], found[1::2], strict=True)}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


@click.command()
@click.option("--only", "names", multiple=True, type=click.Choice(NAMES), help="All unless given.")
@click.option("--output", type=click.Path(path_type=Path), help="benchmarks/results.md, with --quick results.md here.")
@click.option("--quick", is_flag=True, help="One script unless named, with --quick: no figures to quote.")
def main(names: tuple[str, ...], output: Path | None, quick: bool) -> None:
    """Run the scripts and write what they print."""
    target = output or (Path("results.md") if quick else RESULTS)
    print(f"seed: that of each script; {machine()}")
    figures: dict[str, Any] = {}
    for name in names or (QUICK if quick else NAMES):
        section, figures[name] = run(name, quick)
        known = {**sections(_text(target)), name: section}
        body = "".join(f"\n## {script}\n\n{text}\n" for script, text in sorted(known.items()))
        write_atomically(target, (HEAD + body).encode())
        print(f"{name}: {'failed' if figures[name] is None else 'done'}", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
