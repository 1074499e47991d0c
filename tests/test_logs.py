"""Logs and progress: JSON lines, TensorBoard where it is installed, and a callback with the pace."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import nets
from lmh import LMH, PerStep
from lmh.convert import convert
from lmh.errors import ArgumentError, ArtifactError
from lmh.finetune import Checkpoint, Hybrid, JSONLines, Progress, Schedule, TensorBoard, finetune, fit

BATCHES = [(torch.rand(4, 4), torch.tensor([0, 1, 2, 0])) for _ in range(5)]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_progress_has_pace_time_left_and_memory() -> None:
    told: list[Progress] = []
    schedule = Schedule(epochs=2, lr=0.1, warmup_steps=2)
    fit(nets.two_layers(), BATCHES, None, schedule, on_progress=told.append)
    assert [(p.epoch, p.batch, p.step) for p in told] == [(e, b, 5 * e + b) for e in range(2) for b in range(5)]
    assert {(p.stage, p.epochs, p.batches) for p in told} == {("ANN", 2, 5)}
    assert all(p.images_per_second > 0 for p in told)
    assert told[0].seconds_left > 0
    assert told[-1].seconds_left == 0
    assert told[-1].memory_mb is None or told[-1].memory_mb > 50


def test_the_pace_counts_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("lmh.finetune.log.time.perf_counter", lambda: now[0])

    def step(progress: Progress) -> None:
        told.append(progress)

    def validate(_result: object) -> None:
        now[0] += 1000

    class Slow:
        def __iter__(self) -> Any:
            for batch in BATCHES:
                now[0] += 2
                yield batch

    told: list[Progress] = []
    fit(nets.two_layers(), Slow(), None, Schedule(epochs=2), on_progress=step, on_epoch=validate)
    assert {p.images_per_second for p in told} == {2.0}
    assert [p.seconds_left for p in told[-3:]] == [4.0, 2.0, 0.0]


class TestJSONLines:
    def test_every_batch_and_epoch_of_both_stages_has_a_line(self, tmp_path: Path) -> None:
        file = tmp_path / "run.jsonl"
        hybrid = Hybrid(qcfs=Schedule(epochs=1))
        tuned = finetune(
            nets.two_layers(), BATCHES, BATCHES, timesteps=2, strategy=hybrid, epochs=2, logs=[JSONLines(file)]
        )
        found = lines(file)
        kinds = [(line["event"], line["stage"]) for line in found]
        assert kinds == [
            ("start", "QCFS"), *[("batch", "QCFS")] * 5, ("epoch", "QCFS"),
            ("start", "STBP"), *[("batch", "STBP")] * 5, ("epoch", "STBP"), *[("batch", "STBP")] * 5, ("epoch", "STBP"),
        ]  # fmt: skip
        assert found[-1]["val_accuracy"] == tuned[-1].val_accuracy
        assert found[-1]["neurons"]["1"]["lambda_s"] == list(tuned[-1].neurons["1"]["lambda_s"])
        assert {"loss", "lr", "images_per_second", "memory_mb"} <= found[1].keys()

    def test_lines_may_be_fewer(self, tmp_path: Path) -> None:
        file = tmp_path / "run.jsonl"
        fit(nets.two_layers(), BATCHES, None, Schedule(epochs=2), logs=[JSONLines(file, every=4)])
        assert [(line["epoch"], line["batch"]) for line in lines(file) if line["event"] == "batch"] == [
            (0, 0), (0, 4), (1, 3)
        ]  # fmt: skip

    def test_a_resumed_run_says_from_where_and_mends_a_torn_line(self, tmp_path: Path) -> None:
        file, network = tmp_path / "run.jsonl", nets.two_layers()
        start = {name: tensor.clone() for name, tensor in network.state_dict().items()}

        def stop(_epoch: int, index: int, _loss: float) -> None:
            if index == 3:
                raise KeyboardInterrupt

        kept = Checkpoint(tmp_path / "run", steps=1)
        with pytest.raises(KeyboardInterrupt):
            fit(network, BATCHES, None, Schedule(epochs=1), checkpoint=kept, on_batch=stop, logs=[JSONLines(file)])
        with file.open("a") as stream:
            stream.write('{"event": "ba')
        network.load_state_dict(start)
        fit(network, BATCHES, None, Schedule(epochs=1), checkpoint=kept, logs=[JSONLines(file)])
        text = file.read_text().splitlines()
        assert text[4] == '{"event": "ba'
        again = [json.loads(line) for line in text[5:]]
        assert (again[0]["event"], again[0]["epoch"], again[0]["batch"]) == ("start", 0, 3)
        assert [line["batch"] for line in again if line["event"] == "batch"] == [3, 4]

    def test_a_place_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        log = JSONLines(tmp_path / "missing" / "run.jsonl")
        with pytest.raises(ArtifactError, match=r"run\.jsonl: the log cannot be written.*Name another file"):
            fit(nets.two_layers(), BATCHES, None, Schedule(epochs=1), logs=[log])


class TestTensorBoard:
    def test_without_the_package_it_says_what_to_install(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(ArgumentError, match=r"`pip install tensorboard`, or use JSONLines"):
            fit(nets.two_layers(), BATCHES, None, Schedule(epochs=1), logs=[TensorBoard(tmp_path)])

    def test_curves_of_loss_accuracy_and_every_parameter(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        points: list[tuple[str, int]] = []

        class SummaryWriter:
            def __init__(self, folder: str) -> None:
                assert folder == str(tmp_path)

            def add_scalar(self, name: str, value: float, step: int) -> None:
                assert isinstance(value, float)
                points.append((name, step))

            def add_text(self, name: str, text: str) -> None:
                points.append((name, 0))

            def close(self) -> None:
                points.append(("closed", 0))

        module = ModuleType("torch.utils.tensorboard")
        module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
        snn = convert(nets.two_layers(), 2, data=BATCHES, neuron=LMH(granularity=PerStep())).snn
        finetune(snn, BATCHES, BATCHES, epochs=2, logs=[TensorBoard(tmp_path, every=5)])
        assert points[0] == ("STBP/start", 0)
        assert points[-1] == ("closed", 0)
        for name in ("STBP/loss", "STBP/lr", "STBP/images_per_second"):
            assert [step for found, step in points if found == name] == [0, 5]
        for name in ("STBP/val_accuracy", "STBP/lambda_s/1/t1", "STBP/mu_d/1/t2", "STBP/v_init/1"):
            assert [step for found, step in points if found == name] == [0, 1]

    def test_the_real_one_writes_a_file(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        fit(nets.two_layers(), BATCHES, None, Schedule(epochs=1), logs=[TensorBoard(tmp_path)])
        assert [path for path in tmp_path.iterdir() if "tfevents" in path.name]


@pytest.mark.parametrize("logs", [JSONLines("x"), [JSONLines], ["run.jsonl"], "run.jsonl"])
def test_what_is_no_series_of_logs_is_refused(logs: Any) -> None:
    with pytest.raises(ArgumentError, match=r'expected a series of logs\. Pass \[JSONLines\("run\.jsonl"\)\], say'):
        fit(nets.two_layers(), BATCHES, None, Schedule(epochs=1), logs=logs)
