"""The ONNX importer: which constants are weights, and the names of modules and inputs."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import fx, nn

from lmh.convert.onnx_import import import_onnx
from onnx_models import check, make, node, refusal, values


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
        assert "Copy m.data beside it." in refusal(tmp_path / "m.onnx")

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
