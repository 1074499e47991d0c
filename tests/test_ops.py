"""The op table: every spelling has its kind, and long graphs stay cheap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from lmh.convert import prepare
from lmh.op_table import Kind
from lmh.ops import is_in_place, is_tensor, kind_of


def kinds(function: object) -> list[Kind]:
    graph = fx.symbolic_trace(function)  # type: ignore[arg-type]
    return [kind_of(node) for node in graph.graph.nodes][1:-1]


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda x: torch.relu(x), Kind.ACTIVATION),
        (lambda x: x.clamp(min=0), Kind.ACTIVATION),
        (lambda x: torch.clamp(x, 0.0), Kind.ACTIVATION),
        (lambda x: x.clamp(0, 6), Kind.ACTIVATION),
        (lambda x: x.clamp(max=6), Kind.UNKNOWN),
        (lambda x: x.clamp(1), Kind.UNKNOWN),
        (lambda x: x * 2, Kind.AFFINE),
        (lambda x: x / 2, Kind.AFFINE),
        (lambda x: 2 / x, Kind.UNKNOWN),
        (lambda x: x * x.sum(1), Kind.UNKNOWN),
        (lambda x: x[:, ::2], Kind.SHAPE),
        (lambda x: x.size(0), Kind.SIZE),
        (lambda x: x.shape[0] * 2 - 1, Kind.SIZE),
        (lambda x: x + x, Kind.AFFINE),
        (lambda x: nn.functional.max_pool2d(x, 2), Kind.MAXPOOL),
        (lambda x: torch.softmax(x, 1), Kind.READOUT),
        (lambda x: x.cumsum(1), Kind.UNKNOWN),
    ],
)
def test_every_spelling_has_its_kind(function: object, kind: Kind) -> None:
    assert kinds(function)[-1] is kind


def test_sizes_and_tensors_are_told_apart() -> None:
    graph = fx.symbolic_trace(lambda x: x.view(x.shape[0], -1)[:, 1])
    found = {node.name: is_tensor(node) for node in graph.graph.nodes}
    assert found == {"x": True, "getattr_1": False, "getitem": False, "view": True, "getitem_1": True, "output": True}


def test_in_place_spellings_are_known() -> None:
    graph = fx.symbolic_trace(lambda x: nn.functional.relu(x.relu_().sigmoid(), inplace=True))
    assert [is_in_place(node) for node in graph.graph.nodes] == [False, True, False, True, False]


class Chain(nn.Module):
    """Forty channel shuffles and sums: each value is used twice."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(40):
            a, b = x.chunk(2, 1)
            x = torch.cat([a + b, b], 1)
        return torch.relu(x)


def test_graphs_with_many_paths_are_classified_at_once() -> None:
    assert prepare(Chain(), (4,)).spiking == ["relu"]
