"""``--report`` and ``--html``: the page that shows a network, written by the commands."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..cli import command_line
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
    result: dict[str, Any],
    *,
    classes: Sequence[str] = (),
    history: Sequence[Mapping[str, Any]] = (),
    **facts: Any,
) -> None:
    """Write the page of a whole result and name it there; the command line is among its facts."""
    from ..report import write_report

    result["report"] = str(page)
    facts = {"command": command_line(), **{name: value for name, value in facts.items() if value is not None}}
    write_report(watch.report(result, classes=classes, history=history, facts=facts), page)
