"""What a projection to NIR makes of a spiking network, in torch: neurons with a hard reset, pools of spikes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx

from lmh import sites
from lmh.convert import Conversion
from lmh.convert.export.nir_neurons import MEAN_RESIDUAL
from lmh.op_table import Kind
from lmh.ops import kind_of
from lmh.spiking import PerStep, SpikingSite
from lmh.time_axis import Timed


class HardReset(Timed):
    """A site whose spikes set the potential to a constant: what IF, LIF and CubaLIF make of it.

    d[t] = μ_D d[t−1] + I[t],  v[t] = Λ v[t−1] + λ_D d[t],  s[t] = H(v[t] − θ),  v[t] = ρ θ where s[t] = 1
    """

    def __init__(self, site: SpikingSite, residual: float, kept: float) -> None:
        super().__init__(site.time)
        self.static, self.residual = site.static, residual
        per_step = isinstance(site.neuron.granularity, PerStep)
        theta = site.v_threshold.detach().double()
        self.begin = kept * site.v_init.detach().double() * (theta[0] if per_step else theta)
        self.theta = theta.mean(0) if per_step else theta
        found = (value.detach().double() for value in site.coefficients())
        lambda_s, self.gain, mu_s, mu_d = (value.mean(0) if per_step else value for value in found)
        self.keeps = (lambda_s + self.gain * mu_s).clamp(0, 1)
        self.synapse = mu_d.clamp(0, 1)
        if self.synapse.any() or (self.keeps < 1).any():
            self.keeps = self.keeps.clamp(max=1 - 2**-13)

    def forward(self, current: Tensor) -> Tensor:
        def aligned(value: Tensor) -> Tensor:
            return value if value.ndim == 0 else value.reshape(-1, *[1] * (current.ndim - 2))

        currents = (current,) * self.time.steps if self.static else self.unfold(current).unbind(0)
        theta, dendrite = aligned(self.theta), torch.zeros_like(currents[0])
        potential = aligned(self.begin).expand_as(dendrite)
        outputs = []
        for step in currents:
            dendrite = aligned(self.synapse) * dendrite + step
            potential = aligned(self.keeps) * potential + aligned(self.gain) * dendrite
            spikes = potential >= theta
            potential = torch.where(spikes, self.residual * theta, potential)
            outputs.append(spikes * theta)
        return torch.cat(outputs)


def projected(
    conversion: Conversion, residual: float = MEAN_RESIDUAL, kept: float = 1.0, soft: bool = False
) -> fx.GraphModule:
    """The network with projected neurons (or, as a wrong twin, its own), and max-pools behind them; in float64."""
    model = copy.deepcopy(conversion.snn).double().eval()
    for site in [node for node in model.graph.nodes if node.target in sites(model)]:
        while kind_of(pool := site.all_input_nodes[0]) is Kind.MAXPOOL:
            with model.graph.inserting_after(site):
                moved = model.graph.node_copy(pool)
            site.replace_all_uses_with(moved)
            moved.args = (site, *pool.args[1:])
            site.replace_input_with(pool, pool.args[0])
    model.graph.eliminate_dead_code()
    model.recompile()
    if not soft:
        for path, site in sites(model).items():
            model.set_submodule(path, HardReset(site, residual, kept))
    return model
