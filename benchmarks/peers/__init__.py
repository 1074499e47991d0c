"""The same network in other spiking libraries: their own IF neurons in the place of its activations.

Each runs the way its documentation recommends for T steps at once where it has one: SpikingJelly its multi-step mode,
sinabs layers over [N, T, …], snnTorch a loop over the steps of every layer. Weights, θ and starts are ours, images
are repeated for every step, and the answer is the mean over T. What is not installed is left out:

    python -m pip install --no-deps --requirement benchmarks/peers/requirements.txt
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lmh import sites
from lmh.convert import Conversion


class PeerSite(nn.Module, ABC):
    """A peer's neurons in the place of an activation.

    Attributes:
        time_axis: 0 where the T·N rows of a batch are [T, N], 1 where they are [N, T].
    """

    time_axis = 0

    def __init__(self, v_threshold: Tensor, v_init: Tensor, timesteps: int) -> None:
        super().__init__()
        self.timesteps = timesteps
        self.theta: Tensor
        self.register_buffer("theta", v_threshold.detach().clone())
        self.start = v_init.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        """Return θ s: rows of T steps in, rows out."""
        channels = (-1, *[1] * (x.ndim - 2))
        theta = self.theta.reshape(channels)
        current = (x / theta).unflatten(0, (-1, self.timesteps) if self.time_axis else (self.timesteps, -1))
        start = self.start.reshape(channels).expand_as(current.select(self.time_axis, 0)).clone()
        return self.spikes(current, start).flatten(0, 1) * theta

    @abstractmethod
    def spikes(self, current: Tensor, start: Tensor) -> Tensor:
        """Run the neurons, of threshold 1 and reset by subtraction.

        Args:
            current: I/θ, [T, N, …] or [N, T, …].
            start: v[0]/θ, [N, …].
        """


class SpikingJellySite(PeerSite):
    """``IFNode`` in multi-step mode, which does not train through the reset."""

    def __init__(self, v_threshold: Tensor, v_init: Tensor, timesteps: int) -> None:
        super().__init__(v_threshold, v_init, timesteps)
        from spikingjelly.activation_based import neuron

        self.node = neuron.IFNode(v_threshold=1.0, v_reset=None, step_mode="m", detach_reset=True)

    def spikes(self, current: Tensor, start: Tensor) -> Tensor:
        """All steps in one call."""
        self.node.reset()
        self.node.v = start
        return self.node(current)


class SinabsSite(PeerSite):
    """``IAF`` with one spike a step at most; its layers take the batch first."""

    time_axis = 1

    def __init__(self, v_threshold: Tensor, v_init: Tensor, timesteps: int) -> None:
        super().__init__(v_threshold, v_init, timesteps)
        from sinabs.activation import SingleSpike
        from sinabs.layers import IAF

        self.node = IAF(spike_fn=SingleSpike)

    def spikes(self, current: Tensor, start: Tensor) -> Tensor:
        """All steps in one call."""
        self.node.init_state_with_shape(start.shape)
        self.node.v_mem = start
        return self.node(current)


class SnnTorchSite(PeerSite):
    """``Leaky`` without a leak; its reset of one step is taken off in the next, which gives the same spikes.

    With ``reset_delay=False`` it also takes θ off a potential that stays above it, without a spike: another neuron.
    """

    def __init__(self, v_threshold: Tensor, v_init: Tensor, timesteps: int) -> None:
        super().__init__(v_threshold, v_init, timesteps)
        from snntorch import Leaky

        self.node = Leaky(beta=1.0, threshold=1.0, reset_mechanism="subtract")

    def spikes(self, current: Tensor, start: Tensor) -> Tensor:
        """Step by step."""
        found, membrane = [], start
        for step in current:
            spikes, membrane = self.node(step, membrane)
            found.append(spikes)
        return torch.stack(found)


PEERS: dict[str, type[PeerSite]] = {
    "spikingjelly": SpikingJellySite, "sinabs": SinabsSite, "snntorch": SnnTorchSite,
}  # fmt: skip


def installed() -> dict[str, type[PeerSite]]:
    """The peers that can be imported, by the name of their distribution."""
    return {name: site for name, site in PEERS.items() if importlib.util.find_spec(name)}


def versions() -> str:
    """The peers with their versions, for the first line of a benchmark."""
    found = (f"{name} {importlib.metadata.version(name) if name in installed() else 'not installed'}" for name in PEERS)
    return ", ".join(found)


class PeerNetwork(nn.Module):
    """A converted network with a peer's neurons: [N, C, H, W] → the mean over T, [N, classes]."""

    def __init__(self, kind: type[PeerSite], graph: nn.Module, conversion: Conversion) -> None:
        """Take the layers of ``graph``, an ANN prepared like the conversion's, and the neurons of ``conversion``."""
        super().__init__()
        self.timesteps, self.time_axis = conversion.recipe.timesteps, kind.time_axis
        self.network = copy.deepcopy(graph)
        for path, site in sites(conversion.snn).items():
            self.network.set_submodule(path, kind(site.v_threshold, site.v_init, self.timesteps))

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean over time."""
        if self.time_axis:
            return self.network(x.repeat_interleave(self.timesteps, 0)).unflatten(0, (-1, self.timesteps)).mean(1)
        return self.network(x.repeat(self.timesteps, 1, 1, 1)).unflatten(0, (self.timesteps, -1)).mean(0)
