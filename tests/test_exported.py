"""torch.export programs as graphs of torch.nn modules: operators, networks, Python control flow, .pt2 files."""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim

import nets
from lmh import QCFS, sites
from lmh.convert import convert, keep, prepare
from lmh.convert.exported import modules_from_export, read_exported, trace_by_export
from lmh.convert.exported.aten import TABLE
from lmh.errors import ArgumentError, AuditError, SourceError, UnsafePickleError
from lmh.torchvision_shim import torchvision

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's own
BATCHES = (2, 3, 5)


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to what the output varies over the batch: deep networks hardly do."""
    scale = float((expected - expected.mean(0)).abs().max().clamp_min(1e-9))
    return float((got - expected).abs().max()) / scale


def worst(graph: nn.Module, source: nn.Module, shape: tuple[int, ...]) -> float:
    """Largest difference between two networks over several batch sizes."""
    with torch.no_grad():
        return max(difference(graph(x.clone()), source(x)) for n in BATCHES for x in [torch.randn(n, *shape)])


def exported(model: nn.Module, shape: tuple[int, ...], *, strict: bool = False) -> torch.export.ExportedProgram:
    return torch.export.export(model, (torch.randn(2, *shape),), dynamic_shapes=({0: Dim("batch")},), strict=strict)


def types(graph: fx.GraphModule) -> dict[str, str]:
    """From path to type, for every module that the graph calls."""
    return {
        str(node.target): type(graph.get_submodule(str(node.target))).__name__
        for node in graph.graph.nodes
        if node.op == "call_module"
    }


def left_over(graph: fx.GraphModule) -> list[str]:
    """ATen operators that became nothing else."""
    return [str(node.target) for node in graph.graph.nodes if "aten" in str(node.target)]


class Function(nn.Module):
    """A function as a network."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


IMAGE, SERIES, VOLUME, VECTOR = (6, 8, 8), (6, 8), (6, 4, 8, 8), (6,)
MODULES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(6, 4, 3, padding="same"), SERIES),
    (nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False), IMAGE),
    (nn.Conv2d(6, 12, 3, groups=6, dilation=2, padding=2), IMAGE),
    (nn.Conv3d(6, 4, (1, 3, 3)), VOLUME),
    (nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1), SERIES),
    (nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), IMAGE),
    (nn.ConvTranspose3d(6, 4, 2), VOLUME),
    (nn.Linear(6, 4, bias=False), VECTOR),
    (nn.BatchNorm1d(6), VECTOR),
    (nn.BatchNorm1d(6, affine=False), SERIES),
    (nn.BatchNorm2d(6, eps=0.1, momentum=0.3), IMAGE),
    (nn.BatchNorm3d(6), VOLUME),
    (nn.LayerNorm(8, bias=False), SERIES),
    (nn.GroupNorm(3, 6), IMAGE),
    (nn.MaxPool1d(2), SERIES),
    (nn.MaxPool2d(3, 2, 1, ceil_mode=True), IMAGE),
    (nn.MaxPool3d(2), VOLUME),
    (nn.AdaptiveMaxPool1d(3), SERIES),
    (nn.AdaptiveMaxPool2d((3, 2)), IMAGE),
    (nn.AdaptiveMaxPool3d(2), VOLUME),
    (nn.AvgPool1d(2, padding=1, count_include_pad=False), SERIES),
    (nn.AvgPool2d(3, divisor_override=5), IMAGE),
    (nn.AvgPool3d(2), VOLUME),
    (nn.AdaptiveAvgPool1d(3), SERIES),
    (nn.AdaptiveAvgPool2d((4, 3)), IMAGE),
    (nn.AdaptiveAvgPool3d(1), VOLUME),
    (nn.ReLU(), VECTOR),
    (nn.ReLU6(inplace=True), VECTOR),
    (nn.Hardtanh(-0.5, 0.5), VECTOR),
    (nn.LeakyReLU(0.3), VECTOR),
    (nn.PReLU(6), IMAGE),
    (nn.RReLU(), VECTOR),
    (nn.ELU(0.5), VECTOR),
    (nn.CELU(0.5), VECTOR),
    (nn.SELU(), VECTOR),
    (nn.GELU("tanh"), VECTOR),
    (nn.SiLU(inplace=True), VECTOR),
    (nn.Mish(), VECTOR),
    (nn.Softplus(2.0, 3.0), VECTOR),
    (nn.Tanh(), VECTOR),
    (nn.Sigmoid(), VECTOR),
    (nn.LogSigmoid(), VECTOR),
    (nn.Hardsigmoid(), VECTOR),
    (nn.Hardswish(), VECTOR),
    (nn.Threshold(0.2, -1.0), VECTOR),
    (nn.GLU(1), VECTOR),
    (nn.Softmax(1), VECTOR),
    (nn.LogSoftmax(-1), VECTOR),
    (nn.Dropout(0.3, inplace=True), VECTOR),
    (nn.Dropout2d(0.3), IMAGE),
    (nn.AlphaDropout(0.3), VECTOR),
    (nn.Flatten(), IMAGE),
    (nn.Unflatten(1, (2, 3)), VECTOR),
    (nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), IMAGE),
    (nn.Upsample(size=5), SERIES),
    (nn.PixelShuffle(2), (8, 4, 4)),
    (nn.ChannelShuffle(3), IMAGE),
]


@pytest.mark.parametrize(("module", "shape"), MODULES, ids=[type(module).__name__ for module, _ in MODULES])
def test_a_module_becomes_itself(module: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(module).eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            torch.nn.init.uniform_(buffer, 0.5, 2.0)
    program = exported(model, shape)
    graph = modules_from_export(program)
    assert types(graph) == {"0": type(module).__name__}
    if hasattr(module, "inplace"):
        module.inplace = False
    assert str(graph.get_submodule("0")) == str(module)
    for form in (program, program.run_decompositions({})):
        graph = modules_from_export(form)
        assert not left_over(graph)
        assert worst(graph, model, shape) < 1e-5
        assert graph.state_dict().keys() == model.state_dict().keys()


KERNEL = torch.ones(3, 6, 2, 2)
FUNCTIONS: list[tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = [
    (lambda x: x.view(x.size(0), -1), IMAGE),
    (lambda x: x.reshape(x.shape[0], 2, -1).flatten(1), IMAGE),
    (lambda x: torch.flatten(x, 1), IMAGE),
    (lambda x: x.permute(0, 2, 3, 1).contiguous().transpose(1, 2), IMAGE),
    (lambda x: x.contiguous(memory_format=torch.channels_last) + 1, IMAGE),
    (lambda x: x.mean((2, 3)) + x.sum(dim=(2, 3), keepdim=True).squeeze(-1).squeeze(-1), IMAGE),
    (lambda x: x.unsqueeze(1).squeeze((1,)), IMAGE),
    (lambda x: torch.cat([x, -x, x * 0.5, 3 - x, x / 4], 1), IMAGE),
    (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), IMAGE),
    (lambda x: torch.cat([x.split(4, 1)[1], x.split([1, 5], 1)[1]], 1), IMAGE),
    (lambda x: torch.add(x, x, alpha=2) - torch.sub(x, 1, alpha=3), VECTOR),
    (lambda x: F.pad(x, (1, 2, 0, 1)) + F.pad(x, (1, 2, 0, 1), mode="reflect"), IMAGE),
    (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3), "constant", 0.0), IMAGE),
    (lambda x: x[:, 1:-1] + x[:, -1:] + x[:, 2, None], IMAGE),
    (lambda x: x[:, [2, 0, 1]], IMAGE),
    (lambda x: F.interpolate(x, scale_factor=2.0, mode="bicubic"), IMAGE),
    (lambda x: F.interpolate(x, size=(5, 7), mode="bilinear", antialias=True), IMAGE),
    (lambda x: F.interpolate(x, size=x.shape[2:], mode="nearest-exact"), IMAGE),
    (lambda x: F.interpolate(x, scale_factor=2.0, mode="trilinear"), VOLUME),
    (lambda x: F.max_pool2d(F.relu(x), 2) + F.avg_pool2d(F.relu6(x), 2), IMAGE),
    (lambda x: F.adaptive_avg_pool2d(x.clamp(min=0), 1) + F.adaptive_max_pool2d(x.clamp_min(0), 1), IMAGE),
    (lambda x: F.dropout(x, 0.5, False).relu() + F.dropout2d(x, 0.5, False), IMAGE),
    (lambda x: torch.softmax(x, 1) + F.log_softmax(x, dim=1) + torch.sigmoid(x), VECTOR),
    (lambda x: x.float().to(x.device).detach().clone() + torch.tensor(2.0), VECTOR),
    (lambda x: F.conv2d(x, KERNEL, stride=2), IMAGE),
    (lambda x: x * x.mean((2, 3), keepdim=True), IMAGE),
    (lambda x: F.softshrink(x, 0.2) - F.hardshrink(x, 0.3), VECTOR),
    (lambda x: F.adaptive_avg_pool2d(x, (None, 3)), IMAGE),
]


@pytest.mark.parametrize(("function", "shape"), FUNCTIONS, ids=map(str, range(len(FUNCTIONS))))
def test_a_function_gets_a_spelling_of_the_table(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    model = Function(function).eval()
    program = exported(model, shape)
    graph = modules_from_export(program)
    assert not left_over(graph)
    assert worst(graph, model, shape) < 1e-5
    assert worst(modules_from_export(program.run_decompositions()), model, shape) < 1e-5


def test_the_comparison_sees_a_wrong_twin() -> None:
    model = nets.Residual().eval()
    graph = trace_by_export(model, torch.zeros(1, 2, 8, 8))
    assert worst(graph, model, (2, 8, 8)) < 1e-5
    graph.get_submodule("conv1").padding = (0, 0)
    graph.get_submodule("conv1").register_forward_hook(lambda module, args, output: F.pad(output, (1, 1, 1, 1)))
    assert worst(graph, model, (2, 8, 8)) > 1e-3


def test_the_table_names_operators_that_exist() -> None:
    assert [key for key in TABLE if not hasattr(torch.ops.aten, key.partition(".")[0])] == []


def lively(model: nn.Module) -> nn.Module:
    """Move BatchNorm's statistics off their start, so that a mix-up shows."""
    for name, buffer in model.named_buffers():
        if "running" in name:
            nn.init.uniform_(buffer, 0.5, 1.5)
    return model.eval()


def torchvision_model(name: str, size: int) -> nn.Module:
    """Random weights, and the statistics of BatchNorm that keep activations alive through all layers."""
    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision().models.get_model(name, weights=None, num_classes=10, **options).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(8, 3, size, size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


CHEAP = ["resnet18", "squeezenet1_1"]
SLOW = [
    "vgg11_bn",
    "mobilenet_v2",
    "shufflenet_v2_x1_0",
    "densenet121",
    "googlenet",
    "inception_v3",
    "efficientnet_b0",
    "regnet_x_400mf",
]


@pytest.mark.parametrize("name", [*CHEAP, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_torchvision_network_is_the_same_by_export(name: str) -> None:
    size = 80 if name == "inception_v3" else 64
    model = torchvision_model(name, size)
    graph = trace_by_export(model, torch.zeros(1, 3, size, size))
    assert worst(graph, model, (3, size, size)) < 1e-5
    assert graph.state_dict().keys() == model.state_dict().keys()
    assert not left_over(graph)
    wrong = copy.deepcopy(graph)
    convolutions = [module for module in wrong.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        convolutions[len(convolutions) // 2].weight.mul_(1.5)
    assert worst(wrong, model, (3, size, size)) > 1e-3
    if name == "efficientnet_b0":
        return
    images = torch.randn(2, 3, size, size)
    by_export = convert(graph, 2, data=images)
    by_fx = convert(model, 2, calibration=by_export.calibration, example_input=images)
    assert list(sites(by_export.snn)) == list(sites(by_fx.snn))
    assert difference(by_export.snn(images).detach(), by_fx.snn(images).detach()) < 1e-4


class Flow(nn.Module):
    """Python control flow that symbolic tracing cannot follow, in one network."""

    def __init__(self, depth: int = 2, early: bool = False) -> None:
        super().__init__()
        self.config = {"depth": depth, "early": early}
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4 * 4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 2, f"expected [N, 2, H, W], got {tuple(x.shape)}"
        n = len(x)
        x = self.act(self.stem(x))
        if x.shape[2] > 4:
            x = F.max_pool2d(x, x.shape[2] // 4)
        for block in list(self.blocks)[: self.config["depth"]]:
            x = self.act(self.bn(block(x))) + x
        if self.config["early"]:
            return x.mean((2, 3))
        x = F.dropout(x, 0.5, self.training)
        return self.fc(x.reshape(n, -1))


@pytest.mark.parametrize(("depth", "early", "size"), [(2, False, 8), (3, True, 8), (1, False, 4)])
def test_python_control_flow_is_followed(depth: int, early: bool, size: int) -> None:
    model = lively(Flow(depth, early))
    with pytest.raises((fx.proxy.TraceError, RuntimeError, TypeError)):
        fx.symbolic_trace(model)
    graph = trace_by_export(model, torch.zeros(1, 2, size, size))
    assert worst(graph, model, (2, size, size)) < 1e-5
    assert graph.state_dict().keys() <= model.state_dict().keys()
    called = types(graph)
    assert [path for path, kind in called.items() if kind == "ReLU"] == ["act", "act_1", "act_2", "act_3"][: depth + 1]
    assert ("maxpool2d" in called) == (size > 4)
    assert ("dropout" in called) == (not early)
    assert len(sites(convert(graph, 4, data=torch.rand(8, 2, size, size)).snn)) == depth + 1


def test_the_batch_size_is_free_and_never_a_number() -> None:
    graph = trace_by_export(Flow().eval(), torch.zeros(7, 2, 8, 8))
    (size,) = (node for node in graph.graph.nodes if node.target == "size")
    assert (size.op, size.args[1]) == ("call_method", 0)
    assert [len(graph(torch.rand(n, 2, 8, 8))) for n in (1, 2, 11)] == [1, 2, 11]


@pytest.mark.parametrize("strict", [False, True])
def test_names_of_reused_shared_and_tied_parts(strict: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.other, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
            self.tied.weight = self.other.weight
            self.relu_1 = nn.ReLU()
            self.relu = nn.ReLU()
            self.kernel = nn.Parameter(torch.randn(4, 4))
            self.register_buffer("shift", torch.randn(4), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.block(self.block(x)))
            x = F.relu(self.tied(self.relu_1(self.relu(self.other(x)))) + self.shift)
            return F.linear(x, self.kernel)

    model = Net().eval()
    graph = modules_from_export(exported(model, (4,), strict=strict))
    assert worst(graph, model, (4,)) < 1e-5
    assert graph.state_dict().keys() == model.state_dict().keys()
    assert graph.tied.weight is graph.other.weight is model.tied.weight
    activations = [path for path, kind in types(graph).items() if kind == "ReLU"]
    assert activations == ["block.1", "block.1_1", "relu", "relu_2", "relu_1", "relu_3"]
    assert [node.target for node in graph.graph.nodes].count("block.0") == 2


def test_functional_batch_norm_takes_its_place_where_the_names_fit() -> None:
    class Norm(nn.Module):
        def __init__(self, prefix: str) -> None:
            super().__init__()
            self.names = [f"{prefix}{name}" for name in ("running_mean", "running_var", "weight", "bias")]
            for name in self.names[:2]:
                self.register_buffer(name, torch.rand(2) + 0.5)
            for name in self.names[2:]:
                self.register_parameter(name, nn.Parameter(torch.rand(2)))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.batch_norm(x, *(getattr(self, name) for name in self.names), eps=0.1))

    model = nn.Sequential(Norm(""), Norm("my_")).eval()
    graph = modules_from_export(exported(model, (2, 3, 3)))
    assert worst(graph, model, (2, 3, 3)) < 1e-5
    assert graph.state_dict().keys() == model.state_dict().keys()
    assert types(graph) == {"0": "BatchNorm2d", "0.relu": "ReLU", "1.relu": "ReLU"}
    assert F.batch_norm in [node.target for node in graph.graph.nodes]


def test_in_place_calls_become_functional_and_dropped_results_stay() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            kept = y
            y += 1
            y.mul_(3).relu_()
            return kept - x

    for model in (nets.Dropped().eval(), InPlace()):
        graph = trace_by_export(model, torch.zeros(2, 4))
        assert worst(graph, model, (4,)) < 1e-5
        assert not left_over(graph)
        x = torch.randn(3, 4)
        before = x.clone()
        graph(x)
        assert torch.equal(x, before)
    assert len(prepare(trace_by_export(nets.Dropped().eval(), torch.zeros(2, 4)), (4,)).spiking) == 3


def views(x: Tensor) -> Tensor:
    y = x * 2
    y.view(-1, 2, 2).relu_()
    y[:, 1:3] += 1
    return y - x


def dropped_out(x: Tensor) -> Tensor:
    y = x * 1
    F.dropout(y, 0.5, False).relu_()
    return y


def without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = torch.relu(x) * 2
    return y.relu_() + x


@pytest.mark.parametrize("function", [views, dropped_out, without_gradient], ids=lambda function: function.__name__)
def test_shared_memory_is_written_out(function: Callable[[Tensor], Tensor]) -> None:
    model = Function(function)
    graph = trace_by_export(model, torch.zeros(2, 4))
    assert worst(graph, model, (4,)) < 1e-5
    assert "relu" in graph.state_dict() or "ReLU" in types(graph).values()


def test_leaves_of_the_table_and_of_rules_stay_whole() -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor, factor: float = 2.0) -> Tensor:
            return x * torch.sigmoid(x * factor)

    class Net(Flow):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.gate = QCFS(4, 1.0, channels=4), Gate()

        def forward(self, x: Tensor) -> Tensor:
            return self.gate(super().forward(x))

    model = Net().eval()
    graph = trace_by_export(model, torch.zeros(2, 2, 8, 8))
    assert list(types(graph).values()).count("QCFS") == 1
    assert [node.target for node in graph.graph.nodes].count("act") == 3
    whole = trace_by_export(model, torch.zeros(2, 2, 8, 8), is_leaf=lambda module: isinstance(module, QCFS | Gate))
    assert types(whole)["gate"] == "Gate"
    assert len(prepare(whole, (2, 8, 8), rules={Gate: keep}).spiking) == 3
    for traced in (graph, whole):
        assert worst(traced, model, (2, 8, 8)) < 1e-5
        assert traced.state_dict().keys() <= model.state_dict().keys()


def test_operators_without_a_module_reach_the_audit_by_name() -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.cumsum(x, 1)) + torch.logsumexp(x, 1, keepdim=True)

    graph = trace_by_export(Sums(), torch.zeros(2, 4))
    assert worst(graph, Sums(), (4,)) < 1e-5
    with pytest.raises(AuditError) as caught:
        prepare(graph, (4,))
    assert [name in str(caught.value) for name in ("aten.cumsum", "aten.logsumexp")] == [True, True]


class Refused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(4))


class OnValues(Refused):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x * 2
        return self.fc(x)


class LoopsOnValues(Refused):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().max())):
            x = self.fc(x)
        return x


class FixesBatch(Refused):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 2:
            x = x + 1
        return self.fc(x)


class HalvesBatch(Refused):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).view(x.shape[0] // 2, 2, 4).sum(1)


class Counts(Refused):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x) + self.calls


class Averages(Refused):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.running_mean.mul_(0.9).add_(0.1 * x.mean(0))
        return self.fc(x - self.running_mean)


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (OnValues(), ["test_exported.py:", "`if x.sum() > 0:`", "values of tensors", "Move the decision"]),
        (LoopsOnValues(), ["`for _ in range(int(x.abs().max())):`", "values of tensors"]),
        (FixesBatch(), ["`if x.shape[0] == 2:`", "fixes the batch size (batch = 2)", "x.size(0)"]),
        (HalvesBatch(), ["fixes the batch size (batch = 2*_batch)", "every batch size"]),
        (Counts(), ["overwrites calls", "keeps nothing between calls"]),
        (Averages(), ["overwrites running_mean", "keeps nothing between calls"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_traced_is_refused_with_its_line(
    model: nn.Module, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AuditError) as caught:
        trace_by_export(model, torch.zeros(2, 4))
    for part in parts:
        assert part in str(caught.value)
    assert capsys.readouterr() == ("", "")


def test_an_example_that_does_not_fit_is_told_from_control_flow() -> None:
    with pytest.raises(ArgumentError, match=r"cannot be run on an input of shape \['N', 5\].*example_input"):
        trace_by_export(OnValues(), torch.zeros(2, 5))
    with pytest.raises(ArgumentError, match=r"shape \[0, 4\]; expected a batch"):
        trace_by_export(nn.Linear(4, 4), torch.zeros(0, 4))


def test_several_inputs_and_outputs_keep_their_names_and_nesting() -> None:
    class Many(nn.Module):
        def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], *, scale: Tensor) -> dict[str, Any]:
            return {"out": x * scale, "aux": (pair[0] + pair[1], [x])}

    a, b, c, d = torch.rand(4, 2, 3)
    graph = modules_from_export(torch.export.export(Many(), (a, (b, c)), {"scale": d}))
    got, expected = graph(a, (b, c), scale=d), Many()(a, (b, c), scale=d)
    assert got.keys() == expected.keys()
    assert torch.equal(got["out"], expected["out"])
    assert torch.equal(got["aux"][0], expected["aux"][0])


def test_an_output_that_fx_has_no_words_for_is_refused() -> None:
    @dataclass
    class Output:
        logits: Tensor

    torch.export.register_dataclass(Output, serialized_type_name="test_exported.Output")
    model = Function(lambda x: [x, Output(x)])  # type: ignore[arg-type, return-value]
    with pytest.raises(AuditError, match=r"returns a .*Output; expected tensors.*wrapper"):
        trace_by_export(model, torch.zeros(2, 4))


class Cast(Refused):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.fc(x)
        return torch.relu(y.float())


class Branches(Refused):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.fc(x), lambda x: x * 2, (x,))


@pytest.mark.parametrize(("model", "name"), [(Cast(), "wrap_with_autocast"), (Branches(), "cond")])
def test_regions_of_other_rules_stay_what_they_are(model: nn.Module, name: str) -> None:
    graph = trace_by_export(model, torch.zeros(2, 4))
    assert name in [str(node.target) for node in graph.graph.nodes]
    assert worst(graph, model, (4,)) < 1e-5


def test_a_forward_of_any_number_of_inputs_has_the_one_it_was_given() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(4, 2)

        def forward(self, *inputs: Tensor, **options: Any) -> Tensor:
            return self.module(*inputs, **options)

    model = Wrapper()
    assert worst(trace_by_export(model, torch.zeros(2, 4)), model, (4,)) < 1e-5


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_program_of_train_mode_gives_the_network_of_eval_mode(decomposed: bool) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.ReLU(inplace=True)).train()
    program = exported(model, (2, 8, 8))
    graph = modules_from_export(program.run_decompositions() if decomposed else program)
    assert types(graph) == {"0": "Conv2d", "1": "BatchNorm2d", "2": "Dropout", "3": "ReLU"}
    assert graph.state_dict().keys() == model.state_dict().keys()
    assert worst(graph, lively(model), (2, 8, 8)) < 1e-5


@pytest.mark.parametrize("batch", [1, 2])
def test_a_program_of_one_batch_size_serves_all(batch: int) -> None:
    model = nets.Residual().eval()
    program = torch.export.export(model, (torch.rand(batch, 2, 8, 8),))
    graph = modules_from_export(program)
    assert worst(graph, model, (2, 8, 8)) < 1e-5


def test_a_batch_size_that_is_built_in_is_refused() -> None:
    model = Function(lambda x: x + torch.ones(x.shape[0], 4))
    with pytest.raises(AuditError, match="exported for the batch size 2 alone") as caught:
        modules_from_export(torch.export.export(model, (torch.rand(2, 4),)))
    assert "dynamic_shapes" in str(caught.value)
    assert worst(modules_from_export(exported(model, (4,))), model, (4,)) < 1e-5


def test_the_program_and_the_model_stay_as_they_were() -> None:
    model = nets.Dropped()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    program = exported(model, (4,))
    text = str(program.graph)
    for parameter in modules_from_export(program).parameters():
        assert parameter.requires_grad
    for parameter in trace_by_export(model, torch.zeros(2, 4)).parameters():
        torch.nn.init.zeros_(parameter)
    assert str(program.graph) == text
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_meta_tensors_are_enough() -> None:
    with torch.device("meta"):
        model = Flow().eval()
        graph = trace_by_export(model, torch.zeros(2, 2, 8, 8))
        assert graph(torch.zeros(3, 2, 8, 8)).shape == (3, 3)
    assert {parameter.device.type for parameter in graph.parameters()} == {"meta"}


@pytest.fixture
def pt2(tmp_path: Path) -> Path:
    """A network with tied weights and a temporary buffer, exported for one batch size."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    model[2].weight = model[0].weight
    torch.manual_seed(1)
    torch.export.save(torch.export.export(model, (torch.rand(2, 4),)), tmp_path / "net.pt2")
    torch.save(model, tmp_path / "net.pt")
    return tmp_path / "net.pt2"


def test_a_pt2_file_round_trips_with_trust(pt2: Path) -> None:
    model = torch.load(pt2.with_suffix(".pt"), weights_only=False)
    graph = read_exported(pt2, trust_pickle=True)
    assert worst(graph, model, (4,)) < 1e-5
    assert graph.state_dict().keys() == model.state_dict().keys()
    assert graph.get_submodule("0").weight is graph.get_submodule("2").weight
    assert list(sites(convert(graph, 4, data=torch.rand(8, 4)).snn)) == ["1"]
    with torch.no_grad():
        graph.get_submodule("0").weight.mul_(1.1)
    assert worst(graph, model, (4,)) > 1e-3


def test_a_pt2_file_without_trust_is_not_loaded(pt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export, "load", lambda path: pytest.fail("loaded"))
    with pytest.raises(UnsafePickleError, match=r"can run code.*--trust-pickle.*state_dict"):
        read_exported(pt2)


def rewritten(source: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    target = source.with_name("changed.pt2")
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def newer(name: str, content: bytes) -> bytes:
    if not name.endswith("model.json"):
        return content
    header = json.loads(content)
    header["schema_version"]["major"] += 1
    return json.dumps({**header, "torch_version": "9.9"}).encode()


def unknown_operator(name: str, content: bytes) -> bytes:
    return content.replace(b"torch.ops.aten.relu.default", b"torch.ops.mine.relu.default")


def graphless(name: str, content: bytes) -> bytes | None:
    return None if "models/" in name else content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (newer, r"written by torch 9.9 \(format \d+\.\d+\).*Export it again"),
        (unknown_operator, r"cannot read it.*written by torch.*import that package"),
        (graphless, r"an archive without an exported program.*torch.export.save"),
    ],
)
def test_other_pt2_files_are_explained(pt2: Path, change: Callable[[str, bytes], bytes | None], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read_exported(rewritten(pt2, change), trust_pickle=True)


@pytest.mark.parametrize("cut", [0, 10, 2000])
def test_a_damaged_pt2_file_is_explained(pt2: Path, cut: int) -> None:
    damaged = pt2.with_name("damaged.pt2")
    damaged.write_bytes(pt2.read_bytes()[:cut])
    with pytest.raises(SourceError, match=r"damaged.*again"):
        read_exported(damaged, trust_pickle=True)
    flipped = bytearray(pt2.read_bytes())
    flipped[len(flipped) // 3] ^= 0xFF
    damaged.write_bytes(flipped)
    with pytest.raises(SourceError):
        read_exported(damaged, trust_pickle=True)


def test_a_missing_pt2_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        read_exported(tmp_path / "none.pt2", trust_pickle=True)


def test_a_file_whose_graph_would_answer_differently_is_refused(pt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, "relu", lambda a: a.self)
    with pytest.raises(SourceError, match="answers differently"):
        read_exported(pt2, trust_pickle=True)
