"""The report: what it counts against counts of our own, its figures, its page, and the commands that write it."""

from __future__ import annotations

import copy
import json
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import nets
from lmh import LMH, PerStep, carry_state, evaluate, per_step, zoo
from lmh.convert import Conversion, EventFrames, Gated, convert, keep
from lmh.convert.reporting import CHANGED_SHOWN, report_on
from lmh.convert.storage import load_conversion
from lmh.energy import PICOJOULE_PER_ACCUMULATE, PICOJOULE_PER_MAC
from lmh.errors import ArgumentError
from lmh.finetune import finetune
from lmh.report import NetworkReport, figures, report_page, write_report
from lmh.report.records import BINS_PER_THRESHOLD
from lmh.zoo import Batches, DataSet

FIGURES = (
    "accuracy", "confusion", "energy", "firing_rates", "graph", "losses", "neurons", "site_errors", "thresholds",
)  # fmt: skip
HISTORY = [{"stage": "STBP", "epochs": [
    {"epoch": 0, "loss": 2.0, "val_accuracy": None, "neurons": {"a": {"v_threshold": [1.0], "lambda_s": [0.5, 0.7]}}},
    {"epoch": 1, "loss": 1.5, "val_accuracy": 0.75, "neurons": {"a": {"v_threshold": [1.2], "lambda_s": [0.4, 0.6]}}},
]}]  # fmt: skip


def opposite(ann: nn.Module) -> nn.Module:
    """A network that answers otherwise."""
    other = copy.deepcopy(ann)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.neg_()
    return other.eval()


def _wide_max() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(16, 2))  # fmt: skip


def _silent() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(-1.0)
    return net


ODD: dict[str, tuple[nn.Module, tuple[int, ...], dict[str, Any]]] = {
    "one step, vectors": (nets.two_layers(), (4,), {"T": 1}),
    "per step": (nets.two_layers(), (4,), {"neuron": LMH(granularity=PerStep())}),
    "gated pool": (_wide_max(), (1, 8, 8), {"maxpool": Gated()}),
    "silent": (_silent(), (4,), {}),
    "two channels": (nets.conv_net(), (2, 8, 8), {}),
    "four channels": (nets.conv_net(4), (4, 8, 8), {}),
    "one channel in a site": (nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 2)), (4,), {}),
}


class Page(HTMLParser):
    """What a page holds: its tags, ids, and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.unlabelled: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if (tag == "svg" and not found.get("aria-label")) or (tag == "img" and not found.get("alt")):
            self.unlabelled.append(self.get_starttag_text() or tag)


@pytest.fixture(scope="module")
def one_step() -> Conversion:
    """The zoo's network at T = 1, which answers some digits otherwise."""
    digits, card = zoo.load_data("digits"), zoo.card("digits-cnn")
    order = zoo.seeded_order(digits.train, 0)[:256]
    return convert(zoo.load("digits-cnn"), 1, data=Batches(digits.train, card.preprocessing, indices=order))


@pytest.fixture(scope="module")
def report(one_step: Conversion) -> NetworkReport:
    digits = zoo.load_data("digits")
    test = Batches(digits.test, zoo.card("digits-cnn").preprocessing, batch_size=100)
    return report_on(one_step, test, ann=zoo.load("digits-cnn"), classes=digits.classes, facts={"data": "digits"})


def without(report: NetworkReport, **changes: Any) -> NetworkReport:
    """The report with another result."""
    return NetworkReport({**report.result, **changes})


class TestWhatItCounts:
    def test_every_answer_is_in_the_confusion_matrix(self, report: NetworkReport) -> None:
        total = sum(count for _, _, count in report.confusion)
        right = sum(count for label, answer, count in report.confusion if label == answer)
        assert total == report.result["samples"] == 360
        assert right / total == pytest.approx(report.result["snn_accuracy"][-1])
        assert right < total

    def test_changed_samples_are_the_first_that_the_ann_answers_otherwise(
        self, report: NetworkReport, one_step: Conversion, digits: DataSet
    ) -> None:
        test = Batches(digits.test, zoo.card("digits-cnn").preprocessing, batch_size=360)
        ((x, y),) = test
        with torch.no_grad():
            ann, snn = zoo.load("digits-cnn")(x).argmax(1), one_step.snn(x).argmax(1)
        places = (ann != snn).nonzero().flatten().tolist()[:CHANGED_SHOWN]
        assert [sample.position for sample in report.changed] == places
        assert len(places) == CHANGED_SHOWN
        for sample in report.changed:
            place = sample.position
            assert (sample.label, sample.ann, sample.snn) == (int(y[place]), int(ann[place]), (int(snn[place]),))
            assert [raster.site for raster in sample.rasters] == ["stem.2", "block.relu1", "down.2"]
            assert all(raster.neurons == len({row for _, row in raster.spikes}) for raster in sample.rasters)

    def test_rates_of_channels_are_means_of_their_spikes(self) -> None:
        ann = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        with torch.no_grad():
            ann[0].weight[0], ann[0].bias[0] = 0.0, -1.0
            ann[0].weight[1], ann[0].bias[1] = 0.0, 5.0
        x = torch.rand(32, 3)
        conversion = convert(ann, 4, data=x)
        spikes: list[Tensor] = []
        conversion.snn.get_submodule("1").register_forward_hook(lambda _m, _i, output: spikes.append(output != 0))
        per_step(conversion.snn, x)
        found = evaluate(conversion.snn, x)
        assert found.channel_rate["1"] == pytest.approx(spikes[0].double().mean(0).tolist())
        assert found.channel_rate["1"][:2] == (0.0, 1.0)
        assert found.firing_rate["1"] == pytest.approx(sum(found.channel_rate["1"]) / 4)
        (site,) = report_on(conversion, x).result["sites"]
        assert (site["silent_channels"], site["saturated_channels"]) == (0.25, 0.25)
        assert site["firing_rate"] == pytest.approx(found.firing_rate["1"])

    def test_activations_lie_where_they_do(self) -> None:
        ann, x = nets.two_layers(), torch.rand(64, 4)
        conversion = convert(ann, 4, data=x)
        (shares,) = report_on(conversion, x).activations.values()
        with torch.no_grad():
            scaled = ann[1](ann[0](x)) / conversion.snn.get_submodule("1").v_threshold
        assert sum(shares) == pytest.approx(float((scaled > 0).double().mean()))
        beyond = float((scaled > 1).double().mean())
        assert sum(shares[BINS_PER_THRESHOLD:]) == pytest.approx(beyond, abs=0.02)
        assert beyond > 0

    def test_nodes_say_what_they_work_on(self, report: NetworkReport) -> None:
        fates = {node.path: node.fate for node in report.nodes}
        assert fates["stem.0"] == "once"
        assert fates["stem.2"] == "neurons"
        assert fates["block.conv1"] == "reads spikes"
        assert fates["block.add"] == "reads values"
        assert fates["head"] == "time mean"
        (add,) = [node for node in report.nodes if node.path == "block.add"]
        assert {report.nodes[place].path for place in add.inputs} == {"block.bn2", "stem.2"}

    def test_event_frames_have_a_report_too(self) -> None:
        ann = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
        x = torch.rand(3, 5, 2, 8, 8)  # T, N
        conversion = convert(ann, 3, data=x, encoding=EventFrames())
        found = report_on(conversion, [(x, torch.tensor([0, 1, 2, 0, 1]))], ann=ann)
        assert found.result["samples"] == 5
        assert found.nodes[0].fate == "reads values"
        assert sum(found.activations["1"]) > 0
        assert "<svg" in report_page(found)

    def test_the_network_is_not_changed_and_may_carry_state(self) -> None:
        ann, x = nets.conv_net(), torch.rand(16, 2, 8, 8)
        snn = (conversion := convert(ann, 4, data=x)).snn.train()
        with carry_state(snn):
            per_step(snn, x, steps=2)
            before = {name: value.clone() for name, value in snn.state_dict().items()}
            found = report_on(conversion, x, ann=opposite(ann))
        assert found.changed
        assert snn.training
        assert all(torch.equal(value, before[name]) for name, value in snn.state_dict().items())

    def test_a_network_loaded_without_its_ann_is_not_compared_with_fresh_weights(
        self, digits_test: Batches, digits_ann: nn.Module
    ) -> None:
        without, beside = load_conversion("zoo:digits-cnn-t4"), load_conversion("zoo:digits-cnn-t4", digits_ann)
        found = report_on(without, digits_test)
        assert (found.activations, found.result["diagnosis"]) == ({}, None)
        assert found.result["samples"] == 360
        rows = report_on(beside, digits_test).result["diagnosis"]["rows"]
        assert all(row["total"] < 0.5 for row in rows)

    def test_training_comes_from_the_result_or_from_the_file(self, digits_calibration: Batches) -> None:
        conversion = convert(zoo.load("digits-cnn"), 2, data=digits_calibration)
        tuned = finetune(conversion.snn, digits_calibration, epochs=2)
        found = report_on(conversion, training=tuned.stages)
        (stage,) = found.training
        assert [epoch["loss"] for epoch in stage["epochs"]] == [epoch.loss for epoch in tuned]
        assert isinstance(figures.neurons(found), Figure)
        (stage,) = report_on(load_conversion("zoo:digits-cnn-t4")).training
        assert len(stage["epochs"]) == 20

    def test_what_stays_analog_is_named(self) -> None:
        ann, x = (
            nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 2)),
            torch.rand(9, 4),
        )
        found = report_on(convert(ann, 2, data=x, rules={nn.Sigmoid: keep}), x)
        assert [node.path for node in found.nodes if node.fate == "kept analog"] == ["3"]
        assert "1 nodes stay analog" in report_page(found)

    def test_data_is_read_once(self) -> None:
        x = torch.rand(40, 4)
        found = report_on(convert(nets.two_layers(), 2, data=x), (part for part in x.split(8)))
        assert (found.result["samples"], found.result["diagnosis"]["samples"]) == (40, 40)

    @pytest.mark.parametrize(("ann", "shape", "options"), ODD.values(), ids=ODD)
    def test_any_network_that_converts_has_a_page(
        self, ann: nn.Module, shape: tuple[int, ...], options: dict[str, Any]
    ) -> None:
        x = torch.rand(6, *shape)
        labels = torch.arange(6) % 2
        timesteps = options.get("T", 3)
        given = {name: value for name, value in options.items() if name != "T"}
        conversion = convert(ann.eval(), timesteps, data=x, **given)
        page = Page(report_page(report_on(conversion, [(x, labels)], ann=opposite(ann))))
        assert not page.unlabelled
        assert all(len(found) > len("data:image/png;base64,") for found in page.references if found.startswith("data:"))


class TestFigures:
    @pytest.mark.parametrize("name", FIGURES)
    def test_each_is_drawn_from_a_whole_report_and_from_its_json(self, report: NetworkReport, name: str) -> None:
        whole = NetworkReport.from_json({**report.to_json(), "training": HISTORY})
        again = NetworkReport.from_json(json.loads(json.dumps(whole.to_json())))
        assert again.to_json() == whole.to_json()
        for found in (whole, again):
            assert isinstance(getattr(figures, name)(found), Figure)

    def test_they_show_what_was_measured(self, report: NetworkReport) -> None:
        accuracy = figures.accuracy(report).axes[0]
        drawn = {line.get_label(): list(line.get_ydata()) for line in accuracy.lines}
        assert drawn["SNN"] == pytest.approx([100 * value for value in report.result["snn_accuracy"]])
        assert drawn["ANN"][0] == pytest.approx(100 * report.result["ann_accuracy"])
        bars = figures.energy(report).axes[0].patches
        assert sum(bar.get_width() for bar in bars) == pytest.approx(report.result["energy"]["snn_pj"] / 1e6)
        errors = figures.site_errors(report).axes[0].lines[0].get_xdata()
        rows = report.result["diagnosis"]["rows"]
        assert list(errors) == pytest.approx([100 * row["total"] for row in rows])

    def test_layers_add_up_to_the_energy(self, report: NetworkReport) -> None:
        energy = report.result["energy"]
        snn = sum(
            PICOJOULE_PER_ACCUMULATE * layer["accumulates"] + PICOJOULE_PER_MAC * layer["macs"]
            for layer in energy["layers"]
        )
        assert snn == pytest.approx(energy["snn_pj"])
        assert sum(layer["ann_macs"] for layer in energy["layers"]) == energy["ann_macs"]

    @pytest.mark.parametrize(("name", "advice"), [
        ("accuracy", "--data"), ("confusion", "labels"), ("energy", "--data"), ("firing_rates", "--data"),
        ("losses", "--finetune"), ("neurons", "--finetune"), ("site_errors", "ANN"), ("thresholds", "ANN"),
        ("graph", "lmh report"),
    ])  # fmt: skip
    def test_one_that_lacks_something_says_what_to_run(
        self, name: str, advice: str, digits_calibration: Batches
    ) -> None:
        conversion = convert(zoo.load("digits-cnn"), 2, data=digits_calibration)
        nothing = NetworkReport(report_on(conversion).result)
        with pytest.raises(ArgumentError, match=rf"^The report has no .*{advice}"):
            getattr(figures, name)(nothing)

    def test_of_many_classes_the_most_frequent_confusions_are_shown(self, report: NetworkReport) -> None:
        many = NetworkReport(report.result, confusion=((0, 0, 9), (0, 99, 5), (7, 3, 6)), classes=("zero",))
        labels = [label.get_text() for label in figures.confusion(many).axes[0].get_yticklabels()]
        assert labels == ["7 → 3", "zero → 99"]

    def test_a_file_without_neurons_by_epoch_says_so(self, report: NetworkReport) -> None:
        epochs = [{**epoch, "neurons": {}} for epoch in HISTORY[0]["epochs"]]
        old = NetworkReport.from_json({**report.to_json(), "training": [{**HISTORY[0], "epochs": epochs}]})
        assert isinstance(figures.losses(old), Figure)
        with pytest.raises(ArgumentError, match="fine-tune it again"):
            figures.neurons(old)


class TestThePage:
    def test_it_needs_nothing_else_and_names_every_picture(self, report: NetworkReport) -> None:
        page = Page(report_page(report))
        assert not [found for found in page.references if not found.startswith(("#", "data:"))]
        assert not {"script", "link", "iframe"} & set(page.tags)
        assert len(page.ids) == len(set(page.ids))
        assert not page.unlabelled
        assert page.tags.count("svg") == 7 + CHANGED_SHOWN

    def test_ink_takes_the_colour_of_the_page(self, report: NetworkReport) -> None:
        text = report_page(report)
        assert figures.INK not in text.replace(f"--ink: {figures.INK}", "")
        assert "currentColor" in text
        assert "prefers-color-scheme: dark" in text

    def test_it_begins_with_the_figures_that_matter(self, report: NetworkReport) -> None:
        text = report_page(report)
        for value in (report.result["ann_accuracy"], report.result["snn_accuracy"][-1]):
            assert f"{100 * value:.2f} %" in text
        assert f"{report.result['energy']['ratio']:.2f}" in text
        assert report.result["energy"]["assumptions"] in text

    def test_what_is_missing_is_said_once(self, one_step: Conversion) -> None:
        text = report_page(report_on(one_step))
        assert text.count("The report has no training.") == 1
        assert "No sample was compared with the ANN" in text
        assert "unknown" in text

    def test_names_are_text_and_not_markup(self, report: NetworkReport) -> None:
        evil = "<script>alert(1)</script>"
        found = NetworkReport({**report.result, "source": evil}, confusion=report.confusion, classes=(evil,) * 10,
                              changed=report.changed, facts={"data": evil})  # fmt: skip
        text = report_page(found)
        assert "<script" not in text
        assert "&lt;script&gt;" in text

    def test_names_that_look_like_formulas_or_are_long_are_shown(self, report: NetworkReport) -> None:
        names = ("$a_{$", "$1_$2", "猫", "a very long name of a class that no axis has room for", *"456789")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            text = report_page(NetworkReport({**report.result, "sites": [
                {**site, "path": f"backbone.features.stages.{index}.blocks.7.activation.nonlinearity"}
                for index, site in enumerate(report.result["sites"])
            ]}, confusion=report.confusion, classes=names, changed=report.changed))  # fmt: skip
        assert "$a_{$" in text
        assert "…no axis" not in text
        assert "has room for" in text

    def test_files_of_another_kind_are_refused(self, report: NetworkReport, tmp_path: Path) -> None:
        with pytest.raises(ArgumentError, match=r"ends in \.html"):
            write_report(report, tmp_path / "report.pdf")
        page, values = write_report(report, tmp_path / "report.html")
        assert NetworkReport.from_json(json.loads(values.read_text())).confusion == report.confusion
        assert page.read_text() == report_page(report)

    @pytest.mark.parametrize("plain", [{}, {"type": "NetworkReport"}, {"type": "Other"}, []])
    def test_json_of_something_else_is_refused(self, plain: Any) -> None:
        with pytest.raises(ArgumentError, match=r"expected what a report's \.json holds"):
            NetworkReport.from_json(plain)
