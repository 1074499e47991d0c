"""Accuracy right after conversion, without training: calibration policy × T.

    python benchmarks/training_free.py
    python benchmarks/training_free.py --source resnet20.th --data npz:cifar10.npz --test-samples 2000

Prints its settings, a table, and as the last line one JSON object: `ann`, `accuracy` (by policy, then by T).
"""

from __future__ import annotations

import json
import platform
import time

import click
import torch

from lmh import __version__, evaluate
from lmh.calibrate import policy_text
from lmh.convert import convert
from lmh.convert.calibration_cli import PolicyType
from lmh.convert.cli_inputs import Amounts, open_inputs
from lmh.convert.loading import load_source

POLICIES = ("minerror", "max", "percentile:99.9", "batchnorm")


@click.command()
@click.option("--source", default="zoo:digits-cnn", show_default=True)
@click.option("--data", default="digits", show_default=True)
@click.option("--timesteps", default="4,8,16,32", show_default=True)
@click.option("--calibration-samples", default=512, show_default=True)
@click.option("--test-samples", type=int)
@click.option("--seed", default=0, show_default=True)
@click.option("--quick", is_flag=True, help="T = 4 and two policies only.")
def main(
    source: str, data: str, timesteps: str, calibration_samples: int, test_samples: int | None, seed: int, quick: bool
) -> None:
    """Convert with every policy at every T and measure."""
    steps = [4] if quick else [int(part) for part in timesteps.split(",")]
    policies = POLICIES[:2] if quick else POLICIES
    print(f"seed {seed}, {source} on {data}, lmh {__version__}, torch {torch.__version__}, {platform.machine()}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    found = load_source(source)
    accuracy: dict[str, dict[str, float]] = {}
    ann: float | None = None
    for name in policies:
        policy = PolicyType().convert(name, None, None)
        assert policy is not None
        accuracy[policy_text(policy)] = {}
        for t in steps:
            amounts = Amounts(calibration_samples, None, test_samples, seed)
            inputs = open_inputs(found, data, t, amounts, input_size=None, mean=None, std=None)
            assert inputs.test is not None
            started = time.perf_counter()
            snn = convert(found.model, t, data=inputs.calibration, calibration=policy).snn
            seconds = time.perf_counter() - started
            result = evaluate(snn, inputs.test, ann=found.model if ann is None else None)
            assert result.snn_accuracy is not None
            ann = result.ann_accuracy if ann is None else ann
            accuracy[policy_text(policy)][str(t)] = result.snn_accuracy[-1]
            print(f"{policy_text(policy):40} T = {t:3}  {100 * result.snn_accuracy[-1]:6.2f} %  n = {result.samples}  "
                  f"converted in {seconds:.1f} s")  # fmt: skip
    print(json.dumps({"ann": ann, "accuracy": accuracy}))


if __name__ == "__main__":
    main()
