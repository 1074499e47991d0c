"""What is computed again in the backward pass is what the forward pass had, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmh import Kernel, carry_state, fused, per_step, recompute, use_kernel
from lmh.convert import convert
from lmh.finetune import BFloat16, Float32, KeepAll, Recompute, Schedule, TimeSliced
from lmh.finetune.optimiser import optimiser
from lmh.finetune.steps import Stepper, Work
from lmh.kernels import can_compile, program
from lmh.passes import Job, packed, unpack_pass
from lmh.recomputed import Normalised, Spikes, Sum, source_of
from lmh.resets import DetachedReset
from lmh.spiking import LMH, PerChannel, PerLayer, PerStep, SpikingSite
from lmh.surrogates import Triangle
from lmh.time_axis import TimeAxis, time_axis
from lmh.zoo.cifar_resnet import CifarResNet
from tensors import last, nodes

needs_compiler = pytest.mark.skipif(not can_compile("cpu"), reason="no C++ compiler")
SHAPES = {"linear": (3, 5), "sequence": (3, 5, 6), "image": (3, 5, 4, 2)}


def sources(tensor: Tensor) -> list[object]:
    """The sources of all neurons in the graph, None where the current itself is kept."""
    return [node.sources[0] for node in nodes(tensor) if hasattr(node, "sources")]


def network(steps: int = 2, granularity: object = PerLayer()) -> nn.Module:
    """A small residual network that spikes, with neurons that differ and BatchNorms that do."""
    torch.manual_seed(0)
    ann = CifarResNet(8)
    with torch.no_grad():
        for module in ann.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2.0)
                module.bias.normal_(0.2, 0.3)
    snn = convert(ann, steps, data=torch.rand(8, 3, 16, 16), neuron=LMH(granularity=granularity)).snn
    with torch.no_grad():
        for name, parameter in snn.named_parameters():
            if "raw_" in name:
                parameter.normal_(0, 0.1)
    return snn.train()


def gradients(
    snn: nn.Module, memory: object, *, slices: int = 1, precision: object = Float32(), frozen: bool = False
) -> dict[str, Tensor]:
    """Gradients of a batch by a Stepper, by parameter."""
    snn = copy.deepcopy(snn)
    schedule = Schedule(epochs=1, precision=precision, memory=memory, clip_norm=None)
    steps = time_axis(snn).timesteps
    if frozen:
        for module in snn.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    if precision.channels_last:
        snn.to(memory_format=torch.channels_last)
    stepper = Stepper(snn, optimiser(snn, schedule), schedule, TimeSliced(steps // slices))
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(4, 3, 16, 16, generator=generator), torch.arange(4)
    stepper(Work((x,), y, None))
    return {name: p.grad for name, p in snn.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": Float32(channels_last=True)},
        {"precision": BFloat16()},
        {"frozen": True},
        {"slices": 2},
    ],
    ids=["float32", "channels last", "bfloat16", "frozen BatchNorm", "slices"],
)
@pytest.mark.parametrize("granularity", [PerLayer(), PerChannel(), PerStep()], ids=repr)
def test_gradients_are_those_of_a_step_that_keeps_everything(granularity: object, options: dict[str, Any]) -> None:
    snn = network(granularity=granularity)
    ours, expected = gradients(snn, Recompute(), **options), gradients(snn, KeepAll(), **options)
    assert ours.keys() == expected.keys()
    assert {name for name, gradient in expected.items() if not torch.equal(gradient, ours[name])} == set()
    assert sum(bool(gradient.abs().max() > 0) for gradient in expected.values()) > len(expected) / 2


@needs_compiler
@pytest.mark.slow
def test_compiled_passes_unpack_the_same_spikes(monkeypatch: pytest.MonkeyPatch) -> None:
    snn, called = network(2, PerStep()), []
    monkeypatch.setattr(fused, "program", lambda *wanted: called.append(wanted[0]) or program(*wanted))
    with use_kernel(Kernel.COMPILED):
        ours, expected = gradients(snn, Recompute()), gradients(snn, KeepAll())
    assert {name for name, gradient in expected.items() if not torch.equal(gradient, ours[name])} == set()
    assert unpack_pass in called


@needs_compiler
@pytest.mark.parametrize("per_step", [False, True], ids=["", "per step"])
def test_nine_steps_are_two_bytes_of_a_compiled_pass(per_step: bool) -> None:
    theta = 0.5 + torch.rand(9, 6, 1) if per_step else 0.5 + torch.rand(6, 1)
    output = (torch.rand(9, 6, 20) > 0.5) * theta
    job = Job(9, Triangle(), DetachedReset(), per_step=per_step)
    bits = packed(list(output))
    for dtype in (torch.float32, torch.bfloat16):
        found = program(unpack_pass, job, dtype)(bits, theta)
        assert found.dtype == dtype
        assert torch.equal(found, output.to(dtype).flatten(0, 1))


def test_a_wrong_bias_shows_in_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    snn = network()
    expected = gradients(snn, KeepAll())
    right = Normalised.of.__func__

    def wrong(cls: type[Normalised], node: Any) -> Normalised:
        found = right(cls, node)
        return Normalised(node, found.bias + 1e-3)

    monkeypatch.setattr(Normalised, "of", classmethod(wrong))
    assert not all(torch.equal(gradient, expected[name]) for name, gradient in gradients(snn, Recompute()).items())


def test_currents_of_plain_layers_are_not_kept_and_each_convolution_reads_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    snn, called = network(), []
    plain = Spikes.__call__
    monkeypatch.setattr(Spikes, "__call__", lambda self: called.append(self.shape) or plain(self))
    with recompute():
        output = snn(torch.rand(4, 3, 16, 16))
    padded_shortcuts, kinds = 2, [type(source) for source in sources(output)]
    assert (kinds.count(Normalised), kinds.count(Sum), len(kinds)) == (4, 1, 5 + padded_shortcuts)
    output.sum().backward()
    convolutions = 6
    assert len(called) == convolutions + kinds.count(Sum)


@pytest.mark.parametrize("steps", [1, 2, 8, 9, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [Tensor.contiguous, last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("granularity", [PerLayer(), PerChannel(), PerStep()], ids=repr)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_spikes_give_the_output(
    shape: tuple[int, ...], granularity: object, order: Callable[[Tensor], Tensor], dtype: torch.dtype, steps: int
) -> None:
    for theta in (torch.tensor(0.7), torch.linspace(0.3, 1.1, 5)):
        site = SpikingSite(TimeAxis(steps), theta, torch.tensor(0.5), LMH(granularity=granularity), channels=5)
        site = site.to(torch.float64) if dtype == torch.float64 else site
        with torch.no_grad():
            site.raw_threshold.normal_(0, 0.3)
        current = order(torch.rand(steps * shape[0], *shape[1:]).to(dtype))
        with use_kernel(Kernel.FUSED), recompute():
            output = site(current.requires_grad_())
        again = output.grad_fn.spikes()
        assert torch.equal(again, output)
        assert again.dtype == output.dtype
        assert again.stride() == output.stride()
        assert 0.05 < float((output > 0).double().mean()) < 0.95


class TestSource:
    @pytest.fixture
    def norm(self) -> nn.BatchNorm2d:
        norm = nn.BatchNorm2d(5)
        with torch.no_grad():
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
        return norm

    @pytest.fixture
    def x(self) -> Tensor:
        return (torch.randn(6, 5, 7, 3) * 3 + 1).requires_grad_()

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("order", [Tensor.contiguous, last], ids=["contiguous", "channels last"])
    def test_a_normalised_current_is_computed_again(
        self, norm: nn.BatchNorm2d, x: Tensor, order: Callable[[Tensor], Tensor], training: bool
    ) -> None:
        norm.train(training)
        current = norm(order(x))
        source, before = source_of(current), (norm.running_mean.clone(), norm.num_batches_tracked.clone())
        assert torch.equal(source(), current)
        assert source().stride() == current.stride()
        assert torch.equal(before[0], norm.running_mean)
        assert torch.equal(before[1], norm.num_batches_tracked)

    def test_a_bias_that_changes_afterwards_does_not_count(self, norm: nn.BatchNorm2d, x: Tensor) -> None:
        current = norm(x)
        source = source_of(current)
        with torch.no_grad():
            norm.bias.add_(1)
        assert torch.equal(source(), current)

    def test_a_weight_that_changes_afterwards_is_an_error(self, norm: nn.BatchNorm2d, x: Tensor) -> None:
        source = source_of(norm(x))
        with torch.no_grad():
            norm.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            source()

    def test_sums_of_two_are_found_and_others_are_not(self, norm: nn.BatchNorm2d, x: Tensor) -> None:
        site = SpikingSite(TimeAxis(2), torch.tensor(0.7), torch.tensor(0.5), LMH())
        with recompute():
            spikes, one, other = site(norm(x)), norm(x), norm(x)
        for current in (one + other, spikes + one, one + (spikes + other)):
            assert isinstance(source_of(current), Sum)
            assert torch.equal(source_of(current)(), current)
        for current in (one + 1.0, one + x, torch.add(one, other, alpha=2), one + norm(x[:1]), one * other):
            assert source_of(current) is None

    def test_what_cannot_be_computed_again_is_kept(self, norm: nn.BatchNorm2d, x: Tensor) -> None:
        changed = norm(x)
        with torch.no_grad():
            changed.mul_(2)
        assert source_of(changed) is None
        assert source_of(nn.BatchNorm2d(5, affine=False)(x)) is None
        assert source_of(nn.functional.batch_norm(x, None, None, norm.weight, None, True)) is None
        assert source_of(x) is None
        assert source_of(norm(x).double()) is None
        norm.requires_grad_(False)
        assert source_of(norm(x)) is None

    def test_a_site_keeps_what_it_was_given_then(self, norm: nn.BatchNorm2d, x: Tensor) -> None:
        site = SpikingSite(TimeAxis(2), torch.tensor(0.7), torch.tensor(0.5), LMH())
        with recompute():
            assert sources(site(norm(x) * 2)) == [None]
            assert isinstance(sources(site(norm(x)))[0], Normalised)
        assert sources(site(norm(x))) == [None]


def test_steps_that_go_on_from_a_state_give_the_same() -> None:
    snn, x = network(4), torch.rand(4, 3, 16, 16)

    def found(context: Callable[[], Any]) -> list[Tensor]:
        network = copy.deepcopy(snn)
        with carry_state(network), context():
            losses = [per_step(network, x, steps=2).square().sum() for _ in range(2)]
        sum(losses).backward()
        return [parameter.grad for parameter in network.parameters()]

    assert all(torch.equal(*pair) for pair in zip(found(recompute), found(nullcontext), strict=True))


def test_the_graph_can_be_run_twice() -> None:
    snn, x = network(), torch.rand(4, 3, 16, 16)
    with recompute():
        loss = snn(x).square().sum()
    parameters = list(snn.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(torch.equal(*pair) for pair in zip(first, torch.autograd.grad(loss, parameters), strict=True))
