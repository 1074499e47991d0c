"""Every architecture: its number of parameters beside the published one, and its conversion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from commands import succeed
from lmh import QCFS, sites, zoo
from lmh.convert import EventFrames, convert, load
from lmh.convert.architectures import EmptyOnMeta
from lmh.errors import ArgumentError
from lmh.finetune.hybrid import qcfs_network
from lmh.torchvision_shim import torchvision
from lmh.zoo.cifar_resnet import BasicBlock, padded, projected
from lmh.zoo.ms_resnet import MSBlock
from lmh.zoo.sew_resnet import SEWBlock

# Architecture, classes, parameters, the published figure in millions, and how many digits of it were published.
# He: He et al. 2016, Table 6. Spikformer: Zhou et al. 2023, the size columns of its tables of CIFAR and ImageNet.
# W: weiaicunzai/pytorch-cifar100 01781f9, README, trained with 100 classes. T: torchvision 0.28, the ResNet of the same
# layers. "computed": from the layer table of the authors' code (STBP_LMH 206c99a), which states no number.
PARAMETERS = [
    ("digits-cnn", 10, 21_682, None),  # ours
    ("cifar10-resnet20-a", 10, 269_722, (0.27, 2)),  # He
    ("cifar10-resnet32-a", 10, 464_154, (0.46, 2)),  # He
    ("cifar10-resnet44-a", 10, 658_586, (0.66, 2)),  # He
    ("cifar10-resnet56-a", 10, 853_018, (0.85, 2)),  # He
    ("cifar10-resnet20", 10, 272_474, (0.27, 2)),  # He, and two projections: 16·32 + 2·32 + 32·64 + 2·64
    ("cifar10-resnet20-qcfs4", 10, 273_162, None),  # computed: and 688 θ, one for each channel of the 19 activations
    ("cifar10-resnet18", 100, 11_220_132, (11.2, 1)),  # W: resnet18 11.2M
    ("cifar10-resnet19", 10, 12_630_858, (12.63, 2)),  # Spikformer: ResNet-19 of tdBN and TET, 12.63M
    ("cifar10-resnet19-wide", 10, 14_664_074, None),  # computed
    ("cifar10dvs-resnet19", 10, 12_630_282, None),  # computed: ResNet-19 without a channel of the stem, 64·9 fewer
    ("cifar10-vgg11-bn", 10, 9_228_362, None),  # computed: 9,217,728 of convolutions, 5,504 of BatchNorm, 5,130
    ("cifar10-vgg13-bn", 100, 28_703_140, (28.7, 1)),  # W: vgg13_bn 28.7M
    ("cifar10-vgg16-bn", 100, 34_015_396, (34.0, 1)),  # W: vgg16_bn 34.0M
    ("tinyimagenet-vgg13-bn", 200, 35_404_296, None),  # computed: three quarters of 2,048·4,096 and 200 classes more
    ("cifar10-cifarnet", 10, 36_722_020, None),  # computed
    ("cifar10dvs-vgg", 10, 9_271_498, None),  # computed
    ("imagenet-sew-resnet18", 1000, 11_689_512, (11.69, 2)),  # T: as many as resnet18, nothing is added
    ("imagenet-sew-resnet34", 1000, 21_797_672, (21.79, 2)),  # Spikformer: SEW-ResNet-34 21.79M, cut off, not rounded
    ("imagenet-ms-resnet34", 1000, 21_797_672, (21.80, 2)),  # T: as many as resnet34
]
CUT_OFF = {"imagenet-sew-resnet34"}

TORCHVISION = zoo.list_architectures(family="torchvision")
TRAINED_WITH_AUXILIARY = {"torchvision:inception_v3": 3_326_696}  # of the head that only training uses

SMALL = {"digits": (1, 8, 8), "resnet": (3, 16, 16), "sew-resnet": (3, 64, 64), "ms-resnet": (3, 64, 64)}
OWN_SIZE = ("cifar10-resnet19-wide", "cifar10dvs-resnet19")


def parameters(name: str, num_classes: int) -> int:
    with EmptyOnMeta():
        model = zoo.card(name).build(num_classes=num_classes)
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_table_has_every_architecture() -> None:
    assert sorted(row[0] for row in PARAMETERS) == sorted(zoo.list_architectures())


def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parent.parent / "docs" / "zoo.md").read_text()
    for name, classes, count, published in PARAMETERS:
        figure = "" if published is None else f"{published[0]:.{published[1]}f} M "
        assert f"| `{name}` | {classes} | {count:,} | {figure}|" in page


@pytest.mark.parametrize(("name", "classes", "count", "published"), PARAMETERS, ids=[row[0] for row in PARAMETERS])
def test_parameters_are_as_many_as_published(
    name: str, classes: int, count: int, published: tuple[float, int] | None
) -> None:
    assert parameters(name, classes) == count
    if published is not None:
        millions, digits = published
        unit = 10**-digits
        assert abs(count / 1e6 - millions) <= (unit if name in CUT_OFF else unit / 2)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_classifiers_are_there_by_name_with_as_many_parameters_as_it_publishes(name: str) -> None:
    models = torchvision().models
    weights = models.get_model_weights(name.removeprefix("torchvision:"))
    published = {entry.meta["num_params"] for entry in weights}  # vit_h_14's differ by the size of the images
    assert parameters(name, 1000) + TRAINED_WITH_AUXILIARY.get(name, 0) in published


@pytest.mark.parametrize("name", zoo.list_architectures())
def test_every_architecture_of_the_zoo_converts_to_spikes_and_to_qcfs(name: str) -> None:
    card = zoo.card(name)
    ann = card.build().eval()
    size = card.preprocessing.input_size if name in OWN_SIZE else SMALL.get(card.family, card.preprocessing.input_size)
    x = torch.rand(2, *size)
    conversion = convert(ann, 2, data=x)
    snn = conversion.snn
    assert snn(x).shape == (2, card.num_classes)
    assert snn(x).isfinite().all()
    activations = sum(isinstance(module, (nn.ReLU, QCFS)) for module in ann.modules())
    assert len(sites(snn)) == activations
    quantised = qcfs_network(conversion.prepared, conversion.calibration, 2)
    assert sum(isinstance(module, QCFS) for module in quantised.modules()) == activations
    assert quantised(x).shape == (2, card.num_classes)


def test_the_thresholds_of_a_qcfs_network_become_its_neurons() -> None:
    ann = zoo.card("cifar10-resnet20-qcfs4").build().eval()
    assert not any(isinstance(module, nn.ReLU) for module in ann.modules())
    learned = [module for module in ann.modules() if isinstance(module, QCFS)]
    with torch.no_grad():
        for layer in learned:
            layer.raw_threshold.normal_()
    snn = convert(ann, 4, example_input=torch.zeros(1, 3, 16, 16)).snn
    for layer, site in zip(learned, sites(snn).values(), strict=True):
        assert torch.allclose(site.v_threshold, layer.v_threshold)
        assert layer.v_threshold.shape == (layer.raw_threshold.numel(),)


@pytest.mark.parametrize("name", ["cifar10dvs-vgg", "cifar10dvs-resnet19"])
def test_networks_for_events_take_frames(name: str) -> None:
    frames = torch.rand(2, 2, 2, 48, 48).round()
    snn = convert(zoo.card(name).build().eval(), 2, data=frames, encoding=EventFrames()).snn
    assert snn(frames).shape == (2, 10)
    assert not torch.equal(snn(frames), snn(frames.flip(0)))


def test_a_block_of_each_kind_ends_as_its_paper_says() -> None:
    x = torch.randn(2, 8, 6, 6)
    plain, sew, ms = BasicBlock(8, 8, 1, padded).eval(), SEWBlock(8, 8, 1).eval(), MSBlock(8, 8, 1).eval()
    assert (plain(x) >= 0).all()
    assert (sew(x) >= x).all()
    assert (sew(x) < 0).any()
    nn.init.constant_(ms.residual[5].bias, -1.0)
    assert torch.allclose(ms(x).mean(), x.mean() + ms.residual(x).mean(), atol=1e-5)
    assert (ms(x) < x).any()


def test_shortcuts_differ_where_the_shape_changes() -> None:
    x = torch.rand(2, 8, 6, 6)
    free, paid = BasicBlock(8, 16, 2, padded), BasicBlock(8, 16, 2, projected)
    assert free.shortcut(x).shape == paid.shortcut(x).shape == (2, 16, 3, 3)
    assert torch.equal(free.shortcut(x)[:, 4:12], x[:, :, ::2, ::2])
    assert not free.shortcut(x)[:, :4].any()
    assert [sum(p.numel() for p in block.shortcut.parameters()) for block in (free, paid)] == [0, 8 * 16 + 32]


def test_architectures_are_listed_by_family() -> None:
    assert zoo.list_architectures(family="sew-resnet") == ["imagenet-sew-resnet18", "imagenet-sew-resnet34"]
    families = {zoo.card(name).family for name in zoo.list_architectures()}
    listed = [name for family in families for name in zoo.list_architectures(family=family)]
    assert sorted(listed) == sorted(zoo.list_architectures())
    with pytest.raises(ArgumentError, match=r"family 'resnets' is not known; expected one of digits, resnet, .*torchv"):
        zoo.list_architectures(family="resnets")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("resnet18", "torchvision:resnet18"), ("cifar-resnet20", "cifar10-resnet20"), ("vgg16", "cifar10-vgg16-bn")],
)
def test_an_unknown_name_brings_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ArgumentError, match=f"architecture '{name}' is not known; nearest: [^.]*{nearest}"):
        zoo.card(name)
    assert zoo.card(nearest).name == nearest


@pytest.mark.parametrize(
    ("name", "side", "mean"),
    [
        ("resnet50", 224, 0.485), ("inception_v3", 299, 0.485), ("efficientnet_b7", 600, 0.485),
        ("efficientnet_v2_l", 480, 0.5), ("vit_h_14", 518, 0.485),
    ],
)  # fmt: skip
def test_torchvisions_classifiers_take_the_images_that_their_default_weights_were_trained_on(
    name: str, side: int, mean: float
) -> None:
    card = zoo.card(f"torchvision:{name}")
    assert (card.preprocessing.input_size, card.preprocessing.mean[0]) == ((3, side, side), mean)
    with torch.device("meta"):
        assert card.build().eval()(torch.empty(1, 3, side, side)).shape == (1, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_a_pretrained_network_that_transforms_its_input_is_converted_and_loaded_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = torchvision().models
    trained = models.get_model(name, weights=None, init_weights=False).state_dict()
    monkeypatch.setattr(models._api, "load_state_dict_from_url", lambda *_, **__: trained)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    ann = zoo.load(f"torchvision:{name}")
    assert ann.transform_input
    x, file = torch.rand(2, 3, 96, 96), tmp_path / "snn.safetensors"
    succeed("convert", f"torchvision:{name}", "-T", 2, "--input-size", "3,96,96", "--output", file)
    assert load(file)(x).shape == (2, 1000)
    rebuilt = zoo.card(f"torchvision:{name}").build().eval()
    assert rebuilt.load_state_dict(ann.state_dict(), strict=False).missing_keys == []  # a head for training is more
    assert torch.equal(rebuilt(x), ann(x))
