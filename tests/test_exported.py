"""torch.export programs as graphs of torch.nn modules: networks, Python control flow, names, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import nets
from exports import Function, difference, exported, left_over, lively, types, worst
from lmh import QCFS, sites
from lmh.convert import convert, keep, prepare
from lmh.convert.exported import modules_from_export, trace_by_export
from lmh.torchvision_shim import torchvision

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's own


def test_the_comparison_sees_a_wrong_twin() -> None:
    model = nets.Residual().eval()
    graph = trace_by_export(model, torch.zeros(1, 2, 8, 8))
    assert worst(graph, model, (2, 8, 8)) < 1e-5
    graph.get_submodule("conv1").padding = (0, 0)
    graph.get_submodule("conv1").register_forward_hook(lambda module, args, output: F.pad(output, (1, 1, 1, 1)))
    assert worst(graph, model, (2, 8, 8)) > 1e-3


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
    "googlenet",
    "efficientnet_b0",
]


@pytest.mark.parametrize("name", [*CHEAP, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_torchvision_network_is_the_same_by_export(name: str) -> None:
    size = 64
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
