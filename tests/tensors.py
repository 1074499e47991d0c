"""What tests ask of tensors: another order in memory, the graph behind one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def last(x: Tensor) -> Tensor:
    """The same values with the channels last in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def nodes(tensor: Tensor) -> Iterator[Any]:
    """All nodes of the graph that a tensor comes from."""
    waiting, seen = [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [before for before, _ in node.next_functions]
