"""What a report holds: plain frozen values, from which its figures and its page are made, and made again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ArgumentError
from ..records import frozen_value, plain_value

BINS_PER_THRESHOLD = 16
THRESHOLDS_SHOWN = 2


@dataclass(frozen=True)
class Raster:
    """The spikes of one sample at one site.

    Attributes:
        site: its path.
        neurons: how many are shown: of those that fired, evenly taken.
        of: how many the site has.
        spikes: (step, neuron) of each spike, both counted from 0.
    """

    site: str
    neurons: int
    of: int
    spikes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ChangedSample:
    """A sample that the ANN and the spiking network answer differently at T.

    Attributes:
        position: in the order of the data, counted from 0.
        label: its class, or None.
        ann: the ANN's answer.
        snn: the spiking network's after t = 1…T steps.
        png: the sample as a picture, base64; the sum of all event frames.
        rasters: its spikes at some sites.
    """

    position: int
    label: int | None
    ann: int
    snn: tuple[int, ...]
    png: str
    rasters: tuple[Raster, ...]


@dataclass(frozen=True)
class GraphNode:
    """One node of the spiking network.

    Attributes:
        path: of its module, else its name.
        what: the module's or function's name.
        fate: when it runs, and on what: see :data:`lmh.report.figures.FATES`.
        inputs: positions of the nodes that it reads.
    """

    path: str
    what: str
    fate: str
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class NetworkReport:
    """All that is known of a converted network. What is not known is None or empty.

    Attributes:
        result: the command's result, as ``--json`` prints it (:func:`lmh.results.describe_network`).
        activations: by site, what share of the ANN's activations lies in each bin of θ/16 from 0 to 2 θ, and as the
            last entry what lies above; values that are not positive are the rest to 1.
        confusion: (label, the spiking network's answer at T, how often).
        classes: names, by label.
        changed: samples that the ANN answers otherwise.
        nodes: the graph.
        training: its stages, ``{"stage": name, "epochs": [{"epoch", "loss", "val_accuracy", "neurons"}, …]}`` each, as
            :meth:`lmh.finetune.Stage.to_json` gives them.
        facts: command, versions, seed, data and recipe, by name.
    """

    result: Mapping[str, Any]
    activations: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    confusion: tuple[tuple[int, int, int], ...] = ()
    classes: tuple[str, ...] = ()
    changed: tuple[ChangedSample, ...] = ()
    nodes: tuple[GraphNode, ...] = ()
    training: tuple[Mapping[str, Any], ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain values that :meth:`from_json` reads back."""
        return plain_value(self)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> NetworkReport:
        """Rebuild a report from :meth:`to_json`'s values.

        Raises:
            ArgumentError: if it was not written by it.

        >>> report = NetworkReport({"timesteps": 4}, confusion=((0, 0, 5),))
        >>> NetworkReport.from_json(report.to_json()) == report
        True
        """
        types = (Raster, ChangedSample, GraphNode, NetworkReport)
        try:
            found = frozen_value(plain, {kind.__name__: kind for kind in types})
        except (KeyError, TypeError) as error:
            raise ArgumentError(
                f"NetworkReport.from_json: {type(error).__name__}: {error}; expected what a report's .json holds."
            ) from error
        if not isinstance(found, cls):
            raise ArgumentError("NetworkReport.from_json: no report came; expected what a report's .json holds.")
        return found

    def class_name(self, label: int) -> str:
        """Return a class by its name, or its number where it has none.

        >>> NetworkReport({}, classes=("cat",)).class_name(0)
        'cat'
        """
        return self.classes[label] if 0 <= label < len(self.classes) else str(label)
