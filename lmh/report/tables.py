"""The tables of a report alone, as rows of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..tables import Table
from .figures import FATES
from .records import NetworkReport


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
