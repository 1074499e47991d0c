"""torch.export programs that no graph of modules can stand for: refused with the line, or named by the audit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from exports import Function, exported, worst
from lmh.convert import prepare
from lmh.convert.exported import modules_from_export, trace_by_export
from lmh.errors import ArgumentError, AuditError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's own


class Refused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(4))


class OnValues(Refused):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x * 2
        return self.fc(x)


class LoopsOnValues(Refused):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().max())):
            x = self.fc(x)
        return x


class FixesBatch(Refused):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 2:
            x = x + 1
        return self.fc(x)


class AsksForMoreThanOne(Refused):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            x = x * 2
        return self.fc(x)


class HalvesBatch(Refused):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).view(x.shape[0] // 2, 2, 4).sum(1)


class Counts(Refused):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x) + self.calls


class Averages(Refused):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.running_mean.mul_(0.9).add_(0.1 * x.mean(0))
        return self.fc(x - self.running_mean)


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (OnValues(), ["test_exported_refusals.py:", "`if x.sum() > 0:`", "values of tensors", "Move the decision"]),
        (LoopsOnValues(), ["`for _ in range(int(x.abs().max())):`", "values of tensors"]),
        (FixesBatch(), ["`if x.shape[0] == 2:`", "fixes the batch size (batch = 2)", "x.size(0)"]),
        (AsksForMoreThanOne(), ["something else for a batch of one", "Leave the batch size out of decisions"]),
        (HalvesBatch(), ["fixes the batch size (batch = 2*_batch)", "every batch size"]),
        (Counts(), ["overwrites calls", "keeps nothing between calls"]),
        (Averages(), ["overwrites running_mean", "keeps nothing between calls"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_traced_is_refused_with_its_line(
    model: nn.Module, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AuditError) as caught:
        trace_by_export(model, torch.zeros(2, 4))
    for part in parts:
        assert part in str(caught.value)
    assert capsys.readouterr() == ("", "")


def test_an_example_that_does_not_fit_is_told_from_control_flow() -> None:
    with pytest.raises(ArgumentError, match=r"cannot be run on an input of shape \['N', 5\].*example_input"):
        trace_by_export(OnValues(), torch.zeros(2, 5))
    with pytest.raises(ArgumentError, match=r"shape \[0, 4\]; expected a batch"):
        trace_by_export(nn.Linear(4, 4), torch.zeros(0, 4))


class Cast(Refused):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.fc(x)
        return torch.relu(y.float())


class Branches(Refused):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.fc(x), lambda x: x * 2, (x,))


@pytest.mark.parametrize(("model", "name"), [(Cast(), "wrap_with_autocast"), (Branches(), "cond")])
def test_regions_of_other_rules_stay_what_they_are(model: nn.Module, name: str) -> None:
    graph = trace_by_export(model, torch.zeros(2, 4))
    assert name in [str(node.target) for node in graph.graph.nodes]
    assert worst(graph, model, (4,)) < 1e-5


def test_a_batch_size_that_is_built_in_is_refused() -> None:
    model = Function(lambda x: x + torch.ones(x.shape[0], 4))
    with pytest.raises(AuditError, match="exported for the batch size 2 alone") as caught:
        modules_from_export(torch.export.export(model, (torch.rand(2, 4),)))
    assert "dynamic_shapes" in str(caught.value)
    assert worst(modules_from_export(exported(model, (4,))), model, (4,)) < 1e-5


def test_an_output_that_fx_has_no_words_for_is_refused() -> None:
    @dataclass
    class Output:
        logits: Tensor

    torch.export.register_dataclass(Output, serialized_type_name="test_exported_refusals.Output")
    model = Function(lambda x: [x, Output(x)])  # type: ignore[arg-type, return-value]
    with pytest.raises(AuditError, match=r"returns a .*Output; expected tensors.*wrapper"):
        trace_by_export(model, torch.zeros(2, 4))


def test_operators_without_a_module_reach_the_audit_by_name() -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.cumsum(x, 1)) + torch.logsumexp(x, 1, keepdim=True)

    graph = trace_by_export(Sums(), torch.zeros(2, 4))
    assert worst(graph, Sums(), (4,)) < 1e-5
    with pytest.raises(AuditError) as caught:
        prepare(graph, (4,))
    assert [name in str(caught.value) for name in ("aten.cumsum", "aten.logsumexp")] == [True, True]
