"""What tests of the ONNX importer share: small models, and their outputs by onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, fx

from lmh.convert.onnx_import import import_onnx
from lmh.errors import SourceError

FLOAT = TensorProto.FLOAT
Shape = Sequence[int | str]


def node(op: str, inputs: str, outputs: str, name: str = "", domain: str = "", **attributes: Any) -> NodeProto:
    return helper.make_node(op, inputs.split(","), outputs.split(","), name=name or None, domain=domain, **attributes)


def values(*shape: int) -> np.ndarray:
    return torch.randn(*shape).numpy()


def whole(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def make(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Shape],
    outputs: str = "y",
    constants: Mapping[str, np.ndarray] | None = None,
    opset: int = 17,
    **options: Any,
) -> ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs.split(",")],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    opsets = options.pop("opsets", [helper.make_opsetid("", opset)])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, **options)
    inferred = {output.name: output for output in onnx.shape_inference.infer_shapes(model).graph.output}
    for output in model.graph.output:
        output.CopyFrom(inferred[output.name])
        output.type.tensor_type.shape.SetInParent()  # the checker wants one, be it unknown
    return model


def by_onnxruntime(model: ModelProto, *inputs: Tensor) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {given.name: x.numpy() for given, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(output) for output in session.run(None, feeds)]


def close(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


def check(model: ModelProto, shape: Sequence[int], batches: Sequence[int] = (1, 3)) -> fx.GraphModule:
    """Compare an imported model with onnxruntime, which runs it image by image, as it was made for one."""
    network = import_onnx(model)
    for batch in batches:
        x = torch.randn(batch, *shape)
        expected = torch.cat([by_onnxruntime(model, image)[0] for image in x.split(1)])
        assert close(network(x), expected)
        assert not close(network(2 * x.roll(1, -1)), expected), "an oracle that cannot fail"
    return network


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(SourceError) as caught:
        import_onnx(source, **options)
    return str(caught.value)
