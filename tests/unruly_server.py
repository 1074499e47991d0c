"""A web server of this machine that misbehaves as it is told: one answer for each request, then honest ones."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol


class Answer(Protocol):
    """What the server does with one GET."""

    def give(self, handler: BaseHTTPRequestHandler, data: bytes, start: int | None) -> None: ...


def head(handler: BaseHTTPRequestHandler, data: bytes, start: int | None) -> bytes:
    """Send the headers of an honest answer, and return the bytes to follow."""
    handler.send_response(200 if start is None else 206)
    if start is not None:
        handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
    handler.send_header("Content-Length", str(len(data) - (start or 0)))
    handler.end_headers()
    return data[start or 0 :]


@dataclass(frozen=True)
class Honest:
    """All that was asked for, with a pause or not."""

    pause: float = 0.0

    def give(self, handler: BaseHTTPRequestHandler, data: bytes, start: int | None) -> None:
        body = head(handler, data, start)
        handler.wfile.write(body[: len(body) // 2])
        if self.pause:
            time.sleep(self.pause)
        handler.wfile.write(body[len(body) // 2 :])


@dataclass(frozen=True)
class Held:
    """Half of what was asked for, and the rest when it is let go."""

    gone_on: threading.Event = field(default_factory=threading.Event)

    def give(self, handler: BaseHTTPRequestHandler, data: bytes, start: int | None) -> None:
        body = head(handler, data, start)
        handler.wfile.write(body[: len(body) // 2])
        self.gone_on.wait()
        handler.wfile.write(body[len(body) // 2 :])


@dataclass(frozen=True)
class Misplaced:
    """A part that was not asked for, or says nothing of where it belongs."""

    extent: str

    def give(self, handler: BaseHTTPRequestHandler, data: bytes, start: int | None) -> None:
        handler.send_response(206)
        handler.send_header("Content-Range", self.extent)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)


@dataclass(frozen=True)
class Cut:
    """The connection ends after so many bytes."""

    after: int

    def give(self, handler: BaseHTTPRequestHandler, data: bytes, start: int | None) -> None:
        handler.wfile.write(head(handler, data, start)[: self.after])


@dataclass(frozen=True)
class Deaf:
    """Does not hear of ranges: everything from the start, whole or cut."""

    after: int | None = None

    def give(self, handler: BaseHTTPRequestHandler, data: bytes, start: int | None) -> None:
        handler.wfile.write(head(handler, data, None)[: self.after])


@dataclass(frozen=True)
class Status:
    """An error."""

    code: int
    headers: Mapping[str, str] = field(default_factory=dict)

    def give(self, handler: BaseHTTPRequestHandler, data: bytes, start: int | None) -> None:
        handler.send_response(self.code)
        for name, value in {"Content-Length": "4", **self.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(b"oops")


@dataclass(frozen=True)
class Other:
    """Another file in the place of the right one."""

    data: bytes

    def give(self, handler: BaseHTTPRequestHandler, data: bytes, start: int | None) -> None:
        handler.wfile.write(head(handler, self.data, start))


@dataclass(frozen=True)
class Endless:
    """No length is said, and far more comes than there should."""

    def give(self, handler: BaseHTTPRequestHandler, data: bytes, start: int | None) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(data + data)


@dataclass(frozen=True)
class Unsaid:
    """No length is said: the end of the connection is the end of the file, whole or cut."""

    after: int | None = None

    def give(self, handler: BaseHTTPRequestHandler, data: bytes, start: int | None) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(data[: self.after])


@dataclass
class Server:
    """The server while it runs.

    Attributes:
        files: their bytes by path, ``/weights.safetensors``.
        script: what to do with the next requests.
        ranges: of the requests so far, None where there was none.
        paths: of the requests so far, as they came.
        url: of its root.
    """

    files: dict[str, bytes]
    script: list[Answer] = field(default_factory=list)
    ranges: list[int | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    url: str = ""

    def next_answer(self, path: str, start: int | None) -> Answer:
        self.paths.append(path)
        self.ranges.append(start)
        return self.script.pop(0) if self.script else Honest()


@contextmanager
def unruly_server(files: dict[str, bytes]) -> Iterator[Server]:
    """Serve some files."""
    server = Server(files)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(match[1]) if match else None
            answer = server.next_answer(self.path, start)
            data = server.files.get(re.sub(r"^http://[^/]+", "", self.path))
            if data is None and not isinstance(answer, Status):
                answer = Status(404)
            elif data is not None and start is not None and start >= len(data) and isinstance(answer, Honest):
                answer = Status(416)
            try:
                answer.give(self, data or b"", start)
            except (BrokenPipeError, ConnectionResetError):
                return

        def log_message(self, *parts: Any) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{web.server_port}"
    try:
        yield server
    finally:
        web.shutdown()
        web.server_close()
        thread.join()
