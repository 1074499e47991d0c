"""Readouts: the average that they say, at every prefix, in both modes, through files, exports and the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import nets
from commands import command, succeed
from lmh import DelayedReadout, MeanReadout, WeightedReadout, evaluate, per_step, prefixes, zoo
from lmh.artifact import read_snn, read_tensors, write_tensors
from lmh.convert import EventFrames, assemble, convert, load, save
from lmh.convert.export import Project, export_nir, export_onnx, export_pt2
from lmh.errors import ArgumentError, ArtifactError
from lmh.readout import Average

STEPS = 5
READOUTS = [
    MeanReadout(),
    DelayedReadout(1),
    DelayedReadout(4),
    WeightedReadout((0.0, 0.0, 1.0, 3.0, 2.0)),
    WeightedReadout((1.0, 2.0, 0.0, 4.0, 5.0)),
    WeightedReadout((2.0, 0.0, 0.0, 0.0, 0.0)),
]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(24, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def by_hand(readout: Average, outputs: Tensor) -> np.ndarray:
    """The answer after every step of outputs [T, N, C], by a loop."""
    weights = {
        "MeanReadout": lambda: [1.0] * STEPS,
        "DelayedReadout": lambda: [0.0] * readout.steps + [1.0] * (STEPS - readout.steps),  # type: ignore[union-attr]
        "WeightedReadout": lambda: list(readout.values),  # type: ignore[union-attr]
    }[type(readout).__name__]()
    steps, answers = outputs.double().numpy(), []
    for t in range(1, STEPS + 1):
        so_far = weights[:t] if sum(weights[:t]) > 0 else [1.0] * t
        answers.append(sum(w * step for w, step in zip(so_far, steps, strict=False)) / sum(so_far))
    return np.stack(answers)


@pytest.mark.parametrize("readout", READOUTS, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_answer_is_the_average_of_the_steps(readout: Average, training: bool, images: Tensor) -> None:
    snn = convert(nets.conv_net().eval(), STEPS, data=images, readout=readout).snn
    for module in snn.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    snn.train(training)

    def seeded(run: Callable[..., Tensor], *arguments: object) -> Tensor:
        torch.manual_seed(0)  # dropout
        return run(*arguments)

    with torch.no_grad():
        expected = by_hand(readout, seeded(per_step, snn, images))
        assert np.allclose(seeded(snn, images).numpy(), expected[-1], atol=1e-5)
        assert np.allclose(seeded(prefixes, snn, images).numpy(), expected, atol=1e-5)


def test_the_mean_is_what_it_was_bit_for_bit(images: Tensor) -> None:
    ann = nets.conv_net().eval()
    plain, named = (convert(ann, STEPS, data=images, **options).snn for options in ({}, {"readout": MeanReadout()}))
    even = convert(ann, STEPS, data=images, readout=WeightedReadout((0.5,) * STEPS)).snn
    with torch.no_grad():
        assert torch.equal(plain(images), named(images))
        assert torch.equal(plain(images), even(images))


def test_event_frames_and_several_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = torch.relu(self.a(x))
            return {"hidden": hidden, "out": self.b(hidden)}

    frames, readout = torch.rand(STEPS, 8, 4), DelayedReadout(2)
    snn = convert(Two(), STEPS, data=[frames], encoding=EventFrames(), readout=readout).snn
    with torch.no_grad():
        steps, answer = per_step(snn, frames), snn(frames)
    for name in ("hidden", "out"):
        assert np.allclose(answer[name].numpy(), by_hand(readout, steps[name])[-1], atol=1e-5)


def test_a_final_softmax_comes_behind_the_average(images: Tensor) -> None:
    plain = nets.conv_net().eval()
    ann = nn.Sequential(plain, nn.Softmax(1)).eval()
    snn, logits = (convert(net, STEPS, data=images, readout=DelayedReadout(2)).snn for net in (ann, plain))
    with torch.no_grad():
        assert torch.allclose(snn(images), logits(images).softmax(1), atol=1e-5)


class TestSteps:
    def test_all_steps_are_run_and_counted(self, images: Tensor) -> None:
        ann = nets.conv_net().eval()
        mean, late = (convert(ann, STEPS, data=images, readout=r) for r in (MeanReadout(), DelayedReadout(3)))
        measured = [evaluate(c.snn, [(images, torch.zeros(len(images)).long())], ann=ann) for c in (mean, late)]
        assert [len(m.snn_accuracy or ()) for m in measured] == [STEPS, STEPS]
        assert any(layer.accumulates > 0 for layer in measured[0].layers)
        assert measured[0].layers == measured[1].layers
        assert late.report.timesteps == STEPS
        assert late.report.notices == ("The answer is the mean over steps 4 to 5 of 5; T and the energy count all 5.",)
        assert mean.report.notices == ()

    def test_a_delay_that_leaves_nothing_is_refused_with_the_total_to_pass(self, images: Tensor) -> None:
        with pytest.raises(ArgumentError, match=r"nothing is left .* timesteps=4; .* Pass timesteps=8 to read 4"):
            convert(nets.conv_net(), 4, data=images, readout=DelayedReadout(4))
        first = convert(nets.conv_net(), 8, data=images, readout=DelayedReadout(4))
        with pytest.raises(ArgumentError, match="nothing is left to read"):
            assemble(first.prepared, first.calibration, replace(first.recipe, timesteps=3))

    def test_weights_must_fit_t(self, images: Tensor) -> None:
        with pytest.raises(ArgumentError, match=r"3 weights came for timesteps=4; .* Pass 4 weights"):
            convert(nets.conv_net(), 4, data=images, readout=WeightedReadout((1.0, 2.0, 3.0)))

    @pytest.mark.parametrize("steps", [0, -1, 1.0, True, "2"], ids=repr)
    def test_a_delay_is_a_whole_number(self, steps: object) -> None:
        with pytest.raises(ArgumentError, match=r"whole number from 1. Pass DelayedReadout\(2\)"):
            DelayedReadout(steps)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "values", [(), (0.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (float("inf"),), [1.0], 2.0, ("1",)], ids=repr
    )
    def test_weights_are_finite_and_not_all_0(self, values: object) -> None:
        with pytest.raises(ArgumentError, match=r"one finite weight .* Pass WeightedReadout\("):
            WeightedReadout(values)  # type: ignore[arg-type]

    def test_a_class_or_a_number_is_refused(self, images: Tensor) -> None:
        for bad in (DelayedReadout, 2, "delayed:2"):
            with pytest.raises(ArgumentError, match=r"convert: readout is .* Pass MeanReadout\(\) or DelayedReadout"):
                convert(nets.conv_net(), 4, data=images, readout=bad)  # type: ignore[arg-type]


class TestFiles:
    @pytest.mark.parametrize("readout", READOUTS[1:4], ids=str)
    def test_a_file_holds_it(self, readout: Average, images: Tensor, tmp_path: Path) -> None:
        ann = nets.conv_net().eval()
        conversion = convert(ann, STEPS, data=images, readout=readout)
        save(conversion, tmp_path / "snn.safetensors")
        loaded = load(tmp_path / "snn.safetensors", source=ann)
        save(loaded, tmp_path / "again.safetensors")
        assert read_snn(tmp_path / "again.safetensors")[1]["recipe"]["readout"]["type"] == type(readout).__name__
        with torch.no_grad():
            assert torch.equal(loaded(images), conversion.snn(images))
            assert torch.equal(prefixes(loaded, images), prefixes(conversion.snn, images))

    def test_files_from_before_it_have_the_mean(self, tmp_path: Path) -> None:
        tensors, metadata = read_tensors(zoo.snn_path("digits-cnn-t4"))
        del metadata["manifest"]["recipe"]["readout"]
        write_tensors(tmp_path / "old.safetensors", tensors, metadata)
        snn, x = load(tmp_path / "old.safetensors"), torch.rand(3, 1, 8, 8)
        with torch.no_grad():
            assert torch.allclose(snn(x), per_step(snn, x).mean(0), atol=1e-5)

    @pytest.mark.parametrize("readout", READOUTS[1:4], ids=str)
    def test_exports_answer_the_same(self, readout: Average, images: Tensor, tmp_path: Path) -> None:
        conversion = convert(nets.conv_net().eval(), STEPS, data=images, readout=readout)
        with torch.no_grad():
            expected = conversion.snn(images[:6]).numpy()
        export_onnx(conversion, tmp_path / "net.onnx")
        session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
        (answer,) = session.run(None, {session.get_inputs()[0].name: images[:6].numpy()})
        assert np.allclose(answer, expected, atol=1e-4)
        export_pt2(conversion, tmp_path / "net.pt2")
        program = torch.export.load(tmp_path / "net.pt2").module()
        with torch.no_grad():
            assert np.allclose(program(images[:6]).numpy(), expected, atol=1e-4)

    def test_nir_refuses_it_by_name(self, images: Tensor, tmp_path: Path) -> None:
        conversion = convert(nets.two_layers(), 4, data=torch.rand(16, 4), readout=DelayedReadout(2))
        with pytest.raises(ArtifactError, match=r"DelayedReadout\(steps=2\), the mean over steps 3 to 4 of 4, .*pt2"):
            export_nir(conversion, tmp_path / "net.nir", Project())
        assert list(tmp_path.iterdir()) == []


class TestCommand:
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def test_the_steps_are_said_everywhere(self) -> None:
        data = ("--data", "digits", "--calibration-samples", 64, "--test-samples", 40)
        arguments = ("convert", "zoo:digits-cnn", "-T", 3, *data, "--readout", "delayed:1")
        result, said = succeed(*arguments, "--json").result, "the mean over steps 2 to 3 of 3"
        assert (result["timesteps"], result["readout"], len(result["snn_accuracy"])) == (3, said, 3)
        assert any(said in notice for notice in result["notices"])
        assert said in command("inspect", result["output"]).out
        report = succeed("report", result["output"], *data[:2], "--test-samples", 40, "--json").result
        assert (report["readout"], report["snn_accuracy"]) == (said, result["snn_accuracy"])
        assert f"The answer is {said}" in command(*arguments).out

    @pytest.mark.parametrize(
        ("readout", "words"),
        [
            ("delayed:3", "timesteps=6 to read 3"),
            ("delayed:x", "as in delayed:2"),
            ("delayed:0", "whole number from 1"),
            ("weighted:1,2", "Pass 3 weights"),
            ("weighted:0,0,0", "not all 0"),
            ("late", "expected mean, delayed:STEPS or weighted"),
        ],
    )
    def test_what_does_not_fit_is_bad_usage(self, readout: str, words: str) -> None:
        status, _, err = command("convert", "zoo:digits-cnn", "-T", 3, "--readout", readout)
        assert status == 2
        assert words in " ".join(err.replace("│", " ").split())
        assert "--readout" in err
