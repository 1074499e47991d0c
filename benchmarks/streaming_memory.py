"""Peak memory of inference over T: all steps at once, one at a time, and as many as fit.

    python benchmarks/streaming_memory.py

torchvision's ResNet-18 for images of 32 pixels at random weights, deployed, 64 images, fp32. Every figure is the
largest resident set of a process of its own, with all that Python and torch take; ``fit`` has 50 MB for its tensors.
Prints its settings, a table, and as the last line one JSON object.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
from concurrent.futures import ProcessPoolExecutor

import click
import torch

from lmh import Fit, __version__, streamed
from lmh.convert import convert, deploy
from lmh.finetune.log import peak_memory_mb
from lmh.torchvision_shim import torchvision

MOST_AT_ONCE = 64
CHUNKS: dict[str, int | Fit | None] = {"streamed": 1, "fit": Fit(megabytes=50), "at_once": None}


def peak(timesteps: int, chunk: int | Fit | None, images: int) -> float | None:
    """Megabytes that this process holds at most."""
    torch.manual_seed(0)
    x = torch.randn(images, 3, 32, 32)
    snn = deploy(convert(torchvision().models.resnet18(weights=None).eval(), timesteps, data=x[:4]))
    with torch.inference_mode():
        snn(x) if chunk is None else streamed(snn, x, chunk=chunk)
    found = peak_memory_mb(torch.device("cpu"))
    return None if found is None else round(found, 1)


def fresh(timesteps: int, chunk: int | Fit | None, images: int) -> float | None:
    """The same in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak, timesteps, chunk, images).result()


@click.command()
@click.option("--timesteps", default="4,64,512", show_default=True)
@click.option("--images", default=64, show_default=True)
@click.option("--quick", is_flag=True, help="4 images, T = 2: no figures to quote.")
def main(timesteps: str, images: int, quick: bool) -> None:
    """Measure every T."""
    images = 4 if quick else images
    steps = [2] if quick else [int(part) for part in timesteps.split(",")]
    print(f"seed 0, ResNet-18, {images} images, lmh {__version__}, torch {torch.__version__}, {platform.machine()}")
    print(f"{'T':>6}" + "".join(f"{name + ' MB':>14}" for name in CHUNKS))
    figures: dict[str, dict[str, float | None]] = {name: {} for name in CHUNKS}
    for t in steps:
        line = f"{t:6}"
        for name, chunk in CHUNKS.items():
            found = fresh(t, chunk, images) if chunk is not None or t <= MOST_AT_ONCE else None
            figures[name][str(t)] = found
            line += f"{'not run' if found is None else round(found):>14}"
        print(line)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
