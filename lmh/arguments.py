"""Checks at the doors of the public functions: what came, what was expected, what to pass instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from .errors import ArgumentError
from .time_axis import MAX_TIMESTEPS, TimeAxis

WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
LOADER = "DataLoader(TensorDataset(x, y), batch_size=128)"


def described(value: object) -> str:
    """Return in a few words what a value is, for messages.

    >>> import torch
    >>> described(torch.zeros(8, 3, dtype=torch.uint8)), described("minerror"), described({"image": 1})
    ('a uint8 tensor [8, 3]', "the string 'minerror'", 'a dict with the keys image')
    """
    match value:
        case Tensor():
            return f"{_with_article(str(value.dtype).removeprefix('torch.'))} tensor {list(value.shape)}"
        case np.ndarray():
            return f"a numpy array {list(value.shape)} of {value.dtype}"
        case str():
            return f"the string {value!r}"
        case type():
            return f"the class {value.__name__}"
        case None | bool() | int() | float():
            return repr(value)
        case Mapping():
            keys = ", ".join(map(str, list(value)[:6])) or "none"
            return f"{_with_article(type(value).__name__)} with the keys {keys}{', …' if len(value) > 6 else ''}"
        case tuple() | list():
            kinds = ", ".join(type(item).__name__ for item in value[:4]) or "nothing"
            return f"{_with_article(type(value).__name__)} of {kinds}{', …' if len(value) > 4 else ''}"
    return _with_article(type(value).__name__)


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"


def refuse(where: str, value: object, expected: str, advice: str) -> ArgumentError:
    """Return the error of a value of the wrong kind."""
    return ArgumentError(f"{where} is {described(value)}; expected {expected}. {advice}")


def check_network(where: str, value: object) -> None:
    """Refuse what is no network: a class, a state_dict, a name, a record that holds the network.

    Raises:
        ArgumentError: saying what to pass.
    """
    if isinstance(value, nn.Module):
        return
    advice = "Pass the network itself."
    if isinstance(value, type):
        advice = f"Build it first: {value.__name__}(…)."
    elif isinstance(value, Mapping):
        advice = "Load the state_dict into the network that it belongs to, and pass that."
    elif isinstance(value, (str, PurePath)):
        advice = f"Load it first: lmh.convert.load_source({str(value)!r}).model."
    elif isinstance(value, torch.export.ExportedProgram):
        advice = "Pass lmh.convert.exported.modules_from_export(program)."
    else:
        for name in ("snn", "model"):
            if isinstance(getattr(value, name, None), nn.Module):
                advice = f"Pass its .{name}."
                break
    raise refuse(where, value, "a torch.nn.Module", advice)


def check_timesteps(timesteps: int) -> None:
    """Refuse a T that is out of range or no whole number; a truth value is none.

    Raises:
        ArgumentError: with the range.
    """
    if isinstance(timesteps, bool) or not isinstance(timesteps, int):
        raise refuse("timesteps", timesteps, f"a whole number from 1 to {MAX_TIMESTEPS}", "Pass timesteps=4, say.")
    TimeAxis(timesteps)


def check_batches(where: str, data: object) -> None:
    """Refuse what cannot be a series of batches, without reading any of it.

    Raises:
        ArgumentError: saying what to pass.
    """
    advice = _instead_of_batches(data)
    if advice is not None:
        raise refuse(where, data, "batches, tensors [N, *F] or tuples (x, y)", advice)


def _instead_of_batches(data: object) -> str | None:
    """Say what to pass in the place of something that gives no batches; None if it may give some."""
    match data:
        case str() | bytes() | PurePath():
            return (
                'Open a data set first, as in data = lmh.zoo.load_data("digits"), and pass '
                "lmh.zoo.Batches(data.train, preprocessing)."
            )
        case type():
            return f"Make one first: {data.__name__}(…)."
        case nn.Module():
            return "That is a network: check the order of the arguments."
        case np.ndarray():
            return f"Make it a tensor with torch.from_numpy(x).float(), normalise it, and pass {LOADER}."
        case Mapping():
            return f"Pass {LOADER}."
        case tuple() if len(data) == 2 and all(isinstance(item, (Tensor, np.ndarray)) for item in data):
            return f"One pair of tensors is no series of batches: pass {LOADER}, or [(x, y)] for a single batch."
        case Dataset() if not isinstance(data, IterableDataset):
            return "A Dataset gives single samples: pass DataLoader(dataset, batch_size=128)."
    if isinstance(data, Iterable) or hasattr(data, "__getitem__"):
        return None
    if hasattr(data, "train") and hasattr(data, "test"):
        return "Pass one of its parts in batches: lmh.zoo.Batches(data.train, preprocessing)."
    if hasattr(data, "images"):
        return "Pass it in batches: lmh.zoo.Batches(split, preprocessing)."
    return f"Pass a DataLoader or lmh.zoo.Batches, such as {LOADER}."


def split_batch(where: str, batch: Any, inputs: int = 1) -> tuple[tuple[Tensor, ...], Any]:
    """Return what a batch holds for a network with k inputs: these, and what follows them as labels, or None.

    Args:
        where: the call, for messages.
        batch: for one input x, (x,) or (x, y, …), for several (x1, …, xk) or (x1, …, xk, y, …).
        inputs: k.

    Returns:
        The inputs, floating and with a batch axis, and y as it came.

    Raises:
        ArgumentError: for a batch of another form, or an input of whole numbers; saying what to pass.

    >>> split_batch("evaluate: data", (torch.zeros(2, 3), [0, 1]))[1]
    [0, 1]
    """
    parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    given = parts[:inputs]
    if inputs > 1 and (len(given) < inputs or not all(isinstance(x, Tensor) for x in given)):
        raise refuse(
            f"{where}: a batch",
            batch,
            f"a tuple ({_names(inputs)}) or ({_names(inputs)}, y) of tensors, as the network takes {inputs} inputs",
            f"Let the loader give tuples of tensors; one batch alone is [({_names(inputs)})].",
        )
    for x in given or (None,):
        _check_input(where, batch, x, inputs)
    if len({len(x) for x in given}) > 1:
        shapes = " and ".join(str(list(x.shape)) for x in given)
        raise ArgumentError(
            f"{where}: the inputs of a batch have the shapes {shapes}; expected the same first axis. "
            "Let the loader give as many samples of each."
        )
    return given, parts[inputs] if len(parts) > inputs else None


def _check_input(where: str, batch: Any, x: Any, inputs: int) -> None:
    """Refuse what is no input of a batch: no tensor, whole numbers, a single sample."""
    if not isinstance(x, Tensor):
        alone = not isinstance(batch, (tuple, list))
        what = f"{where}: {'a batch' if alone or not batch else 'the first entry of a batch'}"
        shown = batch if alone or not batch else x
        raise refuse(what, shown, "a tensor [N, *F], alone or first in a tuple (x, y)", _instead_of_batch(shown))
    what = f"{where}: {'a batch' if inputs == 1 else 'an input of a batch'}"
    if not x.is_floating_point():
        raise refuse(
            what,
            x,
            "floating-point values, normalised as the ANN expects",
            f"If these are labels, pass tuples ({_names(inputs)}, y)."
            if x.ndim < 2
            else "Normalise the images first, as in (x.float() / 255 - mean) / std.",
        )
    if x.ndim < (2 if inputs == 1 else 1) or x.numel() == 0:
        raise refuse(
            what,
            x,
            "[N, *F] with N ≥ 1, samples along the first axis",
            "Pass whole batches, such as DataLoader(dataset, batch_size=128); a single sample is x[None].",
        )


def _names(inputs: int) -> str:
    return "x" if inputs == 1 else ", ".join(f"x{k}" for k in range(1, inputs + 1))


def _instead_of_batch(batch: object) -> str:
    match batch:
        case Mapping() if len(batch) >= 2:
            first, second = list(batch)[:2]
            return f"Pass tuples: [(b[{first!r}], b[{second!r}]) for b in data]."
        case Mapping():
            return "Pass the tensor alone: [b[key] for b in data]."
        case np.ndarray():
            return "Make tensors of it: torch.from_numpy(x).float(), normalised."
        case tuple() | list():
            return "Stack the samples into one tensor: torch.stack(x)."
    return f"Pass {LOADER}."


def check_labels(where: str, labels: object, count: int) -> Tensor:
    """Return the labels of a batch as int64 if they are whole numbers from 0, one for each sample.

    Raises:
        ArgumentError: saying what to pass.
    """
    expected = f"whole numbers from 0 in a tensor [{count}], one class for each sample"
    if not isinstance(labels, Tensor):
        raise refuse(f"{where}: labels y", labels, expected, "Make a tensor of them: torch.tensor(y).")
    if labels.dtype not in WHOLE or tuple(labels.shape) != (count,):
        advice = "One-hot rows become classes with y.argmax(1), a column with y.flatten()."
        if tuple(labels.shape) == (count,):
            advice = "Pass y.long()."
        raise refuse(f"{where}: labels y", labels, expected, advice)
    if labels.device.type != "meta" and int(labels.min()) < 0:
        raise ArgumentError(f"{where}: a label is {int(labels.min())}; expected {expected}. Drop unlabelled samples.")
    return labels.long()


def check_names(where: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return paths as a tuple; one string alone would be read letter by letter.

    Raises:
        ArgumentError: saying what to pass.
    """
    if isinstance(names, str):
        raise refuse(where, names, "a list of paths", f"Pass [{names!r}].")
    if not isinstance(names, Iterable):
        raise refuse(where, names, "a list of paths", 'Pass ["layer1.0.relu"], say.')
    found = tuple(names)
    for name in found:
        if not isinstance(name, str):
            raise refuse(f"{where}: an entry", name, "a path as text", "Use the names that the audit shows.")
    return found


def check_kind(where: str, value: object, kinds: type | tuple[type, ...], *examples: str) -> None:
    """Refuse a value that is not of one of the kinds; a class in the place of its value is a common slip.

    Args:
        where: name of the argument.
        value: what came.
        kinds: allowed types.
        examples: what to pass, as code.

    Raises:
        ArgumentError: saying what to pass.
    """
    if isinstance(value, kinds):
        return
    wanted = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
    raise refuse(where, value, f"a value of type {wanted}", f"Pass {' or '.join(examples)}.")
