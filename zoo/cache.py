"""The cache of downloaded weights. A file in it is whole and checked; half a file lies elsewhere, by another name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..artifact import file_digest
from ..errors import ArgumentError, DownloadError
from ..home import home
from ..terminal import Terminal
from .locations import Packaged, parsed_location
from .transfer import Patience, Transfer, Weights

OFFLINE = ("LMH_OFFLINE", "HF_HUB_OFFLINE")
SUFFIX = ".safetensors"


def offline() -> str | None:
    """Return the environment variable that forbids the network, or None."""
    return next((name for name in OFFLINE if os.environ.get(name, "").lower() in ("1", "true", "yes", "on")), None)


def resting_place(weights: Weights) -> Path:
    """Return where a file of weights is, or will be once it was downloaded.

    Raises:
        ArgumentError: if its location is not known, or it is not a safetensors file.
    """
    location = parsed_location(weights.location)
    if isinstance(location, Packaged):
        return location.path
    name = weights.location.partition("?")[0].partition("#")[0].rpartition("/")[2].partition("@")[0]
    if not name.endswith(SUFFIX):
        raise ArgumentError(
            f"{weights.location}: is not a {SUFFIX} file; expected one, as other formats can run code. Convert it with "
            "safetensors.torch.save_file."
        )
    return home() / "weights" / f"{weights.sha256[:16]}-{name}"


def is_whole(path: Path, weights: Weights) -> bool:
    """Whether a file is there and has the size and sha256 that it must have."""
    try:
        return path.stat().st_size == weights.size and file_digest(path) == weights.sha256
    except OSError:
        return False


def fetched(weights: Weights, terminal: Terminal | None = None, patience: Patience | None = None) -> Path:
    """Return the file of weights, downloaded if need be. Its sha256 is checked every time.

    Two processes that want the same file download it once: the second waits for the first.

    Args:
        weights: what to fetch.
        terminal: shows the progress; a new one unless given.
        patience: how often a broken transfer is tried.

    Raises:
        DownloadError: if it cannot be had, whole and unaltered.
        ArgumentError: for a location of another kind, or a file that is not safetensors.
    """
    location = parsed_location(weights.location)
    path = resting_place(weights)
    if is_whole(path, weights):
        return path
    if isinstance(location, Packaged):
        raise DownloadError(f"{path}: missing or damaged; expected sha256 {weights.sha256}. Install lmh-convert again.")
    terminal = terminal or Terminal()
    with _locked(weights, terminal):
        if is_whole(path, weights):  # another process was faster
            return path
        variable = offline()
        if variable is not None and weights.location.partition(":")[0] != "file":
            raise DownloadError(
                f"{weights.location}: is not in {path.parent}, and {variable} forbids to download it; expected it "
                f"there. Unset {variable} once, or copy the file to {path}."
            )
        part = home() / "partial" / f"{weights.sha256}.part"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.parent.mkdir(parents=True, exist_ok=True)
            with terminal.transfer(path.name.partition("-")[2], weights.size) as advance:
                Transfer(location, weights, part, advance, patience or Patience()).run()
            part.replace(path)
        except OSError as error:
            raise _unwritable(error) from error
    return path


@contextmanager
def _locked(weights: Weights, terminal: Terminal) -> Iterator[None]:
    """Hold the lock of one file."""
    lock = FileLock(home() / "locks" / f"{weights.sha256}.lock")
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            terminal.notice(f"{weights.location}: another process downloads it; waiting for that.")
            lock.acquire()
    except OSError as error:
        raise _unwritable(error) from error
    try:
        yield
    finally:
        lock.release()


def _unwritable(error: OSError) -> DownloadError:
    return DownloadError(
        f"{error.filename or home()}: cannot be written ({error.strerror or error}); expected a writable folder. "
        "Choose another with LMH_HOME."
    )
