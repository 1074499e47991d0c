"""Export to NIR, the Neuromorphic Intermediate Representation (Pedersen et al. 2024, Nature Communications 15:8122)."""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx

from ... import __version__
from ...artifact import user_path, write_atomically
from ...errors import ArgumentError, ArtifactError
from ...readout import MeanReadout
from ...structures import each_shape
from ...time_axis import takes_events, time_axis
from ..deploy import fold_batchnorm, required_shape
from ..pipeline import Conversion
from .nir_graph import Translation
from .nir_neurons import MEAN_RESIDUAL, Fit, ShiftedStart, Start
from .result import Exported


@dataclass(frozen=True)
class Exact:
    """Write only what NIR can say, and refuse the rest with every reason.

    Attributes:
        dt: length of a step, in the unit of NIR's time constants.
    """

    dt: float = 1.0


@dataclass(frozen=True)
class Project:
    """Write the nearest NIR neuron for each site, and report what was lost.

    Attributes:
        dt: length of a step, in the unit of NIR's time constants. Leave it at 1.0 for IF neurons, whose r = 1/dt many
            platforms want to be 1; for leaky ones set it to the platform's own step (Norse takes 1e-3 unless told).
        start: what becomes of v_init: ``ShiftedStart()`` or ``ZeroStart()``.
        residual: the potential after a spike, in θ; see :class:`lmh.convert.export.nir_neurons.Fit`.

    For platforms that take θ off by themselves whatever the file says (snnTorch's and Sinabs' IF), or that demand
    v_reset = v_leak = 0: ``Project(start=ZeroStart(), residual=0.0)``.
    """

    dt: float = 1.0
    start: Start = field(default_factory=ShiftedStart)
    residual: float = MEAN_RESIDUAL


def export_nir(
    network: Conversion | fx.GraphModule,
    file: str | Path,
    mode: Exact | Project | None = None,
    *,
    input_shape: Sequence[int] | None = None,
) -> Exported:
    """Write a spiking network as a NIR graph.

    The graph is one step of the network: run it T times on the same input (on frame t for event frames), each node
    starting at 0, and average the output. Neurons give unit spikes; θ is in the weights behind them, or in a Scale
    where spikes enter a neuron or the output directly. BatchNorm is folded. A residual sum is several edges into one
    node; concat, split, channel shuffle, constant factors and differences go into the weights that read them.
    :mod:`lmh.convert.export.nir_neurons` has the discretisation: forward Euler with step dt, λ_S → τ = dt/(1 − λ_S).

    What NIR cannot say, and ``Project`` reports by site: soft reset, a start that is not 0, coupled states, per-step
    parameters, max-pools (the spikes are pooled instead), a final softmax.

    Args:
        network: from ``convert`` or ``load``; not changed.
        file: to write; replaced only when the new one is whole.
        mode: ``Exact()`` or ``Project()``; Exact unless given.
        input_shape: of one sample, without batch; not needed for a Conversion or a loaded network.

    Returns:
        The file, how it was checked (read back by nir), and what was lost.

    Raises:
        ArgumentError: if it is not a spiking network, takes another input, or dt is not above 0.
        ArtifactError: if nir is not installed, if the network takes several inputs, listing every node that NIR has
            nothing for (in Exact also everything that would be lost), or if the file cannot be written.
    """
    mode = mode or Exact()
    path = user_path(file)
    if not mode.dt > 0:
        raise ArgumentError(f"{type(mode).__name__}: dt is {mode.dt}; expected a time above 0, such as 1.0.")
    nir = _nir(path)
    shape = required_shape(network, input_shape)
    sample, *more = each_shape(shape)
    if more:
        raise ArtifactError(
            f"{path}: the network takes {1 + len(more)} inputs; expected one, as this export writes no other graphs. "
            "Export to onnx or pt2."
        )
    model = fold_batchnorm(network, input_shape=shape)
    _refuse_readout(path, model)
    fit = Fit(mode.dt, mode.start, mode.residual) if isinstance(mode, Project) else Fit(mode.dt)
    translation = Translation(nir, model, sample, fit)
    translation.run()
    _refuse(path, mode, translation)
    graph = _graph(nir, translation, time_axis(model).timesteps, mode.dt, takes_events(model))
    data = _written(nir, graph)
    check, notices = _read_back(nir, data, graph)
    write_atomically(path, data)
    steps = time_axis(model).timesteps
    per_step = "frame t" if takes_events(model) else "the input"
    notices = (
        f"One step of {steps}: feed {per_step} at each step from a potential of 0, average the output.",
        *notices,
    )
    return Exported(path, "nir", len(data), check, translation.lost, notices)


def _nir(path: Path) -> Any:
    try:
        return importlib.import_module("nir")
    except ImportError as error:
        raise ArtifactError(
            f"{path}: the nir package is not installed; expected it for this export. "
            "Run: pip install 'lmh-convert[nir]'."
        ) from error


def _refuse_readout(path: Path, model: fx.GraphModule) -> None:
    """Refuse a readout that a platform, which averages what it gets, would not know of."""
    time = time_axis(model)
    if not isinstance(time.average, MeanReadout):
        raise ArtifactError(
            f"{path}: the network answers by {time.average}, {time.average.text(time.timesteps)}, and NIR has no place "
            "for it; expected MeanReadout(). Export to onnx or pt2, which hold it, or convert without readout= and "
            "average the outputs of the NIR graph yourself."
        )


def _refuse(path: Path, mode: Exact | Project, translation: Translation) -> None:
    """Raise with everything that keeps the network out of NIR."""
    lines = list(translation.problems)
    if isinstance(mode, Exact):
        lines += [f"{place}: {loss}" for place, losses in translation.lost.items() for loss in losses]
    if not lines:
        return
    count = f"{len(lines)} {'thing' if len(lines) == 1 else 'things'}"
    advice = (
        "Pass mode=Project() (on the command line nir-project) to write the nearest neurons and a list of what was lost"
        if not translation.problems
        else "Replace those operators in the ANN, or export to onnx or pt2"
    )
    raise ArtifactError(
        f"{path}: NIR cannot say {count} of this network; expected only what its nodes say:\n"
        + "\n".join(f"  - {line}" for line in lines)
        + f"\n{advice}."
    )


def _graph(nir: Any, translation: Translation, timesteps: int, dt: float, events: bool) -> Any:
    metadata = {
        "producer": f"lmh-convert {__version__}",
        "timesteps": timesteps,
        "dt": dt,
        "integration": "forward Euler, every node from 0",
        "input": "one frame for each step" if events else "the same at every step",
        "output": "mean over the steps",
    }
    builder = translation.builder
    return nir.NIRGraph(nodes=builder.nodes, edges=builder.edges, metadata=metadata, type_check=False)


def _written(nir: Any, graph: Any) -> bytes:
    buffer = io.BytesIO()
    nir.write(buffer, graph)
    return buffer.getvalue()


def _read_back(nir: Any, data: bytes, graph: Any) -> tuple[str, tuple[str, ...]]:
    """Read the file again; say how, and what a reader must know."""
    notices: tuple[str, ...] = ()
    try:
        again = nir.read(io.BytesIO(data))
        types = "types agree"
    except ValueError:
        again = nir.read(io.BytesIO(data), type_check=False)
        types = "without its type check"
        notices = (
            f"Read it with nir.read(file, type_check=False): nir {nir.__version__} takes grouped and non-square "
            "convolutions for others, and finds their types wrong.",
        )
    if again.nodes.keys() != graph.nodes.keys() or sorted(again.edges) != sorted(graph.edges):
        raise ArtifactError(f"nir {nir.__version__} reads back another graph than it wrote; expected the same.")
    return f"Read back by nir {nir.__version__}: {len(again.nodes)} nodes, {len(again.edges)} edges, {types}.", notices
