"""What the commands print: progress while they work, tables when they are done."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import rich.table
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from .tables import Table, error_table, layer_table
from .verbosity import Verbosity, verbosity

Advance = Callable[[int, str], None]
SHOWN = 3


class Terminal:
    """Progress and notices go to standard error, results to standard output.

    On a terminal progress is a bar; elsewhere, as in CI logs, a plain line when a stage ends. --quiet leaves them out.
    """

    def __init__(self, *, results: bool = True) -> None:
        quiet = verbosity() is Verbosity.QUIET
        plain = partial(Console, markup=False, highlight=False)  # names may have brackets
        self.log = plain(stderr=True, soft_wrap=not sys.stderr.isatty(), quiet=quiet)
        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
        self.out = plain(width=width, quiet=not results)

    def notice(self, text: str) -> None:
        """Say a sentence."""
        self.log.print(text)

    def stage(self, name: str, total: int | None) -> AbstractContextManager[Advance]:
        """Show the progress of one stage; the block calls ``advance(steps, note)``."""
        return self._progress(name, total, (MofNCompleteColumn(), TimeRemainingColumn()))

    def transfer(self, name: str, total: int | None) -> AbstractContextManager[Advance]:
        """Show the progress of a transfer; the block calls ``advance(bytes, note)``."""
        return self._progress(name, total, (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()))

    @contextmanager
    def _progress(self, name: str, total: int | None, counts: Sequence[ProgressColumn]) -> Iterator[Advance]:
        started = time.monotonic()
        last = [""]
        if self.log.is_terminal:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), *counts)
            with Progress(
                *columns, TextColumn("{task.fields[note]}", markup=False), console=self.log, transient=True
            ) as progress:
                task = progress.add_task(name, total=total, note="")

                def advance(steps: int, note: str = "") -> None:
                    last[0] = note
                    progress.update(task, advance=steps, note=note)

                yield advance
        else:

            def remember(steps: int, note: str = "") -> None:
                last[0] = note

            yield remember
        self.notice(f"{name}: done in {time.monotonic() - started:.1f} s{', ' + last[0] if last[0] else ''}")

    def track(self, batches: Iterable[Any], name: str, total: int) -> Iterator[Any]:
        """Yield the batches and count their samples as one stage."""
        with self.stage(name, total) as advance:
            for batch in batches:
                yield batch
                advance(len(batch[0]) if isinstance(batch, tuple) else len(batch), "")


def shown_steps(timesteps: int) -> list[int]:
    """Return the t that a table has room for: all up to 8, else powers of two and T.

    >>> shown_steps(12)
    [1, 2, 4, 8, 12]
    """
    if timesteps <= 8:
        return list(range(1, timesteps + 1))
    powers = [2**k for k in range(timesteps.bit_length()) if 2**k < timesteps]
    return [*powers, timesteps]


def print_result(console: Console, result: dict[str, Any]) -> None:
    """Print the tables of a job's result (the object that ``--json`` prints)."""
    console.print(_site_table(result))
    if result["samples"] is not None:
        console.print(_accuracy_table(result))
        _print_energy(console, result["energy"])
        if verbosity() is Verbosity.VERBOSE and result["energy"]:
            console.print(_drawn(layer_table(result["energy"])))
    if result["diagnosis"] is not None:
        console.print(_drawn(error_table(result["diagnosis"])))
    counts = {fate: len(paths) for fate, paths in result["nodes"].items()}
    console.print(f"The answer is {result['readout']}.")
    coverage = result["spiking_coverage"]
    share = "" if coverage is None else f" {100 * coverage:.1f} % of activation elements spike."
    console.print(
        f"Activations: {counts['converted']} converted, {counts['kept']} kept analog, {counts['refused']} refused."
        f"{share} Calibration: {result['calibration']}."
    )
    if result["output"]:
        console.print(f"Written: {result['output']}", soft_wrap=True)
    if result["report"]:
        console.print(f"Report: {result['report']}", soft_wrap=True)
    for export in result["exports"]:
        console.print(f"Written: {export['file']}. {export['check']}", soft_wrap=True)
        for line in loss_lines(export["lost"]):
            console.print(line, soft_wrap=True)
    for name, message in result["failed_exports"].items():
        console.print(f"Not exported to {name}: {message}", soft_wrap=True)


def loss_lines(lost: Mapping[str, Sequence[str]]) -> list[str]:
    """Return what an export lost, by path, as lines; paths that lost the same things share one.

    >>> loss_lines({"act1": ["soft reset"], "act2": ["soft reset"]})
    ['lost in act1, act2: soft reset']
    """
    places: dict[str, list[str]] = {}
    for path, losses in lost.items():
        for loss in losses:
            places.setdefault(loss, []).append(path)
    return [f"lost in {_listed(paths)}: {loss}" for loss, paths in places.items()]


def _listed(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(paths[:SHOWN]) + more


def print_fates(console: Console, result: dict[str, Any]) -> None:
    """Print what would become of every node."""
    table = rich.table.Table(title=f"{result['source']}: every node and its fate", title_justify="left")
    for name in ("node", "what", "fate"):
        table.add_column(name, overflow="fold")
    for node in result["fates"]:
        table.add_row(node["path"], node["what"], node["fate"])
    console.print(table)
    for problem in result["problems"]:
        console.print(f"- {problem}", soft_wrap=True)
    counts = ", ".join(f"{len(paths)} {fate}" for fate, paths in result["nodes"].items())
    console.print(f"{counts}; {len(result['problems'])} problems.")


def _site_table(result: dict[str, Any]) -> rich.table.Table:
    table = rich.table.Table(title=f"{result['source']}, T = {result['timesteps']}", title_justify="left")
    table.add_column("site", overflow="fold")
    table.add_column("neuron")
    for name in ("threshold", "firing rate"):
        table.add_column(name, justify="right")
    for site in result["sites"]:
        spread = ""
        if site["channels"] > 1:
            spread = f" ({site['v_threshold_min']:.3g}…{site['v_threshold_max']:.3g})"
        rate = "-" if site["firing_rate"] is None else f"{site['firing_rate']:.3f}"
        table.add_row(site["path"], site["neuron"], f"{site['v_threshold']:.4g}{spread}", rate)
    return table


def _accuracy_table(result: dict[str, Any]) -> rich.table.Table:
    steps = shown_steps(result["timesteps"])
    labelled = result["snn_accuracy"] is not None
    what = "Accuracy in %" if labelled else "Agreement with the ANN in % (no labels were given)"
    table = rich.table.Table(title=f"{what}, n = {result['samples']}", title_justify="left")
    table.add_column("")
    for t in steps:
        table.add_column(f"t = {t}", justify="right")

    def row(name: str, values: list[float] | None) -> None:
        if values is not None:
            table.add_row(name, *(f"{100 * values[t - 1]:.2f}" for t in steps))

    if result["ann_accuracy"] is not None:
        table.add_row("ANN", *[""] * (len(steps) - 1), f"{100 * result['ann_accuracy']:.2f}")
    figures = "snn_accuracy" if labelled else "agreement"
    tuned = result["training_free"] is not None
    if tuned:
        row("SNN, training-free", result["training_free"][figures])
    for stage in result["stages"]:
        if stage["ann_accuracy"] is not None:
            table.add_row(f"ANN, {stage['name']}", *[""] * (len(steps) - 1), f"{100 * stage['ann_accuracy']:.2f}")
        row(f"SNN, {stage['name']}", stage[figures])
    row("SNN, fine-tuned" if tuned or result["stages"] else "SNN", result[figures])
    if result["output_error"] is not None:
        table.caption = f"relative output error at T: {result['output_error']:.3f}"
        table.caption_justify = "left"
    return table


def _drawn(table: Table) -> rich.table.Table:
    drawn = rich.table.Table(title=table.name, title_justify="left", caption=table.caption, caption_justify="left")
    for column, name in enumerate(table.head):
        words = column in table.text_columns
        drawn.add_column(name, justify="left" if words else "right", overflow="fold" if words else "ellipsis")
    for row in table.rows:
        drawn.add_row(*row)
    return drawn


def _print_energy(console: Console, energy: dict[str, Any] | None) -> None:
    if energy is None:
        return
    share = "" if energy["ratio"] is None else f": {energy['ratio']:.2f} of the ANN's energy"
    console.print(
        f"Per sample: {energy['synops'] / 1e6:.3f} M SynOps and {energy['snn_macs'] / 1e6:.3f} M MACs, "
        f"{energy['snn_pj'] / 1e6:.3f} µJ; the ANN {energy['ann_macs'] / 1e6:.3f} M MACs, "
        f"{energy['ann_pj'] / 1e6:.3f} µJ{share}."
    )
    if energy["uncounted"]:
        console.print(f"The work of {', '.join(energy['uncounted'])} could not be counted and comes on top.")
    console.print(energy["assumptions"], style="dim")
