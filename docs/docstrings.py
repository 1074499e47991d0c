"""How docstrings become pages: doctests as code blocks, and roles such as ``:func:`convert``` as plain code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|mod|meth|attr|data):`~?([^`]+)`")
DOCTEST = re.compile(r"^(>>>.*(?:\n(?!\s*$).*)*)", re.MULTILINE)


def as_markdown(text: str) -> str:
    """Return a docstring as mkdocstrings reads it."""
    text = ROLE.sub(r"`\1`", text)
    return DOCTEST.sub(r"```pycon\n\1\n```", text)


class Docstrings(griffe.Extension):
    """Apply it to every object."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the text before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
