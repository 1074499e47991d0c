"""NIR: every operator that becomes nodes, weights or edges, run by the executor beside torch; and every refusal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmh.calibrate import Max
from lmh.convert import BeforeNeuron, convert, keep
from lmh.convert.export import Exact, Project, export_nir
from lmh.convert.export.nir_graph import MAXPOOL_LOSS
from lmh.errors import ArtifactError
from lmh.spiking import PerLayer
from test_export_deploy import settled
from test_export_nir import assert_same, executed, projected


class Lambda(nn.Module):
    """A forward written as a function of the module and the input, with layers a, b, c."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.act = nn.ReLU()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def conv(inputs: int, outputs: int, kernel: Any = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **{"padding": 1, **options})


def head(channels: int, classes: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


@dataclass(frozen=True)
class Case:
    """A network, its input, and the NIR nodes that it must (and must not) become."""

    net: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 8, 8)
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    typed: bool = True


def shuffled(self: nn.Module, x: Tensor) -> Tensor:
    """A ShuffleNet unit: half of the channels pass, the rest is convolved, then all are shuffled."""
    x = self.act(self.a(x))
    kept, changed = x.chunk(2, dim=1)
    x = torch.cat([kept, self.act(self.b(changed))], 1)
    n, c, h, w = x.size()
    x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
    return self.head(self.act(self.c(x)))


def option_a(self: nn.Module, x: Tensor) -> Tensor:
    """CIFAR ResNets' shortcut: every second position, zeros for the new channels."""
    x = self.act(self.a(x))
    return self.head(self.act(self.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))))


def arithmetic(self: nn.Module, x: Tensor) -> Tensor:
    x = self.act(self.a(x))
    y = self.act(self.b(x) * 0.5 - x / 3 + 0.1)
    y = self.act(torch.sub(2 - self.b(y), x, alpha=0.25) + -y + self.shift)
    return self.head(self.act(self.b(y * self.scale) + x + x))


def functional(self: nn.Module, x: Tensor) -> Tensor:
    x = F.relu(F.conv2d(x, self.w, self.v, 2, 1))
    x = F.relu(F.conv2d(x, self.u, None, padding=(1, 0), dilation=1, groups=2))
    return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), self.t, self.s)


def dense(self: nn.Module, x: Tensor) -> Tensor:
    """A DenseNet block: every layer normalises the concat of all before it."""
    a = self.a(x)
    b = self.b(self.act(self.bn1(a)))
    c = self.c(self.act(self.bn2(torch.cat([a, b], 1))))
    return self.head(self.act(self.bn3(torch.cat([a, b, c], 1))))


def grown(self: nn.Module, x: Tensor) -> Tensor:
    """Pre-activation: the stream is a sum that no neuron closes."""
    x = self.a(x)
    x = x + self.b(self.act(x))
    x = x + self.c(self.act(self.bn(x)))
    return self.head(self.d(self.act(x) + x))


CASES = {
    "concat before a convolution": Case(
        lambda: Lambda(
            lambda m, x: m.head(m.act(m.c(torch.cat([m.act(m.a(x)), m.act(m.b(x)), x], 1)))),
            a=conv(2, 4), b=conv(2, 6), c=conv(12, 4), head=head(4),
        ),
        lacks=("Scale",),
    ),
    "channel shuffle": Case(
        lambda: Lambda(shuffled, a=conv(2, 8), b=conv(4, 4), c=conv(8, 4), head=head(4)), lacks=("Scale",)
    ),
    "grouped convolution of a shuffled concat": Case(
        lambda: Lambda(shuffled, a=conv(2, 8), b=conv(4, 4, groups=4), c=conv(8, 4, groups=2), head=head(4)),
        typed=False,
    ),
    "strided slice and channel padding": Case(
        lambda: Lambda(option_a, a=conv(2, 4), b=conv(4, 8, stride=2), head=head(8)), has=("AvgPool2d",)
    ),
    "strided slice of an odd size": Case(
        lambda: Lambda(option_a, a=conv(2, 4), b=conv(4, 8, stride=2), head=head(8)), (2, 7, 9), has=("AvgPool2d",)
    ),
    "sums, differences, constants": Case(
        lambda: Lambda(
            arithmetic, a=conv(2, 4), b=conv(4, 4), head=head(4),
            shift=nn.Parameter(torch.randn(4, 1, 1)), scale=nn.Parameter(torch.rand(1, 4, 1, 1)),
        ),
        typed=False,
    ),
    "functions with parameters": Case(
        lambda: Lambda(
            functional, w=nn.Parameter(torch.randn(4, 2, 3, 3)), v=nn.Parameter(torch.randn(4)),
            u=nn.Parameter(torch.randn(6, 2, 3, 1)), t=nn.Parameter(torch.randn(4, 6)), s=nn.Parameter(torch.randn(4)),
        ),
        typed=False,
    ),
    "dense block": Case(
        lambda: Lambda(
            dense, a=conv(2, 4), b=conv(4, 3), c=conv(7, 3), bn1=nn.BatchNorm2d(4), bn2=nn.BatchNorm2d(7),
            bn3=nn.BatchNorm2d(10), head=head(10),
        ),
        typed=False,
    ),
    "pre-activation stream": Case(
        lambda: Lambda(
            grown, a=conv(2, 4), b=conv(4, 4), c=conv(4, 4), d=conv(4, 4, 1, padding=0), bn=nn.BatchNorm2d(4),
            head=head(4),
        ),
        typed=False,
    ),
    "average pools": Case(
        lambda: nn.Sequential(
            conv(2, 4), nn.ReLU(), nn.AvgPool2d(3, 2, 1), conv(4, 4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(16, 4),
        ),
        has=("AvgPool2d",), lacks=("SumPool2d", "Scale"),
    ),
    "average pools that do not count padding": Case(
        lambda: nn.Sequential(
            conv(2, 4), nn.ReLU(), nn.AvgPool2d(3, 2, 1, count_include_pad=False), conv(4, 4), nn.ReLU(), *head(4)
        ),
        has=("SumPool2d", "Scale"),
    ),
    "average pools with a divisor": Case(
        lambda: nn.Sequential(
            conv(2, 4), nn.ReLU(), nn.AvgPool2d(2, divisor_override=3), conv(4, 4), nn.ReLU(), *head(4)
        ),
        has=("SumPool2d",), lacks=("Scale",),
    ),
    "average pools that round up": Case(
        lambda: nn.Sequential(
            conv(2, 4), nn.ReLU(), nn.AvgPool2d(3, 2, ceil_mode=True), conv(4, 4), nn.ReLU(),
            nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), nn.Flatten(), nn.Linear(36, 4),
        ),
        has=("Scale",), typed=False,
    ),
    "a constant through average pools": Case(
        lambda: Lambda(
            lambda m, x: m.head(m.act(F.avg_pool2d(F.avg_pool2d(m.act(m.a(x)) + 0.3, 2), 3, 1, 1) - 0.2)),
            a=conv(2, 4), head=head(4),
        ),
        typed=False,
    ),
    "adaptive pools": Case(
        lambda: nn.Sequential(
            conv(2, 4), nn.ReLU(), nn.AdaptiveAvgPool2d((4, 2)), conv(4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)
        ),
        has=("AvgPool2d",),
    ),
    "uneven adaptive pools": Case(
        lambda: nn.Sequential(
            conv(2, 4), nn.ReLU(), nn.AdaptiveAvgPool2d((5, 3)), nn.Flatten(), nn.Linear(60, 8), nn.ReLU(),
            nn.Linear(8, 4),
        ),
        lacks=("AvgPool2d",),
    ),
    "mean and sum over positions": Case(
        lambda: Lambda(
            lambda m, x: m.b(m.act(m.a(x)).mean([2, 3])) + m.c(m.act(m.a(x)).sum((-2, -1), keepdim=True).flatten(1)),
            a=conv(2, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4),
        ),
    ),
    "max-pools": Case(
        lambda: nn.Sequential(
            conv(2, 4), nn.ReLU(), nn.MaxPool2d(3, 2, 1), conv(4, 4), nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(),
            nn.Linear(16, 4),
        ),
        has=("SumPool2d", "Threshold"), lacks=("Scale",),
    ),
    "max-pools that round up": Case(
        lambda: nn.Sequential(
            conv(2, 4), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), conv(4, 4), nn.ReLU(), *head(4)
        ),
        has=("Threshold",), lacks=("SumPool2d",), typed=False,
    ),
    "a max-pool of a max-pool": Case(
        lambda: Lambda(
            lambda m, x: m.head(torch.cat([m.act(m.b(y := m.pool(m.act(m.a(x))))), m.act(m.c(m.pool(y)))], 1)),
            a=conv(2, 4), b=conv(4, 4), c=conv(4, 4), pool=nn.MaxPool2d(3, 1, 1), head=head(8),
        ),
        has=("Threshold",),
    ),
    "flattened in another order": Case(
        lambda: Lambda(
            lambda m, x: m.b(m.act(m.a(x)).permute(0, 2, 3, 1).reshape(x.size(0), -1)),
            a=conv(2, 4), b=nn.Linear(256, 4),
        ),
    ),
    "kernels that are not square": Case(
        lambda: nn.Sequential(
            conv(2, 4, (1, 5), padding=(0, 2)), nn.ReLU(), conv(4, 4, (5, 1), padding=(2, 0)), nn.ReLU(), *head(4)
        ),
        typed=False,
    ),
    "same and valid padding, dilation": Case(
        lambda: nn.Sequential(
            conv(2, 4, padding="same", dilation=2), nn.ReLU(), conv(4, 4, padding="valid"), nn.ReLU(), *head(4)
        ),
    ),
    "one axis": Case(
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(4, 4, 3, stride=2),
            nn.ReLU(), nn.AvgPool1d(2, 1, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 4),
        ),
        (2, 16), has=("Conv1d",), typed=False,
    ),
    "vectors": Case(
        lambda: Lambda(
            lambda m, x: m.b(torch.cat([m.act(m.bn(m.a(x))), x], 1)) + m.c(m.act(m.d(x) * 2 - 0.5) - 0.25),
            a=nn.Linear(6, 4, bias=False), bn=nn.BatchNorm1d(4), b=nn.Linear(10, 4), c=nn.Linear(3, 4),
            d=nn.Linear(6, 3),
        ),
        (6,), has=("Affine",),
    ),
    "spikes as the output": Case(
        lambda: nn.Sequential(conv(2, 4), nn.ReLU(), conv(4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        has=("Scale",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_executor_equals_torch(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    x = torch.randn(100, *case.shape)
    conversion = convert(settled(case.net(), x), 3, data=x, calibration=Max(PerLayer()), maxpool=BeforeNeuron())
    result = export_nir(conversion, tmp_path / "net.nir", Project())
    expected = projected(conversion)(x.double())
    assert float(expected.detach().std(0).mean()) > 1e-2
    assert_same(executed(result.file, x, 3), expected)
    kinds = {type(node).__name__ for node in nir.read(result.file, type_check=False).nodes.values()}
    assert kinds >= set(case.has)
    assert not kinds & set(case.lacks)
    assert ("types agree" in result.check) == case.typed
    assert case.typed == (not any("type_check=False" in notice for notice in result.notices))


def test_a_lost_channel_order_would_show(tmp_path: Path) -> None:
    """A wrong twin: without the shuffle the same weights answer differently."""
    case = CASES["channel shuffle"]
    net = settled(case.net(), x := torch.randn(100, *case.shape))
    conversion = convert(net, 3, data=x, calibration=Max(PerLayer()), maxpool=BeforeNeuron())
    result = export_nir(conversion, tmp_path / "net.nir", Project())
    with torch.no_grad():
        conversion.snn.get_submodule("c").weight.copy_(net.get_submodule("c").weight.flip(1))
    with pytest.raises(AssertionError):
        assert_same(executed(result.file, x, 3), projected(conversion)(x.double()))


def refusal(net: nn.Module, shape: Sequence[int], tmp_path: Path, **options: object) -> str:
    options = {"calibration": Max(PerLayer()), "maxpool": BeforeNeuron(), **options}
    conversion = convert(net.eval(), 2, data=torch.randn(4, *shape), **options)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError) as caught:
        export_nir(conversion, tmp_path / "net.nir", Project())
    assert list(tmp_path.iterdir()) == []
    return str(caught.value)


def unsayable(self: nn.Module, x: Tensor) -> Tensor:
    """What NIR has nothing for, side by side and one behind the other."""
    x = self.act(self.up(self.act(self.a(x))))
    y = self.gelu(self.b(F.interpolate(self.pool(x), scale_factor=2.0)))
    z = self.act(self.b(F.pad(y, (1, 1, 1, 1), mode="reflect")))
    w = self.tokens(z.flatten(2)).mean(2) + torch.div(y, 2, rounding_mode="floor").mean((2, 3))
    return w + F.max_pool2d(self.b(z), 2).mean((2, 3))


def test_everything_that_nir_has_no_node_for_is_listed_at_once(tmp_path: Path) -> None:
    net = Lambda(
        unsayable, a=conv(2, 4), b=conv(4, 4), up=nn.ConvTranspose2d(4, 4, 2, stride=2), pool=nn.AvgPool2d(2),
        gelu=nn.GELU(), tokens=nn.Linear(18 * 18, 8),
    )  # fmt: skip
    text = refusal(net, (2, 8, 8), tmp_path, rules={nn.GELU: keep}, keep=["div"])
    lines = [line for line in text.splitlines() if line.startswith("  - ")]
    assert f"NIR cannot say {len(lines)} things of this network" in text
    for part in (
        "up: torch.nn.ConvTranspose2d has no NIR node",
        "interpolate: torch.nn.functional.interpolate has no NIR node",
        "gelu: torch.nn.GELU has no NIR node",
        "pad: torch.nn.functional.pad pads with other values than zeros",
        "tokens: torch.nn.Linear",
        "div: torch.div has no NIR node",
        "is a max-pool that no neurons follow",
    ):
        assert part in text
    assert text.endswith("Replace those operators in the ANN, or export to onnx or pt2.")


@pytest.mark.parametrize(
    ("net", "shape", "message"),
    [
        (
            lambda: nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)),
            (1, 4, 4, 4),
            "0: torch.nn.Conv3d has no NIR node",
        ),
        (
            lambda: nn.Sequential(conv(2, 4, padding_mode="reflect"), nn.ReLU(), *head(4)),
            (2, 8, 8),
            "0: torch.nn.Conv2d has no NIR node",
        ),
        (
            lambda: nn.Sequential(conv(2, 4, 2, padding="same"), nn.ReLU(), *head(4)),
            (2, 8, 8),
            r"pads both ends differently \(padding='same'\)",
        ),
        (
            lambda: nn.Sequential(conv(2, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(3), conv(4, 4), nn.ReLU(), *head(4)),
            (2, 8, 8),
            "reads an adaptive pool of uneven windows",
        ),
        (
            lambda: nn.Sequential(conv(2, 4), nn.ReLU(), nn.MaxPool2d(2, dilation=2), conv(4, 4), nn.ReLU(), *head(4)),
            (2, 8, 8),
            "torch.nn.MaxPool2d has no NIR node",
        ),
        (
            lambda: Lambda(lambda m, x: m.head(m.act(m.a(x)).transpose(2, 3)), a=conv(2, 4), head=head(4)),
            (2, 8, 8),
            r"reads \[4, 8, 8\] reordered to \[4, 8, 8\]",
        ),
        (
            lambda: Lambda(lambda m, x: m.head(m.act(m.a(x)) * m.w), a=conv(2, 4), head=head(4),
                           w=nn.Parameter(torch.rand(8, 8))),
            (2, 8, 8),
            "uses a constant that differs between positions",
        ),
        (
            lambda: Lambda(lambda m, x: m.head(torch.cat([m.act(m.a(x)), x], 2)), a=conv(2, 2), head=head(2)),
            (2, 8, 8),
            "joins along axis 2; expected channels",
        ),
        (
            lambda: Lambda(lambda m, x: m.act(m.a(x)).mean((1, 2)), a=conv(2, 2)),
            (2, 8, 8),
            r"reduces the axes \[1, 2\]",
        ),
    ],
)  # fmt: skip
def test_a_refusal_says_where_and_why(
    net: Callable[[], nn.Module], shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(refusal(net(), shape, tmp_path))


def test_exact_lists_operators_beside_neurons(tmp_path: Path) -> None:
    net = nn.Sequential(
        conv(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.ConvTranspose2d(4, 4, 2), nn.ReLU(), *head(4), nn.Softmax(1)
    )
    conversion = convert(net.eval(), 2, data=torch.randn(4, 2, 8, 8), calibration=Max(), maxpool=BeforeNeuron())
    with pytest.raises(ArtifactError) as caught:
        export_nir(conversion, tmp_path / "net.nir", Exact())
    text = str(caught.value)
    assert "3: torch.nn.ConvTranspose2d has no NIR node" in text
    assert f"1: {MAXPOOL_LOSS}" in text
    assert "1: soft reset" in text
