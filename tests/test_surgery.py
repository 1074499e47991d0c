"""What has no rule: neurons that stand in, nodes kept analog by name, and the audit alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nets
from lmh import per_step, sites
from lmh.convert import ReluSurgery, convert
from lmh.convert.prepare import examine
from lmh.errors import AuditError


class Gated(nn.Module):
    """A SiLU network with a squeeze-and-excitation gate and a LayerNorm, as torchvision's newer ones have."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.act, self.gate, self.norm = nn.SiLU(), nn.Conv2d(8, 8, 1), nn.LayerNorm(8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.a(x))
        y = torch.relu(self.b(y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))))
        tokens = self.norm(y.flatten(2).transpose(1, 2))
        return self.fc2(F.gelu(self.fc1(tokens))).mean(1)


class TestSurgery:
    def test_stand_ins_spike_and_the_rest_is_named(self) -> None:
        x = torch.rand(8, 2, 4, 4)
        with pytest.raises(AuditError) as caught:
            convert(Gated(), 4, data=x)
        assert len(caught.value.problems) == 5
        conversion = convert(Gated(), 4, data=x, surgery=ReluSurgery())
        nodes = conversion.report.nodes()
        assert nodes["converted"] == ["act", "relu", "gelu"]
        assert nodes["kept"] == ["sigmoid", "mul", "norm"]
        elements = {"act": 128, "relu": 128, "gelu": 256, "sigmoid": 8, "mul": 128, "norm": 128}
        spiking = sum(elements[path] for path in nodes["converted"])
        assert conversion.report.spiking_coverage == pytest.approx(spiking / sum(elements.values()))
        assert "3 nodes stay analog: sigmoid, mul, norm" in conversion.report.notices[-1]

    def test_kept_nodes_run_at_every_step(self) -> None:
        x = torch.rand(6, 2, 4, 4)
        snn = convert(Gated(), 4, data=x, surgery=ReluSurgery()).snn
        seen: list[int] = []
        snn.get_submodule("norm").register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
        assert per_step(snn, x).shape == (4, 6, 3)
        assert seen == [24]

    def test_thresholds_are_per_layer_where_channels_are_last(self) -> None:
        conversion = convert(Gated(), 4, data=torch.rand(8, 2, 4, 4), surgery=ReluSurgery())
        shapes = {path: tuple(theta.shape) for path, theta in conversion.calibration.v_threshold.items()}
        assert shapes == {"act": (8,), "relu": (8,), "gelu": ()}


def test_a_kept_path_stays_analog_and_a_wrong_one_is_named() -> None:
    x = torch.rand(8, 2, 8, 8)
    conversion = convert(nets.conv_net(), 4, data=x, keep=["2"])
    assert conversion.report.nodes() == {"converted": ["6"], "kept": ["2"], "refused": []}
    with pytest.raises(AuditError, match=r"no\.such: nothing in the network has this path"):
        convert(nets.conv_net(), 4, data=x, keep=["no.such"])


def test_the_audit_alone_gives_fates_and_problems() -> None:
    fates, problems = examine(Gated(), (2, 4, 4))
    assert len(problems) == 5
    assert {fate.path: fate.fate for fate in fates}["act"] == "refused"
    fates, problems = examine(nets.conv_net(), (2, 8, 8))
    assert problems == []


class MySwish(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


def test_a_stand_in_of_the_users_own_is_taken_whole() -> None:
    net = nn.Sequential(nn.Linear(4, 8), MySwish(), nn.Linear(8, 2))
    conversion = convert(net, 4, data=torch.randn(32, 4), surgery=ReluSurgery((MySwish,)))
    assert list(sites(conversion.snn)) == ["1"]
