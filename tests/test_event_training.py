"""Event recordings through the whole flow: converted, trained, measured, in Python and by the commands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from commands import Printed, command, succeed
from event_files import KINDS
from lmh import convert, evaluate, zoo
from lmh.artifact import read_snn
from lmh.convert import EventFrames
from lmh.finetune import Progressive, Schedule, finetune
from lmh.spiking import sites
from lmh.zoo import Batches, FramePreprocessing

pytestmark = pytest.mark.usefixtures("uncompiled")

T = 2
FEW = ("--calibration-samples", 6, "--json")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, home_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def small(classes: int = 10) -> nn.Module:
    """A network of a user's own for N-MNIST."""
    torch.manual_seed(0)
    first = (nn.Conv2d(2, 8, 5, stride=2), nn.BatchNorm2d(8), nn.ReLU())
    second = (nn.Conv2d(8, 8, 3, stride=2), nn.ReLU())
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(8 * 7 * 7, classes)).eval()


def manifest(found: dict[str, Any]) -> dict[str, Any]:
    return read_snn(Path(found["output"]))[1]


def refused(*arguments: object) -> tuple[int, str]:
    found: Printed = command(*arguments)
    assert found.status in (1, 2)
    assert "Traceback" not in found.err
    return found.status, " ".join(found.err.split())


def test_recordings_are_learnt_from_scratch() -> None:
    data = zoo.load_data(KINDS["nmnist"].fill(Path("data"), per_class=20), timesteps=4)
    preprocessing = FramePreprocessing((2, 34, 34))
    train = Batches(data.train, preprocessing, 18, shuffle_seed=0)
    test = Batches(data.test, preprocessing)
    conversion = convert.convert(small(), 4, data=train, encoding=EventFrames(), neuron=Progressive().neuron)
    first = evaluate(conversion.snn, test).snn_accuracy
    tuned = finetune(conversion, train, test, strategy=Progressive(), schedule=Schedule(epochs=8, lr=0.05))
    last = evaluate(tuned.snn, test).snn_accuracy
    assert first is not None
    assert last is not None
    assert first[-1] < 0.7
    assert last[-1] > 0.8


@pytest.mark.slow
def test_vgg_dvs_trains_on_cifar10_dvs() -> None:
    card = zoo.card("cifar10dvs-vgg")
    data = zoo.load_data(KINDS["cifar10dvs"].fill(Path("data"), per_class=5, labels=2), timesteps=T)
    train = Batches(data.train, card.preprocessing, 4, augmentation=card.augmentation, shuffle_seed=0)
    x, y = next(iter(train))
    assert (x.shape, y.shape) == ((T, 4, 2, 48, 48), (4,))
    torch.manual_seed(0)
    conversion = convert.convert(card.build(), T, data=train, encoding=EventFrames())
    losses: list[float] = []
    before = {name: value.clone() for name, value in conversion.snn.state_dict().items()}
    tuned = finetune(
        conversion, train, schedule=Schedule(epochs=5, lr=0.5), strategy=Progressive(),
        on_batch=lambda _epoch, _batch, loss: losses.append(loss),
    )  # fmt: skip
    assert len(losses) == 10
    assert max(losses[-2:]) < losses[0] - 0.1
    assert len(sites(tuned.snn)) == 8
    changed = [name for name, value in tuned.snn.state_dict().items() if not torch.equal(value, before[name])]
    assert "features.0.weight" in changed


@pytest.mark.slow
def test_the_commands_take_cifar10_dvs_for_vgg_dvs() -> None:
    spec = KINDS["cifar10dvs"].fill(Path("data"), per_class=4, labels=2)
    torch.manual_seed(0)
    torch.save(zoo.card("cifar10dvs-vgg").build().state_dict(), "vgg.pt")
    arguments = ("vgg.pt", "--arch", "cifar10dvs-vgg", "-T", T, "--data", spec, *FEW)
    made = succeed("convert", *arguments).result
    assert any("resized from 128×128 to 48×48" in notice for notice in made["notices"])
    assert made["samples"] == 2
    kept = manifest(made)
    assert kept["recipe"]["encoding"] == {"type": "EventFrames"}
    assert kept["preprocessing"] == {"type": "FramePreprocessing", "input_size": [2, 48, 48], "assumed": []}
    training = ("--strategy", "progressive", "--epochs", 1, "--batch-size", 3, "--output", "tuned.safetensors")
    tuned = succeed("finetune", *arguments, *training).result
    assert manifest(tuned)["training"]["augmentation"]["parts"][1]["type"] == "OneOf"
    measured = succeed("report", "tuned.safetensors", "--data", spec, "--json").result
    assert measured["snn_accuracy"] == tuned["snn_accuracy"]
    card = zoo.card("cifar10dvs-vgg").preprocessing.described()
    assert card == {"input": "event frames, T × 2 × 48 × 48"}


@pytest.mark.slow
def test_what_the_page_says_on_event_data_runs() -> None:
    """With T, batches and epochs made small."""
    page = (Path(__file__).parent.parent / "docs" / "zoo.md").read_text()
    _, _, page = page.partition("### Event data")
    small = (
        page.replace("timesteps=10", f"timesteps={T}")
        .replace("-T 10", f"-T {T}")
        .replace("build(), 10", f"build(), {T}")
    )
    small = (
        small.replace("epochs=30", "epochs=1")
        .replace("--epochs 30", "--epochs 1")
        .replace("preprocessing, 16", "preprocessing, 2")
    )
    KINDS["cifar10dvs"].fill(Path("data"), per_class=2, labels=2)
    names: dict[str, Any] = {}
    exec(re.findall(r"^```python\n(.*?)^```", small, re.MULTILINE | re.DOTALL)[0], names)
    assert names["x"].shape == (T, 2, 2, 48, 48)
    lines = [line.partition("#")[0].split() for line in small.splitlines() if line.startswith("lmh")][:3]
    for name, *words in lines:
        succeed(*(["convert"] if name == "lmh-convert" else []), *words)
    assert [line[0] for line in lines] == ["lmh", "lmh", "lmh-convert"]
    assert {path.name for path in Path().glob("*.safetensors")} == {"tuned.safetensors", f"vgg-snn-T{T}.safetensors"}


class TestCommandsOnAnOwnNetwork:
    @pytest.fixture
    def spec(self) -> str:
        torch.save(small(), "own.pt")
        return KINDS["nmnist"].fill(Path("data"), per_class=10)

    def test_the_data_say_that_the_input_is_frames(self, spec: str) -> None:
        found = succeed("convert", "own.pt", "-T", 4, "--data", spec, *FEW).result
        assert any("Assumed, as nothing says it: input size 2,34,34. Give" in notice for notice in found["notices"])
        assert manifest(found)["preprocessing"]["assumed"] == ["input_size"]
        frames = zoo.load_data(spec, timesteps=4).test
        [(x, y)] = Batches(frames, FramePreprocessing((2, 34, 34)))
        snn = convert.load(found["output"], source="own.pt")
        right = float((snn(x).argmax(1) == y).double().mean())
        assert found["snn_accuracy"][-1] == pytest.approx(right)
        again = succeed("report", found["output"], "--source", "own.pt", "--data", spec, "--json").result
        assert again["snn_accuracy"] == found["snn_accuracy"]
        assert again["ann_accuracy"] == found["ann_accuracy"]

    @pytest.mark.parametrize(
        "options",
        [
            ("--calibration-samples", 24, "--diagnose"),
            ("--correct", "weights", "--correct", "thresholds"),
            ("--distill", 1),
            ("--finetune", 3),
        ],
        ids=["auto", "correct", "distill", "finetune"],
    )
    def test_all_that_images_have_frames_have_too(self, spec: str, options: tuple[object, ...]) -> None:
        found = succeed("convert", "own.pt", "-T", 4, "--data", spec, *FEW, *options).result
        assert found["samples"] == 3
        assert len(found["snn_accuracy"]) == 4
        assert bool(found["diagnosis"]) == ("--diagnose" in options)

    @pytest.mark.parametrize("strategy", ["hybrid", "time-sliced"])
    def test_it_trains_by_every_kind_of_strategy(self, spec: str, strategy: str) -> None:
        more = ("--slice", 2) if strategy == "time-sliced" else ()
        options = ("--strategy", strategy, "--epochs", 3, "--mix", "cutmix", "--output", "tuned.safetensors")
        found = succeed("finetune", "own.pt", "-T", 4, "--data", spec, *FEW, *options, *more).result
        on = ("finetune", "tuned.safetensors", "--source", "own.pt", "--data", spec, "--epochs", 1, "--json")
        assert manifest(succeed(*on).result)["recipe"]["encoding"] == manifest(found)["recipe"]["encoding"]

    def test_normalisation_is_for_images(self, spec: str) -> None:
        found = succeed("convert", "own.pt", "-T", 2, "--data", spec, *FEW).result
        for arguments in (("convert", "own.pt", "-T", 2), ("report", found["output"], "--source", "own.pt")):
            status, err = refused(*arguments, "--data", spec, "--mean", "0.5,0.5")
            assert status == 2
            assert "--mean came with event frames" in err
            assert "Leave it out" in err

    def test_images_for_a_network_of_frames_are_refused(self, spec: str) -> None:
        found = succeed("convert", "own.pt", "-T", 2, "--data", spec, *FEW).result
        for verb in ("report", "finetune"):
            _, err = refused(verb, found["output"], "--source", "own.pt", "--data", "digits")
            assert "digits holds images and the network's input is event frames, T × 2 × 34 × 34" in err
            assert "Use --data cifar10dvs:DIR, nmnist:DIR or dvsgesture:DIR" in err


def test_the_kind_of_data_is_checked_before_it_is_looked_for() -> None:
    torch.save(zoo.card("cifar10dvs-vgg").build().state_dict(), "vgg.pt")
    for verb in ("convert", "finetune"):
        _, err = refused(verb, "vgg.pt", "--arch", "cifar10dvs-vgg", "-T", 2, "--data", "cifar10:gone")
        assert "cifar10:gone holds images and the network's input is event frames" in err
        _, err = refused(verb, "zoo:digits-cnn", "-T", 2, "--data", "cifar10dvs:gone")
        assert "cifar10dvs:gone holds event recordings and the network's input is 1 × 8 × 8" in err
        assert "Use --data digits, npz:FILE" in err
    _, err = refused("report", "zoo:digits-cnn-t4", "--data", "nmnist:gone")
    assert "nmnist:gone holds event recordings" in err


def test_a_network_that_the_api_converted_is_taken_for_what_it_is_and_not_for_its_architectures_kind() -> None:
    """A network for images on event frames of one channel."""
    ann = zoo.load("digits-cnn")
    torch.save(ann.state_dict(), "ann.pt")
    conversion = convert.convert(ann, T, example_input=torch.zeros(T, 1, 1, 8, 8), encoding=EventFrames())
    source = {"name": "ann.pt", "architecture": "digits-cnn", "num_classes": 10, "sha256": None}
    convert.save(conversion, "snn.safetensors", source=source)
    for verb in ("report", "finetune"):
        _, err = refused(verb, "snn.safetensors", "--data", "digits")
        assert "digits holds images and the network's input is event frames, T × 1 × 8 × 8" in err
        _, err = refused(verb, "snn.safetensors", "--data", KINDS["nmnist"].fill(Path("data"), per_class=2))
        assert "the frames have 2 channels and the model takes 1" in err


def test_a_network_of_frames_converts_without_data() -> None:
    torch.save(zoo.card("cifar10dvs-vgg").build().state_dict(), "vgg.pt")
    found = succeed("convert", "vgg.pt", "--arch", "cifar10dvs-vgg", "-T", T, "--json").result
    assert manifest(found)["recipe"]["encoding"] == {"type": "EventFrames"}
    snn = convert.load(found["output"], source="vgg.pt")
    assert snn(torch.rand(T, 1, 2, 48, 48)).shape == (1, 10)
