"""Where a file lies: in the package, on the web, in a folder, or on the Hugging Face Hub."""

from __future__ import annotations

import email.message
import http.client
import io
import os
import re
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .. import __version__
from ..errors import ArgumentError, DownloadError

PACKAGE = Path(__file__).parent / "weights"
KINDS = "package:FILE, https://HOST/FILE, file:///FOLDER/FILE or hf:ORGANISATION/REPOSITORY/FILE"
TIMEOUT = 30.0
BUSY = (408, 425, 429, 500, 502, 503, 504)


class BrokenTransferError(Exception):
    """A transfer that may succeed when it is tried again.

    Attributes:
        wait: seconds that the server asked for, or None.
    """

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


@dataclass(frozen=True)
class Stream:
    """The bytes of a file from some offset on.

    Attributes:
        start: the offset, which may be less than was asked for.
        total: bytes of the whole file, or None where the sender does not say.
        read: returns up to so many bytes, none at the end; may raise OSError and HTTPException.
        close: ends the transfer.
    """

    start: int
    total: int | None
    read: Callable[[int], bytes]
    close: Callable[[], None]


@dataclass(frozen=True)
class Packaged:
    """A file that came with the package; nothing is transferred.

    Attributes:
        path: of the file.
    """

    path: Path


@dataclass(frozen=True)
class LocalFile:
    """A file of this machine, or of a folder that it mounts.

    Attributes:
        path: of the file.
    """

    path: Path

    def __str__(self) -> str:
        return self.path.as_uri()

    def open(self, start: int) -> Stream:
        """Return the bytes from ``start`` on.

        Raises:
            DownloadError: if it is not there.
        """
        try:
            file = io.FileIO(self.path)
        except OSError as error:
            raise DownloadError(
                f"{self}: {error.strerror}; expected a readable file. Check the path, or that the folder is mounted."
            ) from error
        file.seek(start)
        return Stream(start, os.fstat(file.fileno()).st_size, file.read, file.close)


class SecureRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to anything else, and without the user's token to another host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Return the request to make, as urllib asks for it.

        Raises:
            DownloadError: if it would leave https.
        """
        if req.type == "https" and not newurl.lower().startswith("https:"):
            raise DownloadError(
                f"{req.full_url}: is redirected to {newurl}; expected https there as well. Take another source."
            )
        found = super().redirect_request(req, fp, code, msg, headers, newurl)
        if found is not None and found.host != req.host:
            found.remove_header("Authorization")
        return found


@dataclass(frozen=True)
class WebFile:
    """A file of a web server. Proxies come from the environment, as urllib reads them.

    Attributes:
        url: of https, or of http to this machine.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def open(self, start: int) -> Stream:
        """Ask for the bytes from ``start`` on.

        Raises:
            BrokenTransferError: if the server is busy or cannot be reached.
            DownloadError: if it does not have the file.
        """
        return _asked(self, self.url, {}, start, "Check the address, or take another source.")


@dataclass(frozen=True)
class HubFile:
    """A file of a model repository on the Hugging Face Hub; huggingface_hub knows its address and the user's token.

    Attributes:
        repository: ORGANISATION/REPOSITORY.
        file: path in it.
        revision: branch, tag or commit; None for the main branch.
    """

    repository: str
    file: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hf:{self.repository}/{self.file}" + (f"@{self.revision}" if self.revision else "")

    def open(self, start: int) -> Stream:
        """Ask for the bytes from ``start`` on.

        Raises:
            BrokenTransferError: if the Hub is busy or cannot be reached.
            DownloadError: if it does not have the file for this user.
        """
        from huggingface_hub import get_token, hf_hub_url
        from huggingface_hub.errors import HFValidationError

        endpoint = os.environ.get("HF_ENDPOINT") or None
        advice = "Check the name; for a private repository, log in with `hf auth login`."
        try:
            url = hf_hub_url(self.repository, self.file, revision=self.revision, endpoint=endpoint)
        except HFValidationError as error:
            raise DownloadError(f"{self}: {error}; expected the name of a repository. {advice}") from error
        token = get_token()
        return _asked(self, url, {} if token is None else {"Authorization": f"Bearer {token}"}, start, advice)


def _asked(source: WebFile | HubFile, url: str, headers: Mapping[str, str], start: int, advice: str) -> Stream:
    """Ask a web server for the bytes of a file from ``start`` on.

    Args:
        source: for errors.
        url: to ask.
        headers: to send besides.
        start: the first byte.
        advice: what to do if the server does not have the file.
    """
    sent = {"User-Agent": f"lmh-convert/{__version__}", **headers, "Accept-Encoding": "identity"}
    if start:
        sent["Range"] = f"bytes={start}-"
    opener = urllib.request.build_opener(SecureRedirects)  # a new one, for the proxies of the environment now
    try:
        response = opener.open(urllib.request.Request(url, headers=sent), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:
            return source.open(0)
        if error.code in BUSY:
            raise BrokenTransferError(f"{error.code} {error.reason}", _seconds(error.headers)) from error
        raise DownloadError(
            f"{source}: the server answers {error.code} {error.reason}; expected the file. {advice}"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise DownloadError(
                f"{source}: its certificate is not trusted ({reason.verify_message}); expected a valid one. "
                "Behind a proxy, name its certificates with SSL_CERT_FILE."
            ) from error
        raise BrokenTransferError(str(reason) or type(reason).__name__) from error
    offset, total = _extent(response.status, response.headers)
    if offset not in (0, start):
        response.close()
        if start:
            return source.open(0)
        raise DownloadError(
            f"{source}: the server sends a part that nobody asked for; expected the whole file. Take another source."
        )
    return Stream(offset, total, response.read1, response.close)


Location = Packaged | LocalFile | WebFile | HubFile


def parsed_location(text: str) -> Location:
    """Return the location that a text names.

    Args:
        text: ``package:FILE``, ``https://HOST/FILE``, ``http://localhost/FILE``, ``file:///FOLDER/FILE`` or
            ``hf:ORGANISATION/REPOSITORY/FILE``, the last with ``@REVISION`` behind it or not.

    Raises:
        ArgumentError: for anything else.

    >>> parsed_location("hf:some-lab/spiking/resnet20.safetensors@v1")
    HubFile(repository='some-lab/spiking', file='resnet20.safetensors', revision='v1')
    """
    kind, _, rest = text.partition(":")
    if kind == "package" and re.fullmatch(r"[\w.-]+", rest):
        return Packaged(PACKAGE / rest)
    if kind == "hf":
        match = re.fullmatch(r"([\w.-]+/[\w.-]+)/([^@]+)(?:@(.+))?", rest)
        if match:
            return HubFile(*match.groups())
    if kind == "file":
        parts = urllib.parse.urlsplit(text)
        if parts.netloc in ("", "localhost") and parts.path:
            return LocalFile(Path(urllib.request.url2pathname(parts.path)))
    if kind in ("http", "https"):
        host = urllib.parse.urlsplit(text).hostname
        if host and (kind == "https" or host in ("localhost", "127.0.0.1", "::1")):
            return WebFile(text)
        if host:
            raise ArgumentError(
                f"{text}: http is taken from this machine only; expected https. Use https://{text[7:]}."
            )
    raise ArgumentError(f"location {text!r} is not known; expected {KINDS}. Name one of these.")


def _extent(status: int, headers: email.message.Message) -> tuple[int, int | None]:
    """Return the first byte's offset, and the size of the whole file if it is said."""
    if status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        if match is None:
            return -1, None
        return int(match[1]), None if match[2] == "*" else int(match[2])
    length = headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def _seconds(headers: email.message.Message) -> float | None:
    text = headers.get("Retry-After", "")
    return float(text) if text.isdigit() else None
