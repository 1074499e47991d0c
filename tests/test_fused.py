"""The neurons as one autograd function, run as it is and compiled, against the plain loop and the NumPy oracle."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lmh import Kernel, carry_state, kernels, passes, per_step, use_kernel
from lmh.fused import run_neurons
from lmh.memory_order import Order
from lmh.neurons import Coefficients, State
from lmh.passes import Job
from lmh.resets import AttachedReset, DetachedReset, Reset
from lmh.spiking import LMH, PerChannel, PerLayer, PerStep, SpikingSite
from lmh.surrogates import Arctan, Rectangle, Sigmoid, Surrogate, Triangle
from lmh.time_axis import TimeAxis
from reference import lmh_numpy as oracle
from tensors import last

NAMES = ("theta", "lambda_s", "lambda_d", "mu_s", "mu_d")
SURROGATES = [Triangle(), Triangle(0.5), Rectangle(), Sigmoid(), Arctan()]
RESETS = [lambda soma, output: soma, lambda soma, output: soma - output]
"""The oracle's derivative of v_S[t]: detached, attached."""
T, N, C = 4, 3, 5
SHAPES = {"linear": (N, C), "sequence": (N, C, 6), "image": (N, C, 4, 2), "video": (N, C, 2, 3, 2)}
needs_compiler = pytest.mark.skipif(not kernels.can_compile("cpu"), reason="no C++ compiler")


@dataclass
class Case:
    """One call of the neurons with everything that has a gradient."""

    job: Job
    current: Tensor
    start: State
    values: Coefficients
    weight: Tensor

    def run(self, kernel: Kernel) -> tuple[Tensor, list[Tensor]]:
        """The output, and the gradients of current, v_S[0], θ, λ_S, λ_D, μ_S, μ_D."""
        output = self.output(kernel)
        wanted = [self.current, self.start.v_soma, *self.values]
        return output, list(torch.autograd.grad((output * self.weight).sum(), wanted))

    def output(self, kernel: Kernel) -> Tensor:
        """The output alone."""
        return run_neurons(self.job, self.current, self.start, self.values, kernel=kernel, keep=False).output


def case(
    shape: tuple[int, ...] = SHAPES["image"],
    *,
    granularity: object = PerLayer(),
    channels: bool = False,
    static: bool = False,
    order: Callable[[Tensor], Tensor] = Tensor.contiguous,
    surrogate: Surrogate | None = None,
    reset: Reset | None = None,
    dtype: torch.dtype = torch.float64,
    low: torch.dtype | None = None,
) -> Case:
    """A call whose coefficients are all away from the start.

    ``channels``: a threshold for each of them. ``low``: the dtype of the current, if not that of the potentials.
    """
    generator = torch.Generator().manual_seed(0)

    def near(value: float, *size: int) -> Tensor:
        return (value + 0.2 * torch.rand(size, dtype=torch.float64, generator=generator)).to(dtype).requires_grad_()

    per_channel = isinstance(granularity, PerChannel)
    time = (T,) if isinstance(granularity, PerStep) else ()
    size = (*time, shape[1]) if per_channel else time
    wide = (*time, shape[1]) if channels or per_channel else time
    values = Coefficients(near(0.8, *wide), near(0.8, *size), near(0.9, *size), near(0.1, *size), near(-0.2, *size))
    start = State(torch.zeros((), dtype=dtype), near(0.4, *wide[len(time) :]))
    batch = (shape[0] if static else T * shape[0], *shape[1:])
    current = 1.5 * torch.rand(batch, dtype=torch.float64, generator=generator) - 0.3
    weight = torch.randn(T * shape[0], *shape[1:], dtype=torch.float64, generator=generator)
    job = Job(T, surrogate or Triangle(), reset or DetachedReset(), static, bool(time))
    return Case(job, order(current.to(low or dtype)).requires_grad_(), start, values, order(weight.to(dtype)))


def site_of(steps: int = T, **options: Any) -> SpikingSite:
    """A site for five channels with a threshold each."""
    static = options.pop("static", False)
    theta, start = torch.linspace(0.5, 1.5, C), torch.tensor(0.5)
    return SpikingSite(TimeAxis(steps), theta, start, LMH(**options), channels=C, static=static)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in parts of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("static", [False, True], ids=["timed", "static"])
@pytest.mark.parametrize("order", [Tensor.contiguous, last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("channels", [False, True], ids=["one threshold", "threshold per channel"])
@pytest.mark.parametrize("granularity", [PerLayer(), PerChannel(), PerStep()], ids=repr)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_equals_the_plain_loop(
    shape: tuple[int, ...], granularity: object, channels: bool, order: Callable[[Tensor], Tensor], static: bool
) -> None:
    given = case(shape, granularity=granularity, channels=channels, order=order, static=static)
    output, gradients = given.run(Kernel.FUSED)
    expected, wanted = given.run(Kernel.EAGER)
    assert torch.equal(output, expected)
    assert 0.1 < float((output > 0).double().mean()) < 0.9
    for name, ours, theirs in zip(("current", "v_soma", *NAMES), gradients, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert distance(ours, theirs) < 1e-12, name


@pytest.mark.parametrize("reset", [DetachedReset(), AttachedReset()], ids=repr)
@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
@pytest.mark.parametrize("granularity", [PerLayer(), PerChannel(), PerStep()], ids=repr)
@pytest.mark.parametrize("kernel", [Kernel.EAGER, Kernel.FUSED], ids=lambda kernel: kernel.value)
def test_its_gradients_equal_those_of_the_oracle(
    kernel: Kernel, granularity: object, surrogate: Surrogate, reset: Reset
) -> None:
    given = case(granularity=granularity, channels=True, surrogate=surrogate, reset=reset)
    _, gradients = given.run(kernel)
    current, weight = (x.detach().unflatten(0, (T, N)).numpy() for x in (given.current, given.weight))
    theta = given.values.v_threshold.detach()
    values = {name: value.detach().numpy() for name, value in zip(NAMES, given.values, strict=True)}
    if given.job.per_step:
        values = {name: value.reshape(T, -1) for name, value in values.items()}
    values["v_init"] = (given.start.v_soma.detach() / (theta[0] if given.job.per_step else theta)).numpy()

    def slope(u: np.ndarray) -> np.ndarray:
        return surrogate(torch.from_numpy(u)).numpy()

    def reduced(found: dict[str, np.ndarray]) -> list[Tensor]:
        """Sums over what shares a value: positions and batch always, else channels and steps."""
        rows = [torch.from_numpy(found["current"]).flatten(0, 1)]
        for name, like in zip(("v_soma", *NAMES), (given.start.v_soma, *given.values), strict=True):
            terms = torch.from_numpy(found[name])
            terms = terms.unsqueeze(0) if name == "v_soma" else terms
            by_channel = terms.sum((1, 3, 4))
            kept = by_channel if name != "v_soma" and given.job.per_step else by_channel.sum(0)
            rows.append(kept if kept.shape == like.shape else kept.sum(-1))
        return rows

    expected, wrong = (
        reduced(oracle.sensitivities(current, weight, values, slope, reset=rule))
        for rule in (RESETS if reset == DetachedReset() else RESETS[::-1])
    )
    assert max(distance(ours, theirs) for ours, theirs in zip(gradients, expected, strict=True)) < 1e-12
    assert all(distance(ours, theirs) > 1e-3 for ours, theirs in zip(gradients[:2], wrong[:2], strict=True))


@pytest.mark.parametrize("order", [Tensor.contiguous, last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("static", [False, True], ids=["timed", "static"])
def test_it_keeps_its_current_and_its_start_until_its_backward_pass(
    static: bool, order: Callable[[Tensor], Tensor]
) -> None:
    """What autograd saves is given up by the backward pass; the graph itself may live on until the next call."""
    given = case((4, 5, 8, 8), channels=True, static=static, order=order)
    step = (4, 5, 8, 8)
    carried = replace(given, start=State(order(torch.rand(step, dtype=torch.float64)), order(torch.zeros(step))))

    def kept(case: Case, kernel: Kernel) -> list[Tensor]:
        found: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: found.append(x) or x, lambda x: x):
            case.output(kernel)
        return [tensor for tensor in found if tensor.numel() >= math.prod(step)]

    (current,) = kept(given, Kernel.FUSED)
    assert current.data_ptr() == given.current.data_ptr()
    places = [tensor.data_ptr() for tensor in kept(carried, Kernel.FUSED)]
    assert places == [tensor.data_ptr() for tensor in (given.current, *carried.start)]
    assert sum(tensor.numel() for tensor in kept(given, Kernel.EAGER)) > 4 * given.weight.numel()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("channels", [False, True], ids=["one threshold", "threshold per channel"])
@pytest.mark.parametrize("order", [Tensor.contiguous, last], ids=["contiguous", "channels last"])
def test_the_order_in_memory_is_kept_and_nothing_is_moved(
    order: Callable[[Tensor], Tensor], channels: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = case(shape, channels=channels, order=order)
    flatten, seen = Order.flatten, []

    def watched(self: Order, x: Tensor, *first: int) -> Tensor:
        flat = flatten(self, x, *first)
        seen.append(flat.data_ptr() == x.data_ptr())
        return flat

    monkeypatch.setattr(Order, "flatten", watched)
    output, (to_current, *_) = given.run(Kernel.FUSED)
    assert output.stride() == to_current.stride() == given.current.stride()
    assert seen
    assert all(seen)


def test_a_current_in_no_dense_order_gives_the_same() -> None:
    given = case((N, C, 4, 4), channels=True)
    wide = torch.zeros(T * N, C, 4, 8, dtype=torch.float64)
    wide[..., ::2] = given.current.detach()
    loose = copy.copy(given)
    loose.current = wide[..., ::2].requires_grad_()
    for ours, theirs in zip(loose.run(Kernel.FUSED)[1], given.run(Kernel.FUSED)[1], strict=True):
        assert distance(ours, theirs) < 1e-12


@pytest.mark.parametrize("kernel", [Kernel.EAGER, Kernel.FUSED], ids=lambda kernel: kernel.value)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_potentials_and_sums_are_float32_for_16_bit_currents(kernel: Kernel, dtype: torch.dtype) -> None:
    low = torch.rand(T * N, C, 6).to(dtype)

    def run(current: Tensor) -> tuple[SpikingSite, Tensor, Tensor]:
        site = site_of()
        current = current.clone().requires_grad_()
        with use_kernel(kernel):
            output = site(current)
        output.float().square().sum().backward()
        return site, output, current.grad

    narrow, wide = run(low), run(low.float())
    assert narrow[1].dtype == narrow[2].dtype == dtype
    assert torch.equal(narrow[1], wide[1].to(dtype))
    assert distance(narrow[2].float(), wide[2]) < 0.02
    assert distance(narrow[0].raw_lambda_d.grad, wide[0].raw_lambda_d.grad) < 0.02


def test_autocast_changes_nothing_inside() -> None:
    given = case(channels=True, dtype=torch.float32)
    plain = given.run(Kernel.FUSED)
    with torch.autocast("cpu", torch.bfloat16):
        cast = given.run(Kernel.FUSED)
    assert torch.equal(plain[0], cast[0])
    assert all(torch.equal(*pair) for pair in zip(plain[1], cast[1], strict=True))


@pytest.mark.parametrize("granularity", [PerLayer(), PerChannel(), PerStep()], ids=repr)
@pytest.mark.parametrize("order", [Tensor.contiguous, last], ids=["contiguous", "channels last"])
def test_carried_state_equals_that_of_the_plain_loop(order: Callable[[Tensor], Tensor], granularity: object) -> None:
    frames = [order(torch.rand(2 * N, C, 4, 4).double()) for _ in range(2)]

    def run(kernel: Kernel) -> tuple[list[Tensor], list[Tensor]]:
        site = site_of(granularity=granularity).double()
        current = [frame.clone(memory_format=torch.preserve_format).requires_grad_() for frame in frames]
        with use_kernel(kernel), carry_state(site):
            outputs = [per_step(site, frame, steps=2) for frame in current]
        sum((output * (k + 1)).sum() for k, output in enumerate(outputs)).backward()
        parameters = [parameter.grad for parameter in site.parameters()]
        return outputs, [*(frame.grad for frame in current), *parameters]

    outputs, gradients = run(Kernel.FUSED)
    expected, wanted = run(Kernel.EAGER)
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))
    assert all(distance(*pair) < 1e-12 for pair in zip(gradients, wanted, strict=True))
    assert not torch.equal(outputs[1], site_of(2, granularity=PerLayer()).double()(frames[1]))


@pytest.mark.parametrize("frozen", [{0}, {0, 1}, {3, 4, 5, 6}, {1, 2}, {2, 3, 4, 5, 6}], ids=str)
def test_what_needs_no_gradient_gets_none_and_the_rest_is_unchanged(frozen: set[int]) -> None:
    given = case(channels=True)
    _, expected = given.run(Kernel.FUSED)
    leaves = [given.current, given.start.v_soma, *given.values]
    for index in frozen:
        leaves[index].requires_grad_(False)
    output = given.output(Kernel.FUSED)
    (output * given.weight).sum().backward()
    for index, leaf in enumerate(leaves):
        assert leaf.grad is None if index in frozen else torch.equal(leaf.grad, expected[index])


def test_nothing_is_computed_for_frozen_coefficients(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case()
    for value in given.values[1:]:
        value.requires_grad_(False)
    asked: list[int] = []
    step = passes.lmh_step_adjoint

    def watched(*arguments: Any) -> Any:
        found = step(*arguments)
        terms = [lambda k=k, term=term: (asked.append(k), term())[1] for k, term in enumerate(found.coefficients)]
        return found._replace(coefficients=tuple(terms))

    monkeypatch.setattr(passes, "lmh_step_adjoint", watched)
    output = given.output(Kernel.FUSED)
    output.sum().backward()
    assert asked == [0] * T


def test_a_second_derivative_is_refused() -> None:
    given = case()
    output = given.output(Kernel.FUSED)
    (gradient,) = torch.autograd.grad(output.square().sum(), given.current, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_an_empty_batch_gives_an_empty_output() -> None:
    site = site_of()
    current = torch.zeros(0, C, 4, 4, requires_grad=True)
    output = site(current)
    output.sum().backward()
    assert output.shape == current.grad.shape == (0, C, 4, 4)
    assert torch.equal(site.v_init.grad, torch.zeros(C))


class Untraceable(Triangle):
    """A surrogate that torch.compile cannot follow."""

    def __call__(self, u: Tensor) -> Tensor:
        """Look at the data."""
        return super().__call__(u) * (2.0 if float(u.max()) > 1e9 else 1.0)


@needs_compiler
def test_neurons_that_cannot_be_compiled_run_uncompiled_and_say_so_once() -> None:
    given = case(surrogate=Untraceable(), channels=True)
    expected, wanted = case(channels=True).run(Kernel.FUSED)
    with pytest.warns(UserWarning, match=r"could not be compiled.*run uncompiled.*use_kernel\(Kernel\.FUSED\)"):
        output, gradients = given.run(Kernel.COMPILED)
    assert torch.equal(output, expected)
    assert all(distance(*pair) < 1e-12 for pair in zip(gradients, wanted, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given.run(Kernel.COMPILED)
    site = site_of(surrogate=Untraceable(), reset=given.job.reset)
    with use_kernel(Kernel.COMPILED):
        site(given.current.float())
    assert site.kernel is Kernel.FUSED


COMPILED_CASES = {
    "one threshold": {},
    "threshold per channel": {"channels": True},
    "channels last": {"channels": True, "order": last},
    "odd sizes": {"channels": True, "shape": (5, 3, 7, 5)},
    "odd sizes, channels last": {"channels": True, "shape": (5, 3, 7, 5), "order": last},
    "few positions": {"channels": True, "shape": (16, 24, 3, 3)},
    "no positions": {"channels": True, "shape": (16, 24)},
    "static": {"channels": True, "static": True},
    "per step": {"channels": True, "granularity": PerStep()},
    "bfloat16": {"low": torch.bfloat16},
}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("options", COMPILED_CASES.values(), ids=COMPILED_CASES)
def test_compiled_it_gives_the_same_spikes_and_gradients(options: dict[str, Any]) -> None:
    given = case(**{"shape": (16, 24, 8, 8), "dtype": torch.float32, **options})
    output, gradients = given.run(Kernel.COMPILED)
    expected, wanted = given.run(Kernel.FUSED)
    assert torch.equal(output, expected)
    assert torch.equal(gradients[0], wanted[0])
    for name, ours, theirs in zip(("v_soma", *NAMES), gradients[1:], wanted[1:], strict=True):
        assert distance(ours, theirs) < 1e-5, name


@needs_compiler
@pytest.mark.slow
def test_compiled_it_equals_the_plain_loop_in_float64() -> None:
    given = case((16, 24, 8, 8), channels=True)
    output, gradients = given.run(Kernel.COMPILED)
    expected, wanted = given.run(Kernel.EAGER)
    assert torch.equal(output, expected)
    assert all(distance(*pair) < 1e-12 for pair in zip(gradients, wanted, strict=True))


@needs_compiler
@pytest.mark.slow
def test_two_runs_of_a_compiled_pass_agree_bit_for_bit() -> None:
    given = case((16, 24, 16, 16), channels=True, dtype=torch.float32)
    first, second = given.run(Kernel.COMPILED), given.run(Kernel.COMPILED)
    assert all(torch.equal(*pair) for pair in zip(first[1], second[1], strict=True))
