"""The surrogate that a training goes through in the place of the neurons' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nets
from commands import command
from lmh import sites
from lmh.convert import convert
from lmh.errors import ArgumentError, TrainingError
from lmh.finetune import STBP, Hybrid, Schedule, finetune, fit
from lmh.finetune.recipe import read_recipe
from lmh.spiking import LMH
from lmh.surrogates import Arctan, Rectangle, Sigmoid, Surrogate, Triangle

BATCHES = nets.two_layer_batches()
ANN = nets.two_layers()


def trained(own: Surrogate, asked: Surrogate | None) -> nn.Module:
    """A network whose neurons have one surrogate, trained by a schedule that names another, or none."""
    snn = convert(ANN, 4, data=BATCHES[0][0], neuron=LMH(surrogate=own)).snn
    finetune(snn, BATCHES, schedule=Schedule(epochs=2, lr=0.1, surrogate=asked))
    assert {site.neuron.surrogate for site in sites(snn).values()} == {own}
    return snn


def weights(snn: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in snn.parameters()])


def test_it_replaces_the_neurons_own_while_the_network_trains() -> None:
    wide = weights(trained(Triangle(2.0), None))
    assert torch.equal(weights(trained(Triangle(), Triangle(2.0))), wide)
    assert not torch.equal(weights(trained(Triangle(), None)), wide)


def test_the_neurons_have_their_own_again_when_the_training_breaks() -> None:
    snn = convert(ANN, 4, data=BATCHES[0][0]).snn
    spoilt = [(torch.full((16, 4), torch.nan), torch.zeros(16, dtype=torch.long))]
    with pytest.raises(TrainingError, match="expected finite numbers"):
        finetune(snn, spoilt, schedule=Schedule(epochs=1, surrogate=Rectangle()))
    assert [site.neuron.surrogate for site in sites(snn).values()] == [Triangle()]


def test_an_ann_has_none() -> None:
    with pytest.raises(ArgumentError, match=r"Triangle\(gamma=2.0\) came and Sequential has no spiking neurons"):
        fit(nets.two_layers(), BATCHES, None, Schedule(epochs=1, surrogate=Triangle(2.0)))


@pytest.mark.parametrize("value", [Triangle, "triangle", 2.0])
def test_what_is_no_surrogate_is_refused(value: object) -> None:
    with pytest.raises(ArgumentError, match=r"surrogate.*Triangle\(2.0\)"):
        Schedule(epochs=1, surrogate=value)


class TestTheOption:
    @pytest.mark.parametrize(
        ("text", "surrogate"), [("triangle:2", Triangle(2.0)), ("sigmoid", Sigmoid()), ("arctan:0.5", Arctan(0.5))]
    )
    def test_it_is_of_the_stage_that_spikes(self, text: str, surrogate: Surrogate, tmp_path: Path) -> None:
        path = tmp_path / "r.toml"
        options = ("--strategy", "hybrid", "--epochs", 3, "--surrogate", text, "--data", "digits")
        stopped = command("finetune", "zoo:digits-cnn", "-T", 2, *options, "--save-recipe", path, "--log", "gone/x")
        assert "the log cannot be written" in stopped.err
        recipe = read_recipe(str(path))
        assert recipe.schedule.surrogate == surrogate
        assert isinstance(recipe.strategy, Hybrid)
        assert recipe.strategy.then == STBP()
        assert recipe.strategy.qcfs.surrogate is None

    @pytest.mark.parametrize("text", ["square", "triangle:", "triangle:0", "triangle:nan", "triangle:wide", ""])
    def test_a_wrong_one_names_those_there_are(self, text: str) -> None:
        ran = command("finetune", "zoo:digits-cnn-t4", "--data", "digits", "--surrogate", text)
        assert ran.status == 2
        assert f"'{text}' is none of triangle, rectangle, sigmoid, arctan, dspike" in " ".join(ran.err.split())
