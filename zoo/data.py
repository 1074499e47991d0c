"""Data sets by one call: ``load_data("digits")``, ``"npz:FILE"``, ``"cifar10:DIR"``, ``"cifar10dvs:DIR"`` and so on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..artifact import is_there, user_path
from ..errors import ArgumentError, DataError
from ..torchvision_shim import torchvision
from .events import EVENT_SETS, holds_events, open_events
from .folders import class_folders, tiny_imagenet
from .images import AnyPreprocessing, FramePreprocessing, Preprocessing
from .splits import ArraySplit, DataSet

IMAGES_HELP = "digits, npz:FILE, cifar10:DIR, cifar100:DIR, tinyimagenet:DIR or folder:DIR"
EVENTS_HELP = "cifar10dvs:DIR, nmnist:DIR or dvsgesture:DIR"
HELP = f"{IMAGES_HELP}; for networks of event frames {EVENTS_HELP}"
ANY_DATA = ("npz", "folder")
"""Kinds of SPEC that hold whatever was put there."""
OF_CIFAR100 = Preprocessing((3, 32, 32), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def load_data(spec: str, *, input_size: tuple[int, ...] | None = None, timesteps: int | None = None) -> DataSet:
    """Open a data set.

    Args:
        spec: ``digits`` (scikit-learn's, embedded), ``npz:FILE`` (x_train [N, H, W, C] uint8, y_train, x_test,
            y_test, classes), ``cifar10:DIR`` and ``cifar100:DIR`` (torchvision's layout), ``tinyimagenet:DIR``
            (Tiny-ImageNet-200 as it is published), or ``folder:DIR`` (train/ and test/ or val/ with a folder for each
            class, such as ImageNet-1k); event recordings in tonic's layout by ``cifar10dvs:DIR``, of which the first
            900 of each class are for training and the last 100 for testing, ``nmnist:DIR`` and ``dvsgesture:DIR``.
        input_size: (C, H, W) that images in folders are cropped and resized to; unless given, 3×224×224, and 3×64×64
            for ``tinyimagenet``, which is their own. All others keep their size.
        timesteps: T, the number of frames that an event recording becomes. Images need none.

    Raises:
        ArgumentError: for a spec that is none of these, or event data without T.
        DataError: saying what is missing or does not fit, and where it was looked for.

    >>> data = load_data("digits")
    >>> len(data.train), len(data.test), data.classes[3]
    (1437, 360, '3')
    """
    if input_size is not None and len(input_size) != 3:
        raise DataError(
            f"{spec} holds images or event frames and the input size is {','.join(map(str, input_size))}; expected "
            "C,H,W. Convert without a data set, or by lmh.convert.convert(model, …, data=batches)."
        )
    kind, _, where = spec.partition(":")
    if kind == "digits" and not where:
        return _digits()
    loaders: dict[str, Callable[[str, Path], DataSet]] = {
        "npz": _npz,
        "cifar10": _cifar,
        "cifar100": _cifar,
        "tinyimagenet": lambda name, path: tiny_imagenet(name, path, input_size or (3, 64, 64)),
        "folder": lambda name, path: class_folders(name, path, input_size or (3, 224, 224)),
        **dict.fromkeys(EVENT_SETS, lambda name, path: open_events(name, path, timesteps)),
    }
    if kind not in loaders or not where:
        raise ArgumentError(f"data {spec!r} is not known; expected {HELP}.")
    return loaders[kind](spec, user_path(where))


def check_kind_of_data(spec: str, preprocessing: AnyPreprocessing) -> None:
    """Refuse images for a network of event frames, and the reverse, before any of them are read.

    Raises:
        DataError: with the data sets that fit.

    >>> check_kind_of_data("digits", Preprocessing((1, 8, 8), (0.3,), (0.4,)))
    """
    frames = isinstance(preprocessing, FramePreprocessing)
    if holds_events(spec) == frames:
        return
    takes = preprocessing.described()["input"]
    has, use = ("images", EVENTS_HELP) if frames else ("event recordings", IMAGES_HELP)
    raise DataError(
        f"{spec} holds {has} and the network's input is {takes}; expected data of that kind. "
        f"Use --data {use}, or another network: those of `lmh zoo list` named cifar10dvs take event frames."
    )


def data_name(spec: str) -> str:
    """Return the name of a data set from its SPEC.

    >>> [data_name(spec) for spec in ("digits", "cifar100:/data", "npz:/data/cifar10.npz", "folder:/data/flowers")]
    ['digits', 'cifar100', 'cifar10', 'flowers']
    """
    kind, _, where = spec.partition(":")
    return Path(where).stem if kind in ANY_DATA else kind


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
    own = OF_CIFAR100 if kind == "cifar100" else None
    return DataSet(spec, splits[0], splits[1], tuple(parts[0].classes), own)
