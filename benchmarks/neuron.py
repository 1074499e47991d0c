"""The neurons of a site by every kernel, against the fastest pass over memory there is; and what a network gains.

    python benchmarks/neuron.py
    python benchmarks/neuron.py --threads 1 --cpu-time          on a machine that others use too

All variants of a table run in turn, round after round. A figure is the median over the rounds; a ratio is the median
of the ratios within a round, to the ideal (forward: a copy; forward and backward: a ReLU) or to a step of the ANN.
The table of a deployed site over sizes shows from where on a compiled pass is the faster one.
Memory is what a process grows by in one forward and backward pass. Prints its settings, the tables, and as the last
line one JSON object.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import nn

from lmh import LMH, Kernel, SpikingSite, __version__, fused_layers, kernels_used, use_kernel
from lmh.batch_norm import PendingCurrent
from lmh.convert import convert
from lmh.frozen import FrozenSite
from lmh.kernels import can_compile, programs
from lmh.pages import keep_freed_memory
from lmh.time_axis import TimeAxis
from lmh.zoo.cifar_resnet import CifarResNet

Work = Callable[[], object]
ORDERS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
KERNELS = [Kernel.EAGER, Kernel.FUSED, *([Kernel.COMPILED] if can_compile("cpu") else [])]
CHANNELS, SIDE = 16, 32


def rounds(variants: dict[str, Work], count: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds of each variant, round after round, after one round that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(count + 1):
        for name, work in variants.items():
            started = clock()
            work()
            if turn:
                taken[name].append(1000 * (clock() - started))
    return taken


def summary(taken: dict[str, list[float]], ideal: str) -> dict[str, dict[str, float]]:
    """Median milliseconds, and the median ratio to ``ideal`` within a round."""
    return {
        name: {
            "ms": round(statistics.median(times), 3),
            "ratio": round(statistics.median(a / b for a, b in zip(times, taken[ideal], strict=True)), 2),
        }
        for name, times in taken.items()
    }


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}")
    for name, row in rows.items():
        print(f"  {name:44}{row['ms']:10.2f} ms  {row['ratio']:6.2f} ×")


def neurons(kernel: Kernel, order: str, per_channel: bool, timesteps: int, batch: int) -> tuple[Work, Work]:
    """A forward pass without gradients, and a forward and backward pass, of one site."""
    theta = torch.ones(CHANNELS) if per_channel else torch.tensor(1.0)
    site = SpikingSite(TimeAxis(timesteps), theta, torch.tensor(0.5), LMH(), channels=CHANNELS)
    current, weight = (
        torch.randn(timesteps * batch, CHANNELS, SIDE, SIDE).contiguous(memory_format=ORDERS[order]) for _ in range(2)
    )
    current.requires_grad_()

    def forward() -> None:
        with torch.no_grad(), use_kernel(kernel):
            site(current)

    def both() -> None:
        with use_kernel(kernel):
            site(current).backward(weight)
        current.grad = None

    return forward, both


def frozen(exponent: int, timesteps: int) -> dict[str, Work]:
    """A deployed site on 2**exponent values of current, compiled and not."""
    theta = torch.ones(CHANNELS)
    site = FrozenSite(SpikingSite(TimeAxis(timesteps), theta, torch.tensor(0.5), LMH(), channels=CHANNELS))
    current = torch.randn(timesteps, CHANNELS, 2**exponent // (timesteps * CHANNELS))

    def by(kernel: Kernel) -> Work:
        def work() -> None:
            with torch.inference_mode(), use_kernel(kernel):
                site(current)

        return work

    return {kernel.value: by(kernel) for kernel in KERNELS if kernel is not Kernel.EAGER}


def layer(order: str, timesteps: int, batch: int, fuse: bool) -> Work:
    """A forward and backward pass of BatchNorm and neurons, after one another or as one function."""
    site = SpikingSite(TimeAxis(timesteps), torch.ones(CHANNELS), torch.tensor(0.5), LMH(), channels=CHANNELS)
    norm = nn.BatchNorm2d(CHANNELS)
    x, weight = (
        torch.randn(timesteps * batch, CHANNELS, SIDE, SIDE).contiguous(memory_format=ORDERS[order]) for _ in range(2)
    )
    x.requires_grad_()

    def work() -> None:
        with use_kernel(Kernel.COMPILED):
            site(PendingCurrent(norm, x) if fuse else norm(x)).backward(weight)
        x.grad = None
        norm.zero_grad(), site.zero_grad()

    return work


def ideal(timesteps: int, batch: int) -> tuple[Work, Work]:
    """A copy, and a ReLU with its backward pass, of the same size."""
    current, weight = (torch.randn(timesteps * batch, CHANNELS, SIDE, SIDE) for _ in range(2))
    current.requires_grad_()

    def both() -> None:
        F.relu(current).backward(weight)
        current.grad = None

    return lambda: current.detach().clone(), both


def networks(timesteps: int, batch: int, order: str) -> tuple[nn.Module, nn.Module, Work, Callable[[Kernel], Work]]:
    """A ResNet-20, its spiking network, a training step of the one, and of the other by a kernel."""
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, SIDE, SIDE), torch.randint(10, (batch,))
    ann = CifarResNet(20)
    snn = convert(ann, timesteps, data=x[:32]).snn
    for network in (ann, snn):
        network.train().to(memory_format=ORDERS[order])
    x = x.contiguous(memory_format=ORDERS[order])

    def step(network: nn.Module) -> None:
        network.zero_grad()
        F.cross_entropy(network(x), y).backward()

    def spiking(kernel: Kernel) -> Work:
        def work() -> None:
            with use_kernel(kernel), fused_layers(snn):
                step(snn)
            assert set(kernels_used(snn).values()) == {kernel}

        return work

    return ann, snn, lambda: step(ann), spiking


def _peak(kernel: Kernel | None, timesteps: int, batch: int, network: bool) -> float:
    """MiB that this process grows by in one forward and backward pass; without a kernel, of the ideal or the ANN."""
    torch.set_num_threads(1)

    def pass_of(size: int) -> Work:
        if network:
            _, _, ann, spiking = networks(timesteps, size, "contiguous")
            return ann if kernel is None else spiking(kernel)
        return ideal(timesteps, size)[1] if kernel is None else neurons(kernel, "contiguous", True, timesteps, size)[1]

    pass_of(2)()  # what is made once, such as programs and gradients' buffers, is not counted
    work = pass_of(batch)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    work()
    return (_resident("VmHWM") - before) / 1024


def _resident(field: str) -> int:
    """A number of KiB from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def peaks(timesteps: int, batch: int, *, network: bool) -> dict[str, float] | None:
    """The same for every kernel, each in a process of its own; None where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    found = {}
    for kernel in (None, *KERNELS):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            name = ("ANN" if network else "ideal") if kernel is None else kernel.value
            found[name] = round(pool.apply(_peak, (kernel, timesteps, batch, network)), 1)
    return found


@click.command()
@click.option("--timesteps", default=4, show_default=True)
@click.option("--batch", default=64, show_default=True, help="Of the single site; 64 makes 16.8 MB of current.")
@click.option("--network-batch", default=128, show_default=True)
@click.option("--repeats", default=15, show_default=True)
@click.option("--network-repeats", default=5, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--cpu-time", is_flag=True, help="Measure the time of the processor, for a machine that is shared.")
@click.option("--quick", is_flag=True, help="Small tensors, one memory order, few rounds: no figures to quote.")
def main(
    timesteps: int, batch: int, network_batch: int, repeats: int, network_repeats: int, threads: int, cpu_time: bool,
    quick: bool,
) -> None:  # fmt: skip
    """Measure every kernel on one site and on a network."""
    if quick:
        batch, network_batch, repeats, network_repeats = 2, 2, 3, 1
    orders = list(ORDERS)[:1] if quick else list(ORDERS)
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    clock = time.process_time if cpu_time else time.perf_counter
    kept = keep_freed_memory()
    print(f"seed 0, T = {timesteps}, [{timesteps * batch}, {CHANNELS}, {SIDE}, {SIDE}] float32, ResNet-20 batch "
          f"{network_batch}, {repeats} and {network_repeats} rounds, {'CPU' if cpu_time else 'wall'} time, {threads} "
          f"threads, freed memory {'kept' if kept else 'given back'}, lmh {__version__}, torch {torch.__version__}, "
          f"{platform.machine()}")  # fmt: skip
    results: dict[str, Any] = {"threads": threads, "clock": "cpu" if cpu_time else "wall", "timesteps": timesteps}

    copy, relu = ideal(timesteps, batch)
    forward: dict[str, Work] = {"ideal": copy}
    both: dict[str, Work] = {"ideal": relu}
    started = time.perf_counter()
    for kernel in KERNELS:
        for order in orders:
            for per_channel in (False, True):
                name = f"{kernel.value}, {'per channel' if per_channel else 'per layer'}, {order}"
                forward[name], both[name] = neurons(kernel, order, per_channel, timesteps, batch)
                both[name]()
    results["compiling_s"] = round(time.perf_counter() - started, 1)
    for title, variants in (("forward", forward), ("forward_backward", both)):
        results[title] = summary(rounds(variants, repeats, clock), "ideal")
        show(f"one site, {title.replace('_', ' and ')}", results[title])
    for order in orders if Kernel.COMPILED in KERNELS else []:
        variants = {
            "after one another": layer(order, timesteps, batch, False),
            "as one": layer(order, timesteps, batch, True),
        }
        results[f"layer, {order}"] = summary(rounds(variants, repeats, clock), "after one another")
        show(f"BatchNorm and neurons, forward and backward, {order}", results[f"layer, {order}"])
    if Kernel.COMPILED in KERNELS:
        print("\na deployed site without gradients, ms uncompiled and compiled")
        results["sizes"] = {}
        for exponent in range(12, 15 if quick else 23):
            found = summary(rounds(frozen(exponent, timesteps), 10 * repeats, clock), Kernel.FUSED.value)
            results["sizes"][exponent] = {name: row["ms"] for name, row in found.items()}
            print(f"  2^{exponent:<2} values{found['fused']['ms']:10.3f}{found['compiled']['ms']:10.3f}")
    results["site_peak_mib"] = peaks(timesteps, batch, network=False)
    print(f"\none site, memory of a forward and backward pass in MiB: {results['site_peak_mib']}")

    for order in orders:
        _, _, ann, spiking = networks(timesteps, network_batch, order)
        steps = {"ANN": ann, **{kernel.value: spiking(kernel) for kernel in KERNELS}}
        results[f"network, {order}"] = summary(rounds(steps, network_repeats, clock), "ANN")
        show(f"training step of a ResNet-20, {order}", results[f"network, {order}"])
    results["network_peak_mib"] = peaks(timesteps, network_batch, network=True)
    print(f"\nResNet-20, memory of a training step in MiB: {results['network_peak_mib']}")
    print(f"programs compiled for both: {programs()}")
    results["programs"] = programs()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
