"""Download files from a server that cuts every transfer at a random byte, and count what came more than once.

    python benchmarks/downloads.py --downloads 50

The server runs in this process. For each connection it draws a byte of the whole file and ends there, if the client
still lacks that byte; now and then it forgets that it was asked for a part and begins anew, so that bytes come again.
Every file has other bytes, so that the cache helps nobody. A file is good if the one in the cache has its sha256.
Prints each download, and as the last line one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import re
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click

from lmh import __version__
from lmh.artifact import file_digest
from lmh.home import home
from lmh.terminal import Terminal
from lmh.zoo.cache import fetched
from lmh.zoo.transfer import Patience, Weights


@dataclass
class Cutter:
    """The server's mind.

    Attributes:
        draw: where it cuts.
        forgets: share of the requests for a part that it answers with the whole.
        files: their bytes by path.
        sent: bytes so far.
        connections: so far.
        cuts: connections that it ended early.
    """

    draw: random.Random
    forgets: float
    files: dict[str, bytes] = field(default_factory=dict)
    sent: int = 0
    connections: int = 0
    cuts: int = 0

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one GET."""
        data = self.files[handler.path]
        match = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        start = int(match[1]) if match and self.draw.random() >= self.forgets else 0
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        handler.send_header("Content-Length", str(len(data) - start))
        handler.end_headers()
        cut = self.draw.randrange(len(data))
        end = cut if cut >= start else len(data)
        handler.wfile.write(data[start:end])
        self.connections += 1
        self.cuts += end < len(data)
        self.sent += end - start


def serve(cutter: Cutter) -> ThreadingHTTPServer:
    """Start the server on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            cutter.answer(self)

        def log_message(self, *parts: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


@click.command()
@click.option("--downloads", default=50, show_default=True)
@click.option("--size", default=1_000_000, show_default=True, help="Bytes of a file.")
@click.option("--forgets", default=0.1, show_default=True, help="Share of ranges that the server forgets.")
@click.option("--seed", default=0, show_default=True, help="Of the files and the cuts.")
@click.option("--quick", is_flag=True, help="Five small files.")
def main(downloads: int, size: int, forgets: float, seed: int, quick: bool) -> None:
    """Download again and again from a server that cuts every transfer."""
    if quick:
        downloads, size = 5, 50_000
    print(f"seed {seed}, {downloads} downloads of {size} bytes, {forgets:.0%} of ranges forgotten, lmh {__version__}, "
          f"Python {platform.python_version()}, {platform.machine()}")  # fmt: skip
    draw = random.Random(seed)
    cutter = Cutter(draw, forgets)
    server = serve(cutter)
    terminal = Terminal()
    terminal.log.quiet = True
    good, started = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"LMH_HOME": folder, "no_proxy": "127.0.0.1"}
        for index in range(downloads):
            path, data = f"/{index}.safetensors", draw.randbytes(size)
            cutter.files = {path: data}
            before, cuts = cutter.sent, cutter.cuts
            url = f"http://127.0.0.1:{server.server_port}{path}"
            weights = Weights(url, hashlib.sha256(data).hexdigest(), size)
            found = fetched(weights, terminal, Patience(tries=20, first_wait=0.01))
            good += file_digest(found) == weights.sha256
            print(f"  {index + 1}: cut {cutter.cuts - cuts} times, {cutter.sent - before - size} bytes came again")
        left = sum(1 for file in Path(home(), "partial").iterdir() if file.is_file())
    server.shutdown()
    again = cutter.sent - downloads * size
    facts = {
        "downloads": downloads,
        "good": good,
        "cuts": cutter.cuts,
        "connections": cutter.connections,
        "bytes": downloads * size,
        "bytes_again": again,
        "share_again": round(again / (downloads * size), 4),
        "parts_left": left,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(f"{good} of {downloads} files are good; {again} bytes ({again / downloads / size:.1%}) came again")
    print(json.dumps(facts))
    sys.exit(0 if good == downloads and left == 0 else 1)


if __name__ == "__main__":
    main()
