"""What a trainer's file holds: which of its entries are weights, and which of those are meant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, SourceError, UnsafePickleError
from .pickles import StandIn, refusal

ENTRIES = ("state_dict", "model", "model_state_dict", "net", "model_state", "network", "weights", "params", "module")
AVERAGES = {"ema", "swa", "averaged", "average", "teacher"}
NO_WEIGHTS = ("optim", "sched", "scaler", "callback", "loop", "rng")
INNER_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
COUNTERS = ("n_averaged", "total_ops", "total_params")
_DEPTH = 3
_SHOWN = 8

Entry = tuple[str, nn.Module | Mapping[Any, Any]]


def chosen(path: Path, found: Any, entry: str | None) -> tuple[nn.Module | dict[str, Tensor], tuple[str, ...]]:
    """Return the module or the tensors that are meant, and what is to be said about the choice.

    Args:
        path: the file, for messages.
        found: what it holds.
        entry: where the weights are: a key of the checkpoint, keys joined by dots, or the prefix of the tensors'
            names. Unless given: the plain model before an average of its weights, under the keys that common
            trainers use.

    Raises:
        SourceError: if there are no weights, several to choose from, or none under ``entry``.
        UnsafePickleError: if reading left out what may hold them.
    """
    if not isinstance(found, nn.Module | Mapping):
        raise SourceError(f"{path}: holds a {type(found).__name__}; expected a state_dict, a checkpoint or a module.")
    entries = _entries("", found)
    if not entries and isinstance(found, Mapping) and any(isinstance(part, Tensor) for part in found.values()):
        entries = [("", found)]
    stood_for = sorted(_stood_for(found))
    if not entries and stood_for:
        raise UnsafePickleError(refusal(path, stood_for))
    if not entries:
        keys = ", ".join(map(str, list(found)[:_SHOWN])) or "none" if isinstance(found, Mapping) else "none"
        raise SourceError(
            f"{path}: a dict with the keys {keys} and no state_dict; expected one under {', '.join(ENTRIES)}. "
            "Save model.state_dict()."
        )
    if entry is not None:
        return _tidied(path, _under(path, entries, entry))
    (name, value), others = _best(path, entries)
    value, notices = _tidied(path, value)
    if others or is_average(name):
        average = ", an average of the weights" if is_average(name) else ""
        advice = f"; there are others under {', '.join(others)}: --entry {others[0]} takes those" if others else ""
        notices = (f"Took the weights under {name}{average}{advice}.", *notices)
    return value, notices


def _stood_for(found: Any) -> set[str]:
    """Return what a checkpoint has in the place of weights that reading it left out."""
    values = found.values() if isinstance(found, Mapping) else ()
    return {type(value).name for value in values if isinstance(value, StandIn)}


def is_average(name: str) -> bool:
    """Whether a key or prefix says that it holds an average of the weights over training.

    >>> is_average("model_ema"), is_average("state_dict"), is_average("mnemosema.")
    (True, False, False)
    """
    return bool(AVERAGES & set(re.split(r"[^a-z]+", name.lower())))


def _entries(name: str, value: Any) -> list[Entry]:
    """Return every module and state_dict in a checkpoint, by its keys joined with dots."""
    if isinstance(value, nn.Module):
        return [(name, value)]
    if not isinstance(value, Mapping):
        return []
    inner = [
        found
        for key, part in value.items()
        if isinstance(key, str) and not any(word in key.lower() for word in NO_WEIGHTS)
        if name.count(".") < _DEPTH
        for found in _entries(f"{name}.{key}" if name else key, part)
    ]
    if not _is_state_dict(value) or any(_last(found) in ENTRIES or is_average(_last(found)) for found, _ in inner):
        return inner
    return [(name, value)]


def _is_state_dict(value: Mapping[Any, Any]) -> bool:
    """Whether it holds tensors under the names of parameters; a trainer's other tensors have none."""
    names = [key for key, part in value.items() if isinstance(key, str) and isinstance(part, Tensor)]
    return any("." in name or name in ("weight", "bias") for name in names)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _best(path: Path, entries: list[Entry]) -> tuple[Entry, list[str]]:
    """Return the entry to take when none was named, and the names of the others."""

    def rank(found: Entry) -> tuple[bool, int]:
        last = _last(found[0])
        return is_average(found[0]), ENTRIES.index(last) if last in ENTRIES else len(ENTRIES)

    first, *rest = sorted(entries, key=rank)
    names = [name for name, _ in rest]
    if rest and rank(first) == rank(rest[0]) and rank(first)[1] == len(ENTRIES):
        shown = ", ".join(name for name, _ in entries[:_SHOWN])
        raise SourceError(
            f"{path}: holds weights under {shown}; expected one of them to be named. Choose with --entry."
        )
    return first, names


def _under(path: Path, entries: list[Entry], entry: str) -> nn.Module | Mapping[Any, Any]:
    inside = [value for name, value in entries if name == entry or name.startswith(f"{entry}.")]
    if len(inside) == 1:
        return inside[0]
    ranked = sorted(entries, key=lambda found: is_average(found[0]))
    for name, value in ranked:
        prefix = entry.removeprefix(f"{name}.") + "."
        part = {} if isinstance(value, nn.Module) else {
            key.removeprefix(prefix): tensor for key, tensor in value.items() if str(key).startswith(prefix)
        }  # fmt: skip
        if part:
            return part
    names = [name for name, _ in entries if name]
    if not names and isinstance(entries[0][1], nn.Module):
        raise ArgumentError(f"entry={entry!r} came with {path}, which holds a single module. Leave it out.")
    prefixes = dict.fromkeys(
        str(key).partition(".")[0] for _, value in entries if isinstance(value, Mapping) for key in value
    )
    known = ", ".join([*names, *prefixes][:_SHOWN])
    raise SourceError(f"{path}: nothing is under {entry!r}; expected one of {known}. Choose with --entry.")


def _tidied(path: Path, value: nn.Module | Mapping[Any, Any]) -> tuple[nn.Module | dict[str, Tensor], tuple[str, ...]]:
    """Return plain tensors by the names that the model gave them, without what wrappers and counters added."""
    if isinstance(value, nn.Module):
        return value, ()
    state = {str(key): tensor for key, tensor in value.items() if isinstance(tensor, Tensor)}
    _check_plain(path, state)
    counters = [key for key in state if _last(key) in COUNTERS]
    state = {key: tensor for key, tensor in state.items() if key not in counters}
    notices = [f"Left out {len(counters)} counters of the trainer: {_list(counters)}."] if counters else []
    for wrapper in INNER_WRAPPERS:
        if any(f".{wrapper}" in f".{key}" for key in state):
            state = {f".{key}".replace(f".{wrapper}", ".")[1:]: tensor for key, tensor in state.items()}
            notices.append(f"Stripped {wrapper} from the tensors' names.")
    return state, tuple(notices)


def _list(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def _check_plain(path: Path, state: Mapping[str, Tensor]) -> None:
    for key, value in state.items():
        if value.layout is not torch.strided or value.is_complex() or value.is_quantized:
            raise SourceError(
                f"{path}: {key} is a {value.dtype} tensor in layout {value.layout}; expected plain real numbers. "
                "Save it dense and dequantised."
            )
        if "flat_param" in key:
            raise SourceError(
                f"{path}: {key} holds flattened weights of FSDP; expected each weight by itself. Save the model with "
                "StateDictType.FULL_STATE_DICT."
            )
