"""Kill a fine-tuning at random moments, start it again each time, and compare its weights with an unbroken run's.

    python benchmarks/killed_runs.py --kills 20

The run is ``lmh finetune zoo:digits-cnn`` by hybrid training with a checkpoint after every batch, in processes of its
own: one that nobody disturbs, and one that gets SIGKILL again and again, a random time after its training began or went
on, whatever it is doing then, and is at last left to finish; where it finishes before, it is compared and begun anew.
Prints every moment, and as the last line one JSON object; ``same_weights`` is bit for bit, of every run that finished.
"""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

from lmh import __version__
from lmh.artifact import read_snn

TASK = ("finetune", "zoo:digits-cnn", "-T", "4", "--data", "digits", "--strategy", "hybrid", "--checkpoint-steps", "1",
        "--mix", "mixup", "--ema", "0.99", "--json")  # fmt: skip


def started(folder: Path, samples: int, epochs: int) -> subprocess.Popen[bytes]:
    """Start the run in a folder."""
    folder.mkdir(exist_ok=True)
    task = [*TASK, "--train-samples", str(samples), "--epochs", str(epochs), "--output", "net.safetensors"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lmh", *task, "--resume", "run"]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def whole(folder: Path, samples: int, epochs: int) -> float:
    """Let it run to its end; return the seconds from the start of its training."""
    process = started(folder, samples, epochs)
    errors = process.communicate()[1]
    if process.returncode != 0:
        raise click.ClickException(errors.decode()[-2000:])
    first = json.loads((folder / "run" / "log.jsonl").read_text().partition("\n")[0])
    return time.time() - first["time"]


def killed(process: subprocess.Popen[bytes], log: Path, wait: float) -> bool:
    """Kill a run so many seconds after it wrote to its log; False if it finished before."""
    before = log.stat().st_size if log.exists() else 0
    while process.poll() is None and (not log.exists() or log.stat().st_size == before):
        time.sleep(0.02)
    try:
        process.wait(wait)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    if process.returncode != 0:
        raise click.ClickException(process.stderr.read().decode()[-2000:] if process.stderr else "")
    return False


def same(folder: Path) -> bool:
    """Whether the killed run, which finished, gave the unbroken one's tensors."""
    one, other = (read_snn(folder / run / "net.safetensors")[0] for run in ("whole", "killed"))
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def position(folder: Path) -> str:
    """Where the run's log ends."""
    log = folder / "run" / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # cut while it was written
            continue
        if entry["event"] == "batch":
            return f"{entry['stage']} epoch {entry['epoch'] + 1}, batch {entry['batch'] + 1}"
    return "before the first batch"


@click.command()
@click.option("--kills", default=20, show_default=True)
@click.option("--samples", default=512, show_default=True, help="Training images.")
@click.option("--epochs", default=9, show_default=True, help="In both stages.")
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
@click.option("--quick", is_flag=True, help="Two kills of a small run.")
def main(kills: int, samples: int, epochs: int, seed: int, quick: bool) -> None:
    """Compare a run that is killed again and again with one that is not."""
    if quick:
        kills, samples, epochs = 2, 64, 3
    print(f"seed {seed}, {kills} kills, {samples} images, {epochs} epochs, lmh {__version__}, "
          f"torch {torch.__version__}, {platform.machine()}")  # fmt: skip
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = whole(folder / "whole", samples, epochs)
        print(f"unbroken: {seconds:.1f} s of training")
        done, compared = 0, []
        while done < kills:
            process = started(folder / "killed", samples, epochs)
            moment = draw.uniform(0, seconds / 4)
            if not killed(process, folder / "killed" / "run" / "log.jsonl", moment):
                compared.append(same(folder))
                print(f"  finished within {moment:.1f} s, {'the same' if compared[-1] else 'ANOTHER'}; begun anew")
                (folder / "killed" / "net.safetensors").unlink()
                continue
            done += 1
            print(f"  kill {done} after {moment:.1f} s: {position(folder / 'killed')}")
        whole(folder / "killed", samples, epochs)
        compared.append(same(folder))
    facts = {"kills": done, "same_weights": all(compared), "finished": len(compared), "unbroken_s": round(seconds, 1)}
    print(json.dumps(facts))
    sys.exit(0 if all(compared) else 1)


if __name__ == "__main__":
    main()
