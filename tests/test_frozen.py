"""Neurons that no longer learn, by every program, against those that do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmh import IF, LIF, LMH, Kernel, PerChannel, PerLayer, PerStep, SpikingSite, frozen, use_kernel
from lmh.errors import StateError
from lmh.frozen import FrozenSite
from lmh.kernels import can_compile
from lmh.time_axis import TimeAxis
from tensors import last

T, N, C = 4, 3, 5
needs_compiler = pytest.mark.skipif(not can_compile("cpu"), reason="torch.compile has no compiler here")


def site_of(neuron: LMH, *, static: bool = False, silent: bool = False, moved: bool = True) -> SpikingSite:
    """A site of C channels, its parameters off the preset if ``moved``."""
    generator = torch.Generator().manual_seed(0)
    start = torch.tensor(0.0 if silent else 0.5)
    site = SpikingSite(TimeAxis(T), torch.linspace(0.5, 1.5, C), start, neuron, channels=C, static=static)
    with torch.no_grad():
        for name, parameter in site.named_parameters() if moved else []:
            if not (silent and name == "v_init"):
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return site


def current_of(*shape: int, static: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    batch = N if static else T * N
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1))
    return x.to(dtype)


CASES: dict[str, dict[str, Any]] = {
    "IF": {"neuron": LMH(), "moved": False},
    "IF that starts at 0": {"neuron": LMH(), "moved": False, "silent": True},
    "LIF": {"neuron": LMH(preset=LIF(0.5)), "moved": False},
    "learned": {"neuron": LMH()},
    "learned, starts at 0": {"neuron": LMH(), "silent": True},
    "per channel": {"neuron": LMH(granularity=PerChannel())},
    "per step": {"neuron": LMH(granularity=PerStep())},
    "static": {"neuron": LMH(), "static": True},
}
SHAPES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "images": ((C, 4, 5), Tensor.contiguous),
    "channels last": ((C, 4, 5), last),
    "few positions": ((C, 2, 2), Tensor.contiguous),
    "features": ((C,), Tensor.contiguous),
    "sequences": ((C, 17), Tensor.contiguous),
}


COMPILED = [
    ("IF", "images"),
    ("IF that starts at 0", "features"),
    ("LIF", "sequences"),
    ("learned", "channels last"),
    ("per channel", "few positions"),
    ("per step", "channels last"),
    ("static", "images"),
]


@pytest.mark.parametrize(
    ("case", "shape", "kernel"),
    [
        *((case, shape, Kernel.EAGER) for case in CASES for shape in SHAPES),
        *(pytest.param(*pair, Kernel.COMPILED, marks=needs_compiler) for pair in COMPILED),
    ],
)
def test_it_gives_what_the_learnable_site_gives(case: str, shape: str, kernel: Kernel) -> None:
    site = site_of(**CASES[case])
    size, order = SHAPES[shape]
    for dtype in (torch.float32, torch.bfloat16):
        current = order(current_of(*size, static=site.static, dtype=dtype))
        with torch.no_grad():
            expected = site(current)
            with use_kernel(kernel):
                output = FrozenSite(site)(current)
                spikes = FrozenSite(site, binary=True)(current)
        assert output.dtype == dtype
        assert torch.equal(output, expected)
        assert 0.05 < float((expected > 0).float().mean()) < 0.95
        assert torch.equal(spikes, (expected > 0).to(dtype))


@pytest.mark.parametrize("kernel", [Kernel.EAGER, pytest.param(Kernel.COMPILED, marks=needs_compiler)], ids=str)
@pytest.mark.parametrize("case", ["learned", "static"])
def test_it_adds_a_second_current_itself(case: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = []
    plain = frozen.program
    monkeypatch.setattr(frozen, "program", lambda function, job, form: jobs.append(job) or plain(function, job, form))
    site = FrozenSite(site_of(**CASES[case]))
    one = last(current_of(C, 4, 5, static=site.static))
    other, row = one.flip(0).contiguous(), one[:1]
    with torch.no_grad(), use_kernel(kernel):
        for second in (other, row):
            assert torch.equal(site(one, second), site(one + second))
        assert [job.summed for job in jobs] == [True, False, False, False] * (kernel is Kernel.COMPILED)
        exact, narrow = site(one + other) > 0, site(one.bfloat16(), other.bfloat16()) > 0
        assert float((exact ^ narrow).float().mean()) < 0.02


@pytest.mark.parametrize(
    ("case", "order", "kernel"),
    [
        *((case, Tensor.contiguous, Kernel.EAGER) for case in ("IF", "learned", "per channel", "per step")),
        pytest.param("IF", Tensor.contiguous, Kernel.COMPILED, marks=needs_compiler),
        pytest.param("per step", last, Kernel.COMPILED, marks=needs_compiler),
    ],
)
def test_steps_go_on_from_the_kept_state(case: str, order: Callable[[Tensor], Tensor], kernel: Kernel) -> None:
    site = site_of(**CASES[case])
    frozen, current = FrozenSite(site), current_of(C, 4, 5)
    with torch.no_grad(), use_kernel(kernel):
        expected = frozen(order(current))
        frozen.time.carry = True
        parts = []
        for part in current.split([N, 2 * N, N]):
            frozen.time.steps = len(part) // N
            parts.append(frozen(order(part)))
    assert torch.equal(torch.cat(parts), expected)


@needs_compiler
@pytest.mark.parametrize("case", ["learned", "per step", "static"])
def test_more_steps_than_a_pass_has_run_in_parts(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    site, current = FrozenSite(site_of(**CASES[case])), current_of(C, 4, 5, static=case == "static")
    with torch.no_grad():
        expected = site(current)
        other = site(current, current.flip(0))
        monkeypatch.setattr(frozen, "MOST_COMPILED_STEPS", 3)
        jobs, plain = [], frozen.program
        monkeypatch.setattr(frozen, "program", lambda *given: jobs.append(given[1]) or plain(*given))
        with use_kernel(Kernel.COMPILED):
            assert torch.equal(site(current), expected)
            assert [job.steps for job in jobs] == [3, 1]
            assert torch.equal(site(current, current.flip(0)), other)
            assert (site.time.steps, site.time.carry, site._carried) == (4, False, None)
            if case != "per step":
                site.time.carry = True
                longer = [site(current), site(current)]
                site.drop_state()
                site.time.carry, site.time.steps = False, 8
                whole = site(current if site.static else torch.cat([current, current]))
                assert torch.equal(whole, torch.cat(longer))


def test_another_batch_does_not_go_on_from_a_kept_state() -> None:
    frozen = FrozenSite(site_of(LMH()))
    frozen.time.carry = True
    frozen(current_of(C, 4, 5))
    with pytest.raises(StateError, match="expected the same"):
        frozen(torch.zeros(T * 2, C, 4, 5))


def test_it_is_a_constant() -> None:
    site = site_of(LMH())
    frozen, current = FrozenSite(site), current_of(C, 4, 5)
    expected = frozen(current)
    with torch.no_grad():
        site.raw_threshold += 1
    assert torch.equal(frozen(current), expected)
    assert not torch.equal(site(current), expected)
    assert list(frozen.parameters()) == []
    assert torch.equal(FrozenSite(copy.deepcopy(frozen))(current), expected)


@needs_compiler
def test_a_compiled_site_compiles_in_a_network_that_is_compiled_itself() -> None:
    site = site_of(LMH(preset=IF(), granularity=PerLayer()))
    network = nn.Sequential(nn.Conv2d(2, C, 3, padding=1), FrozenSite(site)).eval().requires_grad_(False)
    x = current_of(2, 4, 5)
    expected = network(x)
    compiled = torch.compile(network, fullgraph=True)(x)
    assert float((compiled != expected).float().mean()) < 0.01
