"""The page of results: the paper's figures beside those of the cards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from commands import succeed
from lmh import zoo
from lmh.records import plain_value
from lmh.zoo.model_cards import SpikingCard
from lmh.zoo.recipe import read_recipe
from lmh.zoo.results import cards_in, packaged_cards, results_page

REPOSITORY = Path(__file__).parent.parent


def test_the_page_of_results_is_made_from_the_cards() -> None:
    page = (REPOSITORY / "docs" / "results.md").read_text()
    assert page == results_page([*packaged_cards(), *cards_in([REPOSITORY / "docs" / "results"])])
    assert succeed("zoo", "results").out.startswith("# Results")


def test_figures_stand_beside_the_paper_s() -> None:
    model = zoo.model_card("digits-cnn-t4")
    assert isinstance(model, SpikingCard)
    stages = {"after QCFS": (0.4, 0.5, 0.6, 0.7), "after QCFS, quantised ANN": (0.8,)}
    mine = replace(
        model, name="cifar10-resnet20-t4", architecture="cifar10-resnet20-qcfs4", data="cifar10",
        accuracy=(0.5, 0.6, 0.7, 0.8), stages=stages,
        recipe={**plain_value(read_recipe("cifar10-resnet20-t4")), "data": "npz:here.npz"},
    )  # fmt: skip
    page = results_page([mine])
    row = next(line for line in page.splitlines() if "`cifar10-resnet20-t4`" in line)
    assert "| 87.56 | 50.00 / 60.00 / 70.00 / 80.00 | 99.72 (paper 91.77) |" in row
    assert "| 80.00 quantised, 40.00 / 50.00 / 60.00 / 70.00 spiking (paper 83.75) | 360 |" in row
    assert page.count("not run") > 20
    assert "80.00 (other settings) |" in results_page([replace(mine, recipe={**mine.recipe, "seed": 1})])
    for other in (replace(mine, data="cifar100"), replace(mine, timesteps=6), replace(mine, architecture="digits-cnn")):
        assert "50.00 / 60.00" not in results_page([other])  # not what the recipe trains
