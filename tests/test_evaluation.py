"""Evaluation and energy: counted from real spikes, checked by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import nets
from lmh import evaluate, sites
from lmh.calibrate import Max
from lmh.convert import DirectCoding, EventFrames, ReluSurgery, convert, keep
from lmh.energy import binary_nodes, fan_out, picojoules
from lmh.errors import DataError
from lmh.records import Calibration
from lmh.results import describe_network
from lmh.torchvision_shim import torchvision


def by_hand(ann: nn.Module, timesteps: int, x: Tensor, **thetas: float) -> nn.Module:
    values = {path.replace("_", "."): torch.tensor(theta) for path, theta in thetas.items()}
    half = {path: torch.tensor(0.5) for path in values}
    return convert(ann, timesteps, example_input=x, calibration=Calibration("by hand", timesteps, 0, values, half)).snn


def test_energy_of_two_layers_by_hand() -> None:
    ann = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        ann[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
        ann[2].weight.fill_(0.0)
        ann[2].bias.fill_(-1.0)
    x = torch.tensor([[1.0, 0.5]])
    snn = by_hand(ann, 4, x, **{"1": 1.0, "3": 1.0})
    result = evaluate(snn, [x])
    # Currents 1, 0.5 and −1 with θ = 1 and T = 4: 4, 2 and 0 spikes; the second site is silent.
    assert result.firing_rate == {"1": 6 / 12, "3": 0.0}
    work = {layer.path: layer for layer in result.layers}
    assert (work["0"].ann_macs, work["0"].macs, work["0"].accumulates) == (6, 6, 0)
    assert (work["2"].ann_macs, work["2"].macs, work["2"].accumulates) == (12, 0, 6 * 4)
    assert (work["4"].ann_macs, work["4"].macs, work["4"].accumulates) == (8, 8, 0)
    assert picojoules(result.layers) == pytest.approx((0.9 * 24 + 4.6 * 14, 4.6 * 26))


def test_a_layer_fed_by_averages_multiplies_at_every_step() -> None:
    ann = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Flatten())
    x = torch.rand(5, 1, 4, 4)
    result = evaluate(convert(ann, 4, data=x).snn, [x])
    work = {layer.path: layer for layer in result.layers}
    assert work["3"].accumulates == 0
    assert work["3"].macs == 4 * work["3"].ann_macs == 4 * 2 * 3 * 4


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2),
        nn.ConvTranspose2d(2, 3, 3, stride=2),
        nn.Conv1d(2, 3, 5),
        nn.Linear(6, 5),
    ],
)
def test_fan_out_counts_every_connection(layer: nn.Module) -> None:
    shapes = {nn.Linear: (6,), nn.Conv1d: (2, 9)}
    shape = shapes.get(type(layer), (layer.in_channels if hasattr(layer, "in_channels") else 0, 7, 7))
    model = fx.symbolic_trace(nn.Sequential(layer))
    node = next(node for node in model.graph.nodes if node.op == "call_module")
    counted = fan_out(node, torch.zeros(1, *shape))
    module = model.get_submodule("0")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
        module.bias.zero_()
        for index in [(0,) * len(shape), tuple(size - 1 for size in shape), tuple(size // 2 for size in shape)]:
            one = torch.zeros(1, *shape)
            one[(0, *index)] = 1.0
            assert float(counted[index]) == float(module(one).sum())


def test_synops_agree_with_a_count_spike_by_spike(digits_ann: nn.Module, digits_test: object) -> None:
    x = next(iter(digits_test))[0][:3]  # type: ignore[call-overload]
    snn = convert(digits_ann, 3, data=x).snn
    work = {layer.path: layer for layer in evaluate(snn, [x]).layers}
    layer = snn.get_submodule("block.conv1")
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    snn(x)
    total = 0
    for _, _, row, column in seen[0].nonzero().tolist():
        rows = sum(0 <= row + d < 8 for d in (-1, 0, 1))
        columns = sum(0 <= column + d < 8 for d in (-1, 0, 1))
        total += rows * columns * layer.out_channels
    assert work["block.conv1"].accumulates * 3 == total
    assert work["block.conv1"].ann_macs == 24 * 24 * 9 * 64


def test_spikes_stay_binary_through_pools_and_concats_only() -> None:
    snn = convert(nets.Residual(), 2, data=torch.rand(4, 2, 8, 8)).snn
    binary = {node.name for node in binary_nodes(snn)}
    assert {"relu_4", "cat"} & binary
    assert not {"avg_pool2d", "add"} & binary
    assert len(sites(snn)) == 4


def test_accuracy_agreement_and_error(digits_ann: nn.Module, digits_test: object) -> None:
    snn = convert(digits_ann, 8, data=digits_test).snn  # type: ignore[arg-type]
    result = evaluate(snn, digits_test, ann=digits_ann)  # type: ignore[arg-type]
    assert result.samples == 360
    assert result.snn_accuracy is not None
    assert len(result.snn_accuracy) == 8
    outputs = torch.cat([snn(x) for x, _ in digits_test])  # type: ignore[attr-defined]
    labels = torch.cat([y for _, y in digits_test])  # type: ignore[attr-defined]
    ann = torch.cat([digits_ann(x) for x, _ in digits_test])  # type: ignore[attr-defined]
    assert result.snn_accuracy[-1] == float((outputs.argmax(1) == labels).double().mean())
    assert result.agreement is not None
    assert result.agreement[-1] == pytest.approx(float((outputs.argmax(1) == ann.argmax(1)).double().mean()))
    assert result.output_error == pytest.approx(
        float(((outputs - ann).norm(dim=1).sum() / ann.norm(dim=1).sum()).detach()), rel=1e-4
    )


def test_without_labels_only_agreement_is_known(digits_ann: nn.Module) -> None:
    x = torch.rand(16, 1, 8, 8)
    result = evaluate(convert(digits_ann, 2, data=x).snn, [x], ann=digits_ann)
    assert result.snn_accuracy is None
    assert result.ann_accuracy is None
    assert result.agreement is not None
    alone = evaluate(convert(digits_ann, 2, data=x).snn, [x])
    assert alone.agreement is None
    assert alone.output_error is None


def test_event_frames_are_measured_per_sample() -> None:
    ann, frames = nets.Residual().eval(), torch.rand(4, 6, 2, 8, 8)
    snn = convert(ann, 4, data=[frames], encoding=EventFrames(), calibration=Max()).snn
    result = evaluate(snn, [(frames, torch.zeros(6, dtype=torch.long))], ann=ann)
    assert result.samples == 6
    assert result.agreement is not None
    work = {layer.path: layer for layer in result.layers}
    assert work["stem"].macs == work["stem"].ann_macs == 4 * 4 * 8 * 8 * 2 * 9


def test_modes_are_restored(digits_ann: nn.Module) -> None:
    x = torch.rand(4, 1, 8, 8)
    snn = convert(digits_ann, 2, data=x).snn.train()
    evaluate(snn, [x], ann=digits_ann.train())
    assert snn.training
    assert digits_ann.training


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batch"),
        ([(torch.rand(2, 1, 8, 8), torch.tensor([0, 11]))], "label is 11"),
        ([torch.full((2, 1, 8, 8), float("nan"))], "NaN"),
    ],
)
def test_data_that_does_not_fit_is_refused(digits_ann: nn.Module, batches: list[object], message: str) -> None:
    snn = convert(digits_ann, 2, data=torch.rand(4, 1, 8, 8)).snn
    with pytest.raises(DataError, match=message):
        evaluate(snn, batches)


def test_the_ann_of_event_frames_works_on_every_frame() -> None:
    ann = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        ann[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
        ann[2].weight.fill_(0.0)
        ann[2].bias.fill_(-1.0)
    frames = torch.tensor([[1.0, 0.5], [0.0, 1.0], [1.0, 0.0]])[:, None]
    half = {path: torch.tensor(0.5) for path in ("1", "3")}
    theta = {path: torch.tensor(1.0) for path in half}
    calibration = Calibration("by hand", 3, 0, theta, half)
    snn = convert(ann, 3, example_input=frames, encoding=EventFrames(), calibration=calibration).snn
    result = evaluate(snn, [frames, frames.repeat(1, 2, 1)])
    assert result.samples == 3
    # Membranes from 0.5 with the currents (1, 0, 1), (0.5, 1, 0), (−1, 0, −1): 2, 2 and 0 spikes of 9 chances.
    assert result.firing_rate == {"1": 4 / 9, "3": 0.0}
    work = {layer.path: (layer.ann_macs, layer.macs, layer.accumulates) for layer in result.layers}
    assert work == {"0": (3 * 6, 3 * 6, 0), "2": (3 * 12, 0, 4 * 4), "4": (3 * 8, 8, 0)}
    assert picojoules(result.layers) == pytest.approx((0.9 * 16 + 4.6 * 26, 4.6 * 78))


class Attends(nn.Module):
    """Tokens [N, 5, 4] through a ReLU, attention, a product of two signals and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.attention = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        z, _ = self.attention(y, y, y)
        return self.head(torch.matmul(z, y.transpose(1, 2)).mean(1))


def test_kept_attention_and_products_count_their_multiplications() -> None:
    x = torch.rand(6, 5, 4)
    conversion = convert(Attends(), 4, data=x, surgery=ReluSurgery())
    result = evaluate(conversion.snn, [x[:4], x[4:]])
    work = {layer.path: layer for layer in result.layers}
    inside = 5 * 8 * 24 + 2 * (2 * 5 * 5 * 4) + 5 * 8 * 8  # projections; QKᵀ and its product with V in two heads; out
    assert (work["attention"].ann_macs, work["attention"].macs) == (inside, 4 * inside)
    assert (work["matmul"].ann_macs, work["matmul"].macs) == (5 * 5 * 8, 4 * 5 * 5 * 8)
    assert all(work[path].accumulates == 0 for path in ("attention", "matmul"))
    assert result.uncounted == ()
    assert torch.backends.mha.get_fastpath_enabled()
    assert not conversion.snn.get_submodule("attention")._forward_hooks


class Leaf(nn.Module):
    """A user's layer: convolution, linear, scaled dot product and an activation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.unused = nn.Conv1d(2, 2, 3, padding=1, groups=2), nn.Linear(4, 4), nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(self.conv(x)).tanh()
        return torch.nn.functional.scaled_dot_product_attention(y, y, y)


def test_a_users_kept_leaf_counts_what_is_inside() -> None:
    ann = nn.Sequential(nn.Conv1d(1, 2, 1), nn.ReLU(), Leaf(), nn.Flatten(), nn.Linear(8, 3))
    x = torch.rand(6, 1, 4)
    for encoding, data, frames in ((DirectCoding(), x, 1), (EventFrames(), x.repeat(3, 1, 1, 1), 3)):
        snn = convert(ann, 3, data=data, rules={Leaf: keep}, encoding=encoding, calibration=Max()).snn
        result = evaluate(snn, [data])
        work = {layer.path: layer for layer in result.layers}
        inside = 2 * 4 * 3 + 2 * 4 * 4 + 2 * (2 * 2 * 4)
        assert (work["2"].ann_macs, work["2"].macs) == (frames * inside, 3 * inside)
        assert result.uncounted == ()


class Recurrent(nn.Module):
    """Counts its linear layer and not its LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lstm = nn.Linear(4, 4), nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.fc(x)[:, None])[0][:, 0]


def test_a_kept_module_that_cannot_be_counted_is_named() -> None:
    ann = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Recurrent(), nn.Linear(4, 3))
    x = torch.rand(6, 4)
    snn = convert(ann, 3, data=x, rules={Recurrent: keep}).snn
    result = evaluate(snn, [x, x])
    assert result.uncounted == ("2",)
    assert [layer.path for layer in result.layers] == ["0", "3"]
    told = describe_network(snn, source="x", calibration="y", nodes={}, evaluation=result, notices=["first"])
    assert told["notices"] == ["first", "The work of 2 could not be counted, so the energy of the ANN and of the "
                               "spiking network is higher than given."]  # fmt: skip
    assert told["energy"]["uncounted"] == ["2"]


def test_kept_layers_without_products_are_no_news() -> None:
    ann = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm((4,)), nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 3))
    x = torch.rand(6, 4)
    result = evaluate(convert(ann, 3, data=x, surgery=ReluSurgery((nn.GELU,))).snn, [x])
    assert result.uncounted == ()
    assert [layer.path for layer in result.layers] == ["0", "3", "5"]


def test_the_work_of_a_resnet18_is_that_of_an_independent_count() -> None:
    """Multiply-accumulates by the formula for a layer's shape, SynOps by a convolution of the spikes with ones."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    snn = convert(torchvision().models.resnet18(weights=None), 3, data=x).snn
    macs: dict[str, int] = {}
    synops: dict[str, int] = {}

    def look(path: str, layer: nn.Conv2d) -> None:
        def hook(_layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            macs[path] = output[0].numel() * layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
            ones = torch.ones(1, layer.in_channels, *layer.kernel_size)
            reached = F.conv2d((inputs[0] != 0).float(), ones, stride=layer.stride, padding=layer.padding)
            synops[path] = synops.get(path, 0) + int(reached.double().sum()) * layer.out_channels

        layer.register_forward_hook(hook)

    for path, layer in snn.named_modules():
        if isinstance(layer, nn.Conv2d):
            look(path, layer)
    work = {layer.path: layer for layer in evaluate(snn, x).layers}
    assert len(macs) == 20
    for path, count in macs.items():
        assert work[path].ann_macs == count
        assert work[path].macs == (count if path == "conv1" else 0)
        assert work[path].accumulates == (0 if path == "conv1" else synops[path] / len(x)), path
    assert (work["fc"].ann_macs, work["fc"].macs, work["fc"].accumulates) == (512 * 1000, 512 * 1000, 0)
    assert sum(synops.values()) > 0
    assert work.keys() == {*macs, "fc"}
