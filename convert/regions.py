"""Where in time each node runs, and the proof that the folded graph keeps to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from torch import fx

from ..op_table import Kind
from ..ops import kind_of, label
from ..shapes import BATCHES, batch_use, leading, node_values
from ..structures import batched
from ..time_axis import Readout, TimeAxis, call

PROOF_STEPS = 2


class Region(Enum):
    """Where in time a node runs."""

    FREE = "does not depend on the input"
    CONSTANT = "once, on [N, *F]: no site is among its ancestors"
    TIMED = "at every step, on [T·N, *F]"
    TAIL = "affine, behind the last site: on the time mean in eval mode, else at every step"
    READOUT = "on the final mean"


def misfolded(
    model: fx.GraphModule,
    time: TimeAxis,
    home: Mapping[str, Region],
    sample_shape: Sequence[Any],
    events: bool,
) -> list[str]:
    """Show by two batch sizes that axis 0 of every node is N or T·N, as its region says.

    Args:
        model: the spiking network.
        time: its time axis; a few steps are enough, as no shape depends on T otherwise.
        home: the region of each node, by name.
        sample_shape: shape of one input sample, or of one of each input.
        events: the inputs are [T, N, *F].

    Returns:
        One line for each node that is not so.
    """
    steps = min(PROOF_STEPS, time.timesteps)
    problems: list[str] = []
    for readout in (Readout.MEAN, Readout.PER_STEP):
        with call(time, readout, steps):
            runs = [node_values(model, batched(sample_shape, *([steps] if events else []), batch)) for batch in BATCHES]
        pairs = {node: (runs[0][node], runs[1][node]) for node in runs[0] if node.name in home}
        problems += _lines(pairs, home, readout, steps)
    return list(dict.fromkeys(problems))


def _lines(
    pairs: Mapping[fx.Node, tuple[Any, Any]], home: Mapping[str, Region], readout: Readout, steps: int
) -> Iterator[str]:
    per_step = {Region.TIMED} if readout is Readout.MEAN else {Region.TIMED, Region.TAIL, Region.READOUT}
    for node, pair in pairs.items():
        if kind_of(node) in (Kind.INPUT, Kind.OUTPUT) or batch_use(pair) in ("free", "size"):
            continue
        expected = [batch * (steps if home[node.name] in per_step else 1) for batch in BATCHES]
        if batch_use(pair) == "mixed" or [leading(value) for value in pair] != [{size} for size in expected]:
            shapes = [sorted(leading(value)) for value in pair]
            yield (
                f"{label(node)}: its first axis is {shapes} at batch sizes {list(BATCHES)} and {steps} steps; "
                f"expected {expected}, time folded into the batch. "
                "Reshape with y.size(0) of the same tensor, or flatten(1)."
            )
