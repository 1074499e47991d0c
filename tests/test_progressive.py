"""Progressive STBP: a LIF start, λ and μ freed one after the other, from scratch or from a trained network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import nets
from lmh import IF, LIF, LMH, PerChannel, PerLayer, PerStep, sites, zoo
from lmh.convert import convert
from lmh.errors import ArgumentError
from lmh.finetune import WIDER, Finetuned, Progressive, Schedule, finetune
from lmh.finetune.fresh import with_statistics
from lmh.spiking import COEFFICIENTS
from lmh.zoo import Batches, DataSet


def batches(count: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.rand(16, 4), torch.randint(3, (16,))) for _ in range(count)]


def tuned(strategy: Progressive, epochs: int = 4) -> Finetuned:
    ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    return finetune(ann, batches(), timesteps=4, strategy=strategy, epochs=epochs)


def moved(run: Finetuned, name: str) -> list[bool]:
    """Whether the parameter was away from its start after each epoch, at any site."""
    start = getattr(Progressive().neuron.preset, name)
    return [any(values[name] != (start,) for values in result.neurons.values()) for result in run]


def test_lambda_is_freed_first_and_then_mu() -> None:
    run = tuned(Progressive(lambda_from=0.25, mu_from=0.75))
    for name in ("lambda_s", "lambda_d"):
        assert moved(run, name) == [False, True, True, True]
    for name in ("mu_s", "mu_d"):
        assert moved(run, name) == [False, False, False, True]
    assert all(values["v_threshold"] for result in run for values in result.neurons.values())
    assert run[0].neurons["1"]["v_threshold"] != run[1].neurons["1"]["v_threshold"]


@pytest.mark.parametrize(("start", "expected"), [(0.0, [True] * 4), (1.0, [False] * 4)])
def test_from_the_start_and_never(start: float, expected: list[bool]) -> None:
    run = tuned(Progressive(lambda_from=start, mu_from=start))
    assert moved(run, "lambda_d") == moved(run, "mu_d") == expected


def test_what_is_frozen_has_no_part_in_the_norm_of_the_gradient() -> None:
    """The weights move as if λ and μ were constants."""
    snn = convert(nets.two_layers(), 2, data=torch.rand(8, 4), neuron=LMH(LIF())).snn
    frozen, constant = copy.deepcopy(snn), copy.deepcopy(snn)
    for site in sites(constant).values():
        for name in COEFFICIENTS:
            getattr(site, f"raw_{name}").requires_grad_(False)
    data = batches()
    schedule = Schedule(epochs=1, clip_norm=0.01)
    finetune(frozen, data, strategy=Progressive(lambda_from=1, mu_from=1), schedule=schedule)
    finetune(constant, data, schedule=schedule)
    for a, b in zip(frozen.parameters(), constant.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("strategy", "neuron"),
    [
        (Progressive(), LMH(LIF(0.5))),
        (Progressive(LMH(LIF(0.25), PerChannel())), LMH(LIF(0.25), PerChannel())),
        (Progressive.wider(0.75), LMH(LIF(0.75), ranges=WIDER)),
        (Progressive.per_step(0.25), LMH(LIF(0.25), PerStep())),
    ],
    ids=["layer", "channel", "wider", "step"],
)
def test_an_ann_gets_the_neurons_of_the_strategy(strategy: Progressive, neuron: LMH) -> None:
    run = tuned(strategy, epochs=1)
    assert run.conversion is not None
    assert run.conversion.recipe.neuron == neuron
    assert {site.neuron.preset for site in sites(run.snn).values()} == {neuron.preset}
    shape = {PerLayer: (), PerChannel: (8,), PerStep: (4,)}[type(neuron.granularity)]
    assert {site.raw_lambda_s.shape for site in sites(run.snn).values()} == {shape}
    assert len(run[0].neurons["1"]["lambda_s"]) == (4 if isinstance(neuron.granularity, PerStep) else 1)


def test_a_spiking_network_keeps_its_neurons() -> None:
    snn = convert(nets.two_layers(), 4, data=torch.rand(8, 4)).snn
    finetune(snn, batches(), strategy=Progressive(), epochs=1)
    assert [site.neuron for site in sites(snn).values()] == [LMH(IF())]


@pytest.mark.parametrize("make", [Progressive, Progressive.wider, Progressive.per_step])
def test_the_digits_are_learnt_from_scratch(digits: DataSet, digits_test: Batches, make: Any) -> None:
    card = zoo.card("digits-cnn")
    train = Batches(digits.train, card.preprocessing, 32, augmentation=card.augmentation, shuffle_seed=0)
    run = finetune(card.build(), train, digits_test, timesteps=4, strategy=make(),
                   schedule=Schedule(epochs=6, lr=0.05))  # fmt: skip
    assert (run[-1].val_accuracy or 0) > 0.9
    assert [stage.name for stage in run.stages] == ["STBP"]


class TestFreshNetworks:
    def test_batch_norm_gets_its_statistics_from_the_samples(self) -> None:
        network = nets.conv_net()
        x = [torch.rand(16, 2, 8, 8) * 5 for _ in range(4)]
        ready = with_statistics(network, [(part, torch.zeros(16, dtype=torch.long)) for part in x])
        assert ready is not network
        assert int(network.get_buffer("1.num_batches_tracked")) == 0
        first = network[0](torch.cat(x))
        assert torch.allclose(ready.get_buffer("1.running_mean"), first.mean((0, 2, 3)), atol=1e-4)
        assert not ready.training
        assert {layer.momentum for layer in ready.modules() if isinstance(layer, nn.BatchNorm2d)} == {0.1}

    def test_trained_ones_and_those_without_are_left(self, digits_ann: nn.Module) -> None:
        assert with_statistics(digits_ann, []) is digits_ann
        network = nets.two_layers()
        assert with_statistics(network, []) is network

    def test_thresholds_fit_the_network_as_it_trains(self, digits: DataSet) -> None:
        card = zoo.card("digits-cnn")
        train = Batches(digits.train, card.preprocessing, 32, torch.arange(320), shuffle_seed=0)
        run = finetune(card.build(), train, timesteps=4, strategy=Progressive(), epochs=1)
        assert run.conversion is not None
        fitted = run.conversion.calibration.v_threshold
        stale = convert(card.build(), 4, data=train).calibration.v_threshold
        for path, theta in fitted.items():
            assert 0.7 < float(theta.mean()) < 4
            assert float(theta.mean()) > 1.5 * float(stale[path].mean())


@pytest.mark.parametrize("bad", [{"lambda_from": -0.1}, {"mu_from": 1.5}])
def test_shares_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match="expected a share from 0 to 1"):
        Progressive(**bad)  # type: ignore[arg-type]


def test_a_preset_in_the_place_of_neurons_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"neuron is a LIF; expected a value of type LMH\. Pass LMH\(LIF\(0\.5\)\)"):
        Progressive(LIF())  # type: ignore[arg-type]
