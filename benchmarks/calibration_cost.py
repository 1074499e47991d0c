"""What calibration costs: peak memory, and time as a ratio to the forward passes of the ANN alone.

    python benchmarks/calibration_cost.py --network resnet50 --samples 256
    python benchmarks/calibration_cost.py --quick

A torchvision network with random weights on random images, batch by batch from a generator, so that the images are
never all in memory. Peak memory is the growth of the process's largest resident set; each figure comes from a process
of its own. `policy` calibrates with MinError; `forward` runs the ANN on the same batches.

Prints its settings and as the last line one JSON object with seconds and MB of each and the ratio of the times.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import click
import torch
from torch import Tensor

from lmh import __version__
from lmh.calibrate import MinError, calibrate
from lmh.convert import prepare
from lmh.torchvision_shim import torchvision


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    network: str
    samples: int
    size: int
    batch: int
    timesteps: int
    seed: int
    threads: int


def batches(settings: Settings) -> Iterator[Tensor]:
    """Give random images [N, 3, H, W]."""
    generator = torch.Generator().manual_seed(settings.seed)
    for start in range(0, settings.samples, settings.batch):
        count = min(settings.batch, settings.samples - start)
        yield torch.randn(count, 3, settings.size, settings.size, generator=generator)


def peak() -> float:
    """Return the largest resident set of this process so far, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure(what: str, settings: Settings) -> dict[str, float]:
    """Run one job in this process; return seconds and the growth of its peak memory in MB."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    ann = torchvision().models.get_model(settings.network, weights=None, num_classes=1000).eval()
    prepared = prepare(ann, (3, settings.size, settings.size))
    with torch.no_grad():
        ann(torch.zeros(1, 3, settings.size, settings.size))
    before, started = peak(), time.perf_counter()
    if what == "forward":
        with torch.no_grad():
            for x in batches(settings):
                ann(x)
    else:
        calibrate(prepared, MinError(), settings.timesteps, batches(settings))
    return {"seconds": round(time.perf_counter() - started, 2), "mb": round(peak() - before, 1)}


@click.command()
@click.option("--network", default="resnet50", show_default=True, help="A classifier of torchvision.")
@click.option("--samples", default=256, show_default=True)
@click.option("--size", default=224, show_default=True, help="Height and width of the images.")
@click.option("--batch", default=32, show_default=True)
@click.option("--timesteps", default=4, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--quick", is_flag=True, help="resnet18, 24 images of 64×64.")
def main(network: str, samples: int, size: int, batch: int, timesteps: int, seed: int, quick: bool) -> None:
    """Measure the forward passes alone, then calibration."""
    if quick:
        network, samples, size, batch = "resnet18", 24, 64, 8
    settings = Settings(network, samples, size, batch, timesteps, seed, torch.get_num_threads())
    print(
        f"seed {seed}, {network} at 3×{size}×{size}, {samples} images in batches of {batch}, T = {timesteps}, "
        f"lmh {__version__}, torch {torch.__version__}, {platform.machine()}, {settings.threads} threads"
    )
    figures = {}
    for what in ("forward", "policy"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            figures[what] = pool.apply(measure, (what, settings))
        print(f"{what:8} {figures[what]['seconds']:8.2f} s  peak memory + {figures[what]['mb']:.0f} MB")
    ratio = round(figures["policy"]["seconds"] / figures["forward"]["seconds"], 2)
    print(f"calibration takes {ratio} times the forward passes")
    print(json.dumps({**figures, "ratio": ratio, "network": network, "samples": samples, "size": size}))


if __name__ == "__main__":
    main()
