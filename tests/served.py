"""A file of weights on the unruly server, and what the cache keeps of it."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from lmh.zoo.transfer import Patience, Weights
from unruly_server import Server

DATA = random.Random(0).randbytes(200_000)
DIGEST = hashlib.sha256(DATA).hexdigest()
QUICK = Patience(tries=3, first_wait=0.0, longest_wait=0.0)


def at(server: Server, name: str = "net.safetensors") -> Weights:
    return Weights(f"{server.url}/{name}", DIGEST, len(DATA))


def kept(tmp_path: Path) -> list[str]:
    """What the home holds besides locks."""
    return sorted(path.name for path in (tmp_path / "home").rglob("*") if path.is_file() and path.suffix != ".lock")


GOOD = f"{DIGEST[:16]}-net.safetensors"
