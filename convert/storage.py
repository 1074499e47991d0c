"""save and load: a spiking network as one ``.safetensors`` file, rebuilt from its source's architecture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from .. import zoo
from ..artifact import file_digest, is_there, read_snn, user_path, versions, write_snn
from ..errors import ArtifactError
from ..records import Calibration, frozen_value, plain_value
from ..spiking import IF, LIF, LMH, PerChannel, PerLayer, PerStep, Ranges, SpikingSite, sites
from ..surrogates import Arctan, Rectangle, Sigmoid, Triangle
from .loading import load_source
from .maxpool import AveragePool, BeforeNeuron, Gated
from .pipeline import Conversion, Recipe, assemble
from .prepare import prepare
from .rules import ReluSurgery, Rules
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
        DirectCoding,
        EventFrames,
        BeforeNeuron,
        AveragePool,
        Gated,
    )
}
MANIFEST = "lmh_manifest"


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
        ArtifactError: if the file cannot be written; no partial file is left.
    """
    snn = conversion.snn if isinstance(conversion, Conversion) else conversion
    known = snn.meta.get(MANIFEST, {})
    manifest = {key: known[key] for key in ("source", "recipe", "calibration", "preprocessing") if key in known}
    if isinstance(conversion, Conversion):
        calibration = conversion.calibration
        manifest = {
            "source": {"name": None, "architecture": None, "num_classes": None, "sha256": None},
            "recipe": plain_value(conversion.recipe),
            "calibration": {key: getattr(calibration, key) for key in ("policy", "timesteps", "samples")},
        }
    if not manifest:
        raise ArtifactError(f"{file}: the network was not made by convert or load, so its graph cannot be rebuilt.")
    if source is not None:
        manifest["source"] = dict(source)
    tensors = snn.state_dict()
    manifest |= {"sites": list(sites(snn)), "structure": _structure(snn), "versions": versions(), **facts}
    path = user_path(file)
    write_snn(path, tensors, manifest)
    return path


def load(
    file: str | Path,
    source: str | nn.Module | None = None,
    *,
    rules: Rules | None = None,
    trust_pickle: bool = False,
) -> fx.GraphModule:
    """Read a spiking network that :func:`save` wrote.

    Args:
        file: path of the ``.safetensors``, or ``zoo:NAME`` for a network of the zoo.
        source: what the graph is rebuilt from when the manifest names no architecture: the source file, whose
            digest is checked, or a module of the same class.
        rules: the rules of the conversion, if it had any of its own.
        trust_pickle: let a pickled ``source`` file run code.

    Returns:
        The network in eval mode on the CPU; its manifest is ``snn.meta["lmh_manifest"]``.

    Raises:
        ArtifactError: if the file is damaged, or the source is missing or not the same.
    """
    path = zoo.snn_path(file) if isinstance(file, str) and file.startswith("zoo:") else user_path(file)
    tensors, manifest = read_snn(path)
    try:
        recipe: Recipe = frozen_value(manifest["recipe"], _TYPES)
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: its recipe cannot be read ({error}). Make the file again.") from error
    ann = _architecture(path, manifest["source"], source, trust_pickle)
    surgery = ReluSurgery() if recipe.surgery else None
    prepared = prepare(ann, recipe.sample_shape, rules=rules, keep=recipe.keep, surgery=surgery, maxpool=recipe.maxpool)
    snn = assemble(prepared, _stored_calibration(path, manifest, tensors), recipe).snn
    if _structure(snn) != manifest["structure"]:
        raise ArtifactError(
            f"{path}: {manifest['source']['name'] or 'the source'} gives another graph than the file was made from; "
            "expected the same sites and shapes. Pass the network that was converted as source=."
        )
    try:
        snn.load_state_dict(tensors)
    except RuntimeError as error:
        raise ArtifactError(f"{path}: tensors are missing or of another shape. Make the file again.") from error
    snn.meta[MANIFEST] = manifest
    return snn


def _architecture(
    path: Path, record: Mapping[str, Any], source: str | nn.Module | None, trust_pickle: bool
) -> nn.Module:
    if isinstance(source, nn.Module):
        return source
    if source is not None:
        digest = file_digest(user_path(source)) if is_there(user_path(source)) else None
        if record["sha256"] is not None and digest != record["sha256"]:
            raise ArtifactError(
                f"{source}: its sha256 is {digest} and {path} was made from {record['sha256']}; expected the same file."
            )
        return load_source(source, trust_pickle=trust_pickle).model
    if record["architecture"] is None:
        raise ArtifactError(
            f"{path}: was made from {record['name'] or 'a module of your own'}, which cannot be built by name. "
            "Pass it: load(file, source=model), on the command line --source FILE."
        )
    return zoo.card(record["architecture"]).build(num_classes=record["num_classes"])


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
