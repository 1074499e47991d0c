"""The onnx package's own cases for every operator that the importer claims.

Each case is one model with inputs and outputs. The first input (or the one named in ``DATA``) stays an input, the
others become initializers, as weights, axes and shapes are in real files. A case is imported with a free batch
where that is possible, and for its own batch size where its constants fit no other.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, defs, helper, numpy_helper
from torch import Tensor

from lmh.convert.onnx_import import OPERATORS, Registry, import_onnx
from lmh.errors import SourceError

OPSETS = range(9, defs.onnx_opset_version() + 1)
FOLDED = {"Constant"}
DATA = {"Where": 1, "ConstantOfShape": None}
SEVERAL_SIGNALS = (
    "Add", "And", "Concat", "Div", "Einsum", "Equal", "Gemm", "Greater", "GreaterOrEqual", "Less", "LessOrEqual",
    "MatMul", "Max", "Mean", "Min", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
)  # fmt: skip

UNSIGNED, STRINGS = r"uint(16|32|64)", r"equal_string"
EXCLUDED = {
    UNSIGNED: "torch has these types, but next to no operators for them",
    r"FLOAT8|FLOAT4|_U?INT[24](_|$)": "8-bit and 4-bit floats and 2-bit and 4-bit integers are for quantised models",
    STRINGS: "torch has no strings",
    r"identity_(sequence|opt)$": "sequences and optional values are no tensors",
    r"averagepool_\dd_dilations": "torch has no dilated mean pool",
    r"maxpool_with_argmax": "torch counts the places of maxima in each channel, ONNX in the whole tensor",
    r"reduce_(max|min)_empty_set": "torch has no extreme of nothing",
    r"batchnorm_\w+_training_mode|training_dropout": "files in training mode are refused",
    r"gathernd_example_int32_batch_dim1": "GatherND with batch_dims",
    r"resize_\w*(antialias|exclude_outside|not_larger|not_smaller|tf_crop_and_resize|symmetric)": (
        "torch's interpolation has no such option"
    ),
    r"resize_\w+_scales_(linear|cubic)_align_corners$": "a fractional size: torch aligns to the rounded one",
    r"resize_upsample_scales_cubic_asymmetric": "torch has half-pixel and aligned corners only",
    r"resize_downsample_sizes_linear_pytorch_half_pixel": "one axis of size 1, where that rule differs from torch's",
    r"resize_downsample_sizes_nearest$|resize_upsample_sizes_nearest_(floor_align|round_prefer_ceil_asym|ceil_half)": (
        "torch chooses other neighbours"
    ),
}
NOT_EXCLUDED = r"resize_upsample_scales_(linear|cubic)_align_corners$|pow_types_float32_uint"


@dataclass(frozen=True)
class Outcome:
    """What became of one case."""

    case: str
    operators: tuple[str, ...]
    result: str
    detail: str = ""


def reason_to_exclude(case: str) -> str | None:
    if re.search(NOT_EXCLUDED, case):
        return None
    return next((reason for pattern, reason in EXCLUDED.items() if re.search(pattern, case)), None)


def cases() -> Iterator[Any]:
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield from (case for case in load_model_tests(kind="node") if case.model is not None)


def arrays(values: list[Any]) -> list[Any]:
    return [numpy_helper.to_array(v) if isinstance(v, TensorProto) else np.asarray(v) if np.isscalar(v) else v
            for v in values]  # fmt: skip


def as_tensor(array: np.ndarray) -> Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def as_array(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))
    return tensor.detach().numpy()


def with_initializers(model: ModelProto, inputs: list[Any], kept: int | None) -> ModelProto:
    """Return the model with all inputs but one turned into initializers, at opset 9 or newer."""
    found = ModelProto()
    found.CopyFrom(model)
    infos = list(found.graph.input)
    for position, (info, array) in enumerate(zip(infos, inputs, strict=True)):
        if position != kept and isinstance(array, np.ndarray):
            found.graph.initializer.append(numpy_helper.from_array(array, info.name))
    del found.graph.input[:]
    found.graph.input.extend(info for position, info in enumerate(infos) if position == kept)
    return at_opset_9(found)


def at_opset_9(model: ModelProto) -> ModelProto:
    """And, Or, Xor and Not have not changed since opset 7 or 1, and their cases say so."""
    for entry in model.opset_import:
        if not entry.domain and entry.version < 9:
            entry.version, model.ir_version = 9, max(model.ir_version, 8)
    return model


def imported(model: ModelProto, registry: Registry) -> tuple[str, Any]:
    try:
        return "free batch", import_onnx(model, operators=registry)
    except SourceError as error:
        if "fixed_batch=True" not in str(error):
            raise
        return "fixed batch", import_onnx(model, fixed_batch=True, operators=registry)


def compare(network: Any, inputs: list[Tensor], expected: list[Any], case: Any) -> None:
    with torch.no_grad():
        outputs = network(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for output, wanted in zip(outputs, expected, strict=True):
        got = as_array(output)
        assert got.dtype == wanted.dtype, f"{got.dtype} instead of {wanted.dtype}"
        assert got.shape == wanted.shape, f"{got.shape} instead of {wanted.shape}"
        np.testing.assert_allclose(got, wanted, rtol=case.rtol, atol=max(case.atol, 1e-6))


def run(case: Any, registry: Registry = OPERATORS) -> Outcome:
    operators = tuple(node.op_type for node in case.model.graph.node)
    inputs, expected = (arrays(values) for values in case.data_sets[0])
    kept = DATA.get(operators[0], 0)
    try:
        model = with_initializers(case.model, inputs, kept)
        result, network = imported(model, registry)
        compare(network, [as_tensor(inputs[kept])] if inputs and kept is not None else [], expected, case)
    except SourceError as error:
        return Outcome(case.name, operators, "refused", str(error))
    except Exception as error:
        return Outcome(case.name, operators, "failed", f"{type(error).__name__}: {error}")
    return Outcome(case.name, operators, result)


def run_with_signals(case: Any) -> Outcome | None:
    """Run a case with every input left an input, where its operator takes several signals."""
    operators = tuple(node.op_type for node in case.model.graph.node)
    if len(operators) != 1 or operators[0] not in SEVERAL_SIGNALS or len(case.model.graph.input) < 2:
        return None
    inputs, expected = (arrays(values) for values in case.data_sets[0])
    model = ModelProto()
    model.CopyFrom(case.model)
    try:
        result, network = imported(at_opset_9(model), OPERATORS)
        compare(network, [as_tensor(array) for array in inputs], expected, case)
    except SourceError as error:
        return Outcome(case.name, operators, "refused", str(error))
    except Exception as error:
        return Outcome(case.name, operators, "failed", f"{type(error).__name__}: {error}")
    return Outcome(case.name, operators, result)


@pytest.fixture(scope="module")
def claimed_cases() -> list[Any]:
    """All cases whose nodes are all claimed; functions come once as one node and once written out."""
    known = FOLDED | set(OPERATORS.operators())
    return [case for case in cases() if all(n.op_type in known and not n.domain for n in case.model.graph.node)]


@pytest.fixture(scope="module")
def outcomes(claimed_cases: list[Any]) -> list[Outcome]:
    return [run(case) for case in claimed_cases]


@pytest.mark.parametrize("operator", OPERATORS.operators())
def test_the_cases_of_each_operator(operator: str, outcomes: list[Outcome]) -> None:
    own = [outcome for outcome in outcomes if outcome.operators == (operator,)]
    passed = [outcome for outcome in own if outcome.result.endswith("batch")]
    bad = [outcome for outcome in own if outcome not in passed and reason_to_exclude(outcome.case) is None]
    assert passed
    assert bad == []


def test_functions_written_out_in_claimed_operators(outcomes: list[Outcome]) -> None:
    several = [outcome for outcome in outcomes if len(outcome.operators) != 1]
    bad = [outcome for outcome in several if not outcome.result.endswith("batch")]
    assert len(several) > 150
    assert [outcome for outcome in bad if reason_to_exclude(outcome.case) is None] == []


def test_what_is_excluded_is_refused_and_never_wrong(outcomes: list[Outcome]) -> None:
    excluded = [outcome for outcome in outcomes if reason_to_exclude(outcome.case) is not None]
    assert {outcome.case: outcome.detail for outcome in excluded if outcome.result != "refused"} == {}
    for pattern in EXCLUDED:
        assert any(re.search(pattern, outcome.case) for outcome in excluded), f"{pattern} excludes nothing"


def test_operators_with_several_signals(claimed_cases: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    found = [outcome for case in claimed_cases if (outcome := run_with_signals(case)) is not None]
    bad = [outcome for outcome in found if not outcome.result.endswith("batch")]
    assert [outcome for outcome in bad if not re.search(f"{UNSIGNED}|{STRINGS}", outcome.case)] == []
    with capsys.disabled():
        print(f"\nONNX backend cases with every input a signal: {Counter(outcome.result for outcome in found)}")


def test_counts(outcomes: list[Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    counts = Counter(outcome.result for outcome in outcomes)
    with capsys.disabled():
        print(
            f"\nONNX backend cases ({onnx.__version__}): {len(outcomes)} for {len(OPERATORS.operators())} operators, "
            f"{counts['free batch']} with a free batch, {counts['fixed batch']} at their own batch size, "
            f"{counts['refused']} excluded:"
        )
        for reason, count in Counter(reason_to_exclude(outcome.case) for outcome in outcomes).items():
            if reason is not None:
                print(f"  {count:4} {reason}")
    assert counts["failed"] == 0
    assert counts["free batch"] >= 700
    assert counts["free batch"] + counts["fixed batch"] >= 950


@pytest.mark.parametrize(("operator", "twin", "case"), [("Add", "Sub", "test_add"), ("Relu", "Abs", "test_relu")])
def test_a_wrong_twin_fails(operator: str, twin: str, case: str, claimed_cases: list[Any]) -> None:
    """An importer that takes one operator for another must be found out by the same comparison."""
    (found,) = (candidate for candidate in claimed_cases if candidate.name == case)
    other = OPERATORS[max(key for key in OPERATORS if key.op == twin)]
    wrong = {
        key: importer if key.op != operator else lambda op: other(replace(op, kind=twin))
        for key, importer in OPERATORS.items()
    }
    assert run(found).result.endswith("batch")
    assert run(found, Registry(wrong)).result == "failed"


def test_every_version_of_a_claimed_operator_since_opset_9_is_claimed() -> None:
    for operator in OPERATORS.operators():
        reachable = set()
        for opset in OPSETS:
            try:
                schema = defs.get_schema(operator, opset, "")
            except defs.SchemaError:
                continue
            if not schema.deprecated:
                reachable.add(schema.since_version)
        assert {key.since_version for key in OPERATORS if key.op == operator} == reachable, operator
