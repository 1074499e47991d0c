"""Whole networks: what torch's exporters write comes back as the network it was, at every batch size."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import nets
from lmh import sites
from lmh.convert import convert
from lmh.convert.onnx_import import import_onnx
from lmh.torchvision_shim import torchvision

BATCHES = (1, 2, 5)
TOLERANCE = 1e-4
CHEAP = ("resnet18", "shufflenet_v2_x1_0")
OTHERS = (
    "vgg11_bn", "mobilenet_v2", "squeezenet1_1", "densenet121", "googlenet", "mnasnet0_5", "regnet_x_400mf",
    "efficientnet_b0",
)  # fmt: skip


def export(
    model: nn.Module, example: Tensor | tuple[Tensor, ...], file: Path, *, opset: int | None, dynamo: bool
) -> Path:
    inputs = example if isinstance(example, tuple) else (example,)
    options = {"external_data": False, "verbose": False} if dynamo else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, inputs, file, dynamo=dynamo, opset_version=opset, **options)  # type: ignore[arg-type]
    return file


def with_statistics(model: nn.Module, example: Tensor) -> nn.Module:
    """Give BatchNorm the statistics of a batch, so that signals survive random weights."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        module.momentum = 1.0
    with torch.no_grad():
        model.train()(example)
    return model.eval()


def by_onnxruntime(file: Path, x: Tensor) -> np.ndarray:
    """Run a file that was exported for one image on each image of a batch."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: image.numpy()})[0] for image in x.split(1)])


def relative_difference(got: Tensor, expected: np.ndarray) -> float:
    assert tuple(got.shape) == expected.shape
    return float(np.abs(got.detach().numpy() - expected).max() / np.abs(expected).max())


def check_against_onnxruntime(network: fx.GraphModule, file: Path, shape: tuple[int, ...]) -> None:
    for batch in BATCHES:
        x = torch.randn(batch, *shape)
        expected = by_onnxruntime(file, x)
        assert relative_difference(network(x), expected) < TOLERANCE
    wrong = copy.deepcopy(network)
    with torch.no_grad():
        [parameter.mul_(1.01) for parameter in wrong.parameters() if parameter.ndim > 1]
    assert relative_difference(wrong(x), expected) > TOLERANCE


def image_model(name: str) -> nn.Module:
    options = {"init_weights": False, "aux_logits": False, "transform_input": True} if name == "googlenet" else {}
    model = torchvision().models.get_model(name, weights=None, **options)
    if name == "vgg11_bn":  # of its 133 million weights, 124 million are in three layers that show nothing new
        for position, layer in ((0, nn.Linear(25088, 64)), (3, nn.Linear(64, 64)), (6, nn.Linear(64, 10))):
            model.classifier[position] = layer
    return with_statistics(model, torch.randn(8, 3, 64, 64))


def only_the_size_it_was_made_for(name: str, dynamo: bool) -> int:
    """torch's older exporter has no adaptive pool from 2×2 to VGG's 7×7."""
    return 224 if name == "vgg11_bn" and not dynamo else 64


@pytest.mark.parametrize("dynamo", [False, True], ids=["older", "dynamo"])
@pytest.mark.parametrize("name", [*CHEAP, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_torchvision_classifiers_equal_onnxruntime(name: str, dynamo: bool, tmp_path: Path) -> None:
    model, size = image_model(name), only_the_size_it_was_made_for(name, dynamo)
    file = export(model, torch.randn(1, 3, size, size), tmp_path / "m.onnx", opset=None, dynamo=dynamo)
    network = import_onnx(file)
    check_against_onnxruntime(network, file, (3, size, size))
    layers = {type(module) for module in network.modules() if not list(module.children())}
    assert all(kind.__module__.startswith("torch.nn.modules") for kind in layers)


class Moving(nn.Module):
    """Channel shuffle, chunk, pads, strided slices, a gate, interpolation, and a batch size that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, groups=4)
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1)
        self.gate = nn.Conv2d(4, 4, 1)
        self.act, self.limited, self.leaky = nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.1)
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.fc = nn.Linear(4 * 6 * 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = x.size(0)
        x = self.limited(self.norm(self.stem(x)))
        x = x.view(n, 2, 4, 10, 10).transpose(1, 2).reshape(n, 8, 10, 10)
        a, b = self.leaky(self.depthwise(x)).chunk(2, dim=1)
        x = self.act(self.grouped(F.pad(torch.cat([b, a], 1), (1, 0, 0, 1))))
        x = self.up(x)
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        x = F.interpolate(self.thinned(x), scale_factor=2.0, mode="nearest")
        x = self.pool(F.hardtanh(x + 0.5 * x, -2.0, 2.0))
        return self.fc(x.view(n, -1) - x.flatten(1).mean(1, keepdim=True))

    def thinned(self, x: Tensor) -> Tensor:
        return x[:, :, ::2, ::2]


class MovingAtOpset9(Moving):
    """The same without what torch's exporter cannot write there: slices with steps, and ceil_mode."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, 2, 1)

    def thinned(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)


class Activations(nn.Module):
    """Every activation that the importer gives a module of its own, taken apart or not."""

    kinds: tuple[Callable[[], nn.Module], ...] = (
        nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
        nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Hardsigmoid, nn.Hardswish, nn.Softsign,
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in self.kinds)
        self.acts = nn.ModuleList(kind() for kind in self.kinds)

    def forward(self, x: Tensor) -> Tensor:
        for layer, act in zip(self.layers, self.acts, strict=True):
            x = x + act(layer(x))
        return x.clamp(min=0)


SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv_net": (nets.conv_net, (2, 8, 8)),
    "residual": (nets.Residual, (2, 8, 8)),
    "spellings": (nets.Spellings, (4,)),
    "moving": (Moving, (2, 10, 10)),
    "activations": (Activations, (4,)),
}


@pytest.mark.parametrize("opset", [9, 13, 17, 20])
@pytest.mark.parametrize("name", SMALL)
def test_the_older_exporter_at_old_and_new_opsets(name: str, opset: int, tmp_path: Path) -> None:
    build, shape = SMALL[name]
    model = (MovingAtOpset9 if build is Moving and opset == 9 else build)().eval()
    file = export(model, torch.randn(1, *shape), tmp_path / "m.onnx", opset=opset, dynamo=False)
    network = import_onnx(file)
    check_against_onnxruntime(network, file, shape)
    x = torch.randn(4, *shape)
    assert relative_difference(network(x), model(x.clone()).detach().numpy()) < TOLERANCE


@pytest.mark.parametrize("name", ["moving", pytest.param("activations", marks=pytest.mark.slow)])
def test_the_newer_exporter(name: str, tmp_path: Path) -> None:
    build, shape = SMALL[name]
    file = export(build().eval(), torch.randn(1, *shape), tmp_path / "m.onnx", opset=None, dynamo=True)
    check_against_onnxruntime(import_onnx(file), file, shape)


def test_activations_that_exporters_take_apart_are_put_together(tmp_path: Path) -> None:
    file = export(Activations().eval(), torch.randn(1, 4), tmp_path / "m.onnx", opset=17, dynamo=False)
    kinds = [type(module) for module in import_onnx(file).modules()]
    assert {nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish} <= set(kinds)
    assert sum(kind is nn.Linear for kind in kinds) == len(Activations.kinds)


def test_a_free_batch_axis_in_the_file_stays_free(tmp_path: Path) -> None:
    model, file = Moving().eval(), tmp_path / "m.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.randn(2, 2, 10, 10),), file, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n"}}
        )
    network = import_onnx(file)
    for batch in (1, 7):
        x = torch.randn(batch, 2, 10, 10)
        assert torch.allclose(network(x), model(x), atol=1e-5)


def test_open_image_sizes_stay_open(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).eval()
    file = tmp_path / "m.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"x": {0: "n", 2: "h", 3: "w"}}
        torch.onnx.export(model, (torch.randn(1, 3, 16, 16),), file, dynamo=False, input_names=["x"], dynamic_axes=axes)
    network = import_onnx(file)
    for shape in ((1, 3, 16, 16), (3, 3, 20, 14)):
        x = torch.randn(*shape)
        assert torch.allclose(network(x), model(x), atol=1e-5)


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["older", "dynamo"])
def test_the_converter_finds_the_same_sites_as_in_the_torch_model(dynamo: bool, tmp_path: Path) -> None:
    model = image_model("resnet18")
    images = torch.randn(32, 3, 64, 64)
    file = export(model, images[:1], tmp_path / "resnet18.onnx", opset=None, dynamo=dynamo)
    from_file = convert(import_onnx(file), 4, data=images)
    from_torch = convert(model, 4, example_input=images, calibration=from_file.calibration)
    assert list(sites(from_file.snn)) == list(sites(from_torch.snn))
    assert len(sites(from_file.snn)) == 17
    with torch.no_grad():
        got, expected = from_file.snn(images), from_torch.snn(images)
    moved = (got - expected).abs().mean(1) / (expected - expected.mean(0)).abs().mean()
    assert moved.quantile(0.8) < 1e-5  # in few images a spike flips and moves what follows


def test_parameter_names_are_those_of_the_torch_model(tmp_path: Path) -> None:
    model = with_statistics(nets.Residual(), torch.randn(8, 2, 8, 8))
    for index, dynamo in enumerate((False, True)):
        file = export(model, torch.randn(1, 2, 8, 8), tmp_path / f"{index}.onnx", opset=None, dynamo=dynamo)
        names = {name for name, _ in import_onnx(file).named_parameters()}
        assert {"stem.weight", "conv1.weight", "conv2.weight", "fc.weight", "fc.bias"} <= names


def test_the_network_is_in_eval_mode_and_trains(tmp_path: Path) -> None:
    file = export(nets.conv_net().eval(), torch.randn(1, 2, 8, 8), tmp_path / "m.onnx", opset=17, dynamo=False)
    network = import_onnx(file)
    assert not any(module.training for module in network.modules())
    x, y = torch.randn(16, 2, 8, 8), torch.randint(3, (16,))
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(network.train()(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = [name for name, value in network.named_parameters() if not torch.equal(value, before[name])]
    assert changed == [name for name, _ in network.named_parameters()]
