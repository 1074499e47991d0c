"""The folder in which things are kept that can be had again: downloads, and what was compiled."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .artifact import user_path


def home() -> Path:
    """Return ``LMH_HOME``, or ``lmh`` in the user's cache folder."""
    named = os.environ.get("LMH_HOME")
    if named:
        return user_path(named)
    if sys.platform == "win32":
        return user_path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local") / "lmh"
    if sys.platform == "darwin":
        return user_path("~/Library/Caches") / "lmh"
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lmh"
