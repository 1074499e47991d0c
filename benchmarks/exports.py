"""Exported torchvision networks beside the spiking networks they were written from: one line each.

    python benchmarks/exports.py
    python benchmarks/exports.py --models resnet18,squeezenet1_1 --inputs 50
    python benchmarks/exports.py --quick

Each network is trained for some epochs on 1,200 of scikit-learn's digits, enlarged to 64×64, converted at T = 4,
measured on others of them, and exported three times:

    ONNX   run by onnxruntime on all inputs: share with the same class, mean |difference| relative to the mean size.
           Beside it the same two figures for the network's own run in float64: a potential on the edge of θ spikes on
           one side only, and in a deep network one such flip moves what follows.
    pt2    loaded with torch alone and run on all inputs: the same figures; 1 and 0 where equal bit for bit.
    NIR    projected, read back by the nir package, its nodes run by an executor in NumPy that knows neither torch nor
           lmh (tests/reference/nir_numpy.py), on a few inputs, against the network with hard-reset neurons.

The wrong twin has every threshold multiplied by 1.01, and must be further away. Last line: one JSON object.
"""

from __future__ import annotations

import copy
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lmh import __version__, sites, zoo
from lmh.convert import BeforeNeuron, convert
from lmh.convert.export import Project, export_nir, export_onnx, export_pt2

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from reference import nir_numpy
from reference.nir_projection import projected

MODELS = (
    "resnet18", "vgg11_bn", "densenet121", "googlenet", "mobilenet_v2", "shufflenet_v2_x1_0", "regnet_x_400mf",
    "mnasnet1_0", "squeezenet1_1",
)  # fmt: skip
STEPS, SIZE, TRAINED, FITTED, BATCH, PART = 4, 64, 1200, 64, 32, 25


class Beside(NamedTuple):
    """Answers beside the expected ones: share of the same class, mean |difference| over mean size."""

    same_class: float
    difference: float

    def __str__(self) -> str:
        return f"{100 * self.same_class:5.1f} % {self.difference:7.1e}"


class Line(NamedTuple):
    """What was found of one network: accuracies on the digits, and answers beside its own, by what gave them."""

    ann: float
    snn: float
    found: dict[str, Beside]


def beside(got: Tensor, expected: Tensor) -> Beside:
    """Compare outputs [N, C]."""
    got, expected = got.double(), expected.double()
    same = float((got.argmax(1) == expected.argmax(1)).double().mean())
    return Beside(same, float((got - expected).abs().mean() / expected.abs().mean()))


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits as images [N, 3, 64, 64] with their classes, in an order of seed 0."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float()[order, None] / 8 - 1
    return F.interpolate(images, size=SIZE, mode="bilinear").expand(-1, 3, -1, -1), torch.from_numpy(data.target)[order]


def trained(name: str, images: Tensor, classes: Tensor, epochs: int) -> nn.Module:
    """Return a network with ten classes that was trained on the digits."""
    torch.manual_seed(0)
    model = zoo.card(f"torchvision:{name}").build(num_classes=10).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # MnasNet's 0.0003 is for far longer trainings
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, batches)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            loss = F.cross_entropy(model(images[chosen]), classes[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def run(network: nn.Module, x: Tensor) -> Tensor:
    """Run a network on parts of a batch."""
    return torch.cat([network(part) for part in x.split(PART)])


def by_onnxruntime(file: Path, x: Tensor) -> Tensor:
    """Run an ONNX file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return torch.cat([torch.from_numpy(session.run(None, {name: part.numpy()})[0]) for part in x.split(PART)])


def by_numpy(file: Path, x: Tensor) -> Tensor:
    """Run a NIR file: the mean over T of its output, the same input at each step."""
    import nir

    graph = nir.read(file, type_check=False)
    frames = x.expand(STEPS, *x.shape).numpy()
    return torch.from_numpy(nir_numpy.run(graph.nodes, graph.edges, frames, 1.0).mean(0))


@torch.no_grad()
def examined(model: nn.Module, fitted: Tensor, x: Tensor, classes: Tensor, nir_inputs: int, file: Path) -> Line:
    """Convert a network, export it three times, and compare what the files answer."""
    conversion = convert(model, STEPS, data=fitted, maxpool=BeforeNeuron())  # NIR has no gate
    snn = conversion.snn
    expected = run(snn, x)
    accuracies = [float((outputs.argmax(1) == classes).double().mean()) for outputs in (run(model, x), expected)]
    onnx = export_onnx(conversion, file.with_suffix(".onnx"))
    pt2 = export_pt2(conversion, file.with_suffix(".pt2"))
    nir = export_nir(conversion, file.with_suffix(".nir"), Project())
    few = x[:nir_inputs]
    found = {
        "onnx": beside(by_onnxruntime(onnx.file, x), expected),
        "float64": beside(run(copy.deepcopy(snn).double(), x.double()), expected),
        "pt2": beside(run(torch.export.load(pt2.file).module(), x), expected),
        "nir": beside(by_numpy(nir.file, few), projected(conversion)(few.double())),
    }
    for site in sites(snn).values():
        site.base_threshold *= 1.01
    found["wrong twin"] = beside(run(snn, x), expected)
    return Line(*accuracies, found)


@click.command()
@click.option("--models", default=",".join(MODELS), help="Names separated by commas.")
@click.option("--epochs", default=6, show_default=True, help="Of training.")
@click.option("--inputs", default=200, show_default=True, help="For ONNX and pt2.")
@click.option("--nir-inputs", default=4, show_default=True, help="For the executor in NumPy.")
@click.option("--quick", is_flag=True, help="One small network, hardly trained, on few inputs.")
def main(models: str, epochs: int, inputs: int, nir_inputs: int, quick: bool) -> None:
    """Export torchvision's networks and compare the files with them."""
    if quick:
        models, epochs, inputs, nir_inputs = "squeezenet1_1", 1, 8, 1
    count = 2 * BATCH if quick else TRAINED
    print(f"seed 0, T = {STEPS}, n = {inputs} inputs ({nir_inputs} for NIR), 3×{SIZE}×{SIZE}, lmh {__version__}, torch "
          f"{torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads", flush=True)  # fmt: skip
    lines = {}
    images, classes = digits()
    x, labels = images[TRAINED:][:inputs], classes[TRAINED:][:inputs]
    for name in models.split(","):
        started = time.perf_counter()
        model = trained(name, images[:count], classes[:count], epochs)
        with tempfile.TemporaryDirectory() as folder:
            lines[name] = examined(model, images[:FITTED], x, labels, nir_inputs, Path(folder) / name)
        accuracies = f"ANN {100 * lines[name].ann:.1f} %  SNN {100 * lines[name].snn:.1f} %"
        figures = "  ".join(f"{what} {value}" for what, value in lines[name].found.items())
        print(f"{name:20} {accuracies}  {figures}  {time.perf_counter() - started:.0f} s", flush=True)
    print(json.dumps({name: {what: [*value] for what, value in each.found.items()} for name, each in lines.items()}))


if __name__ == "__main__":
    main()
