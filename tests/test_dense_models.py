"""Segmentation models and a detection backbone of torchvision, converted by the API as a user would.

Random weights, 32×32 pixels. A random residual network amplifies every error from block to block, so its branches are
scaled down, as training does; BatchNorm statistics are those of the batch.
"""

from __future__ import annotations

import importlib
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmh import prefixes, sites
from lmh.convert import Conversion, ReluSurgery, convert
from lmh.torchvision_shim import torchvision

torchvision()
SEGMENTATION = importlib.import_module("torchvision.models.segmentation")
BACKBONES = importlib.import_module("torchvision.models.detection.backbone_utils")
RESNET = importlib.import_module("torchvision.models.resnet")
TIMESTEPS = 64


def images() -> Tensor:
    """Four different smooth images, [4, 3, 32, 32]."""
    coarse = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, size=32, mode="bilinear")


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """Calm residual branches, statistics of ``x``, eval mode."""
    for module in model.modules():
        if isinstance(module, RESNET.Bottleneck | RESNET.BasicBlock):
            nn.init.constant_((module.bn3 if isinstance(module, RESNET.Bottleneck) else module.bn2).weight, 0.2)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
        elif isinstance(module, nn.Dropout):
            module.eval()
    with torch.no_grad():
        model(x)
    return model.eval()


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def correlations(conversion: Conversion, ann: nn.Module, x: Tensor) -> dict[str, list[float]]:
    """The correlation of every output with the ANN's after 8 and after T steps."""
    with torch.no_grad():
        expected, got = ann(x), prefixes(conversion.snn, x)
    assert type(got) is type(expected) is OrderedDict
    assert list(got) == list(expected)
    assert all(got[key].shape == (TIMESTEPS, *value.shape) for key, value in expected.items())
    return {key: [correlation(got[key][t - 1], value) for t in (8, TIMESTEPS)] for key, value in expected.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("fcn_resnet50", 0.85), ("deeplabv3_resnet50", 0.75)])
def test_segmentation_by_resnet(name: str, least: float) -> None:
    torch.manual_seed(0)
    x = images()
    ann = settled(getattr(SEGMENTATION, name)(weights=None, weights_backbone=None, aux_loss=True), x)
    conversion = convert(ann, TIMESTEPS, data=x)
    assert conversion.report.spiking_coverage == 1.0
    assert conversion.report.notices == ()
    found = correlations(conversion, ann, x)
    assert list(found) == ["out", "aux"]
    assert all(early < late and late > least for early, late in found.values()), found
    for site in sites(conversion.snn).values():
        site.base_threshold /= 4
    wrong = correlations(conversion, ann, x)
    assert all(wrong[key][1] < found[key][1] - 0.1 for key in found), wrong


@pytest.mark.slow
def test_segmentation_with_gates_by_surgery() -> None:
    """Hardswish becomes neurons, which is another function; the gates of its squeeze-and-excitation stay analog."""
    torch.manual_seed(0)
    x = images()
    ann = settled(SEGMENTATION.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None), x)
    conversion = convert(ann, TIMESTEPS, data=x, surgery=ReluSurgery())
    assert 0.7 < conversion.report.spiking_coverage < 0.9
    assert any("nodes stay analog" in notice for notice in conversion.report.notices)
    found = correlations(conversion, ann, x)
    assert list(found) == ["out"]
    assert found["out"][1] > 0.5, found


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["BatchNorm2d", "FrozenBatchNorm2d"])
def test_a_feature_pyramid(norm: str) -> None:
    """A backbone of torchvision's detectors: five outputs, of which the last is every second value of the fourth."""
    torch.manual_seed(0)
    x = images()
    layer = nn.BatchNorm2d if norm == "BatchNorm2d" else importlib.import_module("torchvision.ops").FrozenBatchNorm2d
    ann = settled(BACKBONES.resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=layer), x)
    conversion = convert(ann, TIMESTEPS, data=x)
    assert conversion.report.spiking_coverage == 1.0
    assert conversion.report.notices == ()
    found = correlations(conversion, ann, x)
    assert list(found) == ["0", "1", "2", "3", "pool"]
    assert all(early < late and late > 0.95 for early, late in found.values()), found
