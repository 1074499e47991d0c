"""The ONNX importer: forms of operators against onnxruntime, the free batch, names, and every refusal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx import NodeProto, numpy_helper
from torch import nn

from lmh.convert.onnx_import import import_onnx
from lmh.convert.onnx_import.reshaping import with_free_axes
from onnx_models import by_onnxruntime, check, close, make, node, refusal, values, whole

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
