"""The ONNX importer: its registry of operators, and every refusal."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from lmh.convert import onnx_import
from lmh.convert.onnx_import import OPERATORS, Key, Registry, import_onnx, is_onnx
from lmh.convert.onnx_import.values import Call, Op
from lmh.errors import ArgumentError
from onnx_models import FLOAT, close, make, node, refusal, values, whole


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
        strings.graph.input[0].type.tensor_type.elem_type = 45
        assert "45" in refusal(strings)

    def test_damaged_models(self) -> None:
        model = make([node("Gemm", "x,w", "y", "name")], {"x": (1, 4)}, constants={"w": values(4, 3)})
        damaged = ModelProto.FromString(model.SerializeToString().replace(b"name", b"n\xffme"))
        assert "no UTF-8" in refusal(damaged)
        model.graph.initializer[0].dims[0] = 3
        assert "initializer w has the shape [3, 3] and other data" in refusal(model)
        model.graph.initializer[0].data_type = 63
        assert "63" in refusal(model)

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
