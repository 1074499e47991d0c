"""Accuracy without labels: what calibration and correction make of a third party's ResNet-20 on CIFAR-10, method × T.

    python benchmarks/calibration_cifar10.py --ann resnet20.th --data npz:cifar10.npz
    python benchmarks/calibration_cifar10.py --only "weights + thresholds" --timesteps 4 --test-samples 2000 --diagnose
    python benchmarks/calibration_cifar10.py --only reconstruction --only "reconstruction, IF" --timesteps 4 --seeds 3
    python benchmarks/calibration_cifar10.py --ann zoo:digits-cnn --data digits
    python benchmarks/calibration_cifar10.py --quick

T is the number of all steps that run, also where a delayed readout does not read the first of them. Reconstruction
and distillation draw the order of their samples; with --seeds n their figure is the mean of n runs, and half the spread
(largest less smallest) is printed beside it. Everything else gives the same each time. Distillation takes 2,400 batches
of 64 images through the quantised network and 5,760/T through the spikes, at most 1,440; reconstruction 800/T a block:
beyond T = 4 each T costs about the same, and it does not matter how many images there are.

Without --ann and --data both are looked for in the folder LMH_TEST_DATA (packs of lossless WebP images, and
``cifar10-resnet20-idelbayev.th``); with --quick and neither, the zoo's digits network takes their place. Every figure
is for the first N test images, in the order of the seed, after a conversion that saw unlabelled training images only.

Each (method, T) is kept in a JSON file, so that an interrupted run goes on where it stopped; figures of other settings
or another state of the code are not taken from it. To add a method, add a line to FIXED or DRAWN.

Prints its settings, a table, and as the last line one JSON object: `ann`, `best` (the best accuracy at each T),
`policies` (accuracy by method, then by T), `seconds` (to convert and correct), `spread` and the settings.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import lmh.calibrate
import lmh.convert
import lmh.finetune
from lmh import LMH, DelayedReadout, PerChannel, __version__
from lmh.artifact import write_atomically
from lmh.calibrate import (
    USUAL_CORRECTIONS,
    Correction,
    KLDivergence,
    LocalThresholdBalancing,
    Max,
    MinError,
    Percentile,
    Policy,
    Reconstruction,
    SpikingMinError,
    WeightRegression,
    automatic,
    diagnose,
)
from lmh.convert import Conversion, convert, refine
from lmh.convert.calibration_cli import CORRECTIONS
from lmh.convert.loading import load_source
from lmh.finetune import BFloat16, Float32, LabelFree, distill
from lmh.finetune.precision import Precision
from lmh.kernels import Kernel, can_compile, use_kernel
from lmh.pages import keep_freed_memory
from lmh.zoo import Batches, Preprocessing, load_data, seeded_order
from lmh.zoo.images import Split

WEIGHTS = "cifar10-resnet20-idelbayev.th"
FOLDER = "LMH_TEST_DATA"
FRAMES = 128
"""Images times T of a batch that is measured; more of them leave the cache."""


@dataclass(frozen=True)
class Task:
    """What a method works on.

    Attributes:
        ann: the network.
        images: unlabelled, as it takes them, [N, C, H, W].
        augmented: batches of the same images, anew for each epoch.
        precision: of distillation.
        timesteps: T.
        seed: of what is drawn.
    """

    ann: nn.Module
    images: Tensor
    augmented: Batches
    precision: Precision
    timesteps: int = 4
    seed: int = 0


Method = Callable[[Task], Conversion]


def thresholds(policy: Policy) -> Method:
    """A policy alone."""
    return lambda task: convert(task.ann, task.timesteps, data=task.images, calibration=policy)


def delayed(*corrections: Correction) -> Method:
    """As :func:`refined`, and the first half of the T steps is not read."""

    def method(task: Task) -> Conversion:
        readout = DelayedReadout(task.timesteps // 2) if task.timesteps > 1 else None
        first = convert(task.ann, task.timesteps, data=task.images, readout=readout)
        return refine(first, task.images, corrections=corrections)

    return method


def refined(
    *corrections: Correction, neuron: LMH | None = None, reconstruction: Reconstruction | None = None
) -> Method:
    """The thresholds that are found unless one names a policy, then corrections, then reconstruction.

    The steps of ``reconstruction`` are those at T = 4; with more or fewer T there are fewer or more of them.
    """

    def method(task: Task) -> Conversion:
        first = convert(task.ann, task.timesteps, data=task.images, neuron=neuron)
        own = reconstruction
        if own is not None:
            own = replace(own, steps=ceil(4 * own.steps / task.timesteps), seed=task.seed)
        return refine(first, task.images, corrections=corrections, reconstruction=own)

    return method


def distilled(qcfs_steps: int, steps: int) -> Method:
    """The quantised network, corrections, then the spikes.

    Args:
        qcfs_steps: batches of augmented images through the quantised network.
        steps: those through the spikes at T ≤ 4; with more T there are fewer of them, at the same cost.
    """

    def method(task: Task) -> Conversion:
        first = convert(task.ann, task.timesteps, data=task.images)
        batches = len(task.augmented)
        own = LabelFree(
            epochs=ceil(steps * min(1, 4 / task.timesteps) / batches),
            qcfs_epochs=ceil(qcfs_steps / batches),
            precision=task.precision,
            seed=task.seed,
        )
        return distill(first, replace(task.augmented, shuffle_seed=task.seed), own, still=task.images)

    return method


def named(name: str) -> tuple[Correction, ...]:
    """Return the corrections that ``--correct`` knows by the names in ``weights + thresholds``, say."""
    return tuple(CORRECTIONS[part] for part in name.split(" + "))


FIT = Reconstruction(steps=200, neuron_lr=0.03, weight_lr=1e-3)
FIXED: dict[str, Method] = {
    "max": thresholds(Max()),
    "percentile 99.9": thresholds(Percentile(99.9)),
    "batchnorm statistics": thresholds(automatic(has_data=False)),
    "kl divergence": thresholds(KLDivergence()),
    "local threshold balancing": thresholds(LocalThresholdBalancing()),
    "minerror, L = T": thresholds(MinError()),
    "minerror": thresholds(automatic(has_data=True)),
    "minerror, delayed": delayed(),
    **{name: refined(*named(name)) for name in ("v_init", "batchnorm", "biases", "biases + v_init", "thresholds")},
    "weights": refined(*named("weights")),
    "weights + thresholds": refined(*USUAL_CORRECTIONS),
    "weights + thresholds, delayed": delayed(*USUAL_CORRECTIONS),
    "weights + thresholds with leaks": refined(
        WeightRegression(), SpikingMinError(("lambda_s",)), neuron=LMH(granularity=PerChannel())
    ),
}
DRAWN: dict[str, Method] = {
    "reconstruction": refined(reconstruction=FIT),
    "reconstruction, IF": refined(reconstruction=replace(FIT, coefficients=False)),
    "reconstruction of neurons": refined(reconstruction=replace(FIT, weight_lr=0.0)),
    "reconstruction of neurons, IF": refined(reconstruction=replace(FIT, weight_lr=0.0, coefficients=False)),
    "weights + thresholds + reconstruction": refined(*USUAL_CORRECTIONS, reconstruction=FIT),
    "weights + thresholds + reconstruction, IF": refined(
        *USUAL_CORRECTIONS, reconstruction=replace(FIT, coefficients=False)
    ),
    "distilled, not through the spikes": distilled(2400, 0),
    "distilled, not quantised": distilled(0, 1440),
    "distilled": distilled(2400, 1440),
}
"""Those that give another network with another seed."""
METHODS = FIXED | DRAWN
QUICK = ("minerror", "weights + thresholds")


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
            f"pass --ann FILE (akamaster/pytorch_resnet_cifar10 has them: resnet20-12fca82f.th) and --data SPEC "
            f"(npz:FILE or cifar10:DIR), or set {FOLDER} to a folder with both."
        )
    found = load_data(data)
    return weights, data, found.train, found.test


def accuracy(network: nn.Module, images: Tensor, labels: Tensor, steps: int = 1) -> float:
    """Return the share of images whose class is right, after ``steps`` time steps each."""
    network = copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parts = images.to(memory_format=torch.channels_last).split(max(1, FRAMES // steps))
    with torch.no_grad(), use_kernel(Kernel.COMPILED if can_compile("cpu") else Kernel.FUSED):
        chosen = torch.cat([network(part).argmax(1) for part in parts])
    return float((chosen == labels).double().mean())


def code_digest() -> str:
    """Return the digest of the code that figures depend on."""
    found = hashlib.sha256()
    folders = [Path(str(module.__file__)).parent for module in (lmh, lmh.calibrate, lmh.convert, lmh.finetune)]
    for file in sorted(file for folder in folders for file in folder.glob("*.py")):
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
    """Return accuracies in per cent as a table in Markdown."""
    rows = [["method", *(f"T = {t}" for t in steps)], ["---"] * (1 + len(steps))]
    rows += [[name, *(f"{100 * row[str(t)]:.2f}" if str(t) in row else "" for t in steps)]
             for name, row in figures.items()]  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _figure(kept: Cache, name: str, task: Task, x: Tensor, labels: Tensor, diagnosed: bool) -> dict[str, float]:
    """Return what is kept of a run, or run it."""
    entry = f"{name}, seed {task.seed}, {type(task.precision).__name__}" if name in DRAWN else name
    figure = kept.get(entry, task.timesteps)
    if figure is None or diagnosed:
        started = time.perf_counter()
        conversion = METHODS[name](task)
        taken = time.perf_counter() - started
        figure = {"accuracy": accuracy(conversion.snn, x, labels, task.timesteps), "seconds": round(taken, 1)}
        kept.put(entry, task.timesteps, figure)
        if diagnosed:
            print("\n".join(diagnose(conversion.prepared, conversion.snn, task.images[:128]).lines()))
    return figure


@click.command()
@click.option("--ann", "--weights", "weights", help="The ANN: a file of weights, or a name of the zoo.")
@click.option("--data", metavar="SPEC", help="npz:FILE, cifar10:DIR, or another data set that fits.")
@click.option("--timesteps", default="1,2,4,8,16,32", show_default=True)
@click.option("--only", multiple=True, metavar="METHOD", help="Method to run; repeat for several.  [default: all]")
@click.option("--calibration-samples", default=1024, show_default=True)
@click.option("--test-samples", type=int, help="Test images to measure on.  [default: all]")
@click.option("--seed", default=0, show_default=True, help="Order of training and test images.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Runs of what draws anything.")
@click.option("--diagnose", "diagnosed", is_flag=True, help="Print what each site's error is made of.")
@click.option("--cache", type=click.Path(dir_okay=False, path_type=Path), default="runs/calibration_cifar10.json",
              show_default=True, help="Where figures are kept.")  # fmt: skip
@click.option("--amp", is_flag=True, help="Distil in bfloat16, channels last.")
@click.option("--quick", is_flag=True, help="Two methods, T = 2 and 4, few images.")
def main(
    weights: str | None,
    data: str | None,
    timesteps: str,
    only: tuple[str, ...],
    calibration_samples: int,
    test_samples: int | None,
    seed: int,
    seeds: int,
    diagnosed: bool,
    cache: Path,
    amp: bool,
    quick: bool,
) -> None:
    """Convert with every method at every T and measure."""
    keep_freed_memory()
    steps = [2, 4] if quick else [int(part) for part in timesteps.split(",")]
    names = only or (QUICK if quick else tuple(METHODS))
    if unknown := [name for name in names if name not in METHODS]:
        raise click.UsageError(f"no method {', '.join(unknown)}; expected {', '.join(METHODS)}.")
    if quick:
        calibration_samples, test_samples = min(calibration_samples, 128), min(test_samples or 200, 200)
    weights, data, train, test = opened(weights, data, quick)
    source = load_source(weights)
    preprocessing: Preprocessing = source.card.preprocessing  # type: ignore[union-attr]
    chosen = seeded_order(train, seed)[:calibration_samples]
    seen = train.images(chosen)
    order = seeded_order(test, seed)[:test_samples]
    shown, labels = test.images(order), test.labels[order]  # type: ignore[index]
    ann, images, x = source.model.eval(), preprocessing(seen), preprocessing(shown)
    augmented = Batches(train, preprocessing, 64, chosen, source.card.augmentation)  # type: ignore[union-attr]
    task = Task(ann, images, augmented, BFloat16() if amp else Float32())
    settings = {
        "weights": Path(weights).name, "data": digest(seen, shown, labels), "seed": seed, "code": code_digest(),
        "calibration_samples": len(seen), "test_samples": len(shown), "lmh": __version__, "torch": torch.__version__,
    }  # fmt: skip
    print(f"seed {seed}, {weights} on {data} (digest {settings['data']}), {len(seen)} unlabelled images to calibrate, "
          f"{len(shown)} to test, lmh {__version__}, torch {torch.__version__}, {platform.machine()}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    kept = Cache(cache, settings)
    reference = kept.get("ann", 0) or {"accuracy": accuracy(ann, x, labels)}
    kept.put("ann", 0, reference)
    print(f"ANN {100 * reference['accuracy']:.2f} %")
    figures: dict[str, dict[str, float]] = {name: {} for name in names}
    seconds: dict[str, dict[str, float]] = {name: {} for name in names}
    spread: dict[str, dict[str, float]] = {name: {} for name in names}
    for name in names:
        runs = range(seed, seed + seeds) if name in DRAWN else [seed]
        for t in steps:
            found = [_figure(kept, name, replace(task, timesteps=t, seed=run), x, labels, diagnosed) for run in runs]
            values = [figure["accuracy"] for figure in found]
            figures[name][str(t)] = sum(values) / len(values)
            seconds[name][str(t)] = found[0]["seconds"]
            if len(runs) > 1:
                spread[name][str(t)] = max(values) - min(values)
            beside = f" ± {50 * spread[name][str(t)]:.2f} ({len(runs)} runs)" if len(runs) > 1 else ""
            print(f"{name:42} T = {t:3}  {100 * figures[name][str(t)]:6.2f} %{beside}  "
                  f"found in {found[0]['seconds']:.1f} s", flush=True)  # fmt: skip
    print(table(figures, steps))
    best = {str(t): max(row[str(t)] for row in figures.values()) for t in steps}
    found = {"policies": figures, "seconds": seconds, "spread": {name: row for name, row in spread.items() if row}}
    print(json.dumps({"ann": reference["accuracy"], "best": best, **found, **settings}))


if __name__ == "__main__":
    main()
