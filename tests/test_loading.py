"""Loading: every form of SOURCE gives the network that was saved, and runs nothing unasked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from commands import command
from lmh import convert, zoo
from lmh.errors import ArchitectureError, ArtifactError, SourceError, UnsafePickleError
from lmh.torchvision_shim import torchvision

Weights = Mapping[str, Tensor]
CARD = zoo.card("digits-cnn")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def random_net(num_classes: int = 10) -> nn.Module:
    """digits-cnn with weights of its own, so that nothing else can be loaded by mistake."""
    net = CARD.build(num_classes=num_classes)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net.eval()


def small_net() -> nn.Sequential:
    """[N, 1, 8, 8] → [N, 10]."""
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), *head).eval()


def same_function(a: nn.Module, b: nn.Module, *shape: int) -> bool:
    x = torch.rand(3, *(shape or (1, 8, 8)))
    with torch.no_grad():
        return torch.equal(a(x), b(x))


def prefixed(weights: Weights, prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in weights.items()}


def legacy(value: object, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def test_a_zoo_name_loads_the_zoos_network() -> None:
    source = convert.load_source("zoo:digits-cnn")
    assert same_function(source.model, zoo.load("digits-cnn"))
    assert not source.model.training
    assert (source.name, source.card, source.num_classes, source.digest) == ("zoo:digits-cnn", CARD, 10, None)


FORMS: dict[str, Callable[[Weights, Path], None]] = {
    "state_dict": torch.save,
    "legacy": legacy,
    "safetensors": safetensors.torch.save_file,
    "keys-in-another-order": lambda weights, path: torch.save(dict(reversed(weights.items())), path),
    "checkpoint-state_dict": lambda w, path: torch.save({"epoch": 3, "state_dict": w, "optimizer": {}}, path),
    "checkpoint-model": lambda w, path: torch.save({"model": w, "args": {"lr": 0.1}}, path),
    "checkpoint-model_state_dict": lambda w, path: torch.save({"model_state_dict": w}, path),
    "checkpoint-net": lambda w, path: torch.save({"net": w, "acc": 91.5}, path),
    "checkpoint-with-a-number-in-it": lambda w, path: torch.save({"state_dict": {**w, "v": 2}}, path),
    "legacy-checkpoint": lambda w, path: legacy({"state_dict": w, "epoch": 3}, path),
    "data-parallel": lambda w, path: torch.save(prefixed(w, "module."), path),
    "data-parallel-checkpoint": lambda w, path: torch.save({"state_dict": prefixed(w, "module.")}, path),
    "compiled": lambda w, path: torch.save(prefixed(w, "_orig_mod."), path),
    "data-parallel-of-compiled": lambda w, path: torch.save(prefixed(w, "module._orig_mod."), path),
    "compiled-data-parallel": lambda w, path: torch.save(prefixed(w, "_orig_mod.module."), path),
}


STRIPPED = {
    "data-parallel": ["module."],
    "data-parallel-checkpoint": ["module."],
    "compiled": ["_orig_mod."],
    "data-parallel-of-compiled": ["module.", "_orig_mod."],
    "compiled-data-parallel": ["module.", "_orig_mod."],
}


@pytest.mark.parametrize("named", [None, "digits-cnn"], ids=["recognised", "named"])
@pytest.mark.parametrize("form", FORMS)
def test_saved_weights_give_the_network_back(form: str, named: str | None) -> None:
    net = random_net()
    FORMS[form](net.state_dict(), Path("model.pt"))
    source = convert.load_source("model.pt", arch=named)
    assert same_function(source.model, net)
    assert not source.model.training
    assert (source.card, source.num_classes) == (CARD, 10)
    recognised = [notice for notice in source.notices if notice.startswith("Recognised digits-cnn with 10 classes")]
    assert len(recognised) == (named is None)
    stripped = " ".join(notice for notice in source.notices if notice not in recognised)
    assert [prefix for prefix in ("module.", "_orig_mod.") if prefix in stripped] == STRIPPED.get(form, [])


@pytest.mark.parametrize("named", [None, "digits-cnn"], ids=["recognised", "named"])
@pytest.mark.parametrize("form", ["state_dict", "legacy", "safetensors", "checkpoint-model"])
def test_the_number_of_classes_is_read_from_the_weights(form: str, named: str | None) -> None:
    net = random_net(num_classes=7)
    FORMS[form](net.state_dict(), Path("model.pt"))
    source = convert.load_source("model.pt", arch=named)
    assert source.num_classes == 7
    assert same_function(source.model, net)


def test_a_network_with_other_classes_is_saved_and_loaded_with_them() -> None:
    torch.save(random_net(num_classes=7).state_dict(), "model.pt")
    assert command("convert", "model.pt", "-T", 2)[0] == 0
    assert convert.load("model-snn-T2.safetensors")(torch.rand(3, 1, 8, 8)).shape == (3, 7)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "model.pt2", "model.zip", "model"])
@pytest.mark.parametrize("form", ["state_dict", "legacy", "safetensors"])
def test_the_kind_of_file_is_told_by_its_content_and_not_by_its_name(form: str, name: str) -> None:
    net = random_net()
    FORMS[form](net.state_dict(), Path(name))
    assert same_function(convert.load_source(name, arch="digits-cnn").model, net)


def test_half_and_double_weights_load_as_single() -> None:
    net = random_net()
    for kind in (torch.float16, torch.float64):
        torch.save(copy.deepcopy(net).to(kind).state_dict(), "model.pt")
        model = convert.load_source("model.pt").model
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        torch.testing.assert_close(model.state_dict(), net.state_dict(), rtol=1e-3, atol=1e-4)


def test_the_source_keeps_the_digest_of_its_file() -> None:
    torch.save(random_net().state_dict(), "a.pt")
    torch.save(random_net().state_dict(), "b.pt")
    first, again, other = (convert.load_source(name).digest for name in ("a.pt", "a.pt", "b.pt"))
    assert first == again != other
    assert len(str(first)) == 64


@pytest.mark.parametrize("wrapped", [False, True], ids=["module", "checkpoint"])
def test_a_pickled_sequential_loads_without_trust(wrapped: bool) -> None:
    net = small_net()
    torch.save({"model": net, "epoch": 3} if wrapped else net, "net.pt")
    source = convert.load_source("net.pt")
    assert isinstance(source.model, nn.Sequential)
    assert same_function(source.model, net)
    assert source.card is None


def test_a_pickled_module_of_the_zoo_loads_without_trust() -> None:
    net = random_net()
    torch.save(net, "net.pt")
    assert same_function(convert.load_source("net.pt").model, net)


def test_a_pickled_module_in_training_mode_loads_in_evaluation_mode() -> None:
    torch.save(small_net().train(), "net.pt")
    assert not any(module.training for module in convert.load_source("net.pt").model.modules())


def test_a_pickled_torchvision_resnet18_loads_without_trust() -> None:
    net = torchvision().models.resnet18(weights=None).eval()
    torch.save(net, "resnet.pt")
    assert same_function(convert.load_source("resnet.pt").model, net, 3, 64, 64)


@pytest.mark.parametrize("save", [torch.save, safetensors.torch.save_file], ids=["torch", "safetensors"])
def test_weights_of_a_torchvision_network_are_recognised(save: Callable[[Any, Path], None]) -> None:
    net = torchvision().models.squeezenet1_1(weights=None).eval()
    save(net.state_dict(), Path("weights.pth"))
    source = convert.load_source("weights.pth")
    assert source.card is not None
    assert (source.card.name, source.num_classes) == ("torchvision:squeezenet1_1", 1000)
    assert same_function(source.model, net, 3, 64, 64)


def test_weights_of_a_named_torchvision_network_with_other_classes_load() -> None:
    net = torchvision().models.resnet18(weights=None, num_classes=5).eval()
    torch.save({"state_dict": prefixed(net.state_dict(), "module.")}, "weights.pth")
    source = convert.load_source("weights.pth", arch="torchvision:resnet18")
    assert source.num_classes == 5
    assert same_function(source.model, net, 3, 64, 64)


def test_a_pickled_module_in_the_legacy_format_needs_trust() -> None:
    net = small_net()
    legacy(net, Path("net.pt"))
    with pytest.raises(UnsafePickleError, match="--trust-pickle"):
        convert.load_source("net.pt")
    assert same_function(convert.load_source("net.pt", trust_pickle=True).model, net)


def test_a_spiking_network_as_source_is_refused_as_what_it_is() -> None:
    assert command("convert", "zoo:digits-cnn", "-T", 2, "--output", "snn.safetensors")[0] == 0
    with pytest.raises(SourceError, match="spiking network"):
        convert.load_source("snn.safetensors")


def test_weights_that_differ_in_one_shape_are_refused_with_the_nearest_architecture() -> None:
    torch.save({**random_net().state_dict(), "stem.0.weight": torch.zeros(24, 3, 3, 3)}, "model.pt")
    shapes = r"stem\.0\.weight is \[24, 3, 3, 3\] instead of \[24, 1, 3, 3\]\."
    with pytest.raises(
        ArchitectureError, match=rf"model\.pt.*nearest is digits-cnn with 10 classes; .*{shapes} When.*--mod"
    ):
        convert.load_source("model.pt")


def test_the_number_of_classes_is_no_difference_from_the_nearest_architecture() -> None:
    net = torchvision().models.resnet18(num_classes=7)
    net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    torch.save(net.state_dict(), "changed.pt")
    conv = "conv1.weight is [64, 3, 3, 3] instead of [64, 3, 7, 7]."
    with pytest.raises(ArchitectureError) as caught:
        convert.load_source("changed.pt")
    assert f"nearest is torchvision:resnet18 with 7 classes; what differs: {conv} When" in str(caught.value)
    with pytest.raises(ArchitectureError) as caught:
        convert.load_source("changed.pt", arch="torchvision:resnet18")
    assert f"does not fit torchvision:resnet18: {conv} Choose" in str(caught.value)
    torch.save(net, "module.pt")
    assert same_function(convert.load_source("module.pt").model, net.eval(), 3, 32, 32)


def test_weights_with_no_name_in_common_with_any_architecture_say_so_in_a_sentence() -> None:
    torch.save({"mine.w": torch.zeros(2, 2), "mine.b": torch.zeros(2)}, "mine.pt")
    with pytest.raises(
        ArchitectureError, match=r"none of those has a tensor of the same name\. When .*torch\.save\(model"
    ):
        convert.load_source("mine.pt")


def test_a_network_of_ones_own_is_loaded_from_the_file_it_was_made_from() -> None:
    net = small_net()
    torch.save(net, "net.pt")
    assert command("convert", "net.pt", "-T", 2, "--input-size", "1,8,8")[0] == 0
    snn = convert.load("net-snn-T2.safetensors", source="net.pt")
    assert same_function(snn, convert.load("net-snn-T2.safetensors", source=net))
    assert same_function(snn, convert.load("net-snn-T2.safetensors"))
    with torch.no_grad():
        net[-1].bias.add_(1)
    torch.save(net, "net.pt")
    with pytest.raises(ArtifactError, match=r"net\.pt: its sha256 is .* expected the same file"):
        convert.load("net-snn-T2.safetensors", source="net.pt")
    with pytest.raises(ArtifactError, match=r"net\.pt.*cannot be built by name and is not there unchanged.*--source"):
        convert.load("net-snn-T2.safetensors")


def test_an_onnx_file_is_a_source(tmp_path: Path) -> None:
    net = zoo.load("digits-cnn")
    x = torch.rand(3, 1, 8, 8)
    file = tmp_path / "network.bin"
    torch.onnx.export(net, (x,), str(file), dynamo=False)
    source = convert.load_source(str(file))
    assert torch.allclose(source.model(x), net(x), atol=1e-5)


def test_the_input_size_that_a_model_file_states_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    net, x = zoo.load("digits-cnn"), torch.rand(2, 1, 8, 8)
    torch.onnx.export(net, (x,), "fixed.onnx", dynamo=False)
    torch.onnx.export(net, (x,), "open.onnx", dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "N", 2: "H"}})
    torch.export.save(torch.export.export(net, (x,)), "fixed.pt2")
    files = ("fixed.onnx", "open.onnx", "fixed.pt2")
    sizes = [convert.load_source(file, trust_pickle=True).input_size for file in files]
    assert sizes == [(1, 8, 8), None, (1, 8, 8)]
    status, _, err = command("convert", "fixed.onnx", "-T", 2, "--data", "digits", "--dry-run")
    assert status == 0
    assert "input size" not in err
    assert "Assumed, as nothing says it: input size" in command("convert", "open.onnx", "-T", 2, "--dry-run").err
