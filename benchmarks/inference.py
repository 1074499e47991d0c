"""A deployed spiking network, in each of its forms, beside its ANN and beside the same network in other libraries.

    python benchmarks/inference.py
    python benchmarks/inference.py --network resnet50 --timesteps 4

torchvision's ResNet-18 (8×3×32×32) and ResNet-50 (2×3×224×224) at random weights, IF neurons, thresholds by MinError
from the same images, no gradients. The ANN's BatchNorm is folded, and its time is that of the faster order in memory;
every ratio is to it, in fp32. The spiking network is ``deploy(conversion, example=images)`` in fp32, in bfloat16, with
int8 weights, and with these in bfloat16; the ANN in bfloat16 stands beside them. A peer is the converted graph, with
BatchNorm folded and that library's IF nodes in the place of the activations (benchmarks/peers), in the faster order
in memory as well; what is not installed is left out. What both answer is compared, and a peer that answers otherwise
stops the script. All sides run in turn; a figure is the median over the rounds, a ratio the median of the ratios within
a round.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import click
import torch
import torch.fx.experimental.optimization
from peers import PeerNetwork, installed, versions
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lmh import __version__
from lmh.convert import convert, deploy, prepare
from lmh.int8 import available
from lmh.pages import keep_freed_memory
from lmh.torchvision_shim import torchvision

IMAGES = {"resnet18": (8, 3, 32, 32), "resnet50": (2, 3, 224, 224)}
TIMESTEPS = {"resnet18": (4,), "resnet50": (4, 8)}
FORMS: dict[str, dict[str, Any]] = {
    "deployed": {}, "bf16": {"dtype": torch.bfloat16}, "int8": {"int8": True},
    "int8, bf16": {"int8": True, "dtype": torch.bfloat16},
}  # fmt: skip
LAST = ", channels last"
MOST_DIFFERENT = 0.1
Work = Callable[[], Tensor]


def folded_ann(name: str) -> nn.Module:
    """A network with its BatchNorm folded."""
    torch.manual_seed(0)
    return torch.fx.experimental.optimization.fuse(getattr(torchvision().models, name)(weights=None).eval())


def measured(sides: dict[str, Work], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each side, round after round, after two rounds that do not count."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    with torch.inference_mode():
        for turn in range(rounds + 2):
            for name, work in sides.items():
                started = time.perf_counter()
                work()
                if turn > 1:
                    taken[name].append(1000 * (time.perf_counter() - started))
    return taken


def faster(taken: dict[str, list[float]], sides: Sequence[str]) -> str:
    """The side with the smaller median."""
    return min(sides, key=lambda side: statistics.median(taken[side]))


def ratio_to(base: list[float], side: list[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(side, base, strict=True))


def convolution_share(work: Work) -> float:
    """The part of the time that convolutions and matrix products take."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(3):
            work()
    times = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    return sum(taken for name, taken in times.items() if "conv" in name or "addmm" in name) / sum(times.values())


def row(name: str, timesteps: int, images: Tensor, rounds: int, with_profile: bool) -> dict[str, Any]:
    """Everything measured of one network at one T."""
    ann = folded_ann(name)
    last = copy.deepcopy(ann).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    conversion = convert(ann, timesteps, data=images)
    narrow = copy.deepcopy(last).to(torch.bfloat16)
    forms = {form: options for form, options in FORMS.items() if available() or "int8" not in options}
    networks = {form: deploy(conversion, example=images, **options) for form, options in forms.items()}
    snn = networks["deployed"]
    images_last = images.contiguous(memory_format=torch.channels_last)
    sides: dict[str, Work] = {
        "ANN": lambda: ann(images),
        "ANN" + LAST: lambda: last(images_last),
        "ANN, bf16": lambda: narrow(images_last.bfloat16()),
        **{form: partial(network, images) for form, network in networks.items()},
    }
    found: dict[str, Any] = {"network": name, "timesteps": timesteps}
    graph = prepare(ann, tuple(images.shape[1:])).model
    for peer, kind in installed().items():
        network = PeerNetwork(kind, graph, conversion).eval()
        sides[peer] = partial(network, images)
        sides[peer + LAST] = partial(copy.deepcopy(network).to(memory_format=torch.channels_last), images_last)  # type: ignore[call-overload]
        with torch.inference_mode():
            ours, theirs = snn(images), sides[peer]()
        difference = float((ours - theirs).norm() / ours.norm())
        print(f"{name:10} T = {timesteps:<4}{peer:20}answers differ by {difference:.2%}, by single spikes")
        if difference > MOST_DIFFERENT:
            raise click.ClickException(f"{peer} does another job: its answers differ by {difference:.0%}.")
        found[f"{peer}_difference"] = round(difference, 6)
    taken = measured(sides, rounds)
    base = faster(taken, ("ANN", "ANN" + LAST))
    for side, times in taken.items():
        ratio = ratio_to(taken[base], times)
        found[side] = {"ms": round(statistics.median(times), 2), "ratio": round(ratio, 3)}
        print(f"{name:10} T = {timesteps:<4}{side:20}{found[side]['ms']:10.1f} ms{ratio:8.2f} ×")
    for peer in installed():
        found[peer] = found[faster(taken, (peer, peer + LAST))]
    if with_profile:
        found["convolutions"] = round(convolution_share(sides["deployed"]), 3)
        print(
            f"{name:10} T = {timesteps:<4}convolutions and products: {found['convolutions']:.1%} of the deployed time"
        )
    return found


@click.command()
@click.option("--network", "names", multiple=True, type=click.Choice(list(IMAGES)), help="Both unless given.")
@click.option("--timesteps", "wanted", multiple=True, type=click.IntRange(1), help="4, and 8 for ResNet-50.")
@click.option("--rounds", default=15, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option(
    "--profile/--no-profile", "with_profile", default=True, help="Say how much of the time convolutions take."
)
@click.option("--quick", is_flag=True, help="ResNet-18, two rounds: no figures to quote.")
def main(
    names: tuple[str, ...], wanted: tuple[int, ...], rounds: int, threads: int, with_profile: bool, quick: bool
) -> None:
    """Measure every network and T."""
    if quick:
        names, rounds = names or ("resnet18",), 2
    torch.set_num_threads(threads)
    keep_freed_memory()
    print(f"seed 0, {rounds} rounds, {threads} threads, lmh {__version__}, torch {torch.__version__}, {versions()}, "
          f"{platform.machine()}")  # fmt: skip
    figures: dict[str, Any] = {}
    rows = []
    for name in names or IMAGES:
        images = torch.randn(IMAGES[name], generator=torch.Generator().manual_seed(0))
        for timesteps in wanted or TIMESTEPS[name]:
            found = row(name, timesteps, images, rounds, with_profile)
            rows.append(found)
            figures[f"{name}_t{timesteps}"] = found["deployed"]["ratio"]
            for form in [form for form in list(FORMS)[1:] if form in found]:
                figures[f"{name}_t{timesteps}_{form.replace(', ', '_')}"] = found[form]["ratio"]
            peers = {peer: found[peer]["ratio"] for peer in installed()}
            figures[f"peer_{name}_t{timesteps}"] = min(peers.values(), default=None)
            figures |= {f"{peer}_{name}_t{timesteps}": ratio for peer, ratio in peers.items()}
    print(json.dumps({**figures, "rows": rows}))


if __name__ == "__main__":
    main()
