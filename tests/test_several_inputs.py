"""Several inputs: told by forward's signature and the example, and taken from the front of a batch."""

from __future__ import annotations

import copy
import io
import json
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from click import UsageError
from torch import Tensor, nn

from lmh import evaluate, per_step, prefixes, sites
from lmh.arguments import split_batch
from lmh.calibrate import Max, refit, stand_ins
from lmh.convert import Conversion, EventFrames, ReluSurgery, convert, load, prepare, save
from lmh.convert.export import Project, export_nir, export_onnx, export_pt2
from lmh.convert.report_cli import stored_preprocessing
from lmh.errors import ArgumentError, ArtifactError, AuditError, CalibrationError
from lmh.finetune import TET, Schedule, finetune
from lmh.structures import input_count


class Both(nn.Module):
    """Two inputs and two outputs; a class of the file, so that pickle finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> OrderedDict[str, Tensor]:
        hidden = torch.relu(self.a(x)) + torch.relu(self.b(y))
        return OrderedDict(out=self.c(torch.relu(hidden)), hidden=hidden)


class Two(nn.Module):
    """Two inputs, and parameters with defaults that forward asks about."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(
        self, x: Tensor, y: Tensor, mask: Tensor | None = None, scale: float = 2.0, *rest: Any, flag: bool = True,
        **options: Any,
    ) -> Tensor:  # fmt: skip
        z = torch.relu(self.a(x)) + torch.relu(self.b(y)) * scale
        if mask is not None:
            z = z + mask
        if flag and not rest and not options:
            z = z + 1
        return self.c(torch.relu(z))


def pair(n: int = 16) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 4), torch.rand(n, 5)


def two(timesteps: int = 64) -> tuple[nn.Module, Conversion]:
    ann = Two().eval()
    return ann, convert(ann, timesteps, data=[pair(), pair()], calibration=Max())


class TestInputs:
    def test_two_inputs_take_the_first_two_entries_of_a_batch(self) -> None:
        ann, conversion = two()
        x, y = pair()
        assert conversion.recipe.sample_shape == conversion.prepared.sample_shape == ((4,), (5,))
        assert conversion.calibration.samples == 32
        assert torch.allclose(conversion.snn(x, y), ann(x, y), atol=0.1)
        assert torch.equal(conversion.snn(y=y, x=x), conversion.snn(x, y))
        assert per_step(conversion.snn, x, y, steps=3).shape == (3, 16, 3)
        assert torch.allclose(prefixes(conversion.snn, x, y)[-1], conversion.snn(x, y), atol=1e-6)

    def test_parameters_with_a_default_keep_it(self) -> None:
        _, conversion = two()
        assert [node.name for node in conversion.snn.graph.nodes if node.op == "placeholder"] == ["x", "y"]
        with pytest.raises(TypeError, match="mask"):
            conversion.snn(*pair(), mask=None)

    def test_a_tensor_given_for_one_makes_it_an_input(self) -> None:
        ann, (x, y), mask = Two().eval(), pair(), torch.rand(16, 8)
        snn = convert(ann, 64, data=[(x, y, mask)], example_input=(x, y, mask), calibration=Max()).snn
        assert torch.allclose(snn(x, y, mask), ann(x, y, mask), atol=0.1)
        assert float((snn(x, y, mask) - snn(x, y, 2 * mask)).detach().abs().max()) > 0.01

    def test_one_input_stays_a_plain_shape(self) -> None:
        ann = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        for example in (torch.rand(2, 4), (torch.rand(2, 4),), [torch.rand(2, 4)]):
            recipe = convert(ann, 4, data=[(torch.rand(8, 4), torch.zeros(8))], example_input=example).recipe
            assert recipe.sample_shape == (4,)

    def test_evaluation_reads_labels_behind_the_inputs(self) -> None:
        ann, conversion = two()
        x, y = pair()
        labels = ann(x, y).argmax(1)
        result = evaluate(conversion.snn, [(x, y, labels), [x, y, labels]], ann=ann)
        assert result.samples == 32
        assert result.ann_accuracy == 1.0
        assert result.snn_accuracy is not None
        assert result.snn_accuracy[-1] > 0.9
        assert evaluate(conversion.snn, [(x, y)], ann=ann).snn_accuracy is None

    @pytest.mark.parametrize("schedule", [Schedule(epochs=2), Schedule(epochs=2, loss=TET())])
    def test_training_does_too(self, schedule: Schedule) -> None:
        ann, conversion = two()
        batches = [(*pair(), torch.randint(3, (16,)))]
        assert len(finetune(conversion.snn, batches, batches, schedule=schedule, teacher=ann)) == 2
        assert len(finetune(conversion.snn, batches, batches, schedule=schedule)) == 2

    def test_a_wrapped_network_counts_the_same(self) -> None:
        ann, conversion = two()
        for network in (ann, conversion.snn, nn.DataParallel(conversion.snn), torch.compile(conversion.snn)):
            assert input_count(network) == 2
        assert input_count(nn.Sequential(nn.Linear(4, 2))) == 1

    def test_save_and_load(self, tmp_path: Path) -> None:
        ann, conversion = two()
        save(conversion, tmp_path / "two.safetensors")
        again = load(tmp_path / "two.safetensors", source=ann)
        assert torch.equal(again(*(given := pair())), conversion.snn(*given))
        assert again.meta["lmh_manifest"]["recipe"]["sample_shape"] == [[4], [5]]
        assert json.dumps(again.meta["lmh_manifest"]["recipe"])
        with pytest.raises(UsageError, match=r"takes 2 inputs; expected one of images.*lmh\.evaluate"):
            stored_preprocessing(again.meta["lmh_manifest"], {})

    def test_without_data_batchnorm_is_enough(self) -> None:
        class Norms(Two):
            def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
                return self.c(torch.relu(self.norm(self.a(x) + self.b(y))))

        ann = Norms()
        ann.norm = nn.BatchNorm1d(8)
        snn = convert(ann, 4, example_input=pair(2)).snn
        assert snn(*pair()).shape == (16, 3)

    def test_event_frames_are_the_form_of_every_input(self) -> None:
        ann, conversion = two()
        x, y = pair(6)
        frames = x.expand(64, *x.shape), y.expand(64, *y.shape)
        events = convert(ann, 64, example_input=frames, calibration=conversion.calibration, encoding=EventFrames()).snn
        assert torch.allclose(events(*frames), conversion.snn(x, y), atol=1e-5)
        result = evaluate(events, [frames], ann=ann)
        assert result.samples == 6
        assert result.output_error is not None
        assert result.output_error < 0.05
        with pytest.raises(ArgumentError, match="has 3 steps; expected 64"):
            events(frames[0], frames[1][:3])
        calibrated = convert(ann, 4, data=[(torch.rand(4, 6, 4), torch.rand(4, 6, 5))], encoding=EventFrames())
        assert calibrated.calibration.samples == 24

    def test_pickle_and_copy(self) -> None:
        x, y = pair()
        snn = convert(Both(), 4, data=[(x, y)]).snn
        buffer = io.BytesIO()
        torch.save(snn, buffer)
        buffer.seek(0)
        for again in (torch.load(buffer, weights_only=False), copy.deepcopy(snn)):
            got = again(x, y)
            assert type(got) is OrderedDict
            assert all(torch.equal(got[key], value) for key, value in snn(x, y).items())

    @pytest.mark.device
    def test_on_meta(self) -> None:
        ann = Both()
        found = convert(ann, 4, data=[pair()]).calibration
        x, y = (value.to("meta") for value in pair())
        snn = convert(ann.to("meta"), 4, example_input=(x, y), calibration=found).snn
        per_step(snn.train(), x, y)["out"].sum().backward()
        assert snn.eval()(x, y)["out"].device.type == "meta"

    @pytest.mark.device
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_on_cuda(self) -> None:
        x, y = pair()
        snn = convert(Both(), 8, data=[(x, y)]).snn.double()
        expected = per_step(snn, x.double(), y.double())
        got = per_step(snn.cuda(), x.double().cuda(), y.double().cuda())
        assert all(torch.allclose(got[key].cpu(), value, atol=1e-9) for key, value in expected.items())

    def test_exports_take_both(self, tmp_path: Path) -> None:
        _, conversion = two(timesteps=2)
        x, y = pair(5)
        expected = conversion.snn(x, y)
        export_pt2(conversion, tmp_path / "two.pt2")
        assert torch.equal(torch.export.load(tmp_path / "two.pt2").module()(x, y), expected)
        export_onnx(conversion, tmp_path / "two.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "two.onnx", providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {"x": x.numpy(), "y": y.numpy()})
        assert torch.allclose(torch.from_numpy(got), expected, atol=1e-5)
        with pytest.raises(ArtifactError, match=r"takes 2 inputs; expected one.*onnx or pt2"):
            export_nir(conversion, tmp_path / "two.nir", Project())


class TestWrongInputs:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (torch.rand(8, 4), r"a batch is a float32 tensor \[8, 4\]; expected a tuple \(x1, x2\) or \(x1, x2, y\)"),
            ([(torch.rand(8, 4),)], r"a batch is a tuple of Tensor; expected a tuple \(x1, x2\)"),
            ([(torch.rand(8, 4), "label")], r"a batch is a tuple of Tensor, str; expected .* of tensors"),
            ([{"x": torch.rand(8, 4)}], r"a batch is a dict with the keys x; .* Let the loader give tuples"),
            (
                [(torch.rand(8, 4), torch.zeros(8, dtype=torch.long))],
                r"an input of a batch is an int64 tensor \[8\]; expected floating-point.*pass tuples \(x1, x2, y\)",
            ),
            (
                [(torch.rand(8, 4), torch.zeros(8, 5, dtype=torch.uint8))],
                r"an input of a batch is a uint8 tensor \[8, 5\]; expected floating-point.*Normalise the images first",
            ),
            ([(torch.rand(8, 4), torch.rand(0, 5))], r"an input of a batch is a float32 tensor \[0, 5\]; .* N ≥ 1"),
            (
                [(torch.rand(8, 4), torch.rand(7, 5))],
                r"inputs of a batch have the shapes \[8, 4\] and \[7, 5\]; expected the same first axis.*as many",
            ),
        ],
    )
    def test_batches_that_hold_too_little(self, given: Any, message: str) -> None:
        with pytest.raises(ArgumentError, match=message):
            convert(Two(), 4, data=given)

    def test_labels_are_no_second_input(self) -> None:
        """A loader of (x, y) for one input where the network takes two: y is taken for the second and does not fit."""
        with pytest.raises(ArgumentError, match=r"input of shape \['N', 4\], \['N'\] does not fit"):
            convert(Two(), 4, data=[(torch.rand(8, 4), torch.zeros(8))])

    @pytest.mark.parametrize(
        ("count", "message"),
        [
            (1, r"Named.forward takes x, y, mask, and 1 input came; expected one for each .* \(x, y\).*example_in"),
            (4, "takes x, y, mask, and 4 inputs came"),
        ],
    )
    def test_another_number_of_examples(self, count: int, message: str) -> None:
        class Named(Two):
            def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
                return super().forward(x, y, mask)

        with pytest.raises(ArgumentError, match=message):
            convert(Named(), 4, example_input=tuple(torch.rand(2, 4) for _ in range(count)))

    @pytest.mark.parametrize("example", [3, "x", (), {"x": torch.rand(1)}, (torch.rand(2, 4), 3)])
    def test_examples_that_are_no_tensors(self, example: Any) -> None:
        with pytest.raises(
            ArgumentError,
            match=r"example input is .*; expected a tensor \[N, \*F\], or a tuple of one for each input.*\(x1, x2\)",
        ):
            convert(Two(), 4, example_input=example)

    def test_shapes_that_do_not_fit_log_nothing_beside_the_error(self, caplog: pytest.LogCaptureFixture) -> None:
        with (
            caplog.at_level(logging.ERROR),
            pytest.raises(ArgumentError, match=r"a: an input of shape \['N', 5\], \['N', 4\] does not fit"),
        ):
            convert(Two(), 4, example_input=pair()[::-1])
        assert caplog.text == ""

    def test_an_output_without_the_input_is_refused(self) -> None:
        class Constant(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.rand(2, 3))

            def forward(self, x: Tensor) -> Tensor:
                return torch.relu(self.weight)

        with pytest.raises(AuditError, match="output does not depend on its input"):
            convert(Constant(), 4, example_input=torch.rand(2, 4))

    def test_split_batch_leaves_labels_alone(self) -> None:
        x, y = torch.rand(2, 4), ["a", "b"]
        assert split_batch("here", (x, y)) == ((x,), y)
        assert split_batch("here", [x, x, x], 2)[1] is x


def test_surgery_keeps_a_product_of_two_inputs_analog() -> None:
    class Product(Two):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return self.c(torch.relu(self.a(x) * self.b(y)))

    ann, (x, y) = Product().eval(), pair()
    conversion = convert(ann, 64, data=[(x, y)], calibration=Max(), surgery=ReluSurgery())
    assert any("1 nodes stay analog: mul" in notice for notice in conversion.report.notices)
    assert torch.allclose(conversion.snn(x, y), ann(x, y), atol=0.05)


class Sums(nn.Module):
    """Python control flow over any number of inputs: symbolic tracing cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.act = nn.Linear(4, 8), nn.Linear(8, 3), nn.ReLU()

    def forward(self, first: Tensor, *others: Tensor) -> dict[str, Tensor]:
        x = self.act(self.a(first))
        for other in others:
            x = x + self.act(self.a(other))
        if x.shape[-1] == 8 and isinstance(x, Tensor):
            x = x * 2
        return {"out": self.c(x), "hidden": x}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's own
@pytest.mark.parametrize("inputs", [1, 2, 3])
def test_torch_export_gets_an_example_of_each_input(inputs: int) -> None:
    ann, given = Sums().eval(), tuple(torch.rand(16, 4) for _ in range(inputs))
    snn = convert(ann, 64, data=[given], example_input=given, calibration=Max()).snn
    assert len(sites(snn)) == inputs
    expected = ann(*given)
    got = snn(*given)
    assert got.keys() == expected.keys()
    assert all(torch.allclose(got[key], expected[key], atol=0.15) for key in got)


def test_surgery_refits_on_all_inputs() -> None:
    class Smooth(Two):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return self.c(F.silu(self.a(x)) + F.silu(self.b(y)))

    ann, (x, y) = Smooth().eval(), pair(300)
    batches = [(x[:100], y[:100]), (x[100:], y[100:])]
    for data in (batches, iter(batches)):
        conversion = convert(ann, 64, data=data, calibration=Max(), surgery=ReluSurgery())
        assert conversion.calibration.samples == 300
        assert any("refit on 300 samples" in notice for notice in conversion.report.notices)
        assert torch.allclose(conversion.prepared.model(x, y).mean(0), ann(x, y).mean(0), atol=1e-3)
    plain = prepare(ann, ((4,), (5,)), surgery=ReluSurgery())
    assert stand_ins(plain) == conversion.prepared.spiking
    with pytest.raises(CalibrationError, match="not finite; expected two or more"):
        refit(plain, x, y * torch.inf)
