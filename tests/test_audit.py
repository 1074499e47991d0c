"""What the audit says: wrappers are looked through, refusals name the node and give advice that fits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

import nets
from lmh import LMH, PerLayer, PerStep, sites
from lmh.calibrate import Max
from lmh.convert import ReluSurgery, as_neuron, convert, prepare
from lmh.convert.prepare import examine
from lmh.convert.refusals import describe
from lmh.errors import ArgumentError, AuditError
from lmh.results import describe_network
from lmh.shapes import node_values
from lmh.spiking import PerChannel


class TestWrappers:
    def same(self, wrapped: nn.Module, ann: nn.Module) -> None:
        x = torch.rand(8, 2, 8, 8)
        expected, got = (convert(model, 4, data=x) for model in (ann, wrapped))
        assert list(sites(got.snn)) == list(sites(expected.snn)) == ["2", "6"]
        assert got.snn.state_dict().keys() == expected.snn.state_dict().keys()
        assert torch.equal(got.snn(x), expected.snn(x))

    def test_data_parallel_is_looked_through(self) -> None:
        ann = nets.conv_net()
        self.same(nn.DataParallel(ann), ann)

    def test_a_compiled_network_is_looked_through_and_not_compiled(self) -> None:
        ann = nets.conv_net()
        calls: list[object] = []
        self.same(torch.compile(ann, backend=lambda graph, _: calls.append(graph) or graph.forward), ann)
        self.same(nn.DataParallel(torch.compile(ann)), ann)
        assert calls == []

    def test_compiled_parts_are_looked_through(self) -> None:
        ann = nets.conv_net()
        x = torch.rand(8, 2, 8, 8)
        expected = convert(ann, 4, data=x).snn(x)

        def backend(graph: fx.GraphModule, _: object) -> Callable[..., object]:
            raise AssertionError("compiled")

        parts = nn.Sequential(torch.compile(ann[:4], backend=backend), ann[4:])
        in_place = nn.Sequential(ann[:4], ann[4:])
        in_place[1].compile(backend=backend)
        for model in (parts, in_place):
            converted = convert(model, 4, data=x)
            assert list(sites(converted.snn)) == ["0.2", "1.6"]
            assert torch.equal(converted.snn(x), expected)
        assert type(parts[0]).__name__ == "OptimizedModule"

    @pytest.fixture
    def process_group(self, tmp_path: object) -> Iterator[None]:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()

    @pytest.mark.usefixtures("process_group")
    def test_distributed_data_parallel_is_looked_through(self) -> None:
        ann = nets.conv_net()
        self.same(DistributedDataParallel(ann), ann)

    def test_the_dry_run_looks_through_as_well(self) -> None:
        assert examine(nn.DataParallel(nets.conv_net()), (2, 8, 8)) == examine(nets.conv_net(), (2, 8, 8))

    def test_a_spiking_network_is_refused_with_what_to_do(self) -> None:
        x = torch.rand(8, 2, 8, 8)
        snn = convert(nets.conv_net(), 4, data=x).snn
        for model in (snn, nn.DataParallel(snn), nn.Sequential(snn, nn.Linear(3, 2))):
            with pytest.raises(ArgumentError, match=r"spiking network already \(.*2, .*6, 2 sites\)") as caught:
                convert(model, 8, data=x)
            assert "lmh.finetune.finetune" in str(caught.value)
            assert "lmh.convert.load" in str(caught.value)


class Pooled(nn.Module):
    """An activation with a max-pool behind it."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(1, 4, 3, padding=1), act, nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.max_pool2d(self.act(self.conv(x)), 2).flatten(1))


class TestMaxPoolBehindOtherActivations:
    @pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(), nn.Hardswish()])
    def test_a_neuron_in_its_place_is_monotone_so_the_pool_moves(self, act: nn.Module) -> None:
        x = 2 * torch.randn(64, 1, 4, 4)
        ann, relu = Pooled(act).eval(), Pooled(nn.ReLU()).eval()
        relu.load_state_dict(ann.state_dict())
        theta = convert(relu, 128, data=x, calibration=Max()).calibration
        for options in ({"rules": {type(act): as_neuron}}, {"surgery": ReluSurgery()}):
            snn = convert(ann, 128, example_input=x, calibration=theta, **options).snn  # data would refit the biases
            with torch.no_grad():
                assert torch.equal(snn(x), convert(relu, 128, data=x, calibration=theta).snn(x))
                assert float((snn(x) - relu(x)).abs().max()) < 0.05

    def test_a_wrong_rewriting_is_still_found(self) -> None:
        calls = itertools.count(1)

        class Counting(Pooled):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * next(calls)

        with pytest.raises(AuditError, match="answers differently from Counting"):
            convert(Counting(nn.SiLU()), 4, data=torch.rand(8, 1, 4, 4), rules={nn.SiLU: as_neuron})

    def test_a_kept_one_stays_before_its_pool(self) -> None:
        class AndReLU(Pooled):
            def forward(self, x: Tensor) -> Tensor:
                return torch.relu(super().forward(x))

        x = torch.randn(8, 1, 4, 4)
        ann = AndReLU(nn.SiLU()).eval()
        conversion = convert(ann, 128, data=x, keep=["act"], calibration=Max())
        assert float((conversion.snn(x) - ann(x)).detach().abs().max()) < 0.02


class Gate(nn.Module):
    def __init__(self, gate: Callable[[Tensor], Tensor] | nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.gate = nn.Linear(4, 4), nn.Linear(4, 2), gate

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.gate(torch.relu(self.a(x))))


@pytest.mark.parametrize(
    ("gate", "what"),
    [
        (nn.Sigmoid(), "gate: torch.nn.Sigmoid"),
        (torch.sigmoid, "sigmoid: torch.sigmoid"),
        (lambda y: y.softmax(1), "softmax: .softmax()"),
    ],
)
def test_a_readout_in_the_middle_is_told_where_it_may_stand(gate: Callable[[Tensor], Tensor], what: str) -> None:
    _, (problem,) = examine(Gate(gate), (4,))
    assert problem.startswith(f"{what} in the middle of the network has no spiking form; expected it only as the last")
    path = what.partition(":")[0]
    assert f"Pass --keep {path}, or --surgery relu" in problem
    assert "move it to the end" in problem
    assert "as_neuron" not in problem
    conversion = convert(Gate(gate), 4, data=torch.rand(8, 4), keep=[path])
    assert conversion.report.nodes()["kept"] == [path]


def test_a_parametrized_layer_is_told_to_bake_its_weights() -> None:
    ann = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU())
    with pytest.raises(AuditError, match=r"0: no rule for .*remove_parametrizations"):
        prepare(ann, (4,))


def named(function: Callable[[Tensor], Tensor]) -> str:
    return describe(next(node for node in fx.symbolic_trace(function).graph.nodes if node.op != "placeholder"))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: F.gelu(x), "torch.nn.functional.gelu"),
        (lambda x: F.softplus(x), "torch.nn.functional.softplus"),
        (lambda x: F.logsigmoid(x), "torch.nn.functional.logsigmoid"),
        (lambda x: F.max_pool2d(x, 2), "torch.nn.functional.max_pool2d"),
        (lambda x: F.conv2d(x, x), "torch.nn.functional.conv2d"),
        (lambda x: F.threshold(x, 0, 0), "torch.nn.functional.threshold"),
        (lambda x: F.scaled_dot_product_attention(x, x, x), "torch.nn.functional.scaled_dot_product_attention"),
        (lambda x: torch.relu(x), "torch.relu"),
        (lambda x: torch.einsum("ij->i", x), "torch.einsum"),
        (lambda x: torch.special.expit(x), "torch.special.expit"),
        (lambda x: torch.linalg.norm(x), "torch.linalg.norm"),
        (lambda x: torch.ops.aten.gelu.default(x), "torch.ops.aten.gelu.default"),
        (lambda x: x // 2, "operator.floordiv"),
        (lambda x: x.cumsum(1), ".cumsum()"),
    ],
)
def test_nodes_are_called_what_users_call_them(function: Callable[[Tensor], Tensor], name: str) -> None:
    assert named(function) == name


def test_a_shape_that_does_not_fit_is_raised_and_not_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    for broken in (nn.Linear(7, 7), nn.PixelShuffle(3)):
        with pytest.raises(ArgumentError, match="does not fit"):
            node_values(fx.symbolic_trace(nn.Sequential(broken)), (2, 4))
    assert caplog.records == []


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("granularity", [PerLayer(), PerChannel(), PerStep()])
def test_the_summary_of_a_site_is_over_its_channels(
    granularity: PerLayer | PerChannel | PerStep, per_layer: bool
) -> None:
    policy = Max(granularity=PerLayer()) if per_layer else Max()
    snn = convert(
        nets.two_layers(), 4, data=torch.rand(64, 4), neuron=LMH(granularity=granularity), calibration=policy
    ).snn
    (site,) = sites(snn).values()
    if isinstance(granularity, PerStep):
        site.raw_threshold.data[1] += 0.5
    channels = 1 if per_layer and not isinstance(granularity, PerChannel) else 8
    theta = site.v_threshold.detach().reshape(-1, channels).mean(0)
    (row,) = describe_network(snn, source="", calibration="", nodes={}, evaluation=None)["sites"]
    assert row["channels"] == channels
    assert row["v_threshold"] == pytest.approx(float(theta.mean()))
    assert row["v_threshold_min"] == pytest.approx(float(theta.min()))
    assert row["v_threshold_max"] == pytest.approx(float(theta.max()))


class Restless(nn.Module):
    """Counts its calls, reads a parameter, keeps a constant that is no buffer, and moves its input about."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("calls", torch.zeros(()))
        self.constant = torch.ones(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        self.constant[:2] = 3
        calls = self.calls
        calls += torch.add(calls, torch.rand(()), out=calls)
        F.threshold(self.constant, 5, 9, inplace=True)
        x = (x.to("cpu") + self.constant).to(device=torch.device("cpu")).cpu()
        return x.repeat(1, int(self.weight.item())) + torch.arange(8, device=x.device)


def test_values_change_nothing_and_know_constants() -> None:
    tracer = fx.Tracer()
    tracer.is_leaf_module = lambda module, name: True  # type: ignore[method-assign]
    model = nn.Sequential(Restless())
    graph = fx.GraphModule(model, tracer.trace(model))
    before = torch.get_rng_state()
    *_, output = node_values(graph, (3, 4)).values()
    assert (output.shape, output.device.type) == ((3, 8), "meta")
    assert model[0].calls == 0
    assert model[0].constant.tolist() == [1, 1, 1, 1]
    assert torch.equal(torch.get_rng_state(), before)
    assert model[0](torch.zeros(3, 4)).shape == (3, 8)


def test_a_view_that_holds_in_channels_last_is_none_of_our_business() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return x.view(x.size(0), -1)

    model = Last()
    assert model(torch.rand(2, 4, 4, 3)).shape == (2, 128)
    *_, output = node_values(fx.symbolic_trace(model), (2, 4, 4, 3)).values()
    assert output.shape == (2, 128)


def test_what_is_remembered_of_shapes_depends_on_nothing_else() -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            halves = torch.split(x, 2, dim=1)
            grown = torch.add(halves[0], 1).contiguous().unsqueeze_(0)  # of what both gave
            return [
                grown,
                torch.add(halves[0], 1).contiguous(),
                halves[1][:, :1],
                torch.add(halves[0], 1.5),
                torch.zeros_like(x, dtype=torch.bool).int(),
            ]

    graph = fx.symbolic_trace(Net())
    expected = [leaf.shape for leaf in graph(torch.zeros(3, 4))]
    for dtype in (torch.float32, torch.float64, torch.float32):
        graph.register_buffer("kind", torch.zeros((), dtype=dtype))
        first, second = ([*node_values(graph, (3, 4)).values()][-1] for _ in range(2))
        assert [leaf.shape for leaf in first] == [leaf.shape for leaf in second] == expected
        assert [leaf.dtype for leaf in first] == [dtype, dtype, dtype, dtype, torch.int32]
        assert not any(one is other for one, other in zip(first, second, strict=True))
