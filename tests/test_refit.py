"""Refit after surgery: BatchNorm and biases take up what the stand-ins changed, on real digits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lmh import evaluate, zoo
from lmh.calibrate import refit, stand_ins
from lmh.convert import ReluSurgery, convert, prepare
from lmh.errors import CalibrationError
from lmh.finetune import Schedule
from lmh.finetune.trainer import accuracy, fit
from lmh.zoo.images import Batches

DATA, PREPROCESSING = zoo.load_data("digits"), zoo.card("digits-cnn").preprocessing
TEST = Batches(DATA.test, PREPROCESSING)


def layers(i: int, o: int, normalised: bool) -> list[nn.Module]:
    norm = [nn.BatchNorm2d(o)] if normalised else []
    return [nn.Conv2d(i, o, 3, padding=1), *norm, nn.SiLU()]


@pytest.fixture(scope="module")
def images() -> Tensor:
    x, _ = next(iter(Batches(DATA.train, PREPROCESSING, 256)))
    return x


@pytest.fixture(scope="module", params=[True, False], ids=["batchnorm", "biases"])
def net(request: pytest.FixtureRequest) -> nn.Module:
    """A SiLU network trained on digits."""
    torch.manual_seed(0)
    blocks = [*layers(1, 16, request.param), *layers(16, 16, request.param), nn.AvgPool2d(2)]
    net = nn.Sequential(
        *blocks, *layers(16, 32, request.param), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    fit(
        net,
        Batches(DATA.train, PREPROCESSING, 32, shuffle_seed=0),
        None,
        Schedule(epochs=4 if request.param else 8, lr=0.02),
    )
    return net


def test_a_refit_network_recovers_most_of_what_the_stand_ins_cost(net: nn.Module, images: Tensor) -> None:
    prepared = prepare(net, (1, 8, 8), surgery=ReluSurgery())
    swapped = copy.deepcopy(prepared.model)
    for path in stand_ins(prepared):
        swapped.set_submodule(path, nn.ReLU())
    unseen = torch.cat([x for x, _ in TEST])
    with torch.no_grad():
        expected = net(unseen)
        before, after = ((model(unseen) - expected).norm() for model in (swapped, refit(prepared, images).model))
    assert after < 0.6 * before
    assert accuracy(refit(prepared, images).model, TEST) >= accuracy(swapped, TEST)


def test_each_channel_has_its_mean_back(net: nn.Module, images: Tensor) -> None:
    prepared = prepare(net, (1, 8, 8), surgery=ReluSurgery())
    fitted = refit(prepared, images)
    with torch.no_grad():
        expected, got = prepared.model(images), fitted.model(images)
    torch.testing.assert_close(got.mean(0), expected.mean(0), rtol=1e-4, atol=1e-4)
    assert (got - expected).abs().max() > 1e-3


def test_convert_refits_where_it_has_data(net: nn.Module, images: Tensor) -> None:
    conversion = convert(net, 16, data=images, surgery=ReluSurgery())
    plain = accuracy(net, TEST)
    (final,) = evaluate(conversion.snn, TEST).snn_accuracy[-1:]
    assert final > plain - 0.05
    assert any("3 activations that are no rectifiers" in notice for notice in conversion.report.notices)
    assert [type(conversion.prepared.model.get_submodule(p)) for p in conversion.prepared.spiking] == [nn.ReLU] * 3


def test_without_stand_ins_nothing_changes(images: Tensor) -> None:
    prepared = prepare(zoo.load("digits-cnn"), (1, 8, 8))
    assert refit(prepared, images) is prepared


def test_the_source_network_is_not_touched(net: nn.Module, images: Tensor) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    prepared = prepare(net, (1, 8, 8), surgery=ReluSurgery())
    kept = {name: value.clone() for name, value in prepared.model.state_dict().items()}
    refit(prepared, images)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert all(torch.equal(value, prepared.model.state_dict()[name]) for name, value in kept.items())


def test_images_that_cannot_serve_are_refused(net: nn.Module) -> None:
    prepared = prepare(net, (1, 8, 8), surgery=ReluSurgery())
    with pytest.raises(CalibrationError, match="expected two or more"):
        refit(prepared, torch.zeros(1, 1, 8, 8))
    with pytest.raises(CalibrationError, match="not finite"):
        refit(prepared, torch.full((4, 1, 8, 8), torch.nan))
