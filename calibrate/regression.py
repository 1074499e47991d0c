"""Least squares: the weights that make of a spiking network's inputs what the ANN's layers made of theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..op_table import BATCHNORM_MODULES
from ..ops import module_of
from ..spiking import SpikingSite
from .corrections import Correction
from .layers import LEAST_SCALE, Layer, gain, shift, target
from .lockstep import Lockstep
from .sampling import places, receptive_fields, values_at
from .simulation import mean_threshold

REGRESSABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Weighted = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
LARGEST = 2**26  # elements of the inputs looked at, 256 MB


@dataclass(frozen=True)
class WeightRegression(Correction):
    """Weights and biases by least squares, layer by layer (ours, after the reconstruction of pruned layers).

    With x_t what a layer of the spiking network reads at step t, x̄ its mean over T steps, and y what the ANN's layer
    gives, less what a residual sum adds in the spiking network, each layer becomes

        argmin E‖W x̄ + b − y‖² + (φ/T) E_t‖W (x_t − x̄)‖² + ridge ‖W − W₀‖²

    W₀ are the present weights. The second term keeps currents even over time, so that fewer spikes come too early to
    be taken back. Neurons answer neither to how far a current lies below 0 nor to how far above θ; there y is moved
    towards what W gives and the layer is solved again, ``rounds`` times, as in the nonlinear reconstruction of Zhang
    et al. 2015. A layer that reads the input itself stays.

    Attributes:
        ridge: in units of the mean squared input.
        fluctuation: φ.
        rounds: how many times y is moved.
        rows: how many places of its output a layer is fitted on, over all samples; fewer where 256 MB would not do.
    """

    ridge: float = 0.01
    fluctuation: float = 0.2
    rounds: int = 2
    rows: int = 32768

    def __post_init__(self) -> None:
        if not (self.ridge > 0 and self.fluctuation >= 0 and self.rounds >= 0 and self.rows >= 1):
            raise ArgumentError(
                f"{self}: expected a ridge above 0, fluctuation and rounds of at least 0, and at least 1 row; the "
                "defaults suit most networks."
            )

    def fit(self, lockstep: Lockstep, layer: Layer) -> None:
        """Replace the weights of a layer of the spiking network, before it runs."""
        assert layer.synapse is not None
        module, norm = module_of(layer.synapse), module_of(layer.norm) if layer.norm is not None else None
        if not isinstance(module, REGRESSABLE) or _reads_the_truth(lockstep, layer):
            return
        if isinstance(norm, BATCHNORM_MODULES) and norm.running_mean is None:
            return
        rows = _rows(lockstep, layer, module, self.rows)
        system = _System(module, norm, rows, self.ridge, self.fluctuation / lockstep.timesteps)
        solution = system.solved(rows.wanted)
        site = module_of(layer.site) if layer.site is not None else None
        if isinstance(site, SpikingSite):
            for _ in range(self.rounds):
                solution = system.solved(system.moved(system.currents(solution), mean_threshold(site)))
        with torch.no_grad():
            module.weight.copy_(solution.weights.transpose(1, 2).reshape(module.weight.shape))
        shift(norm if norm is not None else module, solution.bias * system.gain)


def _reads_the_truth(lockstep: Lockstep, layer: Layer) -> bool:
    """Whether a layer reads the very values that the ANN's layer reads, and nothing is added to what it gives."""
    assert layer.synapse is not None
    source = layer.synapse.all_input_nodes[0]
    if lockstep.twin(source) is None or layer.others:
        return False
    pairs = zip(lockstep.received(source), lockstep.expected(source), strict=True)
    return all(torch.equal(got, wanted) for got, wanted in pairs)


class Rows(NamedTuple):
    """What a layer reads and should give, at R sampled places; G groups of D inputs and O outputs.

    Attributes:
        inputs: x̄, [G, R, D].
        noise: E_t (x_t − x̄)(x_t − x̄)ᵀ, [G, D, D].
        wanted: the ANN's values where the layer ends, [R, G·O].
        added: the mean of what sums add to the layer's output, [R, G·O]; 0 where nothing is.
    """

    inputs: Tensor
    noise: Tensor
    wanted: Tensor
    added: Tensor


def _rows(lockstep: Lockstep, layer: Layer, module: Weighted, count: int) -> Rows:
    assert layer.synapse is not None
    _, wanted, added = target(lockstep, layer)
    size = module.weight[0].numel() * (1 if isinstance(module, nn.Linear) else module.groups)
    where = places([value.shape for value in wanted], min(count, max(1, LARGEST // size)), layer.axis)
    means: list[Tensor] = []
    noise = torch.zeros((), dtype=torch.float64, device=wanted[0].device)
    total = sum(chosen.numel() for chosen in where)
    for x, chosen in zip(lockstep.per_step(layer.synapse.all_input_nodes[0]), where, strict=True):
        steps = list(x[:1] if x.stride(0) == 0 else x)
        fields = [receptive_fields(module, step, chosen).transpose(0, 1) for step in steps]
        means.append(sum(fields[1:], start=fields[0]) / len(fields))
        if len(fields) > 1:
            for step in fields:
                noise = noise + _gram(step - means[-1]) * (step.shape[1] / (total * len(fields)))
    picked = [values_at(value, chosen, layer.axis) for value, chosen in zip(wanted, where, strict=True)]
    extra = [values_at(value, chosen, layer.axis) for value, chosen in zip(added, where, strict=True)] if added else []
    return Rows(torch.cat(means, 1), noise, torch.cat(picked), torch.cat(extra) if extra else picked[0].new_zeros(()))


class Solution(NamedTuple):
    """Weights [G, D, O], and what the weighted sum's output gains, [G·O]."""

    weights: Tensor
    bias: Tensor


class _System:
    """The normal equations of one layer."""

    def __init__(self, module: Weighted, norm: nn.Module | None, rows: Rows, ridge: float, fluctuation: float) -> None:
        self.rows = rows
        weight, groups = module.weight.detach(), len(rows.inputs)
        bias = module.bias.detach() if module.bias is not None else torch.zeros(len(weight))
        self.present = weight.reshape(groups, len(weight) // groups, -1).transpose(1, 2)
        self.movable = norm is not None or module.bias is not None
        self.gain = gain(norm).to(weight).expand(len(weight))
        self.offset = bias.to(weight) * self.gain
        if isinstance(norm, BATCHNORM_MODULES):
            assert isinstance(norm.running_mean, Tensor)
            self.offset = self.offset - norm.running_mean * self.gain
            self.offset = self.offset if norm.bias is None else self.offset + norm.bias.detach()
        self.centre = rows.inputs.mean(1, keepdim=True) if self.movable else rows.inputs.new_zeros(())
        matrix = _gram(rows.inputs - self.centre) + fluctuation * rows.noise
        self.pull = ridge * matrix.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
        matrix.diagonal(dim1=1, dim2=2).add_(self.pull[:, None])
        self.factor = torch.linalg.cholesky(matrix)

    def solved(self, wanted: Tensor) -> Solution:
        """Solve for the output ``wanted`` behind BatchNorm and sums; a channel that BatchNorm silences stays."""
        alive = self.gain.abs() > LEAST_SCALE
        y = (wanted - self.rows.added - self.offset) / torch.where(alive, self.gain, 1.0)
        outputs = y.reshape(len(y), len(self.present), -1).transpose(0, 1)
        middle = outputs.mean(1, keepdim=True) if self.movable else outputs.new_zeros(())
        moment = (self.rows.inputs - self.centre).transpose(1, 2) @ (outputs - middle) / len(y)
        right = moment.double() + self.pull[:, None, None] * self.present
        weights = torch.cholesky_solve(right, self.factor).to(wanted.dtype)
        weights = torch.where(alive.reshape(len(self.present), 1, -1), weights, self.present)
        bias = (middle - self.centre @ weights).flatten() if self.movable else torch.zeros_like(self.gain)
        return Solution(weights, torch.where(alive, bias, 0.0))

    def currents(self, solution: Solution) -> Tensor:
        """Return what a solution gives behind BatchNorm and sums, [R, C]."""
        sums = (self.rows.inputs @ solution.weights).transpose(0, 1).flatten(1)
        return (sums + solution.bias) * self.gain + self.offset + self.rows.added

    def moved(self, current: Tensor, theta: Tensor) -> Tensor:
        """Return what is wanted, moved towards the current as far as the neurons' answer stays the same."""
        wanted = self.rows.wanted
        below = torch.minimum(torch.maximum(current, wanted), torch.zeros_like(wanted))
        above = torch.maximum(torch.minimum(current, wanted), theta.expand_as(wanted))
        return torch.where(wanted <= 0, below, torch.where(wanted >= theta, above, wanted))


def _gram(x: Tensor) -> Tensor:
    """Return the mean of x xᵀ over rows, [G, R, D] → [G, D, D], in double precision."""
    return (x.transpose(1, 2) @ x).double() / x.shape[1]
