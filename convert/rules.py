"""Rules: what becomes of each activation, by its module type after spelling is normalised.

A rule is a function from the activation module to :class:`Spike` or :class:`Keep`. To convert a type of
your own, or one that is refused, pass ``rules={MyActivation: as_neuron}``; your entry wins.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import nn

from ..errors import ArgumentError
from ..qcfs import QCFS
from ..records import Keep, Spike
from .maxpool import MaxPool, WhereExact

Rule = Callable[[nn.Module], Spike | Keep]
Rules = Mapping[type[nn.Module], Rule]


def as_neuron(module: nn.Module) -> Spike:
    """Any rectifying activation becomes LM-H neurons whose θ calibration finds.

    Args:
        module: the activation; what it computes is not looked at.

    >>> rules = {nn.GELU: as_neuron}
    >>> rules[nn.GELU](nn.GELU())
    Spike(v_threshold=None, upper=inf, levels=None)
    """
    return Spike()


def keep(module: nn.Module) -> Keep:
    """The activation stays analog.

    >>> rules = {nn.Softplus: keep}
    >>> rules[nn.Softplus](nn.Softplus())
    Keep()
    """
    return Keep()


def from_qcfs(module: nn.Module) -> Spike:
    """A QCFS activation hands its learned θ to the neurons (Bu et al. 2022).

    Raises:
        ArgumentError: for another type.

    >>> from_qcfs(QCFS(levels=4, v_threshold=2.0))
    Spike(v_threshold=tensor(2.), upper=inf, levels=4)
    """
    if not isinstance(module, QCFS):
        raise ArgumentError(f"from_qcfs: got {type(module).__name__}; expected QCFS. Use as_neuron for other types.")
    return Spike(v_threshold=module.v_threshold.detach().clone(), levels=module.levels)


def from_relu6(module: nn.Module) -> Spike:
    """ReLU6 becomes neurons with θ ≤ 6, whose mean output cannot exceed 6 either."""
    return Spike(upper=6.0)


def from_hardtanh(module: nn.Module) -> Spike:
    """Hardtanh from 0 to b, which is what a neuron with θ ≤ b does."""
    if not isinstance(module, nn.Hardtanh) or module.min_val != 0:
        raise ArgumentError(
            f"Hardtanh from {getattr(module, 'min_val', None)} gives negative values, which spikes cannot; expected "
            "min_val = 0. Pass --surgery relu, or rules={nn.Hardtanh: as_neuron}, to drop them, and fine-tune; or keep "
            "the layer analog with --keep PATH."
        )
    return Spike(upper=float(module.max_val))


DEFAULT_RULES: Rules = MappingProxyType(
    {nn.ReLU: as_neuron, QCFS: from_qcfs, nn.ReLU6: from_relu6, nn.Hardtanh: from_hardtanh}
)


STAND_INS = (nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.ELU, nn.CELU, nn.LeakyReLU, nn.PReLU, nn.Softplus, nn.Hardtanh)


@dataclass(frozen=True)
class ReluSurgery:
    """What has no rule: activations that resemble a ReLU become neurons, the rest stays analog, by name.

    Attributes:
        stand_ins: activation types that a ReLU stands in for.
    """

    stand_ins: tuple[type[nn.Module], ...] = STAND_INS

    def __post_init__(self) -> None:
        kinds = self.stand_ins
        if not (isinstance(kinds, tuple) and all(isinstance(k, type) and issubclass(k, nn.Module) for k in kinds)):
            raise ArgumentError(
                f"ReluSurgery: stand_ins is {kinds!r}; expected a tuple of module types. "
                "Pass ReluSurgery((nn.SiLU, nn.GELU)), say."
            )


@dataclass(frozen=True)
class StandIns:
    """A :class:`ReluSurgery` by names, as a recipe keeps it in a file.

    Attributes:
        names: of the stand-in types, with their modules.

    >>> StandIns.of(ReluSurgery((nn.SiLU,)))
    StandIns(names=('torch.nn.modules.activation.SiLU',))
    """

    names: tuple[str, ...]

    @classmethod
    def of(cls, surgery: ReluSurgery) -> StandIns:
        """Return the names of a surgery's types."""
        return cls(tuple(_qualified(kind) for kind in surgery.stand_ins))

    def surgery(self, ann: nn.Module) -> ReluSurgery:
        """Return the surgery again, from the types of ``ann`` and those already imported; imports nothing.

        Raises:
            ArgumentError: naming a type that is not found.
        """
        known = {_qualified(kind): kind for module in ann.modules() for kind in type(module).__mro__}
        return ReluSurgery(tuple(known.get(name) or _imported(name) for name in self.names))


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _imported(name: str) -> type[nn.Module]:
    """Look a type up without ``getattr``, which some packages answer with an import."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        found: object = sys.modules.get(".".join(parts[:end]))
        for part in parts[end:]:
            found = getattr(found, "__dict__", {}).get(part)
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    raise ArgumentError(
        f"stand-in {name}: no such module type in the source network or among the imported modules; expected the one "
        "that the conversion named. Import the module that defines it first."
    )


@dataclass(frozen=True)
class Plan:
    """Everything that decides what becomes of a node.

    Attributes:
        rules: from activation type to rule.
        keep: paths of nodes that stay analog.
        surgery: what to do where no rule applies; None refuses.
        maxpool: what becomes of max-pools.
    """

    rules: Rules
    keep: frozenset[str] = frozenset()
    surgery: ReluSurgery | None = None
    maxpool: MaxPool = field(default_factory=WhereExact)


def merged(rules: Rules | None) -> Rules:
    """Return the default rules with the user's on top.

    Raises:
        ArgumentError: if a key is not a module type, or a value not a function.
    """
    for key, rule in (rules or {}).items():
        if not (isinstance(key, type) and issubclass(key, nn.Module) and callable(rule)):
            raise ArgumentError(
                f"rules: {key!r}: {rule!r} came; expected a module type and a function, as in {{nn.GELU: as_neuron}}."
            )
    return {**DEFAULT_RULES, **(rules or {})}
