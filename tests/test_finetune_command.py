"""``lmh finetune``: from an ANN, from a spiking network, by every strategy; recipes, resuming, wrong use."""

from __future__ import annotations

import json
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import command, interrupted_at_epoch, succeed
from lmh import convert, evaluate, sites, zoo
from lmh.artifact import read_snn
from lmh.finetune import (
    EMA,
    SLTT,
    STBP,
    TET,
    WIDER,
    BFloat16,
    CrossEntropy,
    CutMix,
    Distillation,
    EarlyStopping,
    EverySlice,
    Float32,
    Hybrid,
    Mixup,
    OncePerBatch,
    Progressive,
    Recompute,
    Schedule,
    TimeSliced,
)
from lmh.finetune.recipe import TrainingRecipe, read_recipe, toml, write_recipe
from lmh.normalisation import StepScale
from lmh.resets import AttachedReset, DetachedReset
from lmh.spiking import LIF, LMH, PerChannel, PerStep
from lmh.zoo import Batches, CropFlip, Cutout, InTurn

FAST = ("--data", "digits", "--train-samples", 64, "--test-samples", 40, "--calibration-samples", 64)
ANN = ("zoo:digits-cnn", "-T", 2)


def tuned(*arguments: object) -> dict[str, Any]:
    return succeed("finetune", *arguments, *FAST, "--json").result


def recipe_of(file: str | Path) -> TrainingRecipe:
    return read_recipe(str(file))


def same(first: str | Path, second: str | Path) -> bool:
    a, b = (read_snn(Path(file))[0] for file in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("hybrid")
    with chdir(folder):
        result = tuned(*ANN, "--epochs", 3, "--save-recipe", "recipe.toml", "--log", "run.jsonl")
    return folder, result


class TestAnANN:
    def test_the_result_shows_every_stage(self, hybrid: tuple[Path, dict[str, Any]]) -> None:
        folder, result = hybrid
        assert (result["source"], result["timesteps"], result["calibration"]) == (
            "zoo:digits-cnn", 2, "taken over from QCFS, 64 samples"
        )  # fmt: skip
        [stage] = result["stages"]
        assert stage["name"] == "after QCFS"
        for figures in (result, result["training_free"], stage):
            assert len(figures["snn_accuracy"]) == 2
            assert 0.5 < figures["ann_accuracy"] <= 1
        assert result["output"] == "digits-cnn-snn-T2.safetensors"
        assert sorted(path.name for path in folder.iterdir()) == [
            "digits-cnn-snn-T2.safetensors", "recipe.toml", "run.jsonl"
        ]  # fmt: skip

    def test_the_file_loads_and_gives_the_figures(self, hybrid: tuple[Path, dict[str, Any]]) -> None:
        folder, result = hybrid
        snn = convert.load(folder / result["output"])
        test = zoo.load_data("digits").test
        batches = Batches(test, zoo.card("digits-cnn").preprocessing, indices=zoo.seeded_order(test, 0)[:40])
        assert list(evaluate(snn, batches).snn_accuracy or ()) == result["snn_accuracy"]

    def test_the_manifest_holds_recipe_and_history(self, hybrid: tuple[Path, dict[str, Any]]) -> None:
        folder, result = hybrid
        manifest = read_snn(folder / result["output"])[1]
        recipe = recipe_of(folder / result["output"])
        assert isinstance(recipe.strategy, Hybrid)
        assert (recipe.strategy.qcfs.epochs, recipe.schedule.epochs, recipe.epochs) == (1, 2, 3)
        assert (recipe.batch_size, recipe.augmentation) == (32, CropFlip(1, False))
        assert recipe == read_recipe(str(folder / "recipe.toml"))
        assert [(stage["stage"], len(stage["epochs"])) for stage in manifest["history"]] == [("QCFS", 1), ("STBP", 2)]
        assert manifest["metrics"]["stages"] == result["stages"]
        assert manifest["teacher"] == "zoo:digits-cnn"
        assert manifest["history"][-1]["epochs"][-1]["neurons"].keys() == set(manifest["sites"])

    def test_the_log_has_both_stages(self, hybrid: tuple[Path, dict[str, Any]]) -> None:
        lines = [json.loads(line) for line in (hybrid[0] / "run.jsonl").read_text().splitlines()]
        assert [(line["stage"], line["epoch"]) for line in lines if line["event"] == "epoch"] == [
            ("QCFS", 0), ("STBP", 0), ("STBP", 1)
        ]  # fmt: skip

    @pytest.mark.parametrize("name", ["recipe.toml", "digits-cnn-snn-T2.safetensors"])
    def test_a_recipe_is_replayed_to_the_last_digit(self, hybrid: tuple[Path, dict[str, Any]], name: str) -> None:
        folder, result = hybrid
        again = tuned(*ANN, "--recipe", folder / name)
        assert {**again, "notices": None} == {**result, "notices": None}
        assert same(folder / result["output"], again["output"])

    def test_tables_are_printed(self) -> None:
        printed = succeed("finetune", *ANN, "--epochs", 3, *FAST)
        for words in ("SNN, training-free", "ANN, after QCFS", "SNN, after QCFS", "SNN, fine-tuned", "Written:"):
            assert words in printed.out
        for words in ("QCFS epoch 1 of 1", "epoch 2 of 2", "images/s", "MB"):
            assert words in printed.err


class TestASpikingNetwork:
    def test_it_is_trained_by_stbp_into_another_file(self, hybrid: tuple[Path, dict[str, Any]]) -> None:
        folder, result = hybrid
        file = folder / result["output"]
        before = file.read_bytes()
        again = tuned(file, "--epochs", 1)
        assert again["output"] == "digits-cnn-snn-T2-tuned.safetensors"
        assert file.read_bytes() == before
        assert not same(file, again["output"])
        assert (again["training_free"], again["timesteps"]) == (None, 2)
        assert [stage["name"] for stage in again["stages"]] == ["as loaded"]
        assert again["stages"][0]["snn_accuracy"] == result["snn_accuracy"]
        assert again["ann_accuracy"] == result["ann_accuracy"]
        assert read_snn(Path(again["output"]))[1]["source"]["architecture"] == "digits-cnn"

    def test_one_of_the_zoo(self) -> None:
        result = tuned("zoo:digits-cnn-t4", "--epochs", 1, "--strategy", "time-sliced", "--slice", 2)
        assert result["output"] == "digits-cnn-t4-tuned.safetensors"
        assert recipe_of(result["output"]).strategy == TimeSliced(2)

    def test_without_its_ann_it_learns_from_the_labels_and_says_so(self) -> None:
        torch.save(zoo.load("digits-cnn").state_dict(), "own.pt")
        first = command("convert", "own.pt", "-T", 2, *FAST[:2], "--test-samples", 20, "--json").result
        Path("own.pt").unlink()
        printed = succeed("finetune", first["output"], "--epochs", 1, *FAST)
        assert "There is no teacher: training learns from the labels alone." in printed.err


def wished(*options: object) -> TrainingRecipe:
    """The recipe of an ANN's training with these options; the training stops when it is written."""
    stopped = command("finetune", *ANN, *options, *FAST, "--save-recipe", "r.toml", "--log", "gone/x")
    assert "the log cannot be written" in stopped.err
    return read_recipe("r.toml")


class TestTheOptions:
    @pytest.mark.parametrize(
        ("options", "strategy"),
        [
            (("--strategy", "progressive"), Progressive()),
            (("--strategy", "progressive", "--leak", 0.25), Progressive(LMH(LIF(0.25)))),
            (("--strategy", "progressive", "--membrane", "step"), Progressive(LMH(LIF(), PerStep()))),
            (("--strategy", "progressive", "--membrane", "wider"), Progressive(LMH(LIF(), ranges=WIDER))),
            (("--strategy", "stbp", "--membrane", "step"), STBP(LMH(granularity=PerStep()))),
            (("--strategy", "sltt", "--membrane", "channel"), SLTT(LMH(granularity=PerChannel()))),
            (("--strategy", "time-sliced", "--slice", 1), TimeSliced(1, EverySlice())),
            (("--strategy", "time-sliced", "--slice", 1, "--accumulate"), TimeSliced(1, OncePerBatch())),
            (("--strategy", "sltt"), SLTT()),
            (("--strategy", "stbp", "--reset", "detached"), STBP(LMH(reset=DetachedReset()))),
            (("--strategy", "progressive", "--reset", "attached"), Progressive(LMH(LIF(), reset=AttachedReset()))),
        ],
        ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
    )  # fmt: skip
    def test_every_strategy_by_its_name(self, options: tuple[object, ...], strategy: object) -> None:
        assert wished(*options).strategy == strategy

    def test_hybrid_with_stages_of_their_own(self) -> None:
        recipe = wished("--strategy", "hybrid", "--epochs", 9, "--qcfs-epochs", 4, "--qcfs-lr", 0.004, "--lr", 0.002,
                        "--slice", 2, "--label-smoothing", 0.1, "--neuron-lr", 0.003,
                        "--membrane", "step")  # fmt: skip
        assert isinstance(recipe.strategy, Hybrid)
        assert recipe.strategy.then == TimeSliced(2, neuron=LMH(granularity=PerStep()))
        first, second = recipe.strategy.qcfs, recipe.schedule
        assert [(stage.epochs, stage.lr, stage.neuron_lr) for stage in (first, second)] == [
            (4, 0.004, 0.003), (5, 0.002, 0.003)
        ]  # fmt: skip
        assert first.loss == second.loss == CrossEntropy(0.1)

    def test_warm_up_of_each_stage(self) -> None:
        recipe = wished("--strategy", "hybrid", "--epochs", 3, "--warmup", 7, "--qcfs-warmup", 0)
        assert isinstance(recipe.strategy, Hybrid)
        assert (recipe.strategy.qcfs.warmup_steps, recipe.schedule.warmup_steps) == (0, 7)

    def test_features_are_distilled_in_both_stages(self) -> None:
        recipe = wished("--strategy", "hybrid", "--epochs", 3, "--distill-features", 0.5, "--temperature", 4)
        assert isinstance(recipe.strategy, Hybrid)
        expected = Distillation(temperature=4, features=0.5)
        assert recipe.strategy.qcfs.distillation == recipe.schedule.distillation == expected

    def test_time_norm_and_lambda_of_tet(self) -> None:
        result = tuned(*ANN, "--epochs", 1, "--strategy", "stbp", "--time-norm", "tebn", "--loss", "tet",
                       "--tet-lambda", 0, "--channels-last")  # fmt: skip
        recipe = recipe_of(result["output"])
        assert (recipe.schedule.loss, recipe.schedule.precision) == (TET(0), Float32(channels_last=True))
        snn = convert.load(result["output"])
        assert any(isinstance(module, StepScale) for module in snn.modules())

    def test_tet_is_the_spiking_networks_alone(self) -> None:
        recipe = wished("--strategy", "hybrid", "--epochs", 3, "--loss", "tet")
        assert isinstance(recipe.strategy, Hybrid)
        assert (recipe.strategy.qcfs.loss, recipe.schedule.loss) == (CrossEntropy(), TET())

    @pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bfloat16")
    def test_everything_that_a_schedule_holds(self) -> None:
        recipe = wished(
            "--strategy", "stbp", "--epochs", 7, "--lr", 0.1, "--neuron-lr", 0.2, "--warmup", 3, "--weight-decay", 0.3,
            "--batch-size", 16, "--loss", "tet", "--distill", 0.4, "--temperature", 3, "--mix", "mixup",
            "--mix", "cutmix", "--cutout", 4, "--ema", 0.9, "--early-stopping", 2, "--amp", "--seed", 5,
            "--recompute",
        )  # fmt: skip
        schedule = recipe.schedule
        assert (schedule.epochs, schedule.lr, schedule.neuron_lr, schedule.warmup_steps) == (7, 0.1, 0.2, 3)
        assert (schedule.weight_decay, schedule.loss, schedule.seed) == (0.3, TET(), 5)
        assert schedule.distillation is not None
        assert (schedule.distillation.weight, schedule.distillation.temperature) == (0.4, 3)
        assert (schedule.mixing, schedule.memory) == ((Mixup(), CutMix()), Recompute())
        assert (schedule.ema, schedule.early_stopping, schedule.precision) == (EMA(0.9), EarlyStopping(2), BFloat16())
        assert (recipe.batch_size, recipe.augmentation) == (16, InTurn((CropFlip(1, False), Cutout(4))))

    def test_a_device_without_bfloat16_carries_a_recipe_out_in_float32(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        write_recipe(TrainingRecipe(STBP(), Schedule(epochs=1, precision=BFloat16()), 32), Path("narrow.toml"))
        assert wished("--recipe", "narrow.toml").schedule.precision == Float32(channels_last=True)
        asked = command("finetune", *ANN, *FAST, "--epochs", 1, "--amp")
        assert "this cpu does not compute in bfloat16" in asked.err

    def test_no_teacher_is_part_of_the_recipe(self) -> None:
        recipe = wished("--no-teacher", "--epochs", 6)
        assert isinstance(recipe.strategy, Hybrid)
        assert recipe.schedule.distillation is recipe.strategy.qcfs.distillation is None

    def test_another_teacher(self) -> None:
        torch.save(zoo.load("digits-cnn").state_dict(), "teacher.pt")
        result = tuned(*ANN, "--epochs", 1, "--teacher", "teacher.pt")
        assert read_snn(Path(result["output"]))[1]["teacher"] == "teacher.pt"

    def test_progressive_training_starts_from_lif(self) -> None:
        result = tuned(*ANN, "--epochs", 1, "--strategy", "progressive")
        snn = convert.load(result["output"])
        assert {site.neuron.preset for site in sites(snn).values()} == {LIF(0.5)}
        assert result["stages"] == []
        assert result["training_free"]["snn_accuracy"]


class TestResuming:
    def test_a_killed_run_goes_on_and_gives_the_same(
        self, hybrid: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, result = hybrid
        begin = Batches.at_epoch
        calls = 0

        def killed(self: Batches, epoch: int) -> Batches:
            nonlocal calls
            calls += 1
            if epoch == 1:
                raise KeyboardInterrupt
            return begin(self, epoch)

        with monkeypatch.context() as patch:
            patch.setattr(Batches, "at_epoch", killed)
            assert command("finetune", *ANN, "--epochs", 3, *FAST).status == 130
        name = "digits-cnn-snn-T2.safetensors"
        assert sorted(path.name for path in Path().iterdir()) == [f"{name}-qcfs.training", f"{name}.training"]
        printed = succeed("finetune", *ANN, "--epochs", 3, *FAST, "--json")
        assert "STBP goes on from its checkpoint at epoch 2, batch 1." in printed.err
        assert printed.result["snn_accuracy"] == result["snn_accuracy"]
        assert same(folder / name, name)
        assert [path.name for path in Path().iterdir()] == [name]

    def test_a_run_has_a_folder_of_its_own(self, hybrid: tuple[Path, dict[str, Any]]) -> None:
        folder, result = hybrid
        arguments = ("finetune", *ANN, "--epochs", 3, *FAST, "--resume", "runs/a", "--output", "runs/a/net", "--json")
        with interrupted_at_epoch(1):
            first = command(*arguments)
        assert (first.status, "runs/a: there is no checkpoint yet" in first.err) == (130, True)
        files = ["log.jsonl", "recipe.toml", "run-qcfs.training", "run.training"]
        assert sorted(path.name for path in Path("runs/a").iterdir()) == files
        printed = command(*arguments)
        assert printed.result["snn_accuracy"] == result["snn_accuracy"]
        assert same(folder / "digits-cnn-snn-T2.safetensors", "runs/a/net")
        assert sorted(path.name for path in Path("runs/a").iterdir()) == ["log.jsonl", "net", "recipe.toml"]
        events = [json.loads(line)["event"] for line in Path("runs/a/log.jsonl").read_text().splitlines()]
        assert events.count("epoch") == 3
        assert read_recipe("runs/a/recipe.toml") == recipe_of("runs/a/net")


@pytest.mark.parametrize(
    ("status", "arguments", "words"),
    [
        (2, ANN, ["--data is missing"]),
        (2, ("zoo:digits-cnn", *FAST), ["-T is missing"]),
        (2, ("zoo:digits-cnn-t4", "-T", 4, *FAST), ["-T 4", "whose own T stays", "Leave it out"]),
        (2, (*ANN, *FAST, "--slice", 2), ["--slice goes with --strategy time-sliced"]),
        (2, (*ANN, *FAST, "--strategy", "time-sliced"), ["needs --slice K"]),
        (1, (*ANN, *FAST, "--strategy", "time-sliced", "--slice", 3), ["do not divide T = 2", "expected one of 1, 2"]),
        (2, (*ANN, *FAST, "--strategy", "hybrid", "--accumulate"), ["--accumulate goes with --slice"]),
        (2, (*ANN, *FAST, "--leak", 0.5), ["--leak goes with --strategy progressive"]),
        (2, (*ANN, *FAST, "--strategy", "stbp", "--qcfs-warmup", 0), ["--qcfs-warmup goes with --strategy hybrid"]),
        (2, (*ANN, *FAST, "--strategy", "hybrid", "--epochs", 3, "--qcfs-epochs", 3), ["leaves nothing of --epochs 3"]),
        (2, ("zoo:digits-cnn-t4", *FAST, "--strategy", "progressive", "--leak", 0.4), ["--leak is for an ANN"]),
        (2, (*ANN, *FAST, "--strategy", "sltt", "--reset", "attached"), ["--reset came with slices of one step"]),
        (2, (*ANN, *FAST, "--strategy", "hybrid", "--slice", 1, "--reset", "attached"), ["slices of one step"]),
        (2, ("zoo:digits-cnn-t4", *FAST, "--reset", "attached"), ["--reset is for an ANN"]),
        (2, (*ANN, *FAST, "--no-teacher", "--distill", 0.5), ["--no-teacher came with --distill"]),
        (2, (*ANN, *FAST, "--loss", "tet", "--label-smoothing", 0.1), ["--label-smoothing goes with --loss ce"]),
        (2, (*ANN, *FAST, "--recipe", "r.toml", "--lr", 0.1), ["--recipe r.toml decides", "--lr came with it"]),
        (1, (*ANN, *FAST, "--recipe", "gone.toml"), ["gone.toml: no such recipe"]),
        (1, ("gone.pt", "-T", 2, *FAST), ["gone.pt", "no such file"]),
        (2, (*ANN, "--data", "nothing"), ["'nothing'", "not known"]),
        (1, (*ANN, *FAST, "--output", "gone/x"), ["gone/x", "cannot be written"]),
        (2, (*ANN, *FAST, "--tet-lambda", 0.1), ["--tet-lambda goes with --loss tet"]),
        (2, ("zoo:digits-cnn-t4", *FAST, "--time-norm", "tebn"), ["--time-norm is for an ANN"]),
        (2, ("zoo:digits-cnn-t4", *FAST, "--distill-features", 1), ["--distill-features is for an ANN"]),
        (1, (*ANN, *FAST, "--resume", "/dev/null/run"), ["/dev/null/run: cannot be made", "Name another"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:60] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_wrong_use_says_what_to_do(status: int, arguments: tuple[object, ...], words: list[str]) -> None:
    printed = command("finetune", *arguments, "--json")
    assert (printed.status, list(printed.result)) == (status, ["error"])
    assert [word for word in words if word not in printed.result["error"]] == []
    assert not list(Path().glob("*.safetensors*"))


class TestRecipes:
    RECIPES = (
        TrainingRecipe(Hybrid(then=TimeSliced(2, OncePerBatch())), Schedule(epochs=3, clip_norm=None), 32, None),
        TrainingRecipe(
            Progressive.wider(0.25),
            Schedule(epochs=1, lr=1e-5, loss=TET(0.1), distillation=None, mixing=(Mixup(0.2), CutMix()), ema=EMA(0.99),
                     early_stopping=EarlyStopping(3), precision=BFloat16()),
            8,
            InTurn((CropFlip(), Cutout(4))),
        ),
    )  # fmt: skip

    @pytest.mark.parametrize("recipe", RECIPES, ids=["hybrid", "progressive"])
    def test_toml_gives_the_same_value_back(self, recipe: TrainingRecipe) -> None:
        write_recipe(recipe, Path("r.toml"))
        assert read_recipe("r.toml") == recipe
        assert TrainingRecipe.from_json(json.loads(json.dumps(recipe.to_json())), "json") == recipe

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("type = [", r"r\.toml: not TOML"),
            ('type = "Schedule"\nepochs = 3', r"r\.toml: no training recipe; expected type = "),
            ('type = "Nothing"', r"the type 'Nothing' is not known; expected types of lmh\.finetune, such as Hybrid"),
            ('type = "TrainingRecipe"\nspeed = 3', r"r\.toml: .*unexpected keyword argument 'speed'.*--save-recipe"),
            (
                toml({**RECIPES[0].to_json(), "batch_size": 0}),
                r"r\.toml: batch_size is 0; expected a whole number of at least 1",
            ),
        ],
        ids=["broken", "schedule", "type", "field", "value"],
    )
    def test_a_file_that_is_none_is_refused(self, text: str, message: str) -> None:
        Path("r.toml").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_recipe("r.toml")

    def test_a_network_that_was_not_trained_has_none(self) -> None:
        convert.save(convert.convert(zoo.load("digits-cnn"), 1, data=torch.rand(4, 1, 8, 8)), "plain.safetensors")
        with pytest.raises(ValueError, match="was not trained by a recipe"):
            read_recipe("plain.safetensors")


def test_help_shows_examples_that_can_be_copied() -> None:
    printed = succeed("finetune", "--help")
    lines = [line.strip() for line in printed.out.splitlines()]
    assert "lmh finetune zoo:digits-cnn -T 4 --data digits --epochs 10 --strategy hybrid" in lines
    assert "\\b" not in printed.out


def test_lmh_convert_finetune_is_the_same_machinery() -> None:
    by_convert = command("convert", *ANN, *FAST, "--finetune", 3, "--output", "a.safetensors", "--json").result
    by_finetune = tuned(*ANN, "--epochs", 3, "--output", "b.safetensors")
    assert {**by_convert, "output": None} == {**by_finetune, "output": None}
    assert same("a.safetensors", "b.safetensors")
    assert recipe_of("a.safetensors") == recipe_of("b.safetensors")
