"""BatchNorm in time: TEBN and tdBN as conversion options, alone and in slices."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nets
from lmh import carry_state, per_step, zoo
from lmh.calibrate import Max
from lmh.convert import TEBN, Conversion, EventFrames, PlainBatchNorm, TdBN, convert, load, save
from lmh.convert.export import export_nir, export_onnx, export_pt2
from lmh.convert.normalisation import Normalisation
from lmh.errors import ArgumentError, ArtifactError, StateError
from lmh.finetune import Schedule, TimeSliced, finetune
from lmh.finetune.optimiser import optimiser
from lmh.finetune.steps import Stepper, Work
from lmh.normalisation import StepScale, ThresholdScale
from lmh.torchvision_shim import torchvision
from lmh.zoo import DataSet


def trained(norm: Normalisation) -> tuple[Conversion, Tensor]:
    ann, card = zoo.load("digits-cnn"), zoo.card("digits-cnn")
    x = next(iter(zoo.Batches(zoo.load_data("digits").train, card.preprocessing, 32)))[0]
    return convert(ann, 4, data=x, calibration=Max(), normalisation=norm), x


class Residual(nn.Module):
    """Untrained: a constant BatchNorm, one alone in front of neurons, one in front of a sum, one at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.a, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.c, self.bn3 = nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn0(self.stem(x)))
        y = torch.relu(self.bn1(self.a(x)))
        y = torch.relu(self.bn2(self.b(y)) + x)
        return self.bn3(self.c(y)).mean((2, 3))


NORMS = [TEBN(), TdBN(), TdBN(0.5)]


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_a_trained_network_is_the_same_function_at_the_start(norm: Normalisation, training: bool) -> None:
    (plain, x), (ours, _) = trained(PlainBatchNorm()), trained(norm)
    expected, got = (per_step(c.snn.double().train(training), x.double()) for c in (plain, ours))
    assert torch.allclose(got, expected, atol=1e-9)
    assert "BatchNorm layers became" in " ".join(ours.report.notices)


def test_tebn_is_batch_norm_over_all_steps_times_p() -> None:
    conversion, x = trained(TEBN())
    snn = conversion.snn.double().train()
    scales = {path: module for path, module in snn.named_modules() if isinstance(module, StepScale)}
    assert scales
    assert all(module.weight.shape == (4,) for module in scales.values())
    path, scale = next(iter(scales.items()))
    with torch.no_grad():
        scale.weight.copy_(torch.tensor([0.5, 1.0, 2.0, -1.0]))
    seen: list[Tensor] = []
    scale.register_forward_hook(lambda _module, given, out: seen.extend((given[0], out)))
    snn(x.double())
    before, after = (tensor.unflatten(0, (4, -1)) for tensor in seen)
    [node] = [node for node in snn.graph.nodes if node.target == path]
    norm = snn.get_submodule(str(node.all_input_nodes[0].target))
    whole = (before - norm.bias.reshape(-1, 1, 1)) / norm.weight.reshape(-1, 1, 1)  # type: ignore[operator, union-attr]
    assert whole.mean((0, 1, 3, 4)).abs().max() < 1e-9
    assert not torch.allclose(whole[0].mean((0, 2, 3)), torch.zeros(1, dtype=torch.float64), atol=1e-3)
    for t, p in enumerate([0.5, 1.0, 2.0, -1.0]):
        assert torch.equal(after[t], p * before[t])


def test_tdbn_starts_an_untrained_network_with_currents_of_the_threshold() -> None:
    torch.manual_seed(0)
    ann, x = Residual(), torch.rand(64, 2, 8, 8)
    ann.train()(x)  # running statistics alone
    conversion = convert(ann, 4, data=x, normalisation=TdBN())
    scales = {path: m for path, m in conversion.snn.named_modules() if isinstance(m, ThresholdScale)}
    assert sorted(scales) == ["time.bn1", "time.bn2"]
    theta = conversion.calibration.v_threshold
    assert torch.allclose(scales["time.bn1"].scale, theta["relu_1"])
    assert torch.allclose(scales["time.bn2"].scale, theta["relu_2"] / 2**0.5)
    seen: dict[str, Tensor] = {}
    for path, module in scales.items():
        module.register_forward_hook(lambda _m, _x, out, path=path: seen.update({path: out}))
    conversion.snn.train()(x)
    deviation = seen["time.bn1"].transpose(0, 1).flatten(1).std(1)
    assert torch.allclose(deviation, theta["relu_1"], rtol=0.05)
    [notice] = [n for n in conversion.report.notices if "tdBN" in n]
    assert notice.startswith("2 BatchNorm layers became tdBN; bn0, bn3 stayed as they are")


def test_tdbn_divides_the_gains_of_a_trained_layer() -> None:
    (plain, _), (ours, _) = trained(PlainBatchNorm()), trained(TdBN(2.0))
    found = [(p, m) for p, m in ours.snn.named_modules() if isinstance(m, ThresholdScale)]
    assert found
    for path, module in found:
        [node] = [node for node in ours.snn.graph.nodes if node.target == path]
        norm = str(node.all_input_nodes[0].target)
        before, after = (network.snn.get_submodule(norm).weight for network in (plain, ours))
        assert torch.allclose(after * module.scale, before)  # type: ignore[operator, arg-type]


@pytest.mark.parametrize("norm", [PlainBatchNorm(), *NORMS], ids=str)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_slices_go_on_without_starting_anew(norm: Normalisation, k: int) -> None:
    conversion, x = trained(norm)
    snn = conversion.snn
    for index, module in enumerate(m for m in snn.modules() if isinstance(m, StepScale)):
        with torch.no_grad():
            module.weight.copy_(torch.linspace(0.8, 1.2 + index / 10, 4))
    whole = per_step(snn, x)
    with carry_state(snn):
        parts = torch.cat([per_step(snn, x, steps=k) for _ in range(4 // k)])
    assert torch.equal(parts, whole)
    assert torch.equal(per_step(snn, x), whole)


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_time_sliced_training_learns_p_and_theta(norm: Normalisation, digits: DataSet) -> None:
    conversion, _ = trained(norm)
    snn = conversion.snn
    before = {name: value.detach().clone() for name, value in snn.named_parameters()}
    card = zoo.card("digits-cnn")
    train = zoo.Batches(digits.train, card.preprocessing, 32, torch.arange(96), shuffle_seed=0)
    tuned = finetune(snn, train, epochs=1, strategy=TimeSliced(2))
    assert tuned[0].loss < 1
    changed = {name for name, value in snn.named_parameters() if not torch.equal(value, before[name])}
    wanted = [name for name in before if name.startswith("time.") or "raw_threshold" in name]
    assert set(wanted) <= changed


def test_the_gradient_of_all_steps_is_that_of_one_slice() -> None:
    conversion, x = trained(TEBN())
    found = []
    for strategy in (TimeSliced(4), TimeSliced(1)):
        snn = copy.deepcopy(conversion.snn).double().train()
        schedule = Schedule(epochs=1, clip_norm=None)
        Stepper(snn, optimiser(snn, schedule), schedule, strategy)(Work((x.double(),), torch.arange(32) % 10, None))
        found.append({name: p.grad for name, p in snn.named_parameters() if name.startswith("time.")})
    assert all((gradient != 0).all() for gradient in found[0].values() if gradient is not None)
    last = next(iter(found[1].values()))
    assert last is not None
    assert last[3] != 0
    assert not last[:3].any()  # the last update was of the last step


def test_it_ends_where_p_ends() -> None:
    conversion, x = trained(TEBN())
    with carry_state(conversion.snn):
        per_step(conversion.snn, x)
        with pytest.raises(StateError, match=r"steps 5 to 6 were asked for; TEBN's scales end at 4\. Run at most 4"):
            per_step(conversion.snn, x, steps=2)


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_it_survives_a_file(norm: Normalisation, tmp_path: Path) -> None:
    conversion, x = trained(norm)
    with torch.no_grad():
        for module in conversion.snn.modules():
            if isinstance(module, StepScale):
                module.weight.mul_(torch.linspace(0.9, 1.1, 4))
    file = save(conversion, tmp_path / "net.safetensors")
    assert torch.equal(load(file, source=zoo.load("digits-cnn"))(x), conversion.snn(x))


@pytest.mark.filterwarnings("ignore")
def test_exports_unroll_it_and_nir_refuses_it_by_name(tmp_path: Path) -> None:
    conversion, _ = trained(TEBN())
    with torch.no_grad():
        for module in conversion.snn.modules():
            if isinstance(module, StepScale):
                module.weight.mul_(torch.linspace(0.9, 1.1, 4))
    for export, name in ((export_pt2, "net.pt2"), (export_onnx, "net.onnx")):
        assert export(conversion, tmp_path / name).check
    with pytest.raises(ArtifactError, match="StepScale"):
        export_nir(conversion, tmp_path / "net.nir")


def test_torchvisions_residual_network_and_event_frames() -> None:
    ann = torchvision().models.resnet18(num_classes=5)
    snn = convert(ann, 2, example_input=torch.rand(2, 3, 32, 32), normalisation=TEBN()).snn
    assert sum(isinstance(module, StepScale) for module in snn.modules()) == 19  # all but the constant stem's
    frames = torch.rand(2, 8, 2, 8, 8)
    events = convert(nets.conv_net(), 2, data=frames, encoding=EventFrames(), normalisation=TEBN()).snn
    assert sum(isinstance(module, StepScale) for module in events.modules()) == 2
    assert events(frames).shape == (8, 3)


def test_a_layer_that_is_called_twice_stays_plain() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            return torch.relu(self.norm(self.b(torch.relu(self.norm(self.b(x))))))

    conversion = convert(Twice().eval(), 2, data=torch.rand(8, 4), normalisation=TEBN())
    assert not any(isinstance(module, StepScale) for module in conversion.snn.modules())
    assert any(n.startswith("0 BatchNorm layers became TEBN; norm stayed") for n in conversion.report.notices)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"normalisation is the class TEBN.*Pass TEBN\(\) or TdBN\(\)"):
        convert(nets.two_layers(), 2, data=torch.rand(8, 4), normalisation=TEBN)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"alpha is 0; expected a finite number above 0"):
        TdBN(0)
