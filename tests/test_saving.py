"""Saving and loading: what a file cannot hold is refused before anything is written, wrong sources are named."""

from __future__ import annotations

import json
import struct
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nets
from lmh import LMH, sites
from lmh.convert import Conversion, ReluSurgery, as_neuron, convert, load, load_source, save
from lmh.convert.rules import STAND_INS, StandIns
from lmh.errors import ArgumentError, ArtifactError, AuditError
from lmh.records import frozen_value, plain_value
from lmh.resets import AttachedReset, DetachedReset
from lmh.spiking import IF
from lmh.surrogates import Arctan, Dspike, Triangle

X = torch.rand(8, 4)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "net.safetensors"


class Plain:
    """A surrogate of the user's own, no dataclass."""

    def __call__(self, u: Tensor) -> Tensor:
        return (u.abs() < 1).to(u.dtype)

    def primitive(self, u: Tensor) -> Tensor:
        return u.clamp(-1, 1)


@dataclass(frozen=True)
class Frozen(Plain):
    """The same as a dataclass."""

    gamma: float = 1.0


Namesake = dataclass(frozen=True)(type("Triangle", (Plain,), {"gamma": 1.0, "__annotations__": {"gamma": float}}))


def refused(file: Path, conversion: Any, match: str, **options: Any) -> None:
    with pytest.raises(ArtifactError, match=match):
        save(conversion, file, **options)
    assert list(file.parent.iterdir()) == []


class TestWhatAFileCannotHold:
    @pytest.mark.parametrize("surrogate", [Plain(), Frozen(), Namesake()], ids=["plain", "dataclass", "namesake"])
    def test_a_surrogate_of_the_users_own_is_named(self, file: Path, surrogate: Any) -> None:
        ann = nets.two_layers()
        conversion = convert(ann, 2, data=X, neuron=LMH(surrogate=surrogate))
        name = type(surrogate).__name__
        refused(file, conversion, rf"recipe's neuron\.surrogate, a {name}; expected.*Triangle.*dataclasses\.replace")
        known = replace(conversion.recipe, neuron=replace(conversion.recipe.neuron, surrogate=Triangle()))
        save(replace(conversion, recipe=known), file)
        assert torch.equal(load(file, source=ann)(X), conversion.snn(X))

    def test_a_preset_of_the_users_own_is_named(self, file: Path) -> None:
        @dataclass(frozen=True)
        class Leaky(IF):
            lambda_s: float = 0.75

        conversion = convert(nets.two_layers(), 2, data=X, neuron=LMH(Leaky()))
        refused(file, conversion, r"recipe's neuron\.preset, a Leaky; expected values of.*Convert with one of these")
        save(convert(nets.two_layers(), 2, data=X, neuron=LMH(IF(lambda_s=0.75), surrogate=Arctan())), file)

    @pytest.mark.parametrize("surrogate", [Arctan(), Dspike(2.0, 0.5)], ids=repr)
    @pytest.mark.parametrize("reset", [DetachedReset(), AttachedReset()], ids=repr)
    def test_those_of_ours_come_back(self, file: Path, surrogate: Any, reset: Any) -> None:
        ann = nets.two_layers()
        neuron = LMH(surrogate=surrogate, reset=reset)
        save(convert(ann, 2, data=X, neuron=neuron), file)
        assert {site.neuron for site in sites(load(file, source=ann)).values()} == {neuron}

    @pytest.mark.parametrize(
        ("fact", "words"),
        [
            (torch.ones(2), "a float32 tensor"),
            (Path("x"), "a PosixPath"),
            ({"accuracy": torch.tensor(0.5)}, "a dict with the keys accuracy"),
        ],
        ids=["tensor", "path", "nested"],
    )
    def test_facts_that_json_cannot_hold_are_named(self, file: Path, fact: Any, words: str) -> None:
        conversion = convert(nets.two_layers(), 2, data=X)
        refused(file, conversion, rf"the fact note= is {words}.*JSON cannot hold.*x\.tolist\(\)", note=fact)
        refused(file, conversion, "the fact source= is", source={"name": fact})
        save(conversion, file, note=[1.0, "text"])
        assert load(file, source=nets.two_layers()).meta["lmh_manifest"]["note"] == [1.0, "text"]

    def test_facts_do_not_stand_in_the_place_of_what_load_reads(self, file: Path) -> None:
        conversion = convert(nets.two_layers(), 2, data=X)
        for name in ("recipe", "calibration", "sites", "structure", "versions"):
            refused(file, conversion, rf"the fact {name}= is a name of the manifest's own", **{name: 1})

    @pytest.mark.parametrize(
        ("value", "match"),
        [
            (lambda found: found.snn, r"expected a Conversion, or a network from load.*save\(conversion, file\)"),
            (lambda found: found.prepared.model, r"expected a Conversion, or a network from load"),
            (lambda found: nn.DataParallel(found.snn), "a DataParallel came.*not a wrapper"),
            (lambda found: nets.two_layers(), "a Sequential came.*an ANN must be converted first"),
            (lambda found: found.snn.state_dict(), "an OrderedDict with the keys .* came.*not its state_dict"),
            (lambda found: "net.safetensors", "the string 'net.safetensors' came"),
            (lambda found: None, "None came; expected what convert or load returned"),
        ],
    )
    def test_what_is_no_conversion_is_refused(self, file: Path, value: Any, match: str) -> None:
        refused(file, value(convert(nets.two_layers(), 2, data=X)), match)

    def test_a_file_that_is_no_path_and_a_source_that_is_no_record_are_refused(self, file: Path) -> None:
        conversion = convert(nets.two_layers(), 2, data=X)
        with pytest.raises(ArtifactError, match=r"file is a Conversion; expected a path.*save\(conversion, 'net"):
            save(str(file), conversion)  # type: ignore[arg-type]
        source = load_source("zoo:digits-cnn")
        refused(file, conversion, r"source= is a Source; expected a record.*\.record\(\)", source=source)

    def test_the_advice_for_a_trained_network_works(self, file: Path) -> None:
        ann = nets.two_layers()
        conversion = convert(ann, 2, data=X)
        trained = convert(ann, 2, data=X).snn
        with torch.no_grad():
            sites(trained)["1"].raw_threshold.fill_(0.25)
        save(replace(conversion, snn=trained), file)
        assert torch.equal(load(file, source=ann)(X), trained(X))


class TestWrongSource:
    def wrong(self, file: Path, source: Any, match: str, cause: type[Exception]) -> None:
        with pytest.raises(ArtifactError, match=match) as caught:
            load(file, source=source)
        assert isinstance(caught.value.__cause__, cause)

    def test_a_module_that_is_not_the_one_is_named(self, file: Path) -> None:
        save(convert(nets.two_layers(), 2, data=X), file)
        match = (
            r"net\.safetensors: {} is not the module that was converted \(.*\); expected.*Pass that module as source="
        )
        self.wrong(file, nets.conv_net(), match.format("Sequential"), ArgumentError)
        self.wrong(file, nets.Reused(), match.format("Reused"), ArgumentError)
        gelu = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Tanh(), nn.Linear(8, 3))
        self.wrong(file, gelu, match.format("Sequential").replace(r"\(.*\)", r"\(1: no rule.*and 1 more\)"), AuditError)
        self.wrong(file, nn.Linear(4, 3), match.format("Linear"), AuditError)

    def test_the_rules_of_the_conversion_are_asked_for(self, file: Path) -> None:
        ann = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
        rules = {nn.GELU: as_neuron}
        save(convert(ann, 2, data=X, rules=rules), file)
        self.wrong(file, ann, "rules= if it had any", AuditError)
        assert load(file, source=ann, rules=rules)(X).shape == (8, 3)

    def test_a_source_of_another_type_is_refused(self, file: Path) -> None:
        save(convert(nets.two_layers(), 2, data=X), file)
        for source, words in ((nn.ReLU, "the class ReLU"), (load_source("zoo:digits-cnn"), "a Source")):
            with pytest.raises(ArtifactError, match=rf"source= is {words}; expected a module or the path"):
                load(file, source=source)  # type: ignore[arg-type]

    def test_rules_and_files_of_another_type_are_refused(self, file: Path) -> None:
        save(convert(nets.two_layers(), 2, data=X), file)
        with pytest.raises(ArgumentError, match=r"load: rules is 3; expected a value of type Mapping"):
            load(file, source=nets.two_layers(), rules=3)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match=r"expected a module type and a function"):
            load(file, source=nets.two_layers(), rules={"GELU": as_neuron})  # type: ignore[dict-item]
        with pytest.raises(ArtifactError, match=r"load: file is 3; expected a path or zoo:NAME"):
            load(3)  # type: ignore[arg-type]

    def test_a_source_file_that_is_gone_is_named(self, file: Path) -> None:
        save(convert(nets.two_layers(), 2, data=X), file, source={"name": "a.pt", "architecture": None,
             "num_classes": None, "sha256": "0" * 64})  # fmt: skip
        with pytest.raises(ArtifactError, match=r"gone\.pt: no such file; expected the one that"):
            load(file, source=file.parent / "gone.pt")


class MySwish(nn.Module):
    """An activation that only a user's own stand_ins names."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class TestStandIns:
    def surgical(self, *stand_ins: type[nn.Module]) -> tuple[nn.Module, Conversion]:
        ann = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 3))
        return ann, convert(ann, 2, data=X, surgery=ReluSurgery(*([stand_ins] if stand_ins else [])))

    def test_they_survive_a_file(self, file: Path) -> None:
        ann, conversion = self.surgical(nn.GELU)
        assert conversion.report.nodes() == {"converted": ["1"], "kept": ["3"], "refused": []}
        save(conversion, file)
        again = load(file, source=ann)
        assert list(sites(again)) == ["1"]
        assert torch.equal(again(X), conversion.snn(X))

    def test_a_recipe_with_them_is_plain_and_frozen_again(self) -> None:
        stand_ins = StandIns.of(ReluSurgery((nn.SiLU, MySwish)))
        assert frozen_value(json.loads(json.dumps(plain_value(stand_ins))), {"StandIns": StandIns}) == stand_ins
        assert stand_ins.surgery(nets.two_layers()) == ReluSurgery((nn.SiLU, MySwish))
        assert StandIns.of(ReluSurgery()).surgery(nn.Linear(1, 1)) == ReluSurgery(STAND_INS)

    def test_types_are_found_in_the_network_or_among_the_imported_modules(self) -> None:
        class Local(nn.SiLU):
            """Only an instance of it leads to this type."""

        class Child(Local):
            """Found by its base."""

        surgery = ReluSurgery((Local, MySwish, nn.Mish))
        assert StandIns.of(surgery).surgery(nn.Sequential(nn.Linear(4, 8), Child())) == surgery
        with pytest.raises(ArgumentError, match=r"<locals>\.Local: no such module type"):
            StandIns.of(surgery).surgery(nets.two_layers())

    def test_a_type_that_is_gone_is_named(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        module = types.ModuleType("a_module_of_the_users")
        module.Gone = type("Gone", (nn.Module,), {"__module__": module.__name__})  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        ann, conversion = self.surgical(nn.GELU, module.Gone)  # type: ignore[attr-defined]
        save(conversion, file)
        assert list(sites(load(file, source=ann))) == ["1"]
        monkeypatch.delitem(sys.modules, module.__name__)
        with pytest.raises(ArtifactError, match=r"stand-in a_module_of_the_users\.Gone.*Import the module"):
            load(file, source=ann)

    def test_a_name_in_a_file_imports_nothing(self) -> None:
        assert "antigravity" not in sys.modules
        for name in ("antigravity.fly", "torch.nn.ReLU.forward", "os.system", "lmh.nonsense", "", "nn"):
            with pytest.raises(ArgumentError, match="no such module type"):
                StandIns((name,)).surgery(nets.two_layers())
        assert "antigravity" not in sys.modules

    @pytest.mark.parametrize("surgery", [True, False])
    def test_files_from_before_load_still(self, file: Path, surgery: bool) -> None:
        if surgery:
            ann, conversion = self.surgical()
        else:
            ann = nets.two_layers()
            conversion = convert(ann, 2, data=X)
        save(conversion, file)
        rewritten(file, {"surgery": surgery})
        again = load(file, source=ann)
        assert torch.equal(again(X), conversion.snn(X))
        assert list(sites(again)) == list(sites(conversion.snn))
        save(again, file)
        assert torch.equal(load(file, source=ann)(X), conversion.snn(X))


def rewritten(file: Path, changes: Mapping[str, Any]) -> None:
    """Change entries of the recipe in a file's header."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    manifest = json.loads(header["__metadata__"]["manifest"])
    manifest["recipe"].update(changes)
    header["__metadata__"]["manifest"] = json.dumps(manifest)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


class TestRepr:
    def test_values_that_hold_networks_and_tensors_are_short(self) -> None:
        conversion = convert(nets.conv_net(), 4, data=torch.rand(16, 2, 8, 8), keep=["2"])
        texts = [repr(value) for value in (conversion, conversion.prepared, conversion.calibration)]
        assert texts == [
            "Conversion(timesteps=4, sites=1, calibration='MinError(levels_per_step=0.5, base_levels=2, per channel), "
            "16 samples', spiking_coverage=0.25, notices=('1 nodes stay analog: 2; 25.0 % of activation elements "
            "spike.',))",
            "Prepared(Sequential, sample_shape=(2, 8, 8), activations=2, spiking=1, spiking_coverage=0.25)",
            "Calibration(policy='MinError(levels_per_step=0.5, base_levels=2, per channel)', timesteps=4, samples=16, "
            "sites=1)",
        ]
