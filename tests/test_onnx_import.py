"""The ONNX importer: forms of operators against onnxruntime, the free batch, names, and every refusal."""

from __future__ import annotations

import copy
import doctest
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from lmh.convert import onnx_import
from lmh.convert.onnx_import import OPERATORS, Key, Registry, import_onnx, is_onnx
from lmh.convert.onnx_import.reshaping import with_free_axes
from lmh.convert.onnx_import.values import Call, Op
from lmh.errors import ArgumentError, SourceError

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


FORMS: dict[str, tuple[NodeProto, tuple[int, ...], dict[str, np.ndarray]]] = {
    f"conv {name}": (node("Conv", "x,w,b", "y", **attributes), shape, {"w": values(*weight), "b": values(weight[0])})
    for name, attributes, shape, weight in (
        ("same upper", {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (3, 8, 7), (4, 3, 3, 2)),
        ("same lower", {"auto_pad": "SAME_LOWER"}, (3, 8, 7), (4, 3, 2, 4)),
        ("valid", {"auto_pad": "VALID"}, (3, 8, 7), (4, 3, 3, 3)),
        ("uneven pads", {"pads": [0, 1, 2, 3]}, (3, 8, 7), (4, 3, 3, 3)),
        ("dilated", {"dilations": [2, 3], "pads": [2, 3, 2, 3]}, (3, 9, 9), (4, 3, 3, 3)),
        ("grouped", {"group": 2}, (4, 8, 7), (6, 2, 3, 3)),
        ("depthwise", {"group": 4, "pads": [1, 1, 1, 1]}, (4, 8, 7), (8, 1, 3, 3)),
        ("1d", {"strides": [2], "pads": [1, 2]}, (3, 9), (4, 3, 3)),
        ("3d", {"pads": [1, 1, 1, 1, 1, 1]}, (2, 5, 6, 4), (3, 2, 3, 3, 3)),
    )
}
FORMS |= {
    f"transposed {name}": (
        node("ConvTranspose", "x,w", "y", **attributes),
        (3, 5, 4),
        {"w": values(3, 2, *kernel)},
    )
    for name, attributes, kernel in (
        ("plain", {"strides": [2, 2]}, (3, 3)),
        ("with output padding", {"strides": [2, 3], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}, (3, 4)),
        ("with uneven pads", {"strides": [2, 2], "pads": [0, 1, 1, 0]}, (3, 3)),
        ("with uneven pads that are cut off", {"strides": [1, 1], "pads": [0, 1, 1, 0]}, (3, 3)),
        ("with an output shape", {"strides": [2, 2], "output_shape": [10, 8]}, (3, 3)),
        ("same upper", {"strides": [2, 2], "auto_pad": "SAME_UPPER"}, (3, 3)),
        ("same lower", {"strides": [2, 2], "auto_pad": "SAME_LOWER"}, (3, 3)),
        ("grouped and dilated", {"group": 3, "dilations": [2, 2]}, (3, 2)),
    )
}
FORMS |= {
    f"{op} {name}": (node(op, "x", "y", kernel_shape=[3, 2], **attributes), (2, 8, 7), {})
    for op in ("MaxPool", "AveragePool")
    for name, attributes in (
        ("plain", {"strides": [2, 2]}),
        ("padded", {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("ceil", {"strides": [2, 2], "pads": [1, 0, 1, 0], "ceil_mode": 1}),
        ("uneven", {"strides": [2, 2], "pads": [0, 0, 1, 1]}),
        ("uneven ceil", {"strides": [3, 3], "pads": [0, 0, 1, 1], "ceil_mode": 1}),
        ("same upper", {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
        ("same lower", {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
        *((("counting pads", {"pads": [0, 0, 1, 1], "count_include_pad": 1}),) if op == "AveragePool" else ()),
    )
}
FORMS |= {
    f"gemm {name}": (node("Gemm", "x,w" + ",b" * (bias is not None), "y", **attributes), (4,), constants)
    for name, attributes, weight, bias in (
        ("plain", {}, (4, 3), (3,)),
        ("transB", {"transB": 1}, (3, 4), (3,)),
        ("scaled", {"alpha": 0.5, "beta": 2.0, "transB": 1}, (3, 4), (3,)),
        ("row", {"beta": 0.25}, (4, 3), (1, 3)),
        ("number", {}, (4, 3), (1,)),
        ("without C", {"alpha": 2.0}, (4, 3), None),
    )
    for constants in ({"w": values(*weight), **({} if bias is None else {"b": values(*bias)})},)
}
FORMS |= {
    "batch norm": (
        node("BatchNormalization", "x,w,b,m,v", "y", epsilon=1e-3, momentum=0.8),
        (3, 4, 4),
        {"w": values(3), "b": values(3), "m": values(3), "v": np.abs(values(3))},
    ),
    "instance norm": (node("InstanceNormalization", "x,w,b", "y"), (3, 4, 4), {"w": values(3), "b": values(3)}),
    "prelu per channel": (node("PRelu", "x,w", "y"), (3, 4, 4), {"w": values(3, 1, 1)}),
    "prelu per pixel": (node("PRelu", "x,w", "y"), (3, 4, 4), {"w": values(3, 4, 4)}),
    "slice backwards": (
        node("Slice", "x,s,e,a,t", "y"),
        (6, 5),
        {"s": whole(-1, 0), "e": whole(-100, 3), "a": whole(1, 2), "t": whole(-2, 1)},
    ),
    "gather one": (node("Gather", "x,i", "y", axis=1), (6, 5), {"i": np.array(-2)}),
    "gather several": (node("Gather", "x,i", "y", axis=2), (6, 5), {"i": whole(4, 0, -1)}),
    "gather a run": (node("Gather", "x,i", "y", axis=1), (6, 5), {"i": whole(1, 2, 3)}),
    "reflected": (node("Pad", "x,p", "y", mode="reflect"), (2, 5, 5), {"p": whole(0, 0, 1, 2, 0, 0, 2, 1)}),
    "edge": (node("Pad", "x,p", "y", mode="edge"), (2, 5, 5), {"p": whole(0, 0, 1, 2, 0, 0, 2, 1)}),
    "pad channels": (
        node("Pad", "x,p,v", "y"),
        (2, 5, 5),
        {"p": whole(0, 1, 0, 0, 0, 1, 0, 0), "v": np.float32(3).reshape(())},
    ),
    "upsampled": (
        node("Resize", "x,,s", "y", mode="linear", coordinate_transformation_mode="half_pixel"),
        (2, 4, 5),
        {"s": np.array([1, 1, 2, 2], dtype=np.float32)},
    ),
    "matmul": (node("MatMul", "x,w", "y"), (5, 4), {"w": values(4, 3)}),
    "matmul from the left": (node("MatMul", "w,x", "y"), (5, 4), {"w": values(3, 5)}),
    "one minus": (node("Sub", "c,x", "y"), (3,), {"c": np.ones((), dtype=np.float32)}),
    "quotient": (node("Div", "c,x", "y"), (3,), {"c": values(3)}),
    "softmax": (node("Softmax", "x", "y", axis=1), (3, 4), {}),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_equal_onnxruntime_at_other_batch_sizes(name: str) -> None:
    operator, shape, constants = FORMS[name]
    constants = {key: array for key, array in constants.items() if key in operator.input}
    check(make([operator], {"x": (1, *shape)}, constants=constants), shape)


@pytest.mark.parametrize(
    ("nodes", "constants", "opset"),
    [
        ([node("Clip", "x", "y", min=-0.5, max=0.5)], {}, 9),
        ([node("Pad", "x", "y", pads=[0, 0, 1, 1, 0, 0, 2, 0], value=1.0)], {}, 9),
        ([node("Slice", "x", "y", starts=[1, -2], ends=[9223372036854775807, 4], axes=[1, 3])], {}, 9),
        ([node("Split", "x", "a,b", axis=1, split=[1, 2]), node("Concat", "b,a", "y", axis=1)], {}, 9),
        ([node("ReduceMean", "x", "y", axes=[2, 3], keepdims=0)], {}, 9),
        ([node("Unsqueeze", "x", "a", axes=[1]), node("Squeeze", "a", "y", axes=[1])], {}, 9),
        ([node("Dropout", "x", "y", ratio=0.3)], {}, 9),
        ([node("Upsample", "x,s", "y", mode="nearest")], {"s": np.array([1, 1, 2, 2], dtype=np.float32)}, 9),
        ([node("Softmax", "x", "y", axis=1)], {}, 9),
        ([node("LogSoftmax", "x", "y", axis=2)], {}, 11),
        ([node("BatchNormalization", "x,w,w,w,w", "y")], {"w": np.abs(values(3))}, 9),
        ([node("ReduceMean", "x,a", "y", keepdims=1)], {"a": whole(-1, -2)}, 18),
        ([node("Split", "x", "a,b", axis=1, num_outputs=2), node("Concat", "b,a", "y", axis=1)], {}, 18),
    ],
)  # fmt: skip
def test_attributes_that_became_inputs(nodes: list[NodeProto], constants: dict[str, np.ndarray], opset: int) -> None:
    network = import_onnx(make(nodes, {"x": (1, 3, 4, 5)}, constants=constants, opset=opset))
    x = torch.randn(3, 3, 4, 5)
    expected = [
        by_onnxruntime(make(nodes, {"x": (1, 3, 4, 5)}, constants=constants, opset=opset), i)[0] for i in x.split(1)
    ]
    assert close(network(x), torch.cat(expected))


@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [(0.0, None, nn.ReLU), (0.0, 6.0, nn.ReLU6), (-1.0, 2.0, nn.Hardtanh), (0.0, np.inf, nn.ReLU)],
)
def test_clip_becomes_the_activation_it_is(low: float, high: float | None, kind: type[nn.Module]) -> None:
    constants = {"l": np.float32(low).reshape(()), **({} if high is None else {"h": np.float32(high).reshape(())})}
    model = make([node("Clip", "x,l" + ",h" * (high is not None), "y", "act")], {"x": (1, 5)}, constants=constants)
    assert type(import_onnx(model).get_submodule("act")) is kind


def test_limits_in_two_steps_become_one_activation() -> None:
    nodes = [node("Max", "x,l", "a", "low"), node("Min", "a,h", "y", "high")]
    constants = {"l": np.zeros((), np.float32), "h": np.full((), 6, np.float32)}
    assert [type(m) for m in check(make(nodes, {"x": (1, 40)}, constants=constants), (40,)).children()] == [nn.ReLU6]


@pytest.mark.parametrize(
    ("op", "attributes", "size", "ceil"),
    [
        ("MaxPool", {"auto_pad": "SAME_UPPER"}, 8, True),
        ("MaxPool", {"pads": [0, 0, 1, 1]}, 8, True),
        ("MaxPool", {"pads": [0, 0, 1, 1]}, 9, False),
        ("AveragePool", {"auto_pad": "SAME_UPPER"}, 8, True),
    ],
)
def test_a_pool_padded_at_its_end_needs_no_pad_of_its_own(
    op: str, attributes: dict[str, Any], size: int, ceil: bool
) -> None:
    model = make(
        [node(op, "x", "y", "pool", kernel_shape=[3, 3], strides=[2, 2], **attributes)], {"x": (1, 2, size, size)}
    )
    network = check(model, (2, size, size))
    assert [n.op for n in network.graph.nodes] == ["placeholder", "call_module", "output"]
    assert network.pool.ceil_mode is ceil


@pytest.mark.parametrize("flipped", [False, True])
def test_a_product_and_a_bias_become_a_linear_layer(flipped: bool) -> None:
    nodes = [node("MatMul", "x,fc.weight", "a"), node("Add", "b,a" if flipped else "a,b", "y")]
    network = check(make(nodes, {"x": (1, 5, 4)}, constants={"fc.weight": values(4, 3), "b": values(3)}), (5, 4))
    assert repr(network.fc) == "Linear(in_features=4, out_features=3, bias=True)"
    assert [name for name, _ in network.named_parameters()] == ["fc.weight", "fc.bias"]


def test_a_bias_that_something_else_reads_before_is_left_alone() -> None:
    nodes = [node("MatMul", "x,w", "a"), node("Add", "a,b", "c"), node("Add", "a,c", "y")]
    network = check(make(nodes, {"x": (1, 4)}, constants={"w": values(4, 3), "b": values(3)}), (4,))
    assert next(m for m in network.modules() if isinstance(m, nn.Linear)).bias is None


class TestBatch:
    @pytest.mark.parametrize(
        ("shape", "target", "expected"),
        [
            ((1, 8, 2, 2), [1, -1], (3, 32)),
            ((1, 8, 2, 2), [1, 32], (3, 32)),
            ((1, 8, 2, 2), [-1, 32], (3, 32)),
            ((1, 8, 2, 2), [0, -1], (3, 32)),
            ((1, 8, 2, 2), [1, 2, 4, 2, 2], (3, 2, 4, 2, 2)),
            ((1, 8, 2, 2), [1, 8, -1], (3, 8, 4)),
            ((1, 8, 2, 2), [8, 4], (24, 4)),
            ((2, 4), [2, 2, 2], (6, 2, 2)),
        ],
    )
    def test_a_batch_size_in_a_reshape_is_made_free(
        self, shape: tuple[int, ...], target: list[int], expected: tuple[int, ...]
    ) -> None:
        model = make([node("Reshape", "x,t", "y")], {"x": shape}, constants={"t": whole(*target)})
        x = torch.randn(3 * shape[0], *shape[1:])
        got = import_onnx(model)(x)
        assert tuple(got.shape) == expected
        assert torch.equal(got.flatten(), x.flatten())

    def test_axes_are_found_behind_the_same_number_of_elements(self) -> None:
        assert with_free_axes([49, (1, 2, 3), 16], [49, 1, 4, 4]) == [49, (1, 2, 3), 4, 4]
        assert with_free_axes([4, 5], [20]) == [20]

    def test_shapes_computed_in_the_file_follow_the_batch(self) -> None:
        nodes = [
            node("Shape", "x", "shape"),
            node("Gather", "shape,zero", "n"),
            node("Unsqueeze", "n,axis", "n1"),
            node("Concat", "n1,rest", "target", axis=0),
            node("Reshape", "x,target", "a"),
            node("Mul", "n1,two", "n2"),
            node("Concat", "n2,rest2", "target2", axis=0),
            node("Reshape", "a,target2", "b"),
            node("Concat", "n1,rest3", "target3", axis=0),
            node("ConstantOfShape", "target3", "ones", value=numpy_helper.from_array(np.ones(1, np.float32))),
            node("Reshape", "b,target", "c"),
            node("Concat", "c,ones", "y", axis=1),
        ]
        constants = {
            "zero": np.array(0), "axis": whole(0), "rest": whole(-1), "two": whole(2), "rest2": whole(-1),
            "rest3": whole(2),
        }  # fmt: skip
        network = check(make(nodes, {"x": (1, 2, 4)}, constants=constants), (2, 4))
        assert "size" in {str(n.target) for n in network.graph.nodes}
        assert network.to("meta")(torch.empty(5, 2, 4, device="meta")).shape == (5, 10)

    def test_a_constant_row_is_repeated_for_the_batch_it_is_joined_to(self) -> None:
        check(make([node("Concat", "c,x", "y", axis=1)], {"x": (1, 3, 4)}, constants={"c": values(1, 1, 4)}), (3, 4))

    def test_an_expanded_batch_is_free(self) -> None:
        nodes = [node("ReduceMean", "x", "m", axes=[1], keepdims=1), node("Expand", "m,s", "y")]
        check(make(nodes, {"x": (1, 3)}, constants={"s": whole(1, 4)}), (3,))

    def test_squeeze_without_axes_keeps_the_batch(self) -> None:
        network = import_onnx(make([node("Squeeze", "x", "y")], {"x": (1, 3, 1, 1)}))
        assert network(torch.randn(1, 3, 1, 1)).shape == (1, 3)

    def test_a_constant_with_rows_for_one_batch_size_is_refused_unless_asked_for(self) -> None:
        model = make([node("Add", "x,c", "y", "offset")], {"x": (2, 3)}, constants={"c": values(2, 3)})
        text = refusal(model)
        assert "offset (Add): it fits one batch size only" in text
        assert "fixed_batch=True" in text
        x = torch.randn(2, 3)
        assert close(import_onnx(model, fixed_batch=True)(x), by_onnxruntime(model, x)[0])

    def test_places_picked_from_the_batch_are_refused(self) -> None:
        nodes = [node("Reshape", "x,t", "a"), node("Gather", "a,i", "y", "as_strided")]
        constants = {"t": whole(-1), "i": np.arange(8).reshape(1, 8)}
        text = refusal(make(nodes, {"x": (1, 8)}, constants=constants))
        assert "as_strided (Gather): it takes 8 fixed places from the batch" in text
        assert "takes 1 fixed places" in refusal(
            make([node("Slice", "x,s,e", "y")], {"x": (1, 8)}, constants={"s": whole(0), "e": whole(1)})
        )

    def test_an_output_that_has_lost_the_batch_is_refused(self) -> None:
        nodes = [node("ReduceSum", "x", "s", "total", keepdims=0), node("Expand", "s,t", "y")]
        text = refusal(make(nodes, {"x": (1, 8)}, constants={"t": whole(1, 8)}))
        assert "output y: has 1 rows whatever the batch size is, fixed at total (ReduceSum)" in text

    def test_open_sizes_are_resized_as_they_come(self) -> None:
        nodes = [
            node("Shape", "x", "s"), node("Slice", "s,two,four", "hw"), node("Mul", "hw,three", "hw3"),
            node("Slice", "s,zero,two", "nc"), node("Concat", "nc,hw3", "t", axis=0),
            node("Resize", "x,,,t", "a", mode="linear", coordinate_transformation_mode="half_pixel"),
            node("Resize", "a,,f", "y", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
        ]  # fmt: skip
        constants = {"zero": whole(0), "two": whole(2), "four": whole(4), "three": whole(3)}
        constants["f"] = np.array([1, 1, 2, 2], np.float32)
        model = make(nodes, {"x": ("n", 2, "h", "w")}, constants=constants)
        network = import_onnx(model)
        for shape in ((1, 2, 3, 4), (3, 2, 5, 2)):
            x = torch.randn(*shape)
            assert close(network(x), by_onnxruntime(model, x)[0])

    def test_several_inputs_share_the_batch(self) -> None:
        model = make([node("Add", "a,b", "y"), node("Mul", "a,b", "z")], {"a": (1, 3), "b": (1, 3)}, "y,z")
        a, b = torch.randn(4, 3), torch.randn(4, 3)
        got = import_onnx(model)(a, b)
        assert isinstance(got, tuple)
        assert torch.equal(got[0], a + b)
        assert torch.equal(got[1], a * b)

    def test_a_named_batch_axis_is_followed_wherever_it_is_named(self) -> None:
        model = make([node("Concat", "a,b", "y", axis=0)], {"a": ("n", 3), "b": ("n", 3)})
        assert import_onnx(model)(torch.randn(4, 3), torch.randn(4, 3)).shape == (8, 3)


class TestWeights:
    def shared(self, array: np.ndarray) -> fx.GraphModule:
        nodes = [node("Conv", "x,w", "a", "one"), node("Relu", "a", "b"), node("Conv", "b,w", "y", "two")]
        return check(make(nodes, {"x": (1, 2, 5, 5)}, constants={"w": array}), (2, 5, 5))

    def test_an_initializer_that_two_nodes_read_is_one_parameter(self) -> None:
        network = self.shared(values(2, 2, 1, 1))
        assert network.one.weight is network.two.weight
        assert len(list(network.parameters())) == 1
        assert copy.deepcopy(network).one.weight is not network.one.weight

    def test_equal_elements_are_not_shared_as_exporters_merge_them(self) -> None:
        network = self.shared(np.ones((2, 2, 1, 1), np.float32))
        assert network.one.weight is not network.two.weight

    @pytest.mark.parametrize("wrapper", [node("Identity", "stored", "b"), node("Dropout", "stored", "b")])
    def test_a_bias_behind_another_node_is_found(self, wrapper: NodeProto) -> None:
        nodes = [wrapper, node("Conv", "x,w,b", "y", "conv")]
        network = check(
            make(nodes, {"x": (1, 2, 5, 5)}, constants={"w": values(3, 2, 3, 3), "stored": values(3)}), (2, 5, 5)
        )
        assert isinstance(network.conv.bias, nn.Parameter)

    def test_weights_that_the_file_transposes_are_parameters(self) -> None:
        nodes = [node("Transpose", "fc.weight", "t", perm=[1, 0]), node("MatMul", "x,t", "y")]
        network = check(make(nodes, {"x": (1, 4)}, constants={"fc.weight": values(3, 4)}), (4,))
        assert [name for name, _ in network.named_parameters()] == ["fc.weight"]

    def test_a_free_initializer_is_a_parameter_and_a_constant_is_not(self) -> None:
        scale, shift = values(3), numpy_helper.from_array(values(3))
        nodes = [node("Constant", "", "k", value=shift), node("Mul", "x,layer.scale", "a"), node("Add", "a,k", "y")]
        nodes[0].ClearField("input")
        network = check(make(nodes, {"x": (1, 3)}, constants={"layer.scale": scale}), (3,))
        assert [name for name, _ in network.named_parameters()] == ["layer.scale"]
        assert [name for name, _ in network.named_buffers()] == ["k"]

    def test_a_learned_number_is_a_parameter_and_an_exporters_is_not(self) -> None:
        nodes = [node("Mul", "x,block.alpha", "a"), node("Add", "a,val_3", "y")]
        network = check(make(nodes, {"x": (1, 3)}, constants={"block.alpha": values(1), "val_3": values(1)}), (3,))
        assert [name for name, _ in network.named_parameters()] == ["block.alpha"]

    def test_initializers_that_are_inputs_too_are_weights(self) -> None:
        model = make([node("Gemm", "x,w", "y")], {"x": (1, 4), "w": (4, 3)}, constants={"w": values(4, 3)})
        assert len(import_onnx(model).graph.find_nodes(op="placeholder")) == 1

    def test_external_data_is_read(self, tmp_path: Path) -> None:
        model = make([node("Gemm", "x,w", "y")], {"x": (1, 40)}, constants={"w": values(40, 30)})
        x = torch.randn(3, 40)
        expected = import_onnx(model)(x)
        onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
        assert torch.equal(import_onnx(tmp_path / "m.onnx")(x), expected)
        assert torch.equal(import_onnx(str(tmp_path / "m.onnx"))(x), expected)
        assert "pass the path" in refusal(onnx.load(tmp_path / "m.onnx", load_external_data=False)).lower()
        (tmp_path / "m.data").unlink()
        assert "not a valid ONNX model" in refusal(tmp_path / "m.onnx")

    def test_half_precision_is_kept(self) -> None:
        model = make([node("Gemm", "x,w", "y")], {"x": (1, 4)}, constants={"w": values(4, 3).astype(np.float16)})
        model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
        assert import_onnx(model)(torch.randn(2, 4, dtype=torch.float16)).dtype == torch.float16


class TestNames:
    @pytest.mark.parametrize(
        ("node_name", "weight", "path"),
        [
            ("/layer1/layer1.0/conv1/Conv", "onnx::Conv_193", "layer1.0.conv1"),
            ("/features/features.0/Conv", "layer1.0.conv1.weight", "layer1.0.conv1"),
            ("Conv_12", "w", "conv_12"),
            ("", "w", "conv"),
            ("model/block 1/Conv2D:0", "w", "model.block_1.Conv2D_0"),
            ("/forward/train/Conv", "w", "forward_.train_"),
        ],
    )
    def test_module_paths_come_from_the_file(self, node_name: str, weight: str, path: str) -> None:
        model = make(
            [node("Conv", f"x,{weight}", "y", node_name)], {"x": (1, 2, 5, 5)}, constants={weight: values(3, 2, 1, 1)}
        )
        assert isinstance(import_onnx(model).get_submodule(path), nn.Conv2d)

    def test_notes_of_the_newer_exporter_name_modules(self) -> None:
        relu = node("Relu", "x", "y", "node_relu")
        entry = relu.metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.name_scopes", "['', 'layer1', 'layer1.0', 'layer1.0.act', 'relu']"
        assert isinstance(import_onnx(make([relu], {"x": (1, 3)})).layer1.get_submodule("0.act"), nn.ReLU)
        entry.value = "not a list ("
        assert isinstance(import_onnx(make([relu], {"x": (1, 3)})).node_relu, nn.ReLU)

    def test_names_are_unique_and_never_inside_a_layer(self) -> None:
        names = ("a", "a", "a/b", "c.d", "c")
        nodes = [node("Relu", f"x{i}", f"x{i + 1}", name) for i, name in enumerate(names)]
        network = import_onnx(make(nodes, {"x0": (1, 3)}, "x5"))
        relus = [name for name, module in network.named_modules() if isinstance(module, nn.ReLU)]
        assert len(relus) == 5
        assert not any(other.startswith(f"{name}.") for name in relus for other in relus)

    def test_inputs_get_valid_names(self) -> None:
        model = make([node("Add", "input.1,lambda", "y")], {"input.1": (1, 3), "lambda": (1, 3)})
        assert import_onnx(model)(torch.ones(2, 3), torch.ones(2, 3)).sum() == 12

    def test_the_default_domain_has_two_spellings(self) -> None:
        alias = make(
            [node("Relu", "x", "y", domain="ai.onnx")], {"x": (1, 3)}, opsets=[helper.make_opsetid("ai.onnx", 13)]
        )
        assert [type(module) for module in import_onnx(alias).children()] == [nn.ReLU]

    def test_functions_in_the_file_are_written_out(self) -> None:
        body = helper.make_function(
            "mine", "Twice", ["a"], ["c"], [node("Add", "a,a", "c")], [helper.make_opsetid("", 17)]
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
        model = make([node("Twice", "x", "y", domain="mine")], {"x": (1, 3)}, opsets=opsets, functions=[body])
        x = torch.randn(2, 3)
        assert torch.equal(import_onnx(model)(x), 2 * x)


class TestRegistry:
    def test_two_functions_for_one_key_are_refused(self) -> None:
        registry = Registry()
        registry.operator("Relu", since=(6,))(lambda op: op.value(0))
        with pytest.raises(ArgumentError, match="entered already"):
            registry.operator("Relu", since=(6,))(lambda op: op.value(0))
        with pytest.raises(ArgumentError, match="entered already"):
            Registry(OPERATORS, OPERATORS)

    def test_a_missing_operator_can_be_added(self) -> None:
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 3)]
        model = make([node("Half", "x", "y", domain="mine")], {"x": (1, 3)}, opsets=opsets)
        assert "no importer for mine.Half: y." in refusal(model)
        mine = Registry()

        @mine.operator("Half", since=(1,), domain="mine")
        def half(op: Op) -> Call:
            return Call(torch.mul, (op.value(0), 0.5))

        x = torch.randn(2, 3)
        assert torch.equal(import_onnx(model, operators=Registry(OPERATORS, mine))(x), x / 2)

    def test_keys_say_what_they_are(self) -> None:
        assert Key("", "Conv", 11) in OPERATORS
        assert len(OPERATORS.operators()) >= 115

    def test_the_examples_in_the_docstrings_run(self) -> None:
        names = [f"{onnx_import.__name__}.{found.name}" for found in pkgutil.iter_modules(onnx_import.__path__)]
        results = [doctest.testmod(importlib.import_module(name)) for name in (onnx_import.__name__, *names)]
        assert sum(result.failed for result in results) == 0
        assert sum(result.attempted for result in results) >= 10


class TestRefusals:
    def test_all_unsupported_operators_are_listed_at_once(self) -> None:
        nodes = [
            node("Det", "x", "a", "first"),
            node("Foo", "a", "b", "second", domain="com.microsoft"),
            node("Relu", "b", "c"),
            node("Det", "c", "d", "third"),
            node("BatchNormalization", "x,o,o,o,o", "e,m,v", "norm", training_mode=1),
            node("Add", "d,e", "y"),
            node("GRU", "x", "unused", "dead", hidden_size=2),
        ]
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        nodes[-1].input.extend(["o", "o"])
        text = refusal(make(nodes, {"x": (1, 1, 2, 2)}, constants={"o": np.ones(1, np.float32)}, opsets=opsets))
        assert "the ONNX model: 3 things in it cannot be imported" in text
        assert "no importer for Det: first, third." in text
        assert "no importer for com.microsoft.Foo: second." in text
        assert "norm (BatchNormalization): it has training_mode 1; expected 0. Export the model in eval mode." in text
        assert "add a function for the operator" in text
        assert "GRU" not in text

    def test_control_flow_is_refused(self) -> None:
        branch = helper.make_graph([node("Relu", "x", "z")], "b", [], [helper.make_tensor_value_info("z", FLOAT, None)])
        model = make(
            [node("If", "c", "y", "choice", then_branch=branch, else_branch=branch)],
            {"x": (1, 3)},
            constants={"c": np.array(True)},
        )
        text = refusal(model)
        assert "no importer for If: choice." in text
        assert "control flow: export it for one fixed sequence" in text

    def test_quantised_models_are_refused(self) -> None:
        nodes = [node("QuantizeLinear", "x,s,z", "q"), node("DequantizeLinear", "q,s,z", "y")]
        text = refusal(
            make(nodes, {"x": (1, 3)}, constants={"s": np.ones((), np.float32), "z": np.zeros((), np.uint8)})
        )
        assert "QuantizeLinear: q." in text
        assert "DequantizeLinear: y." in text
        assert "quantised: export it before quantisation" in text

    def test_quantised_weights_alone_are_read_as_floats(self) -> None:
        nodes = [node("DequantizeLinear", "q,s", "w"), node("MatMul", "x,w", "y")]
        q = np.arange(-6, 6, dtype=np.int8).reshape(4, 3)
        constants = {"s": np.full((), 0.25, np.float32), "q": q}
        x = torch.randn(3, 4)
        network = import_onnx(make(nodes, {"x": (1, 4)}, constants=constants, opset=21))
        assert close(network(x), x @ torch.from_numpy(q * np.float32(0.25)))
        assert "no importer for DequantizeLinear" in refusal(make(nodes, {"x": (1, 4)}, constants=constants, opset=13))

    @pytest.mark.parametrize(
        ("name", "content", "says"),
        [
            ("text.onnx", b"ir_version: 8\n", "is not an ONNX model"),
            ("empty.onnx", b"", "is not an ONNX model"),
            ("zip.onnx", b"PK\x03\x04" + bytes(60), "is not an ONNX model"),
            ("noise.onnx", bytes(range(256)), "is not an ONNX model"),
            ("only_a_version.onnx", b"\x08\x08", "is not an ONNX model"),
            ("empty_graph.onnx", b"\x08\x08\x3a\x00\x42\x04\x0a\x00\x10\x11", "is not a valid ONNX model"),
        ],
    )
    def test_what_is_no_onnx_file(self, name: str, content: bytes, says: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(content)
        text = refusal(tmp_path / name)
        assert f"{tmp_path / name}: {says}" in text
        assert "xport it again" in text

    def test_missing_files_and_folders(self, tmp_path: Path) -> None:
        assert "no such file" in refusal(tmp_path / "m.onnx")
        assert "is a folder" in refusal(tmp_path)

    def test_a_truncated_file(self, tmp_path: Path) -> None:
        model = make([node("Gemm", "x,w", "y")], {"x": (1, 4)}, constants={"w": values(4, 3)})
        whole_file = model.SerializeToString()
        for length in range(1, len(whole_file)):
            (tmp_path / "m.onnx").write_bytes(whole_file[:length])
            refusal(tmp_path / "m.onnx")

    def test_files_are_told_by_their_content(self, tmp_path: Path) -> None:
        onnx.save(make([node("Relu", "x", "y")], {"x": (1, 3)}), tmp_path / "model.pt")
        torch.save({"x": torch.zeros(3)}, tmp_path / "state.onnx")
        assert is_onnx(tmp_path / "model.pt")
        assert not is_onnx(tmp_path / "state.onnx")
        assert not is_onnx(tmp_path / "missing")

    def test_invalid_models(self) -> None:
        unsorted = make([node("Relu", "a", "y"), node("Relu", "x", "a")], {"x": (1, 3)})
        assert "is not a valid ONNX model" in refusal(unsorted)
        unknown = make([node("NoSuchOperator", "x", "y")], {"x": (1, 3)})
        assert "NoSuchOperator" in refusal(unknown)

    @pytest.mark.parametrize("opset", [8, 999])
    def test_opsets_out_of_range(self, opset: int) -> None:
        text = refusal(make([node("Relu", "x", "y")], {"x": (1, 3)}, opset=opset))
        assert f"has opset {opset}; expected 9 to {onnx.defs.onnx_opset_version()}" in text
        assert "version_converter" in text

    def test_inputs_that_are_no_tensors_of_known_rank(self) -> None:
        model = make([node("Relu", "x", "y")], {"x": (1, 3)})
        model.graph.input[0].type.tensor_type.ClearField("shape")
        assert "is not a valid ONNX model (Field 'shape' of 'type' is required" in refusal(model)
        strings = make([node("Identity", "x", "y")], {"x": (1, 3)})
        strings.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
        assert "input x is a tensor of STRING; expected a tensor of numbers" in refusal(strings)

    def test_damaged_models(self) -> None:
        model = make([node("Gemm", "x,w", "y", "name")], {"x": (1, 4)}, constants={"w": values(4, 3)})
        damaged = ModelProto.FromString(model.SerializeToString().replace(b"name", b"n\xffme"))
        assert "no UTF-8" in refusal(damaged)
        model.graph.initializer[0].dims[0] = 3
        assert "initializer w has the shape [3, 3] and other data" in refusal(model)

    def test_attributes_that_contradict_the_inputs(self) -> None:
        nodes = [node("MaxPool", "x", "y", "pool", kernel_shape=[2, 2], pads=[1, 1])]
        assert "pool (MaxPool): its attributes and inputs do not fit together" in refusal(
            make(nodes, {"x": (1, 2, 4, 4)})
        )

    def test_sparse_initializers(self) -> None:
        model = make([node("MatMul", "x,w", "y")], {"x": (1, 4)})
        sparse = model.graph.sparse_initializer.add()
        sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "w"))
        sparse.indices.CopyFrom(numpy_helper.from_array(whole(0)))
        sparse.dims.extend([4, 3])
        assert "has sparse initializers (w" in refusal(model)

    @pytest.mark.parametrize(
        ("operator", "constants", "says"),
        [
            (node("Conv", "x,x", "y", "n"), {}, "n (Conv): its input 1 is computed from the network's input"),
            (node("Conv", "x,w", "y", "n"), {"w": values(3, 5, 1, 1)}, "torch cannot run it on [[1, 2, 4, 4]]"),
            (node("MaxPool", "x", "y,i", "n", kernel_shape=[2, 2]), {}, "n (MaxPool): its output 1 is read"),
            (node("AveragePool", "x", "y", "n", kernel_shape=[2, 2], dilations=[2, 2]), {}, "no dilated mean pool"),
            (node("Dropout", "x,,t", "y", "n"), {"t": np.array(True)}, "training_mode true"),
            (node("Shrink", "x", "y", "n", bias=0.1), {}, "bias 0.1"),
            (node("LRN", "x", "y", "n", size=4), {}, "size 4; expected an odd one"),
            (node("Cast", "x", "y", "n", to=TensorProto.UINT64), {}, "casts to the ONNX type number 13"),
            (node("Softmax", "x", "y", "n", axis=7), {}, "axis 7 came"),
            (node("Reshape", "x,w", "y", "n"), {"w": whole(3, 5)}, "n (Reshape): torch cannot run it"),
        ],
    )  # fmt: skip
    def test_forms_that_torch_does_not_have(
        self, operator: NodeProto, constants: dict[str, np.ndarray], says: str
    ) -> None:
        outputs = ",".join(operator.output)
        opset = 22 if operator.op_type == "AveragePool" else 17
        assert says in refusal(make([operator], {"x": (1, 2, 4, 4)}, outputs, constants, opset))

    def test_constants_that_do_not_fit_together(self) -> None:
        nodes = [node("Add", "a,b", "c", "sum"), node("Add", "x,c", "y")]
        text = refusal(make(nodes, {"x": (1, 3)}, constants={"a": values(2), "b": values(3)}))
        assert "sum (Add): it cannot be computed from its constant inputs" in text
