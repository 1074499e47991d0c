"""The cache of downloads: its place, its lock, offline mode, and what the Hugging Face Hub sends."""

from __future__ import annotations

import io
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from lmh.errors import ArgumentError, DownloadError
from lmh.home import home
from lmh.zoo import cache, transfer
from lmh.zoo.cache import fetched, resting_place
from lmh.zoo.locations import BrokenTransferError, SecureRedirects, parsed_location
from lmh.zoo.transfer import Weights
from served import DATA, DIGEST, GOOD, QUICK, at, kept
from unruly_server import Cut, Held, Server, Status, unruly_server

pytestmark = pytest.mark.usefixtures("home_folder")

FETCH = """
import sys
from lmh.zoo.cache import fetched
from lmh.zoo.transfer import Weights
print(fetched(Weights(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
"""


def started(server: Server) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FETCH, f"{server.url}/net.safetensors", DIGEST, str(len(DATA))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_half(tmp_path: Path, process: subprocess.Popen[str]) -> None:
    part = tmp_path / "home" / "partial" / f"{DIGEST}.part"
    while not part.exists() or part.stat().st_size < len(DATA) // 2 - transfer.CHUNK:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_two_processes_download_once(server: Server, tmp_path: Path) -> None:
    held = Held()
    server.script = [held]
    first = started(server)
    wait_for_half(tmp_path, first)
    second = started(server)
    assert second.stderr is not None
    assert "another process downloads it; waiting for that" in second.stderr.readline()
    held.gone_on.set()
    printed = [process.communicate() for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], printed
    assert {out.strip() for out, _ in printed} == {str(tmp_path / "home" / "weights" / GOOD)}
    assert server.ranges == [None]
    assert kept(tmp_path) == [GOOD]


def test_a_killed_process_leaves_its_part_and_no_lock(server: Server, tmp_path: Path) -> None:
    held = Held()
    server.script = [held]
    process = started(server)
    wait_for_half(tmp_path, process)
    process.kill()
    process.communicate()
    held.gone_on.set()
    (part,) = kept(tmp_path)
    size = (tmp_path / "home" / "partial" / part).stat().st_size
    assert fetched(at(server), patience=QUICK).read_bytes() == DATA
    assert server.ranges == [None, size]
    assert size > 0


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


HUB = Weights("hf:lab/spiking/deep/net.safetensors@v1", DIGEST, len(DATA))


def test_the_hub_is_asked_like_any_server(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.files["/lab/spiking/resolve/v1/deep/net.safetensors"] = DATA
    server.script = [Cut(70_000), Status(429), Status(500), Cut(0)]
    with pytest.raises(DownloadError, match=r"^hf:lab/.*, 3 times in a row; 70000 of 200000 bytes are there and kept"):
        fetched(HUB, patience=QUICK)
    assert fetched(HUB, patience=QUICK).read_bytes() == DATA
    assert server.ranges == [None, 70_000, 70_000, 70_000, 70_000]
    assert kept(tmp_path) == [GOOD]


def test_the_token_goes_to_the_hub_and_to_no_other_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "https://huggingface.co")
    asked: list[urllib.request.Request] = []

    def refuse(_self: object, request: urllib.request.Request, timeout: float) -> None:
        asked.append(request)
        raise OSError("no network")

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", refuse)
    with pytest.raises(BrokenTransferError, match="no network"):
        parsed_location("hf:lab/spiking/net.safetensors").open(0)  # type: ignore[union-attr]
    assert asked[0].full_url == "https://huggingface.co/lab/spiking/resolve/main/net.safetensors"
    assert asked[0].get_header("Authorization") == "Bearer hf_secret"
    handler = SecureRedirects()
    for host, sent in (("huggingface.co", "Bearer hf_secret"), ("cdn.example.org", None)):
        moved = handler.redirect_request(asked[0], io.BytesIO(), 302, "Found", {}, f"https://{host}/x")
        assert moved is not None
        assert moved.get_header("Authorization") == sent


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
    with pytest.raises(DownloadError, match=r"^hf:.*refused, 3 times in a row; .*Check the network"):
        fetched(HUB, patience=QUICK)
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
    monkeypatch.setattr("lmh.home.sys.platform", system)
    assert home() == Path(expected)
