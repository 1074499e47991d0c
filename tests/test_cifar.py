"""The third-party ResNet-20 and those of the zoo on real CIFAR-10 images, where the data lies beside the project."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from commands import succeed
from lmh import zoo

TRAIN, TEST = 256, 128


def unpacked(folder: Path, part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images of a pack (lossless WebP in one byte array), [count, 32, 32, 3] uint8, and their labels."""
    pack = np.load(folder / f"cifar10-{part}-0.npz")
    data, offsets = pack["webp"].tobytes(), pack["offsets"][: count + 1]
    images = [
        np.asarray(Image.open(io.BytesIO(data[start:end])).convert("RGB")) for start, end in itertools.pairwise(offsets)
    ]
    return np.stack(images), pack["labels"][:count].astype(np.int64)


@pytest.fixture(scope="module")
def cifar(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("cifar") / "cifar10.npz"
    (x_train, y_train), (x_test, y_test) = unpacked(data_folder, "train", TRAIN), unpacked(data_folder, "test", TEST)
    np.savez(file, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, classes=np.arange(10).astype(str))
    return file


def converted(data_folder: Path, cifar: Path, *more: str) -> dict[str, Any]:
    source = str(data_folder / "cifar10-resnet20-idelbayev.th")
    output = str(cifar.with_name("snn.safetensors"))
    options = ("--data", f"npz:{cifar}", "--calibration-samples", TRAIN, "--output", output, "--json")
    return succeed("convert", source, *options, *more).result


@pytest.mark.slow
def test_a_third_partys_network_converts_as_it_is(data_folder: Path, cifar: Path) -> None:
    four = converted(data_folder, cifar, "--timesteps", "4")
    sixteen = converted(data_folder, cifar, "--timesteps", "16", "--calibration", "minerror")
    assert "Recognised cifar10-resnet20-a with 10 classes from names and shapes." in four["notices"]
    assert len(four["sites"]) == 19
    assert four["ann_accuracy"] == sixteen["ann_accuracy"]
    assert four["ann_accuracy"] > 0.88
    assert 0.3 < four["snn_accuracy"][-1] < sixteen["snn_accuracy"][-1]
    assert sixteen["snn_accuracy"][-1] > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.list_models(data="cifar10"))
def test_a_model_of_the_zoo_is_as_accurate_as_its_card(name: str, data_folder: Path) -> None:
    card = zoo.model_card(name)
    images, labels = unpacked(data_folder, "test", card.samples)
    assert len(images) == card.samples == 10_000
    parts = card.preprocessing(torch.from_numpy(images).movedim(-1, 1)).split(500)
    ann = zoo.load(name)
    with torch.no_grad():
        answers = torch.cat([ann(part).argmax(1) for part in parts])
    right = int((answers == torch.from_numpy(labels)).sum())
    assert card.ann_accuracy is not None
    assert abs(right - card.samples * card.ann_accuracy) <= 3  # another CPU rounds otherwise


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.list_models(data="cifar10"))
def test_a_model_of_the_zoo_converts_by_its_name(name: str, cifar: Path) -> None:
    output = str(cifar.with_name("zoo.safetensors"))
    result = succeed("convert", f"zoo:{name}", "-T", 8, "--data", f"npz:{cifar}", "--output", output, "--json").result
    known = zoo.model_card(name).ann_accuracy
    assert known is not None
    assert abs(result["ann_accuracy"] - known) < 4 * math.sqrt(known * (1 - known) / TEST)
    assert result["snn_accuracy"][-1] > 0.7


@pytest.mark.slow
def test_batchnorm_statistics_beat_chance_without_data(data_folder: Path, cifar: Path) -> None:
    result = converted(data_folder, cifar, "--timesteps", "16", "--calibration", "batchnorm")
    assert result["calibration"] == "BatchNormStatistics(levels_per_step=0.5, base_levels=2, per channel), 0 samples"
    assert result["snn_accuracy"][-1] > 0.5
