"""BatchNorm, a residual sum and neurons as one function give what they give one after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.data import DataLoader, TensorDataset

from lmh import Kernel, carry_state, fused, fused_layers, kernels, per_step, recompute, use_kernel
from lmh import batch_norm as norms
from lmh.batch_norm import PendingCurrent
from lmh.convert import convert
from lmh.convert.normalisation import TEBN, TdBN
from lmh.finetune import Schedule, finetune, steps
from lmh.layers import fusible
from lmh.spiking import LMH, PerChannel, PerLayer, PerStep, SpikingSite
from lmh.time_axis import TimeAxis
from lmh.torchvision_shim import torchvision
from lmh.zoo.cifar_resnet import CifarResNet
from tensors import last, nodes

T, N, C = 3, 4, 5


@pytest.fixture
def compiled_without_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """COMPILED without its compiler: the same passes as they are."""
    monkeypatch.setattr(kernels, "can_compile", lambda device: True)
    for module in (fused, norms):
        monkeypatch.setattr(module, "program", lambda function, job, variant: partial(function, job, variant))
    with use_kernel(Kernel.COMPILED):
        yield


def normalised_apart(output: Tensor) -> int:
    """How many BatchNorms of the graph are nodes of their own."""
    return sum("NativeBatchNorm" in node.name() for node in nodes(output))


def network(**options: Any) -> nn.Module:
    """A small residual network that spikes, in train mode, with neurons and BatchNorms that differ."""
    torch.manual_seed(0)
    snn = convert(CifarResNet(8), T, data=torch.rand(8, 3, 16, 16), **options).snn
    with torch.no_grad():
        for name, parameter in snn.named_parameters():
            if "raw_" in name:
                parameter.normal_(0.0, 0.2)
        for module in snn.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2.0)
                module.bias.normal_(0.2, 0.3)
    return snn.train()


def layer(norm: nn.Module, site: SpikingSite, x: Tensor, shortcut: Tensor | None, fuse: bool) -> Tensor:
    """One layer, fused or one after the other."""
    current = PendingCurrent(norm, x) if fuse else norm(x)
    return site(current if shortcut is None else current + shortcut)


@pytest.mark.parametrize("shape", [(4, 4), (16,), (8, 2, 2), (5, 7)], ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["timed", "static"])
@pytest.mark.parametrize("summed", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("order", [Tensor.contiguous, last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("granularity", [PerLayer(), PerChannel(), PerStep()], ids=repr)
@pytest.mark.usefixtures("compiled_without_compiler")
def test_a_layer_is_the_same_as_its_parts(
    granularity: object, order: Callable[[Tensor], Tensor], summed: bool, static: bool, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[len(shape)]
    theta = torch.linspace(0.5, 1.5, C)
    neuron = LMH(granularity=granularity)
    size = (N if static else T * N, C, *shape)
    found = []
    for fuse in (True, False):
        generator.manual_seed(0)
        site = SpikingSite(TimeAxis(T), theta, torch.tensor(0.5), neuron, channels=C, static=static).double()
        norm = kind(C).double()
        x = (3.0 + torch.randn(size, dtype=torch.float64, generator=generator)).requires_grad_()
        r = torch.rand(size, dtype=torch.float64, generator=generator).requires_grad_() if summed else None
        with torch.no_grad():
            for parameter in (*site.parameters(), *norm.parameters()):
                parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
        output = layer(norm, site, order(x), None if r is None else order(r), fuse)
        output.backward(torch.randn(output.shape, dtype=torch.float64, generator=generator))
        assert 0.05 < float((output > 0).double().mean()) < 0.95
        leaves = [x, *([] if r is None else [r]), *norm.parameters(), *site.parameters()]
        found.append([output, *norm.buffers(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None
        assert ours.shape == theirs.shape
        assert float(((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).detach()) < 1e-11


@pytest.mark.skipif(not kernels.can_compile("cpu"), reason="torch.compile has no compiler here")
def test_a_network_trains_the_same_compiled() -> None:
    fusing, plain = network().double(), network().double()
    x, found = last(torch.rand(4, 3, 32, 32, dtype=torch.float64)), []
    for snn in (fusing, plain):
        with use_kernel(Kernel.COMPILED), fused_layers(snn) if snn is fusing else nullcontext():
            output = snn(x)
        assert normalised_apart(output) == (0 if snn is fusing else 7)
        (output * torch.linspace(-1, 1, 10)).sum().backward()
        found.append([output, *snn.buffers(), *(parameter.grad for parameter in snn.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("compiled_without_compiler")
@pytest.mark.parametrize("bits", [False, True], ids=["kept", "recomputed"])
def test_slices_carry_their_state(bits: bool) -> None:
    gradients = []
    for fuse in (True, False):
        snn = network().double()
        x = torch.rand(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        with carry_state(snn):
            for _ in range(T):
                with fused_layers(snn) if fuse else nullcontext(), recompute() if bits else nullcontext():
                    outputs = per_step(snn, x, steps=1)
                assert normalised_apart(outputs) == (0 if fuse else 7)
                outputs.square().sum().backward()
        gradients.append([parameter.grad for parameter in snn.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 40
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("compiled_without_compiler")
def test_what_is_computed_again_for_a_fused_layer_is_what_it_had() -> None:
    gradients = []
    for kept in (True, False):
        snn, x = network(), torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with fused_layers(snn), nullcontext() if kept else recompute():
            output = snn(x)
        assert normalised_apart(output) == 0
        output.square().sum().backward()
        gradients.append([parameter.grad for parameter in snn.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kernel", [Kernel.EAGER, Kernel.FUSED], ids=lambda kernel: kernel.value)
def test_other_kernels_compute_the_current_as_ever(kernel: Kernel) -> None:
    fusing, plain, x = network(), network(), torch.rand(4, 3, 32, 32)
    with use_kernel(kernel):
        with fused_layers(fusing):
            ours = fusing(x)
        assert torch.equal(ours, plain(x))
    assert all(torch.equal(a, b) for a, b in zip(fusing.buffers(), plain.buffers(), strict=True))


@pytest.mark.usefixtures("compiled_without_compiler")
def test_what_does_not_train_is_left_alone() -> None:
    snn, x = network(), torch.rand(2, 3, 32, 32)
    plain = copy.deepcopy(snn)
    with fused_layers(snn), torch.no_grad():
        assert torch.equal(snn(x), plain(x))
    snn.eval(), plain.eval()
    with fused_layers(snn):
        assert torch.equal(snn(x), plain(x))


@pytest.mark.usefixtures("compiled_without_compiler")
def test_the_network_is_as_before_behind_the_block() -> None:
    snn, x = network(), torch.rand(2, 3, 32, 32)
    before = dict(snn.named_modules())
    names = list(snn.state_dict())
    with fused_layers(snn):
        assert list(snn.state_dict()) == names
        assert {id(p) for p in snn.parameters()} == {id(p) for m in before.values() for p in m.parameters()}
    with pytest.raises(RuntimeError), fused_layers(snn):
        snn(x[:, :2])
    assert all(module is before[path] for path, module in snn.named_modules())


def test_it_takes_the_norms_in_front_of_neurons_alone() -> None:
    snn = network()
    first = ["bn1", "layer1.0.bn1", "layer1.0.bn2", "layer2.0.bn1", "layer2.0.bn2", "layer3.0.bn1", "layer3.0.bn2"]
    assert fusible(snn) == first  # not those of the shortcuts' convolutions, which a sum reads as it is
    assert fusible(nn.Sequential(nn.Identity(), snn)) == [f"1.{path}" for path in first]
    assert fusible(CifarResNet(8)) == []
    snn.get_submodule("bn1").register_forward_hook(lambda *_: None)
    snn.get_submodule("layer1.0.bn1").register_full_backward_hook(lambda *_: None)
    snn.get_submodule("layer1.0.relu2").register_forward_pre_hook(lambda *_: None)
    snn.get_submodule("layer2.0.relu1").register_forward_hook(lambda *_: None)  # is given the current as well
    assert fusible(snn) == first[4:]
    every = register_module_forward_hook(lambda *_: None)
    assert fusible(snn) == []
    every.remove()
    for norm in (TEBN(), TdBN()):
        assert fusible(network(normalisation=norm)) == ["bn1"]  # which is constant, and stays as it is


@pytest.mark.usefixtures("compiled_without_compiler")
@pytest.mark.parametrize("options", [{"momentum": None}, {"track_running_stats": False}, {"momentum": 0.5}], ids=str)
def test_running_statistics_learn_as_ever(options: dict[str, Any]) -> None:
    ours, theirs = nn.BatchNorm2d(C, **options).double(), nn.BatchNorm2d(C, **options).double()
    for seed in range(3):
        x = 100 + torch.randn(8, C, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        mean, deviation = PendingCurrent(ours, x).measured()
        theirs(x)
        assert torch.allclose(mean, x.mean((0, 2, 3)), rtol=1e-13)
        assert torch.allclose(deviation, (x.var((0, 2, 3), correction=0) + ours.eps).sqrt(), rtol=1e-10)
    assert len(list(ours.buffers())) == len(list(theirs.buffers()))
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-10)


@pytest.mark.usefixtures("compiled_without_compiler")
def test_a_mean_far_from_zero_costs_no_digits() -> None:
    x = 1e4 + torch.randn(16, C, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, deviation = PendingCurrent(nn.BatchNorm2d(C), x).measured()
    exact = x.double()
    assert torch.allclose(mean.double(), exact.mean((0, 2, 3)), rtol=1e-7)
    assert torch.allclose(deviation.double(), exact.std((0, 2, 3), correction=0), rtol=1e-4)


def test_a_second_sum_is_added_to_the_computed_current() -> None:
    norm, x = nn.BatchNorm2d(C), torch.randn(4, C, 4, 4)
    pending = PendingCurrent(norm, x)
    once = x + pending
    assert isinstance(once, PendingCurrent)
    assert once.shortcut is x
    assert torch.equal(once + x, copy.deepcopy(norm)(x) + x + x)
    for sum_ in (torch.add(pending, x), torch.add(x, pending), pending.add(x), x.add(pending)):
        assert isinstance(sum_, PendingCurrent)
        assert sum_.shortcut is x
    assert torch.equal(pending + x[:1], copy.deepcopy(norm)(x) + x[:1])


@pytest.mark.usefixtures("compiled_without_compiler")
def test_what_neither_neurons_nor_inputs_want_still_reaches_the_gain() -> None:
    snn, x = network().double(), torch.rand(4, 3, 32, 32, dtype=torch.float64)
    plain = copy.deepcopy(snn)
    for net in (snn, plain):
        for name, parameter in net.named_parameters():
            parameter.requires_grad_("bn" in name)
        with fused_layers(net) if net is snn else nullcontext():
            net(x).square().sum().backward()
    for ours, theirs in zip(snn.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.allclose(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("compiled_without_compiler")
def test_a_downsampling_block_has_two_batch_norms_and_one_sum() -> None:
    torch.manual_seed(0)
    ann, x = torchvision().models.resnet18(num_classes=10), torch.rand(4, 3, 64, 64)
    snn = convert(ann, 2, data=x).snn.double().train()
    plain = copy.deepcopy(snn)
    with fused_layers(snn):
        ours = snn(x.double())
    theirs = plain(x.double())
    assert normalised_apart(ours) == 1 + 3 + 4  # in front of the max-pool, one of two, on 2×2 positions
    assert torch.allclose(ours, theirs, rtol=1e-9)


def test_the_trainer_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []
    monkeypatch.setattr(steps, "fused_layers", lambda model: asked.append(model) or fused_layers(model))
    snn = network()
    data = DataLoader(TensorDataset(torch.rand(8, 3, 16, 16), torch.arange(8)), batch_size=4)
    finetune(snn, data, schedule=Schedule(epochs=1))
    assert asked == [snn, snn]


@pytest.mark.usefixtures("compiled_without_compiler")
def test_sixteen_bits_are_normalised_in_thirty_two() -> None:
    x = 100 + torch.randn(8, C, 8, 8, generator=torch.Generator().manual_seed(0))
    norm, site = nn.BatchNorm2d(C).bfloat16(), SpikingSite(TimeAxis(2), torch.tensor(0.5), torch.tensor(0.5), LMH())
    narrow = x.bfloat16()
    ours, exact = site(PendingCurrent(norm, narrow)), site(copy.deepcopy(norm).float()(narrow.float()))
    assert float(((ours > 0) ^ (exact > 0)).float().mean()) < 0.02
