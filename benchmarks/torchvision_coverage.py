"""What becomes of every torchvision classifier: one line each.

    python benchmarks/torchvision_coverage.py            # converts and compares
    python benchmarks/torchvision_coverage.py --quick    # four small models, T = 4 and 8

Random weights (seed 0), BatchNorm statistics re-estimated on the batch of 16 different inputs, 64×64 pixels or the
model's smallest input. A model is fully spiking, or spiking with surgery (coverage in %), or refused (first reason).
The cosine is between the outputs of ANN and SNN after each one's mean over the batch is subtracted; the wrong twin has
every threshold divided by 4. Last line: one JSON object.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmh import __version__, sites, zoo
from lmh.calibrate import MinError
from lmh.convert import Conversion, ReluSurgery, convert
from lmh.errors import LMHError
from lmh.time_axis import prefixes
from lmh.torchvision_shim import torchvision

QUICK = ("resnet18", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small")
SMALLEST = {"inception_v3": 96, "maxvit_t": 224}
TRANSFORMERS = ("vit_", "swin_")
LARGEST = ("vit_h_14", "regnet_y_128gf", "vit_l_16", "vit_l_32", "convnext_large")


def input_size(name: str) -> int:
    """Return the smallest input that a model takes, at least 64 pixels."""
    return 224 if name.startswith(TRANSFORMERS) else SMALLEST.get(name, 64)


def centred_cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two outputs [N, C] after each one's batch mean is subtracted."""
    return float(F.cosine_similarity((a - a.mean(0)).flatten(), (b - b.mean(0)).flatten(), dim=0))


def build(name: str, images: Tensor) -> nn.Module:
    """Return a model with random weights and BatchNorm statistics of ``images``."""
    torch.manual_seed(0)
    model = zoo.card(f"torchvision:{name}").build().train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    if norms:
        with torch.no_grad():
            model(images)
    return model.eval()


def cosines(conversion: Conversion, expected: Tensor, images: Tensor, steps: Sequence[int]) -> list[float]:
    """Return the centred cosine after each number of steps, from one run."""
    with torch.no_grad():
        outputs = torch.cat([prefixes(conversion.snn, part)[[t - 1 for t in steps]] for part in images.split(2)], 1)
    return [centred_cosine(output, expected) for output in outputs]


def wrong_twin(conversion: Conversion, expected: Tensor, images: Tensor, steps: int) -> float:
    """Return the cosine with every threshold divided by 4; the conversion is spoilt by it."""
    for site in sites(conversion.snn).values():
        site.base_threshold /= 4
    return cosines(conversion, expected, images, [steps])[0]


def examine(name: str, steps: Sequence[int], *, compare: bool) -> dict[str, object]:
    """Convert one model and return its line as values."""
    started = time.perf_counter()
    size = input_size(name)
    batch = 2 if name in LARGEST else 16
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    result: dict[str, object] = {"model": name, "coverage": 0.0, "fate": "refused", "traceback": False}
    try:
        model = build(name, images)
        try:
            conversion = convert(model, steps[-1], data=images, calibration=MinError())
            result["fate"] = "fully spiking"
        except LMHError as error:
            result["reason"] = str(error).splitlines()[1].strip(" -")[:110] if "\n" in str(error) else str(error)[:110]
            conversion = convert(model, steps[-1], data=images, calibration=MinError(), surgery=ReluSurgery())
            result["fate"] = "spiking with surgery"
        result["coverage"] = conversion.report.spiking_coverage
        if compare and batch > 2:
            with torch.no_grad():
                expected = model(images)
            result["cosine"] = cosines(conversion, expected, images, steps)
            result["wrong_twin"] = wrong_twin(conversion, expected, images, steps[-1])
    except LMHError as error:
        result["reason"] = str(error).splitlines()[-1].strip(" -")[:110]
    except Exception as error:
        result |= {"fate": "traceback", "traceback": True, "reason": f"{type(error).__name__}: {error}"[:110]}
    result["seconds"] = time.perf_counter() - started
    return result


def line(result: dict[str, object]) -> str:
    """Return the printed line of a model."""
    cosine = " ".join(f"{value:.3f}" for value in result.get("cosine", []))  # type: ignore[attr-defined]
    twin = f" wrong twin {result['wrong_twin']:.3f}" if "wrong_twin" in result else ""
    reason = "" if result["fate"] == "fully spiking" else f" [{result.get('reason', '')}]"
    share = 100 * float(result["coverage"])  # type: ignore[arg-type]
    return f"{result['model']:20} {result['fate']:21} {share:5.1f} % {cosine}{twin}{reason} {result['seconds']:.0f} s"


@click.command()
@click.option("--models", help="Names separated by commas; all unless given.")
@click.option("--timesteps", default="32,128", show_default=True)
@click.option("--audit-only", is_flag=True, help="Convert, but do not run the spiking networks.")
@click.option("--quick", is_flag=True, help="Four small models at T = 4 and 8.")
def main(models: str | None, timesteps: str, audit_only: bool, quick: bool) -> None:
    """Convert torchvision's classifiers and say what became of each."""
    module = torchvision().models
    names = QUICK if quick else models.split(",") if models else module.list_models(module=module)
    steps = [4, 8] if quick else [int(part) for part in timesteps.split(",")]
    print(f"seed 0, T = {steps}, lmh {__version__}, torch {torch.__version__}, {platform.machine()}, "
          f"{torch.get_num_threads()} threads; batch 2 for {', '.join(LARGEST)}", flush=True)  # fmt: skip
    results = []
    for name in names:
        results.append(examine(name, steps, compare=not audit_only))
        print(line(results[-1]), flush=True)
    fully = [result for result in results if result["fate"] == "fully spiking"]
    summary = {
        "models": len(results),
        "accounted": sum(result["fate"] != "traceback" for result in results),
        "fully_spiking": len(fully),
        "cosine_pass": sum(result.get("cosine", [0.0])[-1] >= 0.95 for result in fully),  # type: ignore[index, operator]
        "converted": sum(result["fate"] in ("fully spiking", "spiking with surgery") for result in results),
        "refused": sum(result["fate"] == "refused" for result in results),
        "tracebacks": sum(bool(result["traceback"]) for result in results),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
