"""Every row of the op table in a small network: the same function after PREPARE, the same rate, samples apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lmh import evaluate
from lmh.calibrate import Max
from lmh.convert import convert, prepare
from lmh.convert.prepare import examine
from lmh.errors import AuditError
from lmh.op_table import Kind
from lmh.ops import kind_of

SHAPE = (4, 4, 4)


class Between(nn.Module):
    """An operation on the output of one ReLU, a weighted layer where the result is a map, and another ReLU."""

    def __init__(self, operation: Callable[..., Tensor] | nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.operation = operation
        self.mix = nn.Parameter(torch.rand(4, 4))
        self.token = nn.Parameter(torch.rand(1, 4, 1, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        nn.init.uniform_(self.conv.weight, -0.3, 0.6)
        nn.init.constant_(self.conv.bias, 0.3)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        z = self.operation(y) if isinstance(self.operation, nn.Module) else self.operation(self, y)
        return torch.relu(z - 0.1).flatten(1)


def running_instance_norm() -> nn.Module:
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    norm(torch.rand(8, *SHAPE))
    return norm.eval()


ROWS: dict[str, tuple[Kind, Callable[..., Any]]] = {
    "torch.tile": (Kind.SHAPE, lambda net, x: torch.tile(x, (1, 1, 2, 1))),
    ".tile": (Kind.SHAPE, lambda net, x: x.tile(1, 1, 2, 1)),
    ".repeat": (Kind.SHAPE, lambda net, x: x.repeat(1, 2, 1, 1)),
    "torch.repeat_interleave": (Kind.SHAPE, lambda net, x: torch.repeat_interleave(x, 2, dim=2)),
    ".repeat_interleave": (Kind.SHAPE, lambda net, x: x.repeat_interleave(2, dim=1)),
    ".expand": (Kind.SHAPE, lambda net, x: x[:, :, :1].expand(-1, -1, 3, -1)),
    ".expand_as": (Kind.SHAPE, lambda net, x: x[:, :, :1].expand_as(x)),
    "torch.broadcast_to": (Kind.SHAPE, lambda net, x: torch.broadcast_to(x[:, :1], x.shape)),
    ".broadcast_to": (Kind.SHAPE, lambda net, x: x[:, :1].broadcast_to(x.size(0), 4, 4, 4)),
    "torch.flip": (Kind.SHAPE, lambda net, x: torch.flip(x, (1, 2))),
    ".flip": (Kind.SHAPE, lambda net, x: x.flip(3)),
    "torch.roll": (Kind.SHAPE, lambda net, x: torch.roll(x, (1, 2), (2, 3))),
    ".roll": (Kind.SHAPE, lambda net, x: x.roll(1, 1)),
    "torch.stack": (Kind.SHAPE, lambda net, x: torch.stack([x, x.flip(2)], 2)),
    "torch.narrow": (Kind.SHAPE, lambda net, x: torch.narrow(x, 1, 1, 2)),
    ".narrow": (Kind.SHAPE, lambda net, x: x.narrow(2, 0, 3)),
    "torch.select": (Kind.SHAPE, lambda net, x: torch.select(x, 1, 2)),
    ".select": (Kind.SHAPE, lambda net, x: x.select(3, 1)),
    "torch.unbind": (Kind.SHAPE, lambda net, x: torch.unbind(x, 1)[1]),
    ".unbind": (Kind.SHAPE, lambda net, x: x.unbind(3)[0]),
    "torch.movedim": (Kind.SHAPE, lambda net, x: torch.movedim(x, 1, 3)),
    ".movedim": (Kind.SHAPE, lambda net, x: x.movedim(3, 1)),
    "torch.moveaxis": (Kind.SHAPE, lambda net, x: torch.moveaxis(x, 1, 2)),
    "torch.swapaxes": (Kind.SHAPE, lambda net, x: torch.swapaxes(x, 1, 2)),
    ".swapaxes": (Kind.SHAPE, lambda net, x: x.swapaxes(1, 3)),
    ".swapdims": (Kind.SHAPE, lambda net, x: x.swapdims(2, 3)),
    "torch.unflatten": (Kind.SHAPE, lambda net, x: torch.unflatten(x, 1, (2, 2))),
    ".unflatten": (Kind.SHAPE, lambda net, x: x.unflatten(1, (2, 2))),
    ".view_as": (Kind.SHAPE, lambda net, x: x.view_as(x.transpose(2, 3))),
    ".reshape_as": (Kind.SHAPE, lambda net, x: x.transpose(1, 2).reshape_as(x)),
    ".unfold": (Kind.SHAPE, lambda net, x: x.unfold(2, 2, 2)),
    "torch.index_select": (Kind.SHAPE, lambda net, x: torch.index_select(x, 1, torch.tensor([2, 0, 1]))),
    ".index_select": (Kind.SHAPE, lambda net, x: x.index_select(3, torch.tensor([3, 1]))),
    ".mT": (Kind.SHAPE, lambda net, x: x.mT),
    "torch.clone": (Kind.SHAPE, lambda net, x: torch.clone(x)),
    ".clone": (Kind.SHAPE, lambda net, x: x.clone()),
    ".detach": (Kind.SHAPE, lambda net, x: x.detach()),
    ".contiguous": (Kind.SHAPE, lambda net, x: x.transpose(1, 2).contiguous()),
    ".to": (Kind.SHAPE, lambda net, x: x.to(torch.float64).to(x.dtype)),
    ".type": (Kind.SHAPE, lambda net, x: x.type(torch.float32)),
    ".float": (Kind.SHAPE, lambda net, x: x.float()),
    ".double": (Kind.SHAPE, lambda net, x: x.double().float()),
    ".type_as": (Kind.SHAPE, lambda net, x: x.type_as(net.mix)),
    "nn.PixelUnshuffle": (Kind.SHAPE, lambda: nn.PixelUnshuffle(2)),
    "F.pixel_unshuffle": (Kind.SHAPE, lambda net, x: F.pixel_unshuffle(x, 2)),
    "nn.PixelShuffle": (Kind.SHAPE, lambda: nn.PixelShuffle(2)),
    "F.pixel_shuffle": (Kind.SHAPE, lambda net, x: F.pixel_shuffle(x, 2)),
    "nn.ChannelShuffle": (Kind.SHAPE, lambda: nn.ChannelShuffle(2)),
    "F.channel_shuffle": (Kind.SHAPE, lambda net, x: F.channel_shuffle(x, 2)),
    "nn.Unfold": (Kind.SHAPE, lambda: nn.Unfold(2)),
    "F.unfold": (Kind.SHAPE, lambda net, x: F.unfold(x, 2, padding=1)),
    "nn.Fold": (Kind.AFFINE, lambda: nn.Sequential(nn.Unfold(2), nn.Fold((4, 4), 2))),
    "F.fold": (Kind.AFFINE, lambda net, x: F.fold(F.unfold(x, 2), (4, 4), 2)),
    "nn.ZeroPad2d": (Kind.SHAPE, lambda: nn.ZeroPad2d(1)),
    "nn.ReflectionPad2d": (Kind.SHAPE, lambda: nn.ReflectionPad2d(1)),
    "nn.ReplicationPad2d": (Kind.SHAPE, lambda: nn.ReplicationPad2d(1)),
    "nn.CircularPad2d": (Kind.SHAPE, lambda: nn.CircularPad2d(1)),
    "nn.ConstantPad2d with 0": (Kind.SHAPE, lambda: nn.ConstantPad2d(1, 0.0)),
    "nn.ConstantPad2d": (Kind.AFFINE, lambda: nn.ConstantPad2d(1, 0.5)),
    "F.pad": (Kind.SHAPE, lambda net, x: F.pad(x, (1, 1))),
    "F.pad reflect": (Kind.SHAPE, lambda net, x: F.pad(x, (1, 1, 1, 1), mode="reflect")),
    "F.pad with a value": (Kind.AFFINE, lambda net, x: F.pad(x, (1, 1), value=0.5)),
    "nn.Upsample nearest": (Kind.SHAPE, lambda: nn.Upsample(scale_factor=2)),
    "nn.UpsamplingNearest2d": (Kind.SHAPE, lambda: nn.UpsamplingNearest2d(scale_factor=2)),
    "nn.Upsample bilinear": (Kind.AFFINE, lambda: nn.Upsample(scale_factor=2, mode="bilinear")),
    "nn.UpsamplingBilinear2d": (Kind.AFFINE, lambda: nn.UpsamplingBilinear2d(scale_factor=2)),
    "F.interpolate nearest": (Kind.SHAPE, lambda net, x: F.interpolate(x, scale_factor=2)),
    "F.interpolate bilinear": (Kind.AFFINE, lambda net, x: F.interpolate(x, size=(3, 3), mode="bilinear")),
    "F.upsample": (Kind.AFFINE, lambda net, x: F.upsample(x, scale_factor=2, mode="bilinear")),
    "nn.InstanceNorm2d running": (Kind.AFFINE, running_instance_norm),
    "torch.div": (Kind.AFFINE, lambda net, x: torch.div(x, 2)),
    "torch.divide": (Kind.AFFINE, lambda net, x: torch.divide(x, 2)),
    ".divide": (Kind.AFFINE, lambda net, x: x.divide(2)),
    "torch.multiply": (Kind.AFFINE, lambda net, x: torch.multiply(net.mix, x)),
    "torch.subtract": (Kind.AFFINE, lambda net, x: torch.subtract(3, x)),
    "torch.neg": (Kind.AFFINE, lambda net, x: 1 + torch.neg(x)),
    "torch.zeros_like": (Kind.AFFINE, lambda net, x: torch.cat([x, torch.zeros_like(x)], 1)),
    "a computed factor": (Kind.AFFINE, lambda net, x: x * torch.softmax(net.mix, 1).abs()),
    "torch.matmul": (Kind.SYNAPSE, lambda net, x: torch.matmul(x, net.mix)),
    "torch.matmul from the left": (Kind.SYNAPSE, lambda net, x: torch.matmul(net.mix, x)),
    ".matmul": (Kind.SYNAPSE, lambda net, x: x.flatten(2).transpose(1, 2).matmul(net.mix)),
    "@ with a transposed parameter": (Kind.SYNAPSE, lambda net, x: x @ net.mix.t()),
    "torch.mm": (Kind.SYNAPSE, lambda net, x: torch.mm(x.mean((2, 3)), net.mix)),
    "torch.einsum": (Kind.SYNAPSE, lambda net, x: torch.einsum("nchw,cd->ndhw", x, net.mix)),
    "torch.einsum of one": (Kind.AFFINE, lambda net, x: torch.einsum("nchw->nhc", x)),
    "F.linear with a computed weight": (Kind.SYNAPSE, lambda net, x: F.linear(x, net.mix - net.mix.mean())),
    "a token in front": (Kind.SHAPE, lambda net, x: torch.cat([net.token.expand(x.size(0), -1, -1, -1), x], 2)),
    "F.threshold": (Kind.ACTIVATION, lambda net, x: F.threshold(x - 0.2, 0, 0)),
    "nn.Threshold": (Kind.ACTIVATION, lambda: nn.Threshold(0, 0)),
    "clamp to a range": (Kind.ACTIVATION, lambda net, x: (x - 0.2).clamp(0, 0.5)),
}  # fmt: skip


def network_of(row: Callable[..., Any]) -> Between:
    """Return the network around a row: a function of the network and its map, or of nothing for a module."""
    return Between(row if inspect.signature(row).parameters else row()).eval()


@pytest.mark.filterwarnings("ignore:.*upsample.*is deprecated")
@pytest.mark.parametrize("name", ROWS)
def test_a_row_keeps_the_function_the_rate_and_the_samples_apart(name: str) -> None:
    torch.manual_seed(0)
    ann = network_of(ROWS[name][1])
    x = torch.rand(32, *SHAPE)
    conversion = convert(ann, 64, data=x, calibration=Max())
    snn, prepared = conversion.snn, conversion.prepared.model
    assert ROWS[name][0] in [kind_of(node) for node in prepared.graph.nodes]
    with torch.no_grad():
        expected = ann(x)
        assert torch.allclose(prepared(x), expected, atol=1e-6)
        rate = snn(x)
        assert float((rate - expected).abs().max()) < 0.06 * float(expected.abs().max())
        alone = torch.cat([snn(sample[None]) for sample in x[:3]])
        assert torch.allclose(snn(x[:3]), alone, atol=float(expected.abs().max()) / 64 * 2)
        assert float((snn(x[:3]) - alone).abs().mean()) < 1e-3
    layers = {work.path: work for work in evaluate(snn, [x[:4]]).layers}
    assert len(layers) == 1 + (ROWS[name][0] is Kind.SYNAPSE)


NO_AFFINE = "not an affine node"
PRODUCT = "a product of two signals"
ROUNDS = "which rounds to whole numbers"
BATCHNORM = "train the ANN with BatchNorm in its place"

REFUSED: dict[str, tuple[Callable[..., Any], str, str]] = {
    "torch.div": (lambda net, x: torch.div(x, 2, rounding_mode="floor"), "torch.div, " + ROUNDS, "divide without"),
    ".div": (lambda net, x: x.div(2, rounding_mode="trunc"), ".div(), " + ROUNDS, "divide without rounding"),
    "//": (lambda net, x: x // 2, "operator.floordiv, " + ROUNDS, "divide without rounding"),
    "torch.floor_divide": (lambda net, x: torch.floor_divide(x, 2), ROUNDS, "divide without rounding"),
    "%": (lambda net, x: x % 2, "operator.mod, " + NO_AFFINE, "rewrite it"),
    "**": (lambda net, x: x**2, "operator.pow, " + NO_AFFINE, "rewrite it"),
    "1 /": (lambda net, x: 1 / (x + 1), "operator.truediv, " + NO_AFFINE, "rewrite it"),
    ".to whole numbers": (lambda net, x: x.to(torch.int32).float(), ".to(), " + NO_AFFINE, "rewrite it"),
    ".long": (lambda net, x: x.long().float(), ".long(), " + NO_AFFINE, "rewrite it"),
    "a square": (lambda net, x: x * x, "operator.mul, " + PRODUCT, "rewrite it"),
    "a quotient": (lambda net, x: x / (x + 1), "operator.truediv, " + PRODUCT, "rewrite it"),
    "torch.matmul": (lambda net, x: torch.matmul(x, x), "torch.matmul, " + PRODUCT, "rewrite it"),
    "@": (lambda net, x: x @ x.mT, "operator.matmul, " + PRODUCT, "rewrite it"),
    "torch.bmm": (lambda net, x: torch.bmm(x[:, 0], x[:, 1]), "torch.bmm, " + PRODUCT, "rewrite it"),
    "torch.einsum": (lambda net, x: torch.einsum("nchw,ncwd->nchd", x, x), "torch.einsum, " + PRODUCT, "rewrite it"),
    "F.linear": (lambda net, x: F.linear(net.mix, x[0, 0]) + x, "torch.nn.functional.linear", "rewrite it"),
    "F.conv2d": (lambda net, x: F.conv2d(x, x[:4]), "torch.nn.functional.conv2d, " + PRODUCT, "rewrite it"),
    "F.bilinear": (lambda net, x: F.bilinear(x, x, net.token.expand(2, -1, 4, -1)[:, :, :, 0]), PRODUCT, "rewrite it"),
    "attention": (lambda net, x: F.scaled_dot_product_attention(x, x, x), PRODUCT, "rewrite it"),
    "nn.MultiheadAttention": (lambda net, x: net.attention(x[:, 0], x[:, 0], x[:, 0])[0], PRODUCT, "rewrite it"),
    "torch.maximum": (lambda net, x: torch.maximum(x, x.mT), "combines several signals", "rewrite it"),
    "nn.GLU": (lambda: nn.GLU(1), "torch.nn.GLU, " + NO_AFFINE, "rewrite it"),
    "F.glu": (lambda net, x: F.glu(x, 1), "torch.nn.functional.glu, " + NO_AFFINE, "rewrite it"),
    "nn.LPPool2d": (lambda: nn.LPPool2d(2, 2), "torch.nn.LPPool2d, " + NO_AFFINE, "use an average pool"),
    "F.lp_pool2d": (lambda net, x: F.lp_pool2d(x, 2.0, 2), "torch.nn.functional.lp_pool2d", "use an average pool"),
    "nn.LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), "torch.nn.LocalResponseNorm", BATCHNORM),
    "F.local_response_norm": (lambda net, x: F.local_response_norm(x, 2), "functional.local_response_norm", BATCHNORM),
    "F.normalize": (lambda net, x: F.normalize(x), "torch.nn.functional.normalize", BATCHNORM),
    "nn.GroupNorm": (lambda: nn.GroupNorm(2, 4), "torch.nn.GroupNorm", BATCHNORM),
    "nn.LayerNorm": (lambda: nn.LayerNorm(4), "torch.nn.LayerNorm", BATCHNORM),
    "F.layer_norm": (lambda net, x: F.layer_norm(x, (4,), net.mix[0], net.mix[1]), NO_AFFINE, BATCHNORM),
    "nn.InstanceNorm2d": (lambda: nn.InstanceNorm2d(4), "torch.nn.InstanceNorm2d", BATCHNORM),
    "torch.cumsum": (lambda net, x: torch.cumsum(x, 2), "torch.cumsum", "rewrite it"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_row_is_refused_by_name_with_advice_that_fits(name: str) -> None:
    row, reason, advice = REFUSED[name]
    ann = network_of(row)
    _, problems = examine(ann, SHAPE)
    assert len(problems) == 1
    assert reason in problems[0]
    assert advice in problems[0]
    path = problems[0].partition(":")[0]
    assert f"--keep {path}" in problems[0]
    assert "keep=, surgery=ReluSurgery() in Python" in problems[0]
    assert "as_neuron" not in problems[0]


@pytest.mark.parametrize(
    "row",
    [lambda: nn.BatchNorm2d(4, track_running_stats=False), lambda net, x: F.batch_norm(x, None, None, training=True)],
)
def test_a_batchnorm_that_reads_the_batch_is_refused_and_not_advised_to_be_kept(row: Callable[..., Any]) -> None:
    _, problems = examine(network_of(row), SHAPE)
    assert len(problems) == 1
    assert "without running statistics mixes the samples of a batch" in problems[0]
    assert "track_running_stats=True" in problems[0]
    assert "--keep" not in problems[0]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (lambda: nn.Threshold(0.1, 0), "operation: no rule for torch.nn.Threshold"),
        (lambda net, x: F.threshold(x, 0.1, 0), "threshold: no rule for torch.nn.Threshold"),
        (lambda net, x: F.hardshrink(x), "hardshrink: no rule for torch.nn.Hardshrink"),
        (lambda net, x: x.clamp(-1, 1), "hardtanh: Hardtanh from -1 gives negative values"),
    ],
)
def test_activations_without_a_rule_are_named_as_their_module(row: Callable[..., Any], text: str) -> None:
    _, problems = examine(network_of(row), SHAPE)
    assert len(problems) == 1
    assert problems[0].startswith(text)
    assert "as_neuron}" in problems[0]


@pytest.mark.parametrize(
    ("row", "path"),
    [
        (lambda net, x: x.flip(0), "flip"),
        (lambda net, x: torch.roll(x, 1, 0), "roll"),
        (lambda net, x: x.roll(40), "roll"),
        (lambda net, x: x.index_select(0, torch.arange(x.size(0)).flip(0)), "index_select"),
        (lambda net, x: x.roll(x.size(0), 1), "roll"),
    ],
)
def test_what_mixes_samples_without_changing_shapes_is_refused_by_name(row: Callable[..., Any], path: str) -> None:
    with pytest.raises(AuditError, match=f"{path}: mixes the samples of a batch or uses the batch size, as a value"):
        prepare(network_of(row), SHAPE)


def test_a_kept_softmax_over_the_batch_is_refused() -> None:
    with pytest.raises(AuditError, match="operation: mixes the samples"):
        prepare(network_of(lambda: nn.Softmax(0)), SHAPE, keep=["operation"])


def test_a_kept_attention_whose_fast_path_gives_an_empty_tensor_converts() -> None:
    row = REFUSED["nn.MultiheadAttention"][0]
    ann, x = network_of(row), torch.rand(6, *SHAPE)
    conversion = convert(ann, 4, data=x, keep=["attention"])
    assert conversion.report.nodes()["kept"] == ["attention"]
    assert conversion.snn(x).shape == ann(x).shape


def test_a_signal_used_twice_is_a_product() -> None:
    graph = fx.symbolic_trace(lambda x: x * x)
    assert [kind_of(node) for node in graph.graph.nodes][1] is Kind.UNKNOWN


def test_what_does_not_depend_on_the_input_needs_no_rule() -> None:
    class Standardised(nn.Module):
        """A convolution whose weight is standardised at every call, and a learned gate."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2, 3, 3))
            self.gate = nn.Parameter(torch.randn(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std()
            y = torch.relu(F.conv2d(x, weight)) * torch.sigmoid(self.gate)
            return torch.relu(F.conv2d(y, weight[:, :, :1, :1].repeat(1, 2, 1, 1)[:, :3])).flatten(1)

    ann, x = Standardised().eval(), torch.rand(16, 2, 6, 6)
    conversion = convert(ann, 64, data=x, calibration=Max())
    assert conversion.report.nodes() == {"converted": ["relu", "relu_1"], "kept": [], "refused": []}
    with torch.no_grad():
        assert float((conversion.snn(x) - ann(x)).abs().max()) < 0.1 * float(ann(x).max())
    first, second = evaluate(conversion.snn, [x]).layers
    assert (first.ann_macs, first.macs, first.accumulates) == (3 * 16 * 18, 3 * 16 * 18, 0)
    assert second.ann_macs == 3 * 3 * 16
    assert second.accumulates == 0
    assert second.macs == 64 * second.ann_macs


@pytest.mark.parametrize(
    "product",
    [
        lambda weight, y: torch.matmul(y, weight.t()),
        lambda weight, y: y @ weight.t(),
        lambda weight, y: torch.einsum("nlc,dc->nld", y, weight),
        lambda weight, y: F.linear(y, weight),
        lambda weight, y: F.linear(y, weight + 0.0),
        lambda weight, y: torch.matmul(weight, y.transpose(1, 2)).transpose(1, 2),
    ],
)
def test_every_spelling_of_a_linear_layer_costs_the_same(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Tokens(nn.Module):
        def __init__(self, linear: bool) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)
            self.linear = linear

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.first(x))
            return torch.relu(self.second(y) if self.linear else product(self.second.weight, y)).flatten(1)

    as_layer, spelled = Tokens(True).eval(), Tokens(False).eval()
    spelled.load_state_dict(as_layer.state_dict())
    x = torch.rand(8, 5, 4)
    expected, got = (evaluate(convert(ann, 4, data=x).snn, [x]).layers[1] for ann in (as_layer, spelled))
    assert expected.accumulates > 0
    assert (got.ann_macs, got.accumulates, got.macs) == (expected.ann_macs, expected.accumulates, expected.macs)


def test_views_and_copies_are_told_apart() -> None:
    class InPlace(nn.Module):
        def __init__(self, moved: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.fc, self.moved = nn.Linear(4, 4), moved

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            z = self.moved(y)
            z.relu_()
            return torch.relu(y.sum(1, keepdim=True) + z.flatten(1).sum(1, keepdim=True))

    views = (lambda y: y.detach(), lambda y: y.narrow(1, 0, 2), lambda y: y.unflatten(1, (2, 2)), lambda y: y.float(),
             lambda y: torch.select(y, 1, 0)[:, None], lambda y: y.data, nn.Flatten())  # fmt: skip
    for view in views:
        with pytest.raises(AuditError, match="overwrites a view"):
            prepare(InPlace(view), (4,))
    for copy in (lambda y: y.clone(), lambda y: y.flip(1), lambda y: y.repeat(1, 2), nn.ReflectionPad1d(1)):
        ann, x = InPlace(copy).eval(), torch.randn(6, 4)
        assert torch.equal(prepare(ann, (4,)).model(x), ann(x))
