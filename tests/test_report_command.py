"""The page that lmh-convert and lmh report write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from commands import command, succeed
from lmh.convert.storage import load_conversion
from lmh.report import NetworkReport
from lmh.zoo import Batches


def test_a_conversion_with_training_reports_everything(tmp_path: Path) -> None:
    page, net = tmp_path / "net.html", tmp_path / "net.safetensors"
    printed = succeed(
        "convert", "zoo:digits-cnn", "-T", 2, "--data", "digits", "--finetune", 1, "--train-samples", 64,
        "--test-samples", 50, "--report", page, "--output", net, "--json",
    )  # fmt: skip
    assert printed.result["report"] == str(page)
    found = NetworkReport.from_json(json.loads(page.with_name(f"{page.name}.json").read_text()))
    assert [len(stage["epochs"]) for stage in found.training] == [1]
    assert found.training[0]["epochs"][0]["neurons"].keys() == {site["path"] for site in found.result["sites"]}
    assert found.facts["data"] == "digits"
    assert "The report has no training." not in page.read_text()
    again = tmp_path / "again.html"
    printed = succeed("report", net, "--data", "digits", "--test-samples", 50, "--html", again)
    assert f"Report: {again}" in printed.out
    later = NetworkReport.from_json(json.loads(again.with_name(f"{again.name}.json").read_text()))
    assert later.result["snn_accuracy"] == found.result["snn_accuracy"]
    assert later.training == found.training
    assert "made_by: " in again.read_text()


def test_a_report_needs_no_data(tmp_path: Path) -> None:
    page = tmp_path / "net.html"
    result = succeed("report", "zoo:digits-cnn-t4", "--html", page, "--json").result
    assert result["samples"] is None
    assert "Give data (--data)." in page.read_text()


@pytest.mark.parametrize(("option", "value"), [("--deploy", "int8"), ("--early-exit", "0.9")])
def test_what_measures_needs_data(option: str, value: str) -> None:
    printed = command("report", "zoo:digits-cnn-t4", option, value)
    assert printed.status == 2
    assert f"{option} needs --data" in printed.err


@pytest.mark.parametrize("page", ["net.pdf", "gone/net.html"])
def test_a_page_that_cannot_be_written_is_refused_before_the_work(page: str, tmp_path: Path) -> None:
    printed = command("report", "zoo:digits-cnn-t4", "--data", "digits", "--html", tmp_path / page)
    assert printed.status == 2
    assert "expected a" in printed.err


def test_the_saved_network_loads_with_the_anns_weights(digits_ann: nn.Module, digits_test: Batches) -> None:
    conversion = load_conversion("zoo:digits-cnn-t4", digits_ann)
    x, _ = next(iter(digits_test))
    with torch.no_grad():
        assert torch.allclose(conversion.prepared.model(x), digits_ann(x), atol=1e-5)
