"""Blocks of a graph, and their reconstruction on real digits without labels."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nets
from lmh import LMH, AttachedReset, DetachedReset, evaluate, sites, zoo
from lmh.calibrate import Reconstruction, blocks, reconstruct
from lmh.calibrate.blocks import cut
from lmh.convert import Conversion, EventFrames, convert, prepare
from lmh.errors import ArgumentError, CalibrationError
from lmh.torchvision_shim import torchvision
from lmh.zoo.images import Batches

DATA, PREPROCESSING = zoo.load_data("digits"), zoo.card("digits-cnn").preprocessing
IMAGES = torch.cat([x for x, _ in Batches(DATA.train, PREPROCESSING, 128)][:2])
TEST = Batches(DATA.test, PREPROCESSING)
QUICK = Reconstruction(steps=30)


class Joined(nn.Module):
    """Two branches that only meet at their concat, then a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.d, self.e = nn.Linear(8, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = torch.cat([F.relu(self.b(x)), F.relu(self.c(x))], 1)
        return self.e(F.relu(self.d(x)))


def converted(timesteps: int) -> Conversion:
    return convert(zoo.load("digits-cnn"), timesteps, data=IMAGES)


def test_a_chain_is_cut_behind_each_activation() -> None:
    found = blocks(prepare(nets.two_layers(), (4,)))
    assert [(block.start, block.sites) for block in found] == [("input_1", ("1",))]


def test_a_block_ends_where_nothing_else_is_to_be_read() -> None:
    assert [block.sites for block in blocks(prepare(Joined(), (4,)))] == [("relu",), ("relu_1", "relu_2", "relu_3")]
    digits = blocks(prepare(zoo.load("digits-cnn"), (1, 8, 8)))
    assert [block.sites for block in digits] == [("stem.2",), ("block.relu1", "block.relu2"), ("down.2",)]


def test_a_resnet_is_cut_behind_its_residual_adds() -> None:
    found = blocks(prepare(torchvision().models.resnet18(), (3, 32, 32)))
    assert [len(block.sites) for block in found] == [1, *[2] * 8]
    assert found[0].sites == ("relu",)
    assert found[-1].sites == ("layer4.1.relu", "layer4.1.relu_1")


def test_the_parts_together_are_the_network_and_share_its_parameters() -> None:
    conversion = converted(3)
    ann = snn = IMAGES[:5]
    for block in blocks(conversion.prepared):
        ann, snn = cut(conversion.prepared.model, block)(ann), cut(conversion.snn, block)(snn)
    whole: dict[str, Tensor] = {}
    for name, model in (("ann", conversion.prepared.model), ("snn", conversion.snn)):
        model.get_submodule("down.2").register_forward_hook(
            lambda _module, _args, output, name=name: whole.__setitem__(name, output)
        )
        model(IMAGES[:5])
    assert torch.equal(ann, whole["ann"])
    assert torch.equal(snn, whole["snn"])
    part = cut(conversion.snn, blocks(conversion.prepared)[1])
    known = {id(parameter) for parameter in conversion.snn.parameters()}
    assert {id(parameter) for parameter in part.parameters()} <= known


def test_the_reset_has_no_gradient_unless_the_neurons_name_one() -> None:
    def fitted(neuron: LMH) -> dict[str, Tensor]:
        conversion = convert(zoo.load("digits-cnn"), 2, data=IMAGES, neuron=neuron)
        reconstruct(conversion.snn, conversion.prepared, IMAGES, Reconstruction(steps=3))
        assert {site.neuron for site in sites(conversion.snn).values()} == {neuron}
        return conversion.snn.state_dict()

    usual, detached, attached = (fitted(LMH(reset=reset)) for reset in (None, DetachedReset(), AttachedReset()))
    assert all(torch.equal(usual[name], detached[name]) for name in usual)
    assert any(not torch.equal(usual[name], attached[name]) for name in usual)


@pytest.mark.parametrize("timesteps", [1, 2])
def test_every_block_comes_nearer_to_the_ann_and_so_does_the_answer(timesteps: int) -> None:
    conversion = converted(timesteps)
    before = evaluate(conversion.snn, TEST, ann=zoo.load("digits-cnn"))
    results = reconstruct(conversion.snn, conversion.prepared, IMAGES, Reconstruction(steps=150))
    after = evaluate(conversion.snn, TEST, ann=zoo.load("digits-cnn"))
    assert [result.block for result in results] == blocks(conversion.prepared)
    assert all(result.after <= result.before for result in results)
    assert results[-1].after < 0.9 * results[-1].before
    assert after.output_error < 0.95 * before.output_error
    assert sum(after.snn_accuracy) > sum(before.snn_accuracy)


def test_only_what_may_change_changes() -> None:
    for settings, parts in (
        (Reconstruction(steps=80, weight_lr=0, coefficients=False), {"raw_threshold", "v_init"}),
        (Reconstruction(steps=20, neuron_lr=0), {"weight", "bias"}),
    ):
        conversion = converted(1)
        start = copy.deepcopy(conversion.snn.state_dict())
        reconstruct(conversion.snn, conversion.prepared, IMAGES, settings)
        changed = {name for name, value in conversion.snn.state_dict().items() if not torch.equal(value, start[name])}
        assert changed
        assert {name.rpartition(".")[2] for name in changed} <= parts
        assert all(parameter.grad is None for parameter in conversion.snn.parameters())


def test_it_repeats_under_its_seed() -> None:
    states = []
    for seed in (0, 0, 1):
        conversion = converted(2)
        reconstruct(conversion.snn, conversion.prepared, IMAGES, Reconstruction(steps=15, seed=seed))
        states.append(conversion.snn.state_dict())
    first, again, other = states
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


def test_a_loader_of_pairs_serves_and_blocks_are_told_one_by_one() -> None:
    conversion, told = converted(2), []
    loader = [(x, y) for x, y in Batches(DATA.train, PREPROCESSING, 64, torch.arange(128))]
    results = reconstruct(conversion.snn, conversion.prepared, loader, QUICK, on_block=told.append)
    assert told == results


def test_what_cannot_be_reconstructed_is_refused() -> None:
    conversion = converted(2)
    with pytest.raises(CalibrationError, match="gave no batch"):
        reconstruct(conversion.snn, conversion.prepared, [])
    with pytest.raises(ArgumentError, match="at least 1 step"):
        Reconstruction(steps=0)
    frames = convert(nets.two_layers(), 2, data=torch.rand(2, 8, 4), encoding=EventFrames())
    with pytest.raises(ArgumentError, match="event frames"):
        reconstruct(frames.snn, frames.prepared, torch.rand(2, 8, 4))
    with pytest.raises(CalibrationError, match="Lower neuron_lr or weight_lr"):
        reconstruct(conversion.snn, conversion.prepared, IMAGES * torch.inf, QUICK)
