"""What is known of a converted network, as figures, as one HTML page, and as JSON.

A report comes from :func:`lmh.convert.reporting.report_on`, or from its own JSON. :func:`write_report` writes the page
and the JSON; :mod:`lmh.report.figures` draws single figures: ``figures.accuracy(report).savefig("accuracy.pdf")``.
"""

from __future__ import annotations

from .page import report_page, write_report
from .records import ChangedSample, GraphNode, NetworkReport, Raster
from .structure import graph_nodes

__all__ = [
    "ChangedSample",
    "GraphNode",
    "NetworkReport",
    "Raster",
    "graph_nodes",
    "report_page",
    "write_report",
]
