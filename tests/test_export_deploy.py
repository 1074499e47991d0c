"""The deploy copy: BatchNorm folded where it can be, neurons with constant coefficients; both beside the original."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lmh import IF, LIF, LMH, PerChannel, PerLayer, PerStep, sites, zoo
from lmh.calibrate import Max
from lmh.convert import Conversion, EventFrames, convert, load, save
from lmh.convert.deploy import deployed
from lmh.convert.export import Comparison, Exported, fold_batchnorm
from lmh.convert.export.result import compare
from lmh.errors import ArgumentError
from lmh.frozen import FrozenSite
from lmh.time_axis import carry_state, per_step

SHAPE = (2, 12, 12)


class Block(nn.Module):
    """A residual block; a stride needs a projected shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
            if stride > 1
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class PooledResidual(nn.Module):
    """[N, 2, 12, 12] → [N, 5]: stem, BatchNorm, max-pool, two residual blocks, average pool, linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.block1, self.block2 = Block(8, 8, 1), Block(8, 16, 2)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn(self.stem(x))))
        return self.head(self.average(self.block2(self.block1(x))).flatten(1))


def settled(net: nn.Module, x: Tensor) -> nn.Module:
    """Give BatchNorm scales, shifts and the statistics of ``x``, as a trained network has them."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.2, 0.3)
    with torch.no_grad():
        net.train()(x)
    return net.eval()


def learned(conversion: Conversion) -> Conversion:
    """Move every parameter of the neurons off its preset, as fine-tuning does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for site in sites(conversion.snn).values():
            for name, parameter in site.named_parameters():
                spread = 0.1 if name in ("v_init", "raw_threshold") else 0.3
                parameter += spread * torch.randn(parameter.shape, generator=generator)
    return conversion


def residual_conversion(timesteps: int = 4, neuron: LMH | None = None) -> Conversion:
    torch.manual_seed(0)
    x = torch.randn(128, *SHAPE)
    return convert(settled(PooledResidual(), x), timesteps, data=x, calibration=Max(), neuron=neuron)


def batchnorms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def mean_size(x: Tensor) -> float:
    return float(x.detach().abs().mean())


def test_folded_equals_unfolded_on_a_residual_network() -> None:
    snn = residual_conversion().snn
    folded = fold_batchnorm(snn)
    x = torch.randn(200, *SHAPE)
    expected, got = snn(x), folded(x)
    assert len(batchnorms(snn)) == 6
    assert batchnorms(folded) == []
    assert mean_size(got - expected) < 1e-4 * mean_size(expected)
    assert torch.allclose(folded.double()(x.double()), copy.deepcopy(snn).double()(x.double()), atol=1e-4)
    assert [node.target for node in folded.graph.nodes if node.op == "call_module" and "conv" in str(node.target)] == [
        "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2",
    ]  # fmt: skip
    with torch.no_grad():
        folded.get_submodule("block1.conv1").bias += 0.5  # a wrong twin: another shift
    assert mean_size(folded.float()(x) - expected) > 0.05 * mean_size(expected)


def test_folding_the_zoo_network_keeps_its_answers() -> None:
    conversion = convert(zoo.load("digits-cnn"), 4, example_input=torch.zeros(1, 1, 8, 8))
    x = torch.randn(100, 1, 8, 8)
    folded = fold_batchnorm(conversion)
    assert batchnorms(folded) == []
    assert mean_size(folded(x) - conversion.snn(x)) < 1e-5


def test_folding_changes_nothing_of_the_callers() -> None:
    conversion = residual_conversion()
    conversion.snn.train()
    before = {key: value.clone() for key, value in conversion.snn.state_dict().items()}
    folded = fold_batchnorm(conversion)
    assert conversion.snn.training
    assert not folded.training
    assert len(batchnorms(conversion.snn)) == 6
    assert all(torch.equal(before[key], value) for key, value in conversion.snn.state_dict().items())


def test_a_copy_made_inside_carry_state_starts_anew() -> None:
    snn = residual_conversion().snn
    x = torch.randn(3, *SHAPE)
    expected = snn(x)
    with carry_state(snn):
        per_step(snn, x, steps=2)
        folded = fold_batchnorm(snn)
    assert torch.allclose(folded(x), expected, atol=1e-5)


class Branching(nn.Module):
    """What can and cannot be folded: a second reader, a shared layer, a transposed one, features on the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.read_twice, self.behind_read_twice = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.shared, self.first, self.second = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)
        self.transposed, self.behind_transposed = nn.ConvTranspose2d(4, 6, 2, stride=2), nn.BatchNorm2d(6)
        self.grouped, self.behind_grouped = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), nn.BatchNorm2d(4)
        self.tokens, self.behind_tokens = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.flat, self.behind_flat = nn.Linear(16, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.read_twice(x)
        y = F.relu(self.behind_read_twice(y) + y)
        y = F.relu(self.first(self.shared(y))) + F.relu(self.second(self.shared(y + 1)))
        y = F.relu(self.behind_transposed(self.transposed(y)))
        y = F.relu(self.behind_grouped(self.grouped(y)))
        y = F.relu(self.behind_tokens(self.tokens(F.adaptive_avg_pool2d(y, 2).flatten(2))))
        return self.behind_flat(self.flat(y.flatten(1)))


STAYING = ["behind_read_twice", "behind_grouped", "behind_tokens"]


def branching() -> Conversion:
    x = torch.randn(64, 2, 4, 4)
    return convert(settled(Branching(), x), 4, data=x, calibration=Max(PerLayer()))


def test_what_cannot_be_folded_stays_and_the_rest_is_folded() -> None:
    conversion = branching()
    folded = fold_batchnorm(conversion)
    x = torch.randn(16, 2, 4, 4)
    assert sorted(batchnorms(folded)) == sorted(STAYING)
    assert {"shared", "shared_1"} <= {str(node.target) for node in folded.graph.nodes}
    assert torch.allclose(folded(x), conversion.snn(x), atol=1e-4)


def test_without_a_known_shape_batchnorm_stays_behind_linear_layers() -> None:
    snn = branching().snn
    x = torch.randn(16, 2, 4, 4)
    assert sorted(batchnorms(fold_batchnorm(snn))) == sorted([*STAYING, "behind_flat"])
    assert sorted(batchnorms(fold_batchnorm(snn, input_shape=(2, 4, 4)))) == sorted(STAYING)
    assert torch.allclose(fold_batchnorm(snn)(x), snn(x), atol=1e-4)


def test_a_layer_with_hooks_is_left_alone() -> None:
    conversion = residual_conversion()
    conversion.snn.get_submodule("stem").register_forward_hook(lambda module, args, output: output * 1.5)
    folded = fold_batchnorm(conversion)
    x = torch.randn(8, *SHAPE)
    assert batchnorms(folded) == ["bn"]
    assert torch.allclose(folded(x), conversion.snn(x), atol=1e-4)


@pytest.mark.parametrize("granularity", [PerLayer(), PerChannel(), PerStep()])
@pytest.mark.parametrize("preset", [IF(), LIF(0.7)])
@pytest.mark.parametrize("change", [lambda conversion: conversion, learned], ids=["preset", "learned"])
def test_constant_neurons_equal_learnable_ones_bit_for_bit(
    granularity: PerLayer | PerChannel | PerStep, preset: IF | LIF, change: Callable[[Conversion], Conversion]
) -> None:
    conversion = change(residual_conversion(3, LMH(preset=preset, granularity=granularity)))
    for dtype in (torch.float32, torch.bfloat16):
        snn, x = conversion.snn.to(dtype), torch.randn(9, *SHAPE).to(dtype)
        fixed = copy.deepcopy(snn)
        for path, site in sites(fixed).items():
            fixed.set_submodule(path, FrozenSite(site))
        with torch.no_grad():
            assert torch.equal(fixed(x), snn(x))


def test_a_constant_neuron_with_another_lambda_answers_differently() -> None:
    conversion = learned(residual_conversion(4))
    x = torch.randn(9, *SHAPE)
    good = deployed(conversion)(x)
    with torch.no_grad():
        for site in sites(conversion.snn).values():
            site.raw_lambda_s.zero_()
    assert mean_size(deployed(conversion)(x) - good) > 1e-3


def test_event_frames_keep_their_time_axis() -> None:
    frames = torch.randn(4, 16, *SHAPE)
    ann = settled(PooledResidual(), frames.flatten(0, 1))
    conversion = convert(ann, 4, data=[frames], calibration=Max(), encoding=EventFrames())
    assert torch.allclose(deployed(conversion)(frames), conversion.snn(frames), atol=1e-5)


def test_a_loaded_network_knows_its_shape(tmp_path: Path) -> None:
    conversion = branching()
    loaded = load(save(conversion, tmp_path / "net.safetensors"), source=settled(Branching(), torch.randn(8, 2, 4, 4)))
    assert sorted(batchnorms(fold_batchnorm(loaded))) == sorted(STAYING)


@pytest.mark.parametrize("given", [nn.Linear(2, 2), fx.symbolic_trace(nn.Linear(2, 2)), "net.safetensors"])
def test_what_is_no_spiking_network_is_refused(given: nn.Module | str) -> None:
    with pytest.raises(ArgumentError, match="without spiking sites; expected what"):
        fold_batchnorm(given)  # type: ignore[arg-type]


def test_a_network_without_values_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"meta device .* Load its weights first"):
        fold_batchnorm(residual_conversion().snn.to("meta"))


def test_a_result_shows_what_was_lost_once_for_all_sites() -> None:
    lost = {f"site{i}": ("soft reset",) for i in range(5)} | {"site0": ("soft reset", "start")}
    result = Exported(Path("a.nir"), "nir", 3_000_000, "Read back.", lost, ("Feed it T times.",))
    assert result.lines() == [
        "a.nir: nir, 3.0 MB. Read back.",
        "lost in site0, site1, site2 and 2 more: soft reset",
        "lost in site0: start",
        "Feed it T times.",
    ]
    assert result.to_json()["lost"]["site0"] == ["soft reset", "start"]
    assert result.to_json()["bytes"] == 3_000_000


def test_a_comparison_tells_rounding_from_a_wrong_file() -> None:
    network = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    close, wrong = compare([network + 1e-5], [network]), compare([network.flip(1)], [network])
    assert close == Comparison(2, 2, 1.0, pytest.approx(1e-5, rel=1e-1), 1.75)
    assert close.agrees
    assert not wrong.agrees
    assert wrong.same_class == 0.0
    assert wrong.alike == 0


def test_a_flip_on_some_inputs_is_no_wrong_file_but_a_shift_on_all_is() -> None:
    network = torch.randn(8, 5)
    flipped, moved = network.clone(), network + 0.2
    flipped[0] += 3.0
    assert compare([flipped[:1], flipped[1:]], [network[:1], network[1:]]).agrees
    assert compare([network * 1.01], [network]).agrees
    assert not compare([moved], [network]).agrees
