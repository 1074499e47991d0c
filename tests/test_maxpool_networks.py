"""Whole networks by the type of their max-pools: reports, energy, files, training, exports, and the command line."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from commands import command, succeed
from lmh import LMH, PerStep, carry_state, evaluate, per_step, sites
from lmh.artifact import read_snn, write_snn
from lmh.calibrate import Max
from lmh.convert import (
    MAXPOOLS,
    AveragePool,
    BeforeNeuron,
    EventFrames,
    Gated,
    WhereExact,
    convert,
    load,
    save,
)
from lmh.convert.export import Project, export_nir, export_onnx, export_pt2
from lmh.convert.maxpool import MaxPool
from lmh.errors import ArtifactError, StateError
from lmh.finetune import finetune
from lmh.gate import Accumulate
from lmh.torchvision_shim import torchvision
from maxpool_nets import converted

TYPES = [BeforeNeuron(), AveragePool(), Gated()]
NAMES = ["auto", *MAXPOOLS]


class TestConversions:
    def test_the_names_of_the_command_line(self) -> None:
        assert list(MAXPOOLS.values()) == TYPES
        assert list(MAXPOOLS) == ["before", "average", "gated"]

    def test_average_says_that_it_changes_the_function(self) -> None:
        _, conversion, _ = converted(AveragePool(), 4)
        assert (
            "1 max-pools became average pools (4): the network computes another function"
            in (conversion.report.notices[0])
        )
        assert "Fine-tune it." in conversion.report.notices[0]

    def test_a_pool_of_constants_needs_no_gate(self) -> None:
        ann = nn.Sequential(nn.Conv2d(1, 2, 1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
        snn = convert(ann, 4, data=torch.rand(4, 1, 8, 8), maxpool=Gated()).snn
        assert not any(isinstance(module, Accumulate) for module in snn.modules())
        frames = torch.rand(4, 3, 1, 8, 8)
        events = convert(ann, 4, data=[frames], maxpool=Gated(), encoding=EventFrames())
        assert any(isinstance(module, Accumulate) for module in events.snn.modules())
        assert events.report.notices == ()
        before = convert(ann, 4, data=[frames], encoding=EventFrames(), maxpool=BeforeNeuron())
        assert "currents that vary in time" in before.report.notices[0]

    def test_the_default_moves_a_pool_of_constant_currents_and_gates_the_rest(self) -> None:
        def block(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]

        ann = nn.Sequential(*block(1, 4), *block(4, 4), nn.Flatten(), nn.Linear(16, 3)).eval()
        x = torch.rand(16, 1, 8, 8)
        conversion = convert(ann, 8, data=x)
        gated = convert(ann, 8, calibration=conversion.calibration, example_input=x, maxpool=Gated())
        assert conversion.recipe.maxpool == WhereExact()
        assert [str(node.target) for node in conversion.snn.graph.nodes if node.op == "call_module"][:7] == [
            "0", "2", "1", "3", "4", "time.Accumulate", "5",
        ]  # fmt: skip
        assert conversion.report.notices == gated.report.notices == ()
        assert torch.allclose(conversion.snn(x), gated.snn(x), atol=1e-5)
        events = convert(ann, 8, data=[torch.rand(8, 4, 1, 8, 8)], encoding=EventFrames())
        assert events.recipe.maxpool == Gated()

    def test_a_concat_and_an_activation_with_other_readers(self) -> None:
        class Inception(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1), nn.Conv2d(4, 4, 1)

            def forward(self, x: Tensor) -> Tensor:
                y = torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)
                return (F.max_pool2d(y, 2).flatten(1).sum(1) + self.c(y).flatten(1).sum(1))[:, None]

        ann, x = Inception().eval(), torch.rand(8, 1, 4, 4)
        gate = convert(ann, 128, data=x, calibration=Max(), maxpool=Gated())
        assert len(sites(gate.snn)) == 2  # four where the pool moves before the neurons
        assert torch.allclose(gate.snn(x), ann(x), rtol=0.05, atol=0.1)

    def test_spikes_that_pass_count_as_spikes(self) -> None:
        _, conversion, x = converted(Gated(), 16)
        third = evaluate(conversion.snn, [x]).layers[2]
        steps = per_step(conversion.snn, x)
        assert steps.shape == (16, 32, 3)
        assert third.macs == 0
        assert 0 < third.accumulates < 16 * third.ann_macs
        _, averaged, _ = converted(AveragePool(), 16)
        assert evaluate(averaged.snn, [x]).layers[2].accumulates == 0

    def test_values_of_several_thresholds_do_not(self) -> None:
        _, conversion, x = converted(Gated(), 4, neuron=LMH(granularity=PerStep()))
        assert evaluate(conversion.snn, [x]).layers[2].accumulates == 0

        class Sums(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), nn.Linear(32, 3)

            def forward(self, x: Tensor) -> Tensor:
                y = F.relu(self.a(x))
                z = F.max_pool2d(y + F.relu(self.b(y)), 2)
                return self.c(F.relu(self.b(z)).flatten(1))

        last = evaluate(convert(Sums(), 4, data=x, maxpool=Gated()).snn, [x]).layers
        assert [layer.accumulates > 0 for layer in last] == [False, True, False, False]

    @pytest.mark.parametrize("maxpool", TYPES)
    def test_slices_make_one_run(self, maxpool: MaxPool) -> None:
        _, conversion, x = converted(maxpool, 8)
        snn = conversion.snn
        whole = per_step(snn, x)
        with carry_state(snn):
            slices = [per_step(snn, x, steps=k) for k in (3, 1, 4)]
        assert torch.equal(torch.cat(slices), whole)
        assert torch.equal(per_step(snn, x), whole)

    def test_another_batch_inside_a_block_is_refused_by_the_gate(self) -> None:
        ann = nn.Sequential(nn.Conv2d(1, 2, 1), nn.MaxPool2d(2), nn.ReLU())
        frames = torch.rand(2, 3, 1, 4, 4)
        snn = convert(ann, 2, data=[frames], maxpool=Gated(), encoding=EventFrames()).snn
        with carry_state(snn):
            snn(frames)
            with pytest.raises(StateError, match=r"max-pool's input .*; expected the same. Open a new carry_state"):
                snn(frames[:, :2])

    @pytest.mark.parametrize("maxpool", TYPES)
    def test_save_load_copy_and_pickle(self, maxpool: MaxPool, tmp_path: Path) -> None:
        ann, conversion, x = converted(maxpool, 4)
        expected = conversion.snn(x)
        save(conversion, tmp_path / "a.safetensors")
        again = load(tmp_path / "a.safetensors", source=ann)
        assert torch.equal(again(x), expected)
        assert again.meta["lmh_manifest"]["recipe"]["maxpool"] == {"type": type(maxpool).__name__}
        assert torch.equal(copy.deepcopy(conversion.snn)(x), expected)
        buffer = io.BytesIO()
        torch.save(conversion.snn, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)

    def test_an_older_file_has_its_max_pools_before_the_neurons(self, tmp_path: Path) -> None:
        ann, conversion, x = converted(BeforeNeuron(), 4)
        path = save(conversion, tmp_path / "old.safetensors")
        tensors, manifest = read_snn(path)
        del manifest["recipe"]["maxpool"]
        write_snn(path, tensors, manifest)
        assert torch.equal(load(path, source=ann)(x), conversion.snn(x))

    @pytest.mark.parametrize("maxpool", TYPES)
    def test_training_through_it(self, maxpool: MaxPool) -> None:
        ann, conversion, x = converted(maxpool, 4)
        snn, y = conversion.snn, ann(x).argmax(1)
        snn.train()
        snn(x).square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in snn.parameters())
        history = finetune(snn, [(x, y)] * 4, epochs=4, teacher=ann)
        assert history[-1].loss < history[0].loss

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_to_another_dtype(self, dtype: torch.dtype) -> None:
        _, conversion, x = converted(Gated(), 4)
        out = conversion.snn.to(dtype)(x.to(dtype))
        assert out.dtype == dtype
        assert torch.isfinite(out).all()

    @pytest.mark.device
    @pytest.mark.parametrize("maxpool", TYPES)
    def test_on_meta(self, maxpool: MaxPool) -> None:
        ann, conversion, x = converted(maxpool, 4)
        given_ = {"calibration": conversion.calibration, "maxpool": maxpool}
        snn = convert(ann.to("meta"), 4, example_input=x.to("meta"), **given_).snn
        per_step(snn.train(), x.to("meta")).sum().backward()
        with carry_state(snn.eval()):
            assert snn(x.to("meta")).device.type == snn(x.to("meta")).device.type == "meta"

    def test_exports(self, tmp_path: Path) -> None:
        _, conversion, x = converted(Gated(), 2)
        expected = conversion.snn(x)
        export_pt2(conversion, tmp_path / "a.pt2")
        assert torch.equal(torch.export.load(tmp_path / "a.pt2").module()(x), expected)
        export_onnx(conversion, tmp_path / "a.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
        assert torch.allclose(torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), expected, atol=1e-5)
        with pytest.raises(
            ArtifactError, match=r"time\.Accumulate: Accumulate has no NIR node; convert with --maxpool before"
        ):
            export_nir(conversion, tmp_path / "a.nir", Project())

    @pytest.mark.slow
    def test_torch_compile_gives_the_same(self) -> None:
        _, conversion, x = converted(Gated(), 4)
        snn = conversion.snn.double()
        assert torch.allclose(torch.compile(snn)(x.double()), snn(x.double()), atol=1e-12)


class TestCommand:
    """``lmh-convert --maxpool``."""

    DATA = ("--data", "digits", "--input-size", "1,8,8", "--mean", "0.5", "--std", "0.5", "--calibration-samples", "64",
            "--test-samples", "40", "--json")  # fmt: skip

    @pytest.fixture
    def file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        monkeypatch.chdir(tmp_path)
        torch.manual_seed(0)
        layers = (nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.MaxPool2d(2))
        torch.save(nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 10)).eval(), "net.pt")
        return "net.pt"

    @pytest.mark.parametrize("name", NAMES)
    def test_the_name_is_the_type(self, file: str, name: str) -> None:
        result = succeed("convert", file, "-T", 4, "--maxpool", name, *self.DATA).result
        snn = load(result["output"], source=file)
        kind = type(MAXPOOLS.get(name, WhereExact())).__name__
        assert snn.meta["lmh_manifest"]["recipe"]["maxpool"]["type"] == kind
        assert any(isinstance(module, Accumulate) for module in snn.modules()) == (name in ("gated", "auto"))
        assert any(isinstance(module, nn.AvgPool2d) for module in snn.modules()) == (name == "average")
        notices = " ".join(result["notices"])
        assert ("--maxpool gated" in notices) == (name == "before")
        assert ("became average pools" in notices) == (name == "average")

    @pytest.mark.parametrize("name", NAMES)
    def test_a_dry_run_uses_it(self, file: str, name: str) -> None:
        found = succeed("convert", file, "-T", 4, "--maxpool", name, "--dry-run", *self.DATA).result
        fates = {node["path"]: node["fate"] for node in found["fates"]}
        assert fates["4"] == ("averaged" if name == "average" else "unchanged")

    def test_the_advice_of_an_audit_works(self, file: str) -> None:
        layers = (nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AvgPool2d(1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10))
        torch.save(nn.Sequential(*layers).eval(), file)
        call = ("convert", file, "-T", 4, "--dry-run", *self.DATA)
        succeed(*call)
        refused = command(*call, "--maxpool", "before")
        assert refused.status == 1
        assert "pass --maxpool gated or average" in refused.result["problems"][0]
        for name in ("gated", "average"):
            succeed(*call, "--maxpool", name)

    def test_help_says_what_each_means(self) -> None:
        shown = " ".join(succeed("convert", "--help").out.split())
        for part in (
            "[auto|before|average|gated]",
            "before: the maximum of the currents",
            "gated: behind them",
            "average:",
        ):
            assert part in shown
        status, _, err = command("convert", "net.pt", "-T", 4, "--maxpool", "max")
        assert status == 2
        assert "'max' is not one of 'auto', 'before', 'average', 'gated'" in err


@pytest.mark.slow
def test_squeezenet_needs_the_gate() -> None:
    """Three max-pools behind layers of spikes: before the neurons the answers have nothing to do with the ANN's."""
    torch.manual_seed(0)
    x = F.interpolate(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)), size=64, mode="bilinear")
    ann = torchvision().models.squeezenet1_1(weights=None).eval()
    expected = ann(x)

    def correlation(maxpool: MaxPool) -> float:
        with torch.no_grad():
            got = convert(ann, 64, data=x, maxpool=maxpool).snn(x)
        pair = [(value - value.mean(0)).flatten() for value in (got, expected)]
        return float(torch.corrcoef(torch.stack(pair).detach())[0, 1])

    assert correlation(BeforeNeuron()) < 0.3
    assert correlation(Gated()) > 0.9
    assert correlation(WhereExact()) > 0.9
