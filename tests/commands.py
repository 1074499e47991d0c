"""``lmh`` run in this process, as a user would call it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

import pytest

from lmh.cli import lmh, run
from lmh.zoo.images import Batches


class Printed(NamedTuple):
    """What a command returned and printed."""

    status: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The one JSON object on standard output, in which NaN and Infinity are not allowed."""

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is not JSON")

        return json.loads(self.out, parse_constant=refuse)


def command(*arguments: object) -> Printed:
    """Run ``lmh`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = run(lmh, list(map(str, arguments)))
    return Printed(status, out.getvalue(), err.getvalue())


def succeed(*arguments: object) -> Printed:
    """Run a command that must succeed."""
    found = command(*arguments)
    assert found.status == 0, found.err
    return found


@contextmanager
def interrupted_at_epoch(epoch: int) -> Iterator[None]:
    """Interrupt every training inside of this block at the start of an epoch, counted from 0, of any stage."""
    begin = Batches.at_epoch

    def interrupted(self: Batches, now: int) -> Batches:
        if now == epoch:
            raise KeyboardInterrupt
        return begin(self, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "at_epoch", interrupted)
        yield
