"""Recipes of the zoo: each builds what it names; a part of the data is the first samples in the order of the seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmh import zoo
from lmh.artifact import read_tensors
from lmh.cli import lmh, run
from lmh.errors import ArgumentError
from lmh.zoo.cli import RECIPES, read_recipe
from lmh.zoo.images import Batches
from lmh.zoo.releases import card_of_file

QUICK = """architecture = "digits-cnn"
data = "digits"
samples = {samples}
seed = 3
epochs = 1
batch_size = 32
lr = 0.05
weight_decay = 0.0
label_smoothing = 0.0
"""


@pytest.mark.parametrize("name", [path.stem for path in sorted(RECIPES.glob("*.toml"))])
def test_every_recipe_names_an_architecture(name: str) -> None:
    settings = read_recipe(name)
    card = zoo.card(settings["architecture"])
    assert card.name == name
    x = torch.zeros(2, *card.preprocessing.input_size)
    assert card.build().eval()(x).shape == (2, card.num_classes)


def test_a_part_of_the_data_is_the_first_samples_of_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor | None] = []
    begin = Batches.at_epoch

    def noted(self: Batches, epoch: int) -> Batches:
        seen.append(self.indices)
        return begin(self, epoch)

    monkeypatch.setattr(Batches, "at_epoch", noted)
    recipe = tmp_path / "quick.toml"
    recipe.write_text(QUICK.format(samples=64))
    assert run(lmh, ["zoo", "train", str(recipe), "--out", str(tmp_path / "out")]) == 0
    chosen = seen[0]
    assert chosen is not None
    assert torch.equal(chosen, zoo.seeded_order(zoo.load_data("digits").train, 3)[:64])
    _, facts = read_tensors(tmp_path / "out" / "digits-cnn.safetensors")
    assert facts["record"]["recipe"]["samples"] == 64
    card = card_of_file("quick", tmp_path / "out" / "digits-cnn.safetensors", licence="MIT")
    assert (card.architecture, card.num_classes, card.seed, card.samples) == ("digits-cnn", 10, 3, 360)
    assert card.preprocessing == zoo.card("digits-cnn").preprocessing


def test_another_key_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "odd.toml"
    recipe.write_text(QUICK.format(samples=64) + "patience = 3\n")
    with pytest.raises(ArgumentError, match=r"keys missing or unknown: patience; expected .*, and samples or not"):
        read_recipe(str(recipe))
