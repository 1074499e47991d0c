"""Downloads: whatever the server, the network and the disk do, the cache holds good files only."""

from __future__ import annotations

import errno
import io
import os
import random
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lmh.errors import DownloadError
from lmh.home import home
from lmh.terminal import Terminal
from lmh.zoo import locations, transfer
from lmh.zoo.cache import fetched
from lmh.zoo.locations import WebFile
from lmh.zoo.transfer import Patience, Weights
from served import DATA, DIGEST, GOOD, QUICK, at, kept
from unruly_server import (
    Answer,
    Cut,
    Deaf,
    Endless,
    Honest,
    Misplaced,
    Other,
    Server,
    Status,
    Unsaid,
    unruly_server,
)

pytestmark = pytest.mark.usefixtures("home_folder")


@pytest.mark.parametrize(
    ("script", "ranges"),
    [
        ([], [None]),
        ([Cut(1), Cut(70_000)], [None, 1, 70_001]),
        ([Cut(0), Cut(0)], [None, None, None]),
        ([Cut(len(DATA) - 1)], [None, len(DATA) - 1]),
        ([Cut(50_000), Status(500), Status(503), Cut(10)], [None, 50_000, 50_000, 50_000, 50_010]),
        ([Status(429, {"Retry-After": "3600"})], [None, None]),
        ([Cut(50_000), Deaf(20), Cut(5)], [None, 50_000, 20, 25]),
        ([Deaf(9), Deaf(90), Deaf(900), Deaf(9_000), Deaf()], [None, 9, 90, 900, 9_000]),
        ([Unsaid(30), Unsaid()], [None, 30]),
        ([Cut(40_000), Status(416)], [None, 40_000, None]),
        ([Cut(40_000), Misplaced("bytes 7-199999/200000")], [None, 40_000, None]),
        ([Cut(40_000), Misplaced("nowhere")], [None, 40_000, None]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_a_broken_transfer_goes_on_where_it_broke(
    server: Server, tmp_path: Path, script: list[Answer], ranges: list[int | None]
) -> None:
    server.script = script
    path = fetched(at(server), patience=QUICK)
    assert path.read_bytes() == DATA
    assert server.ranges == ranges
    assert kept(tmp_path) == [GOOD]
    assert fetched(at(server)) == path
    assert len(server.ranges) == len(ranges)


def test_whatever_byte_it_is_cut_at_each_byte_comes_once(server: Server, tmp_path: Path) -> None:
    draw = random.Random(1)
    for _ in range(20):
        server.script = [Cut(draw.randrange(len(DATA))) for _ in range(draw.randrange(4))]
        weights, part = at(server), tmp_path / "part"
        job = transfer.Transfer(WebFile(weights.location), weights, part, patience=QUICK)
        job.run()
        assert part.read_bytes() == DATA
        assert job.received == len(DATA)
        part.unlink()


def test_the_next_process_goes_on_with_what_the_last_one_left(server: Server, tmp_path: Path) -> None:
    server.script = [Cut(60_000), Cut(0), Cut(0), Cut(0)]
    with pytest.raises(DownloadError, match=r"3 times in a row; 60000 of 200000 bytes are there and kept for the next"):
        fetched(at(server), patience=QUICK)
    assert kept(tmp_path) == [f"{DIGEST}.part"]
    assert fetched(at(server), patience=QUICK).read_bytes() == DATA
    assert server.ranges[-1] == 60_000
    assert kept(tmp_path) == [GOOD]


def test_a_server_that_gives_a_byte_at_a_time_is_left_in_the_end(server: Server, tmp_path: Path) -> None:
    server.script = [Cut(1)] * 30
    with pytest.raises(DownloadError, match=r"cut after 9 of 200000 bytes, after 9 connections; 9 of 200000 .* kept"):
        fetched(at(server), patience=Patience(connections=9))
    assert kept(tmp_path) == [f"{DIGEST}.part"]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ([Status(404)], "the server answers 404 Not Found; expected the file. Check the address"),
        ([Status(403)], "403 Forbidden"),
        ([Status(500)] * 3, "500 Internal Server Error, 3 times in a row; 0 of 200000 bytes"),
        ([Status(429)] * 3, "429 Too Many Requests, 3 times in a row"),
        ([Other(DATA[:-1] + b"x")], f"expected {DIGEST}. It is not the file that the card describes, and nothing"),
        ([Other(b"<html>")], "it has 6 bytes; expected 200000. It is not the file"),
        ([Endless()], "it has more than 200000 bytes; expected 200000"),
        ([Misplaced("bytes 5-9/200000")], "sends a part that nobody asked for; expected the whole file"),
    ],
    ids=lambda value: " ".join(map(str, value))[:60] if isinstance(value, list) else None,
)
def test_what_cannot_be_had_says_why_and_leaves_nothing(
    server: Server, tmp_path: Path, script: list[Answer], words: str
) -> None:
    server.script = list(script)
    with pytest.raises(DownloadError) as caught:
        fetched(at(server), patience=QUICK)
    assert str(caught.value).startswith(server.url)
    assert words in str(caught.value)
    assert len(server.ranges) == len(script)
    assert kept(tmp_path) == []


def test_pieces_of_two_files_are_thrown_away_and_fetched_once_more(server: Server, tmp_path: Path) -> None:
    changed = bytes(len(DATA))
    part = tmp_path / "home" / "partial" / f"{DIGEST}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(DATA[:100_000])
    server.script = [Other(changed), Other(DATA)]
    assert fetched(at(server), patience=QUICK).read_bytes() == DATA
    assert server.ranges == [100_000, None]
    assert kept(tmp_path) == [GOOD]


@pytest.mark.parametrize("left", [DATA + b"more", bytes(len(DATA))], ids=["too long", "as long"])
def test_a_damaged_part_is_no_use(server: Server, tmp_path: Path, left: bytes) -> None:
    part = tmp_path / "home" / "partial" / f"{DIGEST}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(left)
    assert fetched(at(server), patience=QUICK).read_bytes() == DATA
    assert server.ranges == [None]


def test_a_file_that_went_bad_in_the_cache_is_fetched_again(server: Server) -> None:
    path = fetched(at(server))
    path.write_bytes(DATA[:-1] + bytes([DATA[-1] ^ 1]))
    assert fetched(at(server)).read_bytes() == DATA
    assert len(server.ranges) == 2


def test_waits_grow_and_keep_to_what_the_server_asks(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(transfer.time, "sleep", waits.append)
    server.script = [Status(500), Status(500), Status(429, {"Retry-After": "7"}), Status(503, {"Retry-After": "999"})]
    fetched(at(server))
    assert waits == [0.5, 1.0, 7.0, 30.0]


def test_a_connection_that_falls_silent_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locations, "TIMEOUT", 0.3)
    server.script = [Honest(pause=2.0)]
    assert fetched(at(server), patience=QUICK).read_bytes() == DATA
    assert server.ranges[1] is not None  # it went on after what had come, on a connection of its own


def test_redirects_are_followed_but_not_out_of_https(server: Server) -> None:
    server.script = [Status(302, {"Location": f"{server.url}/net.safetensors"})]
    assert fetched(at(server, "old.safetensors"), patience=QUICK).read_bytes() == DATA
    asked = urllib.request.Request("https://example.org/net.safetensors")
    handler = locations.SecureRedirects()
    with pytest.raises(DownloadError, match=r"is redirected to http://example.org/x; expected https there"):
        handler.redirect_request(asked, io.BytesIO(), 302, "Found", {}, "http://example.org/x")
    assert handler.redirect_request(asked, io.BytesIO(), 302, "Found", {}, "https://example.net/x") is not None


def test_progress_counts_bytes_on_a_terminal(server: Server) -> None:
    terminal, shown = Terminal(), io.StringIO()
    terminal.log = Console(file=shown, force_terminal=True, width=120)
    server.script = [Cut(100_000)]
    fetched(at(server), terminal, QUICK)
    assert "200.0/200.0 kB" in shown.getvalue()
    assert "net.safetensors: done in" in shown.getvalue()


def test_no_network_says_so(tmp_path: Path) -> None:
    with unruly_server({}) as gone:
        weights = at(gone)
    with pytest.raises(
        DownloadError, match=r"refused, 3 times in a row; 0 of 200000 .* Check the network \(proxies are"
    ):
        fetched(weights, patience=QUICK)
    assert kept(tmp_path) == []


@pytest.mark.parametrize("place", [(transfer.os, "fsync"), (Path, "replace"), (Path, "open"), (Path, "mkdir")])
def test_a_full_disk_is_named_and_nothing_bad_stays(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*place, full)
        with pytest.raises(DownloadError, match=r"cannot be written \(No space left on device\).*LMH_HOME"):
            fetched(at(server), patience=QUICK)
    assert GOOD not in kept(tmp_path)
    assert fetched(at(server), patience=QUICK).read_bytes() == DATA


def test_a_disk_that_fills_up_in_the_middle_is_left_as_it_was(server: Server, tmp_path: Path) -> None:
    def fill(count: int, note: str) -> None:
        if part.exists() and count > 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    weights, part = at(server), tmp_path / "part"
    job = transfer.Transfer(WebFile(weights.location), weights, part, fill, QUICK)
    with pytest.raises(DownloadError, match=r"part: cannot be written \(No space left on device\); .* 0.2 MB free"):
        job.run()
    assert not part.exists()


def test_an_unwritable_home_is_named(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LMH_HOME", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match=r"file/locks: cannot be written \(Not a directory\).*LMH_HOME"):
        fetched(at(server))


def test_a_proxy_of_the_environment_is_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    far = Weights("http://localhost:9/net.safetensors", DIGEST, len(DATA))
    assert fetched(far, patience=QUICK).read_bytes() == DATA
    assert server.paths == ["http://localhost:9/net.safetensors"]


def test_a_file_of_this_machine_is_copied_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMH_OFFLINE", "1")
    source = tmp_path / "a folder" / "net.safetensors"
    source.parent.mkdir()
    source.write_bytes(DATA)
    weights = Weights(source.as_uri(), DIGEST, len(DATA))
    path = fetched(weights)
    assert path.read_bytes() == DATA
    path.unlink()
    source.write_bytes(bytes(len(DATA)))
    with pytest.raises(DownloadError, match="its sha256 is"):
        fetched(weights)
    source.unlink()
    with pytest.raises(DownloadError, match=r"No such file or directory; expected a readable file. Check the path"):
        fetched(weights)
    assert kept(tmp_path) == []


def test_the_cache_alone_would_not_notice_a_bad_file(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check of the hash the wrong file would be taken: the tests above see it."""
    monkeypatch.setattr(transfer, "file_digest", lambda _: DIGEST)
    server.script = [Other(bytes(len(DATA)))]
    assert fetched(at(server)).read_bytes() != DATA
    assert os.listdir(home() / "weights") == [GOOD]
