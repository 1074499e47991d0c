"""``--report`` and ``--html``: the page that shows a network, written by the commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..artifact import check_writable
from ..cli import command_line
from ..errors import LMHError
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
        from ..report.page import page_file

        try:
            page = page_file(str(super().convert(value, param, ctx)))
            check_writable(page, "Choose another place.")
        except LMHError as error:
            self.fail(str(error), param, ctx)
        return page


@dataclass(frozen=True)
class Page:
    """A page that is asked for.

    Attributes:
        file: where it goes.
        watch: looks on while the network is measured.
    """

    file: Path
    watch: Watch

    def write(
        self,
        result: dict[str, Any],
        *,
        classes: Sequence[str] = (),
        history: Sequence[Mapping[str, Any]] = (),
        **facts: Any,
    ) -> None:
        """Write the page of a whole result and name it there; the command line is among its facts."""
        from ..report import write_report

        result["report"] = str(self.file)
        facts = {"command": command_line(), **{name: value for name, value in facts.items() if value is not None}}
        write_report(self.watch.report(result, classes=classes, history=history, facts=facts), self.file)


def watch_of(page: Page | None) -> Watch | None:
    """Return what looks on for a page, if there is to be one."""
    return None if page is None else page.watch


def page_of(file: Path | None, conversion: Conversion) -> Page | None:
    """Return the page of a conversion; None where none is wanted."""
    if file is None:
        return None
    from .reporting import Watch  # with it comes matplotlib, which no other command needs

    return Page(file, Watch(conversion))
