"""Several outputs: the structure that forward returns comes back as it is, each tensor in it reduced over time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lmh import carry_state, evaluate, per_step, prefixes, sites
from lmh.calibrate import BatchNormStatistics, Max
from lmh.convert import convert, deploy, load, prepare, save
from lmh.convert.export import Project, export_nir, export_onnx, export_pt2
from lmh.errors import ArgumentError, ArtifactError, AuditError
from lmh.evaluation import Evaluation
from lmh.finetune import finetune
from lmh.structures import leaves_of, tensors_of
from lmh.torchvision_shim import torchvision


class Heads(NamedTuple):
    logits: Any
    extra: Any


@dataclass
class Boxes:
    scores: Any
    count: Any


@dataclass
class ModelOutput(OrderedDict[str, Any]):
    """A dict by key and by attribute, such as some libraries return; it leaves out what is None."""

    logits: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        self.update({key: value for key, value in vars(self).items() if value is not None})


class Everything(nn.Module):
    """Returns whatever ``pack`` makes of a timed, a tail, a readout and a constant tensor."""

    def __init__(self, pack: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.pack = pack
        self.anchors: Tensor
        self.register_buffer("anchors", torch.arange(3.0))

    def forward(self, x: Tensor) -> Any:
        stem = self.a(x)
        hidden = torch.relu(stem)
        out = self.c(torch.relu(self.b(hidden)))
        return self.pack(x=x, stem=stem, hidden=hidden, out=out, anchors=self.anchors)


def everything(pack: Callable[..., Any]) -> tuple[nn.Module, nn.Module, Tensor]:
    ann, x = Everything(pack).eval(), torch.rand(16, 4)
    return ann, convert(ann, 64, data=x, calibration=Max()).snn, x


PACKS: dict[str, Callable[..., Any]] = {
    "tensor": lambda *, out, **_: out,
    "tuple": lambda *, out, hidden, **_: (out, hidden),
    "list": lambda *, out, hidden, **_: [out, hidden],
    "dict": lambda *, out, hidden, **_: {"out": out, "hidden": hidden},
    "ordered dict": lambda *, out, hidden, **_: OrderedDict(out=out, hidden=hidden),
    "named tuple": lambda *, out, **_: Heads(out, None),
    "dataclass": lambda *, out, hidden, **_: Boxes(out, {"hidden": hidden, "n": 3}),
    "a dict by attribute": lambda *, out, **_: ModelOutput(logits=out),
    "nested": lambda *, out, hidden, **_: {"heads": Heads([out, hidden], (out, None, 2.5)), "last": OrderedDict(a=out)},
    "softmax beside its logits": lambda *, out, **_: {"logits": out, "probabilities": torch.softmax(out, 1)},
    "chunks": lambda *, out, hidden, **_: {"parts": torch.chunk(hidden, 2, 1), "out": torch.split(out, 1, 1)},
}


def shape_of(value: Any) -> Any:
    """The types of the containers, and None, numbers or shapes in them."""
    if isinstance(value, Tensor):
        return list(value.shape)
    if isinstance(value, dict):
        return type(value), {key: shape_of(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value), [shape_of(item) for item in value]
    if isinstance(value, Boxes):
        return Boxes, shape_of(value.scores), shape_of(value.count)
    return value


class TestOutputs:
    @pytest.mark.parametrize("name", PACKS)
    def test_the_structure_comes_back(self, name: str) -> None:
        ann, snn, x = everything(PACKS[name])
        expected, got = ann(x), snn(x)
        assert shape_of(got) == shape_of(expected)
        for wanted, found in zip(tensors_of(expected), tensors_of(got), strict=True):
            assert float((found - wanted).detach().abs().max()) < 0.05

    @pytest.mark.parametrize("name", PACKS)
    def test_a_network_deployed_in_bfloat16_returns_what_it_did(self, name: str) -> None:
        _, snn, x = everything(PACKS[name])
        expected, got = snn(x), deploy(snn, dtype=torch.bfloat16)(x)
        assert shape_of(got) == shape_of(expected)
        for wanted, found in zip(tensors_of(expected), tensors_of(got), strict=True):
            assert found.dtype == wanted.dtype
            assert float((found - wanted).detach().abs().max()) < 0.05

    @pytest.mark.parametrize("name", PACKS)
    def test_every_step_and_every_prefix_of_each_tensor(self, name: str) -> None:
        _, snn, x = everything(PACKS[name])
        snn, x = snn.double(), x.double()
        whole, steps, means = snn(x), per_step(snn, x), prefixes(snn, x)
        assert type(steps) is type(whole)
        soft = name.startswith("softmax")
        for mean, every, until in zip(*(tensors_of(value) for value in (whole, steps, means)), strict=True):
            assert every.shape == until.shape == (64, *mean.shape)
            assert torch.allclose(until[-1], mean, atol=1e-12)
            if not soft:  # the softmax of a mean is not the mean of the softmax
                assert torch.allclose(every.mean(0), mean, atol=1e-12)
        rest = [[leaf for leaf in leaves_of(value) if not isinstance(leaf, Tensor)] for value in (whole, steps, means)]
        assert rest[0] == rest[1] == rest[2]

    @pytest.mark.parametrize("training", [False, True])
    def test_what_no_neuron_reaches_is_returned_as_it_is(self, training: bool) -> None:
        ann, snn, x = everything(
            lambda *, x, stem, out, anchors, **_: {
                "x": x,
                "stem": stem,
                "halves": torch.chunk(stem, 2, 1),
                "anchors": anchors,
                "n": x.shape[0],
                "out": out,
            }
        )
        snn.train(training)
        expected, got, steps = ann(x), snn(x), per_step(snn, x, steps=3)
        for key in ("x", "stem", "anchors"):
            assert torch.equal(got[key], expected[key])
        assert torch.equal(got["halves"][1], expected["halves"][1])
        assert got["n"] == steps["n"] == 16
        assert torch.equal(steps["stem"], expected["stem"].expand(3, 16, 8))
        assert steps["halves"][0].shape == (3, 16, 4)
        assert torch.equal(steps["anchors"], ann.anchors)
        assert steps["out"].shape == (3, 16, 3)

    def test_a_dict_by_attribute_keeps_its_attributes(self) -> None:
        _, snn, x = everything(PACKS["a dict by attribute"])
        got = snn(x)
        assert isinstance(got, ModelOutput)
        assert got.logits is got["logits"]
        assert got.hidden is None

    def test_each_output_has_its_own_tail(self) -> None:
        """The deeper head runs on the mean though the hidden layer is read in time, too."""
        _, snn, x = everything(PACKS["dict"])
        seen: dict[str, int] = {}
        for path in ("b", "c"):
            layer = snn.get_submodule(path)
            layer.register_forward_hook(lambda _m, args, _o, path=path: seen.__setitem__(path, len(args[0])))
        snn(x)
        assert seen == {"b": 64 * 16, "c": 16}

    def test_slices_of_all_outputs_make_one_run(self) -> None:
        _, snn, x = everything(PACKS["tuple"])
        whole = per_step(snn, x, steps=6)
        with carry_state(snn):
            first, second = per_step(snn, x, steps=2), per_step(snn, x, steps=4)
        for k in range(2):
            assert torch.equal(torch.cat([first[k], second[k]]), whole[k])

    def test_a_batch_size_read_behind_a_neuron_is_refused(self) -> None:
        ann = Everything(lambda *, out, hidden, **_: (out, hidden.shape[0]))
        with pytest.raises(AuditError, match=r"returns a size that carries the batch size.*read off the input"):
            convert(ann, 4, data=torch.rand(8, 4))

    def test_no_tensor_at_all_is_refused(self) -> None:
        with pytest.raises(AuditError, match="returns a tuple of 2 without a tensor; expected one tensor"):
            prepare(Everything(lambda **_: (None, 3)), (4,))

    def test_a_wrong_leaf_is_noticed(self) -> None:
        """The check of PREPARE looks at every leaf: here the second depends on what forward left behind."""

        class Remembers(nn.Module):
            calls = 0

            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(4, 3)

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                Remembers.calls += 1
                y = torch.relu(self.a(x))
                return y, y * Remembers.calls

        with pytest.raises(AuditError, match=r"answers differently from Remembers \(relative difference 0.0e\+00, "):
            prepare(Remembers(), (4,))

    @pytest.mark.slow
    def test_auxiliary_heads_of_googlenet_are_for_training_only(self) -> None:
        ann = torchvision().models.googlenet(weights=None, init_weights=False, aux_logits=True).eval()
        snn = convert(ann, 2, example_input=torch.zeros(1, 3, 64, 64), calibration=BatchNormStatistics()).snn
        assert snn(torch.rand(2, 3, 64, 64)).shape == (2, 1000)
        assert not any(path.startswith("aux") for path in sites(snn))


class TestWorkOnOutputs:
    def test_the_one_tensor_in_a_structure_is_measured_and_trained(self) -> None:
        ann, snn, x = everything(lambda *, out, **_: OrderedDict(out=out, aux=None))
        y = ann(x)["out"].argmax(1)
        result = evaluate(snn, [(x, y)], ann=ann)
        assert isinstance(result, Evaluation)
        assert result.agreement is not None
        assert result.agreement[-1] > 0.9
        assert len(finetune(snn, [(x, y)], [(x, y)], epochs=1, teacher=ann)) == 1

    def test_several_are_refused_with_advice(self) -> None:
        ann, snn, x = everything(PACKS["dict"])
        advice = "returns a dict with the keys 'out', 'hidden'; expected one tensor. Wrap the ANN in a module"
        with pytest.raises(ArgumentError, match=f"evaluate: the network {advice}"):
            evaluate(snn, [x])
        with pytest.raises(ArgumentError, match=f"finetune: the network {advice}"):
            finetune(snn, [(x, torch.zeros(16, dtype=torch.long))], epochs=1)
        tail = convert(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), 2, data=x).snn
        with pytest.raises(ArgumentError, match=advice):
            evaluate(tail, [x], ann=ann)

    def test_a_saved_network_returns_the_same(self, tmp_path: Path) -> None:
        ann, x = Everything(PACKS["nested"]).eval(), torch.rand(8, 4)
        conversion = convert(ann, 4, data=x)
        save(conversion, tmp_path / "a.safetensors")
        again = load(tmp_path / "a.safetensors", source=ann)
        assert shape_of(again(x)) == shape_of(conversion.snn(x))
        assert all(map(torch.equal, tensors_of(again(x)), tensors_of(conversion.snn(x))))

    def test_exports_hold_every_output(self, tmp_path: Path) -> None:
        ann, x = Everything(PACKS["dict"]).eval(), torch.rand(5, 4)
        conversion = convert(ann, 2, data=x)
        expected = conversion.snn(x).values()
        export_pt2(conversion, tmp_path / "a.pt2")
        loaded = torch.export.load(tmp_path / "a.pt2").module()(x)
        assert all(map(torch.equal, loaded.values(), expected))
        export_onnx(conversion, tmp_path / "a.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
        got = session.run(None, {"input": x.numpy()})
        assert all(torch.allclose(torch.from_numpy(a), b, atol=1e-6) for a, b in zip(got, expected, strict=True))
        with pytest.raises(ArtifactError, match="output is several tensors"):
            export_nir(conversion, tmp_path / "a.nir", Project())

    def test_nir_takes_the_one_tensor_of_an_ordered_dict(self, tmp_path: Path) -> None:
        conversion = convert(Everything(lambda *, out, **_: OrderedDict(out=out)), 4, data=torch.rand(8, 4))
        assert "Read back" in export_nir(conversion, tmp_path / "a.nir", Project()).check
