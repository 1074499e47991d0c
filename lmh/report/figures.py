"""The figures of a report, one function each: from a :class:`NetworkReport` to a matplotlib figure.

They have no background, and what is not data is drawn in :data:`INK`, so that a page can give it its own colour. Where
a report does not hold what a figure shows, the function raises ArgumentError, which says what would have to be run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve
from matplotlib.ticker import MaxNLocator

from ..energy import PICOJOULE_PER_ACCUMULATE
from ..errors import ArgumentError
from ..terminal import shown_steps
from .records import BINS_PER_THRESHOLD, THRESHOLDS_SHOWN, ChangedSample, NetworkReport

P = ParamSpec("P")
INK = "#101418"
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2f7fd6", "#d97706", "#2a9d5c", "#d9463d", "#8a63d2", "#7b8794"
FATES = {
    "neurons": (BLUE, "LM-H neurons, at every step"),
    "reads spikes": (GREEN, "on spikes, at every step"),
    "reads values": (ORANGE, "on other values, at every step"),
    "once": (PURPLE, "once: does not depend on time"),
    "time mean": (RED, "once, on the mean over time"),
    "kept analog": (GREY, "kept analog"),
}
"""When a node of the graph runs and on what: its colour, and that in words."""
CAUSES = {"inherited": PURPLE, "clipping": ORANGE, "rounding": GREEN, "timing": RED}
COEFFICIENTS = {"v_threshold": "θ", "lambda_s": "λS", "lambda_d": "λD", "mu_s": "μS", "mu_d": "μD"}
WIDTH = 5.2  # inches; a page of a phone shows it at 0.7 of its size
MOST_CLASSES = 20
STYLE: dict[Any, Any] = {
    "font.size": 9.5, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "legend.frameon": False, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "svg.fonttype": "none", "font.family": "sans-serif", "text.parse_math": False,
}  # fmt: skip


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Let a function draw in :data:`STYLE`."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


def _figure(
    height: float, rows: int = 1, columns: int = 1, *, layout: Any = "constrained", **options: Any
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout=layout)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def _need(found: Any, what: str, how: str) -> None:
    if not found:
        raise ArgumentError(f"The report has no {what}. {how}")


def _sites(report: NetworkReport) -> Sequence[Any]:
    return report.result["sites"]


def shortened(name: str, most: int) -> str:
    """Return the end of a name that is longer than ``most`` characters, which tells paths apart.

    >>> shortened("layer1.0.relu", 20), shortened("features.stage1.block3.activation", 12)
    ('layer1.0.relu', '….activation')
    """
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _across(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a horizontal chart, the first on top."""
    axes.set_yticks(range(len(names)), [shortened(name, 24) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _mark(axes: Axes, values: Sequence[float], label: str) -> None:
    """Mark one value in each row of a horizontal chart."""
    axes.plot(values, range(len(values)), linestyle="none", marker="|", markersize=9, color=INK, label=label)


def _legend_above(axes: Axes) -> None:
    """Explain the colours above a chart, in one line."""
    columns = len(axes.get_legend_handles_labels()[0])
    options = {"fontsize": 8, "handlelength": 1, "columnspacing": 1}
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, **options)


def _tall(rows: int) -> float:
    """Height of a chart with a row for each site or layer, in inches."""
    return 1.0 + 0.2 * rows


@_styled
def accuracy(report: NetworkReport) -> Figure:
    """Accuracy after t steps beside the ANN's; without labels, agreement with the ANN."""
    result = report.result
    labelled = result["snn_accuracy"] is not None
    name = "snn_accuracy" if labelled else "agreement"
    _need(result[name], "measured accuracy", "Give data (--data), with labels or with the ANN at hand.")
    figure, (axes,) = _figure(3.0)
    steps = range(1, result["timesteps"] + 1)
    before = result["training_free"]
    if before and before[name]:
        axes.plot(steps, 100 * np.array(before[name]), color=ORANGE, marker="o", label="SNN, training-free")
    final = "SNN, fine-tuned" if before or result["stages"] else "SNN"
    axes.plot(steps, 100 * np.array(result[name]), color=BLUE, marker="o", label=final)
    if labelled and result["ann_accuracy"] is not None:
        axes.axhline(100 * result["ann_accuracy"], color=INK, linestyle="--", linewidth=1, label="ANN")
    axes.set_xlabel("t, steps")
    axes.set_ylabel("accuracy in %" if labelled else "agreement with the ANN in %")
    axes.set_xticks(shown_steps(result["timesteps"]))
    axes.legend(loc="lower right")
    return figure


@_styled
def firing_rates(report: NetworkReport) -> Figure:
    """Mean spikes per neuron and step of every site, and its silent and saturated channels."""
    sites = [site for site in _sites(report) if site["firing_rate"] is not None]
    _need(sites, "firing rates", "Give data (--data).")
    figure, (left, right) = _figure(_tall(len(sites)), 1, 2, sharey=True, width_ratios=[3, 2])
    rows = np.arange(len(sites))
    left.barh(rows, [site["firing_rate"] for site in sites], color=BLUE)
    _across(left, [site["path"] for site in sites])
    left.set_xlabel("spikes per neuron and step")
    silent = np.array([100 * site["silent_channels"] for site in sites])
    full = np.array([100 * site["saturated_channels"] for site in sites])
    right.barh(rows, silent, color=PURPLE, label="silent")
    right.barh(rows, full, left=silent, color=RED, label="saturated")
    right.set_xlim(0, max(5.0, (silent + full).max()))
    right.set_xlabel("channels in %")
    right.tick_params(axis="y", length=0)
    _legend_above(right)
    return figure


@_styled
def thresholds(report: NetworkReport) -> Figure:
    """Where the ANN's activations lie beside the threshold, for every site."""
    shown = {path: np.array(shares) for path, shares in report.activations.items()}
    _need(shown, "histogram of activations", "Give data (--data), with the ANN at hand.")
    columns = 3
    rows = -(-len(shown) // columns)
    height = 0.5 + 0.95 * rows
    # a constrained layout takes half a minute for a hundred panels
    figure, axes = _figure(height, rows, columns, layout=None, sharex=True)
    figure.subplots_adjust(0.02, 0.3 / height, 0.98, 1 - 0.25 / height, 0.06, 0.45)
    edges = np.arange(len(next(iter(shown.values())))) / BINS_PER_THRESHOLD
    for panel, (path, shares) in zip(axes, shown.items(), strict=False):
        panel.bar(edges[:-1], shares[:-1], width=1 / BINS_PER_THRESHOLD, align="edge", color=BLUE)
        panel.axvline(1, color=RED, linewidth=1)
        panel.set_title(shortened(path, 23), fontsize=7.5)
        panel.set_yticks([])
        beyond = shares[BINS_PER_THRESHOLD:].sum()
        panel.text(0.98, 0.72, f"{100 * beyond:.1f} %\nabove θ", transform=panel.transAxes, ha="right", fontsize=7)
    for panel in axes[len(shown) :]:
        panel.set_axis_off()
    for panel in axes[max(0, len(shown) - columns) : len(shown)]:
        panel.set_xticks([0, 1, THRESHOLDS_SHOWN], ["0", "θ", f"{THRESHOLDS_SHOWN} θ"])
        panel.tick_params(labelbottom=True)
    return figure


@_styled
def site_errors(report: NetworkReport) -> Figure:
    """The error of each site in per cent of its activation's energy, split by cause."""
    diagnosis = report.result["diagnosis"]
    _need(diagnosis, "diagnosis", "Give data (--data), with the ANN at hand.")
    rows = diagnosis["rows"]
    figure, (axes,) = _figure(_tall(len(rows)))
    above, below = np.zeros(len(rows)), np.zeros(len(rows))
    for cause, colour in CAUSES.items():
        share = np.array([100 * row[cause] for row in rows])
        axes.barh(range(len(rows)), share, left=np.where(share > 0, above, below), color=colour, label=cause)
        above, below = above + share.clip(min=0), below + share.clip(max=0)
    total = [100 * row["total"] for row in rows]
    _mark(axes, total, "in all")
    _across(axes, [row["path"] for row in rows])
    axes.set_xlabel("error in % of E[a²]")
    _legend_above(axes)
    return figure


@_styled
def energy(report: NetworkReport) -> Figure:
    """Energy of every layer for one sample, by what it does, beside the ANN's."""
    found = report.result["energy"]
    _need(found, "energy", "Give data (--data).")
    layers = found["layers"]
    figure, (axes,) = _figure(_tall(len(layers)))
    rows = np.arange(len(layers))
    adding = np.array([PICOJOULE_PER_ACCUMULATE * layer["accumulates"] for layer in layers]) / 1e6
    multiplying = np.array([layer["snn_pj"] for layer in layers]) / 1e6 - adding
    ann = [layer["ann_pj"] / 1e6 for layer in layers]
    axes.barh(rows, adding, height=0.6, color=GREEN, label="SNN, accumulates")
    axes.barh(rows, multiplying, left=adding, height=0.6, color=ORANGE, label="SNN, multiplies")
    _mark(axes, ann, "ANN")
    _across(axes, [layer["path"] for layer in layers])
    axes.set_xlabel("µJ per sample")
    _legend_above(axes)
    return figure


@_styled
def losses(report: NetworkReport) -> Figure:
    """Loss, and accuracy on held-out samples where there were some, over the epochs of all stages."""
    epochs = _epochs(report)
    held_out = [epoch["val_accuracy"] for epoch in epochs]
    measured = any(value is not None for value in held_out)
    figure, axes = _figure(4.4 if measured else 2.8, 2 if measured else 1, sharex=True)
    positions = np.arange(1, len(epochs) + 1)
    first = 0
    for stage in report.training:
        last = first + len(stage["epochs"])
        axes[0].plot(positions[first:last], [epoch["loss"] for epoch in stage["epochs"]], color=BLUE, marker=".")
        first = last
    axes[0].set_ylabel("loss")
    if measured:
        percent = [np.nan if value is None else 100 * value for value in held_out]
        axes[1].plot(positions, percent, color=GREEN, marker=".")
        axes[1].set_ylabel("held-out accuracy in %")
    axes[-1].set_xlabel("epoch")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _mark_stages(report, axes)
    return figure


def _epochs(report: NetworkReport) -> list[Any]:
    """The epochs of all stages."""
    how = "What lmh-convert --finetune and lmh finetune write holds one; in Python pass training=."
    _need(report.training, "training", how)
    return [epoch for stage in report.training for epoch in stage["epochs"]]


def _mark_stages(report: NetworkReport, axes: Sequence[Axes]) -> None:
    start = 0
    for stage in report.training:
        if len(report.training) > 1:
            axes[0].text(start + 1, 1.02, stage["stage"], transform=axes[0].get_xaxis_transform(), fontsize=8)
            for panel in axes if start else ():
                panel.axvline(start + 0.5, color=INK, linestyle=":", linewidth=0.8)
        start += len(stage["epochs"])


@_styled
def neurons(report: NetworkReport) -> Figure:
    """θ, λ and μ of every site over the epochs: the mean over channels and steps."""
    epochs = _epochs(report)
    known = [epoch["neurons"] or {} for epoch in epochs]
    _need(any(known), "values of neurons by epoch", "The file was written before they were kept: fine-tune it again.")
    paths = list(next(found for found in reversed(known) if found))
    figure, axes = _figure(1.0 + 1.15 * len(COEFFICIENTS), len(COEFFICIENTS), sharex=True)
    colours = matplotlib.colormaps["viridis"](np.linspace(0.15, 0.8, len(paths)))
    for panel, (name, symbol) in zip(axes, COEFFICIENTS.items(), strict=True):
        for path, colour in zip(paths, colours, strict=True):
            values = [found.get(path, {}).get(name) for found in known]
            means = [np.nan if value is None else float(np.mean(value)) for value in values]
            panel.plot(range(1, len(epochs) + 1), means, color=colour, linewidth=1, marker=".", markersize=3)
        panel.set_ylabel(symbol)
    axes[-1].set_xlabel("epoch")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _mark_stages(report, axes)
    return figure


@_styled
def confusion(report: NetworkReport) -> Figure:
    """How often samples of a class get which answer; of many classes, the most frequent confusions."""
    _need(report.confusion, "confusion matrix", "Give data with labels (--data).")
    found = {(label, answer): count for label, answer, count in report.confusion}
    classes = max(len(report.classes), 1 + max(max(pair) for pair in found))
    if classes > MOST_CLASSES:
        return _most_confused(report, found)
    figure, (axes,) = _figure(4.6)
    counts = np.zeros((classes, classes))
    for pair, count in found.items():
        counts[pair] = count
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (label, answer), count in found.items():
        colour = "white" if shares[label, answer] > 0.5 else "#101419"  # on the picture's own light ground
        axes.text(answer, label, str(count), ha="center", va="center", fontsize=7.5, color=colour)
    names = [shortened(report.class_name(label), 14) for label in range(classes)]
    axes.set_xticks(range(classes), names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(classes), names, fontsize=8)
    axes.set_xlabel("answer")
    axes.set_ylabel("class")
    return figure


def _most_confused(report: NetworkReport, found: dict[tuple[int, int], int]) -> Figure:
    wrong = sorted(((count, pair) for pair, count in found.items() if pair[0] != pair[1]), reverse=True)[:15]
    _need(wrong, "wrong answer", "All samples were answered right.")
    figure, (axes,) = _figure(_tall(len(wrong)))
    axes.barh(range(len(wrong)), [count for count, _ in wrong], color=RED)
    names = [[shortened(report.class_name(label), 14) for label in pair] for _, pair in wrong]
    axes.set_yticks(range(len(names)), [" → ".join(pair) for pair in names], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("samples")
    return figure


@_styled
def rasters(sample: ChangedSample) -> Figure:
    """The spikes of a sample, a panel for each of some sites."""
    _need(sample.rasters, "spikes of this sample", "Give data (--data).")
    figure, axes = _figure(2.0, 1, len(sample.rasters))
    steps = len(sample.snn)
    for panel, raster in zip(axes, sample.rasters, strict=True):
        if raster.spikes:
            times, rows = zip(*raster.spikes, strict=True)
            panel.scatter(np.array(times) + 1, rows, marker="|", s=12, linewidths=1.2, color=BLUE)
        panel.set_xlim(0.4, steps + 0.6)
        panel.set_ylim(-1, max(raster.neurons, 1))
        panel.set_title(shortened(raster.site, 19), fontsize=8)
        panel.set_yticks([])
        panel.set_ylabel(f"{raster.neurons} of {raster.of} neurons", fontsize=7.5)
        panel.set_xlabel("step", fontsize=8)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


@_styled
def graph(report: NetworkReport) -> Figure:
    """Every node of the spiking network from input to output, what it works on, and what skips over others."""
    _need(report.nodes, "graph", "Make it by lmh-convert or lmh report.")
    nodes = report.nodes
    figure, (axes,) = _figure(0.8 + 0.19 * len(nodes))
    for row, node in enumerate(nodes):
        for source in node.inputs:
            span = row - source
            bend = 0 if span == 1 else -min(0.5 + 0.12 * span, 3.0)
            curve = Curve([(0, source), (bend, source), (bend, row), (0, row)], [Curve.MOVETO, *[Curve.CURVE4] * 3])
            axes.add_patch(PathPatch(curve, fill=False, edgecolor=INK, linewidth=0.7, alpha=0.6))
    for fate, (colour, words) in FATES.items():
        rows = [row for row, node in enumerate(nodes) if node.fate == fate]
        if rows:
            axes.scatter([0] * len(rows), rows, s=26, color=colour, label=words, zorder=3)
    for row, node in enumerate(nodes):
        axes.text(0.25, row, f"{shortened(node.path, 44)}  ·  {shortened(node.what, 20)}", va="center", fontsize=7.5)
    axes.set_xlim(-2.6, 6)
    axes.set_ylim(len(nodes) - 0.3, -0.7)
    axes.set_axis_off()
    figure.legend(loc="outside upper left", fontsize=7.5, ncols=1, handletextpad=0.3)
    return figure
