"""The frozen values that stand between the stages: each can be saved, compared and replayed.

PREPARE → Prepared → calibrate → Calibration → SPIKE → Conversion → evaluate → Evaluation
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .structures import SampleShape


@dataclass(frozen=True)
class Spike:
    """A rule's answer: this activation becomes LM-H neurons.

    Attributes:
        v_threshold: θ where the activation knows it (QCFS), shape [] or [C]; None lets calibration find it.
        upper: the largest value that the activation gives (ReLU6: 6); θ stays at or below it.
        levels: L where the activation has it (QCFS).
    """

    v_threshold: Tensor | None = None
    upper: float = math.inf
    levels: int | None = None


@dataclass(frozen=True)
class Keep:
    """A rule's answer: this activation stays analog and runs at every step."""


@dataclass(frozen=True)
class NodeFate:
    """What became of one node of the ANN's graph, for the report."""

    path: str
    what: str
    fate: str


@dataclass(frozen=True, repr=False)
class Prepared:
    """An ANN in the form that calibration and SPIKE work on; its output equals the source's.

    Attributes:
        model: the traced copy, one module for each activation call.
        activations: what the rules say about each, by path, in the order in which they run.
        sample_shape: shape of one input sample, without batch; of several inputs a shape for each.
        channels: size of axis 1 of each spiking activation, None where channels lie on another axis.
        fates: every node of the source's graph.
        spiking_coverage: share of activation elements that become spikes, 0 to 1.
        gated: names of the max-pool nodes of ``model`` that are gated where they run in time (:mod:`lmh.gate`).
    """

    model: fx.GraphModule
    activations: Mapping[str, Spike | Keep]
    sample_shape: SampleShape
    channels: Mapping[str, int | None]
    fates: tuple[NodeFate, ...]
    spiking_coverage: float = 1.0
    gated: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return (
            f"Prepared({type(self.model).__name__}, sample_shape={self.sample_shape}, activations="
            f"{len(self.activations)}, spiking={len(self.spiking)}, spiking_coverage={self.spiking_coverage:.3g})"
        )

    @property
    def spiking(self) -> list[str]:
        """Paths of the activations that become neurons."""
        return [path for path, decision in self.activations.items() if isinstance(decision, Spike)]


FROM_QCFS = "taken over from QCFS"
"""The policy of thresholds that a QCFS network learned."""


@dataclass(frozen=True, repr=False)
class Calibration:
    """Where the neurons of a network start.

    Attributes:
        policy: what found the thresholds, as text, or :data:`FROM_QCFS`.
        timesteps: the T that they were found for.
        samples: how many samples were seen; 0 where none were needed.
        v_threshold: θ₀ by path, shape [] or [C], in the unit of the site's current.
        v_init: v_S[0]/θ by path, shape [] or [C].
        tensors: what else differs from the ANN, by its name in the spiking network's state_dict: weights, biases,
            buffers, raw λ and μ.
    """

    policy: str
    timesteps: int
    samples: int
    v_threshold: Mapping[str, Tensor]
    v_init: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Calibration(policy={self.policy!r}, timesteps={self.timesteps}, samples={self.samples}, "
            f"sites={len(self.v_threshold)})"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values that :meth:`from_json` reads back, exact for float32; ``tensors`` as bytes in base64."""
        plain = {name: getattr(self, name) for name in ("policy", "timesteps", "samples")}
        for name in ("v_threshold", "v_init"):
            plain[name] = {path: value.tolist() for path, value in getattr(self, name).items()}
        if self.tensors:
            plain["tensors"] = {name: _tensor_to_json(value) for name, value in self.tensors.items()}
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Calibration:
        """Rebuild a calibration from :meth:`to_json`'s values."""
        tensors = {
            name: {path: torch.tensor(value, dtype=torch.float32) for path, value in plain[name].items()}
            for name in ("v_threshold", "v_init")
        }
        tensors["tensors"] = {name: _tensor_from_json(value) for name, value in plain.get("tensors", {}).items()}
        return cls(plain["policy"], plain["timesteps"], plain["samples"], **tensors)


def _tensor_to_json(value: Tensor) -> dict[str, Any]:
    data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    text = base64.b64encode(data).decode()
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "base64": text}


def _tensor_from_json(plain: Mapping[str, Any]) -> Tensor:
    dtype, data = getattr(torch, plain["dtype"]), bytearray(base64.b64decode(plain["base64"]))
    return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(plain["shape"])


@dataclass(frozen=True)
class Report:
    """What a conversion did to the graph.

    Attributes:
        timesteps: T.
        calibration: the policy's name and number of samples.
        fates: every node of the source and what became of it.
        spiking_coverage: share of activation elements that spike, 0 to 1.
        notices: what the user should know, in sentences.
    """

    timesteps: int
    calibration: str
    fates: tuple[NodeFate, ...]
    spiking_coverage: float = 1.0
    notices: tuple[str, ...] = ()

    def nodes(self) -> dict[str, list[str]]:
        """Return the paths of activations by fate: converted, kept, refused."""
        return {
            fate: [node.path for node in self.fates if node.fate == fate] for fate in ("converted", "kept", "refused")
        }


@dataclass(frozen=True)
class LayerWork:
    """Work of one weighted layer, or of a kept node that multiplies matrices, for one sample.

    Averaged over the samples seen.

    Attributes:
        path: of the layer.
        ann_macs: multiply-accumulates of the ANN; over all T frames for a network of event frames.
        accumulates: SynOps of the SNN over T steps: incoming spikes times their fan-out.
        macs: multiply-accumulates of the SNN over T steps, where the layer's input is not binary or the node is analog.
    """

    path: str
    ann_macs: float
    accumulates: float
    macs: float


@dataclass(frozen=True)
class Evaluation:
    """What a network did on a data set.

    Attributes:
        samples: n.
        snn_accuracy: fraction of 1 after t = 1…T steps; None without labels.
        ann_accuracy: the source ANN's; None without labels or ANN.
        agreement: fraction of samples where SNN and ANN give the same class, by t; None without ANN.
        output_error: mean ‖SNN − ANN‖ / mean ‖ANN‖ of the outputs at T; None without ANN.
        firing_rate: mean spikes per neuron and step, by site path.
        channel_rate: the same of every channel (axis 1).
        layers: work by weighted layer and kept node.
        uncounted: paths of kept modules with weights whose work could not be counted; the true work is higher.
    """

    samples: int
    snn_accuracy: tuple[float, ...] | None
    ann_accuracy: float | None
    agreement: tuple[float, ...] | None
    output_error: float | None
    firing_rate: Mapping[str, float]
    channel_rate: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    layers: tuple[LayerWork, ...] = field(default=())
    uncounted: tuple[str, ...] = ()


def plain_value(value: Any) -> Any:
    """Return a frozen configuration as JSON-ready values: a dataclass becomes a dict with its ``type``.

    >>> from lmh.spiking import PerLayer
    >>> plain_value(PerLayer())
    {'type': 'PerLayer'}
    """
    if is_dataclass(value) and not isinstance(value, type):
        inner = {item.name: plain_value(getattr(value, item.name)) for item in fields(value)}
        return {"type": type(value).__name__, **inner}
    if isinstance(value, Mapping):
        return {key: plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    return value


def short_text(value: Any) -> str:
    """Return a frozen configuration as the call that makes it: the fields that are not as they are by default.

    >>> from lmh.calibrate import WeightRegression
    >>> short_text(WeightRegression()), short_text(WeightRegression(ridge=0.1))
    ('WeightRegression()', 'WeightRegression(ridge=0.1)')
    """
    given = []
    for item in fields(value):
        usual = item.default if item.default_factory is MISSING else item.default_factory()
        if (own := getattr(value, item.name)) != usual:
            given.append(f"{item.name}={own!r}")
    return f"{type(value).__name__}({', '.join(given)})"


def frozen_value(plain: Any, types: Mapping[str, type]) -> Any:
    """Rebuild what :func:`plain_value` wrote, from the types that the caller allows.

    Raises:
        KeyError: for a type that is not among ``types``.
    """
    if isinstance(plain, Mapping) and "type" in plain:
        inner = {name: frozen_value(item, types) for name, item in plain.items() if name != "type"}
        return types[plain["type"]](**inner)
    if isinstance(plain, list):
        return tuple(frozen_value(item, types) for item in plain)
    return plain
