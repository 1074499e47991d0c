"""Two processes under torchrun and one with the same batches: the same losses, weights and files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nets
from lmh.artifact import read_snn, read_tensors
from lmh.errors import ArgumentError, TrainingError
from lmh.finetune import FrozenBatchNorm, LiveBatchNorm, Schedule, SyncedBatchNorm, fit
from lmh.finetune.batch_norm import set_modes, synchronised
from lmh.finetune.batches import Feed, Repeated
from lmh.finetune.distributed import Group, joined
from lmh.finetune.optimiser import copied

JOB = """
import json, sys
from pathlib import Path
import torch
from torch.utils.data import DataLoader, TensorDataset
torch.set_num_threads(1)
from lmh import zoo
from lmh.artifact import write_tensors
from lmh.calibrate import Max
from lmh.convert import EventFrames, convert
from lmh.finetune import *
from lmh.finetune.distributed import Group, joined

folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
data, card = zoo.load_data("digits"), zoo.card("digits-cnn")
some = torch.arange(75)
batches = zoo.Batches(data.train, card.preprocessing, 16, some, augmentation=card.augmentation, shuffle_seed=3)
x, y = torch.rand(75, 1, 8, 8), torch.arange(75) % 10
torch.manual_seed(0)
frames = [(torch.rand(4, 11, 1, 8, 8), torch.arange(11) % 10) for _ in range(3)]
loader = DataLoader(TensorDataset(torch.rand(75, 1, 8, 8), torch.arange(75) % 10), batch_size=16, shuffle=True)
ann = zoo.load("digits-cnn")
runs = {
    "stbp": (batches, STBP(), {}),
    "slices": (batches, TimeSliced(2), {}),
    "once": (batches, TimeSliced(2, OncePerBatch()), {}),
    "progressive": (batches, Progressive(), {}),
    "loader": (loader, STBP(), {}),
    "frames": (frames, TimeSliced(2), {"encoding": EventFrames()}),
    "mixed": (batches, STBP(), {}),
}
with joined(torch.device("cpu")):
    group = Group.current()
    found = {}
    for name, (train, strategy, options) in runs.items():
        torch.manual_seed(1)
        sample = frames[0][0] if options else next(iter(batches))[0]
        snn = convert(ann, 4, data=sample, calibration=Max(), **options).snn.double()
        losses = []
        schedule = Schedule(epochs=4, batch_norm=FrozenBatchNorm(), ema=EMA(0.9) if name == "mixed" else None)
        val = frames if options else zoo.Batches(data.test, card.preprocessing, 33, torch.arange(67))
        history = finetune(snn, train, val, strategy=strategy, schedule=schedule, teacher=ann.double(),
                           on_batch=lambda *told: losses.append(told)).history
        found[name] = {"losses": losses, "val": [result.val_accuracy for result in history]}
        write_tensors(folder / f"{name}-{group.rank}.safetensors", snn.state_dict(), {})
    (folder / f"losses-{group.rank}.json").write_text(json.dumps(found))
"""


def start(folder: Path, processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launcher = [sys.executable, *(several if processes > 1 else [])]
    return subprocess.run([*launcher, *command], cwd=folder, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("distributed")
    script = folder / "job.py"
    script.write_text(JOB)
    for processes, name in ((1, "one"), (2, "two")):
        done = start(folder, processes, str(script), str(folder / name))
        assert done.returncode == 0, done.stderr[-3000:]
    return folder / "one", folder / "two"


NAMES = ["stbp", "slices", "once", "progressive", "loader", "frames", "mixed"]


def told(folder: Path, rank: int, name: str) -> dict[str, Any]:
    return json.loads((folder / f"losses-{rank}.json").read_text())[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_accuracies_are_those_of_one_process(both: tuple[Path, Path], name: str) -> None:
    one, two = (told(folder, 0, name) for folder in both)
    assert len(one["losses"]) == (12 if name == "frames" else 20)
    assert [entry[:2] for entry in one["losses"]] == [entry[:2] for entry in two["losses"]]
    assert two["val"] == one["val"]
    for first, second in zip(one["losses"], two["losses"], strict=True):
        assert abs(first[2] - second[2]) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_process_ends_with_the_same_weights(both: tuple[Path, Path], name: str) -> None:
    one = read_tensors(both[0] / f"{name}-0.safetensors")[0]
    ranks = [read_tensors(both[1] / f"{name}-{rank}.safetensors")[0] for rank in range(2)]
    assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in one)
    assert all(torch.allclose(ranks[0][key], one[key], atol=1e-8) for key in one)


@pytest.mark.slow
def test_rank_0_alone_reports(both: tuple[Path, Path]) -> None:
    for name in NAMES:
        assert told(both[1], 1, name)["losses"] == []


COMMAND = ("-m", "lmh", "finetune", "zoo:digits-cnn", "-T", "2", "--data", "digits", "--train-samples", "64",
           "--test-samples", "40", "--calibration-samples", "64", "--epochs", "3", "--batch-norm", "frozen",
           "--json")  # fmt: skip


@pytest.mark.slow
def test_the_command_runs_under_torchrun_and_one_process_writes(tmp_path: Path) -> None:
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*several, *COMMAND], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = done.stdout.splitlines()
    result = json.loads(line)
    assert [path.name for path in tmp_path.iterdir()] == ["digits-cnn-snn-T2.safetensors"]
    assert done.stderr.count("epoch 2 of 2") == 1
    assert [stage["name"] for stage in result["stages"]] == ["after QCFS"]
    alone = start(tmp_path, 1, *COMMAND, "--output", "alone.safetensors")
    two, one = (read_snn(tmp_path / name)[0] for name in ("digits-cnn-snn-T2.safetensors", "alone.safetensors"))
    assert json.loads(alone.stdout)["snn_accuracy"][-1] == pytest.approx(result["snn_accuracy"][-1], abs=0.1)
    assert all(torch.allclose(two[name].float(), one[name].float(), atol=0.05) for name in one)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from lmh import zoo
from lmh.artifact import write_tensors
from lmh.finetune import *
from lmh.finetune.distributed import Group, joined
folder, kill = Path(sys.argv[1]), int(sys.argv[2])
data, card = zoo.load_data("digits"), zoo.card("digits-cnn")
some = torch.arange(64)
batches = zoo.Batches(data.train, card.preprocessing, 16, some, augmentation=card.augmentation, shuffle_seed=3)
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.ann, self.dropout = zoo.load("digits-cnn"), torch.nn.Dropout(0.5)
    def forward(self, x):
        return self.dropout(self.ann(x))
done = 0
def on_batch(*told):
    global done
    done += 1
    if done == kill:
        os.kill(os.getpid(), signal.SIGKILL)
with joined(torch.device("cpu")):
    network = Net()
    fit(network, batches, None, Schedule(epochs=2), checkpoint=Checkpoint(folder / "run", steps=1), on_batch=on_batch)
    if Group.current().leads:
        write_tensors(folder / "result", network.state_dict(), {})
"""


@pytest.mark.slow
def test_a_killed_group_resumes_to_the_same_weights(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(KILLED)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert start(tmp_path, 2, str(script), "whole", "0").returncode == 0
    assert start(tmp_path, 2, str(script), "killed", "6").returncode != 0
    assert (tmp_path / "killed" / "run").exists()
    assert start(tmp_path, 2, str(script), "killed", "0").returncode == 0
    whole, killed = (read_tensors(tmp_path / name / "result")[0] for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


class TestBatchNorm:
    def test_frozen_statistics_stay_and_gains_learn(self) -> None:
        network = nets.conv_net()
        before = copied(network)
        data = [(torch.rand(8, 2, 8, 8), torch.randint(3, (8,))) for _ in range(3)]
        fit(network, data, None, Schedule(epochs=1, batch_norm=FrozenBatchNorm()))
        after = network.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before if "running" in name or "tracked" in name)
        assert not torch.equal(before["1.weight"], after["1.weight"])

    def test_synchronised_is_refused_where_torch_has_it_not(self) -> None:
        with pytest.raises(ArgumentError, match=r"the network is on cpu.*expected CUDA\. Use LiveBatchNorm\(\)"):
            fit(nets.conv_net(), [], None, Schedule(epochs=1, batch_norm=SyncedBatchNorm()))

    def test_synchronised_layers_stand_in_and_give_back_what_they_learnt(self) -> None:
        network = nets.conv_net()
        original = network.get_submodule("1")
        with synchronised(network, SyncedBatchNorm()):
            stand_in = network.get_submodule("1")
            assert isinstance(stand_in, nn.SyncBatchNorm)
            assert stand_in.weight is original.weight
            with torch.no_grad():
                stand_in.weight.fill_(3)  # type: ignore[operator]
            assert stand_in.running_mean is not None
            stand_in.running_mean = torch.ones(6)
        assert network.get_submodule("1") is original
        assert torch.equal(original.get_buffer("running_mean"), torch.ones(6))
        assert torch.equal(original.get_parameter("weight").detach(), torch.full((6,), 3.0))

    def test_live_is_train_mode(self) -> None:
        network = nets.conv_net()
        set_modes(network, LiveBatchNorm())
        assert network.get_submodule("1").training
        set_modes(network, FrozenBatchNorm())
        assert not network.get_submodule("1").training
        assert network.training

    def test_another_type_is_refused(self) -> None:
        with pytest.raises(ArgumentError, match=r"batch_norm is the string 'frozen'.*Pass LiveBatchNorm\(\)"):
            Schedule(epochs=1, batch_norm="frozen")  # type: ignore[arg-type]


class TestShares:
    def test_rows_of_loaders_are_cut_and_small_batches_left_out_everywhere(self) -> None:
        loader = [(torch.arange(5.0)[:, None], torch.arange(5)), (torch.ones(1, 1), torch.zeros(1))]
        shares = [list(Feed(Repeated(loader), 0, Group(rank, 2)).epoch(0)) for rank in range(2)]
        assert [[x.flatten().tolist() for x, _ in share] for share in shares] == [[[0, 2, 4]], [[1, 3]]]
        assert [[y.tolist() for _, y in share] for share in shares] == [[[0, 2, 4]], [[1, 3]]]

    def test_event_frames_are_cut_along_their_batch(self) -> None:
        loader = [(torch.arange(10.0).reshape(2, 5)[..., None], torch.arange(5))]
        [(x, y)] = Feed(Repeated(loader), 0, Group(1, 2), axis=1).epoch(0)
        assert x[..., 0].tolist() == [[1, 3], [6, 8]]
        assert y.tolist() == [1, 3]

    def test_more_processes_than_gpus_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("LOCAL_RANK", "3")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(TrainingError, match=r"there are 2.*--nproc-per-node 2"), joined(torch.device("cuda")):
            pass
