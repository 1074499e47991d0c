"""The paper's tables beside what the zoo's recipes gave: a page made from cards, never by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import click

from ..artifact import write_atomically
from .model_cards import ModelCard, SpikingCard, read_card_file
from .models import readable_cards
from .recipe import Recipe, read_recipe, recipe_names

NOT_RUN = "not run"
TITLES = {1: "STBP", 2: "Hybrid training", 3: "Time slices"}
HEAD = """# Results

Written by `lmh zoo results docs/results --output docs/results.md` from the cards of the package and of docs/results.
The paper is Hao et al., ICLR 2024; its figures are beside ours, in %, on the test split. "not run" says that nobody
trained the recipe here yet: `lmh zoo train RECIPE --data SPEC --out DIR` does.
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


def _table(recipes: Iterable[Recipe], known: Mapping[str, ModelCard]) -> str:
    head = ("recipe", "data", "architecture", "T", "method", "paper", "ours, t = 1…T", "ANN", "after QCFS", "n")
    rows = [_row(recipe, known.get(recipe.name)) for recipe in recipes]
    lines = (f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows))
    return "\n".join(lines) + "\n"


def _row(recipe: Recipe, card: ModelCard | None) -> tuple[str, ...]:
    published, ours, after, ann = recipe.published, NOT_RUN, "", ""
    if isinstance(card, SpikingCard):
        ours = _percent(card.accuracy or ())
        after = _after_qcfs(card)
    elif card is not None:
        ours = _percent(() if card.ann_accuracy is None else (card.ann_accuracy,))
    if isinstance(card, SpikingCard) and card.ann_accuracy is not None:
        ann = _percent((card.ann_accuracy,))
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


@click.command("results")
@click.argument("folders", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write, unless it is printed.")
def results_command(folders: tuple[Path, ...], output: Path | None) -> None:
    """Print the paper's tables beside what the recipes gave, from the zoo's cards and those in FOLDERS, as Markdown."""
    known = [card for card in readable_cards() if isinstance(card, ModelCard)]
    given = [read_card_file(file) for folder in folders for file in sorted(folder.glob("*.json"))]
    page = results_page([*known, *given])
    if output is None:
        click.echo(page, nl=False)
    else:
        write_atomically(output, page.encode())
