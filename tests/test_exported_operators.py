"""torch.export programs as graphs of torch.nn modules: every operator becomes a module or a function of the table."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exports import Function, exported, left_over, types, worst
from lmh.convert.exported import modules_from_export
from lmh.convert.exported.aten import TABLE

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's own
IMAGE, SERIES, VOLUME, VECTOR = (6, 8, 8), (6, 8), (6, 4, 8, 8), (6,)
MODULES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(6, 4, 3, padding="same"), SERIES),
    (nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False), IMAGE),
    (nn.Conv2d(6, 12, 3, groups=6, dilation=2, padding=2), IMAGE),
    (nn.Conv3d(6, 4, (1, 3, 3)), VOLUME),
    (nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1), SERIES),
    (nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), IMAGE),
    (nn.ConvTranspose3d(6, 4, 2), VOLUME),
    (nn.Linear(6, 4, bias=False), VECTOR),
    (nn.BatchNorm1d(6), VECTOR),
    (nn.BatchNorm1d(6, affine=False), SERIES),
    (nn.BatchNorm2d(6, eps=0.1, momentum=0.3), IMAGE),
    (nn.BatchNorm3d(6), VOLUME),
    (nn.LayerNorm(8, bias=False), SERIES),
    (nn.GroupNorm(3, 6), IMAGE),
    (nn.MaxPool1d(2), SERIES),
    (nn.MaxPool2d(3, 2, 1, ceil_mode=True), IMAGE),
    (nn.MaxPool3d(2), VOLUME),
    (nn.AdaptiveMaxPool1d(3), SERIES),
    (nn.AdaptiveMaxPool2d((3, 2)), IMAGE),
    (nn.AdaptiveMaxPool3d(2), VOLUME),
    (nn.AvgPool1d(2, padding=1, count_include_pad=False), SERIES),
    (nn.AvgPool2d(3, divisor_override=5), IMAGE),
    (nn.AvgPool3d(2), VOLUME),
    (nn.AdaptiveAvgPool1d(3), SERIES),
    (nn.AdaptiveAvgPool2d((4, 3)), IMAGE),
    (nn.AdaptiveAvgPool3d(1), VOLUME),
    (nn.ReLU(), VECTOR),
    (nn.ReLU6(inplace=True), VECTOR),
    (nn.Hardtanh(-0.5, 0.5), VECTOR),
    (nn.LeakyReLU(0.3), VECTOR),
    (nn.PReLU(6), IMAGE),
    (nn.RReLU(), VECTOR),
    (nn.ELU(0.5), VECTOR),
    (nn.CELU(0.5), VECTOR),
    (nn.SELU(), VECTOR),
    (nn.GELU("tanh"), VECTOR),
    (nn.SiLU(inplace=True), VECTOR),
    (nn.Mish(), VECTOR),
    (nn.Softplus(2.0, 3.0), VECTOR),
    (nn.Tanh(), VECTOR),
    (nn.Sigmoid(), VECTOR),
    (nn.LogSigmoid(), VECTOR),
    (nn.Hardsigmoid(), VECTOR),
    (nn.Hardswish(), VECTOR),
    (nn.Threshold(0.2, -1.0), VECTOR),
    (nn.GLU(1), VECTOR),
    (nn.Softmax(1), VECTOR),
    (nn.LogSoftmax(-1), VECTOR),
    (nn.Dropout(0.3, inplace=True), VECTOR),
    (nn.Dropout2d(0.3), IMAGE),
    (nn.AlphaDropout(0.3), VECTOR),
    (nn.Flatten(), IMAGE),
    (nn.Unflatten(1, (2, 3)), VECTOR),
    (nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), IMAGE),
    (nn.Upsample(size=5), SERIES),
    (nn.PixelShuffle(2), (8, 4, 4)),
    (nn.ChannelShuffle(3), IMAGE),
]


@pytest.mark.parametrize(("module", "shape"), MODULES, ids=[type(module).__name__ for module, _ in MODULES])
def test_a_module_becomes_itself(module: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(module).eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            torch.nn.init.uniform_(buffer, 0.5, 2.0)
    program = exported(model, shape)
    graph = modules_from_export(program)
    assert types(graph) == {"0": type(module).__name__}
    if hasattr(module, "inplace"):
        module.inplace = False
    assert str(graph.get_submodule("0")) == str(module)
    for form in (program, program.run_decompositions({})):
        graph = modules_from_export(form)
        assert not left_over(graph)
        assert worst(graph, model, shape) < 1e-5
        assert graph.state_dict().keys() == model.state_dict().keys()


KERNEL = torch.ones(3, 6, 2, 2)
FUNCTIONS: list[tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = [
    (lambda x: x.view(x.size(0), -1), IMAGE),
    (lambda x: x.reshape(x.shape[0], 2, -1).flatten(1), IMAGE),
    (lambda x: torch.flatten(x, 1), IMAGE),
    (lambda x: x.permute(0, 2, 3, 1).contiguous().transpose(1, 2), IMAGE),
    (lambda x: x.contiguous(memory_format=torch.channels_last) + 1, IMAGE),
    (lambda x: x.mean((2, 3)) + x.sum(dim=(2, 3), keepdim=True).squeeze(-1).squeeze(-1), IMAGE),
    (lambda x: x.unsqueeze(1).squeeze((1,)), IMAGE),
    (lambda x: torch.cat([x, -x, x * 0.5, 3 - x, x / 4], 1), IMAGE),
    (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), IMAGE),
    (lambda x: torch.cat([x.split(4, 1)[1], x.split([1, 5], 1)[1]], 1), IMAGE),
    (lambda x: torch.add(x, x, alpha=2) - torch.sub(x, 1, alpha=3), VECTOR),
    (lambda x: F.pad(x, (1, 2, 0, 1)) + F.pad(x, (1, 2, 0, 1), mode="reflect"), IMAGE),
    (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3), "constant", 0.0), IMAGE),
    (lambda x: x[:, 1:-1] + x[:, -1:] + x[:, 2, None], IMAGE),
    (lambda x: x[:, [2, 0, 1]], IMAGE),
    (lambda x: F.interpolate(x, scale_factor=2.0, mode="bicubic"), IMAGE),
    (lambda x: F.interpolate(x, size=(5, 7), mode="bilinear", antialias=True), IMAGE),
    (lambda x: F.interpolate(x, size=x.shape[2:], mode="nearest-exact"), IMAGE),
    (lambda x: F.interpolate(x, scale_factor=2.0, mode="trilinear"), VOLUME),
    (lambda x: F.max_pool2d(F.relu(x), 2) + F.avg_pool2d(F.relu6(x), 2), IMAGE),
    (lambda x: F.adaptive_avg_pool2d(x.clamp(min=0), 1) + F.adaptive_max_pool2d(x.clamp_min(0), 1), IMAGE),
    (lambda x: F.dropout(x, 0.5, False).relu() + F.dropout2d(x, 0.5, False), IMAGE),
    (lambda x: torch.softmax(x, 1) + F.log_softmax(x, dim=1) + torch.sigmoid(x), VECTOR),
    (lambda x: x.float().to(x.device).detach().clone() + torch.tensor(2.0), VECTOR),
    (lambda x: F.conv2d(x, KERNEL, stride=2), IMAGE),
    (lambda x: x * x.mean((2, 3), keepdim=True), IMAGE),
    (lambda x: F.softshrink(x, 0.2) - F.hardshrink(x, 0.3), VECTOR),
    (lambda x: F.adaptive_avg_pool2d(x, (None, 3)), IMAGE),
]


@pytest.mark.parametrize(("function", "shape"), FUNCTIONS, ids=map(str, range(len(FUNCTIONS))))
def test_a_function_gets_a_spelling_of_the_table(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    model = Function(function).eval()
    program = exported(model, shape)
    graph = modules_from_export(program)
    assert not left_over(graph)
    assert worst(graph, model, shape) < 1e-5
    assert worst(modules_from_export(program.run_decompositions()), model, shape) < 1e-5


def test_the_table_names_operators_that_exist() -> None:
    assert [key for key in TABLE if not hasattr(torch.ops.aten, key.partition(".")[0])] == []
