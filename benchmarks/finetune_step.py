"""A training step of a spiking network beside its ANN's: time, and the memory that the process takes.

    python benchmarks/finetune_step.py
    python benchmarks/finetune_step.py --timesteps 4 --network resnet20

CIFAR ResNet-20 and ResNet-18, T = 1 to 16, slices of k = 1, 2, 4 and T steps. A step is forward, cross-entropy,
backward and an update by SGD with momentum, as :func:`lmh.finetune.finetune` does them, in fp32; the ANN runs eager.
Every row comes from fresh processes: one that trains the ANN and the spiking network in turn, for the median time and
the median of the ratios within a round, and one that trains the spiking network alone, for its peak resident memory
with all that Python and torch take. ``peak_mb`` of the ANN is that of a process that trains the ANN alone. With
``--recompute`` the spiking network trains by ``Recompute()``; the ANN trains as ever. Tensors lie in the arena, the
ANN's too, as with ``lmh finetune``. With ``--channels-last`` both networks do, as with ``lmh finetune
--channels-last``.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import click
import torch
from torch import nn

from lmh import __version__, kernels_used, use_arena
from lmh.convert import convert
from lmh.finetune import Float32, KeepAll, Recompute, Schedule, TimeSliced
from lmh.finetune.log import peak_memory_mb
from lmh.finetune.optimiser import optimiser
from lmh.finetune.steps import Stepper, Work
from lmh.torchvision_shim import torchvision
from lmh.zoo.cifar_resnet import CifarResNet

SLICES = (1, 2, 4)
TIMESTEPS = (1, 2, 4, 8, 16)


def resnet18() -> nn.Module:
    """ResNet-18 for images of 32 pixels: a 3×3 stem without a pool."""
    network = torchvision().models.resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    network.maxpool = nn.Identity()
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet20": lambda: CifarResNet(20), "resnet18": resnet18}
BATCHES = {"resnet20": 128, "resnet18": 16}


def stepper_of(name: str, timesteps: int, k: int, schedule: Schedule) -> Stepper:
    """What trains the ANN, for T = 0, or its spiking network."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    if timesteps:
        network = convert(network, timesteps, data=torch.rand(4, 3, 32, 32)).snn
    order = torch.channels_last if schedule.precision.channels_last else torch.contiguous_format
    network.to(memory_format=order)  # type: ignore[call-overload]
    return Stepper(network.train(), optimiser(network, schedule), schedule, TimeSliced(max(k, 1)))


def work_of(batch: int) -> Work:
    """A batch."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(batch, 3, 32, 32, generator=generator), torch.randint(10, (batch,), generator=generator)
    return Work((x,), y, None)


def timed(
    name: str, timesteps: int, k: int, schedule: Schedule, batch: int, rounds: int, threads: int
) -> dict[str, Any]:
    """Milliseconds of the ANN's step and of the spiking network's, in turn, after one round that does not count."""
    torch.set_num_threads(threads)
    use_arena()
    ann, snn = stepper_of(name, 0, 0, replace(schedule, memory=KeepAll())), stepper_of(name, timesteps, k, schedule)
    work = work_of(batch)
    taken: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        taken.append((seconds_of(ann, work), seconds_of(snn, work)))
    kernels = {kernel.value for kernel in kernels_used(snn.model).values() if kernel is not None}
    return {
        "ann_ms": round(1000 * statistics.median(ann for ann, _ in taken[1:]), 1),
        "ms": round(1000 * statistics.median(snn for _, snn in taken[1:]), 1),
        "ratio": round(statistics.median(snn / ann for ann, snn in taken[1:]), 3),
        "kernels": sorted(kernels),
    }


def seconds_of(stepper: Stepper, work: Work) -> float:
    """How long a step takes."""
    started = time.perf_counter()
    stepper(work)
    return time.perf_counter() - started


def peak(name: str, timesteps: int, k: int, schedule: Schedule, batch: int, threads: int) -> float | None:
    """Megabytes that a process holds at most in three steps; T = 0 is the ANN."""
    torch.set_num_threads(threads)
    use_arena()
    stepper, work = stepper_of(name, timesteps, k, schedule), work_of(batch)
    for _ in range(3):
        stepper(work)
    found = peak_memory_mb(torch.device("cpu"))
    return None if found is None else round(found, 1)


def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@click.command()
@click.option("--network", "names", multiple=True, type=click.Choice(list(NETWORKS)), help="Both unless given.")
@click.option("--timesteps", "wanted", multiple=True, type=click.IntRange(1), help="1, 2, 4, 8 and 16 unless given.")
@click.option("--batch", type=click.IntRange(1), help="128 for ResNet-20 and 16 for ResNet-18 unless given.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--recompute", is_flag=True, help="Train by Recompute(), in less memory.")
@click.option("--channels-last", is_flag=True, help="Store images and activations as [N, H, W, C], of both networks.")
@click.option("--quick", is_flag=True, help="Two images, one round, ResNet-20, k = T = 4: no figures to quote.")
def main(
    names: tuple[str, ...],
    wanted: tuple[int, ...],
    batch: int | None,
    rounds: int,
    threads: int,
    recompute: bool,
    channels_last: bool,
    quick: bool,
) -> None:
    """Measure every network, T and k."""
    if quick:
        names, wanted, batch, rounds = names or ("resnet20",), wanted or (4,), batch or 2, 1
    names, wanted = names or tuple(NETWORKS), wanted or TIMESTEPS
    precision = Float32(channels_last)
    plain = Schedule(epochs=1, precision=precision)
    schedule = Schedule(epochs=1, precision=precision, memory=Recompute()) if recompute else plain
    print(f"seed 0, {precision}, {schedule.memory}, batch {batch or BATCHES}, {rounds} rounds, {threads} threads, "
          f"T {list(wanted)}, lmh {__version__}, torch {torch.__version__}, {platform.machine()}")  # fmt: skip
    print(f"{'network':10}{'T':>4}{'k':>4}{'ms':>10}{'ANN ms':>10}{'ratio':>8}{'peak MB':>10}{'ANN MB':>9}  kernels")
    rows: dict[tuple[str, int, int], dict[str, Any]] = {}
    for name in names:
        size = batch or BATCHES[name]
        ann_mb = fresh(peak, name, 0, 0, plain, size, threads)
        for timesteps in wanted:
            for k in sorted({*(k for k in (() if quick else SLICES) if timesteps % k == 0), timesteps}):
                row = fresh(timed, name, timesteps, k, schedule, size, rounds, threads)
                row |= {"peak_mb": fresh(peak, name, timesteps, k, schedule, size, threads), "ann_peak_mb": ann_mb}
                rows[name, timesteps, k] = row
                print(f"{name:10}{timesteps:4}{k:4}{row['ms']:10.1f}{row['ann_ms']:10.1f}{row['ratio']:8.2f}"
                      f"{row['peak_mb'] or 0:10.0f}{ann_mb or 0:9.0f}  {', '.join(row['kernels'])}")  # fmt: skip
    print(json.dumps(figures(rows)))


def figures(rows: dict[tuple[str, int, int], dict[str, Any]]) -> dict[str, Any]:
    """The figures that matter most, where their rows were measured, and all rows."""

    def of(name: str, timesteps: int, k: int, field: str) -> Any:
        return rows.get((name, timesteps, k), {}).get(field)

    one, sixteen = of("resnet18", 1, 1, "peak_mb"), of("resnet18", 16, 1, "peak_mb")
    return {
        "time_ratio_t4": of("resnet20", 4, 4, "ratio"),
        "peak_mb_t4": of("resnet18", 4, 4, "peak_mb"),
        "memory_ratio_k1_t16": round(sixteen / one, 3) if one and sixteen else None,
        "rows": [{"network": name, "timesteps": t, "k": k, **row} for (name, t, k), row in rows.items()],
    }


if __name__ == "__main__":
    main()
