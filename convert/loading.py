"""From what a user names on the command line to an ANN: zoo, torchvision, or a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import zoo
from ..artifact import file_digest, read_metadata, user_path
from ..errors import ArchitectureError, ArgumentError, SourceError
from ..structures import INPUT_SIZE
from ..zoo.images import preprocessing_of
from ..zoo.registry import TORCHVISION, TRANSFORMING, Card
from .architectures import SHOWN, Fit, differences, fits, nearest, recognised, shapes_of, some
from .checkpoints import chosen, is_average
from .files import FileKind, kind_of_file, read_object, refuse_export
from .pickles import OWN_CLASS_ADVICE, Trust
from .programs import exported_weights, script_weights
from .tracing import bare


@dataclass(frozen=True)
class Source:
    """An ANN and where it came from.

    Attributes:
        model: in eval mode.
        name: as the user named it.
        card: of its architecture, or None for a module of the user's own.
        num_classes: that the architecture was built with.
        digest: sha256 of the file, or None.
        notices: what was recognised, left out or assumed, in sentences.
        entry: of the checkpoint, where the user named one.
        input_size: of one sample, [C, H, W], where the file says it and no card does.
    """

    model: nn.Module
    name: str
    card: Card | None
    num_classes: int | None
    digest: str | None = None
    notices: tuple[str, ...] = ()
    entry: str | None = None
    input_size: tuple[int, ...] | None = None

    def record(self) -> dict[str, Any]:
        """Return what a manifest keeps to build the graph again."""
        return {
            "name": self.name,
            "architecture": self.card.name if self.card else None,
            "num_classes": self.num_classes,
            "sha256": self.digest,
            "entry": self.entry,
        }


def load_source(
    name: str,
    *,
    arch: str | None = None,
    entry: str | None = None,
    trust_pickle: bool = False,
    modules: Iterable[str] = (),
) -> Source:
    """Return the ANN that a user names.

    Args:
        name: ``zoo:NAME``, ``torchvision:NAME``, or a file, whose kind is told by its content: a state_dict, a
            trainer's checkpoint, a pickled module, ONNX, torch.export, or TorchScript with the weights of a known
            architecture.
        arch: the architecture of a state_dict, a name of the zoo or ``torchvision:NAME``; recognised from keys
            and shapes unless given.
        entry: what to take of a checkpoint that holds several sets of weights: its key, or a prefix of the tensors'
            names. Unless given: the plain model before an average of its weights.
        trust_pickle: let the file run code.
        modules: dotted names of your modules whose classes a pickle may name. They are imported, from the current
            folder first; the constructors of their classes get the values that the pickle gives them.

    Raises:
        SourceError: if it cannot be found or read.
        UnsafePickleError: if reading it would import or run what was not allowed.
        ArchitectureError: if its tensors fit no architecture, several, or not the one named.
        ArgumentError: for an unknown name, or options that do not go together.

    >>> source = load_source("zoo:digits-cnn")
    >>> source.card.preprocessing.input_size, source.record()["architecture"]
    ((1, 8, 8), 'digits-cnn')
    """
    if name.startswith(("zoo:", TORCHVISION)):
        for option, value in (("arch", arch), ("entry", entry)):
            if value is not None:
                raise ArgumentError(f"{option}={value!r} came with {name}, which says all of it. Leave it out.")
        return _by_name(name)
    path = user_path(name)
    trust = Trust(trust_pickle, tuple(modules))
    card = zoo.card(arch) if arch is not None else None
    kind = kind_of_file(path)
    refuse_export(path, kind)
    digest = file_digest(path)
    if kind is FileKind.TORCHSCRIPT or (kind is FileKind.EXPORTED and (card or not trust_pickle)):
        fit, state, notices = _of_program(path, kind, card, entry, trust)
    else:
        found, notices = chosen(path, read_object(path, kind, trust), entry)
        if isinstance(found, nn.Module):
            if arch is not None:
                raise ArgumentError(f"arch={arch!r} came with {path}, which holds a whole module. Leave it out.")
            model, more = _ready(path, found)
            return Source(model, name, None, None, digest, (*notices, *more), entry, _stated_size(model))
        state = found
        fit = _fit(path, state, card)
    notices = (*notices, *_said(fit, state, named=card is not None))
    return Source(_filled(fit, state), name, _as_trained(path, kind, fit.card), fit.num_classes, digest, notices, entry)


def _as_trained(path: Path, kind: FileKind, card: Card) -> Card:
    """Return the card with the input that a file of `lmh zoo train` says its network was trained on."""
    facts = read_metadata(path).get("record") if kind is FileKind.SAFETENSORS else None
    if not isinstance(facts, Mapping) or "preprocessing" not in facts:
        return card
    return replace(card, preprocessing=preprocessing_of(facts["preprocessing"]))


def load_again(
    name: str, record: Mapping[str, Any], *, trust_pickle: bool = False, modules: Iterable[str] = ()
) -> Source:
    """Return the ANN that a manifest's record (:meth:`Source.record`) describes, from where it is now.

    Args:
        name: as for :func:`load_source`.
        record: says architecture and entry.
        trust_pickle: as for :func:`load_source`.
        modules: as for :func:`load_source`.
    """
    if name.startswith(("zoo:", TORCHVISION)):
        return load_source(name)
    return load_source(
        name, arch=record["architecture"], entry=record.get("entry"), trust_pickle=trust_pickle, modules=modules
    )


def _by_name(name: str) -> Source:
    card = zoo.card(name.removeprefix("zoo:"))
    model = zoo.load(name.removeprefix("zoo:"))
    return Source(model, name, card, card.num_classes)


def _ready(path: Path, model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the network inside a module's wrappers in eval mode and single precision, which neurons compute in."""
    try:
        model = bare(model).eval()
        kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        if kinds <= {torch.float32}:
            return model, ()
        return model.float(), (f"Weights in {', '.join(sorted(map(str, kinds)))} became float32.",)
    except Exception as error:  # a module without the attributes of its class fails anywhere
        raise SourceError(
            f"{path}: its module is damaged, or of another version of its class ({error}); expected a whole one. Save "
            "the state_dict alone with torch.save(model.state_dict(), file), where the module still works."
        ) from error


def _stated_size(model: nn.Module) -> tuple[int, ...] | None:
    """Return the size of the images that an exported network takes, [C, H, W], if its file says it."""
    inputs = model.graph.find_nodes(op="placeholder") if isinstance(model, fx.GraphModule) else []
    size = inputs[0].meta.get(INPUT_SIZE) if len(inputs) == 1 else None
    return size if size is not None and len(size) == 3 else None


def _of_program(
    path: Path, kind: FileKind, card: Card | None, entry: str | None, trust: Trust
) -> tuple[Fit, dict[str, Tensor], tuple[str, ...]]:
    """Take the weights alone of a program that cannot be rewritten, or not without trust.

    Raises:
        SourceError: if they fit no architecture; it says what to do.
    """
    if entry is not None:
        raise ArgumentError(f"entry={entry!r} came with {path}, {kind.value}, which has no entries. Leave it out.")
    state = script_weights(path) if kind is FileKind.TORCHSCRIPT else exported_weights(path)
    try:
        fit = _fit(path, state, card)
    except ArchitectureError:
        if card is None:
            read_object(path, kind, trust)  # raises, with what such a file needs
        raise
    notice = (
        f"Took the weights alone out of {kind.value}; that its program computes what {fit.card.name} does was not "
        "checked."
    )
    return fit, state, (notice,)


def _fit(path: Path, state: dict[str, Tensor], card: Card | None) -> Fit:
    """Find the architecture, or how the named one fits.

    Raises:
        ArchitectureError: if none fits, or several.
    """
    shapes = shapes_of(state)
    found = recognised(shapes) if card is None else fits(shapes, card)
    if not found and card is not None:
        raise ArchitectureError(
            f"{path}: does not fit {card.name}: {some(differences(shapes, card))}. Choose another --arch. "
            f"{OWN_CLASS_ADVICE}"
        )
    if not found:
        raise ArchitectureError(
            f"{path}: {len(state)} tensors ({', '.join(list(state)[:SHOWN])}, …) that fit no architecture of the zoo "
            f"or of torchvision; {nearest(shapes)} {OWN_CLASS_ADVICE}"
        )
    best = min(map(_rank, found))
    found = [fit for fit in found if _rank(fit) == best]
    if len({fit.card.name for fit in found}) > 1:
        names = ", ".join(dict.fromkeys(fit.card.name for fit in found))
        raise ArchitectureError(f"{path}: fits {names} alike; choose one with --arch.")
    if len(found) > 1:
        prefixes = ", ".join(fit.prefix.removesuffix(".") for fit in found)
        raise ArchitectureError(
            f"{path}: holds the weights of {found[0].card.name} under the prefixes {prefixes}; expected one of them to "
            "be named. Choose with --entry."
        )
    _check_beside(path, found[0], state)
    return found[0]


def _rank(fit: Fit) -> tuple[bool, bool]:
    return fit.prefix != "", is_average(fit.prefix)


def _check_beside(path: Path, fit: Fit, state: Mapping[str, Tensor]) -> None:
    """Refuse to leave out a layer: what is beside the architecture may be counts and losses, or another copy of it."""
    copies = tuple(other.prefix for other in fits(shapes_of(state), fit.card))
    layers = [key for key in fit.beside if state[key].ndim > 1 and not key.startswith(copies)]
    if layers:
        prefix = fit.prefix.removesuffix(".")
        raise ArchitectureError(
            f"{path}: fits {fit.card.name} under {prefix}, but {len(layers)} weights beside it would be left out "
            f"({', '.join(layers[:SHOWN])}); expected the whole network. Pass --entry {prefix} to convert that part "
            "alone, or convert the module with lmh.convert.convert(model, …)."
        )


def _said(fit: Fit, state: Mapping[str, Tensor], *, named: bool) -> list[str]:
    notices = []
    if fit.prefix:
        notices.append(f"Stripped the prefix {fit.prefix} from the tensors' names.")
    if fit.beside:
        names = ", ".join(fit.beside[:SHOWN]) + (", …" if len(fit.beside) > SHOWN else "")
        notices.append(f"Left out {len(fit.beside)} tensors beside it: {names}.")
    copies = [other.prefix.removesuffix(".") for other in fits(shapes_of(state), fit.card) if other != fit]
    if copies:
        notices.append(f"There are other weights of the same form: --entry {copies[0]} takes those.")
    if fit.card.name.removeprefix(TORCHVISION) in TRANSFORMING:
        notices.append(
            f"Taken as torchvision's pretrained {fit.card.name.removeprefix(TORCHVISION)}, which transforms its input "
            "(transform_input=True). If yours does not, pass the whole module."
        )
    if not named:
        notices.append(f"Recognised {fit.card.name} with {fit.num_classes} classes from names and shapes.")
    return notices


def _filled(fit: Fit, state: Mapping[str, Tensor]) -> nn.Module:
    """Build an architecture and load its tensors."""
    model = fit.card.build(num_classes=fit.num_classes)
    weights = {key.removeprefix(fit.prefix): value for key, value in state.items() if key.startswith(fit.prefix)}
    model.load_state_dict(weights, strict=False)
    return model.eval()
