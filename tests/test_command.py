"""The command line: what it prints, what it writes, and that a run can be repeated, reloaded and resumed."""

from __future__ import annotations

import subprocess
import sys
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from commands import Printed, command, succeed
from lmh import __version__, convert, evaluate, sites, zoo
from lmh.artifact import read_snn
from lmh.zoo.images import Batches

STEPS, SAMPLES = 3, 60
DATA = ("--data", "digits", "--calibration-samples", 64, "--test-samples", SAMPLES)
TUNED = ("--finetune", 2, "--train-samples", 200)
FIGURES = {"samples", "ann_accuracy", "snn_accuracy", "agreement", "output_error"}
OTHERS = (
    "source timesteps readout calibration training_free stages sites nodes spiking_coverage diagnosis energy output "
    "report exports failed_exports notices"
)
KEYS = FIGURES | set(OTHERS.split())
ZOO = ("zoo:digits-cnn", "-T", STEPS)
SITES = ["stem.2", "block.relu1", "block.relu2", "down.2"]
PROGRAMS = Path(sys.executable).parent


def converted(*options: object) -> Printed:
    """Convert the zoo's network in this folder, and print JSON."""
    return succeed("convert", *ZOO, *options, "--json")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@dataclass(frozen=True)
class Job:
    """A finished job: its folder, what it printed, and its file."""

    folder: Path
    printed: Printed
    file: Path


def _job(folder: Path, *options: object) -> Job:
    with chdir(folder):
        printed = converted(*options)
    return Job(folder, printed, folder / printed.result["output"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return _job(tmp_path_factory.mktemp("plain"), *DATA)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return _job(tmp_path_factory.mktemp("tuned"), *DATA, *TUNED)


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return _job(tmp_path_factory.mktemp("blind"))


@pytest.fixture(params=["plain", "tuned", "blind"])
def job(request: pytest.FixtureRequest) -> Job:
    return request.getfixturevalue(request.param)


def test_json_prints_one_object_with_every_key_and_nothing_else(job: Job) -> None:
    assert job.printed.out.count("\n") == 1
    result = job.printed.result
    assert set(result) == KEYS
    assert (result["source"], result["timesteps"]) == ("zoo:digits-cnn", STEPS)
    assert result["nodes"] == {"converted": SITES, "kept": [], "refused": []}
    assert [site["path"] for site in result["sites"]] == SITES
    for site in result["sites"]:
        assert site["channels"] in (24, 48)
        assert 0 < site["v_threshold_min"] <= site["v_threshold"] <= site["v_threshold_max"]
        assert "firing_rate" in site
    assert all(notice in job.printed.err for notice in result["notices"])


def test_the_figures_are_fractions_of_the_samples(plain: Job) -> None:
    result = plain.printed.result
    assert result["samples"] == SAMPLES
    assert len(result["snn_accuracy"]) == len(result["agreement"]) == STEPS
    for value in (result["ann_accuracy"], *result["snn_accuracy"], *result["agreement"]):
        assert 0 <= value <= 1
        assert value * SAMPLES == pytest.approx(round(value * SAMPLES))
    assert result["ann_accuracy"] > 0.9
    assert result["snn_accuracy"][-1] > 0.8
    assert all(0 < site["firing_rate"] < 1 for site in result["sites"])
    energy = result["energy"]
    assert energy["ratio"] == pytest.approx(energy["snn_pj"] / energy["ann_pj"])
    assert energy["synops"] > 0
    assert "pJ" in energy["assumptions"]
    assert result["training_free"] is None


def test_what_is_unknown_without_data_is_null_and_present(blind: Job) -> None:
    result = blind.printed.result
    assert {key for key, value in result.items() if value is None} == {
        *FIGURES, "training_free", "diagnosis", "energy", "report"
    }  # fmt: skip
    assert all(site["firing_rate"] is None for site in result["sites"])
    assert "BatchNormStatistics" in result["calibration"]
    assert any("No data was given" in notice for notice in result["notices"])


def test_fine_tuning_keeps_the_figures_from_before_it(tuned: Job) -> None:
    before, after = converted(*DATA, "--calibration", "minerror").result, tuned.printed.result
    assert after["training_free"] == {key: before[key] for key in FIGURES}
    assert after["ann_accuracy"] == before["ann_accuracy"]
    assert len(after["snn_accuracy"]) == STEPS
    assert after["snn_accuracy"][-1] > 0.8
    assert all(site["neuron"].startswith("LM-H") for site in after["sites"])
    assert all(site["neuron"] == "IF" for site in before["sites"])
    assert "epoch 2 of 2" in tuned.printed.err


def test_a_job_leaves_its_file_and_no_other(job: Job) -> None:
    assert [path.name for path in job.folder.iterdir()] == [f"digits-cnn-snn-T{STEPS}.safetensors"]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("zoo:digits-cnn", "digits-cnn-snn-T2.safetensors"),
        ("model.pt", "model-snn-T2.safetensors"),
        ("weights/run.3.pth", "run.3-snn-T2.safetensors"),
    ],
)
def test_the_default_output_is_named_after_the_source_and_lies_here(source: str, name: str) -> None:
    if not source.startswith("zoo:"):
        Path(source).parent.mkdir(exist_ok=True)
        torch.save(zoo.load("digits-cnn").state_dict(), source)
    printed = command("convert", source, "-T", 2, "--json")
    assert printed.result["output"] == name
    assert Path(name).is_file()


def test_output_names_the_file_and_replaces_an_older_one(blind: Job) -> None:
    Path("out").mkdir()
    Path("out/snn.bin").write_text("older")
    assert converted("--output", "out/snn.bin").result["output"] == "out/snn.bin"
    assert [path.name for path in Path("out").iterdir()] == ["snn.bin"]
    written, expected = (read_snn(path)[0] for path in (Path("out/snn.bin"), blind.file))
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert written.keys() == expected.keys()


def test_a_run_repeats_to_the_last_digit_under_its_seed(tuned: Job) -> None:
    again = converted(*DATA, *TUNED)
    assert again.result == tuned.printed.result
    first, second = (read_snn(path)[0] for path in (tuned.file, Path(tuned.file.name)))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_takes_other_samples(tuned: Job) -> None:
    other = converted(*DATA, *TUNED, "--seed", 1).result
    assert any("seed 1" in notice for notice in other["notices"])
    assert other["sites"] != tuned.printed.result["sites"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("max", "Max(per channel), 64 samples"),
        ("percentile", "Percentile(percent=99.9, per channel), 64 samples"),
        ("percentile:99", "Percentile(percent=99, per channel), 64 samples"),
        ("minerror", "MinError(levels_per_step=0.5, base_levels=2, per channel), 64 samples"),
        ("batchnorm", "BatchNormStatistics(levels_per_step=0.5, base_levels=2, per channel), 0 samples"),
    ],
)
def test_every_calibration_policy_works_by_name(name: str, shown: str) -> None:
    result = converted(*DATA, "--calibration", name).result
    assert result["calibration"] == shown
    assert result["snn_accuracy"][-1] > 0.5
    highest = converted(*DATA, "--calibration", "max").result["sites"]
    pairs = zip(result["sites"], highest, strict=True)
    assert name == "batchnorm" or all(site["v_threshold"] <= top["v_threshold"] for site, top in pairs)


@pytest.mark.parametrize("name", ["auto", "batchnorm"])
def test_without_data_thresholds_come_from_batchnorm(name: str, blind: Job) -> None:
    assert converted("--calibration", name).result["sites"] == blind.printed.result["sites"]


@pytest.mark.parametrize("which", ["plain", "tuned"])
def test_the_file_loads_again_and_gives_the_same_figures(which: str, request: pytest.FixtureRequest) -> None:
    job: Job = request.getfixturevalue(which)
    snn = convert.load(job.file)
    assert list(sites(snn)) == SITES
    test = zoo.load_data("digits").test
    order = zoo.seeded_order(test, 0)[:SAMPLES]
    batches = Batches(test, zoo.card("digits-cnn").preprocessing, indices=order)
    measured = evaluate(snn, batches, ann=zoo.load("digits-cnn"))
    result = job.printed.result
    assert list(measured.snn_accuracy or ()) == result["snn_accuracy"]
    assert measured.ann_accuracy == result["ann_accuracy"]
    printed = command("report", job.file, "--data", "digits", "--test-samples", SAMPLES, "--json")
    assert printed.out.count("\n") == 1
    assert set(printed.result) == KEYS | {"deployed", "early_exit", "spike_changes"}
    for key in (*FIGURES, "sites", "nodes", "calibration", "energy", "timesteps"):
        assert printed.result[key] == result[key], key


def test_the_manifest_says_how_the_file_came_about(tuned: Job) -> None:
    manifest = command("inspect", tuned.file, "--json").result
    result = tuned.printed.result
    assert manifest == read_snn(tuned.file)[1]
    assert manifest["source"]["architecture"] == "digits-cnn"
    assert manifest["metrics"] == {key: result[key] for key in (*FIGURES, "training_free", "stages")}
    assert (manifest["seed"], manifest["epochs"], manifest["data"]) == (0, 2, "digits")
    policy, samples = manifest["calibration"]["policy"], manifest["calibration"]["samples"]
    assert result["calibration"] == f"{policy}, {samples} samples"
    assert policy.startswith("MinError(levels_per_step=0.5, base_levels=2, per channel)")
    assert manifest["calibration"]["timesteps"] == STEPS
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["sites"] == SITES


def test_inspect_says_what_a_file_is_made_of(tuned: Job) -> None:
    printed = succeed("inspect", tuned.file)
    shown = ("zoo:digits-cnn", f"T = {STEPS}", "MinError", *SITES, "epochs: 2")
    assert [text for text in shown if text not in printed.out] == []
    assert "T = 4" in command("inspect", "zoo:digits-cnn-t4").out


def test_without_json_tables_are_printed() -> None:
    printed = succeed("convert", *ZOO, *DATA, "--finetune", 1, "--train-samples", 50)
    shown = ("threshold", "firing rate", *SITES, f"n = {SAMPLES}", "ANN", f"t = {STEPS}", "training-free",
             "fine-tuned", "SynOps", "4 converted", "Written: digits-cnn-snn-T")  # fmt: skip
    assert [text for text in shown if text not in printed.out] == []
    report = command("report", f"digits-cnn-snn-T{STEPS}.safetensors", *DATA[:2], "--test-samples", 20)
    assert report.status == 0
    assert all(text in report.out for text in ("firing rate", "n = 20", "SynOps"))


def test_the_zoo_lists_and_shows_what_it_has() -> None:
    listed = command("zoo", "list", "--json").result
    assert "digits-cnn" in listed["architectures"]
    assert listed["models"] == zoo.list_models()
    shown = command("zoo", "show", "digits-cnn", "--json").result
    assert (shown["input_size"], shown["num_classes"], shown["parameters"]) == ([1, 8, 8], 10, 21682)
    assert shown["card"]["ann_accuracy"] > 0.99
    text = command("zoo", "list").out + command("zoo", "show", "digits-cnn").out
    for word in ("digits-cnn", "torchvision:NAME", "input_size: [1, 8, 8]", "mean: [0.3054]"):
        assert word in text


@pytest.mark.parametrize("name", zoo.list_architectures())
def test_every_architecture_of_the_zoo_can_be_shown(name: str) -> None:
    printed = succeed("zoo", "show", name)
    assert f"name: {name}" in printed.out


@pytest.mark.parametrize("name", command("zoo", "list", "--json").result["spiking"])
def test_every_spiking_network_of_the_zoo_can_be_inspected(name: str) -> None:
    printed = succeed("inspect", f"zoo:{name}")
    assert f"zoo:{name}: " in printed.out


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ([sys.executable, "-m", "lmh", "--help"], ["convert", "inspect", "report", "zoo"]),
        ([PROGRAMS / "lmh-convert", "--help"], ["SOURCE", "--timesteps", "--data", "--finetune", "--json"]),
        ([PROGRAMS / "lmh", "--version"], [__version__]),
        ([PROGRAMS / "lmh", "zoo", "list"], ["digits-cnn"]),
    ],
    ids=["module", "lmh-convert", "version", "zoo"],
)
def test_the_installed_programs_start(program: list[str | Path], words: list[str]) -> None:
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [word for word in words if word not in done.stdout] == []


@pytest.mark.parametrize("name", ["convert", "finetune", "inspect", "report", "zoo"])
def test_every_command_explains_itself(name: str) -> None:
    printed = succeed(name, "--help")
    assert printed.out.startswith(f"Usage: lmh {name}")
    assert "\\b" not in printed.out


def test_the_help_shows_examples_that_can_be_copied() -> None:
    lines = [line.strip() for line in command("convert", "--help").out.splitlines()]
    assert "lmh-convert model.pt --timesteps 4" in lines


def test_a_killed_job_resumes_as_if_it_had_not_been(tuned: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Batches.at_epoch

    def killed_in_the_second_epoch(self: Batches, epoch: int) -> Batches:
        if epoch == 1:
            raise KeyboardInterrupt
        return begin(self, epoch)

    arguments = ("convert", *ZOO, *DATA, *TUNED, "--json")
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "at_epoch", killed_in_the_second_epoch)
        killed = command(*arguments)
    assert (killed.status, killed.result) == (130, {"error": "interrupted"})
    assert "epoch 1 of 2" in killed.err
    (checkpoint,) = Path().iterdir()
    assert checkpoint.name == f"digits-cnn-snn-T{STEPS}.safetensors.training"
    resumed = command(*arguments)
    assert resumed.result == tuned.printed.result
    assert "epoch 1 of 2" not in resumed.err
    assert "epoch 2 of 2" in resumed.err
    assert [path.name for path in Path().iterdir()] == [f"digits-cnn-snn-T{STEPS}.safetensors"]


@pytest.mark.parametrize(
    ("status", "arguments", "words"),
    [
        (1, ["convert", "gone.pt", "-T", 2], ["gone.pt", "no such file"]),
        (2, ["convert", *ZOO, "--data", "nothing"], ["nothing", "not known"]),
        (1, ["convert", *ZOO, *DATA, "--output", "gone/x"], ["gone/x", "cannot be written"]),
        (2, ["convert", "zoo:digits-cnn", "-T", 0], ["--timesteps"]),
        (2, ["convert", "zoo:digits-cnn"], ["Missing option", "--timesteps"]),
        (2, ["convert", *ZOO, "--finetune", 1], ["--finetune needs --data"]),
        (1, ["report", "gone.safetensors", "--data", "digits"], ["gone.safetensors", "no such file"]),
        (1, ["inspect", "zoo:nothing"], ["'nothing'", "lmh zoo list"]),
        (1, ["zoo", "show", "digits"], ["'digits'", "nearest: digits-cnn"]),
    ],
)
def test_with_json_a_failure_is_one_object_on_standard_output(
    status: int, arguments: list[object], words: list[str]
) -> None:
    printed = command(*arguments, "--json")
    assert printed.status == status
    assert list(printed.result) == ["error"]
    assert [word for word in words if word not in printed.result["error"]] == []
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(("status", "options"), [(1, "no.pt -T 2"), (1, "text.pt -T 2"), (2, "text.pt -T 0")])
def test_a_failing_program_prints_a_message_and_no_traceback(status: int, options: str) -> None:
    Path("text.pt").write_text("no weights")
    program = [PROGRAMS / "lmh-convert", *options.split()]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, "")
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in Path().iterdir()] == ["text.pt"]
