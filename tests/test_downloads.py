"""Downloads: whatever the server, the network and the disk do, the cache holds good files only."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lmh.errors import ArgumentError, DownloadError
from lmh.terminal import Terminal
from lmh.zoo import cache, locations, transfer
from lmh.zoo.cache import fetched, resting_place
from lmh.zoo.locations import WebFile
from lmh.zoo.transfer import Patience, Weights
from unruly_server import Answer, Cut, Deaf, Endless, Honest, Other, Server, Status, Unsaid, unruly_server

DATA = random.Random(0).randbytes(200_000)
DIGEST = hashlib.sha256(DATA).hexdigest()
QUICK = Patience(tries=3, first_wait=0.0, longest_wait=0.0)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMH_HOME", str(tmp_path / "home"))
    for name in (*cache.OFFLINE, "HF_ENDPOINT", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Server]:
    with unruly_server({"/net.safetensors": DATA}) as running:
        yield running


def at(server: Server, name: str = "net.safetensors") -> Weights:
    return Weights(f"{server.url}/{name}", DIGEST, len(DATA))


def kept(tmp_path: Path) -> list[str]:
    """What the home holds besides locks."""
    return sorted(path.name for path in (tmp_path / "home").rglob("*") if path.is_file() and path.suffix != ".lock")


GOOD = f"{DIGEST[:16]}-net.safetensors"


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


FETCH = """
import sys
from lmh.zoo.cache import fetched
from lmh.zoo.transfer import Weights
print(fetched(Weights(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
"""


def test_two_processes_download_once(server: Server, tmp_path: Path) -> None:
    server.script = [Honest(pause=3.0)] * 2
    command = [sys.executable, "-c", FETCH, f"{server.url}/net.safetensors", DIGEST, str(len(DATA))]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert {out.strip() for out, _ in printed} == {str(tmp_path / "home" / "weights" / GOOD)}
    assert server.ranges == [None]
    assert kept(tmp_path) == [GOOD]


@pytest.mark.parametrize("variable", cache.OFFLINE)
def test_offline_nothing_is_asked_for(server: Server, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(DownloadError, match=rf"{variable} forbids to download it; expected it there. Unset {variable}"):
        fetched(at(server))
    assert server.ranges == []
    monkeypatch.delenv(variable)
    path = fetched(at(server))
    monkeypatch.setenv(variable, "1")
    assert fetched(at(server)) == path


def test_a_proxy_of_the_environment_is_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    far = Weights("http://localhost:9/net.safetensors", DIGEST, len(DATA))
    assert fetched(far, patience=QUICK).read_bytes() == DATA
    assert server.paths == ["http://localhost:9/net.safetensors"]


HUB = Weights("hf:lab/spiking/deep/net.safetensors@v1", DIGEST, len(DATA))


def test_the_hub_is_asked_through_its_own_library(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(transfer.time, "sleep", lambda seconds: None)
    server.files["/lab/spiking/resolve/v1/deep/net.safetensors"] = DATA
    server.script = [Cut(70_000)]
    assert fetched(HUB, patience=QUICK).read_bytes() == DATA
    assert kept(tmp_path) == [GOOD]
    assert list((tmp_path / "home" / "partial").iterdir()) == []


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (bytes(len(DATA)), "its sha256 is"),
        (DATA[:-1], "it has 199999 bytes; expected 200000"),
        (None, "404 .*; expected the file. Check the name; for a private repository, log in with `hf auth login`"),
    ],
    ids=["another file", "another size", "no file"],
)
def test_a_wrong_file_of_the_hub_is_refused(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes | None, words: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    if data is not None:
        server.files["/lab/spiking/resolve/v1/deep/net.safetensors"] = data
    with pytest.raises(DownloadError, match=f"^hf:lab/spiking/deep/net.safetensors@v1: .*{words}"):
        fetched(HUB, patience=QUICK)
    assert kept(tmp_path) == []


def test_a_hub_that_cannot_be_reached_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with unruly_server({}) as gone:
        monkeypatch.setenv("HF_ENDPOINT", gone.url)
    monkeypatch.setattr(transfer.time, "sleep", lambda seconds: None)  # its library waits for half a minute
    with pytest.raises(DownloadError, match=r"^hf:.*; expected an answer of the Hub. Check the network"):
        fetched(HUB, patience=QUICK)
    assert GOOD not in kept(tmp_path)


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


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("https://example.org/net.pt", "is not a .safetensors file; expected one, as other formats can run code"),
        (
            "http://example.org/net.safetensors",
            "http is taken from this machine only; expected https. Use https://exam",
        ),
        ("ftp://example.org/net.safetensors", "is not known; expected package:FILE, https://HOST/FILE"),
        ("file://elsewhere/net.safetensors", "is not known"),
        ("hf:net.safetensors", "is not known"),
        ("package:../../net.safetensors", "is not known"),
    ],
)
def test_other_locations_are_refused(location: str, words: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        fetched(Weights(location, DIGEST, len(DATA)))
    assert location in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("https://example.org/a/net.safetensors?download=true", GOOD),
        ("hf:lab/spiking/deep/net.safetensors@v1.0", GOOD),
        ("file:///tmp/net.safetensors", GOOD),
    ],
)
def test_the_place_in_the_cache_is_named_by_hash_and_file(location: str, name: str, tmp_path: Path) -> None:
    assert resting_place(Weights(location, DIGEST, len(DATA))) == tmp_path / "home" / "weights" / name


@pytest.mark.parametrize(
    ("system", "variables", "expected"),
    [
        ("linux", {"HOME": "/h"}, "/h/.cache/lmh"),
        ("linux", {"HOME": "/h", "XDG_CACHE_HOME": "/c"}, "/c/lmh"),
        ("darwin", {"HOME": "/h"}, "/h/Library/Caches/lmh"),
        ("win32", {"HOME": "/h", "LOCALAPPDATA": "/l"}, "/l/lmh"),
        ("linux", {"HOME": "/h", "LMH_HOME": "~/weights"}, "/h/weights"),
    ],
)
def test_the_home_is_in_the_users_cache_folder(
    system: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LMH_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cache.sys, "platform", system)
    assert cache.home() == Path(expected)


def test_the_cache_alone_would_not_notice_a_bad_file(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check of the hash the wrong file would be taken: the tests above see it."""
    monkeypatch.setattr(transfer, "file_digest", lambda _: DIGEST)
    server.script = [Other(bytes(len(DATA)))]
    assert fetched(at(server)).read_bytes() != DATA
    assert os.listdir(cache.home() / "weights") == [GOOD]
