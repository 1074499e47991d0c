"""Export to ``.pt2``: one file of torch.export that torch alone can load and run."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram

from ...artifact import user_path, write_atomically
from ...errors import ArtifactError
from ...structures import tensors_of
from ...time_axis import takes_events
from ..deploy import at_rest, deployed, network_of, random_inputs, required_shape
from ..files import EXPORT_MARK
from ..pipeline import Conversion
from .result import Comparison, Exported, compare

EXAMPLE_BATCH = 2
CHECKED_BATCHES = (1, 7)


def traced(model: fx.GraphModule, sample_shape: Sequence[Any]) -> ExportedProgram:
    """Trace a deploy copy with torch.export; the batch stays free.

    Raises:
        ArtifactError: if torch.export cannot trace it, with its reason.
    """
    examples = random_inputs(model, sample_shape, EXAMPLE_BATCH, seed=0)
    try:
        with torch.no_grad():
            program = torch.export.export(model, examples, dynamic_shapes=batch_axes(model, len(examples)))
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ArtifactError(
            f"export: torch.export cannot trace {type(model).__name__} with a free batch size ({reason}); expected a "
            "forward that runs the same nodes for every batch size. Save it with lmh.convert.save instead."
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it would put paths of this machine into the file
    return program


def batch_axes(model: fx.GraphModule, inputs: int) -> tuple[dict[int, Dim], ...]:
    """Return which axis of each input is free, the same size for all: 0, or 1 for event frames [T, N, *F]."""
    return ({1 if takes_events(model) else 0: Dim("batch")},) * inputs


def beside_the_network(
    answer: Callable[..., Sequence[Tensor]], network: Conversion | fx.GraphModule, sample_shape: Sequence[Any]
) -> Comparison:
    """Compare a file's answers to random inputs, all its outputs, with those of the network that was to be exported."""
    snn = at_rest(network_of(network))
    got: list[Tensor] = []
    expected: list[Tensor] = []
    for seed, batch in enumerate(CHECKED_BATCHES):
        inputs = random_inputs(snn, sample_shape, batch, seed)
        with torch.no_grad():
            for answers, outputs in ((got, answer(*inputs)), (expected, tensors_of(snn(*inputs)))):
                answers.append(
                    torch.cat([output.reshape(batch, -1) for output in outputs if output.shape[:1] == (batch,)], 1)
                )
    return compare(got, expected)


def export_pt2(
    network: Conversion | fx.GraphModule, file: str | Path, *, input_shape: Sequence[Any] | None = None
) -> Exported:
    """Write a spiking network as a ``.pt2`` file of torch.export.

    Time is unrolled over T steps, the batch size is free, BatchNorm is folded, coefficients are constants; nothing is
    lost but the names of the neurons' parameters. ``torch.export.load(file).module()`` takes [N, *F] ([T, N, *F] for
    event frames) and returns the mean over time, [N, C], or the tuple or dict of them that the network returns.
    Loading needs torch and nothing of this package.

    Args:
        network: from ``convert`` or ``load``; not changed.
        file: to write; replaced only when the new one is whole.
        input_shape: of one sample, without batch; not needed for a Conversion or a loaded network.

    Returns:
        The file and how it was checked: loaded again and compared with the network.

    Raises:
        ArgumentError: if it is not a spiking network, or takes another input.
        ArtifactError: if it cannot be traced, answers differently, or the file cannot be written.
    """
    path = user_path(file)
    shape = required_shape(network, input_shape)
    model = deployed(network, shape)
    buffer = io.BytesIO()
    torch.export.save(traced(model, shape), buffer, extra_files=dict([EXPORT_MARK]))
    loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    comparison = beside_the_network(lambda *inputs: tensors_of(loaded(*inputs)), network, shape)
    if not comparison.agrees:
        raise ArtifactError(f"{path}: not written, as it answers differently. {comparison.text('torch.export')}")
    write_atomically(path, buffer.getvalue())
    return Exported(path, "pt2", len(buffer.getvalue()), comparison.text(f"torch {torch.__version__}"))
