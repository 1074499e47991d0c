"""What an export wrote: the file, how it was checked, and what the format could not hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...terminal import loss_lines


@dataclass(frozen=True)
class Exported:
    """A written export.

    Attributes:
        file: where it is.
        format: ``"onnx"``, ``"pt2"`` or ``"nir"``.
        size: of the file, in bytes.
        check: how the file was checked, in one sentence.
        lost: what the format cannot hold, by path of the site or node; empty where the export is exact.
        notices: what a reader of the file needs to know, in sentences.
    """

    file: Path
    format: str
    size: int
    check: str
    lost: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the result as lines for a terminal, paths that lost the same things on one line.

        >>> Exported(Path("net.nir"), "nir", 2048, "Read back.", {"act": ("soft reset",)}).lines()
        ['net.nir: nir, 2.0 kB. Read back.', 'lost in act: soft reset']
        """
        head = f"{self.file}: {self.format}, {_size(self.size)}. {self.check}"
        return [head, *loss_lines(self.lost), *self.notices]

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as ``--json`` prints them."""
        return {
            "file": str(self.file),
            "format": self.format,
            "bytes": self.size,
            "check": self.check,
            "lost": {path: list(losses) for path, losses in self.lost.items()},
            "notices": list(self.notices),
        }


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1024:.1f} kB"


@dataclass(frozen=True)
class Comparison:
    """An exported file's answers beside the network's.

    Attributes:
        inputs: how many random inputs.
        alike: how many of them got the same answer up to rounding: within 1e-4 of the outputs' mean size.
        same_class: share of them with the same largest output, 0 to 1.
        mean_difference: mean |file − network| of the outputs.
        scale: mean |network| of the outputs.
    """

    inputs: int
    alike: int
    same_class: float
    mean_difference: float
    scale: float

    @property
    def agrees(self) -> bool:
        """Whether rounding can have made the difference.

        Two backends round differently, and a potential on the edge of θ then spikes on one side only. In a deep
        network such flips spread until the answer to that input is another one (as it is between the network's own
        float32 and float64); other inputs meet no flip. A wrong weight or a lost parameter moves every answer.
        """
        return self.alike > 0 or self.mean_difference <= 0.1 * self.scale

    def text(self, backend: str) -> str:
        """Return the comparison as one sentence."""
        return (
            f"{backend} beside the network on {self.inputs} random inputs: {self.alike} alike, "
            f"{100 * self.same_class:.0f} % same class, mean difference {self.mean_difference:.1e} at a mean size of "
            f"{self.scale:.1e}."
        )


def compare(got: Sequence[Tensor], expected: Sequence[Tensor]) -> Comparison:
    """Compare a file's answers with the network's, one tensor [N, C] for each batch."""
    file, network = (
        torch.cat([batch.reshape(len(batch), -1).double() for batch in batches]) for batches in (got, expected)
    )
    differences, scale = (file - network).abs().mean(1), float(network.abs().mean())
    return Comparison(
        len(network),
        int((differences <= 1e-4 * scale + 1e-9).sum()),
        float((file.argmax(1) == network.argmax(1)).double().mean()),
        float(differences.mean()),
        scale,
    )
