"""deploy with int8 weights and in 16 bits, against the network that it was made of."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from commands import succeed
from lmh import LMH, PerStep, early_exit, evaluate, per_step, sites, streamed, zoo
from lmh.convert import Conversion, convert, deploy, load, spike_changes
from lmh.convert.report_cli import FORMS
from lmh.errors import ArgumentError
from lmh.int8 import SpikeConv2d, SpikeLayer, SpikeLinear, Thresholded, available, int8_kind
from test_export_deploy import SHAPE, learned, mean_size, residual_conversion
from test_streaming import NETWORKS

needs_int8 = pytest.mark.skipif(not available(), reason="no oneDNN")
BFLOAT16 = {"dtype": torch.bfloat16}
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "strided": {"kernel_size": (3, 1), "stride": (2, 1), "padding": (1, 0)},
    "grouped": {"kernel_size": 3, "groups": 2, "bias": False},
    "depthwise": {"kernel_size": 3, "groups": 8},
}


def spikes_of(*shape: int) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3).to(torch.uint8)


def layers(model: nn.Module) -> dict[str, SpikeLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SpikeLayer)}


class Mixed(nn.Module):
    """Spikes read by convolutions, a sum, a pool, a flattened and a plain linear layer. [N, 2, 8, 8] → [N, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.block = nn.Conv2d(8, 8, 3, padding=1)
        self.pooled = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.flattened = nn.Linear(8 * 16 * 2, 12)
        self.hidden = nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)
        self.activations = nn.ModuleList(nn.ReLU() for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.activations[0](self.stem(x))
        x = self.activations[1](self.block(x) + x)
        y = self.activations[2](self.pooled(x))
        x = torch.cat((y.flatten(1), nn.functional.avg_pool2d(x, 2).flatten(1)), 1)
        x = self.activations[3](self.flattened(x))
        return self.head(self.activations[4](self.hidden(x)))


def mixed_conversion(**options: Any) -> Conversion:
    torch.manual_seed(0)
    return convert(Mixed().eval(), 4, data=torch.randn(64, 2, 8, 8), **options)


@needs_int8
@pytest.mark.parametrize("form", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_convolution_of_spikes_is_exact_for_its_rounded_weights(form: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain, spikes = nn.Conv2d(8, 16, **form), spikes_of(3, 8, 9, 7)
    layer = SpikeConv2d(plain, dtype)
    got, expected = layer(spikes), layer.plain()(spikes.float())
    assert got.dtype == dtype
    assert torch.allclose(got.float(), expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    step = plain.weight.abs().flatten(1).amax(1).reshape(-1, 1, 1, 1) / 127
    assert bool(((layer.plain().weight - plain.weight).abs() <= step / 2 * 1.0001).all())
    assert torch.equal(layer(spikes[:0]), expected[:0].to(dtype))
    assert torch.allclose(
        layer(spikes_of(2, 8, 5, 12)).float(), layer.plain()(spikes_of(2, 8, 5, 12).float()), atol=0.02
    )


@needs_int8
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_of_spikes_is_exact_for_its_rounded_weights(bias: bool) -> None:
    plain = nn.Linear(20, 6, bias=bias)
    plain.weight.data[2] = 0
    layer = SpikeLinear(plain, torch.float32)
    for shape in ((5, 20), (5, 3, 20)):
        assert torch.allclose(layer(spikes_of(*shape)), layer.plain()(spikes_of(*shape).float()), atol=1e-5)
    assert bool((layer.plain().weight[2] == 0).all())


def test_what_has_no_int8_form_stays() -> None:
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    others = (
        nn.Conv1d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 2, padding="same"), hooked, None,
    )  # fmt: skip
    assert [int8_kind(layer) for layer in others] == [None] * len(others)


@needs_int8
@pytest.mark.parametrize("change", [lambda conversion: conversion, learned], ids=["preset", "learned"])
@pytest.mark.parametrize("conversion", [mixed_conversion, residual_conversion], ids=["mixed", "residual"])
def test_a_network_of_int8_layers_equals_that_of_their_rounded_weights(conversion: Any, change: Any) -> None:
    fast = deploy(change(conversion()), int8=True)
    same = copy.deepcopy(fast)
    for path, layer in layers(same).items():
        same.set_submodule(path, nn.Sequential(_Float(), layer.plain()))
    x = torch.randn(100, *SHAPE) if conversion is residual_conversion else torch.randn(100, 2, 8, 8)
    expected = same(x)
    assert float(((fast(x) - expected).abs().amax(1) > 1e-4).float().mean()) < 0.03
    assert mean_size(fast(x) - expected) < 1e-3 * mean_size(expected)


class _Float(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


@needs_int8
def test_it_takes_every_layer_that_reads_a_site_and_leaves_the_rest() -> None:
    fast = deploy(mixed_conversion(), int8=True)
    assert list(layers(fast)) == ["block", "pooled", "hidden"]
    thresholded = [name for name, module in fast.named_modules() if isinstance(module, Thresholded)]
    assert thresholded == ["activations.0_thresholded", "activations.1_thresholded"]
    uint8 = {path: site.uint8 for path, site in sites(fast).items()}
    assert uint8 == {f"activations.{k}": k in (0, 1, 3) for k in range(5)}


@needs_int8
@pytest.mark.parametrize(
    "options", [{"int8": True}, {"dtype": torch.bfloat16}, {"int8": True, "dtype": torch.bfloat16}]
)
def test_the_zoo_network_keeps_its_accuracy_rates_and_work(options: dict[str, Any]) -> None:
    snn, card = load("zoo:digits-cnn-t4"), zoo.card("digits-cnn")
    test = zoo.Batches(zoo.load_data("digits").test, card.preprocessing)
    fast = deploy(snn, **options)
    expected, got = evaluate(snn, test), evaluate(fast, test)
    assert abs(got.snn_accuracy[-1] - expected.snn_accuracy[-1]) <= 0.006
    assert list(got.firing_rate.values()) == pytest.approx(list(expected.firing_rate.values()), rel=0.02)
    assert [(work.path, work.macs) for work in got.layers] == [(work.path, work.macs) for work in expected.layers]
    accumulates = [work.accumulates for work in expected.layers]
    assert [work.accumulates for work in got.layers] == pytest.approx(accumulates, rel=0.02)
    images, _ = next(iter(test))
    answers = fast(images)
    assert answers.dtype == torch.float32
    assert torch.allclose(streamed(fast, images), answers, atol=0.1)
    assert early_exit(fast, images, confidence=0.9).steps.float().mean() < 4
    assert torch.equal(copy.deepcopy(fast)(images), answers)


def test_currents_are_of_16_bits_and_potentials_are_not() -> None:
    fast, x = deploy(mixed_conversion(), **BFLOAT16), torch.randn(8, 2, 8, 8)
    dtypes = {parameter.dtype for parameter in fast.parameters()}
    assert dtypes == {torch.bfloat16}
    seen = [site.register_forward_hook(lambda _, given, out: seen.append((given[0].dtype, out.dtype)))
            for site in sites(fast).values()]  # fmt: skip
    outputs = per_step(fast, x)
    assert outputs.dtype == torch.float32
    assert seen[5:] == [(torch.bfloat16, torch.bfloat16)] * 5
    assert all(buffer.dtype == torch.float32 for site in sites(fast).values() for buffer in site.buffers())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.int8}, r"dtype is torch\.int8; expected one of torch\.float32, .*Pass dtype=torch\.bfloat16"),
        (
            {"dtype": torch.float16, "int8": True},
            r"float16 with int8=True; expected one of torch\.float32, torch\.bfloat16\.",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        deploy(mixed_conversion(), **options)


def test_a_network_without_a_layer_that_can_be_int8_is_told_so() -> None:
    for snn in (mixed_conversion(neuron=LMH(granularity=PerStep())), convert(nn.ReLU(), 4, data=torch.rand(4, 3))):
        with pytest.raises(ArgumentError, match=r"no layer can have it; expected a convolution .* Leave int8 out"):
            deploy(snn, int8=True)


class Casts(nn.Module):
    """A layer in 32 bits, whatever comes. [N, 4] → [N, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.relu(self.first(x)).float())


class Halves(nn.Module):
    """Two outputs. [N, 4] → [N, 2] twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.second(nn.functional.relu(self.first(x))).chunk(2, 1)


def test_a_cast_inside_is_told_and_every_output_comes_back_in_32_bits() -> None:
    x = torch.rand(8, 4)
    with pytest.raises(ArgumentError, match=r"does not run in torch\.bfloat16 .* Leave dtype out"):
        deploy(convert(Casts(), 4, data=x), **BFLOAT16)
    halves = deploy(convert(Halves(), 4, data=x), **BFLOAT16)(x)
    assert [half.dtype for half in halves] == [torch.float32] * 2


@needs_int8
def test_spikes_on_another_device_are_refused_before_and_after_the_first_call() -> None:
    layer = SpikeLinear(nn.Linear(4, 2), torch.float32)
    for _ in range(2):
        with pytest.raises(ArgumentError, match=r"spikes on meta came to an int8 layer; expected them on a CPU"):
            layer(torch.zeros(1, 4, dtype=torch.uint8, device="meta"))
        layer(spikes_of(1, 4))


@needs_int8
def test_a_network_whose_weights_are_all_int8_is_measured() -> None:
    torch.manual_seed(0)
    x, labels = torch.rand(20, 4), torch.arange(20) % 2
    ann = nn.Sequential(nn.ReLU(), nn.Linear(4, 2), nn.ReLU())
    fast = deploy(convert(ann, 4, data=x), int8=True)
    assert not list(fast.parameters())
    assert evaluate(fast, [(x, labels)], ann=ann).samples == 20


@needs_int8
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(("images", form) for form in FORMS),
        *((name, form) for name in ("leaks by step", "gated max-pool", "event frames") for form in ("fp32", "bf16")),
    ],
)
def test_every_kind_of_network_answers_alike_in_every_form(name: str, form: str) -> None:
    snn, x = NETWORKS[name]()
    expected, got = snn.eval()(x), deploy(snn, **FORMS[form])(x)
    assert mean_size(got - expected) < 0.2 * mean_size(expected)
    assert float((got.argmax(1) == expected.argmax(1)).float().mean()) > 0.85


def test_int8_without_its_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    with pytest.raises(ArgumentError, match=r"no oneDNN; expected one for x86 CPUs\. Leave it out"):
        deploy(mixed_conversion(), int8=True)


def test_moved_spikes_are_counted_site_by_site() -> None:
    conversion, x = mixed_conversion(), torch.randn(50, 2, 8, 8)
    snn, fast = conversion.snn, deploy(conversion)
    assert max(spike_changes(snn, fast, x).values()) < 1e-3
    first, *others = sites(fast)
    sites(fast)[first].theta.mul_(1.1)
    changes = spike_changes(snn, fast, x)
    outputs = {}
    for name, network in (("before", snn), ("after", fast)):
        sites(network)[first].register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out > 0}))
        network(x)
    moved = float((outputs["before"] != outputs["after"]).float().mean())
    assert changes[first] == pytest.approx(moved)
    assert 0.01 < moved < 0.5
    assert all(changes[site] > 0 for site in others)
    assert spike_changes(conversion, fast, x) == changes
    with pytest.raises(ArgumentError, match=r"expected the same\. Pass a network and the copy"):
        spike_changes(load("zoo:digits-cnn-t4"), fast, x)


@pytest.mark.parametrize("form", ["bf16", pytest.param("int8", marks=needs_int8)])
def test_the_report_measures_the_copy_for_inference_and_early_exit(form: str) -> None:
    arguments = ("report", "zoo:digits-cnn-t4", "--data", "digits", "--json")
    plain = succeed(*arguments).result
    printed = succeed(*arguments, "--deploy", form, "--early-exit", 0.9)
    found = printed.result
    assert (plain["deployed"], plain["early_exit"], found["deployed"]) == (None, None, form)
    assert found["snn_accuracy"] != plain["snn_accuracy"]
    assert found["snn_accuracy"] == pytest.approx(plain["snn_accuracy"], abs=0.02)
    assert found["ann_accuracy"] == plain["ann_accuracy"]
    assert [site["neuron"] for site in found["sites"]] == [site["neuron"] for site in plain["sites"]]
    leaving = found["early_exit"]
    assert (leaving["samples"], leaving["confidence"], 1 < leaving["steps"] < 3) == (360, 0.9, True)
    assert leaving["accuracy"] > 0.98
    assert re.search(rf"the copy for inference, in {form}; .* differ at \d+\.\d+ % of neurons and steps", printed.err)
    assert (plain["spike_changes"], list(found["spike_changes"])) == (None, [site["path"] for site in found["sites"]])
    assert (
        f"Early exit at 0.9: {100 * leaving['accuracy']:.2f} % after {leaving['steps']:.2f} of 4 steps" in printed.err
    )
