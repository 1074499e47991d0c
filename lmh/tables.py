"""Tables that the terminal and the report both show, as rows of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows of text under a head; ``text_columns`` hold words, the others numbers."""

    name: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: Sequence[int] = (0,)
    caption: str | None = None


def error_table(diagnosis: Mapping[str, Any]) -> Table:
    """The error of every site by cause.

    Args:
        diagnosis: :meth:`lmh.calibrate.Diagnosis.to_json`.
    """
    names = ("total", "inherited", "clipping", "rounding", "timing")
    rows = [[row["path"], *(f"{100 * row[name]:.1f}" for name in names)] for row in diagnosis["rows"]]
    return Table(
        f"Error of each site in % of its ANN activation's energy, n = {diagnosis['samples']}",
        ("site", "error", *names[1:]),
        rows,
        caption="error = inherited + clipping + rounding + timing; a negative share undoes others",
    )


def layer_table(energy: Mapping[str, Any]) -> Table:
    """Work and energy of every layer for one sample, and of all.

    Args:
        energy: of :func:`lmh.results.describe_network`.
    """
    total = {"path": "all", "accumulates": energy["synops"], "macs": energy["snn_macs"]}
    total |= {name: energy[name] for name in ("ann_macs", "snn_pj", "ann_pj")}
    rows = []
    for layer in [*energy["layers"], total]:
        snn, ann = layer["snn_pj"], layer["ann_pj"]
        work = [f"{layer[name]:,.0f}" for name in ("accumulates", "macs", "ann_macs")]
        rows.append([layer["path"], *work, f"{snn / 1e6:.4f}", f"{ann / 1e6:.4f}", f"{snn / ann:.2f}" if ann else ""])
    head = ("layer", "SynOps", "SNN MACs", "ANN MACs", "SNN µJ", "ANN µJ", "ratio")
    return Table("Work and energy of every layer, for one sample", head, rows)
