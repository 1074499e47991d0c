""".pt2 files of torch.export.save: read with trust, compared with their program, and refused with advice."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from exports import worst
from lmh import sites
from lmh.convert import convert
from lmh.convert.exported import read_exported
from lmh.convert.exported.aten import TABLE
from lmh.errors import SourceError, UnsafePickleError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's own


@pytest.fixture
def pt2(tmp_path: Path) -> Path:
    """A network with tied weights and a temporary buffer, exported for one batch size."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    model[2].weight = model[0].weight
    torch.manual_seed(1)
    torch.export.save(torch.export.export(model, (torch.rand(2, 4),)), tmp_path / "net.pt2")
    torch.save(model, tmp_path / "net.pt")
    return tmp_path / "net.pt2"


def test_a_pt2_file_round_trips_with_trust(pt2: Path) -> None:
    model = torch.load(pt2.with_suffix(".pt"), weights_only=False)
    graph = read_exported(pt2, trust_pickle=True)
    assert worst(graph, model, (4,)) < 1e-5
    assert graph.state_dict().keys() == model.state_dict().keys()
    assert graph.get_submodule("0").weight is graph.get_submodule("2").weight
    assert list(sites(convert(graph, 4, data=torch.rand(8, 4)).snn)) == ["1"]
    with torch.no_grad():
        graph.get_submodule("0").weight.mul_(1.1)
    assert worst(graph, model, (4,)) > 1e-3


def test_a_pt2_file_without_trust_is_not_loaded(pt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export, "load", lambda path: pytest.fail("loaded"))
    with pytest.raises(UnsafePickleError, match=r"can run code.*--trust-pickle.*state_dict"):
        read_exported(pt2)


def rewritten(source: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    target = source.with_name("changed.pt2")
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def newer(name: str, content: bytes) -> bytes:
    if not name.endswith("model.json"):
        return content
    header = json.loads(content)
    header["schema_version"]["major"] += 1
    return json.dumps({**header, "torch_version": "9.9"}).encode()


def unknown_operator(name: str, content: bytes) -> bytes:
    return content.replace(b"torch.ops.aten.relu.default", b"torch.ops.mine.relu.default")


def graphless(name: str, content: bytes) -> bytes | None:
    return None if "models/" in name else content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (newer, r"written by torch 9.9 \(format \d+\.\d+\).*Export it again"),
        (unknown_operator, r"cannot read it.*written by torch.*import that package"),
        (graphless, r"an archive without an exported program.*torch.export.save"),
    ],
)
def test_other_pt2_files_are_explained(pt2: Path, change: Callable[[str, bytes], bytes | None], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read_exported(rewritten(pt2, change), trust_pickle=True)


@pytest.mark.parametrize("cut", [0, 10, 2000])
def test_a_damaged_pt2_file_is_explained(pt2: Path, cut: int) -> None:
    damaged = pt2.with_name("damaged.pt2")
    damaged.write_bytes(pt2.read_bytes()[:cut])
    with pytest.raises(SourceError, match=r"damaged.*again"):
        read_exported(damaged, trust_pickle=True)
    flipped = bytearray(pt2.read_bytes())
    flipped[len(flipped) // 3] ^= 0xFF
    damaged.write_bytes(flipped)
    with pytest.raises(SourceError):
        read_exported(damaged, trust_pickle=True)


def test_a_missing_pt2_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        read_exported(tmp_path / "none.pt2", trust_pickle=True)


def test_a_file_whose_graph_would_answer_differently_is_refused(pt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, "relu", lambda a: a.self)
    with pytest.raises(SourceError, match="answers differently"):
        read_exported(pt2, trust_pickle=True)
