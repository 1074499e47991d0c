"""Images in folders: one for each class, or as Tiny-ImageNet-200 is published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..artifact import is_there
from ..errors import DataError
from .splits import DataSet

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
ANNOTATIONS = Path("val", "val_annotations.txt")
TINY_IMAGENET_ADDRESS = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
IMAGENET_PAGE = "https://image-net.org/download-images"


class FolderSplit:
    """Images in files, decoded when asked for, centre-cropped and resized to one size."""

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


def class_folders(spec: str, path: Path, input_size: tuple[int, ...]) -> DataSet:
    """Open train/ and test/ or val/ with a folder for each class, as ImageNet-1k lies behind torchvision's ImageNet."""
    if not (is_there(path) and path.is_dir()):
        raise DataError(
            f"{path}: no such folder; expected one with train/ and test/ (or val/) of class folders. "
            f"For ImageNet-1k, get the archives of 2012 at {IMAGENET_PAGE}, put them into {path}, and sort them by "
            f"`python -c \"from torchvision.datasets import ImageNet; ImageNet('{path}'); ImageNet('{path}', 'val')\"`."
        )
    if is_there(path / ANNOTATIONS):
        raise DataError(
            f"{path}: is Tiny-ImageNet-200 as it is published, whose val/ has no class folders; expected those for "
            f"folder:DIR. Pass tinyimagenet:{path}."
        )
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
    splits = [_sorted_split(part, [part / name for name in classes], input_size) for part in (train, test)]
    return DataSet(spec, splits[0], splits[1], tuple(classes))


def _sorted_split(path: Path, folders: list[Path], input_size: tuple[int, ...]) -> FolderSplit:
    """Return the images of folders, the label of each its folder's place among them."""
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
        files += found
        labels += [label] * len(found)
    if not files:
        kinds = ", ".join(sorted(SUFFIXES))
        raise DataError(f"{path}: no images in {len(folders)} class folders; expected files ending in {kinds}.")
    return _split(files, labels, input_size)


def _split(files: list[Path], labels: list[int], input_size: tuple[int, ...]) -> FolderSplit:
    channels, *size = input_size
    return FolderSplit(files, torch.tensor(labels), (size[0], size[1]), channels)


def tiny_imagenet(spec: str, path: Path, input_size: tuple[int, ...]) -> DataSet:
    """Open Tiny-ImageNet-200 in its original layout, val/ for testing, as its test/ has no labels.

    Labels are in the order of the WordNet ids, as ImageFolder sorts them, and not in that of wnids.txt.
    """
    missing = [name for name in ("wnids.txt", "train", str(ANNOTATIONS)) if not is_there(path / name)]
    if missing:
        raise DataError(
            f"{path}: has no {', '.join(missing)}; expected Tiny-ImageNet-200 in its original layout. Get it with "
            f"`curl -O {TINY_IMAGENET_ADDRESS} && unzip tiny-imagenet-200.zip` and pass the folder tiny-imagenet-200."
        )
    ids = sorted((path / "wnids.txt").read_text(encoding="utf-8").split())
    train = _sorted_split(path / "train", [path / "train" / name / "images" for name in ids], input_size)
    places = {name: label for label, name in enumerate(ids)}
    files: list[Path] = []
    labels: list[int] = []
    for number, line in enumerate((path / ANNOTATIONS).read_text(encoding="utf-8").splitlines(), 1):
        image, name, *_ = [*line.split("\t"), ""]
        if name not in places:
            raise DataError(
                f"{path / ANNOTATIONS}: line {number} names the class {name!r}; expected one of wnids.txt. Unpack the "
                "archive again."
            )
        files.append(path / "val" / "images" / image)
        labels.append(places[name])
    words = path / "words.txt"
    lines = words.read_text(encoding="utf-8").splitlines() if is_there(words) else []
    names = dict(line.split("\t", 1) for line in lines if "\t" in line)
    return DataSet(spec, train, _split(files, labels, input_size), tuple(names.get(name, name) for name in ids))
