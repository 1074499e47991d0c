"""Checkpoints of common trainers: the weights that are meant, and a word on what was chosen, stripped and left out."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from commands import succeed
from lmh import convert, zoo
from lmh.convert.checkpoints import chosen, is_average
from lmh.errors import ArchitectureError, ArgumentError, SourceError

Weights = Mapping[str, Tensor]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def net() -> nn.Module:
    """digits-cnn with weights of its own, so that nothing else can be loaded by mistake."""
    return zoo.card("digits-cnn").build().eval()


def prefixed(weights: Weights, prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in weights.items()}


def loaded(value: object, **options: Any) -> convert.Source:
    torch.save(value, "model.pt")
    return convert.load_source("model.pt", **options)


def holds(source: convert.Source, wanted: nn.Module) -> bool:
    """Whether a source is the wanted network, and no copy of it with other weights."""
    got, expected = source.model.state_dict(), wanted.state_dict()
    return got.keys() == expected.keys() and all(torch.equal(value, expected[key]) for key, value in got.items())


def optimizer_state(model: nn.Module) -> dict[str, Any]:
    """What an optimizer with momentum keeps: tensors that are no weights."""
    optimizer = torch.optim.Adam(model.parameters())
    model.train()(torch.rand(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    model.eval()
    return optimizer.state_dict()


PLAIN, AVERAGE = net(), net()
OPTIMIZER = optimizer_state(net())
AVERAGED = AveragedModel(AVERAGE)
TORCHVISION = {
    "model": PLAIN.state_dict(),
    "optimizer": OPTIMIZER,
    "lr_scheduler": {"base_lrs": [0.1], "last_epoch": 3},
    "epoch": 3,
    "args": argparse.Namespace(model="digits-cnn", lr=0.1, data_path="/data"),
    "model_ema": AVERAGED.state_dict(),
    "scaler": {"scale": 65536.0},
}
TIMM = {
    "epoch": 3,
    "arch": "digits_cnn",
    "state_dict": PLAIN.state_dict(),
    "optimizer": OPTIMIZER,
    "version": 2,
    "args": argparse.Namespace(model="digits_cnn"),
    "amp_scaler": {"scale": 1.0},
    "state_dict_ema": AVERAGE.state_dict(),
    "metric": 91.2,
}
LIGHTNING = {
    "epoch": 3,
    "global_step": 100,
    "pytorch-lightning_version": "2.2.0",
    "state_dict": {**prefixed(PLAIN.state_dict(), "model."), "loss.weight": torch.ones(10),
                   "val_accuracy.correct": torch.zeros(())},
    "loops": {"fit_loop": {"state_dict": {}}},
    "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5), "k.th": torch.ones(1)}},
    "optimizer_states": [OPTIMIZER],
    "lr_schedulers": [],
    "hparams_name": "kwargs",
    "hyper_parameters": {"lr": 0.1, "class_weights": torch.ones(10)},
}  # fmt: skip
FORMS: dict[str, tuple[object, list[str]]] = {
    "torchvision-references": (TORCHVISION, ["Took the weights under model;", "under model_ema: --entry model_ema"]),
    "timm": (TIMM, ["Took the weights under state_dict;", "--entry state_dict_ema"]),
    "lightning": (LIGHTNING, ["Stripped the prefix model. ", "Left out 2 tensors beside it: loss.weight, val_acc"]),
    "mmcls": ({"meta": {"CLASSES": ["a"], "epoch": 3}, "state_dict": PLAIN.state_dict(), "optimizer": OPTIMIZER}, []),
    "nested": ({"checkpoint": {"model": PLAIN.state_dict(), "step": torch.tensor(3)}, "rng_state": torch.ones(3)}, []),
    "own-key": ({"student": PLAIN.state_dict(), "epoch": 3}, []),
    "fsdp": (
        {key.replace("block.", "block._fsdp_wrapped_module."): value
         for key, value in prefixed(PLAIN.state_dict(), "_fsdp_wrapped_module.").items()},
        ["Stripped _fsdp_wrapped_module. from the tensors' names."],
    ),
    "compiled": (prefixed(PLAIN.state_dict(), "module._orig_mod.module."), ["_orig_mod.", "module.module."]),
    "unknown-prefix": (prefixed(PLAIN.state_dict(), "backbone."), ["Stripped the prefix backbone. from the tensors'"]),
    "two-prefixes": (prefixed(PLAIN.state_dict(), "net.backbone."), ["Stripped the prefix net.backbone. "]),
    "averaged-alone": (AveragedModel(PLAIN).state_dict(), ["Left out 1 counters of the trainer: n_ave", "module."]),
    "ema-alone": ({"ema": PLAIN.state_dict(), "epoch": 3}, ["Took the weights under ema, an average of the weights."]),
    "profiled": ({**PLAIN.state_dict(), "total_ops": torch.zeros(1), "stem.total_params": torch.zeros(1)},
                 ["Left out 2 counters of the trainer: total_ops, stem.total_params."]),
}  # fmt: skip


@pytest.mark.parametrize("arch", [None, "digits-cnn"], ids=["recognised", "named"])
@pytest.mark.parametrize("form", FORMS)
def test_a_trainers_file_gives_the_network_and_says_what_was_done(form: str, arch: str | None) -> None:
    value, said = FORMS[form]
    source = loaded(value, arch=arch)
    assert holds(source, PLAIN)
    text = " ".join(source.notices)
    assert [part for part in said if part not in text] == []
    others = [notice for notice in source.notices if not notice.startswith("Recognised digits-cnn")]
    assert bool(others) is bool(said), others


def test_of_a_module_and_its_average_the_module_is_taken() -> None:
    source = loaded({"model": PLAIN, "ema": AVERAGE})
    assert holds(source, PLAIN)
    assert source.notices == ("Took the weights under model; there are others under ema: --entry ema takes those.",)


@pytest.mark.parametrize(
    ("value", "entry"),
    [
        (TORCHVISION, "model_ema"),
        (TIMM, "state_dict_ema"),
        ({"state_dict": {**prefixed(PLAIN.state_dict(), "model."), **prefixed(AVERAGE.state_dict(), "model_ema.")}},
         "model_ema"),
        ({"state_dict": {**prefixed(PLAIN.state_dict(), "model."), **prefixed(AVERAGE.state_dict(), "ema.module.")}},
         "state_dict.ema.module"),
        ({"outer": {"model": PLAIN.state_dict(), "ema": AVERAGE.state_dict()}}, "outer.ema"),
        ({"model": PLAIN, "ema": AVERAGE}, "ema"),
        ({"one": PLAIN.state_dict(), "two": AVERAGE.state_dict()}, "two"),
    ],
    ids=["torchvision", "timm", "prefix", "key-and-prefix", "nested", "modules", "unknown-keys"],
)  # fmt: skip
def test_the_entry_that_a_notice_names_takes_the_other_weights(value: object, entry: str) -> None:
    source = loaded(value, entry=entry)
    assert holds(source, AVERAGE)
    assert source.record()["entry"] == entry


def test_an_average_beside_the_model_in_one_state_dict_is_not_taken_unasked() -> None:
    weights = {**prefixed(AVERAGE.state_dict(), "ema_model.module."), **prefixed(PLAIN.state_dict(), "model.")}
    source = loaded({"state_dict": {**weights, "ema_model.n_averaged": torch.tensor(3)}})
    assert holds(source, PLAIN)
    assert "--entry ema_model.module takes those" in " ".join(source.notices)
    assert holds(loaded({"state_dict": weights}, entry="ema_model.module"), AVERAGE)


def test_several_unknown_entries_are_listed_and_the_advice_works() -> None:
    value = {"one": PLAIN.state_dict(), "two": AVERAGE.state_dict()}
    with pytest.raises(SourceError, match=r"model\.pt: holds weights under one, two; expected one.*--entry"):
        loaded(value)
    assert holds(loaded(value, entry="one"), PLAIN)


def test_two_prefixes_with_the_same_architecture_are_listed_and_the_advice_works() -> None:
    value = {**prefixed(PLAIN.state_dict(), "encoder_q."), **prefixed(AVERAGE.state_dict(), "encoder_k.")}
    for arch in (None, "digits-cnn"):
        with pytest.raises(ArchitectureError, match=r"under the prefixes encoder_q, encoder_k; .*--entry"):
            loaded(value, arch=arch)
        assert holds(loaded(value, arch=arch, entry="encoder_q"), PLAIN)


def test_a_layer_beside_the_architecture_is_not_left_out_silently() -> None:
    value = {**prefixed(PLAIN.state_dict(), "backbone."), "classifier.weight": torch.rand(5, 10)}
    for arch in (None, "digits-cnn"):
        with pytest.raises(ArchitectureError, match=r"under backbone, but 1 weights.*classifier\.weight.*--entry"):
            loaded(value, arch=arch)
        assert holds(loaded(value, arch=arch, entry="backbone"), PLAIN)


def test_a_prefix_is_stripped_only_where_the_rest_fits() -> None:
    weights = prefixed(PLAIN.state_dict(), "model.")
    weights.pop("model.head.bias")
    with pytest.raises(ArchitectureError, match=r"model\.pt: does not fit digits-cnn: missing head\.bias\. Choose"):
        loaded(weights, arch="digits-cnn")
    with pytest.raises(ArchitectureError, match=r"nearest is digits-cnn with 10 classes; .*: missing head\.bias\. "):
        loaded(weights)


@pytest.mark.parametrize(
    ("value", "entry", "known"),
    [
        (TORCHVISION, "ema", "model, model_ema"),
        (LIGHTNING, "net", "state_dict"),
        (prefixed(PLAIN.state_dict(), "model."), "net", "model"),
    ],
    ids=["torchvision", "lightning", "prefix"],
)
def test_an_entry_that_is_not_there_is_refused_with_those_that_are(value: object, entry: str, known: str) -> None:
    with pytest.raises(SourceError, match=rf"model\.pt: nothing is under '{entry}'; expected one of {known}.*--entry"):
        loaded(value, entry=entry)


@pytest.mark.parametrize("option", [{"entry": "model"}, {"arch": "digits-cnn"}], ids=["entry", "arch"])
def test_options_that_a_source_leaves_no_room_for_are_refused(option: dict[str, str]) -> None:
    ((name, _),) = option.items()
    for source in ("zoo:digits-cnn", "torchvision:resnet18"):
        with pytest.raises(ArgumentError, match=rf"{name}=.* came with {source}.*Leave it out"):
            convert.load_source(source, **option)
    torch.save(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "net.pt")
    with pytest.raises(ArgumentError, match=rf"{name}=.* came with net\.pt, which holds a (single|whole) module"):
        convert.load_source("net.pt", **option)


def test_flattened_fsdp_weights_are_refused_with_advice() -> None:
    with pytest.raises(SourceError, match=r"_flat_param holds flattened.*each weight by itself.*FULL_STATE_DICT"):
        loaded({"model": {"layer.weight": torch.zeros(2, 2), "_fsdp_wrapped_module._flat_param": torch.zeros(10)}})


def test_a_file_without_weights_lists_its_keys() -> None:
    with pytest.raises(SourceError, match="keys epoch, optimizer and no state_dict; expected one under state_dict"):
        loaded({"epoch": 3, "optimizer": OPTIMIZER})


def test_what_an_average_is_called() -> None:
    averages = ["model_ema", "state_dict_ema", "ema", "ema_model.module", "params_ema", "swa_model", "teacher."]
    assert [name for name in averages if not is_average(name)] == []
    assert [
        name for name in ("model", "state_dict", "semantic", "cinema", "schema_net", "swag") if is_average(name)
    ] == []


def test_a_state_dict_at_the_top_is_taken_whole_whatever_its_names_say() -> None:
    state = {"model.weight": torch.zeros(2, 2), "optim.weight": torch.zeros(2)}
    taken, notices = chosen(Path("x.pt"), state, None)
    assert taken.keys() == state.keys()  # type: ignore[union-attr]
    assert notices == ()


def test_the_report_measures_the_entry_that_was_converted() -> None:
    torch.save(TORCHVISION, "model.pt")
    source = convert.load_source("model.pt", entry="model_ema")
    conversion = convert.convert(source.model, 2, example_input=torch.rand(1, 1, 8, 8))
    convert.save(conversion, "snn.safetensors", source=source.record())
    succeed("report", "snn.safetensors", "--data", "digits", "--test-samples", 20)
    assert holds(convert.loading.load_again("model.pt", source.record()), AVERAGE)
