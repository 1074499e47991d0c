"""Event data: recordings in their published formats are read as tonic reads them, and become frames for a network."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from event_files import KINDS, Kind, events, tonic
from lmh import zoo
from lmh.errors import ArgumentError, DataError
from lmh.finetune import STBP, Schedule
from lmh.finetune.recipe import TrainingRecipe
from lmh.zoo import AutoAugment, Batches, CropFlip, Cutout, FramePreprocessing, InTurn, OneOf, Roll, Rotate
from lmh.zoo import events as zoo_events
from lmh.zoo.events import EventSplit

T = 5
EVERY = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
NMNIST = KINDS["nmnist"]


@pytest.fixture(autouse=True)
def _home(home_folder: Path) -> None:
    """Frames are kept in a home of the test's own."""


def part(data: zoo.DataSet, name: str) -> EventSplit:
    found = getattr(data, name)
    assert isinstance(found, EventSplit)
    return found


def kept(home_folder: Path) -> list[Path]:
    return sorted((home_folder / "events").rglob("*.npz"))


@EVERY
def test_frames_are_tonics(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = zoo.load_data(kind.fill(tmp_path, per_class=3), timesteps=T)
    to_frame = tonic.transforms.ToFrame(sensor_size=(kind.side, kind.side, 2), n_time_bins=T)
    parts = (
        {"train": {}, "test": {}} if kind.spec == "cifar10dvs" else {"train": {"train": True}, "test": {"train": False}}
    )
    seen = 0
    for name, options in parts.items():
        theirs = kind.read_by_tonic(tmp_path, monkeypatch, **options)
        by_file = {str(file): theirs[index] for index, file in enumerate(theirs.data)}
        split = part(data, name)
        assert len(split) == {"train": 6, "test": 3}[name]
        for place, index in enumerate(split.chosen):
            recorded, label = by_file[str(split.recordings.data[index])]
            [frames] = split.images(torch.tensor([place]))
            assert int(split.labels[place]) == label
            assert torch.equal(frames, torch.from_numpy(to_frame(recorded)))
            swapped = torch.from_numpy(to_frame(recorded)).transpose(2, 3)
            assert not torch.equal(frames, swapped)
            seen += 1
    assert seen == 9


@EVERY
def test_tonic_reads_what_was_written(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind.fill(tmp_path, per_class=2, labels=1)
    theirs = kind.read_by_tonic(tmp_path, monkeypatch)
    place = next(
        i for i, file in enumerate(theirs.data) if Path(file) == tmp_path / kind.reader / kind.path(True, 0, 0)
    )
    recorded, label = theirs[place]
    written = events(0, 0, kind.side)
    assert label == 0
    assert np.array_equal(np.column_stack([recorded[name].astype(int) for name in "xypt"]), written)


@EVERY
def test_frames_hold_every_event_by_its_place_time_and_polarity(kind: Kind, tmp_path: Path) -> None:
    """An integration of our own; tonic's bins leave out what lies at their very end."""
    split = part(zoo.load_data(kind.fill(tmp_path, per_class=2, labels=2), timesteps=T), "train")
    [frames] = split.images(torch.tensor([int(split.labels.tolist().index(1))]))
    x, y, p, t = events(1, 0, kind.side).T
    bins = (t - t[0]) // ((t[-1] - t[0]) // T)
    wanted = np.zeros((T, 2, kind.side, kind.side), np.int16)
    np.add.at(wanted, (bins[bins < T], p[bins < T], y[bins < T], x[bins < T]), 1)
    assert np.array_equal(frames.numpy(), wanted)
    assert 290 < int(frames.sum()) <= 300


@EVERY
def test_a_batch_has_time_first_and_counts_as_they_are(kind: Kind, tmp_path: Path) -> None:
    data = zoo.load_data(kind.fill(tmp_path, per_class=3), timesteps=T)
    split = part(data, "train")
    assert split.shape == (2, kind.side, kind.side)
    assert len(data.classes) == kind.classes
    [(x, y)] = Batches(split, FramePreprocessing(split.shape))
    assert (x.shape, x.dtype, y.dtype) == ((T, 6, 2, kind.side, kind.side), torch.float32, torch.int64)
    assert torch.equal(x, split.images(torch.arange(6)).transpose(0, 1).float())
    shards = [list(Batches(split, FramePreprocessing(split.shape)).shard(rank, 2)) for rank in range(2)]
    for rank, [(some, labels)] in enumerate(shards):
        assert torch.equal(some, x[:, rank::2])
        assert torch.equal(labels, y[rank::2])
    [(small, _)] = Batches(split, FramePreprocessing((2, kind.side // 2, kind.side // 2)))
    area = torch.nn.functional.avg_pool2d(x.flatten(0, 1), 2).unflatten(0, (T, 6))
    assert torch.allclose(small.sum((3, 4)), area.sum((3, 4)), rtol=0.05, atol=1)


def test_the_first_nine_tenths_of_every_class_are_for_training(tmp_path: Path) -> None:
    data = zoo.load_data(KINDS["cifar10dvs"].fill(tmp_path, per_class=11, labels=2), timesteps=2)
    names = {
        name: [Path(part(data, name).recordings.data[index]).stem for index in part(data, name).chosen]
        for name in ("train", "test")
    }
    assert names["train"][:9] == [f"cifar10_airplane_{number}" for number in range(9)]
    assert names["test"] == [f"cifar10_{name}_{number}" for name in ("airplane", "automobile") for number in (9, 10)]
    assert part(data, "test").labels.tolist() == [0, 0, 1, 1]


def test_frames_are_made_once_and_anew_for_a_recording_that_changed(
    tmp_path: Path, home_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = NMNIST.fill(tmp_path, per_class=2, labels=2)
    split = part(zoo.load_data(spec, timesteps=T), "train")
    split.images(torch.arange(2))
    assert kept(home_folder) == []  # small recordings are decoded as fast as frames are read
    monkeypatch.setattr(zoo_events, "SMALLEST_KEPT", 1000)
    first = split.images(torch.arange(2))
    assert len(kept(home_folder)) == 2
    read: list[int] = []
    own = tonic.datasets.NMNIST.__getitem__

    def counted(self: object, index: int) -> object:
        read.append(index)
        return own(self, index)

    monkeypatch.setattr(tonic.datasets.NMNIST, "__getitem__", counted)
    again = part(zoo.load_data(spec, timesteps=T), "train")
    assert torch.equal(again.images(torch.arange(2)), first)
    assert read == []
    part(zoo.load_data(spec, timesteps=T + 1), "train").images(torch.tensor([0]))
    assert read == [0]
    kept(home_folder)[0].write_bytes(b"half a fi")
    kept(home_folder)[1].write_bytes(kept(home_folder)[1].read_bytes()[:-30])
    assert torch.equal(again.images(torch.arange(2)), first)
    NMNIST.write(Path(again.recordings.data[0]), events(7, 7, 34)[:40])
    changed = again.images(torch.arange(2))
    assert not torch.equal(changed[0], first[0])
    assert torch.equal(changed[1], first[1])


def test_augmentation_does_the_same_to_all_frames_of_a_sample() -> None:
    still = torch.randint(0, 9, (8, 1, 2, 20, 20), dtype=torch.int16).expand(8, T, 2, 20, 20)

    class Still:
        labels = None

        def __len__(self) -> int:
            return 8

        def images(self, indices: torch.Tensor) -> torch.Tensor:
            return still[indices]

    for way in (CropFlip(2), Cutout(6), Roll(0.3), Rotate(30), zoo.card("cifar10dvs-vgg").augmentation):
        batches = Batches(Still(), FramePreprocessing((2, 20, 20)), 8, augmentation=way, shuffle_seed=1)
        [x] = batches
        [plain] = Batches(Still(), FramePreprocessing((2, 20, 20)), 8, shuffle_seed=1)
        assert torch.equal(x, x[:1].expand_as(x)), way
        changed = (x != plain).flatten(2).any(2).all(0)
        assert changed.sum() >= 4, way
        assert set(x.unique().tolist()) <= set(range(9)), way


def test_one_of_gives_each_image_one_part() -> None:
    images = torch.randint(1, 200, (300, 1, 12, 12), dtype=torch.uint8)
    way = OneOf((Roll(0.5), Cutout(4)))
    drawn = way.draw(300, torch.Generator().manual_seed(0))
    found = way.apply(images, drawn)
    blackened = (found == 0).flatten(1).any(1)
    moved = ~blackened
    assert 110 < int(blackened.sum()) < 190
    assert torch.equal(found[moved].flatten(1).sort(1).values, images[moved].flatten(1).sort(1).values)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Roll(0), "expected a share of the image"),
        (lambda: Rotate(270), "expected an angle up to 180"),
        (lambda: OneOf(()), "parts is empty"),
        (lambda: AutoAugment().apply(torch.zeros(1, 4, 8, 8, dtype=torch.int16), ()), "int16, as event frames are"),
    ],
    ids=["roll", "rotate", "one-of", "auto-augment"],
)
def test_augmentation_that_does_not_fit_is_refused(make: object, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        make()  # type: ignore[operator]


def test_images_and_frames_are_not_taken_for_each_other(tmp_path: Path) -> None:
    frames = part(zoo.load_data(NMNIST.fill(tmp_path, per_class=2, labels=1), timesteps=T), "train")
    with pytest.raises(DataError, match=r"event frames \[5, 2, 34, 34\] and the model takes images \[1, 8, 8\]"):
        list(Batches(frames, zoo.card("digits-cnn").preprocessing))
    with pytest.raises(DataError, match=r"images \[1, 8, 8\] and the model takes event frames .*cifar10dvs:DIR"):
        list(Batches(zoo.load_data("digits").test, zoo.card("cifar10dvs-vgg").preprocessing))
    with pytest.raises(DataError, match=r"the frames have 2 channels and the model takes 1; .* --input-size 2,H,W"):
        list(Batches(frames, FramePreprocessing((1, 34, 34))))


def test_the_number_of_frames_is_needed(tmp_path: Path) -> None:
    spec = NMNIST.fill(tmp_path, per_class=2, labels=1)
    with pytest.raises(ArgumentError, match=r"timesteps= was not given; .* load_data\('nmnist:.*', timesteps=10\)"):
        zoo.load_data(spec)
    with pytest.raises(ArgumentError, match=r"timesteps is 0; expected a whole number"):
        zoo.load_data(spec, timesteps=0)


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("cifar10dvs", "CIFAR10DVS; CIFAR10DVS('{}')"),
        ("nmnist", "NMNIST; NMNIST('{0}', train=True); NMNIST('{0}', train=False)"),
        ("dvsgesture", "DVSGesture; DVSGesture('{0}', train=True); DVSGesture('{0}', train=False)"),
    ],
)
def test_missing_recordings_say_how_to_get_them_and_nothing_is_downloaded(kind: str, call: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        zoo.load_data(f"{kind}:{tmp_path}", timesteps=T)
    place = tmp_path / KINDS[kind].reader
    assert f'python -c "from tonic.datasets import {call.format(tmp_path)}"' in str(raised.value)
    assert f"tonic's layout, {place}/" in str(raised.value)
    assert not place.exists()


@pytest.mark.parametrize("package", ["tonic", "aedat"])
def test_a_missing_package_says_what_to_install(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"{package} is not installed .* pip install 'lmh-convert\[events\]'"):
        zoo.load_data(f"cifar10dvs:{tmp_path}", timesteps=T)


@EVERY
def test_a_damaged_recording_is_named(kind: Kind, tmp_path: Path) -> None:
    split = part(zoo.load_data(kind.fill(tmp_path, per_class=2, labels=1), timesteps=T), "train")
    for data in (b"\xff" * 101, b"\xfa\0\0\0\0\xfa\0\1\0\0", b""):
        Path(split.recordings.data[split.chosen[0]]).write_bytes(data)
        with pytest.raises(DataError, match=rf"{kind.reader}.*(not a readable recording|gave 0 events).* Remove it"):
            split.images(torch.tensor([0]))


def test_frames_that_cannot_be_kept_say_where(
    tmp_path: Path, home_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo_events, "SMALLEST_KEPT", 1000)
    split = part(zoo.load_data(NMNIST.fill(tmp_path, per_class=2, labels=1), timesteps=T), "train")
    home_folder.mkdir(exist_ok=True)
    (home_folder / "events").write_text("a file in the way")
    with pytest.raises(DataError, match=r"cannot be kept \(.*events.*\); .* another place with LMH_HOME") as raised:
        split.images(torch.tensor([0]))
    assert "--output" not in str(raised.value)
    (home_folder / "events").unlink()
    split.images(torch.tensor([0]))
    Path(split.recordings.data[split.chosen[0]]).unlink()
    with pytest.raises(DataError, match=r"bin: cannot be read any more .* Put it back"):
        split.images(torch.tensor([0]))


def test_recipes_keep_the_augmentation_of_frames() -> None:
    way = InTurn((CropFlip(0), OneOf((Roll(0.2), Rotate(10.0), Cutout(8)))))
    recipe = TrainingRecipe(STBP(), Schedule(epochs=1), 4, way)
    assert TrainingRecipe.from_json(recipe.to_json(), "here") == recipe
