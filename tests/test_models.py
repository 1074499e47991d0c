"""Models of the zoo: their names, cards and weights, from the package and from releases that a user added."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import command, succeed
from lmh import convert, evaluate, zoo
from lmh.artifact import file_digest, write_tensors
from lmh.errors import ArgumentError, ArtifactError, DownloadError
from lmh.home import home
from lmh.zoo import Batches, SpikingCard, transfer
from lmh.zoo.model_cards import VERSION, card_json, read_card
from lmh.zoo.models import download, model_names, readable_cards
from unruly_server import Cut, Other, Server, Status, unruly_server

PACKAGED = list(model_names())
SEVEN = {"input_size": [1, 8, 8], "mean": [0.1], "std": [0.2]}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, home_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def trained(file: str = "seven.safetensors", num_classes: int = 7, **facts: Any) -> Path:
    """A file as `lmh zoo train` writes it."""
    net = zoo.card("digits-cnn").build(num_classes=num_classes)
    known = {
        "recipe": {"architecture": "digits-cnn", "data": "npz:sevens.npz", "seed": 4, "epochs": 1},
        "num_classes": num_classes,
        "preprocessing": SEVEN,
        "accuracy": 0.5,
        "test_samples": 70,
        "versions": {"lmh": "0.1.0"},
        "command": "lmh zoo train sevens",
    }
    write_tensors(Path(file), net.state_dict(), {"record": {**known, **facts}})
    return Path(file)


def published(*files: object) -> Path:
    succeed("zoo", "publish", *files, "--out", "release")
    return Path("release")


@pytest.fixture
def server() -> Iterator[Server]:
    trained()
    release = published("seven.safetensors", f"t4={zoo.snn_path('digits-cnn-t4')}")
    with unruly_server({f"/r/{path.name}": path.read_bytes() for path in release.iterdir()}) as running:
        yield running


def change(server: Server, model: str, values: Mapping[str, Any]) -> None:
    """Change a card on the server, and its hash in the index."""
    card = {**json.loads(server.files[f"/r/{model}.json"]), **values}
    server.files[f"/r/{model}.json"] = json.dumps(card).encode()
    index = json.loads(server.files["/r/index.json"])
    index["models"][model]["card_sha256"] = hashlib.sha256(server.files[f"/r/{model}.json"]).hexdigest()
    server.files["/r/index.json"] = json.dumps(index).encode()


def test_the_weights_of_the_package_are_small() -> None:
    assert sum(download(name).stat().st_size for name in PACKAGED) <= 8_000_000


@pytest.mark.parametrize("name", PACKAGED)
def test_every_file_of_the_package_is_the_one_of_its_card(name: str) -> None:
    card = zoo.model_card(name)
    assert file_digest(download(name)) == card.weights.sha256
    if not isinstance(card, SpikingCard):
        assert zoo.record(name)["accuracy"] == card.ann_accuracy
    assert read_card(json.dumps(card_json(card)), "here") == card


@pytest.mark.parametrize("name", [name for name in PACKAGED if zoo.model_card(name).data == "digits"])
def test_every_model_of_the_digits_is_what_its_card_says(name: str) -> None:
    card = zoo.model_card(name)
    data, preprocessing = zoo.load_data(card.data or ""), card.preprocessing
    batches = Batches(data.test, preprocessing)
    assert len(data.test) == card.samples
    if isinstance(card, SpikingCard):
        ann = zoo.load(card.architecture)
        found = evaluate(convert.load(f"zoo:{name}"), batches, ann=ann)
        assert found.snn_accuracy == pytest.approx(card.accuracy)
        assert found.firing_rate == pytest.approx(card.firing_rate)
        assert card.energy is not None
        assert card.energy["snn_pj"] < card.energy["ann_pj"]


@pytest.mark.parametrize("name", [name for name in PACKAGED if isinstance(zoo.model_card(name), SpikingCard)])
def test_every_spiking_network_of_the_package_knows_its_ann(name: str) -> None:
    manifest = convert.load(f"zoo:{name}").meta["lmh_manifest"]
    for network in (manifest["source"]["name"], manifest["teacher"]):
        assert zoo.model_card(network.removeprefix("zoo:")).data == zoo.model_card(name).data
    ann = zoo.load(manifest["source"]["name"].removeprefix("zoo:"))
    assert isinstance(convert.load(f"zoo:{name}", source=ann), torch.nn.Module)


def test_models_are_listed_by_family_data_and_steps() -> None:
    packaged = zoo.list_models()
    succeed("zoo", "add", published(trained()))
    assert zoo.list_models() == sorted([*packaged, "seven"])
    assert zoo.list_models(data="sevens") == ["seven"]
    assert zoo.list_models(family="vgg") == []
    assert zoo.list_models(family="digits", data="digits", timesteps=4) == ["digits-cnn-t4"]
    assert zoo.list_models(timesteps=5) == []
    with pytest.raises(ArgumentError, match="family 'digit' is not known"):
        zoo.list_models(family="digit")
    listed = command("zoo", "list", "--data", "digits", "--json").result
    assert listed == {
        "architectures": [], "recipes": ["digits-cnn", "digits-cnn-t4"], "models": ["digits-cnn"],
        "spiking": ["digits-cnn-t4"], "unreadable": [],
    }  # fmt: skip
    lines = command("zoo", "list", "--timesteps", 4).out.splitlines()
    assert "recipe digits-cnn-t4: digits-cnn, digits, T = 4" in lines
    assert "model digits-cnn-t4: digits-cnn, digits, T = 4, 99.44 %, 0.10 MB" in lines
    models = [line.partition(":")[0] for line in lines if not line.startswith("recipe ")]
    assert models == [f"model {name}" for name in zoo.list_models(timesteps=4)]
    assert "torchvision:resnet18" in command("zoo", "list", "--family", "torchvision").out


@pytest.mark.parametrize("verb", ["download", "verify", "export-card"])
def test_an_unknown_name_brings_the_nearest(verb: str) -> None:
    printed = command("zoo", verb, "digits-cn")
    assert printed.status == 1
    assert "model 'digits-cn' is not known; nearest: digits-cnn, digits-cnn-t4" in printed.err


def test_a_spiking_network_is_no_source() -> None:
    printed = command("convert", "zoo:digits-cnn-t4", "-T", 2)
    assert printed.status == 1
    assert "'digits-cnn-t4' is a spiking network already; expected an ANN" in printed.err
    assert succeed("report", "zoo:digits-cnn-t4", "--data", "digits", "--test-samples", 9).status == 0


def test_a_model_brings_its_own_input_and_classes(server: Server) -> None:
    succeed("zoo", "add", f"{server.url}/r/index.json")
    card = zoo.card("seven")
    assert (card.name, card.num_classes, card.preprocessing.mean) == ("digits-cnn", 7, (0.1,))
    assert zoo.card("digits-cnn").preprocessing.mean == (0.3054,)
    server.script = [Cut(1_000), Status(503), Cut(20_000)]
    x = torch.rand(2, 1, 8, 8)
    source = convert.load_source("zoo:seven")
    assert source.model(x).shape == (2, 7)
    assert source.record()["architecture"] == "digits-cnn"
    succeed("convert", "zoo:seven", "-T", 2, "--output", "snn.safetensors")
    snn = convert.load("snn.safetensors")
    assert snn(x).shape == (2, 7)
    assert snn.meta["lmh_manifest"]["preprocessing"]["mean"] == [0.1]
    assert server.paths.count("/r/seven.safetensors") == 4
    assert "downloaded when they are wanted" in succeed("inspect", "zoo:seven").out
    assert convert.load("zoo:t4")(x).shape == (2, 10)


def test_download_verify_and_what_a_damaged_file_comes_to(server: Server) -> None:
    succeed("zoo", "add", f"{server.url}/r/seven.json")
    states = {entry["name"]: entry["state"] for entry in command("zoo", "verify", "--json").result["models"]}
    assert states == {**dict.fromkeys(PACKAGED, "good"), "seven": "absent"}
    (found,) = command("zoo", "download", "seven", "--json").result["models"]
    file = Path(found["file"])
    assert (found["sha256"], found["size"]) == (file_digest(Path("seven.safetensors")), file.stat().st_size)
    assert "seven: good" in succeed("zoo", "verify", "seven").out
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    wrong = command("zoo", "verify")
    assert wrong.status == 1
    assert "seven: wrong, removed; `lmh zoo download` fetches it again" in wrong.out
    assert not file.exists()
    assert len(command("zoo", "download", "--all", "--json").result["models"]) == 1 + len(PACKAGED)
    assert command("zoo", "verify").status == 0
    assert command("zoo", "download").status == 2


def test_a_wrong_file_is_never_taken(server: Server) -> None:
    succeed("zoo", "add", f"{server.url}/r/index.json")
    good = server.files["/r/seven.safetensors"]
    server.files["/r/seven.safetensors"] = good[:-1] + b"!"
    for use in (lambda: zoo.load("seven"), lambda: convert.load_source("zoo:seven"), lambda: zoo.record("seven")):
        with pytest.raises(DownloadError, match=r"seven.safetensors: its sha256 is .*; expected"):
            use()
    assert not list((home() / "weights").iterdir())
    server.files["/r/seven.safetensors"] = good
    assert zoo.load("seven").head.out_features == 7


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"version": VERSION + 1}, f"card version {VERSION + 1}; this lmh reads up to {VERSION}. Update lmh-convert"),
        ({"version": "1"}, "a damaged card"),
        ({"colour": "red"}, "missing or unknown: colour"),
        ({"type": "Other"}, "a damaged card"),
        ({"format": "png"}, "not a model card; expected what `lmh zoo publish` writes"),
        ({"ann_accuracy": "0.9", "versions": None}, "a damaged card (ann_accuracy is '0.9'; versions is None)"),
        ({"name": "cifar10-vgg16-bn"}, "is the name of an architecture, and this model is not an ANN of it"),
        ({"name": "../../seven"}, "a damaged card (name '../../seven'"),
        ({"weights": {"location": "x"}}, "a damaged card"),
        ({"weights": {"location": "ftp://x/y.safetensors", "sha256": "0" * 64, "size": 3}}, "is not known"),
        ({"weights": {"location": "net.pt", "sha256": "0" * 64, "size": 3}}, "net.pt: is not a .safetensors file"),
        ({"preprocessing": {"input_size": [1], "mean": [], "std": []}}, "a damaged card"),
        ({"name": "digits-cnn"}, "digits-cnn is a model of the package; expected another name"),
    ],
)
@pytest.mark.parametrize("address", ["index", "seven"])
def test_a_card_that_is_newer_or_damaged_is_not_added(
    server: Server, values: Mapping[str, Any], words: str, address: str
) -> None:
    change(server, "seven", values)
    printed = command("zoo", "add", f"{server.url}/r/{address}.json")
    assert printed.status == 1
    assert words in printed.err
    assert "seven" not in model_names()
    assert not (home() / "cards").exists()


def test_a_newer_card_in_the_home_is_named_and_spoils_nothing_else(server: Server) -> None:
    packaged = zoo.list_models()
    succeed("zoo", "add", f"{server.url}/r/index.json")
    file = home() / "cards" / "seven.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 9}))
    with pytest.raises(ArtifactError, match=r"seven.json: card version 9; this lmh reads up to 1. Update lmh-convert"):
        zoo.load("seven")
    assert zoo.list_models() == packaged
    assert sum(isinstance(card, ArtifactError) for card in readable_cards()) == 1
    listed = command("zoo", "list")
    assert "model t4: " in listed.out
    assert "not readable: " in listed.err
    for arguments in (("verify",), ("download", "--all"), ("results",)):
        done = succeed("zoo", *arguments)
        assert ("not readable: " in done.err) is (arguments != ("results",))
    assert "t4: good" in succeed("zoo", "verify").out


@pytest.mark.parametrize(
    ("file", "data", "words"),
    [
        ("index.json", b'{"format": "lmh-zoo", "version": 2}', "index version 2; this lmh reads up to 1"),
        ("index.json", b'{"format": "lmh-zoo", "version": 1, "models": {"a": {}}}', "a damaged index"),
        ("index.json", b'{"format": "lmh-zoo", "version": 1, "models": {"a": null}}', "a damaged index"),
        ("index.json", b"\xff\xfe", "not a text; expected an index or a card"),
        ("index.json", b"<html>", "not JSON"),
        ("seven.json", b"{}", "its sha256 is not the one in"),
    ],
)
def test_a_release_that_does_not_hang_together_is_refused(server: Server, file: str, data: bytes, words: str) -> None:
    server.files[f"/r/{file}"] = data
    printed = command("zoo", "add", f"{server.url}/r/index.json")
    assert printed.status == 1
    assert words in printed.err
    assert not (home() / "cards").exists()


def test_cards_are_fetched_again_when_the_server_stumbles(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(transfer.time, "sleep", waits.append)
    server.script = [Status(500), Cut(10)]
    assert "t4: added" in succeed("zoo", "add", f"{server.url}/r/index.json").out
    assert waits == [0.5, 1.0]
    server.script = [Status(500)] * 5
    assert "500 Internal Server Error, 5 times in a row" in command("zoo", "add", f"{server.url}/r/index.json").err
    server.script = [Other(b"x" * 4)]
    assert "not JSON" in command("zoo", "add", f"{server.url}/r/t4.json").err
    assert "404 Not Found" in command("zoo", "add", f"{server.url}/r/none.json").err


def test_a_release_on_the_hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    for path in list(server.files):
        server.files[path.replace("/r/", "/lab/release/resolve/v1/")] = server.files[path]
    assert "seven: added" in succeed("zoo", "add", "hf:lab/release/index.json@v1").out
    assert zoo.model_card("seven").weights.location == "hf:lab/release/seven.safetensors@v1"
    assert zoo.load("seven").head.out_features == 7


def test_offline_no_release_is_asked_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMH_OFFLINE", "1")
    asked = len(server.paths)
    for address in (f"{server.url}/r/index.json", "hf:lab/release/index.json"):
        assert "LMH_OFFLINE forbids to ask for it; expected a path" in command("zoo", "add", address).err
    assert len(server.paths) == asked
    succeed("zoo", "add", "release")


def test_a_place_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    trained()
    Path("file").write_text("")
    assert "file/release: cannot be made" in command("zoo", "publish", "seven.safetensors", "--out", "file/release").err
    published("seven.safetensors")
    monkeypatch.setenv("LMH_HOME", "file")
    assert "cards: cannot be made" in command("zoo", "add", "release").err


def test_a_release_is_whole_and_grows() -> None:
    folder = published(trained(), f"t4={zoo.snn_path('digits-cnn-t4')}")
    published(f"eight={trained('eight.safetensors', 8)}")
    index = json.loads((folder / "index.json").read_text())
    assert sorted(index["models"]) == ["eight", "seven", "t4"]
    for name, entry in index["models"].items():
        assert file_digest(folder / entry["weights"]) == entry["sha256"] == zoo_card(folder, name)["weights"]["sha256"]
        assert file_digest(folder / entry["card"]) == entry["card_sha256"]
    sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sums == {path: file_digest(folder / path) for path in sums}
    assert len(sums) == 6
    page = (folder / "t4.md").read_text()
    assert page.startswith("---\nlicense: apache-2.0\n")
    assert "| SNN | 96.94 | 99.44 | 99.72 | 99.44 |" in page
    assert zoo_card(folder, "seven")["weights"]["location"] == "seven.safetensors"


def zoo_card(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def test_publishing_measures_and_places(tmp_path: Path) -> None:
    options = ("--data", "digits", "--base", "https://example.org/r", "--licence", "MIT", "--out", "out", "--json")
    shutil.copy(zoo.snn_path("digits-cnn-t4"), "alone.safetensors")  # its card stays behind
    Path("alone.json").write_text("{}")
    (card,) = succeed("zoo", "publish", "t4=alone.safetensors", *options).result["models"]
    assert card["weights"]["location"] == "https://example.org/r/t4.safetensors"
    assert (card["licence"], card["samples"], card["timesteps"]) == ("MIT", 360, 4)
    assert card["firing_rate"] == pytest.approx(zoo.model_card("digits-cnn-t4").firing_rate)  # type: ignore[attr-defined]
    beside = zoo_card(published(f"t4={zoo.snn_path('digits-cnn-t4')}"), "t4")
    assert beside["recipe"] == zoo.model_card("digits-cnn-t4").recipe
    unmeasured = zoo_card(published("t4=alone.safetensors"), "t4")
    assert (unmeasured["firing_rate"], unmeasured["energy"]) == (None, None)
    assert unmeasured["accuracy"] == card["accuracy"]


def test_what_nobody_could_use_is_not_published(tmp_path: Path) -> None:
    write_tensors(Path("bare.safetensors"), {"x": torch.zeros(2)}, {})
    torch.save({}, "net.pt")
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    convert.save(convert.convert(net, 2, data=torch.rand(4, 2)), "own.safetensors")
    trained()
    trained("other.safetensors", 8)
    for files, words in {
        ("bare.safetensors",): "1 tensors without a record of how they came about",
        ("net.pt",): "net.pt: expected a .safetensors file",
        ("gone.safetensors",): "no such file",
        ("own.safetensors",): "not from an architecture of the zoo, so nobody else could build it",
        ("a/b=seven.safetensors",): "name 'a/b': expected letters, digits, dots, dashes",
        ("seven.safetensors", "seven=other.safetensors"): "seven: named twice",
    }.items():
        printed = command("zoo", "publish", *files, "--out", "release")
        assert printed.status == 1
        assert words in printed.err
    assert not Path("release").exists()
    refused = command("zoo", "publish", "seven.safetensors", "--out", "release", "--base", "ftp://x")
    assert "location 'ftp://x/x.safetensors' is not known" in refused.err
    Path("release").mkdir()
    Path("release/index.json").write_text("<html>")
    assert (
        "not an index; expected what `lmh zoo publish`"
        in command("zoo", "publish", "seven.safetensors", "--out", "release").err
    )


def test_a_folder_of_this_machine_is_a_release_too() -> None:
    trained()
    assert "seven: added" in succeed("zoo", "add", published("seven.safetensors")).out
    assert zoo.model_card("seven").weights.location == (Path("release") / "seven.safetensors").resolve().as_uri()
    assert zoo.load("seven").head.out_features == 7


def test_weights_that_do_not_fit_their_card_are_refused() -> None:
    trained()
    release = published("seven.safetensors")
    card = replace(read_card((release / "seven.json").read_text(), "here"), num_classes=9)
    (release / "seven.json").write_text(json.dumps(card_json(card)))
    succeed("zoo", "add", release / "seven.json")
    with pytest.raises(ArtifactError, match=r"does not fit digits-cnn with 9 classes; expected the weights of"):
        zoo.load("seven")


def test_the_card_is_printed_or_written() -> None:
    page = succeed("zoo", "export-card", "digits-cnn-t4").out
    assert "# digits-cnn-t4\n\ndigits-cnn, a spiking network of LM-H neurons, T = 4." in page
    assert command("zoo", "export-card", "digits-cnn", "--json").result == card_json(zoo.model_card("digits-cnn"))
    succeed("zoo", "export-card", "digits-cnn-t4", "--output", "README.md")
    assert Path("README.md").read_text() == page


def test_offline_torchvisions_weights_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMH_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", "nowhere")
    with pytest.raises(DownloadError, match=r"resnet18: its weights are not in .*, and LMH_OFFLINE forbids"):
        zoo.load("torchvision:resnet18")
    printed = command("zoo", "download", "torchvision:resnet18")
    assert (printed.status, "LMH_OFFLINE" in printed.err) == (1, True)
