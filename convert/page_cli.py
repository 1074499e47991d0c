"""``--report`` and ``--html``: the page that shows a network, written by the commands."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..cli import command_line
from ..records import Evaluation
from ..zoo.images import Batches
from .pipeline import Conversion

if TYPE_CHECKING:
    from .reporting import Watch

PAGE_HELP = "Write a page with figures to this file, and its values as JSON beside it."


class PageType(click.Path):
    """A web page that can be written."""

    name = "page"

    def __init__(self) -> None:
        super().__init__(dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path; refuse another kind of file, and a folder that nothing can be written to."""
        page = Path(str(super().convert(value, param, ctx)))
        if page.suffix.lower() not in (".html", ".htm"):
            self.fail(f"{page}: a report is a web page; expected a name that ends in .html.", param, ctx)
        try:
            with tempfile.NamedTemporaryFile(prefix=f".{page.name}.", dir=page.parent):
                pass
        except OSError as error:
            self.fail(f"{page}: cannot be written ({error.strerror}); expected a writable folder.", param, ctx)
        return page


def watching(page: Path | None, conversion: Conversion) -> Watch | None:
    """Return what looks on for a page; None where none is wanted."""
    if page is None:
        return None
    from .reporting import Watch  # with it comes matplotlib, which no other command needs

    return Watch(conversion)


def write_page(
    page: Path,
    watch: Watch,
    result: Mapping[str, Any],
    evaluation: Evaluation | None,
    batches: Batches | None,
    *,
    classes: Sequence[str] = (),
    history: Sequence[Mapping[str, Any]] = (),
    **facts: Any,
) -> str:
    """Write the page and return its path as text; the command line is among its facts."""
    from ..report import write_report

    rates = evaluation.channel_rate if evaluation else {}
    facts = {"command": command_line(), **{name: value for name, value in facts.items() if value is not None}}
    report = watch.report(result, batches, rates, classes=classes, history=history, facts=facts)
    write_report(report, page)
    return str(page)
