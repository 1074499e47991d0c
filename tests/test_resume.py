"""A run that is killed goes on to the same weights, bit for bit."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import nets
from lmh import Kernel, use_kernel, zoo
from lmh.artifact import read_tensors
from lmh.convert import convert
from lmh.errors import ArgumentError, ArtifactError, TrainingError
from lmh.finetune import (
    EMA,
    SLTT,
    STBP,
    Checkpoint,
    CutMix,
    EarlyStopping,
    Mixup,
    Schedule,
    TimeSliced,
    finetune,
    fit,
)
from lmh.finetune.strategies import Strategy
from lmh.zoo import Batches, CropFlip, DataSet


@pytest.fixture
def train(digits: DataSet) -> Batches:
    preprocessing = zoo.card("digits-cnn").preprocessing
    way = CropFlip(1, False)
    return Batches(digits.train, preprocessing, 16, torch.arange(72), augmentation=way, shuffle_seed=3)


class StopAt:
    """Breaks a run after so many batches."""

    def __init__(self, batch: int) -> None:
        self.left = batch

    def __call__(self, _epoch: int, _index: int, _loss: float) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


EVERYTHING = Schedule(
    epochs=3, warmup_steps=4, mixing=(Mixup(), CutMix()), ema=EMA(0.9), early_stopping=EarlyStopping(2), seed=5
)


@pytest.mark.parametrize("stop", [1, 4, 5, 7, 14])
@pytest.mark.parametrize("steps", [1, 3, None])
def test_a_broken_run_resumes_in_the_middle_of_an_epoch(
    digits_ann: nn.Module, train: Batches, tmp_path: Path, steps: int | None, stop: int
) -> None:
    whole, broken, resumed = (copy.deepcopy(digits_ann) for _ in range(3))
    kept = Checkpoint(tmp_path / "run.safetensors", steps=steps)
    expected = fit(whole, train, train, EVERYTHING)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, train, train, EVERYTHING, checkpoint=kept, on_batch=StopAt(stop))
    torch.manual_seed(99)
    told: list[tuple[int, int]] = []
    history = fit(
        resumed,
        train,
        train,
        EVERYTHING,
        checkpoint=kept,
        on_batch=lambda epoch, index, _loss: told.append((epoch, index)),
    )
    assert nets.same(whole, resumed)
    assert history == expected
    done = stop - 1 if steps == 1 else (stop - 1) // 3 * 3 if steps else (stop - 1) // 5 * 5
    done = max(done, (stop - 1) // 5 * 5)
    assert len(told) == 15 - done


@pytest.mark.parametrize("strategy", [STBP(), TimeSliced(1), SLTT()], ids=str)
def test_every_strategy_resumes(digits_ann: nn.Module, train: Batches, tmp_path: Path, strategy: Strategy) -> None:
    snn = convert(digits_ann, 2, data=train).snn
    whole, broken, resumed = (copy.deepcopy(snn) for _ in range(3))
    kept = Checkpoint(tmp_path / "run", steps=2)
    options: dict[str, Any] = {"schedule": Schedule(epochs=2), "strategy": strategy, "teacher": digits_ann}
    expected = finetune(whole, train, train, **options)
    with pytest.raises(KeyboardInterrupt):
        finetune(broken, train, train, **options, checkpoint=kept, on_batch=StopAt(8))
    assert finetune(resumed, train, train, **options, checkpoint=kept) == expected
    assert nets.same(whole, resumed)


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Samples with noise from torch's, numpy's and Python's global generators, as augmentations draw it."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.rand(2, 8, 8) + float(np.random.rand()) + random.random()
        return noise + index / 40, torch.tensor(index % 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shuffling_loader_with_random_samples_and_a_network_with_dropout(tmp_path: Path, workers: int) -> None:
    loader = DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=workers)
    network = nets.conv_net()
    whole, broken, resumed = (copy.deepcopy(network) for _ in range(3))
    schedule, kept = Schedule(epochs=2), Checkpoint(tmp_path / "run", steps=1)
    np.random.seed(1)
    random.seed(1)
    expected = fit(whole, loader, None, schedule)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, loader, None, schedule, checkpoint=kept, on_batch=StopAt(7))
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    states = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    assert fit(resumed, loader, None, schedule, checkpoint=kept) == expected
    assert nets.same(whole, resumed)
    assert states == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index, union-attr]


def test_a_reader_without_length_resumes(tmp_path: Path) -> None:
    class Stream:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for index in range(5):
                yield torch.full((4, 4), float(index)) + torch.rand(4, 4), torch.tensor([0, 1, 2, 0])

    network = nets.two_layers()
    whole, broken, resumed = (copy.deepcopy(network) for _ in range(3))
    kept = Checkpoint(tmp_path / "run", steps=1)
    fit(whole, Stream(), None, Schedule(epochs=2))
    with pytest.raises(KeyboardInterrupt):
        fit(broken, Stream(), None, Schedule(epochs=2), checkpoint=kept, on_batch=StopAt(8))
    fit(resumed, Stream(), None, Schedule(epochs=2), checkpoint=kept)
    assert nets.same(whole, resumed)


SCRIPT = """
import os, signal, sys, torch
torch.set_num_threads(1)
from lmh import zoo
from lmh.finetune import Checkpoint, Hybrid, Schedule, finetune
folder, kill = sys.argv[1], int(sys.argv[2])
data, card = zoo.load_data("digits"), zoo.card("digits-cnn")
some = torch.arange(64)
train = zoo.Batches(data.train, card.preprocessing, 16, some, augmentation=card.augmentation, shuffle_seed=1)
done = 0
def on_batch(epoch, index, loss):
    global done
    done += 1
    if done == kill:
        os.kill(os.getpid(), signal.SIGKILL)
hybrid = Hybrid(qcfs=Schedule(epochs=2, lr=0.01))
tuned = finetune(zoo.load("digits-cnn"), train, timesteps=2, strategy=hybrid, schedule=Schedule(epochs=2),
                 checkpoint=Checkpoint(f"{folder}/run.safetensors", steps=2), on_batch=on_batch)
from lmh.artifact import write_tensors
from pathlib import Path
write_tensors(Path(folder) / "result.safetensors", tuned.snn.state_dict(), {})
"""


def test_sigkill_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    def train(folder: str, kill: int) -> int:
        (tmp_path / folder).mkdir(exist_ok=True)
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / folder), str(kill)]
        return subprocess.run(command, capture_output=True).returncode

    assert train("whole", 0) == 0
    assert [train("killed", kill) for kill in (3, 4, 7)] == [-signal.SIGKILL] * 3
    assert train("killed", 0) == 0
    whole, killed = (read_tensors(tmp_path / name / "result.safetensors")[0] for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


class TestTheFile:
    def test_it_says_which_kernel_ran_and_a_resume_by_another_warns(self, tmp_path: Path) -> None:
        batches = [(torch.rand(4, 4), torch.tensor([0, 1, 2, 0])) for _ in range(3)]
        snn = convert(nets.two_layers(), 2, data=batches).snn
        start, again = copy.deepcopy(snn), copy.deepcopy(snn)
        kept = Checkpoint(tmp_path / "run", steps=1)
        with use_kernel(Kernel.EAGER), pytest.raises(KeyboardInterrupt):
            finetune(snn, batches, epochs=1, checkpoint=kept, on_batch=StopAt(3))
        assert set(read_tensors(tmp_path / "run")[1]["kernels"].values()) == {"eager"}
        shutil.copy(tmp_path / "run", tmp_path / "copy")
        with pytest.warns(UserWarning, match=r"ran by the kernel eager until the checkpoint and runs by fused now"):
            finetune(start, batches, epochs=1, checkpoint=kept)
        with use_kernel(Kernel.EAGER), warnings.catch_warnings():
            warnings.simplefilter("error")
            finetune(again, batches, epochs=1, checkpoint=tmp_path / "copy")

    def test_it_is_written_by_steps_and_at_the_end_of_epochs(self, tmp_path: Path) -> None:
        written: list[tuple[int, int]] = []
        file = tmp_path / "run"

        def look(_epoch: int, _index: int, _loss: float) -> None:
            if file.exists():
                position = read_tensors(file)[1]["position"]
                written.append((position["epoch"], position["batch"]))

        batches = [(torch.rand(4, 4), torch.tensor([0, 1, 2, 0])) for _ in range(5)]
        fit(nets.two_layers(), batches, None, Schedule(epochs=2), checkpoint=Checkpoint(file, steps=2), on_batch=look)
        assert list(dict.fromkeys(written)) == [(0, 2), (0, 4), (1, 0), (1, 1), (1, 3)]

    def test_it_is_written_by_the_clock(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [0.0]
        monkeypatch.setattr("lmh.finetune.checkpoint.time.monotonic", lambda: now[0])
        seen: list[int] = []
        file = tmp_path / "run"

        def minute(_epoch: int, _index: int, _loss: float) -> None:
            if file.exists():
                seen.append(read_tensors(file)[1]["position"]["batch"])
            now[0] += 60

        batches = [(torch.rand(4, 4), torch.tensor([0, 1, 2, 0])) for _ in range(7)]
        kept = Checkpoint(file, minutes=3)
        fit(nets.two_layers(), batches, None, Schedule(epochs=1), checkpoint=kept, on_batch=minute)
        assert seen == [3, 3, 3, 6]

    def test_a_full_disk_says_so_and_the_last_file_stays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file, network = tmp_path / "run", nets.two_layers()
        batches = [(torch.rand(4, 4), torch.tensor([0, 1, 2, 0])) for _ in range(5)]
        whole, resumed = copy.deepcopy(network), copy.deepcopy(network)
        fit(whole, batches, None, Schedule(epochs=2))

        def fill(_epoch: int, _index: int, _loss: float) -> None:
            def full(_descriptor: int) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            if _epoch == 1:
                monkeypatch.setattr("lmh.artifact.os.fsync", full)

        with pytest.raises(ArtifactError, match=r"No space left on device.*expected a writable folder with"):
            fit(network, batches, None, Schedule(epochs=2), checkpoint=Checkpoint(file, steps=1), on_batch=fill)
        monkeypatch.undo()
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        assert read_tensors(file)[1]["position"]["epoch"] == 1
        fit(resumed, batches, None, Schedule(epochs=2), checkpoint=Checkpoint(file, steps=1))
        assert nets.same(whole, resumed)

    def test_another_strategy_or_schedule_is_refused_by_name(self, tmp_path: Path) -> None:
        batches = [(torch.rand(4, 4), torch.tensor([0, 1, 2, 0]))]
        snn = convert(nets.two_layers(), 2, data=batches).snn
        start = copy.deepcopy(snn)
        finetune(snn, batches, epochs=1, checkpoint=tmp_path / "run")
        with pytest.raises(
            TrainingError, match=r"its strategy differs\); expected the same\. Give .*delete it to start anew"
        ):
            finetune(start, batches, epochs=1, strategy=TimeSliced(1), checkpoint=tmp_path / "run")
        with pytest.raises(TrainingError, match="its schedule differs"):
            finetune(start, batches, schedule=Schedule(epochs=1, warmup_steps=1), checkpoint=tmp_path / "run")

    def test_the_header_is_plain_json(self, tmp_path: Path) -> None:
        class Mine:
            per_step = False

            def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
                return nn.functional.cross_entropy(outputs, labels)

        file = tmp_path / "run"
        loader = DataLoader(TensorDataset(torch.rand(8, 4), torch.randint(3, (8,))), batch_size=4)
        fit(nets.two_layers(), loader, None, Schedule(epochs=1, loss=Mine()), checkpoint=file)
        header = read_tensors(file)[1]
        assert json.loads(json.dumps(header)) == header
        assert header["schedule"]["loss"].endswith("Mine")

    @pytest.mark.parametrize("bad", [{"steps": 0}, {"steps": 1.5}, {"minutes": 0.0}, {"minutes": -1}])
    def test_how_often_that_is_none_is_refused(self, bad: dict[str, Any]) -> None:
        with pytest.raises(ArgumentError, match=r"Checkpoint: (steps|minutes) is .*expected"):
            Checkpoint("run", **bad)
