"""Devices: every path once on ``meta``, where a tensor made on the wrong device fails, and on CUDA against the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import nets
from lmh import (
    LMH,
    Kernel,
    PerChannel,
    PerLayer,
    PerStep,
    carry_state,
    kernels_used,
    per_step,
    prefixes,
    sites,
    use_kernel,
)
from lmh.convert import EventFrames, assemble, convert, prepare
from lmh.convert.pipeline import Recipe
from lmh.finetune.losses import TET, CrossEntropy, Distillation, combined
from lmh.records import Calibration

pytestmark = pytest.mark.device

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def calibration(ann: nn.Module) -> Calibration:
    prepared = prepare(ann, (2, 8, 8))
    theta = {path: torch.full((prepared.channels[path],), 0.7) for path in prepared.spiking}
    return Calibration("by hand", 4, 0, theta, {path: torch.full_like(value, 0.5) for path, value in theta.items()})


@pytest.mark.parametrize("kernel", [Kernel.EAGER, Kernel.FUSED], ids=lambda kernel: kernel.value)
@pytest.mark.parametrize("granularity", [PerLayer(), PerChannel(), PerStep()])
@pytest.mark.parametrize("net", [nets.conv_net, nets.Residual])
def test_rewrite_forward_backward_and_step_on_meta(
    net: type[nn.Module], granularity: PerLayer | PerChannel | PerStep, kernel: Kernel
) -> None:
    ann = net()
    found = calibration(ann)
    ann.to("meta")
    x = torch.empty(3, 2, 8, 8, device="meta")
    snn = convert(ann, 4, example_input=x, calibration=found, neuron=LMH(granularity=granularity)).snn
    assert {parameter.device.type for parameter in snn.parameters()} == {"meta"}
    optimizer = torch.optim.SGD(snn.parameters(), lr=0.1, momentum=0.9)
    labels = torch.empty(3, dtype=torch.long, device="meta")
    for loss in (CrossEntropy(), TET()):
        with use_kernel(kernel):
            outputs = per_step(snn.train(), x) if loss.per_step else snn.train()(x)
        assert set(kernels_used(snn).values()) == {kernel}
        combined(loss, Distillation(), outputs, labels, outputs.mean(0) if loss.per_step else outputs).backward()
        nn.utils.clip_grad_norm_(snn.parameters(), 1.0)
        optimizer.step()
    assert all(parameter.grad is not None for parameter in snn.parameters())
    assert snn.eval()(x).device.type == prefixes(snn, x).device.type == "meta"
    if not isinstance(granularity, PerStep):
        with carry_state(snn):
            assert snn(x).shape == snn(x).shape == (3, 3)


def test_event_frames_on_meta() -> None:
    ann = nets.Residual()
    recipe = Recipe(4, encoding=EventFrames(), sample_shape=(2, 8, 8))
    snn = assemble(prepare(ann, (2, 8, 8)), calibration(ann), recipe).snn.to("meta")
    assert snn(torch.empty(4, 3, 2, 8, 8, device="meta")).shape == (3, 3)


@needs_cuda
def test_cuda_gives_the_spikes_of_the_cpu() -> None:
    ann, x = nets.Residual(), torch.rand(8, 2, 8, 8, dtype=torch.float64)
    cpu = convert(ann, 4, data=x.float()).snn.double()
    cuda = copy.deepcopy(cpu).cuda()
    assert torch.allclose(per_step(cuda, x.cuda()).cpu(), per_step(cpu, x), atol=1e-9)


@needs_cuda
def test_cuda_gives_the_gradients_of_the_cpu() -> None:
    ann, x = nets.Residual(), torch.rand(8, 2, 8, 8, dtype=torch.float64)
    cpu = convert(ann, 4, data=x.float()).snn.double().train()
    cuda = copy.deepcopy(cpu).cuda()

    def gradients(snn: nn.Module, batch: Tensor) -> list[Tensor]:
        snn(batch).square().sum().backward()
        return [parameter.grad.cpu() for parameter in snn.parameters() if parameter.grad is not None]

    for a, b in zip(gradients(cpu, x), gradients(cuda, x.cuda()), strict=True):
        assert torch.allclose(a, b, atol=1e-8)


@needs_cuda
@pytest.mark.slow
def test_cuda_compiled_gives_the_spikes_and_gradients_of_the_cpu() -> None:
    ann, x = nets.Residual(), torch.rand(8, 2, 8, 8, dtype=torch.float64)
    cpu = convert(ann, 4, data=x.float()).snn.double().train()
    cuda = copy.deepcopy(cpu).cuda()
    with use_kernel(Kernel.COMPILED):
        output = cuda(x.cuda())
    expected = cpu(x)
    assert set(kernels_used(cuda).values()) == {Kernel.COMPILED}
    assert torch.allclose(output.cpu(), expected, atol=1e-9)
    output.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(cpu.parameters(), cuda.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad.cpu(), atol=1e-8)


@needs_cuda
def test_an_ann_on_cuda_is_converted_there() -> None:
    x = torch.rand(8, 2, 8, 8).cuda()
    snn = convert(nets.Residual().cuda(), 4, data=x).snn
    assert {parameter.device.type for parameter in snn.parameters()} == {"cuda"}
    assert all(site.base_threshold.is_cuda for site in sites(snn).values())
    assert snn(x).is_cuda
