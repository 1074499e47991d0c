"""The proof of PREPARE: the rewritten graph answers as the ANN does, and each sample's answer is its own."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import AuditError
from ..eval_mode import in_eval_mode
from ..ops import label
from ..shapes import BATCHES
from ..structures import batched, example_tensor, leaves_of
from .maxpool import MaxPool, answering_as

TOLERANCE = 1e-4


def same_answers(ann: nn.Module, model: fx.GraphModule, sample_shape: Sequence[Any], maxpool: MaxPool) -> None:
    """Compare the rewritten network on three random samples with the ANN on the first two, both in eval mode.

    So a node that mixes samples, which would mix time steps too, shows as well as a wrong rewriting. All that the
    networks return is compared, in tuples and dicts too; with ``AveragePool()`` the ANN's max-pools average.

    Raises:
        AuditError: where the answers differ by more than rounding, naming the node that mixes samples if there is one.
    """
    parameter = example_tensor(ann)
    if parameter.device.type == "meta":
        return
    few, many = BATCHES
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(parameter) for shape in batched(sample_shape, many)]
    first = [x[:few] for x in inputs]
    with torch.no_grad(), _as_written(ann), answering_as(maxpool):
        expected = _answers(ann, first)
        worst = _differences(_answers(model, inputs), expected)
        if _agree(worst):
            return
        if _agree(_differences(_answers(model, first), expected)):
            raise AuditError([_mixing_line(model, inputs)])
    shown = ", ".join(f"{difference:.1e}" for difference in worst)
    raise AuditError(
        [
            f"the rewritten graph answers differently from {type(ann).__name__} (relative difference {shown}); "
            "expected the same. Its forward changes values in a way that tracing cannot see, such as writing into "
            "a slice or keeping values between calls: rewrite that part."
        ]
    )


@contextmanager
def _as_written(ann: nn.Module) -> Iterator[None]:
    """Run ``ann`` in eval mode, and as written where parts of it are compiled."""
    compiled = "torch._dynamo" in sys.modules
    with in_eval_mode(ann), torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield


def _answers(network: nn.Module, inputs: Sequence[Tensor]) -> list[Any]:
    return leaves_of(network(*(x.clone() for x in inputs)))


def _differences(got: Sequence[Any], expected: Sequence[Any]) -> list[float]:
    """Relative difference of each leaf of an output for the first samples, which may come beside more."""
    if len(got) != len(expected):
        return [math.inf]
    return list(map(_difference, got, expected))


def _difference(got: Any, expected: Any) -> float:
    if not isinstance(got, Tensor) or not isinstance(expected, Tensor):
        return 0.0 if type(got) is type(expected) and (got == expected or _is_size(got, expected)) else math.inf
    if got.shape != expected.shape and got.ndim:
        got = got[: BATCHES[0]]
    if got.shape != expected.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    got, expected = got.double(), expected.double()
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


def _is_size(got: Any, expected: Any) -> bool:
    """Whether two whole numbers are multiples of the batch sizes, the same of each."""
    few, many = BATCHES
    return isinstance(got, int) and got * few == expected * many


def _agree(differences: Sequence[float]) -> bool:
    return all(difference < TOLERANCE for difference in differences)


def _mixing_line(model: fx.GraphModule, inputs: Sequence[Tensor]) -> str:
    """Name the first node whose values for the first samples depend on how many others there are."""
    alone, together = _values(model, [x[: BATCHES[0]] for x in inputs]), _values(model, inputs)
    for node in model.graph.nodes:
        pairs = zip(leaves_of(alone[node]), leaves_of(together[node]), strict=True)
        if any(_depends_on_others(a, b) for a, b in pairs):
            return (
                f"{label(node)}: mixes the samples of a batch or uses the batch size, as a value, so it would mix time "
                "steps too; expected each sample's values to depend on that sample alone. Leave axis 0 as it is."
            )
    return f"{type(model).__name__}: a sample's answer depends on the other samples; expected each to stand alone."


def _depends_on_others(alone: Any, together: Any) -> bool:
    few, many = BATCHES
    by_sample = isinstance(alone, Tensor) and alone.is_floating_point() and alone.shape[:1] == (few,)
    return by_sample and together.shape[:1] == (many,) and not _difference(together, alone) < TOLERANCE


class _Recorder(fx.Interpreter):
    """Keeps the value of every node."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and keep what it gives."""
        self.values[n] = super().run_node(n)
        return self.values[n]


def _values(model: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[fx.Node, Any]:
    recorder = _Recorder(model)
    recorder.run(*(x.clone() for x in inputs))
    return recorder.values
