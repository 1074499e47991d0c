"""Tracing: symbolic first, torch.export where Python control flow defeats it; names, batch sizes, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import flow_nets
import nets
from flow_nets import (
    FLOW,
    IMAGE,
    Asserts,
    Base,
    Chunks,
    Length,
    LikeEinops,
    LoopsOverShape,
    OnValues,
    OnValuesOnly,
    Options,
)
from lmh import QCFS, per_step, sites
from lmh.convert import DEFAULT_RULES, as_neuron, convert, keep, prepare
from lmh.convert import tracing as module
from lmh.convert.architectures import EmptyOnMeta
from lmh.convert.tracing import trace
from lmh.errors import ArgumentError, AuditError
from lmh.torchvision_shim import torchvision

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's own


def by_export(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note every use of torch.export from now on."""
    used: list[str] = []
    original = module.trace_by_export

    def noting(model: nn.Module, *arguments: Any, **options: Any) -> fx.GraphModule:
        used.append(type(model).__name__)
        return original(model, *arguments, **options)

    monkeypatch.setattr(module, "trace_by_export", noting)
    return used


@pytest.mark.parametrize("kind", FLOW, ids=lambda kind: kind.__name__)
def test_python_control_flow_is_converted_by_export(kind: type[Base], monkeypatch: pytest.MonkeyPatch) -> None:
    model = kind().eval()
    before = copy.deepcopy(model.state_dict())
    used = by_export(monkeypatch)
    conversion = convert(model, 4, data=torch.rand(16, *IMAGE))
    assert used == [kind.__name__]
    assert conversion.prepared.model.state_dict().keys() <= before.keys()
    own = [name for name in conversion.snn.state_dict() if name in before]
    assert {name for name in before if name.startswith(("stem.", "fc."))} <= set(own)
    assert "act" in sites(conversion.snn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x = torch.rand(7, *IMAGE)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(conversion.prepared.model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_network_traced_by_export_spikes_at_the_rates_of_its_activations() -> None:
    model = LoopsOverShape().eval()
    x = torch.rand(16, *IMAGE)
    with torch.no_grad():
        expected = model(x)
        errors = [float((convert(model, steps, data=x).snn(x) - expected).norm()) for steps in (2, 16, 128)]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.1 * float((expected - expected.mean(0)).norm()) + 0.02 * float(expected.norm())


@pytest.mark.parametrize("kind", [LoopsOverShape, LikeEinops, Length, Chunks], ids=lambda kind: kind.__name__)
def test_a_network_traced_by_export_runs_at_every_batch_size(kind: type[Base]) -> None:
    snn = convert(kind().eval(), 4, data=torch.rand(16, *IMAGE)).snn
    x = torch.rand(11, *IMAGE)
    with torch.no_grad():
        whole = snn(x)
        assert whole.shape == (11, 3)
        for size in (1, 2, 3, 5):
            torch.testing.assert_close(torch.cat([snn(part) for part in x.split(size)]), whole)
        assert per_step(snn, x[:3]).shape == (4, 3, 3)
    snn.train()(x).sum().backward()


def test_optional_inputs_keep_their_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Options().eval()
    used = by_export(monkeypatch)
    graph = trace(model, DEFAULT_RULES, IMAGE)
    x = torch.rand(3, *IMAGE)
    assert used == []
    assert [node.name for node in graph.graph.nodes if node.op == "placeholder"] == ["x"]
    assert torch.equal(graph(x), model(x))


def test_symbolic_tracing_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    used = by_export(monkeypatch)
    for model, shape in ((nets.conv_net(), (2, 8, 8)), (nets.Spellings(), (4,)), (nets.Residual(), (2, 8, 8))):
        trace(model, DEFAULT_RULES, shape)
    assert used == []


def test_randomness_in_eval_mode_is_no_reason_for_export(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noisy(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.dropout(self.act(self.stem(x))))

    used = by_export(monkeypatch)
    with pytest.raises(AuditError, match="dropout that is active in eval mode"):
        prepare(Noisy(), IMAGE)
    assert used == []


def test_buffers_of_a_stateful_forward_stay_as_they_were() -> None:
    class Counts(Base):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.head(self.act(self.stem(x)))

    model = Counts()
    trace(model, DEFAULT_RULES, IMAGE)
    assert model.calls == 0


@pytest.mark.parametrize(
    ("kind", "line"), [(OnValues, "`if x.sum() > 0:`"), (OnValuesOnly, "if x.max().item() > 3 else")]
)
def test_a_branch_on_values_is_refused_with_its_line_and_both_reasons(kind: type[Base], line: str) -> None:
    with pytest.raises(AuditError) as caught:
        convert(kind(), 4, data=torch.rand(4, *IMAGE))
    (problem,) = caught.value.problems
    assert problem.startswith(flow_nets.__file__)
    assert problem.count(line) == 2, "once for each way of tracing"
    for part in ("depends on the values of tensors", "Move the decision out of forward", "torch.where",
                 "Symbolic tracing: ", "control flow"):  # fmt: skip
        assert part in problem


def test_the_advice_for_a_branch_on_values_works() -> None:
    class Where(Base):
        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.stem(x))
            return self.head(torch.where(x.sum((1, 2, 3), keepdim=True) > 0, x * 2, x))

    with pytest.raises(AuditError, match="where"):
        convert(Where(), 4, data=torch.rand(4, *IMAGE))
    assert trace(Where(), DEFAULT_RULES, IMAGE)(torch.rand(3, *IMAGE)).shape == (3, 3)


def test_an_input_that_an_assertion_refuses_is_told_from_control_flow() -> None:
    with pytest.raises(ArgumentError, match=r"assert x\.shape\[1\] == 4.*\['N', 2, 8, 8\].*expected 4 channels.*input"):
        convert(Asserts(), 4, data=torch.rand(4, 2, 8, 8))


def test_leaves_are_the_same_both_ways() -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(x)

    class Symbolic(Base):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.gate, self.norm = QCFS(4, 1.0), Gate(), nn.GroupNorm(2, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.gate(self.act(self.norm(self.stem(x)))))

    class Exported(Symbolic):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1] == 4
            return super().forward(x)

    rules = {**DEFAULT_RULES, Gate: keep}
    called = [
        [(str(node.target), type(graph.get_submodule(str(node.target)))) for node in graph.graph.nodes
         if node.op == "call_module"]
        for graph in (trace(kind(), rules, IMAGE) for kind in (Symbolic, Exported))
    ]  # fmt: skip
    assert called[0] == called[1]
    assert ("gate", Gate) in called[0]


class TestGraphs:
    def test_a_graph_is_copied_and_keeps_the_names_of_its_functions(self) -> None:
        class Inner(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return F.relu(x)

        model = nn.Sequential(nn.Linear(4, 4), Inner(), nn.Linear(4, 2)).eval()
        graph = fx.symbolic_trace(model)
        text = str(graph.graph)
        assert list(sites(convert(graph, 2, data=torch.rand(8, 4)).snn)) == ["1.relu"]
        assert list(sites(convert(model, 2, data=torch.rand(8, 4)).snn)) == ["1.relu"]
        assert str(graph.graph) == text
        copied = trace(graph, DEFAULT_RULES, (4,))
        assert copied.get_parameter("0.weight") is not graph.get_parameter("0.weight")
        assert copied.state_dict().keys() == model.state_dict().keys()

    def test_a_graph_with_leaves_of_the_users_own_is_traced_into(self) -> None:
        class Leaf(fx.Tracer):
            def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
                return True

        model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)).eval()
        graph = fx.GraphModule(model, Leaf().trace(model))
        assert list(sites(convert(graph, 2, data=torch.rand(8, 4)).snn)) == ["0.1"]

    def test_a_graph_of_operators_becomes_modules(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
        batch = {0: torch.export.Dim("batch")}
        program = torch.export.export(model, (torch.rand(2, 4),), dynamic_shapes=(batch,))
        graph = trace(program.module(), DEFAULT_RULES, (4,))
        x = torch.rand(5, 4)
        assert torch.allclose(graph(x), model(x), atol=1e-6)
        assert graph.state_dict().keys() == model.state_dict().keys()
        assert [type(found).__name__ for found in graph.children()] == ["Linear", "ReLU", "Linear"]
        with pytest.raises(ArgumentError, match=r"ExportedProgram.*expected a torch\.nn\.Module.*modules_from_export"):
            convert(program, 2, data=torch.rand(8, 4))

    def test_a_graph_of_make_fx_becomes_modules(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
        graph = make_fx(model)(torch.rand(2, 4))
        conversion = convert(graph, 4, data=torch.rand(8, 4))
        assert len(sites(conversion.snn)) == 1
        x = torch.rand(5, 4)
        assert torch.allclose(conversion.prepared.model(x), model(x), atol=1e-6)

    def test_a_program_of_one_batch_size_is_refused_with_advice(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
        with pytest.raises(AuditError, match="fixes the batch size"):
            convert(torch.export.export(model, (torch.rand(2, 4),)).module(), 2, data=torch.rand(8, 4))

    def test_a_rule_makes_a_module_of_a_graph_a_leaf(self) -> None:
        class Mine(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.clamp(0, 1)

        model = nn.Sequential(nn.Linear(4, 4), Mine(), nn.Linear(4, 2)).eval()
        first = trace(model, {**DEFAULT_RULES, Mine: as_neuron}, (4,))
        again = convert(first, 2, data=torch.rand(8, 4), rules={Mine: as_neuron})
        assert list(sites(again.snn)) == ["1"]


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "data-parallel": nn.DataParallel,
    "compiled": compiled,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "compiled-data-parallel": lambda model: compiled(nn.DataParallel(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_taken_off_and_names_are_the_networks(name: str) -> None:
    model = nets.conv_net().eval()
    conversion = convert(WRAPPERS[name](model), 2, data=torch.rand(8, 2, 8, 8))
    assert list(sites(conversion.snn)) == ["2", "6"]
    assert {"0.weight", "10.bias"} <= conversion.snn.state_dict().keys()


def test_what_is_no_ann_is_refused_as_what_it_is() -> None:
    net = nets.two_layers()
    with pytest.raises(ArgumentError, match=r"is the string 'net.pt'; expected a torch\.nn\.Module"):
        convert("net.pt", 2, example_input=torch.rand(1, 4))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"TorchScript.*model\.load_state_dict\(scripted\.state_dict\(\)\)"):
        convert(torch.jit.script(net), 2, data=torch.rand(8, 4))
    with pytest.raises(ArgumentError, match=r"a spiking network already \(.*\); expected the ANN\. Pass the ANN again"):
        convert(convert(net, 2, data=torch.rand(8, 4)).snn, 2, data=torch.rand(8, 4))


def names() -> list[str]:
    models = torchvision().models
    return models.list_models(module=models)


SEGMENTATION = ("deeplabv3_resnet50", "deeplabv3_resnet101", "deeplabv3_mobilenet_v3_large", "fcn_resnet50",
                "fcn_resnet101", "lraspp_mobilenet_v3_large")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [*names(), *SEGMENTATION])
def test_every_torchvision_network_is_traced_symbolically(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = by_export(monkeypatch)
    options: dict[str, Any] = {"weights_backbone": None} if name in SEGMENTATION else {}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False}
    with EmptyOnMeta():
        model = torchvision().models.get_model(name, weights=None, **options)
    graph = trace(model.to("meta"), DEFAULT_RULES, (3, 224, 224))
    assert used == []
    names = {name for name in graph.state_dict() if not name.startswith("_tensor_constant")}
    assert names <= model.state_dict().keys()
    assert any(name.endswith("weight") for name in names)
