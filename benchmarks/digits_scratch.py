"""digits-cnn from scratch: progressive STBP, and time slices, over seeds.

    python benchmarks/digits_scratch.py

An untrained digits-cnn becomes a spiking network and is trained on scikit-learn's 1,437 training digits by progressive
STBP at T = 4, and by time slices of 2 and 3 steps at T = 6, all from LIF neurons, each with three seeds; no teacher.
Accuracy is that of the last epoch on all 360 test digits, which no choice depended on. SLTT and STBP at T = 6 stand
beside them. Prints the table, and as the last line one JSON object.
"""

from __future__ import annotations

import json
import platform
import statistics
import time

import click
import torch

from lmh import LMH, __version__, prefixes, zoo
from lmh.finetune import SLTT, STBP, Progressive, Schedule, TimeSliced, finetune
from lmh.finetune.strategies import Strategy
from lmh.spiking import LIF

NEURON = LMH(LIF(0.5))
RUNS: dict[str, tuple[int, Strategy]] = {
    "progressive STBP": (4, Progressive()),
    "time slices, k = 2": (6, TimeSliced(2, neuron=NEURON)),
    "time slices, k = 3": (6, TimeSliced(3, neuron=NEURON)),
    "SLTT": (6, SLTT(NEURON)),
    "STBP": (6, STBP(NEURON)),
}


def run(timesteps: int, strategy: Strategy, epochs: int, seed: int, samples: int) -> tuple[list[float], float]:
    """Return the accuracy in % after every step, and the seconds of training."""
    data, card = zoo.load_data("digits"), zoo.card("digits-cnn")
    torch.manual_seed(seed)
    train = zoo.Batches(
        data.train, card.preprocessing, 32, torch.arange(samples), augmentation=card.augmentation, shuffle_seed=seed
    )
    schedule = Schedule(epochs=epochs, lr=0.05, warmup_steps=40, seed=seed)
    begun = time.perf_counter()
    snn = finetune(card.build(), train, timesteps=timesteps, strategy=strategy, schedule=schedule).snn
    seconds = time.perf_counter() - begun
    correct = torch.zeros(timesteps)
    with torch.no_grad():
        for x, y in zoo.Batches(data.test, card.preprocessing):
            correct += (prefixes(snn, x).argmax(-1) == y).sum(1)
    return [round(100 * value / len(data.test), 2) for value in correct.tolist()], seconds


@click.command()
@click.option("--epochs", default=30, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--quick", is_flag=True, help="One seed, one epoch of 64 digits: no figures to quote.")
def main(epochs: int, seeds: int, threads: int, quick: bool) -> None:
    """Train by every strategy with every seed."""
    if quick:
        epochs, seeds = 1, 1
    torch.set_num_threads(threads)
    samples = 64 if quick else len(zoo.load_data("digits").train)
    test = len(zoo.load_data("digits").test)
    print(f"seeds 0 to {seeds - 1}, {epochs} epochs of {samples} digits, n = {test} test digits, {threads} threads, "
          f"lmh {__version__}, torch {torch.__version__}, {platform.machine()}")  # fmt: skip
    results = {}
    for name, (timesteps, strategy) in RUNS.items():
        found = [run(timesteps, strategy, epochs, seed, samples) for seed in range(seeds)]
        last = [accuracies[-1] for accuracies, _ in found]
        results[name] = {
            "timesteps": timesteps,
            "accuracy": last,
            "mean": round(statistics.mean(last), 2),
            "by_step": [accuracies for accuracies, _ in found],
            "seconds": round(statistics.mean(seconds for _, seconds in found), 1),
        }
        print(f"{name:20} T = {timesteps}  {'  '.join(f'{value:6.2f}' for value in last)}  mean "
              f"{results[name]['mean']:6.2f} %  {results[name]['seconds']:6.1f} s", flush=True)  # fmt: skip
    print(json.dumps(results))


if __name__ == "__main__":
    main()
