"""NIR: read back by nir, run by an independent NumPy executor, beside the projected dynamics written in torch."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import nir
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nets
from lmh import IF, LIF, LMH, PerChannel, PerStep, Ranges, evaluate, sites, zoo
from lmh.calibrate import Max
from lmh.convert import BeforeNeuron, Conversion, EventFrames, convert
from lmh.convert.export import Exact, Project, ZeroStart, export_nir
from lmh.convert.export.nir_neurons import (
    ALTERNATION,
    COUPLED,
    GROWTH,
    NEGATIVE_DENDRITE,
    NO_LEAK,
    PER_STEP,
)
from lmh.errors import ArgumentError, ArtifactError
from lmh.zoo import Batches
from reference import nir_numpy
from reference.nir_projection import projected
from test_export_deploy import SHAPE, learned, mean_size, residual_conversion


def executed(file: Path, x: Tensor, steps: int, dt: float = 1.0) -> Tensor:
    """Read a file with nir, run its nodes in NumPy, and return the mean over time."""
    graph = nir.read(file, type_check=False)
    frames = x if x.ndim > 1 and len(x) == steps and "frame" in graph.metadata["input"] else x.expand(steps, *x.shape)
    return torch.from_numpy(nir_numpy.run(graph.nodes, graph.edges, frames.numpy(), dt).mean(0))


def assert_same(got: Tensor, expected: Tensor) -> None:
    """The spike-flip-tolerant comparison: the same class almost always, the mean difference small."""
    expected = expected.detach().double()
    assert got.shape == expected.shape
    assert float((got.argmax(1) == expected.argmax(1)).double().mean()) >= 0.99
    assert mean_size(got - expected) < 1e-3 * mean_size(expected)


def residual_lmh() -> Conversion:
    return learned(residual_conversion(5, LMH(granularity=PerChannel())))


def small(neuron: LMH | None = None, timesteps: int = 4, **raw: float) -> Conversion:
    """A small network with the raw parameters of its neurons set."""
    conversion = convert(nets.two_layers(), timesteps, data=torch.rand(64, 4), calibration=Max(), neuron=neuron)
    with torch.no_grad():
        for site in sites(conversion.snn).values():
            for name, value in raw.items():
                getattr(site, name).fill_(value)
    return conversion


NETWORKS = {
    "IF": lambda: residual_conversion(6),
    "LIF": lambda: residual_conversion(6, LMH(preset=LIF(0.8))),
    "LM-H per channel": residual_lmh,
    "LM-H per step": lambda: learned(residual_conversion(3, LMH(granularity=PerStep()))),
    "digits-cnn": lambda: convert(zoo.load("digits-cnn"), 4, example_input=torch.zeros(1, 1, 8, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_executor_does_what_the_projection_says(name: str, tmp_path: Path) -> None:
    conversion = NETWORKS[name]()
    steps = conversion.recipe.timesteps
    result = export_nir(conversion, tmp_path / "net.nir", Project())
    x = torch.randn(200, *conversion.recipe.sample_shape)
    got = executed(result.file, x, steps)
    assert_same(got, projected(conversion)(x.double()))
    for wrong in (
        projected(conversion, soft=True),
        projected(conversion, residual=0.0),
        projected(conversion, kept=0.0),
    ):
        with pytest.raises(AssertionError):
            assert_same(got, wrong(x.double()))


def test_the_file_is_described(tmp_path: Path) -> None:
    result = export_nir(residual_conversion(), tmp_path / "net.nir", Project())
    assert result.format == "nir"
    assert result.size == result.file.stat().st_size
    assert result.check == f"Read back by nir {nir.__version__}: 19 nodes, 20 edges, types agree."
    assert result.notices == ("One step of 4: feed the input at each step from a potential of 0, average the output.",)
    assert list(result.lost) == ["relu", "block1.relu", "block1.relu_1", "block2.relu", "block2.relu_1"]
    assert [len(lost) for lost in result.lost.values()] == [3, 2, 2, 2, 2]
    assert "max-pool of currents" in result.lost["relu"][2]
    graph = nir.read(result.file)
    assert graph.metadata["timesteps"] == 4
    assert graph.metadata["dt"] == 1.0
    assert graph.metadata["input"] == "the same at every step"
    assert graph.nodes["block1_relu"].metadata["path"] == "block1.relu"
    kinds = [type(node).__name__ for node in graph.nodes.values()]
    assert kinds.count("IF") == 5
    assert kinds.count("Conv2d") == 6


def test_a_residual_sum_is_two_edges_into_the_neurons_and_theta_goes_into_weights(tmp_path: Path) -> None:
    graph = nir.read(export_nir(residual_conversion(), tmp_path / "net.nir", Project()).file)
    assert sorted(a for a, b in graph.edges if b == "block2_relu_1") == ["block2_conv2", "block2_shortcut_0"]
    assert sorted(a for a, b in graph.edges if b == "block1_relu_1") == ["block1_conv2", "relu_pool_any_scale"]
    assert [name for name, node in graph.nodes.items() if type(node).__name__ == "Scale"] == ["relu_pool_any_scale"]


def test_dt_only_scales_the_time_constants(tmp_path: Path) -> None:
    conversion = residual_lmh()
    x = torch.randn(100, *SHAPE)
    result = export_nir(conversion, tmp_path / "net.nir", Project(dt=1e-3))
    assert_same(executed(result.file, x, 5, dt=1e-3), projected(conversion)(x.double()))
    with pytest.raises(AssertionError):
        assert_same(executed(result.file, x, 5, dt=2e-3), projected(conversion)(x.double()))


def test_start_and_residual_can_be_dropped_for_platforms_without_them(tmp_path: Path) -> None:
    conversion = residual_conversion(6, LMH(preset=LIF(0.8)))
    x = torch.randn(100, *SHAPE)
    result = export_nir(conversion, tmp_path / "net.nir", Project(start=ZeroStart(), residual=0.0))
    assert_same(executed(result.file, x, 6), projected(conversion, residual=0.0, kept=0.0)(x.double()))
    for node in nir.read(result.file).nodes.values():
        if type(node).__name__ == "LIF":
            assert not node.v_reset.any()
            assert not node.v_leak.any()
    assert "this one starts at 0" in " ".join(result.lost["block1.relu"])


def test_event_frames_are_fed_one_by_one(tmp_path: Path) -> None:
    frames = torch.randn(4, 64, *SHAPE)
    ann = residual_conversion().prepared.model
    settings = {"calibration": Max(), "encoding": EventFrames(), "maxpool": BeforeNeuron()}
    conversion = convert(ann, 4, data=[frames], **settings)
    result = export_nir(conversion, tmp_path / "net.nir", Project())
    assert "feed frame t at each step" in result.notices[0]
    expected = projected(conversion)(frames.double())
    assert_same(executed(result.file, frames, 4), expected)
    with pytest.raises(AssertionError):
        assert_same(executed(result.file, frames.flip(0), 4), expected)


def test_the_projection_keeps_the_accuracy_of_the_digits_network(
    tmp_path: Path, digits_test: Batches, digits_calibration: Batches
) -> None:
    conversion = convert(zoo.load("digits-cnn"), 8, data=digits_calibration)
    snn = evaluate(conversion.snn, digits_test).snn_accuracy
    images, labels = (torch.cat(parts) for parts in zip(*digits_test, strict=True))
    accuracies = {}
    for name, mode in {"nearest": Project(), "naive": Project(start=ZeroStart(), residual=0.0)}.items():
        got = executed(export_nir(conversion, tmp_path / "net.nir", mode).file, images, 8)
        accuracies[name] = float((got.argmax(1) == labels).double().mean())
    assert snn is not None
    assert accuracies["nearest"] > snn[-1] - 0.02
    assert accuracies["naive"] < 0.5


def reasons(conversion: Conversion, tmp_path: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        export_nir(conversion, tmp_path / "net.nir", Exact())
    assert list(tmp_path.iterdir()) == []
    return str(caught.value)


def test_exact_refuses_with_every_site_and_reason(tmp_path: Path) -> None:
    text = reasons(residual_lmh(), tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("  - ")]
    assert text.startswith(f"{tmp_path}/net.nir: NIR cannot say {len(lines)} things of this network; expected only")
    for site in ("relu", "block1.relu", "block1.relu_1", "block2.relu", "block2.relu_1"):
        assert f"  - {site}: soft reset: a spike takes θ off the potential; NIR sets the potential to v_reset" in text
        assert f"  - {site}: start at v_init·θ: NIR gives no start" in text
        assert f"  - {site}: {COUPLED}" in text
    assert "  - relu: max-pool of currents: NIR has none" in text
    assert text.endswith(
        "Pass mode=Project() (on the command line nir-project) to write the nearest neurons and a list of what was "
        "lost."
    )


def test_the_mode_is_exact_unless_given(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="soft reset"):
        export_nir(small(), tmp_path / "net.nir")


@pytest.mark.parametrize(
    ("conversion", "kind"),
    [
        (lambda: learned(small(LMH(granularity=PerChannel()), 1)), "Threshold"),
        (lambda: learned(small(LMH(granularity=PerStep()), 1)), "Threshold"),
        (lambda: small(LMH(preset=LIF(0.0), ranges=Ranges(lambda_s=(-0.5, 1.5))), raw_lambda_d=-0.3), "Threshold"),
        (lambda: small(LMH(preset=LIF(0.0), ranges=Ranges(lambda_s=(-0.5, 1.5))), raw_mu_d=0.4), "CubaLIF"),
        (
            lambda: small(LMH(preset=IF(lambda_d=-0.5), ranges=Ranges(lambda_d=(-1.5, 1.5))), 1, v_init=1.2),
            "Threshold",
        ),
    ],
    ids=["one step", "one step, per step", "nothing carried", "dendrite only", "inverted"],
)
def test_exact_accepts_what_nir_can_say(conversion: Any, kind: str, tmp_path: Path) -> None:
    found = conversion()
    result = export_nir(found, tmp_path / "net.nir", Exact(dt=0.5))
    x = torch.rand(200, 4)
    steps = found.recipe.timesteps
    assert result.lost == {}
    assert_same(executed(result.file, x, steps, dt=0.5), found.snn(x))
    assert kind in {type(node).__name__ for node in nir.read(result.file).nodes.values()}
    with torch.no_grad():
        for site in sites(found.snn).values():
            site.base_threshold *= 1.2
    with pytest.raises(AssertionError):
        assert_same(executed(result.file, x, steps, dt=0.5), found.snn(x))


@pytest.mark.parametrize(
    ("raw", "lost", "kind"),
    [
        ({"raw_lambda_s": 0.2}, [GROWTH], "IF"),
        ({"raw_lambda_s": -0.9, "raw_mu_s": -0.4}, [ALTERNATION], "LIF"),
        ({"raw_mu_s": -0.3}, [], "LIF"),
        ({"raw_mu_d": -0.3}, [NEGATIVE_DENDRITE], "IF"),
        ({"raw_mu_d": 0.3}, [NO_LEAK], "CubaLIF"),
        ({"raw_mu_d": 0.3, "raw_lambda_s": -0.4}, [], "CubaLIF"),
        ({"raw_mu_d": 0.3, "raw_mu_s": -0.3}, [COUPLED], "CubaLIF"),
        ({"raw_lambda_d": 0.3}, [], "IF"),
    ],
)
def test_every_coefficient_becomes_a_neuron_and_what_it_loses_is_named(
    raw: dict[str, float], lost: list[str], kind: str, tmp_path: Path
) -> None:
    conversion = small(LMH(granularity=PerChannel()), **raw)
    result = export_nir(conversion, tmp_path / "net.nir", Project())
    x = torch.rand(200, 4)
    (losses,) = result.lost.values()
    assert [loss for loss in losses if not loss.startswith(("soft reset", "start"))] == lost
    assert kind in {type(node).__name__ for node in nir.read(result.file).nodes.values()}
    assert_same(executed(result.file, x, 4), projected(conversion)(x.double()))


def test_per_step_parameters_are_lost_only_where_they_differ(tmp_path: Path) -> None:
    equal = export_nir(small(LMH(granularity=PerStep())), tmp_path / "net.nir", Project())
    assert PER_STEP not in equal.lost["1"]
    different = export_nir(learned(small(LMH(granularity=PerStep()))), tmp_path / "net.nir", Project())
    assert PER_STEP in different.lost["1"]


def test_a_neuron_fires_at_its_threshold(tmp_path: Path) -> None:
    """NIR fires above the threshold: at θ itself the file must fire all the same."""
    conversion = small(timesteps=1, v_init=0.0)
    (site,) = sites(conversion.snn).values()
    with torch.no_grad():
        conversion.snn.get_submodule("0").weight.copy_(torch.eye(8, 4))
        conversion.snn.get_submodule("0").bias.zero_()
        site.base_threshold.fill_(0.3)
    x = torch.tensor([[0.3, 0.0, 0.0, 0.0], [np.nextafter(np.float32(0.3), np.float32(0)), 0.0, 0.0, 0.0]])
    result = export_nir(conversion, tmp_path / "net.nir", Exact())
    assert torch.allclose(executed(result.file, x, 1).float(), conversion.snn(x).detach(), atol=1e-6)
    assert not torch.equal(*conversion.snn(x).detach())


@pytest.mark.parametrize("mode", [Exact(dt=0.0), Project(dt=-1.0), Project(dt=float("nan"))])
def test_a_step_must_take_time(mode: Exact | Project, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"dt is .*; expected a time above 0"):
        export_nir(small(), tmp_path / "net.nir", mode)


def test_without_nir_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nir", None)
    with pytest.raises(ArtifactError, match=r"the nir package is not installed; .* pip install 'lmh-convert\[nir\]'"):
        export_nir(small(), tmp_path / "net.nir", Project())


def test_a_missing_folder_a_plain_network_and_an_unknown_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere/net\.nir: cannot be written"):
        export_nir(small(), tmp_path / "nowhere" / "net.nir", Project())
    with pytest.raises(ArgumentError, match="Convert it first"):
        export_nir(nn.Linear(2, 2), tmp_path / "net.nir", Project())  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="input_shape="):
        export_nir(small().snn, tmp_path / "net.nir", Project())
    assert export_nir(small().snn, tmp_path / "net.nir", Project(), input_shape=(4,)).size > 0


def test_the_network_is_left_as_it_was(tmp_path: Path) -> None:
    conversion = residual_conversion()
    conversion.snn.train()
    before = {key: value.clone() for key, value in conversion.snn.state_dict().items()}
    export_nir(conversion, tmp_path / "net.nir", Project())
    assert conversion.snn.training
    assert all(torch.equal(before[key], value) for key, value in conversion.snn.state_dict().items())


def test_the_executor_knows_numpy_only() -> None:
    tree = ast.parse(Path(nir_numpy.__file__).read_text())
    imported = {
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported <= {"__future__", "typing", "numpy", "numpy.lib.stride_tricks"}


def test_the_executor_integrates_as_worked_out_by_hand() -> None:
    one = np.ones(1)
    inputs = np.array([[[1.0]], [[1.0]], [[0.0]], [[2.0]]])

    def spikes(node: Any) -> list[float]:
        nodes = {"in": nir.Input(np.array([1])), "n": node, "out": nir.Output(np.array([1]))}
        return nir_numpy.run(nodes, [("in", "n"), ("n", "out")], inputs, 0.5).ravel().tolist()

    # v = 0.5, 1.0 → not above 1; 1.0; 2.0 → spike
    assert spikes(nir.IF(r=one, v_threshold=one)) == [0, 0, 0, 1]
    # v = 0.5, 0.75, 0.375, 1.1875
    assert spikes(nir.LIF(tau=one, r=one, v_leak=0 * one, v_threshold=0.7 * one)) == [0, 1, 0, 1]
    # i = 0.5, 0.75, 0.375, 1.1875; v = 0.25, 0.5, 0.4375, 0.8125
    neuron = nir.CubaLIF(tau_syn=one, tau_mem=one, r=one, v_leak=0 * one, v_threshold=0.6 * one)
    assert spikes(neuron) == [0, 0, 0, 1]
    with pytest.raises(ValueError, match="cycle"):
        nir_numpy.run({"a": neuron, "b": neuron}, [("a", "b"), ("b", "a")], inputs, 0.5)


def test_the_last_softmax_is_left_to_the_reader(tmp_path: Path) -> None:
    x = torch.randn(100, 4)
    conversion = convert(nn.Sequential(*nets.two_layers(), nn.Softmax(1)), 3, data=x, calibration=Max())
    result = export_nir(conversion, tmp_path / "net.nir", Project())
    assert "softmax" in " ".join(result.lost["3"]).lower()
    assert_same(F.softmax(executed(result.file, x, 3), 1), projected(conversion)(x.double()))
