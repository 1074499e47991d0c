"""A transfer that ends with the whole file or none: resumed where it broke, tried again, checked by its sha256."""

from __future__ import annotations

import contextlib
import http.client
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..artifact import file_digest
from ..errors import DownloadError
from .locations import BrokenTransferError, HubFile, LocalFile, Stream, WebFile

CHUNK = 1 << 16
SMALL = 1 << 20


@dataclass(frozen=True)
class Weights:
    """A file of weights.

    Attributes:
        location: where it lies, as :func:`lmh.zoo.locations.parsed_location` reads it.
        sha256: of its bytes, in hexadecimal.
        size: in bytes.
    """

    location: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Patience:
    """How often a transfer is tried, and how long it waits in between.

    Attributes:
        tries: in a row that bring nothing new.
        first_wait: seconds after the first of them; doubled after each.
        longest_wait: seconds, also where the server asks for more.
        connections: in all, for a server that cuts each after a few bytes.
    """

    tries: int = 5
    first_wait: float = 0.5
    longest_wait: float = 30.0
    connections: int = 200

    def wait(self, failures: int, asked: float | None) -> float:
        """Return the seconds to wait after so many failures in a row.

        >>> [Patience().wait(failures, None) for failures in (0, 1, 2, 9)]
        [0.0, 0.5, 1.0, 30.0]
        """
        own = self.first_wait * 2 ** (failures - 1) if failures else 0.0
        return min(self.longest_wait, max(own, asked or 0.0))


@dataclass
class Transfer:
    """One file on its way into a part, which an earlier transfer may have begun.

    Attributes:
        source: where it lies.
        weights: what it must be.
        part: file to fill.
        advance: told the bytes that came, negative where some are given up, and why there is a wait.
        patience: how often it is tried.
        received: bytes so far, those that came more than once included.
        connections: so far.
    """

    source: LocalFile | WebFile | HubFile
    weights: Weights
    part: Path
    advance: Callable[[int, str], None] = lambda count, note: None
    patience: Patience = field(default_factory=Patience)
    received: int = 0
    connections: int = 0

    def run(self) -> None:
        """Fill the part.

        Raises:
            DownloadError: if the file cannot be had whole, or is another one, of which no part stays.
        """
        have = self._have()
        self.advance(have, "")
        if have > self.weights.size:
            self._discard()
        pieced = have > 0
        for again in (True, False):
            pieced |= self._fill() > 1
            digest = file_digest(self.part)
            if digest == self.weights.sha256:
                return
            self._discard()
            if not (pieced and again):  # pieces may be of two files: then once more from the start
                raise DownloadError(
                    f"{self.source}: its sha256 is {digest}; expected {self.weights.sha256}. It is not the file that "
                    "the card describes, and nothing of it was kept. Tell whoever published it."
                )

    def _fill(self) -> int:
        """Bring the part to its full size; return how many connections that took."""
        failures, best, before = 0, self._have(), self.connections
        while self._have() < self.weights.size:
            self.connections += 1
            try:
                self._append()
            except BrokenTransferError as error:
                have = self._have()
                failures = 0 if have > best else failures + 1
                best = max(best, have)
                if failures >= self.patience.tries or self.connections >= self.patience.connections:
                    often = f"{failures} times in a row" if failures else f"after {self.connections} connections"
                    raise DownloadError(
                        f"{self.source}: {error}, {often}; {have} of {self.weights.size} bytes are "
                        "there and kept for the next time. Check the network (proxies are taken from HTTPS_PROXY) and "
                        "start again."
                    ) from error
                wait = self.patience.wait(failures, error.wait)
                self.advance(0, f"{error}; again in {wait:.0f} s")
                time.sleep(wait)
        return self.connections - before

    def _append(self) -> None:
        """Take what one connection gives, from where the part ends, or from the start if the sender begins there."""
        have = self._have()
        stream = self.source.open(have)
        with contextlib.closing(stream):
            if stream.total not in (None, self.weights.size):
                self._refuse_size(f"{stream.total}")
            self.advance(stream.start - have, "")
            try:
                with self.part.open("r+b" if have else "wb") as file:
                    file.seek(stream.start)
                    file.truncate()
                    while chunk := _read(stream):
                        self.received += len(chunk)
                        file.write(chunk)
                        self.advance(len(chunk), "")
                        if file.tell() > self.weights.size:
                            self._refuse_size(f"more than {self.weights.size}")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise self._unwritable(error) from error
        if self._have() < self.weights.size:
            raise BrokenTransferError(f"cut after {self._have()} of {self.weights.size} bytes")

    def _refuse_size(self, came: str) -> None:
        self._discard()
        raise DownloadError(
            f"{self.source}: it has {came} bytes; expected {self.weights.size}. It is not the file that the card "
            "describes, and nothing of it was kept. Check the address, or tell whoever published it."
        )

    def _unwritable(self, error: OSError) -> DownloadError:
        self._discard()
        return DownloadError(
            f"{self.part}: cannot be written ({error.strerror or error}); expected a writable folder with "
            f"{self.weights.size / 1e6:.1f} MB free. Make room, or choose another folder with LMH_HOME."
        )

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _discard(self) -> None:
        self.advance(-self._have(), "")
        with contextlib.suppress(OSError):
            self.part.unlink(missing_ok=True)


def small_file(source: LocalFile | WebFile | HubFile, patience: Patience | None = None) -> bytes:
    """Return the bytes of a small file, such as a card; of a larger one the first megabyte.

    Args:
        source: where it lies.
        patience: how often it is tried.

    Raises:
        DownloadError: if it cannot be had.
    """
    patience = patience or Patience()
    failures = 0
    while True:
        try:
            return _whole(source)
        except BrokenTransferError as error:
            failures += 1
            if failures >= patience.tries:
                raise DownloadError(
                    f"{source}: {error}, {failures} times in a row; expected an answer. Check the network (proxies are "
                    "taken from HTTPS_PROXY) and start again."
                ) from error
            time.sleep(patience.wait(failures, error.wait))


def _whole(source: LocalFile | WebFile | HubFile) -> bytes:
    with contextlib.closing(source.open(0)) as stream:
        data = b""
        while len(data) < SMALL and (chunk := _read(stream)):
            data += chunk
        if len(data) < min(SMALL, stream.total or 0):
            raise BrokenTransferError(f"cut after {len(data)} of {stream.total} bytes")
        return data


def _read(stream: Stream) -> bytes:
    try:
        return stream.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise BrokenTransferError(str(error) or type(error).__name__) from error
