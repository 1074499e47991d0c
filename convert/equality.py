"""The proof of PREPARE: the rewritten graph answers as the ANN does, and each sample's answer is its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import AuditError
from ..ops import label
from ..shapes import BATCHES

TOLERANCE = 1e-4


def same_answers(ann: nn.Module, model: fx.GraphModule, sample_shape: Sequence[int]) -> None:
    """Compare the rewritten network on three random samples with the ANN on the first two, both in eval mode.

    So a node that mixes samples, which would mix time steps too, shows as well as a wrong rewriting.

    Raises:
        AuditError: where the answers differ by more than rounding, naming the node that mixes samples if there is one.
    """
    parameter = next((p for p in ann.parameters() if p.is_floating_point()), torch.empty(()))
    if parameter.device.type == "meta":
        return
    few, many = BATCHES
    x = torch.randn((many, *sample_shape), generator=torch.Generator().manual_seed(0)).to(parameter)
    with torch.no_grad(), _in_eval_mode(ann):
        expected = ann(x[:few].clone())
        worst = _difference(model(x.clone())[:few], expected)
        if worst < TOLERANCE:
            return
        if _difference(model(x[:few].clone()), expected) < TOLERANCE:
            raise AuditError([_mixing_line(model, x)])
    raise AuditError(
        [
            f"the rewritten graph answers differently from {type(ann).__name__} (relative difference {worst:.1e}); "
            "expected the same. Its forward changes values in a way that tracing cannot see, such as writing into "
            "a slice or keeping values between calls: rewrite that part."
        ]
    )


@contextmanager
def _in_eval_mode(ann: nn.Module) -> Iterator[None]:
    """Run ``ann`` in eval mode, and as written where parts of it are compiled."""
    before = {module: module.training for module in ann.modules()}
    try:
        ann.eval()
        compiled = "torch._dynamo" in sys.modules
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module, training in before.items():
            module.training = training


def _difference(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max()) / float(expected.abs().max().clamp_min(1e-6))


def _mixing_line(model: fx.GraphModule, x: Tensor) -> str:
    """Name the first node whose values for the first samples depend on how many others there are."""
    alone, together = _values(model, x[: BATCHES[0]]), _values(model, x)
    for node in model.graph.nodes:
        pairs = zip(pytree.tree_leaves(alone[node]), pytree.tree_leaves(together[node]), strict=True)
        if any(_depends_on_others(a, b) for a, b in pairs):
            return (
                f"{label(node)}: mixes the samples of a batch or uses the batch size, as a value, so it would mix time "
                "steps too; expected each sample's values to depend on that sample alone. Leave axis 0 as it is."
            )
    return f"{type(model).__name__}: a sample's answer depends on the other samples; expected each to stand alone."


def _depends_on_others(alone: Any, together: Any) -> bool:
    few, many = BATCHES
    batched = isinstance(alone, Tensor) and alone.is_floating_point() and alone.shape[:1] == (few,)
    return batched and together.shape[:1] == (many,) and not _difference(together[:few], alone) < TOLERANCE


class _Recorder(fx.Interpreter):
    """Keeps the value of every node."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and keep what it gives."""
        self.values[n] = super().run_node(n)
        return self.values[n]


def _values(model: fx.GraphModule, x: Tensor) -> dict[fx.Node, Any]:
    recorder = _Recorder(model)
    recorder.run(x.clone())
    return recorder.values
