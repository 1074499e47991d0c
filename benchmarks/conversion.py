"""One trained network converted by this package and by the converters of other libraries, without labels or training.

    python benchmarks/conversion.py --ann cifar10-resnet20-idelbayev.th --data npz:cifar10.npz

Each gets the same ANN and the same unlabelled training images and is run as its documentation says: ours with weights
and thresholds corrected (what ``lmh-convert`` does where that pays), and with thresholds alone;
SpikingJelly's converter with its rate-coding recipe (largest activation, 99.9th percentile, per channel with half a
threshold to start from) and its recipe of local threshold balancing; sinabs' ``from_model``, without calibration.
snnTorch has no converter. Accuracy is that of the mean output after T steps. What cannot be converted says why; what is
not installed is left out:

    python -m pip install --no-deps --requirement benchmarks/peers/requirements.txt
"""

from __future__ import annotations

import copy
import importlib.util
import json
import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import click
import torch
from calibration_cifar10 import opened
from peers import versions
from torch import Tensor, nn

from lmh import __version__
from lmh.calibrate import SpikingMinError, WeightRegression
from lmh.convert import convert, load_source, refine
from lmh.zoo import Preprocessing, seeded_order

BALANCING_PASSES = 40
Answers = Callable[[Tensor], Tensor]
Method = Callable[[nn.Module, Tensor, int], Answers]


def ours(ann: nn.Module, images: Tensor, timesteps: int, *, corrected: bool) -> Answers:
    """This package."""
    conversion = convert(ann, timesteps, data=images)
    if corrected:
        conversion = refine(conversion, images, corrections=[WeightRegression(), SpikingMinError()])
    return conversion.snn


def spikingjelly(ann: nn.Module, images: Tensor, timesteps: int, *, recipe: Callable[[Any], Any]) -> Answers:
    """SpikingJelly: T calls, and a reset before."""
    from spikingjelly.activation_based import ann2snn, functional

    batches = [(part, torch.zeros(len(part))) for part in images.split(128)]
    network = ann2snn.Converter(recipe=recipe(batches), device="cpu").convert(copy.deepcopy(ann)).eval()

    def answers(x: Tensor) -> Tensor:
        functional.reset_net(network)
        total = network(x)
        for _ in range(timesteps - 1):
            total = total + network(x)
        return total / timesteps

    return answers


def rate_coding(batches: Any, **options: Any) -> Any:
    """SpikingJelly's recipe of thresholds from activations."""
    from spikingjelly.activation_based.ann2snn.recipes import RateCodingRecipe

    return RateCodingRecipe(batches, **options)


def balancing(batches: Any) -> Any:
    """SpikingJelly's recipe of local threshold balancing, which moves θ with every batch of hundreds."""
    from spikingjelly.activation_based.ann2snn.recipes import LocalThresholdBalancingRecipe

    return LocalThresholdBalancingRecipe(BALANCING_PASSES * batches)


def sinabs(ann: nn.Module, _images: Tensor, timesteps: int) -> Answers:
    """Sinabs: every ReLU becomes a layer of neurons of threshold 1, and the steps lie in the batch."""
    from sinabs.from_torch import from_model

    network = from_model(copy.deepcopy(ann), num_timesteps=timesteps).spiking_model.eval()

    def answers(x: Tensor) -> Tensor:
        for module in network.modules():
            if hasattr(module, "reset_states"):
                module.reset_states()
        return network(x.repeat_interleave(timesteps, 0)).unflatten(0, (-1, timesteps)).mean(1)

    return answers


METHODS: dict[str, tuple[str | None, Method]] = {
    "ours": (None, partial(ours, corrected=True)),
    "ours, thresholds alone": (None, partial(ours, corrected=False)),
    "SpikingJelly, max": ("spikingjelly", partial(spikingjelly, recipe=partial(rate_coding, mode="Max"))),
    "SpikingJelly, 99.9 %": ("spikingjelly", partial(spikingjelly, recipe=partial(rate_coding, mode="99.9%"))),
    "SpikingJelly, 99.9 %, per channel, half": (
        "spikingjelly",
        partial(spikingjelly, recipe=partial(rate_coding, mode="99.9%", channel_wise=True, half_threshold=True)),
    ),
    "SpikingJelly, local threshold balancing": ("spikingjelly", partial(spikingjelly, recipe=balancing)),
    "sinabs": ("sinabs", sinabs),
}


def accuracy(answers: Answers, x: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    with torch.inference_mode():
        found = torch.cat([answers(part).argmax(1) for part in x.split(100)])
    return float((found == labels).double().mean())


@click.command()
@click.option("--ann", "weights", help="The ANN: a file of weights, or a name of the zoo.")
@click.option("--data", metavar="SPEC", help="npz:FILE, cifar10:DIR, or another data set that fits.")
@click.option("--timesteps", default="4,8,16,32", show_default=True)
@click.option("--calibration-samples", default=1024, show_default=True)
@click.option("--test-samples", default=2000, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Order of training and test images.")
@click.option("--quick", is_flag=True, help="T = 2, few images.")
def main(
    weights: str | None, data: str | None, timesteps: str, calibration_samples: int, test_samples: int, seed: int,
    quick: bool,
) -> None:  # fmt: skip
    """Convert by every library at every T and measure."""
    steps = [2] if quick else [int(part) for part in timesteps.split(",")]
    if quick:
        calibration_samples, test_samples = 128, 200
    weights, data, train, test = opened(weights, data, quick)
    source = load_source(weights)
    preprocessing: Preprocessing = source.card.preprocessing  # type: ignore[union-attr]
    images = preprocessing(train.images(seeded_order(train, seed)[:calibration_samples]))
    order = seeded_order(test, seed)[:test_samples]
    x, labels, ann = preprocessing(test.images(order)), test.labels[order], source.model.eval()  # type: ignore[index]
    print(f"seed {seed}, {weights} on {data}, {len(images)} unlabelled images, {len(x)} to test, lmh {__version__}, "
          f"torch {torch.__version__}, {versions()}, {platform.machine()}")  # fmt: skip
    figures: dict[str, Any] = {"ann": accuracy(ann, x, labels)}
    print(f"ANN {100 * figures['ann']:.2f} %")
    for name, (library, method) in METHODS.items():
        if library is not None and not importlib.util.find_spec(library):
            continue
        try:
            figures[name] = {str(t): accuracy(method(ann, images, t), x, labels) for t in steps}
        except ValueError as error:  # how SpikingJelly refuses a network
            figures[name] = None
            row = f"refused: {error}"
        else:
            row = "  ".join(f"T = {t}: {100 * figures[name][str(t)]:6.2f}" for t in steps)
        print(f"{name:42}{row}", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
