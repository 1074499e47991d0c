"""A training step of CIFAR ResNet-18 at T = 4, batch 16, beside its ANN's, and beside the same network in SpikingJelly.

    python benchmarks/training.py

Time and the memory of a whole process, measured as in finetune_step.py: fp32, SGD with momentum, the ANN eager in the
same process for the time, a process alone for the memory. ``recompute`` trains by ``Recompute()``. The peer is the
prepared graph with SpikingJelly's multi-step IF nodes (PeerSite of inference.py), reset detached and images repeated
for every step, in train mode (pip install --no-deps spikingjelly==2.0.0 loguru SciencePlots; else it is left out).
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import platform
import statistics
from typing import Any

import click
import torch
from finetune_step import NETWORKS, fresh, peak, seconds_of, stepper_of, timed, work_of
from inference import PEER, PeerSite
from torch import Tensor, nn

from lmh import __version__, sites
from lmh.convert import convert
from lmh.finetune import Recompute, Schedule, TimeSliced
from lmh.finetune.log import peak_memory_mb
from lmh.finetune.optimiser import optimiser
from lmh.finetune.steps import Stepper

NAME, TIMESTEPS = "resnet18", 4


class PeerNetwork(nn.Module):
    """The prepared graph with the peer's neurons: [N, C, H, W] → the mean over T, [N, classes]."""

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        conversion = convert(NETWORKS[NAME](), timesteps, data=torch.rand(4, 3, 32, 32))
        self.timesteps = timesteps
        self.network = copy.deepcopy(conversion.prepared.model)
        for path, site in sites(conversion.snn).items():
            neurons = PeerSite(site.v_threshold, site.v_init, timesteps)
            neurons.node.detach_reset = True
            self.network.set_submodule(path, neurons)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean over time."""
        return self.network(x.repeat(self.timesteps, 1, 1, 1)).unflatten(0, (self.timesteps, -1)).mean(0)


def peer_stepper(timesteps: int) -> Stepper:
    """What trains the peer."""
    network, schedule = PeerNetwork(timesteps).train(), Schedule(epochs=1)
    return Stepper(network, optimiser(network, schedule), schedule, TimeSliced(1))


def peer_timed(timesteps: int, batch: int, rounds: int, threads: int) -> dict[str, Any]:
    """As finetune_step's ``timed``."""
    torch.set_num_threads(threads)
    Schedule(epochs=1).memory.allocate()
    ann, peer, work = stepper_of(NAME, 0, 0, Schedule(epochs=1)), peer_stepper(timesteps), work_of(batch)
    taken = [(seconds_of(ann, work), seconds_of(peer, work)) for _ in range(rounds + 1)][1:]
    return {
        "ann_ms": round(1000 * statistics.median(ann for ann, _ in taken), 1),
        "ms": round(1000 * statistics.median(peer for _, peer in taken), 1),
        "ratio": round(statistics.median(peer / ann for ann, peer in taken), 3),
    }


def peer_peak(timesteps: int, batch: int, threads: int) -> float | None:
    """As finetune_step's ``peak``."""
    torch.set_num_threads(threads)
    stepper, work = peer_stepper(timesteps), work_of(batch)
    for _ in range(3):
        stepper(work)
    found = peak_memory_mb(torch.device("cpu"))
    return None if found is None else round(found, 1)


@click.command()
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--quick", is_flag=True, help="Two images, one round: no figures to quote.")
def main(rounds: int, threads: int, quick: bool) -> None:
    """Measure both."""
    batch, rounds = (2, 1) if quick else (16, rounds)
    there = importlib.util.find_spec(PEER) is not None
    peer = f"{PEER} {importlib.metadata.version(PEER)}" if there else f"{PEER} not installed"
    print(f"seed 0, fp32, batch {batch}, T = {TIMESTEPS}, {rounds} rounds, {threads} threads, lmh {__version__}, "
          f"torch {torch.__version__}, {peer}, {platform.machine()}")  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    for side, schedule in {"ours": Schedule(epochs=1), "recompute": Schedule(epochs=1, memory=Recompute())}.items():
        rows[side] = fresh(timed, NAME, TIMESTEPS, TIMESTEPS, schedule, batch, rounds, threads)
        rows[side]["peak_mb"] = fresh(peak, NAME, TIMESTEPS, TIMESTEPS, schedule, batch, threads)
    if there:
        rows["peer"] = fresh(peer_timed, TIMESTEPS, batch, rounds, threads)
        rows["peer"]["peak_mb"] = fresh(peer_peak, TIMESTEPS, batch, threads)
    ann_mb = fresh(peak, NAME, 0, 0, Schedule(epochs=1), batch, threads)
    print(f"{'ANN':12}{rows['ours']['ann_ms']:9.1f} ms{1:8.2f} ×{ann_mb or 0:9.0f} MB")
    for side, row in rows.items():
        print(f"{side:12}{row['ms']:9.1f} ms{row['ratio']:8.2f} ×{row['peak_mb'] or 0:9.0f} MB")
    figures = {f"{side}_{name}": row[name] for side, row in rows.items() for name in ("ratio", "peak_mb")}
    print(json.dumps({**figures, "ann_peak_mb": ann_mb, "rows": rows}))


if __name__ == "__main__":
    main()
