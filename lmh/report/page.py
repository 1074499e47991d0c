"""A report as one HTML file that needs nothing else, and its values as JSON beside it."""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from ..artifact import write_atomically
from ..errors import ArgumentError
from ..tables import Table, error_table, layer_table
from . import figures
from .records import NetworkReport
from .tables import facts_text, node_table, site_table

ANOTHER = "Choose another place for the page."


@dataclass(frozen=True)
class Drawing:
    """A figure in the page, or the sentence that says why there is none."""

    caption: str
    svg: Markup | None = None
    missing: str | None = None


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    title: str
    text: str = ""
    drawings: Sequence[Drawing] = ()
    samples: Sequence[dict[str, Any]] = ()
    table: Table | None = None
    open: bool = False
    code: str = ""
    id: str = field(init=False)

    @property
    def missing(self) -> list[str]:
        """Why drawings are missing, each reason once."""
        return list(dict.fromkeys(drawing.missing for drawing in self.drawings if drawing.missing))

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", re.sub(r"\W+", "-", self.title.lower()))


def page_file(file: str | Path) -> Path:
    """Return the path of a page.

    Raises:
        ArgumentError: if it does not end in ``.html``.

    >>> page_file("report.html").name
    'report.html'
    """
    page = Path(file)
    if page.suffix.lower() not in (".html", ".htm"):
        raise ArgumentError(f"{file}: a report is a web page; expected a name that ends in .html. Name it report.html.")
    return page


def write_report(report: NetworkReport, file: str | Path) -> tuple[Path, Path]:
    """Write the page, and the report's values beside it.

    Args:
        report: what to show.
        file: the page, as in ``report.html``; the values go to ``report.html.json``.

    Returns:
        Both paths.

    Raises:
        ArgumentError: if ``file`` does not end in ``.html``.
        ArtifactError: if one cannot be written.
    """
    page = page_file(file)
    values = page.with_name(f"{page.name}.json")
    write_atomically(page, report_page(report).encode(), ANOTHER)
    write_atomically(values, json.dumps(report.to_json(), default=str).encode(), ANOTHER)
    return page, values


def report_page(report: NetworkReport) -> str:
    """Return the page: text, tables and inline figures, without any reference to another file.

    >>> from lmh.convert import load
    >>> from lmh.results import describe_network
    >>> result = describe_network(load("zoo:digits-cnn-t4"), source="digits", calibration="", nodes={}, evaluation=None)
    >>> "<script" in report_page(NetworkReport(result))
    False
    """
    environment = Environment(
        loader=PackageLoader("lmh.report", ""), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    result = report.result
    return environment.get_template("page.html.jinja").render(
        title=f"{_name(result['source'])} as a spiking network, T = {result['timesteps']}",
        subtitle=_subtitle(report),
        cards=list(_cards(report)),
        notices=result["notices"],
        sections=list(_sections(report)),
    )


def _name(source: str) -> str:
    """Return a source as a title: of a file its name alone."""
    return Path(source).name if Path(source).suffix else source


def inline_svg(figure: Figure, name: str, alt: str) -> Markup:
    """Return a figure for the inside of a page: its ink takes the page's colour, its ids begin with ``name``."""
    style = {**figures.STYLE, "svg.hashsalt": name}
    with io.StringIO() as stream, matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the reader's fonts have it, or not
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(figures.INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    label = Markup('<svg role="img" aria-label="{}"').format(alt)
    return Markup(re.sub(r"<svg", lambda _: str(label), svg, count=1))


def _drawing(name: str, caption: str, draw: Callable[[], Figure]) -> Drawing:
    try:
        return Drawing(caption, svg=inline_svg(draw(), name, caption))
    except ArgumentError as missing:
        return Drawing(caption, missing=str(missing))


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.2f} %"


def _subtitle(report: NetworkReport) -> str:
    result = report.result
    samples = "no data" if result["samples"] is None else f"{result['samples']} test samples"
    return f"{result['calibration']}; {samples}; the answer is {result['readout']}."


def _cards(report: NetworkReport) -> Iterator[dict[str, str]]:
    """The figures that come first."""
    result = report.result

    def card(name: str, value: str, note: str = "") -> dict[str, str]:
        return {"name": name, "value": value, "note": note}

    labelled = result["snn_accuracy"] is not None
    found = result["snn_accuracy"] if labelled else result["agreement"]
    yield card("ANN accuracy", _percent(result["ann_accuracy"]))
    before = result["training_free"] and _last(result["training_free"]["snn_accuracy"])
    tuned = f"{_percent(before)} before training" if before is not None else ""
    yield card("SNN accuracy" if labelled else "Agreement with the ANN", _percent(_last(found)), tuned)
    yield card("Time steps", str(result["timesteps"]))
    energy = result["energy"]
    ratio = None if energy is None else energy["ratio"]
    yield card("Energy, SNN / ANN", "unknown" if ratio is None else f"{ratio:.2f}", "an estimate, see Energy")
    yield card("Neurons", f"{len(result['sites'])} sites", _coverage(result["spiking_coverage"]))


def _last(values: Sequence[float] | None) -> float | None:
    return values[-1] if values else None


def _coverage(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} % of activations spike"


def _sections(report: NetworkReport) -> Iterator[Section]:
    """The parts of the page, in their order."""
    result = report.result

    def draw(name: str, caption: str) -> Drawing:
        return _drawing(name.replace("_", "-"), caption, partial(getattr(figures, name), report))

    yield Section(
        "Accuracy",
        drawings=(
            draw("accuracy", "Accuracy after t steps, and that of the ANN."),
            draw("confusion", "Rows are classes, columns the spiking network's answers at T."),
        ),
    )
    yield Section(
        "Neurons",
        text="A site is one activation of the ANN with its neurons. A silent channel never fired on these samples, a "
        "saturated one at 99 % of steps or more.",
        drawings=(
            draw("firing_rates", "Mean spikes per neuron and step; shares of silent and saturated channels."),
            draw(
                "thresholds",
                "The ANN's positive activations in units of θ, and what share of all lies above it.",
            ),
        ),
        table=site_table(report),
        open=True,
    )
    yield Section(
        "Where the error comes from",
        text="The error of each site beside the ANN's activation a: inherited from earlier layers, clipped at θ, "
        "rounded to T spikes, and mistimed by the order of currents. A negative share undoes others. This and the "
        "activations above are of the first samples, up to 128.",
        drawings=(draw("site_errors", "Shares of the error's energy, in per cent of that of the activation."),),
        table=None if result["diagnosis"] is None else error_table(result["diagnosis"]),
    )
    energy = result["energy"]
    yield Section(
        "Energy",
        text="" if energy is None else energy["assumptions"],
        drawings=(draw("energy", "Estimated energy of each layer for one sample."),),
        table=None if energy is None else layer_table(energy),
    )
    yield Section(
        "Training",
        drawings=(
            draw("losses", "Loss, and accuracy on held-out samples, by epoch."),
            draw("neurons", "Threshold θ, λ and μ by epoch, a line for each site: dark ones near the input."),
        ),
    )
    yield Section("Changed decisions", text=_changed_text(report), samples=list(_samples(report)))
    yield Section(
        "Graph",
        drawings=(draw("graph", "Every node from input to output; arcs skip the nodes between."),),
        table=node_table(report),
    )
    yield Section("How it was made", code=facts_text(report))


def _changed_text(report: NetworkReport) -> str:
    agreement = _last(report.result["agreement"])
    if agreement is None:
        return "No sample was compared with the ANN: give data (--data), with the ANN at hand."
    changed = round((1 - agreement) * report.result["samples"])
    end = "."
    if report.changed:
        end = ":" if len(report.changed) == changed else f"; the first {len(report.changed)}:"
    return f"{changed} of {report.result['samples']} samples get another answer than from the ANN{end}"


def _samples(report: NetworkReport) -> Iterator[dict[str, Any]]:
    for sample in report.changed:
        label = None if sample.label is None else report.class_name(sample.label)
        svg = None
        if sample.rasters:
            alt = f"Spikes of sample {sample.position} at {', '.join(raster.site for raster in sample.rasters)}"
            svg = inline_svg(figures.rasters(sample), f"sample-{sample.position}", alt)
        yield {
            "position": sample.position,
            "png": sample.png,
            "alt": f"Sample {sample.position}" + (f", a {label}" if label else ""),
            "label": label,
            "ann": report.class_name(sample.ann),
            "snn": ", ".join(report.class_name(answer) for answer in sample.snn),
            "svg": svg,
        }
