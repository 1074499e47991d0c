"""What reviews found: each once broken, now held."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import rich.table
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import remove_weight_norm, weight_norm
from torch.utils.data import DataLoader, TensorDataset

import nets
from lmh import evaluate, footprint, sites, streamed, use_arena, zoo
from lmh.arguments import check_labels
from lmh.artifact import check_writable, write_atomically
from lmh.calibrate import BatchNormStatistics, Max, Percentile, calibrate
from lmh.calibrate.statistics import predicted_histograms
from lmh.convert import BeforeNeuron, Gated, ReluSurgery, convert, keep, load, prepare, save
from lmh.energy import binary_nodes
from lmh.errors import ArgumentError, ArtifactError, AuditError
from lmh.finetune import finetune
from lmh.ops import module_of
from lmh.qcfs import QCFS, quantize
from lmh.spiking import IF, LMH, PerChannel
from lmh.surrogates import Arctan, Dspike, Rectangle, Sigmoid, Triangle
from lmh.terminal import Terminal


def test_calls_of_a_reused_activation_are_calibrated_apart() -> None:
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(100 * self.b(self.relu(self.a(x))))

    theta = convert(Reused(), 4, data=torch.rand(64, 4), calibration=Max()).calibration.v_threshold
    assert float(theta["relu_1"].max()) > 5 * float(theta["relu"].max())


class Scaled(nn.Module):
    """BatchNorm, then arithmetic with plain numbers, then a ReLU."""

    def __init__(self, operation: object) -> None:
        super().__init__()
        self.conv, self.norm, self.operation = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), operation

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.operation(self.norm(self.conv(x))))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("operation", "factor"),
    [(lambda y: y * 0.1, 0.1), (lambda y: y / 10, 0.1), (lambda y: 3 * y, 3.0), (lambda y: y - y, 2**0.5)],
)
def test_batchnorm_statistics_follow_arithmetic(operation: object, factor: float) -> None:
    plain = calibrate(prepare(Scaled(lambda y: y + 0.0), (1, 4, 4)), BatchNormStatistics(), 4)
    scaled = calibrate(prepare(Scaled(operation), (1, 4, 4)), BatchNormStatistics(), 4)
    assert torch.allclose(scaled.v_threshold["relu"], factor * plain.v_threshold["relu"], rtol=1e-3)


def test_batchnorm_statistics_pad_new_channels_with_zeros() -> None:
    net = zoo.card("cifar10-resnet20-a").build().eval()
    with torch.no_grad():
        net.layer1[2].bn2.bias.copy_(torch.arange(16.0))
        net.layer2[0].bn2.weight.fill_(1e-3)
    histograms, unknown = predicted_histograms(prepare(net, (3, 32, 32)))
    tops = histograms["layer2.0.relu2"].maximum
    assert unknown == []
    assert float(tops[:8].max()) < 0.1
    assert float(tops[24:].max()) < 0.1
    assert float(tops[22]) > 10


def test_a_batch_size_used_as_a_value_is_refused() -> None:
    class Value(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x) * x.size(0)

    with pytest.raises(AuditError, match="batch size, as a value"):
        convert(Value(), 4, data=torch.rand(8, 4))


def test_a_mean_over_the_batch_is_refused() -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(x)
            return y - y.mean(0, keepdim=True)

    with pytest.raises(AuditError, match="batch on axis 0"):
        prepare(Mixed(), (4,))


def test_a_concat_read_by_a_pool_and_a_layer_gets_sites_for_both() -> None:
    class Inception(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)
            return (F.max_pool2d(y, 2).flatten(1).sum(1) + self.c(y).flatten(1).sum(1))[:, None]

    ann = Inception().eval()
    x = torch.rand(8, 1, 4, 4)
    snn = convert(ann, 128, data=x, calibration=Max()).snn
    assert len(sites(snn)) == 4
    assert torch.allclose(snn(x), ann(x), rtol=0.05, atol=0.1)


def test_max_pools_on_varying_currents_are_named() -> None:
    ann = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    notices = convert(ann, 4, data=torch.rand(8, 1, 4, 4), maxpool=BeforeNeuron()).report.notices
    assert any("1 max-pools take the maximum of currents that vary in time" in notice for notice in notices)
    quiet = convert(nets.conv_net(), 4, data=torch.rand(8, 2, 8, 8)).report.notices
    assert quiet == ()


def test_qcfs_says_where_thresholds_came_from_and_that_levels_differ() -> None:
    ann = nn.Sequential(nn.Linear(4, 3), QCFS(8, 2.0), nn.Linear(3, 2))
    report = convert(ann, 4, example_input=torch.zeros(1, 4)).report
    assert report.calibration.startswith("taken over from QCFS")
    assert report.notices == ("QCFS was trained with L = 8 and T is 4; they agree best where T = L.",)


def test_a_network_survives_torch_save() -> None:
    x = torch.rand(8, 2, 8, 8)
    snn = convert(nets.conv_net(), 4, data=x).snn
    buffer = io.BytesIO()
    torch.save(snn, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(x), snn(x))


def test_a_plain_data_loader_trains(tmp_path: Path) -> None:
    data = TensorDataset(torch.rand(32, 4), torch.randint(3, (32,)))
    snn = convert(nets.two_layers(), 4, data=data.tensors[0]).snn
    loader = DataLoader(data, batch_size=8)
    history = finetune(snn, loader, loader, epochs=2, checkpoint=str(tmp_path / "run"))
    assert len(history) == 2
    assert (tmp_path / "run").exists()


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    net[2].weight = net[0].weight
    x = torch.rand(8, 4)
    conversion = convert(net, 4, data=x)
    save(conversion, tmp_path / "tied.safetensors")
    assert torch.equal(load(tmp_path / "tied.safetensors", source=net)(x), conversion.snn(x))


def test_a_kept_module_with_two_inputs_keeps_both() -> None:
    class Product(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a * b

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.product = nn.Linear(4, 4), Product()

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.a(x))
            return self.product(y, y + 1)

    snn = convert(Two(), 4, data=torch.rand(8, 4), rules={Product: keep}).snn
    assert snn(torch.rand(3, 4)).shape == (3, 4)


def test_a_source_with_another_stride_is_refused(tmp_path: Path) -> None:
    def net(padding: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 3, stride, padding), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)).eval()

    ann, other = net(1, 2), net(0, 1)
    x = torch.rand(4, 1, 4, 4)
    ann(x), other(x)
    save(convert(ann, 4, data=x), tmp_path / "a.safetensors")
    with pytest.raises(ArtifactError, match="another graph"):
        load(tmp_path / "a.safetensors", source=other)


def test_a_percentile_among_the_zeros_is_a_silent_channel() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(4)[:3])
        net[0].bias.copy_(torch.tensor([0.0, 0.0, -0.95]))
    theta = calibrate(prepare(net, (4,)), Percentile(90.0), 4, torch.rand(2000, 4)).v_threshold["1"]
    assert float(theta[2]) > 0.5


def test_dropout_in_place_behind_a_neuron_trains() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Dropout(0.2, inplace=True), nn.Linear(8, 3))
    x, y = torch.rand(16, 4), torch.randint(3, (16,))
    snn = convert(net, 2, data=x, surgery=ReluSurgery()).snn
    before = [parameter.clone() for parameter in snn.parameters()]
    finetune(snn, [(x, y)], epochs=1)
    assert any(not torch.equal(old, new) for old, new in zip(before, snn.parameters(), strict=True))
    assert net[2].inplace


def test_a_hardtanh_with_a_negative_half_is_a_stand_in() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Hardtanh(), nn.Linear(8, 3))
    with pytest.raises(AuditError, match=r"--surgery relu.*--keep PATH"):
        prepare(net, (4,))
    notices = convert(net, 2, data=torch.rand(16, 4), surgery=ReluSurgery()).report.notices
    assert any("ReLUs stand in for 1 activation" in notice for notice in notices)
    plain = convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU6(), nn.Linear(8, 3)), 2, data=torch.rand(16, 4))
    assert not any("stand in" in notice for notice in plain.report.notices)


def test_a_kept_layer_is_no_activation() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.rand(16, 4)
    assert convert(net, 2, data=x, keep=["0"]).report.spiking_coverage == 1
    assert convert(net, 2, data=x, keep=["1"]).report.spiking_coverage == 0.5


def test_batches_of_several_image_sizes_are_counted_each_by_its_own() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    small, large = torch.rand(4, 1, 8, 8), torch.rand(12, 1, 12, 12)
    snn = convert(net, 2, data=small).snn
    both, *each = (evaluate(snn, batches, ann=net).layers for batches in ([small, large], [small], [large]))
    for layer, first, second in zip(both, *each, strict=True):
        for name in ("ann_macs", "accumulates", "macs"):
            assert getattr(layer, name) == pytest.approx((getattr(first, name) + 3 * getattr(second, name)) / 4)


def test_a_network_of_a_labelled_and_an_unlabelled_batch_has_the_accuracy_of_the_first() -> None:
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.rand(32, 4)
    result = evaluate(convert(net, 2, data=x).snn, [(x, net(x).argmax(1)), x], ann=net)
    assert result.ann_accuracy == 1.0


def test_weights_that_a_hook_computes_are_refused() -> None:
    net = nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.ReLU())
    with pytest.raises(
        ArgumentError, match=r"0: its weight is computed by a hook .* Call torch.nn.utils.remove_weight"
    ):
        convert(net, 2, data=torch.rand(4, 4))
    remove_weight_norm(net[0])
    assert len(sites(convert(net, 2, data=torch.rand(4, 4)).snn)) == 1


def test_spikes_that_a_gate_lets_pass_behind_a_dropout_are_accumulated() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU())
    for layers in (net, nn.Sequential(*(layer for layer in net if not isinstance(layer, nn.Dropout)))):
        snn = convert(layers, 2, data=torch.rand(4, 1, 12, 12), maxpool=Gated()).snn
        last = [node for node in snn.graph.nodes if isinstance(module_of(node), nn.Conv2d)][-1]
        assert last.all_input_nodes[0] in binary_nodes(snn)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": IF}, r"LMH: preset is the class IF"),
        ({"granularity": PerChannel}, r"LMH: granularity is the class PerChannel"),
        ({"surrogate": Triangle}, r"LMH: surrogate is the class Triangle; expected a value.* Pass Triangle\(\)"),
    ],
)
def test_a_class_in_the_place_of_its_value_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        LMH(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Triangle, Rectangle, Sigmoid, Arctan, Dspike])
def test_surrogates_refuse_a_width_of_none(kind: type) -> None:
    for value in (0.0, float("nan"), "1"):
        with pytest.raises(ArgumentError, match=rf"{kind.__name__}: \w+ is .*expected a finite number above 0"):
            kind(value)


def test_brackets_in_names_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    terminal.notice("Written: model[v2]-snn-T4.safetensors, a[/b]/m")
    table = rich.table.Table("[x]", title="[title]")
    table.add_row("[cell]")
    terminal.out.print(table)
    printed = capsys.readouterr()
    assert "model[v2]-snn-T4.safetensors, a[/b]/m" in printed.err
    assert all(word in printed.out for word in ("[x]", "[title]", "[cell]"))


def test_answers_in_chunks_may_be_learned_from() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x, weight = torch.rand(8, 4), torch.ones(3, requires_grad=True)
    (streamed(convert(net, 2, data=x).snn, x) * weight).sum().backward()
    assert weight.grad is not None


def test_links_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    write_atomically(Path("/dev/null"), b"gone")
    assert not Path("/dev/null").is_file()
    with pytest.raises(ArtifactError, match=r"cannot be written \(is a folder\)"):
        check_writable(tmp_path, "Choose another.")


def test_a_traced_quantiser_quantises_16_bits_as_ever() -> None:
    x = torch.linspace(-0.5, 2.0, 2001).bfloat16()
    theta = torch.tensor(1.3)
    traced = torch.jit.trace(lambda values: quantize(values, theta, 8), x)(x)
    assert traced.dtype == torch.bfloat16
    assert torch.allclose(traced, quantize(x, theta, 8), rtol=2**-7)


def test_a_job_of_a_cluster_is_bound_by_its_own_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job" / "step").mkdir(parents=True)
    for name, text in {"memory.max": "900", "memory.current": "700", "memory.stat": ""}.items():
        (tmp_path / "job" / name).write_text(text)
    (tmp_path / "own").write_text("1:name=systemd:/x\n0::/job/step\n")
    monkeypatch.setattr(footprint, "GROUPS", tmp_path)
    monkeypatch.setattr(footprint, "OWN_GROUPS", tmp_path / "own")
    assert footprint._free_of_groups() == [200.0]


def test_a_module_that_reads_values_is_told_so() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].register_forward_hook(lambda _module, _inputs, output: output / float(output.max()))
    with pytest.raises(ArgumentError, match=r"2: its shape cannot be found without its values.*Compute outside"):
        convert(net, 2, data=torch.rand(4, 4))


def test_labels_of_another_type_are_told_to_be_whole() -> None:
    with pytest.raises(ArgumentError, match=r"Pass y.long\(\)"):
        check_labels("x", torch.zeros(4), 4)


def test_a_compiler_that_cannot_be_read_leaves_all_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", 'g++ "')
    monkeypatch.setenv("LMH_HOME", str(tmp_path))
    assert not use_arena.__wrapped__()
