"""Data sets by one call: ``load_data("digits")``, ``"npz:FILE"``, ``"cifar10:DIR"``, ``"folder:DIR"``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..artifact import is_there, user_path
from ..errors import ArgumentError, DataError
from ..torchvision_shim import torchvision
from .images import Split

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
HELP = "digits, npz:FILE, cifar10:DIR, cifar100:DIR or folder:DIR"


@dataclass(frozen=True)
class DataSet:
    """A data set.

    Attributes:
        name: the SPEC that named it.
        train: for calibration and training.
        test: for figures.
        classes: class names in the order of the labels.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]


@dataclass(frozen=True)
class ArraySplit:
    """Images in memory, uint8 [N, C, H, W], labels int64 [N]."""

    pixels: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, indices: Tensor) -> Tensor:
        """Return the chosen images, uint8 [n, C, H, W]."""
        return self.pixels[indices]


class FolderSplit:
    """Images in class folders, decoded when asked for, centre-cropped and resized to one size."""

    def __init__(self, files: list[Path], labels: Tensor, size: tuple[int, int], channels: int) -> None:
        self.files, self.labels, self.size, self.channels = files, labels, size, channels

    def __len__(self) -> int:
        return len(self.files)

    def images(self, indices: Tensor) -> Tensor:
        """Return the chosen images, uint8 [n, C, H, W].

        Raises:
            DataError: if a file is not an image.
        """
        return torch.stack([self._decode(self.files[i]) for i in indices.tolist()])

    def _decode(self, path: Path) -> Tensor:
        height, width = self.size
        try:
            with Image.open(path) as opened:
                image = opened.convert("L" if self.channels == 1 else "RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(
                f"{path}: not a readable image ({error}); expected PNG, JPEG or the like. Remove it."
            ) from error
        if image.size != (width, height):
            scale = max(width / image.width, height / image.height)
            if max(width, height) >= 128:
                scale *= 256 / 224
            image = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))))
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        pixels = np.asarray(image).reshape(height, width, self.channels)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def load_data(spec: str, *, input_size: tuple[int, ...] = (3, 224, 224)) -> DataSet:
    """Open a data set.

    Args:
        spec: ``digits`` (scikit-learn's, embedded), ``npz:FILE`` (x_train [N, H, W, C] uint8, y_train, x_test,
            y_test, classes), ``cifar10:DIR`` and ``cifar100:DIR`` (torchvision's layout), or ``folder:DIR``
            (train/ and test/ or val/ with a folder for each class).
        input_size: (C, H, W) that folder images are cropped and resized to; arrays keep their size.

    Raises:
        ArgumentError: for a spec that is none of these.
        DataError: saying what is missing or does not fit, and where it was looked for.

    >>> data = load_data("digits")
    >>> len(data.train), len(data.test), data.classes[3]
    (1437, 360, '3')
    """
    if len(input_size) != 3:
        raise DataError(
            f"{spec} holds images and the input size is {','.join(map(str, input_size))}; expected C,H,W. Convert "
            "without a data set, or by lmh.convert.convert(model, …, data=batches)."
        )
    kind, _, where = spec.partition(":")
    if kind == "digits" and not where:
        return _digits()
    loaders: dict[str, Callable[[str, Path], DataSet]] = {
        "npz": _npz,
        "cifar10": _cifar,
        "cifar100": _cifar,
        "folder": lambda name, path: _folder(name, path, input_size),
    }
    if kind not in loaders or not where:
        raise ArgumentError(f"data {spec!r} is not known; expected {HELP}.")
    return loaders[kind](spec, user_path(where))


def _digits() -> DataSet:
    """The 1,797 digits of 8×8 pixels, 20 % for testing, stratified and fixed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    parts = train_test_split(pixels, bunch.target, test_size=360, random_state=0, stratify=bunch.target)
    x_train, x_test, y_train, y_test = (torch.from_numpy(part.copy()) for part in parts)
    names = tuple(str(name) for name in bunch.target_names)
    return DataSet("digits", ArraySplit(x_train, y_train.long()), ArraySplit(x_test, y_test.long()), names)


def _npz(spec: str, path: Path) -> DataSet:
    if not is_there(path):
        raise DataError(f"{path}: no such file; expected an .npz with x_train, y_train, x_test, y_test, classes.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Any] = {name: file[name] for name in file.files}
    except Exception as error:  # numpy raises almost anything on files that are none of its own
        raise DataError(f"{path}: not a readable .npz of plain arrays. Write it with numpy.savez.") from error
    missing = [name for name in ("x_train", "y_train", "x_test", "y_test") if name not in arrays]
    if missing:
        raise DataError(f"{path}: has {', '.join(arrays) or 'nothing'} but not {', '.join(missing)}. Add them.")
    splits = {part: _array_split(path, part, arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test")}
    count = 1 + max(int(split.labels.max()) for split in splits.values())  # type: ignore[union-attr]
    classes = arrays.get("classes", np.arange(count))
    if classes.ndim != 1 or len(classes) < count:
        raise DataError(
            f"{path}: labels go up to {count - 1} and classes has shape {list(classes.shape)}; "
            f"expected [{count}] names."
        )
    return DataSet(spec, splits["train"], splits["test"], tuple(str(name) for name in classes))


def _array_split(path: Path, part: str, x: np.ndarray, y: np.ndarray) -> ArraySplit:
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or len(x) == 0:
        raise DataError(f"{path}: x_{part} is {x.dtype} {list(x.shape)}; expected uint8 [N, H, W, C] with N ≥ 1.")
    if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"{path}: y_{part} is {y.dtype} {list(y.shape)}; expected whole numbers [{len(x)}].")
    if (y < 0).any():
        raise DataError(f"{path}: y_{part} has the label {y.min()}; expected labels from 0. Drop unlabelled images.")
    pixels = torch.from_numpy(x if x.ndim == 4 else x[..., None]).permute(0, 3, 1, 2).contiguous()
    return ArraySplit(pixels, torch.from_numpy(y.astype(np.int64)))


def _cifar(spec: str, path: Path) -> DataSet:
    kind = spec.partition(":")[0]
    datasets = torchvision().datasets
    maker = datasets.CIFAR10 if kind == "cifar10" else datasets.CIFAR100
    try:
        parts = [maker(str(path), train=train, download=False) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{path}: {kind} was not found there; expected torchvision's layout. Get it with "
            f"`python -c \"import torchvision; torchvision.datasets.{maker.__name__}('{path}', download=True)\"`."
        ) from error
    splits = [
        ArraySplit(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    ]
    return DataSet(spec, splits[0], splits[1], tuple(parts[0].classes))


def _folder(spec: str, path: Path, input_size: tuple[int, ...]) -> DataSet:
    if not (is_there(path) and path.is_dir()):
        raise DataError(f"{path}: no such folder; expected one with train/ and test/ (or val/) of class folders.")
    train = path / "train"
    test = path / "test" if (path / "test").is_dir() else path / "val"
    classes = sorted(entry.name for entry in train.iterdir() if entry.is_dir()) if train.is_dir() else []
    if not classes:
        raise DataError(
            f"{train}: no class folders there; expected {train}/CLASS/IMAGE.png. Sort the images into them."
        )
    if not test.is_dir():
        raise DataError(f"{path}: has neither test/ nor val/; expected one of them, with a folder for each class.")
    strange = sorted(entry.name for entry in test.iterdir() if entry.is_dir() and entry.name not in classes)
    if strange:
        raise DataError(
            f"{test}: has the classes {', '.join(strange[:5])}, which {train} has not; expected the classes of train/. "
            "Add them there, or take them out."
        )
    splits = [_folder_split(part, classes, input_size) for part in (train, test)]
    return DataSet(spec, splits[0], splits[1], tuple(classes))


def _folder_split(path: Path, classes: list[str], input_size: tuple[int, ...]) -> FolderSplit:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(file for file in (path / name).rglob("*") if file.suffix.lower() in SUFFIXES)
        files += found
        labels += [label] * len(found)
    if not files:
        kinds = ", ".join(sorted(SUFFIXES))
        raise DataError(f"{path}: no images in {len(classes)} class folders; expected files ending in {kinds}.")
    channels, *size = input_size
    return FolderSplit(files, torch.tensor(labels), (size[0], size[1]), channels)
