"""Layers of a spiking network: which weighted sum and BatchNorm give a current, and what else is added to it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from ..op_table import BATCHNORM_MODULES, SYNAPSE_MODULES
from ..ops import module_of, plain_sum
from ..spiking import SpikingSite
from ..time_axis import Border
from .lockstep import Lockstep

LEAST_SCALE = 1e-4


@dataclass(frozen=True)
class Layer:
    """A weighted sum with the BatchNorm behind it, or a BatchNorm alone.

    Attributes:
        synapse: the weighted sum, if there is one.
        norm: the BatchNorm that alone reads it, or that stands alone.
        end: the last of the sums that its output alone goes through, such as a residual add; else the layer itself.
            What it gives is compared with what the ANN's node of this name gives.
        others: what these sums add.
        site: the node of the neurons whose current ``end`` is, if it goes nowhere else.
    """

    synapse: fx.Node | None
    norm: fx.Node | None
    end: fx.Node
    others: tuple[fx.Node, ...]
    site: fx.Node | None

    @property
    def home(self) -> fx.Node:
        """The node whose bias moves the layer's output: the BatchNorm, or else the weighted sum."""
        home = self.norm if self.norm is not None else self.synapse
        assert home is not None
        return home

    @property
    def axis(self) -> int:
        """Where channels lie in the output: last behind a linear layer, else 1."""
        return -1 if isinstance(module_of(self.home), nn.Linear) else 1


def layers(lockstep: Lockstep) -> list[Layer]:
    """Return the layers of a spiking network in order, without modules and parameters that are used more than once."""
    snn = lockstep.snn
    calls = Counter(str(node.target) for node in snn.graph.nodes if node.op == "call_module")
    owners = Counter(id(parameter) for _, parameter in snn.named_parameters(remove_duplicate=False))
    own: list[fx.Node] = []
    for node in snn.graph.nodes:
        module = module_of(node)
        if isinstance(module, (*SYNAPSE_MODULES, *BATCHNORM_MODULES)) and calls[str(node.target)] == 1:
            shared = any(owners[id(parameter)] > 1 for parameter in module.parameters())
            own += [] if shared or lockstep.twin(node) is None else [node]
    found: list[Layer] = []
    behind: set[fx.Node] = set()
    for node in own:
        if node in behind:
            continue
        norm = node if isinstance(module_of(node), BATCHNORM_MODULES) else _only_reader(node)
        if norm is not node and (norm not in own or not isinstance(module_of(norm), BATCHNORM_MODULES)):
            norm = None
        synapse = None if norm is node else node
        behind.add(norm if norm is not None else node)
        found.append(Layer(synapse, norm, *_way(lockstep, norm if norm is not None else node)))
    return found


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _way(lockstep: Lockstep, home: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...], fx.Node | None]:
    """Follow a layer's output through sums to the neurons that read it."""
    others: list[fx.Node] = []
    end = current = home
    while (reader := _only_reader(current)) is not None:
        module = module_of(reader)
        if isinstance(module, SpikingSite):
            return end, tuple(others), reader
        if plain_sum(reader):
            others += [source for source in reader.all_input_nodes if source is not current]
            end = reader
        elif not isinstance(module, Border):
            break
        current = reader
    return end, tuple(others), None


class Target(NamedTuple):
    """Where a layer is compared with the ANN's, and with what.

    Attributes:
        node: of the spiking network, where the layer ends.
        wanted: what the ANN's node gives, [N, *F] for each batch.
        added: the mean over time of what the spiking network's sums add on the way there, of the same shapes; nothing
            where nothing is.
    """

    node: fx.Node
    wanted: list[Tensor]
    added: list[Tensor]


def target(lockstep: Lockstep, layer: Layer) -> Target:
    """Return what a layer should give. Where a sum broadcasts, the layer counts as ending before it."""
    wanted = lockstep.expected(layer.end)
    added = [lockstep.received(other) for other in layer.others]
    if any(part.shape != value.shape for parts in added for part, value in zip(parts, wanted, strict=True)):
        return Target(layer.home, lockstep.expected(layer.home), [])
    return Target(layer.end, wanted, [torch.stack(parts).sum(0) for parts in zip(*added, strict=True)])


def shift(module: nn.Module | None, amount: Tensor) -> bool:
    """Add ``amount`` [C] to every output of a layer; False if it has nothing to shift."""
    with torch.no_grad():
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            module.bias += amount  # type: ignore[union-attr, operator]
            return True
        mean = getattr(module, "running_mean", None)
        if isinstance(module, BATCHNORM_MODULES) and isinstance(mean, Tensor):
            scale = gain(module)
            mean -= torch.where(scale.abs() > LEAST_SCALE, amount / scale, 0.0)
            return True
    return False


def gain(module: nn.Module | None) -> Tensor:
    """Return what a BatchNorm multiplies each channel by, weight/√(variance + ε); 1 for anything else."""
    if not isinstance(module, BATCHNORM_MODULES) or module.running_var is None:
        return torch.ones(())
    weight = module.weight if module.weight is not None else torch.ones_like(module.running_var)
    return weight.detach() / (module.running_var + module.eps).sqrt()
