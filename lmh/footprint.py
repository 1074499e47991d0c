"""How much of an inference runs at once: what fits into memory, by a rule.

One sample is run with two steps and with three, and the tensors that live between the nodes of the graph are added up
at every node. For s steps at once that sum is f + c s bytes: f for what does not depend on time, c for each step; b(s)
is the largest of these sums. Then

1. as many samples as fit run at once, each over all T steps: ⌊memory / b(T)⌋;
2. where not one fits, one sample runs at a time, in chunks of as many steps as fit, and keeps its state between them.

What layers need inside of them is not counted, so half of the free memory is used unless it is said how much. Free is
what the system has, or the less that a control group (a container, a job of a cluster) may take; on a GPU also what
torch keeps for itself.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .errors import ArgumentError
from .kernels import Kernel, use_kernel
from .time_axis import Readout, call, carry_state, takes_events, time_axis

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
GROUP_FILES = {
    "": ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file"),
}
"""By controller, which version 2 does not name: the limit, what is used, and what of that the system gives back, which
is files that were read."""


@dataclass(frozen=True)
class Fit:
    """As many samples, else steps, as fit into memory (:mod:`lmh.footprint`).

    Attributes:
        megabytes: what the tensors between layers may take, in 10⁶ bytes; half of what is free unless given.
    """

    megabytes: float | None = None

    def __post_init__(self) -> None:
        if self.megabytes is not None and not 0 < self.megabytes < math.inf:
            raise ArgumentError(f"Fit: megabytes is {self.megabytes!r}; expected a number above 0, or None.")


class Part(NamedTuple):
    """How many samples and steps run at once."""

    samples: int
    steps: int


def part_of(snn: nn.Module, inputs: Sequence[Tensor], fit: Fit) -> Part:
    """Return what fits; runs in eval mode and without gradients are the caller's.

    Args:
        snn: a converted network.
        inputs: as it takes them.
        fit: into how much.

    Raises:
        ArgumentError: if the network is wrapped, or the free memory is unknown here.
    """
    if not isinstance(snn, fx.GraphModule):
        raise ArgumentError(
            f"Fit: the network is a {type(snn).__name__}; expected the fx.GraphModule that convert, load or deploy "
            "returned. Pass that, not a wrapper around it."
        )
    timesteps = time_axis(snn).timesteps
    axis = 1 if takes_events(snn) else 0
    if inputs[0].shape[axis] == 0:
        return Part(1, timesteps)
    memory = _free(inputs[0].device) / 2 if fit.megabytes is None else 1e6 * fit.megabytes
    needed = _needed(snn, [x.narrow(axis, 0, 1) for x in inputs], timesteps)
    whole = int(memory // max(needed(timesteps), 1))
    if whole:
        return Part(min(whole, inputs[0].shape[axis]), timesteps)
    return Part(1, next((steps for steps in range(timesteps, 1, -1) if needed(steps) <= memory), 1))


def _needed(snn: fx.GraphModule, sample: Sequence[Tensor], timesteps: int) -> Callable[[int], int]:
    """Return what gives the bytes of a run of so many steps of one sample, b(s)."""
    first, second = min(timesteps, 2), min(timesteps, 3)
    pairs = list(zip(_live(snn, sample, first), _live(snn, sample, second), strict=True))
    return lambda steps: max(one + (other - one) * (steps - first) for one, other in pairs)


def live_bytes(snn: fx.GraphModule, inputs: Sequence[Tensor], steps: int) -> int:
    """Return the largest sum of the tensors between nodes in a run of some steps in eval mode, and all that is kept.

    >>> from lmh.convert import load
    >>> snn, x = load("zoo:digits-cnn-t4"), torch.zeros(1, 1, 8, 8)
    >>> one, two = (live_bytes(snn, [x], steps) for steps in (1, 2))
    >>> one < two < 2 * one
    True
    """
    return max(_live(snn, inputs, steps))


def _live(snn: fx.GraphModule, inputs: Sequence[Tensor], steps: int) -> list[int]:
    """Return the bytes at every node, and of all that is kept."""
    inputs = [(x[:steps] if takes_events(snn) else x).clone() for x in inputs]  # without what else is in their memory
    watch = _Watch(snn)
    with use_kernel(Kernel.EAGER), call(time_axis(snn), Readout.RUNNING, steps), carry_state(snn):
        watch.run(*inputs)
        states = [vars(module).get(name) for module in snn.modules() for name in ("_carried", "_so_far")]
        kept = sum(_storages(states).values())
        return [live + kept for live in watch.live]


class _Watch(fx.Interpreter):
    """Runs a graph and adds up what lives at every node."""

    def __init__(self, snn: fx.GraphModule) -> None:
        super().__init__(snn)
        self.live: list[int] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.live.append(sum(_storages([value, *self.env.values()]).values()))
        return value


def _storages(values: Any) -> dict[int, int]:
    """Return the bytes of every piece of memory that tensors hold, by its address."""
    storages = [leaf.untyped_storage() for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _free(device: torch.device) -> float:
    """Return the bytes that new tensors can take."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    return min([_free_of_system(), *_free_of_groups()])


def _free_of_groups() -> list[float]:
    """Return what the control groups of this process still allow it, for those whose files can be seen."""
    found = []
    for controller, (most, used, parts, given_back) in GROUP_FILES.items():
        for group in _own_groups(controller):
            try:
                limit, taken, stat = (
                    (group / name).read_text(encoding="ascii").strip() for name in (most, used, parts)
                )
                files = dict(line.split() for line in stat.splitlines()).get(given_back, 0)
                found.append(max(float(limit) - float(taken) + float(files), 0.0))
            except (OSError, ValueError):  # no such group, or "max"
                continue
    return found


def _own_groups(controller: str) -> list[Path]:
    """Return the folders of this process's group and of those around it; a container sees its own as the root."""
    root, path = GROUPS / controller, ""
    with contextlib.suppress(OSError):
        for line in OWN_GROUPS.read_text(encoding="utf-8").splitlines():
            _, controllers, name = line.split(":", 2)
            if controller in controllers.split(","):
                path = name.strip("/")
    return [root / path, *(group for group in (root / path).parents if group.is_relative_to(root))]


def _free_of_system() -> float:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = {line.split(":")[0]: line.split()[1] for line in lines}
        return 1024.0 * float(kilobytes["MemAvailable"])
    except (OSError, KeyError):
        pass
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError) as error:
        raise ArgumentError(
            "Fit: how much memory is free is unknown on this machine; expected it to be said. Pass Fit(megabytes=2000)."
        ) from error
