"""The tables of a report as rows of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .figures import FATES
from .records import NetworkReport


@dataclass(frozen=True)
class Table:
    """Rows of text under a head; ``text_columns`` hold words, the others numbers."""

    name: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: Sequence[int] = (0,)


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def site_table(report: NetworkReport) -> Table:
    """Every site: its neurons, threshold and rate."""
    rows = []
    for site in report.result["sites"]:
        spread = f"{site['v_threshold_min']:.3g} … {site['v_threshold_max']:.3g}" if site["channels"] > 1 else ""
        shares = [
            "" if site[name] is None else f"{100 * site[name]:.1f} %"
            for name in ("silent_channels", "saturated_channels")
        ]
        rate = "" if site["firing_rate"] is None else f"{site['firing_rate']:.3f}"
        rows.append([site["path"], site["neuron"], _number(site["v_threshold"]), spread, rate, *shares])
    head = ("site", "neuron", "θ", "θ over channels", "firing rate", "silent", "saturated")
    return Table("All sites", head, rows, (0, 1))


def error_table(report: NetworkReport) -> Table | None:
    """The error of every site by cause."""
    diagnosis = report.result["diagnosis"]
    if diagnosis is None:
        return None
    names = ("total", "inherited", "clipping", "rounding", "timing")
    rows = [[row["path"], *(f"{100 * row[name]:.1f} %" for name in names)] for row in diagnosis["rows"]]
    return Table(f"Errors of all sites, n = {diagnosis['samples']}", ("site", "error", *names[1:]), rows)


def layer_table(report: NetworkReport) -> Table | None:
    """Work and energy of every layer for one sample."""
    energy = report.result["energy"]
    if energy is None:
        return None
    rows = []
    for layer in [*energy["layers"], _total(energy)]:
        snn, ann = layer["snn_pj"], layer["ann_pj"]
        work = [f"{layer[name]:,.0f}" for name in ("accumulates", "macs", "ann_macs")]
        rows.append([layer["path"], *work, f"{snn / 1e6:.4f}", f"{ann / 1e6:.4f}", f"{snn / ann:.2f}" if ann else ""])
    head = ("layer", "SynOps", "SNN MACs", "ANN MACs", "SNN in µJ", "ANN in µJ", "ratio")
    return Table("All layers, for one sample", head, rows)


def _total(energy: Mapping[str, Any]) -> dict[str, Any]:
    same = {name: energy[name] for name in ("ann_macs", "snn_pj", "ann_pj")}
    return {"path": "all", "accumulates": energy["synops"], "macs": energy["snn_macs"], **same}


def node_table(report: NetworkReport) -> Table | None:
    """Every node of the spiking network."""
    if not report.nodes:
        return None
    rows = [[node.path, node.what, FATES[node.fate][1]] for node in report.nodes]
    return Table("All nodes", ("node", "what", "works"), rows, (0, 1, 2))


def _call(value: Any) -> str:
    """Return a plain value as text, what was made from a dataclass as the call that makes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        inner = [f"{name}={_call(item)}" for name, item in value.items() if name != "type"]
        return f"{value.get('type', '')}({', '.join(inner)})"
    if isinstance(value, list | tuple):
        return f"({', '.join(_call(item) for item in value)})"
    return str(value)


def facts_text(report: NetworkReport) -> str:
    """Command, versions and recipe, a line each."""
    lines = []
    for name, value in report.facts.items():
        lines.append(f"{name}: {_call(value)}")
    if report.result["output"]:
        lines.append(f"written: {report.result['output']}")
    return "\n".join(lines) or "Nothing is known of how it was made."
