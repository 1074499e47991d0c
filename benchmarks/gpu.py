"""What a GPU makes of the neurons and of a training step: bandwidth beside a copy, images/s and memory beside the ANN.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --quick --device cpu          the same code where there is no GPU

The neurons of one site at T = 4, forward and backward, in float32: the bytes that must move at least, over the time,
beside a copy on the same device. They are the current and the spikes, and in the backward pass, which runs the steps
again, the current, the gradient of the spikes and that of the current. Then training steps of CIFAR ResNet-18 in
bfloat16, T = 4, with SGD: the ANN, ours and the IF neurons of the other libraries (benchmarks/peers) where they are
installed; images/s, and the most memory that torch held. Without a GPU it says that it was not run. The last line is
one JSON object.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import torch
import torch.nn.functional as F
from finetune_step import NETWORKS
from peers import PEERS, PeerNetwork, installed, versions
from torch import Tensor, nn

from lmh import LMH, SpikingSite, __version__, fused_layers
from lmh.convert import convert
from lmh.time_axis import TimeAxis

TIMESTEPS, PASSES = 4, 5
Work = Callable[[], object]


def seconds(work: Work, device: torch.device, rounds: int) -> float:
    """The median time of a round, after three that do not count."""
    found = []
    for _ in range(rounds + 3):
        _finish(device)
        started = time.perf_counter()
        work()
        _finish(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found[3:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(device: torch.device, megabytes: float, rounds: int) -> dict[str, float]:
    """GB/s of the neurons and of a copy."""
    values = int(megabytes * 1e6 / 4 / TIMESTEPS / 64)
    current = torch.randn(TIMESTEPS, 64, values, device=device, requires_grad=True)
    gradient, plain = torch.randn_like(current), current.detach()
    site = SpikingSite(TimeAxis(TIMESTEPS), torch.ones(64), torch.tensor(0.5), LMH(), channels=64).to(device)

    def neurons() -> None:
        site(current).backward(gradient)
        current.grad = None

    size = current.numel() * 4 / 1e9
    ours, ideal = PASSES * size / seconds(neurons, device, rounds), 2 * size / seconds(plain.clone, device, rounds)
    return {"neurons": round(ours, 2), "copy": round(ideal, 2), "share": round(ours / ideal, 3)}


def training(network: nn.Module, images: Tensor, labels: Tensor, rounds: int) -> dict[str, float | None]:
    """Images/s of a training step in bfloat16, and the most megabytes that torch held."""
    device = images.device
    network.to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16), fused_layers(network):
            loss = F.cross_entropy(network(images).float(), labels)
        loss.backward()
        optimizer.step()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    taken = seconds(step, device, rounds)
    memory = round(torch.cuda.max_memory_allocated(device) / 1e6, 1) if device.type == "cuda" else None
    network.zero_grad()
    network.cpu()  # out of the memory of the next
    return {"images_per_second": round(len(images) / taken, 1), "memory_mb": memory}


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--batch", default=256, show_default=True)
@click.option("--megabytes", default=512.0, show_default=True, help="Of current, for the bandwidth.")
@click.option("--rounds", default=20, show_default=True)
@click.option("--quick", is_flag=True, help="Two images, 1 MB, one round: no figures to quote.")
def main(device: str, batch: int, megabytes: float, rounds: int, quick: bool) -> None:
    """Measure both."""
    if quick:
        batch, megabytes, rounds = 2, 1.0, 1
    where = torch.device(device)
    there = where.type != "cuda" or torch.cuda.is_available()
    name = torch.cuda.get_device_name(where) if where.type == "cuda" and there else device
    print(f"seed 0, {name}, batch {batch}, T = {TIMESTEPS}, {rounds} rounds, lmh {__version__}, "
          f"torch {torch.__version__}, {versions()}, {platform.machine()}")  # fmt: skip
    if not there:
        print("Not run: there is no CUDA device here.")
        print(json.dumps({"not_run": "no CUDA device"}))
        return
    torch.manual_seed(0)
    moved = bandwidth(where, megabytes, rounds)
    print(f"neurons, forward and backward: {moved['neurons']} GB/s, a copy {moved['copy']} GB/s: {moved['share']:.1%}")
    images = torch.randn(batch, 3, 32, 32, device=where).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=where)
    ann = NETWORKS["resnet18"]()
    conversion = convert(ann, TIMESTEPS, data=torch.rand(4, 3, 32, 32))
    sides: dict[str, nn.Module] = {"ANN": ann, "ours": conversion.snn}
    sides |= {peer: PeerNetwork(PEERS[peer], conversion.prepared.model, conversion) for peer in installed()}
    rows: dict[str, Any] = {}
    for side, network in sides.items():
        rows[side] = training(network, images, labels, rounds)
        print(f"{side:14}{rows[side]['images_per_second']:12.1f} images/s  {rows[side]['memory_mb'] or 0:9.0f} MB")
    print(json.dumps({"bandwidth": moved, "training": rows}))


if __name__ == "__main__":
    main()
