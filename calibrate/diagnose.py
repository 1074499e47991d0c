"""diagnose: how much of a spiking network's error each site adds, and by what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..arguments import check_kind
from ..ops import module_of
from ..records import Prepared
from ..spiking import SpikingSite, sites
from .correct import own_copy
from .lockstep import Lockstep, input_batches
from .simulation import alone, constant_output, mean_output, mean_threshold

CAUSES = ("inherited", "clipping", "rounding", "timing")
DIAGNOSIS_SAMPLES = 128
"""As many show what is to be seen."""


@dataclass(frozen=True)
class SiteError:
    """The error of one site, in units of the energy E[a²] of the ANN's activation a (of 1 where a is silent).

    Attributes:
        path: of the site.
        inherited: share of the error that the mean current brings along.
        clipping: share of what lies above θ.
        rounding: share of what T spikes cannot express.
        timing: share of the order in which currents come.
        alone: E[e²]/E[a²] of each of the four parts by itself, in this order; these do not add up.
    """

    path: str
    inherited: float
    clipping: float
    rounding: float
    timing: float
    alone: tuple[float, ...]

    @property
    def total(self) -> float:
        """E[(o − a)²]/E[a²], the sum of the four shares."""
        return self.inherited + self.clipping + self.rounding + self.timing


@dataclass(frozen=True)
class Diagnosis:
    """The errors of all sites, in the order in which they run.

    Attributes:
        timesteps: T.
        samples: n.
        rows: one for each site.
    """

    timesteps: int
    samples: int
    rows: tuple[SiteError, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values: ``timesteps``, ``samples`` and ``rows``, each with its path and shares."""
        names = ("path", "total", *CAUSES)
        return {
            "timesteps": self.timesteps,
            "samples": self.samples,
            "rows": [{name: getattr(row, name) for name in names} for row in self.rows],
        }

    def lines(self) -> list[str]:
        """Return a heading and a line of text for each site, shares in per cent of the activation's energy."""
        names = ("total", *CAUSES)
        body = [[row.path, *(f"{100 * getattr(row, name):.1f} %" for name in names)] for row in self.rows]
        table = [["site", "error", *CAUSES], *body]
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        return [
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            )
            for row in table
        ]


def diagnose(prepared: Prepared, snn: fx.GraphModule, data: Iterable[Any] | Tensor) -> Diagnosis:
    """Split the error of every site into what it inherits, clips, rounds and mistimes.

    With a the ANN's activation and y its current, I[t] the current of the site in the spiking network and Ī its mean
    over T steps, n(I) the neurons' mean output for the currents I and o = n(I[1…T]) theirs, each value's error is

        o − a  =  [min(a, θ) − a]        clipping: what no spike train of height θ can give
                + [n(y) − min(a, θ)]     rounding: the neurons on the ANN's own current, the same at every step
                + [n(Ī) − n(y)]          inherited: their answer to the mean current that earlier layers leave
                + [o − n(Ī)]             timing: to the true order of currents instead of their mean

    exactly. The four parts e_k of the error e share its energy by E[e_k e]/E[a²], which add up to E[e²]/E[a²]; a share
    is negative where a part undoes what the others do. For event frames y and Ī are means over frames too, a is the
    mean of the ANN's activations, and what the ANN's answers lose by averaging the frames first counts as timing.

    Args:
        prepared: the ANN, :attr:`lmh.convert.Conversion.prepared`.
        snn: the spiking network made from it, corrected or trained or not; not changed.
        data: batches [N, *F] (or tuples that begin with one), or one tensor; [T, N, *F] for event frames. Held in
            memory as by :func:`lmh.calibrate.correct`; 128 samples show what is to be seen.

    Raises:
        ArgumentError: if the spiking network was not made from ``prepared``.
        CalibrationError: if the data has no sample, or values that are not finite.

    >>> from lmh.convert import convert
    >>> ann, images = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.rand(64, 4)
    >>> conversion = convert(ann, timesteps=4, data=images)
    >>> (row,) = diagnose(conversion.prepared, conversion.snn, images).rows
    >>> row.path, row.inherited, row.timing
    ('1', 0.0, 0.0)
    >>> abs(row.clipping + row.rounding - row.total) < 1e-6
    True
    """
    check_kind("diagnose: prepared", prepared, Prepared, "conversion.prepared")
    check_kind("diagnose: snn", snn, fx.GraphModule, "conversion.snn")
    snn = own_copy(snn)
    lockstep = Lockstep(prepared, snn, input_batches(snn, data, "diagnose: data"))
    found = sites(snn)
    rows = []
    with torch.no_grad():
        for node in lockstep.nodes():
            if node.target in found:
                rows.append(_site_error(lockstep, node, prepared.model.get_submodule(str(node.target))))
    return Diagnosis(lockstep.timesteps, sum(lockstep.sizes), tuple(rows))


def _site_error(lockstep: Lockstep, node: fx.Node, activation: nn.Module) -> SiteError:
    site = module_of(node)
    assert isinstance(site, SpikingSite)
    model, theta = alone(site), mean_threshold(site)
    before = node.all_input_nodes[0]
    shared, energies = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    energy = 0.0
    values = zip(lockstep.per_step(before), lockstep.expected(before), lockstep.expected(node), strict=True)
    for current, y, a in values:
        height = theta if theta.ndim == 0 else theta.reshape(-1, *[1] * (y.ndim - 2))
        once = activation(y)
        constant, mean = constant_output(model, y), constant_output(model, current.mean(0))
        clipped = torch.minimum(once, height)
        parts = [
            mean - constant,
            clipped - once,
            constant - clipped,
            mean_output(model, current) - mean + once - a,
        ]
        error = torch.stack(parts).double().sum(0)
        for index, part in enumerate(parts):
            shared[index] += float((part * error).sum())
            energies[index] += float(part.double().square().sum())
        energy += float(a.double().square().sum())
    unit = energy if energy > 0 else 1.0
    inherited, clipping, rounding, timing = (shared / unit).tolist()
    return SiteError(str(node.target), inherited, clipping, rounding, timing, tuple((energies / unit).tolist()))
