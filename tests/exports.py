"""What tests of torch.export programs share: exporting, comparing, and looking into a graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

BATCHES = (2, 3, 5)


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to what the output varies over the batch: deep networks hardly do."""
    scale = float((expected - expected.mean(0)).abs().max().clamp_min(1e-9))
    return float((got - expected).abs().max()) / scale


def worst(graph: nn.Module, source: nn.Module, shape: tuple[int, ...]) -> float:
    """Largest difference between two networks over several batch sizes."""
    with torch.no_grad():
        return max(difference(graph(x.clone()), source(x)) for n in BATCHES for x in [torch.randn(n, *shape)])


def exported(model: nn.Module, shape: tuple[int, ...], *, strict: bool = False) -> torch.export.ExportedProgram:
    return torch.export.export(model, (torch.randn(2, *shape),), dynamic_shapes=({0: Dim("batch")},), strict=strict)


def types(graph: fx.GraphModule) -> dict[str, str]:
    """From path to type, for every module that the graph calls."""
    return {
        str(node.target): type(graph.get_submodule(str(node.target))).__name__
        for node in graph.graph.nodes
        if node.op == "call_module"
    }


def left_over(graph: fx.GraphModule) -> list[str]:
    """ATen operators that became nothing else."""
    return [str(node.target) for node in graph.graph.nodes if "aten" in str(node.target)]


class Function(nn.Module):
    """A function as a network."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def lively(model: nn.Module) -> nn.Module:
    """Move BatchNorm's statistics off their start, so that a mix-up shows."""
    for name, buffer in model.named_buffers():
        if "running" in name:
            nn.init.uniform_(buffer, 0.5, 1.5)
    return model.eval()
