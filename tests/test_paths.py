"""One path for every call: what the audit lists can be passed to keep, and is where the sites stand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nets
from lmh import sites
from lmh.convert import ReluSurgery, convert, load, prepare, save
from lmh.convert.prepare import examine
from lmh.errors import AuditError


class Nine(nn.Module):
    """Nine spellings of a ReLU, in a block of their own."""

    PATHS = (
        "block.act",
        "block.act_in_place",
        *(f"block.relu{end}" for end in ("", "_1", "_2", "_3", "_4", "_5", "_6")),
    )

    def __init__(self) -> None:
        super().__init__()
        self.block = NineBlock()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class NineBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))
        self.act, self.act_in_place = nn.ReLU(), nn.ReLU(inplace=True)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.2, 0.6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.layers[0](x))
        x = self.act_in_place(self.layers[1](x))
        x = F.relu(self.layers[2](x))
        x = F.relu(self.layers[3](x), inplace=True)
        x = torch.relu(self.layers[4](x))
        x = torch.relu_(self.layers[5](x))
        x = self.layers[6](x).relu()
        x = self.layers[7](x).relu_()
        return self.layers[8](x).clamp(min=0)


def test_the_nine_spellings_are_nine_paths_in_the_audit_the_report_and_the_network() -> None:
    fates, problems = examine(Nine(), (4,))
    assert problems == []
    assert [fate.path for fate in fates if fate.fate == "converted"] == list(Nine.PATHS)
    conversion = convert(Nine(), 4, data=torch.rand(8, 4))
    assert conversion.report.nodes() == {"converted": list(Nine.PATHS), "kept": [], "refused": []}
    assert list(sites(conversion.snn)) == list(Nine.PATHS)
    assert list(conversion.calibration.v_threshold) == list(Nine.PATHS)


@pytest.mark.parametrize("path", Nine.PATHS)
def test_each_of_the_nine_can_be_kept_alone(path: str) -> None:
    ann, x = Nine().eval(), torch.rand(8, 4)
    conversion = convert(ann, 4, data=x, keep=[path])
    others = [other for other in Nine.PATHS if other != path]
    assert conversion.report.nodes() == {"converted": others, "kept": [path], "refused": []}
    assert list(sites(conversion.snn)) == others
    assert isinstance(conversion.snn.get_submodule(path), nn.ReLU)
    assert torch.equal(conversion.prepared.model(x), ann(x))


class Two(nn.Module):
    """A block whose ReLU is called twice, beside functional ones, as ResNets have it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(TwoBlock(), TwoBlock())
        self.relu = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.relu(self.layer1(self.relu(x))))


class TwoBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.relu(self.b(self.relu(self.a(x)))) - 0.1)


TWO = ["layer1.0.relu", "layer1.0.relu_1", "layer1.0.relu_2", "layer1.1.relu", "layer1.1.relu_1", "layer1.1.relu_2",
       "relu_1", "relu_2"]  # fmt: skip


def test_calls_of_one_module_and_functions_beside_it_have_paths_of_their_own() -> None:
    fates, _ = examine(Two(), (4,))
    paths = [fate.path for fate in fates]
    assert len(set(paths)) == len(paths)
    assert [fate.path for fate in fates if fate.fate == "converted"] == TWO
    assert list(sites(convert(Two(), 4, data=torch.rand(8, 4)).snn)) == TWO


def test_the_first_path_of_a_reused_module_keeps_the_first_call_only() -> None:
    for path in TWO:
        report = convert(Two(), 4, data=torch.rand(8, 4), keep=[path]).report
        assert report.nodes() == {"converted": [other for other in TWO if other != path], "kept": [path], "refused": []}


def test_refusals_name_every_call_of_a_reused_module() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act, self.norm = nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.act(self.fc(x)))
            return self.norm(F.gelu(self.act(self.fc(y))))

    _, problems = examine(Twice(), (4,))
    named = ["act", "norm", "act_1", "gelu", "norm_1"]
    assert [problem.partition(":")[0] for problem in problems[:5]] == named
    kept = convert(Twice(), 4, data=torch.rand(8, 4), surgery=ReluSurgery(), keep=["act_1"]).report.nodes()
    assert kept == {"converted": ["act", "gelu"], "kept": ["norm", "act_1", "norm_1"], "refused": []}
    problems = examine(Twice(), (4,), keep=named)[1]
    assert len(problems) == 1
    assert "no activation that becomes a neuron" in problems[0]


def test_a_node_never_takes_the_path_of_a_module() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mul = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.mul(x) * 2)

    assert [fate.path for fate in examine(Named(), (4,))[0]] == ["x", "mul", "mul_1", "relu", "output"]


def test_copies_that_a_max_pool_needs_are_in_the_report() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(1, 2, 1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.relu(self.conv(x))
            return F.max_pool2d(y, 2).flatten(1).sum(1, keepdim=True) + y.flatten(1).sum(1, keepdim=True)

    conversion = convert(Both(), 4, data=torch.rand(8, 1, 4, 4))
    assert sorted(conversion.report.nodes()["converted"]) == sorted(sites(conversion.snn)) == ["relu", "relu_1"]


def test_a_path_that_is_almost_right_is_suggested() -> None:
    with pytest.raises(AuditError, match=r"layer1\.0\.rely: nothing in .*--dry-run lists .*such as layer1\.0\.relu"):
        prepare(Two(), (4,), keep=["layer1.0.rely"])


def test_a_network_with_a_kept_call_is_read_back(tmp_path: object) -> None:
    ann, x = Two().eval(), torch.rand(8, 4)
    conversion = convert(ann, 4, data=x, keep=["layer1.1.relu_1"])
    save(conversion, f"{tmp_path}/two.safetensors")
    again = load(f"{tmp_path}/two.safetensors", source=Two())
    assert list(sites(again)) == [path for path in TWO if path != "layer1.1.relu_1"]
    assert torch.equal(again(x), conversion.snn(x))


def test_paths_of_plain_networks_are_the_modules_own() -> None:
    assert [fate.path for fate in examine(nets.conv_net(), (2, 8, 8))[0]] == ["input_1", *map(str, range(11)), "output"]
