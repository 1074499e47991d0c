"""Data sets as they are published: Tiny-ImageNet-200, ImageNet-1k behind torchvision, CIFAR-100."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from commands import command, succeed
from lmh import zoo
from lmh.artifact import read_snn, read_tensors
from lmh.errors import DataError
from lmh.torchvision_shim import torchvision
from lmh.zoo import Preprocessing
from lmh.zoo.data import OF_CIFAR100
from lmh.zoo.releases import card_of_file

IDS = ("n02124075", "n01443537", "n07749582")  # in wnids.txt, and not in order
GREYS = {"n02124075": 40, "n01443537": 120, "n07749582": 220}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, home_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def picture(path: Path, grey: int, size: tuple[int, int] = (64, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path)


def tiny_imagenet(root: Path) -> None:
    """The original layout, three classes small; its test/ has no labels."""
    lines = []
    for name in IDS:
        for number in range(2):
            picture(root / "train" / name / "images" / f"{name}_{number}.JPEG", GREYS[name])
        (root / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t62\t62\n")
        image = f"val_{len(lines)}.JPEG"
        picture(root / "val" / "images" / image, GREYS[name])
        lines.append(f"{image}\t{name}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    picture(root / "test" / "images" / "test_0.JPEG", 0)
    (root / "wnids.txt").write_text("\n".join(IDS) + "\n")
    words = {"n01443537": "goldfish, Carassius auratus", "n02124075": "Egyptian cat", "n00001740": "entity"}
    (root / "words.txt").write_text("".join(f"{name}\t{word}\n" for name, word in words.items()))


def test_tiny_imagenet_is_read_in_its_original_layout() -> None:
    tiny_imagenet(Path("tiny"))
    data = zoo.load_data("tinyimagenet:tiny")
    assert data.classes == ("goldfish, Carassius auratus", "Egyptian cat", "n07749582")  # by WordNet id
    assert (len(data.train), len(data.test)) == (6, 3)
    for split in (data.train, data.test):
        images = split.images(torch.arange(len(split)))
        assert images.shape[1:] == (3, 64, 64)
        assert split.labels is not None
        greys = torch.tensor([120, 40, 220])[split.labels]
        assert (images.float().mean((1, 2, 3)) - greys).abs().max() < 2
    assert data.test.labels is not None
    assert data.test.labels.tolist() == [1, 0, 2]


def test_tiny_imagenet_as_class_folders_is_told_how_to_be_read() -> None:
    tiny_imagenet(Path("tiny"))
    with pytest.raises(DataError, match=r"is Tiny-ImageNet-200 as it is published, .* Pass tinyimagenet:tiny"):
        zoo.load_data("folder:tiny")


def test_a_class_that_is_none_is_named_with_its_line() -> None:
    tiny_imagenet(Path("tiny"))
    notes = Path("tiny/val/val_annotations.txt")
    notes.write_text(notes.read_text().replace(IDS[1], "n99999999"))
    with pytest.raises(DataError, match=r"val_annotations.txt: line 2 names the class 'n99999999'"):
        zoo.load_data("tinyimagenet:tiny")
    notes.write_text("val_0.JPEG\n")
    with pytest.raises(DataError, match=r"line 1 names the class ''; expected one of wnids.txt"):
        zoo.load_data("tinyimagenet:tiny")


def test_imagenet_as_torchvision_sorts_it_is_class_folders() -> None:
    for name in IDS:
        picture(Path("imagenet", "train", name, f"{name}_1.JPEG"), GREYS[name], (300, 250))
        picture(Path("imagenet", "val", name, "ILSVRC2012_val_00000001.JPEG"), GREYS[name], (200, 500))
    Path("imagenet", "ILSVRC2012_devkit_t12.tar.gz").touch()
    data = zoo.load_data("folder:imagenet", input_size=(3, 224, 224))
    reference = torchvision().datasets.ImageFolder("imagenet/val")
    assert data.classes == tuple(reference.classes)
    assert data.test.labels is not None
    assert data.test.labels.tolist() == [label for _, label in reference.samples]
    assert data.test.images(torch.arange(3)).shape == (3, 3, 224, 224)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("tinyimagenet:gone", ["gone: has no wnids.txt, train", "curl -O http://", "tiny-imagenet-200.zip && unzip"]),
        (
            "folder:gone",
            ["gone: no such folder", "https://image-net.org/", "ImageNet('gone', 'val')"],
        ),
        ("cifar100:gone", ["cifar100 was not found there", "torchvision.datasets.CIFAR100('gone', download=True)"]),
    ],
)
def test_missing_data_say_how_to_get_them(spec: str, words: list[str]) -> None:
    status, _, err = command("convert", "zoo:digits-cnn", "-T", 2, "--data", spec)
    assert status == 1
    assert all(word in " ".join(err.split()) for word in words), err


def cifar100(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-100 in its published layout, 20 images small; torchvision checks the sums of the whole one."""
    random, folder = np.random.default_rng(0), root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, count in (("train", 12), ("test", 8)):
        data = random.integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
        entry = {"data": data, "fine_labels": [int(label) for label in random.integers(0, 100, count)]}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {label}" for label in range(100)]}))
    monkeypatch.setattr(torchvision().datasets.cifar, "check_integrity", lambda *_: True)


RECIPE = """architecture = "cifar10-resnet20"
data = "cifar100"
seed = 0

[training]
batch_size = 6
strategy = {type = "STBP"}
schedule = {type = "Schedule", epochs = 1, distillation = "none"}
"""


def trained(spec: str) -> Path:
    Path("resnet20.toml").write_text(RECIPE)
    succeed("zoo", "train", "resnet20.toml", "--data", spec, "--out", "out")
    return Path("out", "resnet20.safetensors")


def test_networks_for_cifar100_are_trained_and_converted_with_its_own_normalisation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cifar100(Path("data"), monkeypatch)
    file = trained("cifar100:data")
    own, usual = OF_CIFAR100, zoo.card("cifar10-resnet20").preprocessing
    assert isinstance(usual, Preprocessing)
    assert (own.mean, own.std) == ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    assert own.mean != usual.mean
    assert read_tensors(file)[1]["record"]["preprocessing"]["mean"] == list(own.mean)
    assert card_of_file("mine", file, licence="MIT").preprocessing == own
    made = succeed("convert", file, "-T", 2, "--data", "cifar100:data", "--calibration-samples", 8, "--json").result
    assert read_snn(Path(made["output"]))[1]["preprocessing"]["std"] == list(own.std)
    assert made["ann_accuracy"] == read_tensors(file)[1]["record"]["accuracy"]


def test_arrays_of_100_classes_keep_the_architectures_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    cifar100(Path("data"), monkeypatch)
    data = zoo.load_data("cifar100:data")
    arrays = {}
    for part, split in (("train", data.train), ("test", data.test)):
        assert split.labels is not None
        arrays[f"x_{part}"] = split.images(torch.arange(8)).permute(0, 2, 3, 1).numpy()
        arrays[f"y_{part}"] = split.labels[:8].numpy()
    np.savez("set.npz", **arrays, classes=np.array(data.classes))
    file = trained("npz:set.npz")
    assert card_of_file("mine", file, licence="MIT").preprocessing == zoo.card("cifar10-resnet20").preprocessing


def test_a_data_sets_normalisation_is_for_as_many_channels() -> None:
    grey = zoo.card("digits-cnn").preprocessing
    images = zoo.load_data("digits")
    assert images.normalising(grey) is grey
    own = zoo.DataSet("x", images.train, images.test, images.classes, OF_CIFAR100)
    assert own.normalising(grey) is grey
    frames = zoo.card("cifar10dvs-vgg").preprocessing
    assert own.normalising(frames) is frames
    assert own.normalising(zoo.card("torchvision:resnet18").preprocessing) == Preprocessing(
        (3, 224, 224), OF_CIFAR100.mean, OF_CIFAR100.std
    )
