"""deploy: the copy for inference, against the network that it was made of."""

from __future__ import annotations

import copy
import importlib
import operator
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmh import LMH, PerStep, carry_state, evaluate, per_step, prefixes, sites, zoo
from lmh.calibrate import Max
from lmh.convert import Conversion, EventFrames, convert, deploy, load, save
from lmh.convert.export import export_onnx, fold_batchnorm
from lmh.errors import ArgumentError, ArtifactError
from lmh.finetune import Float32
from lmh.finetune.precision import stored_for
from test_export_deploy import SHAPE, batchnorms, learned, mean_size, residual_conversion


class Chain(nn.Module):
    """One reader of each kind behind a site of its own; ``twice`` is called twice. [N, 2, 8, 8] → [N, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.pool = nn.AvgPool2d(2)
        self.pooled = nn.Conv2d(8, 6, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.raised = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.twice = nn.Conv2d(4, 4, 1)
        self.flattened = nn.Linear(4 * 16, 10)
        self.head = nn.Linear(10, 3)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.normal_(module.weight, 0.05, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.grouped(x))
        x = F.relu(self.pooled(self.pool(x)))
        x = F.relu(self.raised(self.dropout(x)))
        x = F.relu(self.twice(x))
        x = F.relu(self.twice(x))
        x = F.relu(self.flattened(F.max_pool2d(x, 2).flatten(1)))
        return self.head(x)


def chain_conversion(timesteps: int = 4, **options: object) -> Conversion:
    torch.manual_seed(0)
    return convert(Chain().double(), timesteps, data=torch.randn(64, 2, 8, 8).double(), **options)  # type: ignore[arg-type]


def binary(model: nn.Module) -> list[bool]:
    return [site.binary for site in sites(model).values()]


@pytest.mark.parametrize("change", [lambda conversion: conversion, learned], ids=["preset", "learned"])
def test_thresholds_go_into_the_layers_behind(change: Callable[[Conversion], Conversion]) -> None:
    conversion = change(chain_conversion())
    fast = deploy(conversion)
    x = torch.randn(50, 2, 8, 8).double()
    assert len(next(iter(sites(conversion.snn).values())).v_threshold) == 8  # one for each channel
    assert binary(fast) == [True, True, True, False, False, True, True]
    assert torch.allclose(fast(x), conversion.snn(x), atol=1e-9)
    assert torch.allclose(per_step(fast, x), per_step(conversion.snn, x), atol=1e-9)
    values = set(torch.unique(sites(fast)["relu"](torch.randn(50, 8, 8, 8).double())).tolist())
    assert values == {0.0, 1.0}


def test_a_wrong_threshold_shows(monkeypatch: pytest.MonkeyPatch) -> None:

    module = importlib.import_module("lmh.convert.freeze")
    conversion = chain_conversion()
    x = torch.randn(50, 2, 8, 8).double()
    scale = module._scale
    monkeypatch.setattr(module, "_scale", lambda model, layer, theta, flat: scale(model, layer, theta.flip(0), flat))
    assert not torch.allclose(deploy(conversion)(x), conversion.snn(x), atol=1e-2)


def test_thresholds_stay_where_others_read_them_or_they_change_in_time() -> None:
    assert binary(deploy(residual_conversion())) == [False, True, True, True, True]
    assert not any(binary(deploy(chain_conversion(neuron=LMH(granularity=PerStep())))))


def test_a_residual_network_gives_the_same_up_to_rounding() -> None:
    conversion = learned(residual_conversion())
    fast = deploy(conversion)
    assert batchnorms(fast) == []
    x = torch.randn(200, *SHAPE)
    expected = conversion.snn(x)
    assert float(((fast(x) - expected).abs().amax(1) > 1e-4).float().mean()) < 0.02
    assert mean_size(fast(x) - expected) < 1e-3 * mean_size(expected)


def test_sums_in_front_of_neurons_are_theirs() -> None:
    conversion = residual_conversion()
    before, after = ([node.target for node in snn.graph.nodes] for snn in (conversion.snn, deploy(conversion)))
    assert before.count(operator.add) > 0
    assert operator.add not in after
    assert len(sites(deploy(conversion))) == len(sites(conversion.snn))


@pytest.mark.parametrize("add", [lambda x, size: x + size, lambda x, size: size + x], ids=["behind", "in front"])
def test_a_number_is_added_as_well(add: Callable[[Tensor, float], Tensor]) -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.relu, self.second, self.last = nn.Linear(6, 6), nn.ReLU(), nn.ReLU(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.second(add(self.relu(self.first(x)), x.size(1) * 0.1)))

    torch.manual_seed(0)
    x = torch.rand(16, 6)
    conversion = convert(Sized().eval(), 4, data=x)
    assert torch.allclose(deploy(conversion)(x), conversion.snn(x), atol=1e-5)


def test_the_zoo_network_keeps_accuracy_rates_and_work() -> None:
    snn, card = load("zoo:digits-cnn-t4"), zoo.card("digits-cnn")
    test = zoo.Batches(zoo.load_data("digits").test, card.preprocessing)
    expected, got = evaluate(snn, test), evaluate(deploy(snn), test)
    assert got.snn_accuracy == expected.snn_accuracy
    assert list(got.firing_rate.values()) == pytest.approx(list(expected.firing_rate.values()), rel=1e-3)
    assert [work.accumulates for work in got.layers] == pytest.approx(
        [work.accumulates for work in expected.layers], rel=1e-3
    )


def test_time_works_as_before() -> None:
    conversion = chain_conversion()
    fast, x = deploy(conversion), torch.randn(20, 2, 8, 8).double()
    assert torch.allclose(prefixes(fast, x), prefixes(conversion.snn, x), atol=1e-9)
    with carry_state(fast):
        steps = torch.cat([per_step(fast, x, steps=1), per_step(fast, x, steps=3)])
    assert torch.allclose(steps, per_step(conversion.snn, x), atol=1e-9)
    frames = torch.randn(4, 16, 2, 8, 8).double()
    events = convert(Chain().double(), 4, data=[frames], calibration=Max(), encoding=EventFrames())
    assert torch.allclose(deploy(events)(frames), events.snn(frames), atol=1e-9)


def test_an_example_chooses_the_order_in_memory_and_changes_no_value() -> None:
    conversion = chain_conversion()
    x = torch.randn(20, 2, 8, 8).double()
    fast = deploy(conversion, example=x)
    assert torch.allclose(fast(x), conversion.snn(x), atol=1e-9)
    weight = fast.get_submodule("stem").weight
    assert weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)


def test_an_example_says_the_shape_of_the_input() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
    )
    x = torch.rand(32, 4)
    snn = convert(net.eval(), 4, data=x).snn
    assert len(batchnorms(deploy(snn))) == 2
    for fast in (deploy(snn, example=x), deploy(snn, input_shape=(4,))):
        assert not batchnorms(fast)
        assert binary(fast) == [True, True]
        assert torch.allclose(fast(x), snn(x), atol=1e-5)


def test_volumes_may_be_channels_last() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 2, 3), nn.Flatten(), nn.Linear(16, 3)
    )
    x = torch.rand(8, 1, 6, 6, 6)
    snn = convert(net.eval(), 4, data=x).snn
    assert torch.allclose(deploy(snn, example=x)(x), snn(x), atol=1e-5)
    with stored_for(snn, Float32(channels_last=True)):
        assert snn.get_submodule("3").weight.is_contiguous(memory_format=torch.channels_last_3d)
        assert torch.allclose(snn(x), deploy(snn)(x), atol=1e-5)
    assert snn.get_submodule("3").weight.is_contiguous()


def test_the_original_stays() -> None:
    conversion = chain_conversion()
    before = copy.deepcopy(conversion.snn.state_dict())
    deploy(conversion, example=torch.randn(2, 2, 8, 8).double())
    assert all(torch.equal(before[key], value) for key, value in conversion.snn.state_dict().items())


def test_a_deployed_network_is_not_deployed_exported_or_saved(tmp_path: Path) -> None:
    fast = deploy(load("zoo:digits-cnn-t4"))
    for call in (deploy, fold_batchnorm, lambda network: export_onnx(network, tmp_path / "net.onnx")):
        with pytest.raises(ArgumentError, match=r"is deployed: .* Pass that one"):
            call(fast)
    with pytest.raises(ArtifactError, match=r"does not say how its graph was made"):
        save(fast, tmp_path / "net.safetensors")
