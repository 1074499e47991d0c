"""Lockstep, layers and samples: what corrections see of the two networks."""

from __future__ import annotations

import copy
import errno
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nets
from lmh import per_step, sites
from lmh.calibrate import SpikingMinError, WeightRegression, correct, shelf
from lmh.calibrate.layers import layers, shift
from lmh.calibrate.lockstep import Lockstep, input_batches
from lmh.calibrate.sampling import places, receptive_fields, values_at
from lmh.calibrate.shelf import Shelf
from lmh.convert import EventFrames, convert
from lmh.errors import ArgumentError, CalibrationError
from lmh.ops import module_of


class Block(nn.Module):
    """A residual block with a convolution on its shortcut. [N, 2, 6, 6] → [N, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.down = nn.Conv2d(4, 6, 1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(F.relu(out + self.down(x)).mean((2, 3)))


class Two(nn.Module):
    """Two inputs, one of which a parameter is added to, and two outputs. [N, 4], [N, 3] → [N, 2], [N, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)
        self.offset = nn.Parameter(torch.rand(1, 6))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.b(y) + F.relu(self.a(x) + self.offset))
        return self.out(hidden), hidden


def head(lockstep: Lockstep) -> tuple[Tensor, Tensor]:
    """Run both networks and return the mean over time of what their last layer gives, SNN and ANN."""
    last = layers(lockstep)[-1].home
    with torch.no_grad():
        for node in lockstep.nodes():
            if node is last:
                found = torch.cat(lockstep.received(node)), torch.cat(lockstep.expected(node))
    return found


@pytest.mark.parametrize("net", [Block, nets.Residual, nets.conv_net])
@pytest.mark.parametrize("batches", [1, 3])
def test_both_networks_give_what_they_give_alone(net: type[nn.Module], batches: int) -> None:
    ann, x = net().eval(), torch.rand(9, 2, 8, 8)
    conversion = convert(ann, 3, data=x)
    lockstep = Lockstep(conversion.prepared, conversion.snn, input_batches(conversion.snn, list(x.chunk(batches))))
    received, expected = head(lockstep)
    with torch.no_grad():
        assert torch.allclose(received, conversion.snn(x), atol=1e-5)
        assert torch.allclose(expected, ann(x), atol=1e-5)


def test_event_frames_are_compared_by_their_means() -> None:
    ann, frames = nets.conv_net().eval(), torch.rand(4, 5, 2, 8, 8)
    conversion = convert(ann, 4, data=[frames], encoding=EventFrames())
    lockstep = Lockstep(conversion.prepared, conversion.snn, input_batches(conversion.snn, frames))
    received, expected = head(lockstep)
    with torch.no_grad():
        assert torch.allclose(received, per_step(conversion.snn, frames).mean(0), atol=1e-5)
        assert torch.allclose(expected, ann(frames.flatten(0, 1)).unflatten(0, (4, 5)).mean(0), atol=1e-5)


def test_several_inputs_and_outputs_and_a_parameter_on_the_way() -> None:
    ann, x, y = Two().eval(), torch.rand(9, 4), torch.rand(9, 3)
    conversion = convert(ann, 3, data=[(x, y)])
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    lockstep = Lockstep(conversion.prepared, conversion.snn, input_batches(conversion.snn, data))
    first = next(layer for layer in layers(lockstep) if layer.home.target == "a")
    seen = []
    with torch.no_grad():
        for node in lockstep.nodes():
            if node is first.site:
                seen = [lockstep.received(other)[0] for other in first.others]
            if node.target == "out":
                expected = torch.cat(lockstep.expected(node))
        assert torch.allclose(expected, ann(x, y)[0], atol=1e-6)
    assert torch.equal(seen[0], ann.offset)


def test_a_changed_layer_runs_changed_and_later_layers_see_it() -> None:
    x = torch.rand(6, 2, 6, 6)
    conversion = convert(Block(), 3, data=x)
    changed = copy.deepcopy(conversion.snn)
    lockstep = Lockstep(conversion.prepared, changed, input_batches(changed, x))
    seen: list[Tensor] = []
    with torch.no_grad():
        for node in lockstep.nodes():
            if node.target == "conv2":
                shift(changed.bn2, torch.full((6,), 0.75))
            if node.target == "fc":
                seen = lockstep.received(node)
        assert torch.allclose(torch.cat(seen), changed(x), atol=1e-5)
        assert not torch.allclose(torch.cat(seen), conversion.snn(x), atol=1e-3)


def test_memory_holds_live_nodes_only() -> None:
    x = torch.rand(4, 4)
    conversion = convert(nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(4, 4), nn.ReLU())]), 2, data=x)
    lockstep = Lockstep(conversion.prepared, conversion.snn, input_batches(conversion.snn, x))
    with torch.no_grad():
        most = max(len(lockstep._snns[0].env) + len(lockstep._anns[0].env) for _ in lockstep.nodes())
    assert most <= 6


def test_another_networks_snn_is_refused() -> None:
    x = torch.rand(4, 4)
    one, other = convert(nets.two_layers(), 2, data=x), convert(nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), 2, data=x)
    with pytest.raises(ArgumentError, match=r"no neurons at 1; .*Pass conversion.snn with conversion.prepared"):
        Lockstep(one.prepared, other.snn, [(x,)])


class TestInputs:
    def test_labels_are_dropped(self) -> None:
        snn = convert(nets.two_layers(), 2, data=torch.rand(8, 4)).snn
        batches = input_batches(snn, [(torch.rand(3, 4), torch.zeros(3)), torch.rand(2, 4)])
        assert [len(inputs[0]) for inputs in batches] == [3, 2]
        assert all(len(inputs) == 1 for inputs in batches)

    @pytest.mark.parametrize(
        ("data", "advice"),
        [
            ("digits", "lmh.zoo.Batches"),
            ([torch.zeros(2, 4, dtype=torch.uint8)], "Normalise the images first"),
            ([{"image": torch.rand(2, 4)}], "b\\[key\\] for b in data"),
            ([torch.rand(0, 4)], "Pass whole batches"),
        ],
        ids=["name", "integers", "dict", "empty"],
    )
    def test_data_of_another_form_is_refused_with_advice(self, data: object, advice: str) -> None:
        snn = convert(nets.two_layers(), 2, data=torch.rand(8, 4)).snn
        with pytest.raises(ArgumentError, match=f"^data.*{advice}"):
            input_batches(snn, data)  # type: ignore[arg-type]

    def test_several_inputs_come_first_in_a_batch(self) -> None:
        x, y = torch.rand(8, 4), torch.rand(8, 3)
        snn = convert(Two(), 2, data=[(x, y)]).snn
        ((first, second),) = input_batches(snn, [(x, y, "labels")])
        assert torch.equal(first, x)
        assert torch.equal(second, y)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_values_that_are_not_finite_are_refused(self, bad: float) -> None:
        snn = convert(nets.two_layers(), 2, data=torch.rand(8, 4)).snn
        with pytest.raises(CalibrationError, match=r"NaN or infinite values; .*Check the data"):
            input_batches(snn, [torch.full((2, 4), bad)])

    def test_no_sample_is_refused(self) -> None:
        snn = convert(nets.two_layers(), 2, data=torch.rand(8, 4)).snn
        with pytest.raises(CalibrationError, match="at least one sample"):
            input_batches(snn, [])


class TestLayers:
    def test_a_layer_ends_behind_the_sum_that_only_it_goes_into(self) -> None:
        conversion = convert(Block(), 2, data=torch.rand(4, 2, 6, 6))
        lockstep = Lockstep(conversion.prepared, conversion.snn, input_batches(conversion.snn, torch.rand(2, 2, 6, 6)))
        found = {layer.home.target: layer for layer in layers(lockstep)}
        assert list(found) == ["stem", "bn1", "bn2", "down", "fc"]
        assert found["bn1"].synapse is not None
        assert found["bn1"].synapse.target == "conv1"
        assert [found[name].end.name for name in ("stem", "bn1", "bn2", "down", "fc")] == [
            "stem", "bn1", "add", "add", "fc",
        ]  # fmt: skip
        assert [node.name for node in found["bn2"].others] == ["down"]
        assert [node.name for node in found["down"].others] == ["bn2"]
        assert {str(layer.site.target) for layer in found.values() if layer.site} == set(sites(conversion.snn))

    def test_what_is_used_twice_is_left_alone(self) -> None:
        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.tied = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
                self.tied.weight = self.b.weight
                self.out = nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Tensor:
                x = F.relu(self.a(F.relu(self.a(x))))
                return self.out(F.relu(self.tied(F.relu(self.b(x)))))

        conversion = convert(Shared(), 2, data=torch.rand(8, 4))
        lockstep = Lockstep(conversion.prepared, conversion.snn, input_batches(conversion.snn, torch.rand(2, 4)))
        assert [layer.home.target for layer in layers(lockstep)] == ["out"]

    def test_a_batchnorm_alone_is_a_layer(self) -> None:
        net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
        conversion = convert(net, 2, data=torch.rand(8, 2, 2, 2))
        lockstep = Lockstep(conversion.prepared, conversion.snn, input_batches(conversion.snn, torch.rand(2, 2, 2, 2)))
        found = {layer.home.target: layer for layer in layers(lockstep)}
        assert found["2"].synapse is None
        assert found["2"].site is not None

    def test_a_pool_before_the_neurons_ends_the_layer(self) -> None:
        conversion = convert(nets.conv_net(), 2, data=torch.rand(8, 2, 8, 8))
        lockstep = Lockstep(conversion.prepared, conversion.snn, input_batches(conversion.snn, torch.rand(2, 2, 8, 8)))
        first, second, head = layers(lockstep)
        assert (first.site, first.home.target) == (None, "1")
        assert second.site is not None
        assert module_of(second.site) is sites(conversion.snn)["6"]
        assert head.axis == -1

    @pytest.mark.parametrize(
        "layer",
        [nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 3, 1)],
        ids=["bias", "running mean", "own bias"],
    )
    def test_shift_moves_the_output(self, layer: nn.Module) -> None:
        x, amount = torch.rand(4, 3, 2, 2), torch.tensor([0.5, -1.0, 2.0])
        layer.eval()
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var.uniform_(0.5, 4)
        before = layer(x).detach()
        assert shift(layer, amount)
        assert torch.allclose(layer(x), before + amount[:, None, None], atol=1e-5)

    def test_what_has_nothing_to_shift_says_so(self) -> None:
        assert not shift(nn.Conv2d(3, 3, 1, bias=False), torch.ones(3))


class TestSamples:
    @pytest.mark.parametrize(
        ("module", "shape"),
        [
            (nn.Linear(4, 5), (6, 4)),
            (nn.Linear(4, 5), (6, 7, 4)),
            (nn.Conv1d(4, 6, 3, stride=2, padding=1), (6, 4, 9)),
            (nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 3), dilation=(2, 1)), (6, 4, 9, 8)),
            (nn.Conv2d(4, 6, 3, padding="same", dilation=2, groups=2), (6, 4, 7, 7)),
            (nn.Conv2d(4, 8, 4, padding="same", dilation=2, groups=4), (6, 4, 7, 7)),
            (nn.Conv2d(4, 6, 3, padding="valid"), (6, 4, 7, 7)),
            (nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (6, 4, 7, 6)),
            (nn.Conv3d(4, 6, 3, padding=1), (6, 4, 3, 4, 5)),
        ],
        ids=str,
    )
    def test_weights_times_receptive_fields_are_the_output(self, module: nn.Module, shape: tuple[int, ...]) -> None:
        x = torch.rand(shape)
        axis = -1 if isinstance(module, nn.Linear) else 1
        with torch.no_grad():
            output = module(x)
            (where,) = places([output.shape], 18, axis)
            fields = receptive_fields(module, x, where)
            weight = module.weight.flatten(1).unflatten(0, (fields.shape[1], -1))  # type: ignore[operator]
            result = torch.einsum("rgd,god->rgo", fields, weight).flatten(1) + module.bias
        assert torch.allclose(result, values_at(output, where, axis), atol=1e-5)

    def test_places_are_the_same_each_time_and_differ_within_a_sample(self) -> None:
        first, second = (places([(3, 2, 5, 5), (2, 2, 5, 5)], 40) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert [tuple(chosen.shape) for chosen in first] == [(3, 8), (2, 8)]
        assert all(len(set(row.tolist())) == 8 for chosen in first for row in chosen)


def test_what_memory_does_not_hold_lies_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.rand(40, 2, 6, 6)
    conversion = convert(Block(), 4, data=x)
    monkeypatch.setattr(shelf, "WORTH_A_FILE", 1)
    monkeypatch.setattr(Shelf.__init__, "__defaults__", (0,))
    filed = []
    in_a_file = shelf._in_a_file
    monkeypatch.setattr(shelf, "_in_a_file", lambda tensor: filed.append(tensor.shape) or in_a_file(tensor))
    corrections = [WeightRegression(), SpikingMinError()]
    found = correct(conversion.snn, conversion.prepared, x, corrections)
    assert len(filed) > 20
    monkeypatch.undo()
    expected = correct(conversion.snn, conversion.prepared, x, corrections)
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], value) for name, value in expected.tensors.items())
    assert all(torch.equal(found.v_threshold[path], value) for path, value in expected.v_threshold.items())


def test_a_shelf_counts_what_it_holds_and_keeps_the_order_in_memory() -> None:
    holder = Shelf(3 * 2**20)
    one, two = torch.rand(2**18), torch.rand(2, 8, 256, 256).contiguous(memory_format=torch.channels_last)
    assert holder.keep(one) is one
    assert holder.held == 2**20
    filed = holder.keep(two)
    assert filed is not two
    assert torch.equal(filed, two)
    assert filed.stride() == two.stride()
    assert torch.equal(holder.keep(two[:, ::2]), two[:, ::2])
    assert holder.keep((one[:5], 3))[1] == 3
    del one
    assert holder.held == 0


def test_a_full_disk_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        CalibrationError, match=r"1 MB of activations .* \(No space left.*TMPDIR.*--calibration-samples"
    ):
        Shelf(0).keep(torch.rand(2**18))
