"""Recipes of the zoo: each can be read, says what the paper says, trains what it names and writes its card."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from commands import command, interrupted_at_epoch, succeed
from lmh import zoo
from lmh.artifact import file_digest, read_snn, read_tensors, write_tensors
from lmh.convert import load
from lmh.convert.normalisation import NORMALISATIONS
from lmh.errors import ArgumentError, ArtifactError
from lmh.finetune import SLTT, STBP, Float32, Hybrid, Progressive, TimeSliced
from lmh.finetune.recipe import read_recipe as read_training
from lmh.records import plain_value
from lmh.zoo import train_cli
from lmh.zoo.images import Batches
from lmh.zoo.model_cards import SpikingCard, read_card_file
from lmh.zoo.recipe import RECIPES, Published, Recipe, read_recipe, recipe_names
from lmh.zoo.train_cli import training_of
from texts import ANN_RECIPE

SNN = """architecture = "digits-cnn"
data = "digits"
samples = 96
seed = 3
timesteps = 2
ann = "digits-cnn"

[training]
batch_size = 32
strategy = {type = "Hybrid", qcfs = {type = "Schedule", epochs = 1}}
schedule = {type = "Schedule", epochs = 1}
"""
HYBRID = '{type = "Hybrid", qcfs = {type = "Schedule", epochs = 1}}'
SCRATCH = SNN.replace('ann = "digits-cnn"\n', 'time_norm = "tebn"\n').replace(HYBRID, '{type = "Progressive"}')
FURTHER = SNN.replace('ann = "digits-cnn"', 'snn = "first"\nteacher = "digits-cnn"').replace(HYBRID, '{type = "STBP"}')
TABLES = {
    1: {95.62, 96.36, 92.92, 94.44, 78.58, 80.31, 81.65, 74.47, 78.71, 59.93, 60.37, 79.10, 67.80},
    2: {94.02, 87.56, 73.11, 57.12, 49.09},
    3: {95.42, 94.44, 74.38, 76.27, 77.35, 77.01, 78.21, 78.59},
}
"""Figures of Hao et al. 2024 that the zoo's architectures and data allow; of Table 3 those at the trained T."""

Written = Callable[[str, str], Path]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    """A recipe in a file, in the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> Path:
        path = tmp_path / f"{name}.toml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_whole(name: str) -> None:
    recipe = read_recipe(name)
    card, training = zoo.card(recipe.architecture), training_of(recipe)
    assert recipe.time_norm in NORMALISATIONS
    assert training.augmentation is not None
    if recipe.ann is not None:
        ann = read_recipe(recipe.ann)
        layers = recipe.architecture if recipe.timesteps is not None else recipe.architecture.partition("-qcfs")[0]
        assert (ann.architecture, ann.data, ann.timesteps) == (layers, recipe.data, None)
    elif recipe.snn is not None:
        snn = read_recipe(recipe.snn)
        assert (snn.architecture, snn.data, snn.timesteps) == (recipe.architecture, recipe.data, recipe.timesteps)
    else:
        assert recipe.timesteps is None or training.schedule.distillation is None  # there is no teacher
    if recipe.teacher is not None:
        assert training.schedule.distillation is not None
        assert read_recipe(recipe.teacher).data == recipe.data
    if recipe.timesteps is None:
        assert training.strategy == STBP()
    else:
        training.strategy.slice_steps(recipe.timesteps)
    assert card.name.startswith(("cifar10-", "digits-", "tinyimagenet-", "cifar10dvs-"))


@pytest.mark.parametrize("table", TABLES)
def test_every_row_of_the_paper_has_a_recipe(table: int) -> None:
    found = [r.published for name in recipe_names() if (r := read_recipe(name)).published is not None]
    assert {row.accuracy for row in found if row is not None and row.table == table} == TABLES[table]


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("cifar10-resnet18-t4", Hybrid),
        ("cifar10-resnet19-progressive-t4", Progressive),
        ("cifar10-resnet18-slices-2x3", TimeSliced),
        ("cifar10-resnet18-sltt-t6", SLTT),
    ],
)
def test_the_paper_s_ways_to_train(name: str, strategy: type) -> None:
    assert isinstance(training_of(read_recipe(name)).strategy, strategy)


def test_an_ann_is_trained_on_the_first_samples_of_the_seed(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor | None] = []
    begin = Batches.at_epoch

    def noted(self: Batches, epoch: int) -> Batches:
        seen.append(self.indices)
        return begin(self, epoch)

    monkeypatch.setattr(Batches, "at_epoch", noted)
    succeed("zoo", "train", written("quick", ANN_RECIPE), "--out", "out")
    chosen = seen[0]
    assert chosen is not None
    assert torch.equal(chosen, zoo.seeded_order(zoo.load_data("digits").train, 3)[:64])
    tensors, _ = read_tensors(tmp_path / "out" / "quick.safetensors")
    zoo.card("digits-cnn").build().load_state_dict(tensors)
    card = read_card_file(tmp_path / "out" / "quick.json")
    assert (card.name, card.architecture, card.num_classes) == ("quick", "digits-cnn", 10)
    assert (card.data, card.seed, card.samples, card.recipe["samples"]) == ("digits", 3, 360, 64)
    assert card.preprocessing == zoo.card("digits-cnn").preprocessing
    assert not list((tmp_path / "out").glob("*.training"))


@pytest.mark.parametrize(("name", "text"), [("an-ann", ANN_RECIPE), ("a-t2", SNN)])
def test_a_recipe_in_bfloat16_is_carried_out_in_float32_where_the_device_has_none(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    narrow = text.replace("epochs = 1", 'epochs = 1, precision = {type = "BFloat16"}')
    with monkeypatch.context() as without:
        without.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        done = succeed("zoo", "train", written(name, narrow), "--out", "out")
    assert done.err.count("bfloat16, which this device does not compute in") == 1
    card = read_card_file(tmp_path / "out" / f"{name}.json")
    wide = {"type": "Float32", "channels_last": True}
    assert card.recipe["training"]["schedule"]["precision"] == wide
    if isinstance(card, SpikingCard):
        trained = read_training(str(tmp_path / "out" / f"{name}.safetensors"))
        assert {schedule.precision for schedule in trained.schedules} == {Float32(channels_last=True)}
    for supported in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda answer=supported: answer)
        assert "Trained already" in succeed("zoo", "train", f"{name}.toml", "--out", "out").out


def test_a_spiking_network_starts_from_the_ann_beside_it_or_the_zoo_s(written: Written, tmp_path: Path) -> None:
    succeed("zoo", "train", written("own-ann", ANN_RECIPE), "--out", "out")
    own = written("own-t2", SNN.replace('ann = "digits-cnn"', 'ann = "own-ann"'))
    succeed("zoo", "train", own, "--out", "out")
    succeed("zoo", "train", written("zoo-t2", SNN), "--out", "out")
    again = succeed("zoo", "train", own, "--out", "out")
    assert "Trained already" in again.out
    succeed("zoo", "train", own, "--start", "zoo:digits-cnn", "--out", "given")
    cards = [read_card_file(tmp_path / place) for place in ("out/own-t2.json", "out/zoo-t2.json", "given/own-t2.json")]
    mine, theirs, given = cards
    assert all(isinstance(card, SpikingCard) for card in cards)
    assert mine.ann_accuracy != theirs.ann_accuracy == given.ann_accuracy
    assert isinstance(theirs, SpikingCard)
    assert (theirs.timesteps, len(theirs.accuracy or ()), theirs.samples) == (2, 2, 360)
    assert set(theirs.stages) == {"training-free", "after QCFS", "after QCFS, quantised ANN"}
    assert len(theirs.stages["after QCFS"]) == 2
    assert theirs.firing_rate
    assert theirs.energy
    assert (theirs.recipe["timesteps"], theirs.recipe["start"]) == (2, "digits-cnn")
    assert given.recipe["start"] == "zoo:digits-cnn"
    (published,) = succeed("zoo", "publish", "two=out/zoo-t2.safetensors", "--out", "r", "--json").result["models"]
    assert (published["name"], published["recipe"]["samples"], published["samples"]) == ("two", 96, 360)
    snn = load(tmp_path / "out" / "zoo-t2.safetensors")
    assert snn(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert read_training("out/zoo-t2.safetensors") == training_of(read_recipe("zoo-t2.toml"))


def test_a_spiking_network_goes_on_from_a_spiking_one(written: Written, tmp_path: Path) -> None:
    succeed("zoo", "train", written("first", SNN), "--out", "out")
    succeed("zoo", "train", written("second", FURTHER), "--out", "out")
    assert "Trained already" in succeed("zoo", "train", "second.toml", "--out", "out").out
    first, second = (read_card_file(tmp_path / "out" / f"{name}.json") for name in ("first", "second"))
    assert isinstance(first, SpikingCard)
    assert isinstance(second, SpikingCard)
    assert second.stages == {**first.stages, "as loaded": first.accuracy}
    assert (second.ann_accuracy, second.recipe["start"]) == (first.ann_accuracy, "first")
    history = [read_snn(tmp_path / "out" / f"{name}.safetensors")[1]["history"] for name in ("first", "second")]
    assert (len(history[0]), len(history[1])) == (2, 3)
    written("longer", FURTHER.replace("timesteps = 2", "timesteps = 4"))
    for arguments, words in (
        (("longer.toml",), "first.safetensors: is digits-cnn with 10 classes and T = 2; longer starts from digits-cnn "
                           "with 10 classes and T = 4"),
        (("second.toml", "--start", "zoo:digits-cnn", "--out", "odd"), "zoo:digits-cnn: is an ANN; expected a spiking"),
    ):  # fmt: skip
        assert words in " ".join(command("zoo", "train", "--out", "out", *arguments).err.split())


@pytest.mark.usefixtures("uncompiled")
def test_a_qcfs_network_starts_from_a_relu_network_and_a_spiking_one_from_it(written: Written, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8), np.arange(64) % 10
    np.savez("ten.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    of_cifar = ANN_RECIPE.replace('"digits"', '"cifar10"')
    relu = of_cifar.replace("digits-cnn", "cifar10-resnet20")
    qcfs = of_cifar.replace("digits-cnn", "cifar10-resnet20-qcfs4").replace(', distillation = "none"', ", lr = 1e-9")
    spiking = qcfs.replace("seed = 3", 'seed = 3\ntimesteps = 2\nann = "qcfs"\nteacher = "relu"')
    for name, text in (("relu", relu), ("qcfs", 'ann = "relu"\n' + qcfs), ("snn", spiking)):
        succeed("zoo", "train", written(name, text), "--data", "npz:ten.npz", "--out", "out")
    weights, taken = (read_tensors(tmp_path / "out" / f"{name}.safetensors")[0] for name in ("relu", "qcfs"))
    assert torch.allclose(taken["layer1.0.conv1.weight"], weights["layer1.0.conv1.weight"])
    thresholds = taken["layer1.0.relu1.base_threshold"]
    assert len(thresholds) == 16
    assert len(thresholds.unique()) > 8
    ann, snn = (read_card_file(tmp_path / "out" / f"{name}.json") for name in ("qcfs", "snn"))
    assert (ann.architecture, ann.recipe["start"]) == ("cifar10-resnet20-qcfs4", "relu")
    assert isinstance(snn, SpikingCard)
    assert set(snn.stages) == {"after QCFS", "after QCFS, quantised ANN"}
    assert snn.stages["after QCFS, quantised ANN"] == (ann.ann_accuracy,)
    assert read_snn(tmp_path / "out" / "snn.safetensors")[1]["teacher"] == str(Path("out") / "relu.safetensors")
    torch.save(zoo.card("cifar10-resnet20-a").build().state_dict(), "other.pt")
    written("again", 'ann = "relu"\n' + relu)
    missing = "do not fit: its layer2.0.shortcut.0.weight is missing; expected [32, 16, 1, 1]"
    for arguments, words in (
        (("again.toml", "--start", "out/relu.safetensors"), "CifarResNet: has no QCFS activation"),
        (("qcfs.toml", "--start", "other.pt"), missing),
        (("qcfs.toml", "--start", "zoo:digits-cnn"), "the weights of this DigitsCNN do not fit: its stem.0.weight is"),
    ):
        found = command("zoo", "train", *arguments, "--data", "npz:ten.npz", "--out", "odd")
        assert found.status != 0
        assert words in " ".join(found.err.split())


def test_without_an_ann_training_starts_from_random_weights(written: Written, tmp_path: Path) -> None:
    succeed("zoo", "train", written("scratch", SCRATCH), "--out", "out")
    card = read_card_file(tmp_path / "out" / "scratch.json")
    assert isinstance(card, SpikingCard)
    assert (card.ann_accuracy, card.stages, card.recipe["time_norm"]) == (None, {}, "tebn")
    manifest = read_snn(tmp_path / "out" / "scratch.safetensors")[1]
    assert manifest["recipe"]["normalisation"] is not None
    assert not (tmp_path / "out" / "scratch" / "untrained.safetensors").exists()


def test_what_is_there_is_not_trained_over(written: Written, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeed("zoo", "train", written("quick", ANN_RECIPE), "--out", out)
    before = file_digest(out / "quick.safetensors")
    refused = command("zoo", "train", written("quick", ANN_RECIPE.replace("seed = 3", "seed = 4")), "--out", out)
    assert "quick.json: is there already, and its seed is another; expected a network of this recipe" in refused.err
    (out / "quick.json").unlink()
    assert "without a card, and training would write over" in command("zoo", "train", "quick.toml", "--out", out).err
    assert file_digest(out / "quick.safetensors") == before


@pytest.mark.parametrize("text", [ANN_RECIPE, SNN], ids=["ANN", "SNN"])
def test_a_card_that_could_not_be_written_is_made_by_the_next_run(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    recipe, out = written("quick", text), tmp_path / "out"
    with monkeypatch.context() as full:
        full.setattr(train_cli, "write_atomically", Mock(side_effect=ArtifactError("no space left")))
        assert "no space left" in command("zoo", "train", recipe, "--out", out).err
    before = file_digest(out / "quick.safetensors")
    monkeypatch.setattr(train_cli, "train_snn", None)  # it was trained
    succeed("zoo", "train", recipe, "--out", out)
    card = read_card_file(out / "quick.json")
    assert card.weights.sha256 == file_digest(out / "quick.safetensors") == before
    assert card.ann_accuracy is not None
    if isinstance(card, SpikingCard):
        assert card.firing_rate
        assert card.energy
    assert not list(out.glob("**/*.training"))


def test_a_spiking_network_of_another_training_is_not_taken_for_its_own(written: Written, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeed("zoo", "train", written("quick", SNN), "--out", out)
    (out / "quick.json").unlink()
    other = written("quick", SNN.replace("epochs = 1}\n", "epochs = 2}\n"))
    assert "is there without a card and of another training" in command("zoo", "train", other, "--out", out).err


def test_a_qcfs_network_sees_the_images_as_its_relu_network_does(written: Written, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (64, 32, 32, 3)).astype(np.uint8)
    y = np.arange(64) % 10
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    own = replace(zoo.card("cifar10-resnet20").preprocessing, mean=(0.1, 0.2, 0.3))
    facts = {"preprocessing": plain_value(own)}
    write_tensors(tmp_path / "relu.safetensors", zoo.load("cifar10-resnet20").state_dict(), {"record": facts})
    text = ANN_RECIPE.replace('"digits-cnn"', '"cifar10-resnet20-qcfs4"').replace('"digits"', '"cifar10"')
    recipe = written("q", text.replace("seed = 3", 'seed = 3\nann = "cifar10-resnet20"'))
    succeed("zoo", "train", recipe, "--data", "npz:d.npz", "--start", "relu.safetensors", "--out", "out")
    card = read_card_file(tmp_path / "out" / "q.json")
    assert (card.preprocessing, card.data) == (own, "cifar10")


def test_a_broken_run_goes_on(written: Written, tmp_path: Path) -> None:
    recipe = written("quick", SNN.replace("epochs = 1}\n", "epochs = 2}\n"))
    succeed("zoo", "train", recipe, "--out", "whole")
    with interrupted_at_epoch(1):
        assert command("zoo", "train", recipe, "--out", "broken").status == 130
    done = succeed("zoo", "train", recipe, "--out", "broken")
    assert "goes on from its checkpoint" in done.err
    first, second = (read_tensors(tmp_path / folder / "quick.safetensors")[0] for folder in ("whole", "broken"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_what_is_missing_is_named(written: Written) -> None:
    written("orphan", SNN.replace('ann = "digits-cnn"', 'ann = "nobody"'))
    written("untaught", 'teacher = "nobody"\n' + SNN)
    written("taught", 'teacher = "digits-cnn"\n' + ANN_RECIPE)
    written("idle", 'teacher = "digits-cnn"\n' + SNN[:-2] + ', distillation = "none"}')
    written("confused", ANN_RECIPE.replace('"STBP"', '"SLTT"'))
    written("shy", ANN_RECIPE + "patience = 3\n")
    written("five", SNN)
    written("odd", 'time_norm = "batch"\n' + SNN)
    x, y = np.zeros((8, 8, 8), np.uint8), np.arange(8) % 5
    np.savez("five.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    for arguments, words in (
        (("odd.toml",), r"time_norm is 'batch'; expected one of plain, tebn, tdbn"),
        (("orphan.toml",), r"needs nobody, which is neither in out.*lmh zoo train nobody --data digits --out out"),
        (("untaught.toml",), r"untaught needs nobody, which is neither in out nor in the zoo"),
        (("idle.toml",), r"idle: has the teacher digits-cnn and no distillation; expected both or neither"),
        (("taught.toml",), r"an ANN has no teacher but the one it starts from"),
        (("confused.toml",), r"strategy is SLTT.*an ANN is trained by STBP"),
        (("shy.toml",), r"patience"),
        (("cifar10-resnet20",), r"--data is missing: cifar10-resnet20 is trained on cifar10.*--data cifar10:DIR"),
        (("digits-cnn", "--start", "x.pt"), r"--start x.pt came with a recipe that trains an ANN from random weights"),
        (("digit-cnn",), r"recipe 'digit-cnn' is not known; nearest: digits-cnn"),
        (("digits-cnn", "--data", "cifar10:x"), r"--data cifar10:x is not digits, which digits-cnn is trained on"),
        (("orphan.toml", "--data", "npz:none.npz"), r"none.npz: no such file"),
        (("five.toml", "--data", "npz:five.npz"), r"digits-cnn with 10 classes; five starts from digits-cnn with 5"),
    ):
        found = command("zoo", "train", *arguments, "--out", "out")
        assert found.status != 0
        assert re.search(words, " ".join(found.err.split())), found.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ANN_RECIPE.replace("seed = 3\n", ""), r"missing: seed; unknown: nothing; expected name, architecture"),
        ("patience = 3\n" + ANN_RECIPE, r"missing: nothing; unknown: patience"),
        (ANN_RECIPE + "\n[published]\ntable = 1\n", r"\[published\]: missing: method, accuracy"),
        ("= 3", r"not TOML"),
        (ANN_RECIPE.replace("seed = 3", 'seed = "x"'), r"seed is 'x'; expected a whole number of at least 0"),
        (SNN.replace("timesteps = 2", "timesteps = 0"), r"timesteps is 0; expected a whole number of at least 1"),
        (ANN_RECIPE.replace("samples = 64", "samples = true"), r"samples is True"),
        ("training = 3\n" + ANN_RECIPE.partition("[training]")[0], r"training is 3; expected a table"),
        ("published = 3\n" + ANN_RECIPE, r"\[published\]: is 3; expected a table"),
        (
            'ann = "digits-cnn"\n' + FURTHER,
            r"starts from the spiking network first; expected its timesteps",
        ),
        (ANN_RECIPE + '\n[published]\ntable = 4\nmethod = "x"\naccuracy = 50', r"expected table 1, 2 or 3"),
    ],
)
def test_another_form_is_refused(written: Written, text: str, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        read_recipe(str(written("odd", text)))


def test_a_name_that_no_file_can_have_is_refused(written: Written) -> None:
    with pytest.raises(ArgumentError, match=r"recipe 'my net': expected letters, digits"):
        read_recipe(str(written("my net", ANN_RECIPE)))


def test_the_seed_is_that_of_every_stage() -> None:
    recipe = replace(read_recipe("cifar10-resnet18-t4"), seed=7)
    training = training_of(recipe)
    assert isinstance(training.strategy, Hybrid)
    assert training.schedule.seed == training.strategy.qcfs.seed == 7


def test_a_recipe_is_shown() -> None:
    assert 'architecture: "cifar10-resnet18"' in succeed("zoo", "show", "cifar10-resnet18-slices-2x3").out.splitlines()
    assert succeed("zoo", "show", "cifar10-resnet18-t4", "--json").result["published"]["accuracy"] == 94.02


def test_recipes_are_values() -> None:
    first, second = read_recipe("cifar10-resnet20-t4"), read_recipe(str(RECIPES / "cifar10-resnet20-t4.toml"))
    assert first == second
    assert isinstance(first, Recipe)
    assert first.published == Published(table=2, method="LM-H", accuracy=87.56, ann=91.77, qcfs=83.75)
