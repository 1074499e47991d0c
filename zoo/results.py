"""The paper's tables beside what the zoo's recipes gave: a page made from cards, never by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from ..artifact import write_atomically
from ..errors import ArtifactError
from ..records import plain_value
from .model_cards import ModelCard, SpikingCard, read_card_file
from .models import packaged, readable_cards
from .recipe import Recipe, read_recipe, recipe_names
from .releases import INDEX

NOT_RUN = "not run"
TITLES = {1: "STBP", 2: "Hybrid training", 3: "Time slices"}
HEAD = """# Results

Written by `lmh zoo results FOLDER… --output FILE` from the cards of the package and of folders (here docs/results).
Accuracies in % on n samples of the test split. "not run" says that no card of it is here: `lmh zoo train RECIPE
--data SPEC --out DIR` makes one; "other settings" says that the recipe was changed since. "ANN" is the
network that a spiking one started from, "after QCFS" what it was before its spikes were trained.

The paper is Hao et al., ICLR 2024. Its Table 3 tests each network at T = 4, 6 and 8; its figure here is that of the T
that ours is trained and measured at. Where it states no setting, the recipes' are ours. From an IF start a gradient
passes the reset, which the paper's does not. Those of the baselines name a method, not its authors' run: they have LIF
neurons with a leak of 0.5, the thresholds that calibration finds, and the augmentation of the other rows. On
Tiny-ImageNet images are padded and cropped by 4 pixels.
"""


def results_page(cards: Iterable[ModelCard]) -> str:
    """Return the page in Markdown.

    Args:
        cards: of models with the names of recipes; others are left out.

    >>> "## Table 2: Hybrid training" in results_page([])
    True
    """
    known = {card.name: card for card in cards}
    recipes = [read_recipe(name) for name in recipe_names()]
    parts = [HEAD]
    for table, title in TITLES.items():
        rows = [recipe for recipe in recipes if recipe.published is not None and recipe.published.table == table]
        parts.append(f"## Table {table}: {title}\n\n{_table(rows, known)}")
    others = [recipe for recipe in recipes if recipe.published is None]
    parts.append(f"## Other recipes\n\n{_table(others, known)}")
    return "\n".join(parts)


def _fitting(recipe: Recipe, known: Mapping[str, ModelCard]) -> ModelCard | None:
    """Return the card of a recipe's name, if it is of the recipe's network and data."""
    card = known.get(recipe.name)
    timesteps = card.timesteps if isinstance(card, SpikingCard) else None
    if card is None or (card.architecture, card.data, timesteps) != (
        recipe.architecture, recipe.data, recipe.timesteps
    ):  # fmt: skip
        return None
    return card


def _own_settings(recipe: Recipe, card: ModelCard) -> bool:
    """Whether a card's network was trained with a recipe's settings as they are now.

    Where the data and the ANN lay, and the precision that the device has, do not count.
    """
    wanted = plain_value(recipe)
    keys = wanted.keys() - {"data"}
    return all(_without_precision(card.recipe.get(key)) == _without_precision(wanted[key]) for key in keys)


def _without_precision(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_without_precision(item) for item in plain]
    if isinstance(plain, Mapping):
        return {key: _without_precision(value) for key, value in plain.items() if key != "precision"}
    return plain


def _table(recipes: Iterable[Recipe], known: Mapping[str, ModelCard]) -> str:
    head = ("recipe", "data", "architecture", "T", "method", "paper", "ours, t = 1…T", "ANN", "after QCFS", "n")
    rows = [_row(recipe, _fitting(recipe, known)) for recipe in recipes]
    lines = (f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows))
    return "\n".join(lines) + "\n"


def _row(recipe: Recipe, card: ModelCard | None) -> tuple[str, ...]:
    published, ours, after, ann = recipe.published, NOT_RUN, "", ""
    source = () if card is None or card.ann_accuracy is None else (card.ann_accuracy,)
    if isinstance(card, SpikingCard):
        ours, after, ann = _percent(card.accuracy or ()), _after_qcfs(card), _percent(source)
    elif card is not None:
        ours = _percent(source)
    if card is not None and not _own_settings(recipe, card):
        ours += " (other settings)"
    if published is not None and published.ann is not None:
        ann = f"{ann or NOT_RUN} (paper {published.ann:.2f})"
    if published is not None and published.qcfs is not None:
        after = f"{after or NOT_RUN} (paper {published.qcfs:.2f})"
    return (
        f"`{recipe.name}`",
        recipe.data,
        recipe.architecture,
        "" if recipe.timesteps is None else str(recipe.timesteps),
        "" if published is None else published.method,
        "" if published is None else f"{published.accuracy:.2f}",
        ours,
        ann,
        after,
        "" if card is None or card.samples is None else f"{card.samples:,}",
    )


def _after_qcfs(card: SpikingCard) -> str:
    quantised, spiking = card.stages.get("after QCFS, quantised ANN"), card.stages.get("after QCFS")
    parts = [f"{_percent(quantised)} quantised" if quantised else "", f"{_percent(spiking)} spiking" if spiking else ""]
    return ", ".join(filter(None, parts))


def _percent(values: Iterable[float]) -> str:
    return " / ".join(f"{100 * value:.2f}" for value in values)


def packaged_cards() -> list[ModelCard]:
    """Return the cards of the package."""
    return [card for card in readable_cards() if not isinstance(card, ArtifactError) and packaged(card)]


def cards_in(folders: Iterable[Path]) -> list[ModelCard]:
    """Return the cards in folders; a release's index is none."""
    files = [file for folder in folders for file in sorted(folder.glob("*.json")) if file.name != INDEX]
    return [read_card_file(file) for file in files]


@click.command("results")
@click.argument("folders", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write, unless it is printed.")
def results_command(folders: tuple[Path, ...], output: Path | None) -> None:
    """Print the paper's tables beside what the recipes gave, from the package's cards and those in FOLDERS."""
    page = results_page([*packaged_cards(), *cards_in(folders)])
    if output is None:
        click.echo(page, nl=False)
    else:
        write_atomically(output, page.encode())
