"""A converted network behaves as any nn.Module."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import nets
from lmh import carry_state, per_step, sites
from lmh.convert import convert
from lmh.time_axis import time_axis


@pytest.fixture
def snn() -> nn.Module:
    return convert(nets.conv_net(), 4, data=torch.rand(16, 2, 8, 8)).snn


@pytest.fixture
def x() -> Tensor:
    return torch.rand(8, 2, 8, 8)


def test_a_deep_copy_is_equal_and_independent(snn: nn.Module, x: Tensor) -> None:
    twin = copy.deepcopy(snn)
    assert torch.equal(twin(x), snn(x))
    assert time_axis(twin) is not time_axis(snn)
    assert len({id(site.time) for site in sites(twin).values()}) == 1
    next(iter(sites(twin).values())).raw_threshold.data += 1
    assert not torch.equal(twin(x), snn(x))


def test_state_dict_round_trip(snn: nn.Module, x: Tensor) -> None:
    other = convert(nets.conv_net(), 4, data=torch.rand(16, 2, 8, 8)).snn
    assert not torch.equal(other(x), snn(x))
    other.load_state_dict(snn.state_dict())
    assert torch.equal(other(x), snn(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_another_dtype(snn: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    out = snn.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert torch.isfinite(out).all()


def test_autocast_keeps_spikes_close(snn: nn.Module, x: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        low = snn(x).float()
    assert low.shape == (8, 3)
    assert float((low - snn(x)).detach().abs().mean()) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_torch_compile_gives_the_same(snn: nn.Module, x: Tensor, training: bool) -> None:
    snn.double()
    x = x.double()
    snn.train(training)
    for module in snn.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout):
            module.eval()
    compiled = torch.compile(snn)
    expected = snn(x)
    assert torch.allclose(compiled(x), expected, atol=1e-12)
    if training:
        grads = torch.autograd.grad(expected.sum(), snn.get_submodule("0").weight)
        again = torch.autograd.grad(compiled(x).sum(), snn.get_submodule("0").weight)
        assert torch.allclose(grads[0], again[0], atol=1e-10)


@pytest.fixture
def process_group(tmp_path: object) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_trains_it(snn: nn.Module, x: Tensor) -> None:
    wrapped = DistributedDataParallel(snn)
    assert per_step(wrapped, x).shape == (4, 8, 3)
    wrapped(x).sum().backward()
    assert all(site.raw_threshold.grad is not None for site in sites(snn).values())
    assert len(sites(wrapped)) == 2


def test_a_users_own_training_loop_learns(snn: nn.Module) -> None:
    y = torch.randint(2, (64,))
    x = 0.5 * torch.rand(64, 2, 8, 8) + 0.5 * y[:, None, None, None]
    optimizer = torch.optim.Adam(snn.parameters(), lr=1e-2)
    losses = []
    snn.train()
    for _ in range(30):
        loss = nn.functional.cross_entropy(snn(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(bool(site.raw_lambda_d.detach().any()) for site in sites(snn).values())


def test_every_parameter_gets_a_gradient(snn: nn.Module, x: Tensor) -> None:
    snn.train()
    snn(x).square().sum().backward()
    without = [name for name, parameter in snn.named_parameters() if parameter.grad is None]
    assert without == []


def test_the_repr_names_the_neurons(snn: nn.Module) -> None:
    assert "SpikingSite(v_threshold=" in repr(snn)
    assert "timesteps=4" in repr(snn)


def test_it_can_be_put_into_a_larger_module(snn: nn.Module, x: Tensor) -> None:
    larger = nn.Sequential(snn, nn.Linear(3, 2))
    assert per_step(snn, x).shape == (4, 8, 3)
    assert larger(x).shape == (8, 2)
    with carry_state(larger):
        larger(x)
    assert torch.equal(snn(x), larger[0](x))
