"""Which kernel runs a site: chosen from the size of the work, asked for in a block, told by the network."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

import nets
from lmh import Kernel, kernels, kernels_used, sites, use_kernel
from lmh.convert import convert, deploy
from lmh.errors import ArgumentError
from lmh.zoo.cifar_resnet import CifarResNet

T = 4
needs_compiler = pytest.mark.skipif(not kernels.can_compile("cpu"), reason="no C++ compiler")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def missing() -> str:
        from torch._inductor.exc import InvalidCxxCompiler

        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    kernels.can_compile.cache_clear()
    yield
    kernels.can_compile.cache_clear()


LARGE = (kernels.WORTH_COMPILING,)


def chosen(current: Tensor, *, steps: int = T, training: bool = True) -> Kernel:
    return kernels.choose(current, steps=steps, training=training)


@needs_compiler
def test_the_kernel_is_chosen_from_the_size_of_the_work() -> None:
    assert chosen(torch.empty(LARGE)) is Kernel.COMPILED
    assert chosen(torch.empty(LARGE[0] - 1)) is Kernel.FUSED
    assert chosen(torch.empty(LARGE), steps=kernels.MOST_COMPILED_STEPS + 1) is Kernel.FUSED
    assert chosen(torch.empty(LARGE), training=False) is Kernel.EAGER
    assert chosen(torch.empty(LARGE, device="meta")) is Kernel.FUSED
    with FakeTensorMode():
        assert chosen(torch.empty(LARGE)) is Kernel.FUSED


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_large_work_is_fused_and_asking_for_more_is_refused() -> None:
    assert chosen(torch.empty(LARGE)) is Kernel.FUSED
    if not kernels.can_compile("cuda"):
        with (
            pytest.raises(ArgumentError, match=r"no compiler here.*g\+\+.*use Kernel\.FUSED"),
            use_kernel(Kernel.COMPILED),
        ):
            pass


@pytest.mark.parametrize("kernel", Kernel, ids=lambda kernel: kernel.value)
@pytest.mark.parametrize("training", [True, False])
@needs_compiler
def test_a_kernel_can_be_asked_for_inside_a_block_only(kernel: Kernel, training: bool) -> None:
    before = chosen(torch.empty(8), training=training)
    with use_kernel(kernel):
        assert chosen(torch.empty(8), training=training) is kernel
        with use_kernel(Kernel.EAGER):
            assert chosen(torch.empty(8), training=training) is Kernel.EAGER
        assert chosen(torch.empty(8, device="meta")) is (Kernel.EAGER if kernel is Kernel.EAGER else Kernel.FUSED)
    assert chosen(torch.empty(8), training=training) is before


def test_a_network_tells_which_kernel_ran_its_sites() -> None:
    ann, x = nets.Residual(), torch.rand(4, 2, 8, 8)
    snn = convert(ann, T, data=x).snn
    assert set(kernels_used(snn)) == set(sites(snn))
    snn.train()(x)
    assert set(kernels_used(snn).values()) == {Kernel.FUSED}
    with use_kernel(Kernel.EAGER):
        snn(x)
    assert set(kernels_used(snn).values()) == {Kernel.EAGER}
    assert kernels_used(copy.deepcopy(snn)) == kernels_used(snn)
    snn.train()(x)
    with torch.no_grad():
        snn(x)
    assert set(kernels_used(snn).values()) == {Kernel.EAGER}
    assert Kernel(Kernel.COMPILED.value) is Kernel.COMPILED


@pytest.mark.parametrize("training", [True, False])
def test_tracers_see_the_plain_loop(training: bool) -> None:
    snn = convert(nets.conv_net(), T, data=torch.rand(4, 2, 8, 8)).snn.train(training)
    for module in snn.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout):
            module.eval()
    x = torch.rand(2, 2, 8, 8)
    expected = snn(x)
    for strict in (True, False):
        program = torch.export.export(snn, (x,), strict=strict)
        assert torch.allclose(program.module()(x), expected, atol=1e-6)
        assert not [node for node in program.graph.nodes if "autograd" in str(node.target)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        assert torch.allclose(torch.jit.trace(snn, x, check_trace=False)(x), expected, atol=1e-6)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("forgotten", [False, True], ids=["at first", "after torch.export"])
def test_a_network_needs_few_compilations_whatever_its_size(forgotten: bool) -> None:
    if forgotten:
        torch.export.export(nn.Identity(), (torch.rand(1),), strict=True)
    x = torch.rand(6, 3, 32, 32)
    snn = convert(CifarResNet(20), T, data=x).snn.train()
    before = counters["stats"]["unique_graphs"]
    for batch in (x, x[:5]):
        with use_kernel(Kernel.COMPILED):
            snn(batch).square().sum().backward()
    assert len(sites(snn)) == 19
    assert set(kernels_used(snn).values()) == {Kernel.COMPILED}
    assert counters["stats"]["unique_graphs"] - before <= 4
    assert all(parameter.grad is not None for parameter in snn.parameters())


@needs_compiler
@pytest.mark.slow
def test_a_deployed_network_compiles_once_for_each_mode_and_not_for_each_size() -> None:
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    fast = deploy(convert(ann, T, data=torch.rand(4, 3, 40, 40)))

    def compilations(size: int) -> int:
        before = counters["stats"]["unique_graphs"]
        with use_kernel(Kernel.COMPILED):
            fast(torch.rand(2, 3, size, size))
        return counters["stats"]["unique_graphs"] - before

    with torch.inference_mode():
        first = compilations(40)
    found = [compilations(size) for size in (40, 36, 30)]
    with torch.inference_mode():
        found += [compilations(size) for size in (28, 26)]
    assert 1 <= first <= 2
    assert found[0] <= first
    assert found[1:] == [0] * 4
