"""Event recordings in the byte formats in which they are published, and what tonic itself reads from them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

tonic = pytest.importorskip("tonic", reason="needs tonic: pip install 'lmh-convert[events]'")
pytest.importorskip("aedat", reason="needs aedat: pip install 'lmh-convert[events]'")

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
Events = np.ndarray
"""[n, 4] whole numbers: x, y, polarity, microseconds, in the order of time."""


def events(label: int, seed: int, side: int, count: int = 300) -> Events:
    """A blob that drifts to the right and lies lower the larger the label is; times are whole milliseconds."""
    random = np.random.default_rng([label, seed])
    times = np.sort(random.integers(0, 100, count)) * 1000
    middle = np.stack([side * (0.3 + 0.4 * times / 1e5), np.full(count, side * (label + 1) / 12)], 1)
    places = np.clip(middle + random.normal(0, side / 25, (count, 2)), 0, side - 1).astype(int)
    return np.column_stack([places, random.integers(0, 2, count), times])


def write_aedat4(path: Path, found: Events) -> None:
    """Write AEDAT 4: a header in XML, then one packet of 16-byte events, each a flatbuffer."""
    info = '<node name="info"><attr key="sizeX">128</attr><attr key="sizeY">128</attr></node>'
    stream = f'<node name="0"><attr key="typeIdentifier">EVTS</attr>{info}</node>'
    text = f'<dv version="2.0"><node name="outInfo">{stream}</node></dv>'.encode()
    vtable = struct.pack("<5HH", 10, 8, 0, 0, 4, 0)  # the table's third field, the description, is 4 bytes in
    header = struct.pack("<I4s", 20, b"IOHE") + vtable + struct.pack("<iI", 12, 4)
    header += struct.pack("<I", len(text)) + text + b"\0"
    body = b"".join(struct.pack("<qhh?3x", t, x, y, bool(p)) for x, y, p, t in found.tolist())
    packet = struct.pack("<I4s3HHiII", 16, b"EVTS", 6, 8, 4, 0, 8, 4, len(found)) + body
    packet = struct.pack("<I", len(packet)) + packet
    stored = struct.pack("<II", 0, len(packet)) + packet
    path.write_bytes(b"#!AER-DAT4.0\r\n" + struct.pack("<I", len(header)) + header + stored)


def write_nmnist(path: Path, found: Events) -> None:
    """Write N-MNIST: 40 bits an event, x, y, polarity, and 23 bits of microseconds."""
    x, y, p, t = found.T
    columns = [x, y, (p << 7) | (t >> 16), (t >> 8) & 255, t & 255]
    path.write_bytes(np.stack(columns, 1).astype(np.uint8).tobytes())


def write_gesture(path: Path, found: Events) -> None:
    """Write DVS Gesture as tonic publishes it: an array of x, y, polarity and milliseconds."""
    np.save(path, found // [1, 1, 1, 1000])


@dataclass(frozen=True)
class Kind:
    """One of the data sets, in small.

    Attributes:
        spec: what the SPEC begins with.
        side: of its sensor, in pixels.
        write: a recording.
        path: of a recording, from part, label and number.
        reader: tonic's class.
        classes: number of labels.
    """

    spec: str
    side: int
    write: Callable[[Path, Events], None]
    path: Callable[[bool, int, int], str]
    reader: str
    classes: int

    def fill(self, folder: Path, per_class: int, labels: int = 3) -> str:
        """Write a data set with as many recordings of each of the first labels, and return its SPEC."""
        for label in range(labels):
            for number in range(per_class):
                train = number < per_class * 9 // 10
                path = folder / self.reader / self.path(train, label, number)
                path.parent.mkdir(parents=True, exist_ok=True)
                self.write(path, events(label, number, self.side))
        return f"{self.spec}:{folder}"

    def read_by_tonic(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: bool) -> object:
        """Return tonic's own data set, which counts the files of the whole one before it opens them."""
        reader = getattr(tonic.datasets, self.reader)
        monkeypatch.setattr(reader, "_check_exists", lambda _: True)
        return reader(str(folder), **options)


def _cifar10(_train: bool, label: int, number: int) -> str:
    return f"{CIFAR10[label]}/cifar10_{CIFAR10[label]}_{number}.aedat4"


def _nmnist(train: bool, label: int, number: int) -> str:
    return f"{'Train' if train else 'Test'}/{label}/{number:05}.bin"


def _gesture(train: bool, label: int, number: int) -> str:
    return f"ibmGesture{'Train' if train else 'Test'}/user{number:02}_led/{label}.npy"


KINDS = {
    "cifar10dvs": Kind("cifar10dvs", 128, write_aedat4, _cifar10, "CIFAR10DVS", 10),
    "nmnist": Kind("nmnist", 34, write_nmnist, _nmnist, "NMNIST", 10),
    "dvsgesture": Kind("dvsgesture", 128, write_gesture, _gesture, "DVSGesture", 11),
}
