"""Recognition: the architecture and number of classes of every state_dict of the zoo and of torchvision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lmh import convert, zoo
from lmh.convert import architectures, loading
from lmh.convert.architectures import EmptyOnMeta, Fit, differences, fits, nearest, recognised, shapes_of
from lmh.errors import ArchitectureError
from lmh.torchvision_shim import torchvision

TORCHVISION = [f"torchvision:{name}" for name in torchvision().models.list_models(module=torchvision().models)]
CHEAP = ("torchvision:resnet50", "torchvision:squeezenet1_1", "torchvision:regnet_y_400mf", "torchvision:googlenet")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def shapes(name: str, num_classes: int | None = None) -> dict[str, tuple[int, ...]]:
    card = zoo.card(name)
    with EmptyOnMeta():
        model = card.build(num_classes=num_classes or card.num_classes)
    return dict(shapes_of(model.state_dict()))


@pytest.mark.parametrize("name", [*zoo.list_architectures(), *TORCHVISION])
def test_an_architecture_is_recognised_as_the_only_one_that_fits(name: str) -> None:
    found = recognised(shapes(name))
    assert [(fit.card.name, fit.num_classes, fit.prefix, fit.beside) for fit in found] == [
        (name, zoo.card(name).num_classes, "", ())
    ]


@pytest.mark.parametrize("name", CHEAP)
@pytest.mark.parametrize("classes", [1, 7])
def test_the_number_of_classes_is_read_off_the_last_layer(name: str, classes: int) -> None:
    renamed = {f"net.{key}": shape for key, shape in shapes(name, classes).items()}
    (fit,) = recognised({**renamed, "loss.weight": (classes,)})
    assert (fit.card.name, fit.num_classes, fit.prefix, fit.beside) == (name, classes, "net.", ("loss.weight",))


def test_every_member_of_a_family_begins_and_ends_as_its_first() -> None:
    for names in architectures._families():
        tensors = [list(shapes(f"torchvision:{name}")) for name in (names[0], names[-1])]
        assert len({(first, last) for first, *_, last in tensors}) == 1, names


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
@pytest.mark.parametrize("auxiliary", [False, True])
def test_auxiliary_heads_may_be_there_or_not(name: str, auxiliary: bool) -> None:
    models = torchvision().models
    net = models.get_model(
        name, weights=None, num_classes=5, aux_logits=auxiliary, init_weights=False, transform_input=True
    ).eval()
    torch.save(net.state_dict(), "weights.pth")
    source = convert.load_source("weights.pth")
    assert source.card is not None
    assert (source.card.name, source.num_classes) == (f"torchvision:{name}", 5)
    assert any("(transform_input=True). If yours does not, pass the whole module." in text for text in source.notices)
    x = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(source.model(x), net(x))


def test_one_shape_that_differs_is_no_fit() -> None:
    wrong = shapes("torchvision:resnet18")
    assert len(recognised(wrong)) == 1
    wrong["layer3.0.conv1.weight"] = (256, 128, 5, 5)
    assert recognised(wrong) == []
    assert fits(wrong, zoo.card("torchvision:resnet18")) == []
    change = "layer3.0.conv1.weight is [256, 128, 5, 5] instead of [256, 128, 3, 3]"
    assert nearest(wrong) == f"nearest is torchvision:resnet18 with 1000 classes; what differs: {change}."
    few = {key: shape for key, shape in wrong.items() if not key.startswith("layer4.1.")}
    assert nearest(few).startswith(
        "nearest is torchvision:resnet18, which shares 92 of its 102 names and 91 shapes (--arch"
    )
    assert differences(wrong, zoo.card("torchvision:resnet18")) == [
        "layer3.0.conv1.weight is [256, 128, 5, 5] instead of [256, 128, 3, 3]"
    ]


def test_a_head_of_ones_own_is_no_fit_and_the_nearest_is_named() -> None:
    own = shapes("torchvision:resnet34")
    for name in ("weight", "bias"):
        own[f"fc.1.{name}"] = own.pop(f"fc.{name}")
    assert recognised(own) == []
    assert "nearest is torchvision:resnet34 with 1000 classes; what differs: missing fc.weight" in nearest(own)
    assert differences(own, zoo.card("torchvision:resnet34")) == [
        "missing fc.weight", "missing fc.bias", "unexpected fc.1.weight", "unexpected fc.1.bias"
    ]  # fmt: skip


def test_architectures_that_fit_alike_are_listed_and_the_advice_works(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = replace(zoo.card("digits-cnn"), name="twin")
    monkeypatch.setitem(zoo.registry.CARDS, "twin", twin)
    net = zoo.card("digits-cnn").build()
    torch.save(net.state_dict(), "model.pt")
    with pytest.raises(ArchitectureError, match=r"model\.pt: fits digits-cnn, twin alike; choose one with --arch"):
        convert.load_source("model.pt")
    assert convert.load_source("model.pt", arch="twin").card == twin


def test_recognising_builds_only_the_families_that_can_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = shapes("torchvision:resnet50")
    built: list[str] = []
    original = architectures._shapes.__wrapped__
    architectures._shapes.cache_clear()

    def counting(name: str, num_classes: int) -> Mapping[str, tuple[int, ...]] | None:
        built.append(name)
        return original(name, num_classes)

    monkeypatch.setattr(architectures, "_shapes", architectures.lru_cache(maxsize=512)(counting))
    assert [fit.card.name for fit in recognised(wanted)] == ["torchvision:resnet50"]
    of_torchvision = [name for name in built if name.startswith("torchvision:")]
    assert len(of_torchvision) == len(set(of_torchvision)) < 30
    assert {name for name in TORCHVISION if "resne" in name} <= set(of_torchvision)


def test_building_without_memory_gives_the_shapes_of_the_real_network() -> None:
    for name in ("torchvision:regnet_x_400mf", "torchvision:mobilenet_v3_small", "cifar10-resnet20-a"):
        real = zoo.card(name).build()
        assert shapes(name) == dict(shapes_of(real.state_dict()))
        with EmptyOnMeta():
            empty = zoo.card(name).build()
        assert all(layer.weight.is_meta for layer in empty.modules() if isinstance(layer, nn.Conv2d))


def test_weights_without_the_counters_of_batch_norm_load() -> None:
    net = zoo.card("digits-cnn").build()
    state: dict[str, Tensor] = net.state_dict()
    torch.save({key: value for key, value in state.items() if "num_batches" not in key}, "model.pt")
    loaded = convert.load_source("model.pt").model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items() if "num_batches" not in key)


def test_a_fit_knows_plain_weights_from_averages() -> None:
    card = zoo.card("digits-cnn")
    ranks = [loading._rank(Fit(card, 10, prefix, ())) for prefix in ("", "model.", "ema.")]
    assert ranks == sorted(set(ranks))
