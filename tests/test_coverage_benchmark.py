"""The coverage benchmark's own logic: it goes on from its log, and its figures count what they say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from lmh import sites
from lmh.calibrate import Max
from lmh.convert import convert

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "torchvision_coverage.py"


@pytest.fixture
def coverage(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("torchvision_coverage", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "torchvision_coverage", module)
    spec.loader.exec_module(module)
    return module


def test_it_goes_on_from_its_log(coverage: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, tuple[int, ...]]] = []

    def fake(name: str, settings: object) -> object:
        ran.append((name, settings.timesteps))  # type: ignore[attr-defined]
        return coverage.Outcome(name, coverage.FULL, 1.0, cosine={"4": 0.5, "8": 0.97}, wrong_twin=0.1)

    monkeypatch.setattr(coverage, "outcome_of", fake)

    def run(*options: str) -> list[str]:
        result = CliRunner().invoke(coverage.main, ["--log", str(tmp_path / "log.jsonl"), "--timesteps", *options])
        assert result.exit_code == 0, result.output
        return result.output.strip().splitlines()

    first = run("4,8", "--models", "a,b")
    again = run("4,8", "--models", "a,b,c")
    assert ran == [("a", (4, 8)), ("b", (4, 8)), ("c", (4, 8))]
    assert again[1:3] == first[1:3]
    assert json.loads(again[-1])["models"] == 3
    run("4,8", "--models", "a,b", "--table", str(tmp_path / "table.md"))
    page = (tmp_path / "table.md").read_text()
    assert "| a | fully spiking | 100.0 % | 0.500 | 0.970 | 0.100 |  |  |" in page
    assert json.loads(page.splitlines()[-1])["models"] == 2
    run("2,8", "--models", "a")
    assert ran[-1] == ("a", (2, 8))


def test_its_figures(coverage: ModuleType) -> None:
    outcomes = [
        coverage.Outcome("good", coverage.FULL, 1.0, cosine={"32": 0.6, "128": 0.96}, wrong_twin=0.2),
        coverage.Outcome("falls", coverage.FULL, 1.0, cosine={"32": 0.6, "128": 0.5}, wrong_twin=0.45),
        coverage.Outcome("gates", coverage.SURGERY, 0.7, "sigmoid"),
        coverage.Outcome("large", coverage.SURGERY, 0.7, "sigmoid", prepared_only=True),
        coverage.Outcome("no", coverage.REFUSED, reason="why"),
        coverage.Outcome("oops", "traceback", reason="KeyError"),
    ]
    assert coverage.summary(outcomes) == {
        "models": 6, "accounted": 5, "fully_spiking": 2, "compared": 2, "cosine_pass": 1, "cosine_rises": 1,
        "wrong_twin_below": 1, "converted": 3, "prepared_only": ["large"], "refused": 1, "tracebacks": 1,
    }  # fmt: skip


def test_its_measures_tell_a_good_network_from_a_spoilt_one(coverage: ModuleType) -> None:
    ann = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    x = torch.randn(16, 3, 8, 8)
    expected = ann(x).detach()
    conversion = convert(ann, 64, data=x, calibration=Max())
    early, late = coverage.cosines(conversion, expected, x, (2, 64))
    assert early < late
    assert late > 0.98
    rounded = coverage.rounded_ann(conversion, expected, x, 64)
    assert rounded > 0.99
    assert coverage.rounded_ann(conversion, expected, x, 2) < rounded
    before = [site.v_threshold.clone() for site in sites(conversion.snn).values()]
    assert coverage.wrong_twin(conversion, expected, x, 64) < late - 0.1
    after = [site.v_threshold for site in sites(conversion.snn).values()]
    assert all(torch.allclose(old / 4, new) for old, new in zip(before, after, strict=True))
