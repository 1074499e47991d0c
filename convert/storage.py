"""save and load: a spiking network as one ``.safetensors`` file, rebuilt from its source's architecture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from .. import zoo
from ..arguments import check_kind, described
from ..artifact import file_digest, is_there, read_snn, user_path, versions, write_snn
from ..errors import ArgumentError, ArtifactError, AuditError
from ..readout import READOUTS
from ..records import Calibration, frozen_value, plain_value
from ..resets import AttachedReset, DetachedReset
from ..spiking import IF, LIF, LMH, PerChannel, PerLayer, PerStep, Ranges, SpikingSite, sites
from ..surrogates import Arctan, Dspike, Rectangle, Sigmoid, Triangle
from ..zoo.registry import TORCHVISION, architecture
from .files import check_saved
from .loading import load_again
from .maxpool import AveragePool, BeforeNeuron, Gated, WhereExact
from .normalisation import TEBN, PlainBatchNorm, TdBN
from .pipeline import Conversion, Recipe, assemble
from .prepare import prepare
from .rules import ReluSurgery, Rules, StandIns, merged
from .spike import DirectCoding, EventFrames

_TYPES = {
    kind.__name__: kind
    for kind in (
        Recipe,
        LMH,
        IF,
        LIF,
        PerLayer,
        PerChannel,
        PerStep,
        Ranges,
        Triangle,
        Rectangle,
        Sigmoid,
        Arctan,
        Dspike,
        DetachedReset,
        AttachedReset,
        DirectCoding,
        EventFrames,
        StandIns,
        BeforeNeuron,
        WhereExact,
        AveragePool,
        Gated,
        PlainBatchNorm,
        TEBN,
        TdBN,
        *READOUTS,
    )
}
MANIFEST = "lmh_manifest"
OURS = ("source", "recipe", "calibration", "sites", "structure", "calls", "versions")


def save(
    conversion: Conversion | fx.GraphModule,
    file: str | Path,
    *,
    source: Mapping[str, Any] | None = None,
    **facts: Any,
) -> Path:
    """Write a spiking network: its tensors, and a manifest that says how to build its graph again.

    Args:
        conversion: from :func:`convert`, or a network from :func:`load`; trained in between or not.
        file: to write; replaced only when the new one is whole.
        source: the source's record (:meth:`Source.record`), so that :func:`load` can find the architecture by
            name; unless given, loading needs ``source=``.
        facts: more for the manifest: metrics, seed, command line.

    Returns:
        The file's path.

    Raises:
        ArtifactError: if the file cannot be written, or something that it must hold cannot; no partial file is left.

    >>> import tempfile, torch
    >>> from lmh.convert import convert
    >>> ann = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> conversion = convert(ann, timesteps=4, data=torch.rand(16, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = save(conversion, f"{folder}/net-snn-T4.safetensors", seed=0)
    ...     snn = load(file, source=ann)
    >>> x = torch.rand(3, 4)
    >>> torch.equal(snn(x), conversion.snn(x)), snn.meta["lmh_manifest"]["seed"]
    (True, 0)
    """
    if not isinstance(file, (str, Path)):
        raise ArtifactError(
            f"save: file is {described(file)}; expected a path. Pass save(conversion, 'net-snn-T4.safetensors')."
        )
    snn = conversion.snn if isinstance(conversion, Conversion) else conversion
    if not isinstance(snn, fx.GraphModule):
        raise ArtifactError(
            f"{file}: {described(snn)} came; expected what convert or load returned. Pass that itself, not a wrapper "
            "around it (DDP, torch.compile) and not its state_dict; an ANN must be converted first."
        )
    known = snn.meta.get(MANIFEST, {})
    manifest = {key: known[key] for key in ("source", "recipe", "calibration", "preprocessing") if key in known}
    if isinstance(conversion, Conversion):
        _check_recipe(file, conversion.recipe)
        calibration = conversion.calibration
        manifest = {
            "source": {"name": None, "architecture": None, "num_classes": None, "sha256": None},
            "recipe": plain_value(conversion.recipe),
            "calibration": {key: getattr(calibration, key) for key in ("policy", "timesteps", "samples")},
        }
    if not manifest:
        raise ArtifactError(
            f"{file}: the network does not say how its graph was made; expected a Conversion, or a network from load. "
            "Pass what convert returned, save(conversion, file), instead of its snn; dataclasses.replace(conversion, "
            "snn=snn) puts another network of the same graph into it."
        )
    if source is not None:
        if not isinstance(source, Mapping):
            raise ArtifactError(
                f"{file}: source= is {described(source)}; expected a record. Pass load_source(name).record()."
            )
        manifest["source"] = dict(source)
    _check_facts(file, {"source": manifest["source"], **facts})
    tensors = snn.state_dict()
    manifest |= {
        "sites": list(sites(snn)),
        "structure": _structure(snn),
        "calls": _calls(snn),
        "versions": versions(),
        **facts,
    }
    path = user_path(file)
    write_snn(path, tensors, manifest)
    return path


def _check_recipe(file: str | Path, recipe: Recipe) -> None:
    """Refuse a recipe with types of the user's own, which no file can bring back."""
    strange = dict(_strangers("", recipe))
    if not strange:
        return
    advice = "Convert with one of these."
    if strange.keys() <= {"neuron.surrogate", "neuron.reset"}:
        advice = (
            "Surrogates and resets act in training only: put one of these into the file with "
            "dataclasses.replace(conversion, recipe=…), or convert with it."
        )
    raise ArtifactError(
        f"{file}: cannot hold the recipe's {', '.join(f'{path}, {what}' for path, what in strange.items())}; expected "
        f"values of {', '.join(kind for kind in _TYPES if kind != 'Recipe')}. {advice}"
    )


def _strangers(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Give the place and the description of every value that :data:`_TYPES` does not know."""
    if is_dataclass(value) and _TYPES.get(type(value).__name__) is type(value):
        for item in fields(value):
            yield from _strangers(f"{path}.{item.name}" if path else item.name, getattr(value, item.name))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _strangers(path, item)
    elif not isinstance(value, (str, int, float, type(None))):
        yield path, described(value)


def _check_facts(file: str | Path, facts: Mapping[str, Any]) -> None:
    """Refuse facts that JSON cannot hold, or that would stand in the place of what load reads."""
    taken = sorted(set(facts) & set(OURS) - {"source"})
    if taken:
        raise ArtifactError(f"{file}: the fact {taken[0]}= is a name of the manifest's own. Choose another name.")
    for name, value in facts.items():
        try:
            json.dumps(value, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ArtifactError(
                f"{file}: the fact {name}= is {described(value)}, which JSON cannot hold ({error}); expected numbers, "
                "texts, lists and dicts. Pass float(x) or x.tolist() of a tensor or array, str(x) of a path."
            ) from error


def load(
    file: str | Path,
    source: str | Path | nn.Module | None = None,
    *,
    rules: Rules | None = None,
    trust_pickle: bool = False,
    modules: Iterable[str] = (),
) -> fx.GraphModule:
    """Read a spiking network that :func:`save` wrote.

    Args:
        file: path of the ``.safetensors``, or ``zoo:NAME`` for a network of the zoo.
        source: what the graph is rebuilt from when the manifest names no architecture: the source file, whose
            digest is checked, or a module of the same class.
        rules: the rules of the conversion, if it had any of its own.
        trust_pickle: let a pickled ``source`` file run code.
        modules: dotted names of your modules whose classes a pickled ``source`` may name (:func:`load_source`).

    Returns:
        The network in eval mode on the CPU; its manifest is ``snn.meta["lmh_manifest"]``.

    Raises:
        ArtifactError: if the file is damaged, or the source is missing or not the same.

    >>> import torch
    >>> snn = load("zoo:digits-cnn-t4")
    >>> snn(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    >>> snn.meta["lmh_manifest"]["recipe"]["timesteps"]
    4
    """
    return load_conversion(file, source, rules=rules, trust_pickle=trust_pickle, modules=modules).snn


def load_conversion(
    file: str | Path,
    source: str | Path | nn.Module | None = None,
    *,
    rules: Rules | None = None,
    trust_pickle: bool = False,
    modules: Iterable[str] = (),
) -> Conversion:
    """Read a spiking network as :func:`load` does, and return it with the ANN in rewritten form.

    The prepared ANN has the weights of ``source``, where one is given or the manifest's own is a file; else it has
    the right architecture and fresh weights, of which ``load`` needs no more.

    >>> from lmh import zoo
    >>> conversion = load_conversion("zoo:digits-cnn-t4", zoo.load("digits-cnn"))
    >>> conversion.report.timesteps, conversion.prepared.spiking[0]
    (4, 'stem.2')
    """
    if rules is not None:
        check_kind("load: rules", rules, Mapping, "the rules of the conversion, as in rules={nn.GELU: as_neuron}")
        merged(rules)
    path = _saved_file(file)
    tensors, manifest = read_snn(path)
    try:
        recipe: Recipe = frozen_value(manifest["recipe"], _TYPES)
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: its recipe cannot be read ({error}). Make the file again.") from error
    if isinstance(recipe.surgery, bool):  # files from before the types were kept by name
        recipe = replace(recipe, surgery=StandIns.of(ReluSurgery()) if recipe.surgery else None)
    ann = _architecture(path, manifest["source"], source, trust_pickle, modules)
    calibration = _stored_calibration(path, manifest, tensors)
    try:
        surgery = None if recipe.surgery is None else recipe.surgery.surgery(ann)
        prepared = prepare(
            ann, recipe.sample_shape, rules=rules, keep=recipe.keep, surgery=surgery, maxpool=recipe.maxpool
        )
        conversion = assemble(prepared, calibration, recipe)
    except (ArgumentError, AuditError) as error:
        raise ArtifactError(
            f"{path}: {type(ann).__name__} is not the module that was converted ({_first_problem(error)}); expected "
            "one that gives the same graph. Pass that module as source=, and the conversion's own rules= if it had any."
        ) from error
    snn = conversion.snn
    if _structure(snn) != manifest["structure"] or manifest.get("calls") not in (None, _calls(snn)):
        raise ArtifactError(
            f"{path}: {manifest['source']['name'] or 'the source'} gives another graph than the file was made from; "
            "expected the same sites and shapes. Pass the network that was converted as source=."
        )
    try:
        snn.load_state_dict(tensors)
    except RuntimeError as error:
        raise ArtifactError(f"{path}: tensors are missing or of another shape. Make the file again.") from error
    snn.meta[MANIFEST] = manifest
    fresh = source is None and manifest["source"]["architecture"] is not None
    return replace(conversion, has_source_weights=not fresh)


def saved_manifest(file: str | Path) -> dict[str, Any]:
    """Return the manifest of a file that :func:`save` wrote, or of ``zoo:NAME``, without building its network.

    Raises:
        ArtifactError: if the file is damaged.

    >>> saved_manifest("zoo:digits-cnn-t4")["recipe"]["timesteps"]
    4
    """
    return read_snn(_saved_file(file))[1]


def _saved_file(file: str | Path) -> Path:
    if not isinstance(file, (str, Path)):
        raise ArtifactError(f"load: file is {described(file)}; expected a path or zoo:NAME. Pass 'net.safetensors'.")
    path = zoo.snn_path(file) if isinstance(file, str) and file.startswith("zoo:") else user_path(file)
    check_saved(path)
    return path


def _first_problem(error: ArgumentError | AuditError) -> str:
    problems = error.problems if isinstance(error, AuditError) else [str(error)]
    return problems[0] + (f" and {len(problems) - 1} more" if len(problems) > 1 else "")


def _architecture(
    path: Path,
    record: Mapping[str, Any],
    source: str | Path | nn.Module | None,
    trust_pickle: bool,
    modules: Iterable[str],
) -> nn.Module:
    if isinstance(source, nn.Module):
        return source
    if source is not None:
        if not isinstance(source, (str, Path)):
            raise ArtifactError(
                f"{path}: source= is {described(source)}; expected a module or the path of its file. "
                "Pass the network that was converted."
            )
        if str(source).startswith(("zoo:", TORCHVISION)):
            return load_again(str(source), record).model
        file = user_path(source)
        digest = file_digest(file) if is_there(file) and file.is_file() else None
        if record["sha256"] is not None and digest is None:
            raise ArtifactError(f"{source}: no such file; expected the one that {path} was made from. Check the path.")
        if record["sha256"] not in (None, digest):
            raise ArtifactError(
                f"{source}: its sha256 is {digest} and {path} was made from {record['sha256']}; expected the same file."
            )
        return load_again(str(source), record, trust_pickle=trust_pickle, modules=modules).model
    if record["architecture"] is None:
        if _still_there(record):
            return load_again(record["name"], record, trust_pickle=trust_pickle, modules=modules).model
        raise ArtifactError(
            f"{path}: was made from {record['name'] or 'a module of your own'}, which cannot be built by name and is "
            "not there unchanged. Pass it: load(file, source=model), on the command line --source FILE."
        )
    return architecture(record["architecture"]).build(num_classes=record["num_classes"])


def _stored_calibration(path: Path, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Calibration:
    try:
        found = {
            name: {site: tensors[f"{site}.{key}"] for site in manifest["sites"]}
            for name, key in (("v_threshold", "base_threshold"), ("v_init", "v_init"))
        }
    except KeyError as error:
        raise ArtifactError(
            f"{path}: tensor {error} is missing; expected every site's. Make the file again."
        ) from error
    known = manifest["calibration"]
    return Calibration(known["policy"], known["timesteps"], known["samples"], **found)


def _structure(snn: fx.GraphModule) -> str:
    """Digest of what must agree for tensors to mean the same: names, shapes, sites, and the graph's operations."""
    shapes = sorted((name, list(tensor.shape)) for name, tensor in snn.state_dict().items())
    steps = [[node.op, str(getattr(node.target, "__name__", node.target))] for node in snn.graph.nodes]
    layers = [
        [str(node.target), snn.get_submodule(str(node.target)).extra_repr()]
        for node in snn.graph.nodes
        if node.op == "call_module" and not isinstance(snn.get_submodule(str(node.target)), SpikingSite)
    ]
    return hashlib.sha256(json.dumps([shapes, list(sites(snn)), steps, layers]).encode()).hexdigest()


def _calls(snn: fx.GraphModule) -> str:
    """Digest of what the graph's operations are called with besides tensors: numbers, sizes, options."""
    places = {node: position for position, node in enumerate(snn.graph.nodes)}
    arguments = [str(fx.map_arg((node.args, node.kwargs), lambda source: places[source])) for node in places]
    return hashlib.sha256(json.dumps(arguments).encode()).hexdigest()


def _still_there(record: Mapping[str, Any]) -> bool:
    """Whether the ANN's file lies where it was, seen from the current folder, byte for byte."""
    if not record["name"] or record["sha256"] is None:
        return False
    file = user_path(record["name"])
    return is_there(file) and file.is_file() and file_digest(file) == record["sha256"]
