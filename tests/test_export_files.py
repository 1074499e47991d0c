"""ONNX and .pt2: written, run by onnxruntime and by torch alone, and beside the spiking network."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import nets
from lmh import LMH, PerChannel, PerStep, sites, zoo
from lmh.convert import Conversion, EventFrames, convert, load, save
from lmh.convert.deploy import deployed
from lmh.convert.export import Exported, export_onnx, export_pt2, to_pt2
from lmh.errors import ArgumentError, ArtifactError
from lmh.torchvision_shim import torchvision
from test_export_deploy import SHAPE, learned, mean_size, residual_conversion, settled

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lmh":
            raise ImportError("lmh is blocked")

sys.meta_path.insert(0, Blocked())
import torch
for file, given, got in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    network = torch.export.load(file).module()
    torch.save([network(x) for x in torch.load(given)], got)
try:
    import lmh
except ImportError:
    print("alone")
"""
BATCHES = (1, 2, 5, 200)


def onnx_answers(file: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def answers(file: Path, x: Tensor) -> Tensor:
    """Run a file of either kind."""
    with torch.no_grad():
        return torch.export.load(file).module()(x) if file.suffix == ".pt2" else onnx_answers(file, x)


def assert_same(got: Tensor, expected: Tensor) -> None:
    """The spike-flip-tolerant comparison: the same class almost always, the mean difference small."""
    got, expected = got.detach(), expected.detach()
    assert got.shape == expected.shape
    assert float((got.argmax(1) == expected.argmax(1)).float().mean()) >= 0.99
    assert mean_size(got - expected) < 1e-3 * mean_size(expected)


def digits_conversion() -> Conversion:
    return convert(zoo.load("digits-cnn"), 4, example_input=torch.zeros(1, 1, 8, 8))


def residual_lmh() -> Conversion:
    return learned(residual_conversion(4, LMH(granularity=PerChannel())))


def per_step_lmh() -> Conversion:
    return learned(residual_conversion(3, LMH(granularity=PerStep())))


def small_conversion() -> Conversion:
    return convert(nets.two_layers(), 2, data=torch.rand(16, 4))


NETWORKS = {
    "residual": residual_conversion,
    "learned": residual_lmh,
    "per-step": per_step_lmh,
    "digits-cnn": digits_conversion,
}
EXPORTS = {"onnx": export_onnx, "pt2": export_pt2}


@dataclass(frozen=True)
class Case:
    """A network, its two files, and what .pt2 answered in a process without lmh."""

    conversion: Conversion
    onnx: Exported
    pt2: Exported
    batches: list[Tensor]
    alone: list[Tensor]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Export every network once, and load all .pt2 files in one process that cannot import lmh."""
    folder = tmp_path_factory.mktemp("exports")
    conversions = {name: make() for name, make in NETWORKS.items()}
    arguments: list[str] = []
    batches: dict[str, list[Tensor]] = {}
    pt2: dict[str, Exported] = {}
    for name, conversion in conversions.items():
        batches[name] = [torch.randn(batch, *conversion.recipe.sample_shape) for batch in BATCHES]
        files = [folder / f"{name}.{kind}" for kind in ("pt2", "in", "out")]
        pt2[name] = export_pt2(conversion, files[0])
        torch.save(batches[name], files[1])
        arguments += map(str, files)
    shown = subprocess.run([sys.executable, "-c", BLOCKED, *arguments], capture_output=True, text=True, check=False)
    assert shown.stdout.strip() == "alone", shown.stderr
    return {
        name: Case(
            conversion,
            export_onnx(conversion, folder / f"{name}.onnx"),
            pt2[name],
            batches[name],
            torch.load(folder / f"{name}.out"),
        )
        for name, conversion in conversions.items()
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_onnxruntime_answers_as_the_network_does(name: str, cases: dict[str, Case]) -> None:
    case = cases[name]
    for x in case.batches:
        assert_same(onnx_answers(case.onnx.file, x), case.conversion.snn(x))
    assert case.onnx.format == "onnx"
    assert case.onnx.size == case.onnx.file.stat().st_size
    assert case.onnx.lost == {}
    start = f"onnxruntime {onnxruntime.__version__} beside the network on 8 random inputs: 8 alike, 100 % same class"
    assert case.onnx.check.startswith(start)


@pytest.mark.parametrize("name", NETWORKS)
def test_torch_alone_answers_as_the_network_does(name: str, cases: dict[str, Case]) -> None:
    case = cases[name]
    model = deployed(case.conversion)
    for x, got in zip(case.batches, case.alone, strict=True):
        assert torch.allclose(got, model(x), atol=1e-5)
        assert_same(got, case.conversion.snn(x))
    assert case.pt2.format == "pt2"
    assert case.pt2.check.startswith(
        f"torch {torch.__version__} beside the network on 8 random inputs: 8 alike, 100 % same class"
    )


@pytest.mark.parametrize("kind", EXPORTS)
def test_learned_parameters_are_in_the_file(kind: str, cases: dict[str, Case]) -> None:
    """A wrong twin: the same network with one kind of parameter back at its preset answers differently."""
    case = cases["learned"]
    x = case.batches[-1]
    got = answers(getattr(case, kind).file, x)
    assert_same(got, case.conversion.snn(x))
    for name in ("raw_threshold", "raw_lambda_s", "raw_lambda_d", "raw_mu_s", "raw_mu_d", "v_init"):
        wrong = copy.deepcopy(case.conversion.snn)
        with torch.no_grad():
            for site in sites(wrong).values():
                getattr(site, name).fill_(0.5 if name == "v_init" else 0.0)
        with pytest.raises(AssertionError):
            assert_same(got, wrong(x))


def test_batchnorm_is_folded_and_the_batch_is_free(cases: dict[str, Case]) -> None:
    graph = onnx.load(cases["residual"].onnx.file).graph
    kinds = [node.op_type for node in graph.node]
    assert "BatchNormalization" not in kinds
    assert kinds.count("GreaterOrEqual") == 5 * 4
    shapes = [[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
              for value in (*graph.input, *graph.output)]  # fmt: skip
    assert shapes == [["batch", *SHAPE], ["batch", 5]]


@pytest.mark.parametrize("kind", EXPORTS)
def test_the_file_holds_no_path_of_this_machine(kind: str, cases: dict[str, Case]) -> None:
    data = getattr(cases["residual"], kind).file.read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in data
    assert str(Path(__file__).parent.parent).encode() not in data


@pytest.mark.parametrize("kind", EXPORTS)
def test_event_frames_come_as_t_n(kind: str, tmp_path: Path) -> None:
    frames = torch.randn(2, 32, 2, 8, 8)
    conversion = convert(settled(nets.conv_net(), frames.flatten(0, 1)), 2, data=[frames], encoding=EventFrames())
    file = EXPORTS[kind](conversion, tmp_path / f"net.{kind}").file
    for batch in (1, 5):
        x = torch.randn(2, batch, 2, 8, 8)
        assert_same(answers(file, x), conversion.snn(x))
        assert not torch.allclose(answers(file, x), conversion.snn(x.flip(0)), atol=1e-3)


def test_a_network_from_a_file_is_exported_alike(tmp_path: Path) -> None:
    conversion = learned(small_conversion())
    loaded = load(save(conversion, tmp_path / "net.safetensors"), source=nets.two_layers())
    x = torch.rand(200, 4)
    assert_same(answers(export_pt2(loaded, tmp_path / "net.pt2").file, x), conversion.snn(x))


@pytest.mark.parametrize("kind", EXPORTS)
def test_the_network_is_left_as_it_was(kind: str, tmp_path: Path) -> None:
    conversion = small_conversion()
    conversion.snn.train()
    before = {key: value.clone() for key, value in conversion.snn.state_dict().items()}
    EXPORTS[kind](conversion, tmp_path / f"net.{kind}")
    assert conversion.snn.training
    assert all(torch.equal(before[key], value) for key, value in conversion.snn.state_dict().items())
    assert all(parameter.requires_grad for parameter in conversion.snn.parameters())


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_bare_network_needs_its_input_shape(kind: str, tmp_path: Path) -> None:
    snn, file = small_conversion().snn, tmp_path / f"net.{kind}"
    with pytest.raises(ArgumentError, match=r"does not say what input it takes; .* input_shape=\(3, 224, 224\)"):
        EXPORTS[kind](snn, file)
    with pytest.raises(ArgumentError, match=r"shape \['N', 5\] does not fit"):
        EXPORTS[kind](snn, file, input_shape=(5,))
    EXPORTS[kind](snn, file, input_shape=(4,))
    assert file.exists()


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_missing_folder_and_a_plain_network_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere/net: cannot be written"):
        EXPORTS[kind](small_conversion(), tmp_path / "nowhere" / "net")
    with pytest.raises(ArgumentError, match="Convert it first"):
        EXPORTS[kind](nn.Linear(2, 2), tmp_path / "net")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_file_that_answers_differently_is_not_written(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversion, wrong = small_conversion(), small_conversion()
    with torch.no_grad():
        for site in sites(wrong.snn).values():
            site.base_threshold /= 4
    module = sys.modules[EXPORTS[kind].__module__]
    monkeypatch.setattr(module, "deployed", lambda network, shape: deployed(wrong, shape))
    with pytest.raises(ArtifactError, match=r"not written, as it answers differently.*mean difference"):
        EXPORTS[kind](conversion, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_without_onnxruntime_the_result_says_that_it_was_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = export_onnx(small_conversion(), tmp_path / "net.onnx")
    assert result.check == f"Well-formed by onnx {onnx.__version__}; to run it too: pip install 'lmh-convert[onnx]'."


def test_a_network_that_torch_export_cannot_trace_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **options: object) -> None:
        raise ValueError("\nConstraints violated (batch)!")

    monkeypatch.setattr(to_pt2.torch.export, "export", fails)
    with pytest.raises(ArtifactError, match=r"free batch size \(Constraints violated \(batch\)!\); expected"):
        export_pt2(small_conversion(), tmp_path / "net.pt2")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5"])
def test_torchvision_networks_in_onnxruntime(name: str, tmp_path: Path) -> None:
    """The same up to rounding, but for the few samples in which a spike flips and moves what follows."""
    torch.manual_seed(0)
    x = torch.randn(100, 3, 64, 64)
    ann = settled(getattr(torchvision().models, name)(weights=None), x[:32])
    conversion = convert(ann, 2, data=x[:32])
    result = export_onnx(conversion, tmp_path / "net.onnx")
    with torch.no_grad():
        got, expected = onnx_answers(result.file, x), conversion.snn(x)
        for site in sites(conversion.snn).values():
            site.base_threshold *= 1.01
        wrong = conversion.snn(x)
    assert float((got.argmax(1) == expected.argmax(1)).float().mean()) >= 0.95
    moved, away = ((x - expected).abs().mean(1) / mean_size(expected) for x in (got, wrong))
    assert moved.quantile(0.9) < 1e-5
    assert away.quantile(0.1) > 1e-2
    assert moved.mean() < away.mean() / 10
