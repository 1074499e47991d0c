"""Accuracy without labels: what calibration and correction make of a third party's ResNet-20 on CIFAR-10, method × T.

    python benchmarks/calibration_cifar10.py --weights resnet20.th --data npz:cifar10.npz
    python benchmarks/calibration_cifar10.py --only "weights + spiking minerror" --timesteps 4 --test-samples 2000
    python benchmarks/calibration_cifar10.py --quick

Without --weights and --data both are looked for in the folder LMH_TEST_DATA (packs of lossless WebP images, and
``cifar10-resnet20-idelbayev.th``); with --quick and neither, the zoo's digits network takes their place. Every figure
is for the first N test images, in the order of the seed, after a conversion that saw unlabelled training images only.

Each (method, T) is kept in a JSON file, so that an interrupted run goes on where it stopped; figures of other settings
or another state of the code are not taken from it. To add a method, add a line to METHODS.

Prints its settings, a table, and as the last line one JSON object: `ann`, `best` (the best accuracy at each T),
`policies` (accuracy by method, then by T), `seconds` (to convert and correct) and the settings.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import lmh
from lmh import LMH, PerChannel, __version__
from lmh.artifact import write_atomically
from lmh.calibrate import (
    BatchNormReestimation,
    BatchNormStatistics,
    BiasCorrection,
    Correction,
    InitialPotential,
    KLDivergence,
    LocalThresholdBalancing,
    Max,
    MinError,
    Percentile,
    Policy,
    SpikingMinError,
    WeightRegression,
    automatic,
    correct,
)
from lmh.convert import assemble, convert
from lmh.convert.loading import load_source
from lmh.zoo import Preprocessing, load_data, seeded_order
from lmh.zoo.images import Split

WEIGHTS = "cifar10-resnet20-idelbayev.th"
FOLDER = "LMH_TEST_DATA"


@dataclass(frozen=True)
class Task:
    """What a method works on: the ANN, unlabelled images as it takes them, [N, C, H, W], and T."""

    ann: nn.Module
    images: Tensor
    timesteps: int


Method = Callable[[Task], nn.Module]


def thresholds(policy: Policy) -> Method:
    """A policy alone."""
    return lambda task: convert(task.ann, task.timesteps, data=task.images, calibration=policy).snn


def corrected(*corrections: Correction, neuron: LMH | None = None) -> Method:
    """The thresholds that are found unless one names a policy, then corrections."""

    def method(task: Task) -> nn.Module:
        first = convert(task.ann, task.timesteps, data=task.images, neuron=neuron)
        calibration = correct(first.snn, first.prepared, task.images, corrections, calibration=first.calibration)
        return assemble(first.prepared, calibration, first.recipe).snn

    return method


METHODS: dict[str, Method] = {
    "max": thresholds(Max()),
    "percentile 99.9": thresholds(Percentile(99.9)),
    "batchnorm statistics": thresholds(BatchNormStatistics(levels_per_step=0.5, base_levels=2.0)),
    "kl divergence": thresholds(KLDivergence()),
    "local threshold balancing": thresholds(LocalThresholdBalancing()),
    "minerror, L = T": thresholds(MinError()),
    "minerror": thresholds(automatic(has_data=True)),
    "v_init": corrected(InitialPotential()),
    "batchnorm": corrected(BatchNormReestimation()),
    "biases": corrected(BiasCorrection()),
    "biases + v_init": corrected(BiasCorrection(), InitialPotential()),
    "spiking minerror": corrected(SpikingMinError()),
    "weights": corrected(WeightRegression()),
    "weights + spiking minerror": corrected(WeightRegression(), SpikingMinError()),
    "weights + spiking minerror with leaks": corrected(
        WeightRegression(), SpikingMinError(("lambda_s",)), neuron=LMH(granularity=PerChannel())
    ),
}
QUICK = ("minerror", "weights + spiking minerror")


class Pack:
    """A part of CIFAR-10 in files of lossless WebP images, decoded when asked for."""

    def __init__(self, folder: Path, part: str) -> None:
        files = sorted(folder.glob(f"cifar10-{part}-*.npz"))
        if not files:
            raise click.UsageError(f"{folder} has no cifar10-{part}-*.npz. Pass --data npz:FILE.")
        packs = [np.load(file) for file in files]
        self.bytes = [pack["webp"].tobytes() for pack in packs]
        self.places = [
            (which, int(start), int(end))
            for which, pack in enumerate(packs)
            for start, end in zip(pack["offsets"][:-1], pack["offsets"][1:], strict=True)
        ]
        self.labels = torch.from_numpy(np.concatenate([pack["labels"] for pack in packs]).astype(np.int64))

    def __len__(self) -> int:
        return len(self.places)

    def images(self, indices: Tensor) -> Tensor:
        """Return uint8 [n, 3, 32, 32]."""
        decoded = []
        for index in indices.tolist():
            which, start, end = self.places[index]
            decoded.append(np.asarray(Image.open(io.BytesIO(self.bytes[which][start:end])).convert("RGB")))
        return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)


def opened(weights: str | None, data: str | None, quick: bool) -> tuple[str, str, Split, Split]:
    """Return the names of weights and data, and both splits."""
    folder = os.environ.get(FOLDER)
    if quick and weights is None and data is None and folder is None:
        weights, data = "zoo:digits-cnn", "digits"
    if weights is None and folder is not None:
        weights = str(Path(folder) / WEIGHTS)
    if data is None and folder is not None:
        return str(weights), "CIFAR-10 packs", Pack(Path(folder), "train"), Pack(Path(folder), "test")
    if weights is None or data is None:
        raise click.UsageError(
            f"pass --weights FILE (akamaster/pytorch_resnet_cifar10 has them: resnet20-12fca82f.th) and --data SPEC "
            f"(npz:FILE or cifar10:DIR), or set {FOLDER} to a folder with both."
        )
    found = load_data(data)
    return weights, data, found.train, found.test


def accuracy(network: nn.Module, images: Tensor, labels: Tensor, batch: int) -> float:
    """Return the share of images whose class is right."""
    with torch.no_grad():
        chosen = torch.cat([network(part).argmax(1) for part in images.split(batch)])
    return float((chosen == labels).double().mean())


def code_digest() -> str:
    """Return the digest of the code that figures depend on."""
    found = hashlib.sha256()
    modules = [lmh, *(__import__(f"lmh.{name}", fromlist=["x"]) for name in ("calibrate", "convert"))]
    for file in sorted(file for module in modules for file in Path(str(module.__file__)).parent.glob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def digest(*tensors: Tensor) -> str:
    """Return the digest of what tensors hold."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


class Cache:
    """Figures by settings, method and T, in a file."""

    def __init__(self, path: Path, settings: dict[str, object]) -> None:
        self.path, self.key = path, json.dumps(settings, sort_keys=True)
        self.all = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, name: str, timesteps: int) -> dict[str, float] | None:
        """Return a figure, if it is there."""
        return self.all.get(self.key, {}).get(f"{name} @ {timesteps}")

    def put(self, name: str, timesteps: int, figure: dict[str, float]) -> None:
        """Keep a figure."""
        self.all.setdefault(self.key, {})[f"{name} @ {timesteps}"] = figure
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.all, indent=1).encode())


def table(figures: dict[str, dict[str, float]], steps: Sequence[int]) -> str:
    """Return accuracies in per cent as lines of text."""
    width = max(map(len, figures))
    lines = ["method".ljust(width) + "".join(f"  T ={t:3}" for t in steps)]
    for name, row in figures.items():
        cells = (f"{100 * row[str(t)]:7.2f}" if str(t) in row else " " * 7 for t in steps)
        lines.append(name.ljust(width) + "".join(cells))
    return "\n".join(lines)


@click.command()
@click.option("--weights", help="The ANN: a file of weights, or a name of the zoo.")
@click.option("--data", metavar="SPEC", help="npz:FILE, cifar10:DIR, or another data set that fits.")
@click.option("--timesteps", default="1,2,4,8,16,32", show_default=True)
@click.option("--only", multiple=True, metavar="METHOD", help="Method to run; repeat for several.  [default: all]")
@click.option("--calibration-samples", default=1024, show_default=True)
@click.option("--test-samples", type=int, help="Test images to measure on.  [default: all]")
@click.option("--seed", default=0, show_default=True, help="Order of training and test images.")
@click.option("--cache", type=click.Path(dir_okay=False, path_type=Path), default="runs/calibration_cifar10.json",
              show_default=True, help="Where figures are kept.")  # fmt: skip
@click.option("--quick", is_flag=True, help="Two methods, T = 2 and 4, few images.")
def main(
    weights: str | None,
    data: str | None,
    timesteps: str,
    only: tuple[str, ...],
    calibration_samples: int,
    test_samples: int | None,
    seed: int,
    cache: Path,
    quick: bool,
) -> None:
    """Convert with every method at every T and measure."""
    steps = [2, 4] if quick else [int(part) for part in timesteps.split(",")]
    names = only or (QUICK if quick else tuple(METHODS))
    if unknown := [name for name in names if name not in METHODS]:
        raise click.UsageError(f"no method {', '.join(unknown)}; expected {', '.join(METHODS)}.")
    if quick:
        calibration_samples, test_samples = min(calibration_samples, 128), min(test_samples or 200, 200)
    weights, data, train, test = opened(weights, data, quick)
    source = load_source(weights)
    preprocessing: Preprocessing = source.card.preprocessing  # type: ignore[union-attr]
    seen = train.images(seeded_order(train, seed)[:calibration_samples])
    order = seeded_order(test, seed)[:test_samples]
    shown, labels = test.images(order), test.labels[order]  # type: ignore[index]
    ann, images, x = source.model.eval(), preprocessing(seen), preprocessing(shown)
    settings = {
        "weights": Path(weights).name, "data": digest(seen, shown, labels), "seed": seed, "code": code_digest(),
        "calibration_samples": len(seen), "test_samples": len(shown), "lmh": __version__, "torch": torch.__version__,
    }  # fmt: skip
    print(f"seed {seed}, {weights} on {data} (digest {settings['data']}), {len(seen)} unlabelled images to calibrate, "
          f"{len(shown)} to test, lmh {__version__}, torch {torch.__version__}, {platform.machine()}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    kept = Cache(cache, settings)
    reference = kept.get("ann", 0) or {"accuracy": accuracy(ann, x, labels, 256)}
    kept.put("ann", 0, reference)
    print(f"ANN {100 * reference['accuracy']:.2f} %")
    figures: dict[str, dict[str, float]] = {name: {} for name in names}
    seconds: dict[str, dict[str, float]] = {name: {} for name in names}
    for name in names:
        for t in steps:
            figure = kept.get(name, t)
            if figure is None:
                started = time.perf_counter()
                snn = METHODS[name](Task(ann, images, t))
                taken = time.perf_counter() - started
                figure = {"accuracy": accuracy(snn, x, labels, max(8, 512 // t)), "seconds": round(taken, 1)}
                kept.put(name, t, figure)
            figures[name][str(t)], seconds[name][str(t)] = figure["accuracy"], figure["seconds"]
            print(
                f"{name:40} T = {t:3}  {100 * figure['accuracy']:6.2f} %  found in {figure['seconds']:.1f} s",
                flush=True,
            )
    print(table(figures, steps))
    best = {str(t): max(row[str(t)] for row in figures.values()) for t in steps}
    print(json.dumps({"ann": reference["accuracy"], "best": best, "policies": figures, "seconds": seconds, **settings}))


if __name__ == "__main__":
    main()
