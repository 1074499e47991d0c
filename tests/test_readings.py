"""What later readings found in training, calibration and conversion: each once broken, now held."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import click
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from commands import command, succeed
from lmh import evaluate, prefixes, sites, zoo
from lmh.calibrate import MinError, Reconstruction, WeightRegression
from lmh.calibrate.corrections import _Search
from lmh.calibrate.histogram import Histogram
from lmh.calibrate.simulation import mean_threshold
from lmh.convert import convert, load, prepare, refine, save
from lmh.convert.export import export_onnx, export_pt2
from lmh.convert.storage import load_conversion
from lmh.errors import ArgumentError, ArtifactError, AuditError, TrainingError
from lmh.finetune import STBP, Checkpoint, Hybrid, JSONLines, LabelFree, Schedule, TensorBoard, distill, finetune, fit
from lmh.finetune.cli_recipe import Wishes
from lmh.finetune.fresh import with_statistics
from lmh.finetune.label_free import Unlabelled
from lmh.spiking import LMH, PerChannel, PerStep, SpikingSite
from lmh.time_axis import TimeAxis

MLP = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))  # noqa: E731
X, Y = torch.rand(64, 4, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
PLAIN = Schedule(epochs=1, distillation=None)


def test_statistics_of_weights_that_count_no_batches_stay() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    assert with_statistics(net, [X]) is not net  # as it was built
    net[1].running_var.mul_(2)
    assert int(net[1].num_batches_tracked) == 0
    assert with_statistics(net, [X]) is net


def test_what_was_named_before_finetuning_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    common = ("zoo:digits-cnn", "-T", 1, "--data", "digits", "--finetune", 3, "--train-samples", 64)
    options = {"plain": (), "named": ("--calibration", "max", "--correct", "biases")}
    trained = {}
    for name, more in options.items():
        command("convert", *common, *more, "--output", f"{name}.safetensors", "--test-samples", 32, "--json")
        snn = load(f"{name}.safetensors")
        trained[name] = snn.meta["lmh_manifest"]["training"]["strategy"]["type"]
    assert trained == {"plain": "Hybrid", "named": "STBP"}
    refused = command("convert", "zoo:digits-cnn", "-T", 1, "--data", "digits", "--calibration", "max", "--distill", 1)
    assert "so that --calibration would not count" in " ".join(refused.err.split())


def test_a_loader_with_a_generator_of_its_own_is_resumed_exactly(tmp_path: Path) -> None:
    def trained(epochs: tuple[int, ...], file: str) -> dict[str, Tensor]:
        for stop in epochs:
            torch.manual_seed(0)
            net, own = MLP(), torch.Generator().manual_seed(5)
            loader = DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True, generator=own)
            leave = Mock(side_effect=[None] * (stop - 1) + [KeyboardInterrupt if stop < 3 else None])
            with contextlib.suppress(KeyboardInterrupt):
                fit(
                    net, loader, None, Schedule(epochs=3, distillation=None), checkpoint=tmp_path / file, on_epoch=leave
                )
        return net.state_dict()

    whole, broken = trained((3,), "whole"), trained((1, 3), "broken")
    assert all(torch.equal(value, broken[name]) for name, value in whole.items())


def test_another_teacher_is_another_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    nets, data = [MLP(), MLP()], [(X, Y)]
    start = MLP().state_dict()
    schedule = Schedule(epochs=1)

    def run(teacher: nn.Module | None) -> None:
        net = MLP()
        net.load_state_dict(start)
        fit(net, data, None, schedule, teacher=teacher, checkpoint=Checkpoint(tmp_path / "run"))

    run(nets[0])
    run(nets[0])
    for other in (nets[1], None):
        with pytest.raises(TrainingError, match=r"other settings, data, teacher .*\(its teacher differs\)"):
            run(other)


def test_a_refused_run_leaves_the_recipe_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(zoo.snn_path("digits-cnn-t4"), "snn.safetensors")
    words = (
        "finetune",
        "snn.safetensors",
        "--data",
        "digits",
        "--epochs",
        1,
        "--train-samples",
        64,
        "--test-samples",
        8,
    )
    succeed(*words, "--resume", "run", "--output", "a.safetensors")
    begun = Path("run/recipe.toml").read_bytes()
    Path("run/run.training").write_bytes(b"a checkpoint")
    assert command(*words, "--resume", "run", "--lr", 0.5, "--output", "b.safetensors").status != 0
    assert Path("run/recipe.toml").read_bytes() == begun


def test_without_distillation_there_is_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("finetune", "zoo:digits-cnn", "-T", 1, "--data", "digits", "--epochs", 1, "--train-samples", 64,
             "--test-samples", 8, "--no-teacher")  # fmt: skip
    succeed(*words, "--output", "a.safetensors")
    assert load("a.safetensors").meta["lmh_manifest"]["teacher"] is None
    refused = command(*words, "--teacher", "zoo:digits-cnn", "--output", "b.safetensors")
    assert "--teacher zoo:digits-cnn came with a recipe without distillation" in " ".join(refused.err.split())


def test_a_seed_reaches_the_training_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(zoo.snn_path("digits-cnn-t4"), "snn.safetensors")
    words = ("finetune", "snn.safetensors", "--data", "digits", "--train-samples", 64, "--test-samples", 8)
    succeed(*words, "--epochs", 1, "--seed", 3, "--save-recipe", "r.toml", "--output", "a.safetensors")
    for more, seed in (((), 3), (("--seed", 7), 7)):
        succeed(*words, "--recipe", "r.toml", *more, "--output", "b.safetensors")
        manifest = load("b.safetensors").meta["lmh_manifest"]
        assert (manifest["seed"], manifest["training"]["schedule"]["seed"], manifest["epochs"]) == (seed, seed, 1)


def test_a_hybrid_without_room_for_its_stage_is_refused() -> None:
    wishes = Wishes(epochs=2, strategy="hybrid")
    batches = zoo.Batches(zoo.load_data("digits").train, zoo.card("digits-cnn").preprocessing)
    for spiking, words in (
        (False, "has no room for its QCFS stage in --epochs 2"),
        (True, "the network spikes already"),
    ):
        with pytest.raises(click.UsageError, match=words):
            wishes.recipe_for(spiking=spiking, batches=batches, seed=0)


def test_thresholds_by_channel_are_not_averaged_over_channels() -> None:
    neurons, theta = LMH(granularity=PerChannel()), torch.linspace(-1, 1, 8)
    snn = convert(MLP(), 2, data=X, calibration=MinError(), neuron=neurons).snn
    (site,) = (module for module in snn.modules() if isinstance(module, SpikingSite))
    with torch.no_grad():
        site.raw_threshold.copy_(theta)
    assert torch.equal(mean_threshold(site), site.v_threshold)


def test_frozen_weights_stay_in_a_reconstruction() -> None:
    net = MLP().requires_grad_(False)
    made = refine(convert(net, 2, data=X), X, reconstruction=Reconstruction(steps=3))
    assert evaluate(made.snn, X).samples == 64


def test_a_mask_may_be_infinite_in_training() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.register_buffer("mask", torch.tensor([0.0, 0.0, -torch.inf]))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.mask

    assert len(fit(Masked(), [(X, Y % 2)], None, PLAIN)) == 1


@pytest.mark.parametrize("values", [{"clip_norm": 0.0}, {"clip_norm": -5.0}, {"momentum": 1.0}, {"weight_decay": -1.0}])
def test_settings_that_train_nothing_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(values))):
        Schedule(epochs=1, **values)  # type: ignore[arg-type]


def test_what_cannot_end_well_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    seen: list[object] = []

    class Watched(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return super().forward(x)

    for options, words in (
        ({"checkpoint": tmp_path / "nowhere" / "run"}, "cannot be written"),
        ({"val": [X]}, "validation batches have no labels"),
    ):
        with pytest.raises((ArtifactError, TrainingError), match=words):
            fit(Watched(nn.Linear(4, 3)), [(X, Y)], schedule=PLAIN, **{"val": None, **options})  # type: ignore[arg-type]
    for kind in (JSONLines, TensorBoard):
        with pytest.raises(ArgumentError, match=f"{kind.__name__}: every is 0"):
            kind(tmp_path / "log", every=0)
    assert not seen


def test_three_vectors_are_not_an_image() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = MLP()

        def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return self.body(a + b + c)

    conversion = convert(Three(), 2, data=[(X, X, X)])
    assert distill(conversion, [(X, X, X)], LabelFree(epochs=1, qcfs_epochs=1, corrections=())).report.timesteps == 2
    assert (
        len(Unlabelled(zoo.Batches(zoo.load_data("digits").train, zoo.card("digits-cnn").preprocessing), 1).at_epoch(0))
        > 1
    )


def test_values_of_every_step_are_not_searched_as_those_of_channels() -> None:
    site = SpikingSite(TimeAxis(8), torch.tensor(1.0), torch.tensor(0.5), LMH(granularity=PerStep()))
    search = _Search(site, torch.rand(8, 32, 8), torch.rand(32, 8))
    before = site.raw_lambda_s.detach().clone()
    with torch.no_grad():
        search.over("raw_lambda_s", lambda best: [best + 0.5, best - 0.5])
    assert torch.equal(site.raw_lambda_s, before)


def test_values_that_vanish_count_as_zero() -> None:
    histogram = Histogram.empty(1, torch.device("cpu"))
    histogram.add(torch.full((4, 1), 1e-43))
    assert int(histogram.counts.sum()) == 0


def test_a_loader_that_cuts_rows_itself_is_refused() -> None:
    data = TensorDataset(X, Y)
    loader = DataLoader(data, batch_size=16, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    with pytest.raises(ArgumentError, match=r"Leave out the DistributedSampler"):
        finetune(MLP(), loader, timesteps=2, strategy=STBP(), schedule=PLAIN)


def test_a_conversion_without_its_ann_is_not_corrected() -> None:
    bare, batches = load_conversion("zoo:digits-cnn-t4"), [torch.rand(8, 1, 8, 8)]
    for attempt in (
        lambda: refine(bare, batches, corrections=[WeightRegression()]),
        lambda: distill(bare, batches, LabelFree(epochs=1)),
    ):
        with pytest.raises(ArgumentError, match=r"loaded without the weights of its ANN.*load_conversion"):
            attempt()


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.a, self.b, self.factor = nn.Linear(4, 8), nn.Linear(8, 3), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x) * self.factor))


def test_a_source_that_computes_with_other_numbers_is_refused(tmp_path: Path) -> None:
    save(convert(Scaled(2.0), 2, data=X), tmp_path / "net.safetensors")
    load(tmp_path / "net.safetensors", source=Scaled(2.0))
    with pytest.raises(ArtifactError, match="gives another graph than the file was made from"):
        load(tmp_path / "net.safetensors", source=Scaled(0.1))


def test_an_export_never_takes_the_place_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    twice = command("convert", "zoo:digits-cnn", "-T", 2, "--export", "nir", "--export", "nir-project")
    assert "digits-cnn-snn-T2.nir would be written twice" in twice.err
    for name in ("net.pt2", "net-v1.5"):
        succeed("convert", "zoo:digits-cnn", "-T", 2, "--output", name, "--export", "pt2")
        assert len(sites(load(name))) == 4
        assert Path(f"{name}.pt2").is_file()


class PreActivation(nn.Module):
    """One in-place ReLU for several places, whose input goes on as its output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(self.relu(x + 0))
        y = self.second(self.relu(x))
        x = x + y
        return self.relu(x)


def test_an_in_place_module_may_be_called_again() -> None:
    net = PreActivation()
    assert len(prepare(net, (4,)).spiking) == 3


def test_answers_of_one_number_are_exported(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))
    assert export_pt2(convert(net, 2, data=X), tmp_path / "net.pt2").file.is_file()


def test_an_activation_without_channels_is_refused() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.b(F.relu(self.a(x))).squeeze(-1))

    with pytest.raises(AuditError, match=r"works on \[N\]; expected \[N, …\]. Put the squeeze behind it"):
        convert(Late(), 2, data=X)


@pytest.mark.parametrize("name", ["graph", "meta", "code", "recompile", "time"])
def test_names_that_a_graph_has_for_itself_are_refused(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            setattr(self, name, nn.Parameter(torch.zeros(4)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.layer(x) + getattr(self, name))

    with pytest.raises(ArgumentError, match=rf"{name}: a part of the network has this name"):
        convert(Named(), 2, data=X)


@pytest.mark.parametrize("end", [lambda y: torch.sigmoid(y).squeeze(1), lambda y: y.softmax(1)[:, 0]])
def test_a_readout_may_be_reshaped(end: Callable[[Tensor], Tensor]) -> None:
    class Binary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return end(self.b(F.relu(self.a(x))))

    net = Binary().eval()
    snn = convert(net, 64, data=X).snn
    with torch.no_grad():
        assert snn(X).shape == (64,)
        assert torch.allclose(snn(X), net(X), atol=0.05)
        assert torch.allclose(prefixes(snn, X)[-1], snn(X), atol=1e-6)


def test_what_onnxruntime_cannot_run_is_not_written(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).double()
    conversion = convert(net, 2, data=torch.rand(4, 1, 4, 4, dtype=torch.float64))
    with pytest.raises(ArtifactError, match=r"not written, as onnxruntime .* cannot run it"):
        export_onnx(conversion, tmp_path / "net.onnx")


def test_quantised_and_unfinished_layers_are_named() -> None:
    quantised = torch.ao.quantization.quantize_dynamic(MLP(), {nn.Linear})
    with pytest.raises(AuditError, match=r"is quantised; expected floating weights"):
        prepare(quantised, (4,))
    with pytest.raises(ArgumentError, match=r"0.weight: has no shape yet"):
        convert(nn.Sequential(nn.LazyLinear(4), nn.ReLU()), 2, data=X)


def test_an_argument_named_as_an_activation_is_no_activation() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.r = nn.Linear(4, 4), nn.ReLU()

        def forward(self, r: Tensor) -> Tensor:
            return self.r(self.layer(r))

    assert convert(Named(), 2, data=X).prepared.spiking == ["r"]


def test_hybrid_leaves_frozen_weights() -> None:
    net = MLP().requires_grad_(False)
    tuned = finetune(net, [(X, Y)], timesteps=2, strategy=Hybrid(PLAIN), schedule=PLAIN)
    assert torch.equal(tuned.snn.get_parameter("0.weight"), net[0].weight)
