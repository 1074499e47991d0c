"""A training step of CIFAR ResNet-18 at T = 4, batch 16, beside its ANN's and those of other spiking libraries.

    python benchmarks/training.py

Time and the memory of a whole process, measured as in finetune_step.py: fp32, SGD with momentum, the ANN eager in the
same process for the time, a process alone for the memory. ``recompute`` trains by ``Recompute()``. A peer is the
prepared graph with that library's IF nodes (benchmarks/peers), in train mode, with its own surrogate gradient; what is
not installed is left out. All begin with the same weights and images, and a peer whose first loss is another stops the
run.
"""

from __future__ import annotations

import json
import platform
import statistics
from typing import Any

import click
import torch
from finetune_step import NETWORKS, fresh, peak, seconds_of, stepper_of, timed, work_of
from peers import PEERS, PeerNetwork, installed, versions

from lmh import __version__, use_arena
from lmh.convert import convert
from lmh.finetune import Recompute, Schedule, TimeSliced
from lmh.finetune.log import peak_memory_mb
from lmh.finetune.optimiser import optimiser
from lmh.finetune.steps import Stepper

NAME, TIMESTEPS = "resnet18", 4
MOST_DIFFERENT = 0.02
"""Of the first losses, as a share: single spikes differ, as the libraries add in another order."""


def peer_stepper(peer: str, timesteps: int) -> Stepper:
    """What trains the peer."""
    torch.manual_seed(0)
    conversion, schedule = convert(NETWORKS[NAME](), timesteps, data=torch.rand(4, 3, 32, 32)), Schedule(epochs=1)
    network = PeerNetwork(PEERS[peer], conversion.prepared.model, conversion).train()
    return Stepper(network, optimiser(network, schedule), schedule, TimeSliced(1))


def peer_timed(peer: str, timesteps: int, batch: int, rounds: int, threads: int) -> dict[str, Any]:
    """As finetune_step's ``timed``."""
    torch.set_num_threads(threads)
    use_arena()
    ann, theirs, work = stepper_of(NAME, 0, 0, Schedule(epochs=1)), peer_stepper(peer, timesteps), work_of(batch)
    taken = [(seconds_of(ann, work), seconds_of(theirs, work)) for _ in range(rounds + 1)][1:]
    return {
        "ann_ms": round(1000 * statistics.median(ann for ann, _ in taken), 1),
        "ms": round(1000 * statistics.median(theirs for _, theirs in taken), 1),
        "ratio": round(statistics.median(theirs / ann for ann, theirs in taken), 3),
    }


def peer_peak(peer: str, timesteps: int, batch: int, threads: int) -> float | None:
    """As finetune_step's ``peak``."""
    torch.set_num_threads(threads)
    use_arena()
    stepper, work = peer_stepper(peer, timesteps), work_of(batch)
    for _ in range(3):
        stepper(work)
    found = peak_memory_mb(torch.device("cpu"))
    return None if found is None else round(found, 1)


def first_losses(timesteps: int, batch: int, threads: int) -> dict[str, float]:
    """The loss of the first step, ours and each peer's."""
    torch.set_num_threads(threads)
    steppers = {peer: peer_stepper(peer, timesteps) for peer in installed()}
    ours = stepper_of(NAME, timesteps, timesteps, Schedule(epochs=1))
    return {side: stepper(work_of(batch)) for side, stepper in {"ours": ours, **steppers}.items()}


@click.command()
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--quick", is_flag=True, help="Two images, one round: no figures to quote.")
def main(rounds: int, threads: int, quick: bool) -> None:
    """Measure both."""
    batch, rounds = (2, 1) if quick else (16, rounds)
    print(f"seed 0, fp32, batch {batch}, T = {TIMESTEPS}, {rounds} rounds, {threads} threads, lmh {__version__}, "
          f"torch {torch.__version__}, {versions()}, {platform.machine()}")  # fmt: skip
    losses = fresh(first_losses, TIMESTEPS, batch, threads)
    print("first losses: " + ", ".join(f"{side} {loss:.4f}" for side, loss in losses.items()))
    for side, loss in losses.items():
        if not quick and not abs(loss - losses["ours"]) <= MOST_DIFFERENT * losses["ours"]:  # nor is NaN the same job
            raise click.ClickException(f"{side} does another job: its first loss is {loss}, ours {losses['ours']}.")
    rows: dict[str, dict[str, Any]] = {}
    for side, schedule in {"ours": Schedule(epochs=1), "recompute": Schedule(epochs=1, memory=Recompute())}.items():
        rows[side] = fresh(timed, NAME, TIMESTEPS, TIMESTEPS, schedule, batch, rounds, threads)
        rows[side]["peak_mb"] = fresh(peak, NAME, TIMESTEPS, TIMESTEPS, schedule, batch, threads)
    for peer in installed():
        rows[peer] = fresh(peer_timed, peer, TIMESTEPS, batch, rounds, threads)
        rows[peer]["peak_mb"] = fresh(peer_peak, peer, TIMESTEPS, batch, threads)
    ann_mb = fresh(peak, NAME, 0, 0, Schedule(epochs=1), batch, threads)
    print(f"{'ANN':12}{rows['ours']['ann_ms']:9.1f} ms{1:8.2f} ×{ann_mb or 0:9.0f} MB")
    for side, row in rows.items():
        print(f"{side:12}{row['ms']:9.1f} ms{row['ratio']:8.2f} ×{row['peak_mb'] or 0:9.0f} MB")
    figures = {f"{side}_{name}": row[name] for side, row in rows.items() for name in ("ratio", "peak_mb")}
    print(json.dumps({**figures, "ann_peak_mb": ann_mb, "rows": rows}))


if __name__ == "__main__":
    main()
