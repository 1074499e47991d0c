"""Event data through tonic: each recording becomes T frames of counts, which are made once and kept."""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..artifact import make_folder, write_atomically
from ..errors import ArgumentError, ArtifactError, DataError
from ..home import home
from .splits import DataSet

KEPT = "events"
"""Folder of the frames that are kept, in :func:`lmh.home.home`."""
SMALLEST_KEPT = 100_000
"""Bytes of a recording from which on reading its frames is faster than decoding it; those of N-MNIST are smaller."""


class Division(Protocol):
    """How a data set is divided into two parts."""

    def options(self) -> list[dict[str, bool]]:
        """Return the further arguments of tonic's class, for each time that it is opened."""
        ...

    def parts(self, opened: list[Any]) -> list[tuple[Any, list[int]]]:
        """Return what is for training and for testing: tonic's data set, and which of its recordings, in order."""
        ...


@dataclass(frozen=True)
class PartsAsPublished:
    """Train and test recordings were published apart."""

    def options(self) -> list[dict[str, bool]]:
        """Open each by itself."""
        return [{"train": True}, {"train": False}]

    def parts(self, opened: list[Any]) -> list[tuple[Any, list[int]]]:
        """Return all of each."""
        return [(recordings, in_order(recordings)) for recordings in opened]


@dataclass(frozen=True)
class FirstNineTenths:
    """The first nine tenths of every class are for training, by the numbers in the names of the files."""

    def options(self) -> list[dict[str, bool]]:
        """Open all together."""
        return [{}]

    def parts(self, opened: list[Any]) -> list[tuple[Any, list[int]]]:
        """Cut each class."""
        [recordings] = opened
        train: list[int] = []
        test: list[int] = []
        for label in sorted(set(recordings.targets)):
            own = [index for index in in_order(recordings) if recordings.targets[index] == label]
            train += own[: len(own) * 9 // 10]
            test += own[len(own) * 9 // 10 :]
        return [(recordings, train), (recordings, test)]


@dataclass(frozen=True)
class EventSet:
    """A data set that tonic reads.

    Attributes:
        reader: name of its class in ``tonic.datasets``, and of its folder.
        files: where recordings lie in that folder.
        division: into training and testing.
        packages: that reading it takes.
    """

    reader: str
    files: str
    division: Division
    packages: tuple[str, ...] = ("tonic",)


EVENT_SETS = {
    "cifar10dvs": EventSet("CIFAR10DVS", "airplane/cifar10_airplane_0.aedat4", FirstNineTenths(), ("tonic", "aedat")),
    "nmnist": EventSet("NMNIST", "Train/0/00002.bin", PartsAsPublished()),
    "dvsgesture": EventSet("DVSGesture", "ibmGestureTrain/user01_fluorescent/0.npy", PartsAsPublished()),
}


def holds_events(spec: str) -> bool:
    """Whether a SPEC names event data.

    >>> holds_events("cifar10dvs:/data"), holds_events("cifar10:/data")
    (True, False)
    """
    return spec.partition(":")[0] in EVENT_SETS


@dataclass(frozen=True)
class EventSplit:
    """Event recordings as frames, int16 [n, T, 2, H, W]: numbers of events by tonic's ``ToFrame(n_time_bins=T)``.

    Decoding a recording of CIFAR10-DVS or DVS Gesture takes more than ten times as long as reading its frames, so these
    are kept compressed in ``LMH_HOME``, a file of some 100 kB for each recording and T; whatever changes a recording's
    path, size or time of change makes them anew. The folder ``events`` there may be deleted at any time.

    Attributes:
        recordings: tonic's data set.
        chosen: its recordings that this part has.
        labels: of these, int64 [n].
        timesteps: T.
    """

    recordings: Any
    chosen: tuple[int, ...]
    labels: Tensor
    timesteps: int

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of a frame, (2, H, W)."""
        width, height, polarities = self.recordings.sensor_size
        return polarities, height, width

    def images(self, indices: Tensor) -> Tensor:
        """Return the frames of the chosen recordings, int16 [n, T, 2, H, W].

        Raises:
            DataError: if a recording cannot be read, or its frames cannot be kept.
        """
        return torch.stack([torch.from_numpy(self._frames(self.chosen[index])) for index in indices.tolist()])

    def _frames(self, index: int) -> np.ndarray:
        recording = Path(self.recordings.data[index])
        try:
            stat = recording.stat()
        except OSError as error:
            raise DataError(f"{recording}: cannot be read any more ({error.strerror}). Put it back.") from error
        if stat.st_size < SMALLEST_KEPT:
            return self._made(recording, index)
        kept = self._place(recording, stat)
        try:
            with np.load(kept, allow_pickle=False) as found:
                return found["frames"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):  # not there yet, or damaged
            frames = self._made(recording, index)
        packed = io.BytesIO()
        np.savez_compressed(packed, frames=frames)
        try:
            make_folder(kept.parent, "Choose another with LMH_HOME.")
            write_atomically(kept, packed.getvalue())
        except ArtifactError as error:
            raise DataError(
                f"{kept}: the frames of {recording} cannot be kept ({error.__cause__}); expected a writable "
                f"folder with free space. Delete {home() / KEPT}, or choose another place with LMH_HOME."
            ) from error
        return frames

    def _place(self, recording: Path, stat: os.stat_result) -> Path:
        """Return where a recording's frames are kept."""
        tonic = importlib.import_module("tonic")
        facts = (recording.resolve(), stat.st_size, stat.st_mtime_ns, self.timesteps, tonic.__version__)
        digest = hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()
        return home() / KEPT / digest[:2] / f"{digest}.npz"

    def _made(self, recording: Path, index: int) -> np.ndarray:
        transforms = importlib.import_module("tonic.transforms")
        to_frame = transforms.ToFrame(sensor_size=self.recordings.sensor_size, n_time_bins=self.timesteps)
        try:
            frames = to_frame(self.recordings[index][0]).astype(np.int16)
        except Exception as error:  # readers of bytes raise almost anything on files that are none of theirs
            raise DataError(
                f"{recording}: not a readable recording ({type(error).__name__}: {error}); expected one as tonic's "
                f"{type(self.recordings).__name__} reads it. Remove it, or get the data again."
            ) from error
        if frames.shape != (self.timesteps, *self.shape) or not frames.any():
            raise DataError(
                f"{recording}: gave {int(frames.sum())} events in frames {list(frames.shape)}; expected some in "
                f"{[self.timesteps, *self.shape]}. Remove it, or get the data again."
            )
        return frames


def open_events(spec: str, path: Path, timesteps: int | None) -> DataSet:
    """Open event data where tonic puts it: in a folder of the data set's name in ``path``.

    Args:
        spec: for the data set's name and for messages.
        path: what tonic calls ``save_to``.
        timesteps: T.

    Raises:
        ArgumentError: without T.
        DataError: if tonic is not installed, or no recordings are there.
    """
    known = EVENT_SETS[spec.partition(":")[0]]
    if timesteps is None:
        raise ArgumentError(
            f"{spec} holds event recordings and timesteps= was not given; expected the number of frames that each "
            f"becomes. Pass load_data({spec!r}, timesteps=10), say; `lmh finetune` and lmh-convert do, by -T."
        )
    if isinstance(timesteps, bool) or not isinstance(timesteps, int) or timesteps < 1:
        raise ArgumentError(f"{spec}: timesteps is {timesteps!r}; expected a whole number of frames, such as 10.")
    opened = [_opened(spec, known, path, options) for options in known.division.options()]
    splits = []
    for recordings, chosen in known.division.parts(opened):
        labels = torch.tensor([recordings.targets[index] for index in chosen], dtype=torch.long)
        splits.append(EventSplit(recordings, tuple(chosen), labels, timesteps))
    return DataSet(spec, splits[0], splits[1], tuple(opened[0].classes))


def _opened(spec: str, known: EventSet, path: Path, options: dict[str, bool]) -> Any:
    """Return tonic's data set of the recordings that are there; tonic itself would begin to download."""
    for package in known.packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise DataError(
                f"{spec}: the package {package} is not installed ({error}); expected it for event data. "
                "Run: pip install 'lmh-convert[events]'."
            ) from error
    reader = getattr(importlib.import_module("tonic.datasets"), known.reader)
    present = type(known.reader, (reader,), {"_check_exists": lambda _: True})
    recordings = present(str(path), **options)
    if len(recordings) == 0:
        given = [
            [repr(str(path)), *(f"{name}={value}" for name, value in each.items())] for each in known.division.options()
        ]
        calls = "; ".join(f"{known.reader}({', '.join(arguments)})" for arguments in given)
        raise DataError(
            f"{spec}: no recordings in {recordings.location_on_system}/{recordings.folder_name}; expected tonic's "
            f"layout, {path / known.reader / known.files} and so on. Get it with "
            f'`python -c "from tonic.datasets import {known.reader}; {calls}"`.'
        )
    return recordings


def in_order(recordings: Any) -> list[int]:
    """Return the places of tonic's recordings, sorted by path, numbers as numbers: file 9 comes before file 10."""

    def key(index: int) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", files[index])]

    files = [str(file) for file in recordings.data]
    return sorted(range(len(files)), key=key)
