"""How much the commands say: --quiet leaves results and errors, --verbose adds tables and an error's traceback."""

from __future__ import annotations

from contextvars import ContextVar
from enum import IntEnum
from typing import Any

import click


class Verbosity(IntEnum):
    """How much is said besides results and errors."""

    QUIET = -1
    NORMAL = 0
    VERBOSE = 1


_now: ContextVar[Verbosity] = ContextVar("verbosity", default=Verbosity.NORMAL)


def verbosity() -> Verbosity:
    """Return what the running command was asked for.

    >>> verbosity()
    <Verbosity.NORMAL: 0>
    """
    return _now.get()


def set_verbosity(value: Verbosity) -> None:
    """Set it, for the commands that follow."""
    _now.set(value)


def verbosity_options(command: Any) -> Any:
    """Add --quiet and --verbose to a command; the last one given counts."""

    def chosen(value: Verbosity) -> Any:
        def callback(_ctx: click.Context, _param: click.Parameter, given: bool) -> None:
            if given:
                set_verbosity(value)

        return callback

    options = {
        Verbosity.QUIET: ("--quiet", "-q", "Say nothing but results and errors."),
        Verbosity.VERBOSE: ("--verbose", "-v", "Print more: the work of every measured layer, where an error arose."),
    }
    for value, (long, short, text) in reversed(options.items()):
        command = click.option(long, short, is_flag=True, expose_value=False, callback=chosen(value), help=text)(
            command
        )
    return command
