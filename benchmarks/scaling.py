"""How time grows over T, batch and width for a deployed network, over depth for a conversion, and what compiling takes.

    python benchmarks/scaling.py

- Inference of ResNet-18 (3×32×32) over T and over the batch, and of six 3×3 convolutions over their width, deployed in
  fp32 and with int8 weights, beside the ANN in its faster order in memory: medians of ratios within a round.
- Conversion by MinError of torchvision's ResNets on 16 images of 64 pixels, beside one forward pass of the ANN on them.
- The first call of a deployed ResNet-18 in a fresh process, with an empty cache of compiled programs and with the one
  that this left.

Random weights, fp32 where nothing else is said. Prints its settings, tables, and as the last line one JSON object.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from functools import partial
from typing import Any

import click
import torch
from inference import faster, folded_ann, measured, ratio_to
from torch import Tensor, nn

from lmh import __version__
from lmh.convert import convert, deploy
from lmh.int8 import available
from lmh.pages import keep_freed_memory
from lmh.torchvision_shim import torchvision

TIMESTEPS, BATCHES, WIDTHS = (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32), (16, 32, 64, 128)
DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
FIRST_CALL = """
import sys, time, torch
from lmh.convert import convert, deploy
from lmh.torchvision_shim import torchvision
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
x = torch.randn(8, 3, 32, 32)
snn = deploy(convert(torchvision().models.resnet18(weights=None).eval(), 4, data=x))
with torch.inference_mode():
    started = time.perf_counter()
    snn(x)
    first = time.perf_counter() - started
    started = time.perf_counter()
    snn(x)
print(first, time.perf_counter() - started)
"""


def plain(width: int) -> nn.Module:
    """Six convolutions of a width."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs in (3, *[width] * 5):
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)).eval()


def ratios(ann: nn.Module, images: Tensor, timesteps: int, rounds: int) -> dict[str, float]:
    """The deployed network's time in fp32 and with int8 weights, the ANN's = 1."""
    last = copy.deepcopy(ann).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images_last = images.contiguous(memory_format=torch.channels_last)
    conversion = convert(ann, timesteps, data=images)
    forms = {"fp32": False, **({"int8": True} if available() else {})}
    networks = {form: deploy(conversion, example=images, int8=int8) for form, int8 in forms.items()}
    sides = {form: partial(network, images) for form, network in networks.items()}
    taken = measured({"ANN": lambda: ann(images), "last": lambda: last(images_last), **sides}, rounds)
    base = faster(taken, ("ANN", "last"))
    return {form: round(ratio_to(taken[base], taken[form]), 3) for form in forms}


def conversion_row(name: str) -> dict[str, float]:
    """Seconds of a forward pass, of a conversion without data, and of one with MinError."""
    torch.manual_seed(0)
    ann, images = getattr(torchvision().models, name)(weights=None).eval(), torch.randn(16, 3, 64, 64)

    def seconds(work: Any) -> float:
        work()
        started = time.perf_counter()
        work()
        return round(time.perf_counter() - started, 3)

    with torch.inference_mode():
        forward = seconds(lambda: ann(images))
    return {
        "forward": forward,
        "without_data": seconds(lambda: convert(ann, 4, example_input=images[:1])),
        "minerror": seconds(lambda: convert(ann, 4, data=images)),
    }


def first_calls(threads: int) -> dict[str, float]:
    """Seconds of the first call with an empty cache, with a full one, and of a second call."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        command = [sys.executable, "-c", FIRST_CALL, str(threads)]
        outputs = [
            subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)
        ]
    (cold, _), (warm, again) = (map(float, output.stdout.split()) for output in outputs)
    return {"empty_cache": round(cold, 2), "full_cache": round(warm, 2), "second_call": round(again, 4)}


@click.command()
@click.option("--rounds", default=9, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--quick", is_flag=True, help="One size of each, one round: no figures to quote.")
def main(rounds: int, threads: int, quick: bool) -> None:
    """Measure every curve."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    most = 1 if quick else None
    rounds = 1 if quick else rounds
    versions = f"lmh {__version__}, torch {torch.__version__}, {platform.machine()}"
    print(f"seed 0, {rounds} rounds, {threads} threads, {versions}")
    generator = torch.Generator().manual_seed(0)

    def images(batch: int) -> Tensor:
        return torch.randn(batch, 3, 32, 32, generator=generator)

    resnet = folded_ann("resnet18")
    curves: dict[str, dict[int, dict[str, float]]] = {
        "T": {t: ratios(resnet, images(8), t, rounds) for t in TIMESTEPS[:most]},
        "batch": {n: ratios(resnet, images(n), 4, rounds) for n in BATCHES[:most]},
        "width": {w: ratios(plain(w), images(8), 4, rounds) for w in WIDTHS[:most]},
    }
    for name, curve in curves.items():
        print(f"\n{name:>10}{'fp32':>9}{'int8':>9}   time, ANN = 1")
        for value, row in curve.items():
            print(f"{value:10}" + "".join(f"{ratio:9.2f}" for ratio in row.values()))
    print(f"\n{'':12}{'forward':>10}{'no data':>10}{'MinError':>10}   seconds of a conversion")
    depth = {name: conversion_row(name) for name in DEPTHS[: 1 if quick else None]}
    for name, row in depth.items():
        print(f"{name:12}{row['forward']:10.2f}{row['without_data']:10.2f}{row['minerror']:10.2f}")
    compiling = first_calls(threads)
    print("\nfirst call in a process: " + ", ".join(f"{name} {value} s" for name, value in compiling.items()))
    print(json.dumps({**curves, "depth": depth, "first_call": compiling}))


if __name__ == "__main__":
    main()
