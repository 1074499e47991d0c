"""Constant folding: nodes that need no input of the network are computed once, by onnx.reference."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from onnx import NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from ...errors import reason_of
from .values import FIXED_BATCH_ADVICE, Constant, Sizes, UnsupportedFormError, Value

CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")
NEVER_FOLDED = frozenset(
    (
        *CONTROL_FLOW,
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Bernoulli",
        "Multinomial",
    )
)


def fold(node: NodeProto, inputs: Sequence[Value | None], opsets: Mapping[str, int]) -> dict[str, Value] | None:
    """Return the outputs of a node whose inputs are known, or None if it must run with the network.

    Args:
        node: the ONNX node.
        inputs: its inputs; None for those left out.
        opsets: the version of each domain.

    Returns:
        By name, constants where the outputs are the same in every trial, sizes where they are not. None as well if
        not even the outputs' shape is the same in every trial, or the reference does not have the operator.

    Raises:
        UnsupportedFormError: if the inputs do not fit the node.
    """
    if node.domain != "" or node.op_type in NEVER_FOLDED:
        return None
    if not all(value is None or isinstance(value, Constant | Sizes) for value in inputs):
        return None
    if node.op_type == "Identity":
        (name,) = node.output
        return {name: _renamed(inputs[0], name)} if inputs[0] is not None else None
    if node.op_type == "Constant" and node.attribute[0].name == "value":
        return {node.output[0]: Constant(numpy_helper.to_array(node.attribute[0].t), node.output[0])}
    evaluator = _evaluator(node, opsets)
    if evaluator is None:
        return None
    count = max((len(value.arrays) for value in inputs if isinstance(value, Sizes)), default=1)
    runs = []
    for trial in range(count):
        try:
            runs.append(_computed(evaluator, node, [_array(value, trial) for value in inputs]))
        except Exception as error:  # the reference raises whatever NumPy does
            reason = reason_of(error)
            if trial:
                raise UnsupportedFormError(
                    f"its constants fit one batch size only, that of the file ({reason}); {FIXED_BATCH_ADVICE}"
                ) from error
            raise UnsupportedFormError(f"it cannot be computed from its constant inputs ({reason})") from error
    source = _trained_source(inputs)
    outputs: dict[str, Value] = {}
    for name, arrays in zip(_named(node.output), zip(*runs, strict=True), strict=True):
        if not all(isinstance(array, np.ndarray | np.generic) for array in arrays):
            return None
        if len({(array.shape, array.dtype) for array in arrays}) > 1:
            return None
        first = np.asarray(arrays[0])
        if all(np.array_equal(array, first) for array in arrays[1:]):
            trainable = source is not None and (first.dtype.kind == "f" or first.dtype.name == "bfloat16")
            outputs[name] = Constant(first, source.name if source is not None else name, trainable)
        else:
            outputs[name] = Sizes(tuple(np.asarray(array) for array in arrays))
    return outputs


def _renamed(value: Value, name: str) -> Value:
    """Return a copy under its own name of a constant that nodes do not share; others as they are."""
    if isinstance(value, Constant) and not value.shared:
        return Constant(value.array, name, value.trainable)
    return value


def _array(value: Value | None, trial: int) -> np.ndarray | None:
    if isinstance(value, Sizes):
        return value.arrays[trial]
    return value.array if isinstance(value, Constant) else None


def _trained_source(inputs: Sequence[Value | None]) -> Constant | None:
    """Return the initializer that a value is made from, if it is one."""
    trained = [value for value in inputs if isinstance(value, Constant) and value.trainable]
    return trained[0] if len(trained) == 1 else None


def _named(names: Iterable[str]) -> list[str]:
    return [name for name in names if name]


def _evaluator(node: NodeProto, opsets: Mapping[str, int]) -> ReferenceEvaluator | None:
    """Return what computes one node, or None if the reference does not have this version of its operator."""
    read, written = list(dict.fromkeys(_named(node.input))), _named(node.output)
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    function = helper.make_function("folding", "once", read, written, [node], imports)
    try:
        return ReferenceEvaluator(function)
    except Exception:  # it raises several kinds, AssertionError among them
        return None


def _computed(
    evaluator: ReferenceEvaluator, node: NodeProto, arrays: Sequence[np.ndarray | None]
) -> Sequence[np.ndarray | None]:
    feeds = {name: array for name, array in zip(node.input, arrays, strict=True) if name}
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return evaluator.run(None, feeds, attributes={})  # type: ignore[return-value]
