"""Tracing by torch.export: for models whose Python control flow defeats symbolic tracing."""

from __future__ import annotations

import copy
import inspect
import re
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from ...errors import ArgumentError, AuditError, reason_of
from ...structures import POSITIONAL, leaves_of
from .importer import modules_from_export
from .leaves import in_the_table, restore_leaves
from .quiet import quiet

LARGEST_BATCH = 2**20
_TORCH = Path(torch.__file__).parent
_STDLIB = Path(sysconfig.get_path("stdlib"))
_HERE = Path(__file__).parents[1]
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in \S+\n\s+(.+)')


def trace_by_export(
    model: nn.Module, example: Tensor | Sequence[Tensor], *, is_leaf: Callable[[nn.Module], bool] = in_the_table
) -> fx.GraphModule:
    """Return a graph of a copy of ``model``, traced by torch.export with the batch size free.

    torch.export runs the forward, so that everything in it which does not depend on the values of tensors may be
    Python: shapes, attributes, loops, assertions, early returns. What it did for the example's shape is what the
    graph does.

    Args:
        model: the network; not changed.
        example: one batch [N, *F], N ≥ 1, on the model's device, or a tuple of one for each input. Its values do not
            matter.
        is_leaf: which modules are kept whole, if they take one tensor and return one; those that the op table knows,
            unless given.

    Returns:
        The network in eval mode, as :func:`modules_from_export` gives it.

    Raises:
        AuditError: naming the line of the forward that depends on the values of tensors, fixes the batch size, or
            cannot be traced for another reason.
        ArgumentError: if the model cannot be run on the example.

    >>> class Deep(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = nn.Linear(4, 4)
    ...     def forward(self, x):
    ...         for _ in range(3 if x.shape[1] == 4 else 1):
    ...             x = torch.relu(self.layer(x))
    ...         return x
    >>> graph = trace_by_export(Deep(), torch.zeros(1, 4))
    >>> sum(node.target == "layer" for node in graph.graph.nodes)
    3
    """
    copied = copy.deepcopy(model).eval()
    examples = (example,) if isinstance(example, Tensor) else tuple(example)
    imported = modules_from_export(_exported(copied, tuple(map(_at_least_two, examples))))
    restore_leaves(imported, copied, is_leaf)
    _check_one(copied, imported, examples)
    return imported


def _check_one(model: nn.Module, imported: fx.GraphModule, examples: tuple[Tensor, ...]) -> None:
    """Compare the graph with the model on a batch of one, which torch.export takes for one of more.

    Raises:
        AuditError: if they answer differently, but not on a batch of two.
    """
    if any(example.is_meta for example in examples):
        return
    if _differs(model, imported, examples, 1) and not _differs(model, imported, examples, 2):
        raise AuditError(
            [
                f"{type(model).__name__}: its forward does something else for a batch of one than for larger ones; "
                "expected the same for every batch size. Leave the batch size out of decisions."
            ]
        )


def _differs(model: nn.Module, imported: fx.GraphModule, examples: tuple[Tensor, ...], batch: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn((batch, *example.shape[1:]), generator=generator).to(example) for example in examples]
    with torch.no_grad(), torch.random.fork_rng(devices=[x.device for x in inputs[:1] if x.is_cuda]):
        try:
            expected = leaves_of(model(*(x.clone() for x in inputs)))
        except Exception:  # a model that does not take one sample alone decides nothing by it
            return False
        got = leaves_of(imported(*(x.clone() for x in inputs)))
    return any(_apart(one, other) for one, other in zip(expected, got, strict=True) if isinstance(one, Tensor))


def _apart(one: Tensor, other: Tensor) -> bool:
    scale = float(one.abs().max()) if one.numel() else 1.0
    return one.shape != other.shape or not torch.allclose(one, other, 1e-3, 1e-3 * scale, equal_nan=True)


def _at_least_two(example: Tensor) -> Tensor:
    """Return a batch of more than one: torch.export takes a size of 1 for a constant."""
    if example.ndim == 0 or example.shape[0] == 0:
        raise ArgumentError(
            f"trace_by_export: the example has the shape {list(example.shape)}; expected a batch [N, …]. "
            "Pass torch.zeros(2, 3, 224, 224), say."
        )
    return example.detach().repeat(2, *[1] * (example.ndim - 1)) if example.shape[0] == 1 else example.detach()


def _exported(model: nn.Module, examples: tuple[Tensor, ...]) -> ExportedProgram:
    """Export without Python analysis first, which is faster and follows more; ``len(x)`` needs the analysis."""
    free: list[Any] = [{0: Dim("batch", min=1, max=LARGEST_BATCH)}] * len(examples)
    named = sum(p.kind in POSITIONAL for p in inspect.signature(model.forward).parameters.values())
    if named < len(examples):  # the rest goes to *args
        free = [*free[:named], tuple(free[named:])]
    errors: list[Exception] = []
    for strict in (False, True):
        try:
            with quiet():
                return torch.export.export(model, examples, dynamic_shapes=tuple(free), strict=strict)
        except Exception as error:  # whatever the model's forward or torch.export raises
            errors.append(error)
    _check_runs(model, examples, errors[0])
    raise AuditError([_refusal(errors)]) from errors[0]


def _check_runs(model: nn.Module, examples: tuple[Tensor, ...], cause: Exception) -> None:
    try:
        with torch.no_grad():
            model(*(x.clone() for x in examples))
    except Exception as error:
        where = users_line(error) or type(model).__name__
        shapes = ", ".join(str(["N", *x.shape[1:]]) for x in examples)
        raise ArgumentError(
            f"{where}: the model cannot be run on an input of shape {shapes} ({reason_of(error)}). "
            "Pass example_input (on the command line --input-size C,H,W) of the shape that the model expects."
        ) from cause


def _refusal(errors: list[Exception]) -> str:
    where = next(filter(None, map(users_line, errors)), "the model's forward")
    text = str(errors[0])
    if "Constraints violated" in text:
        allowed = re.findall(r"^ *(batch = .+)$", "\n".join(map(str, errors)), re.MULTILINE)
        shown = f" ({allowed[-1]})" if allowed else ""
        return (
            f"{where} fixes the batch size{shown}; expected a forward that serves every batch size. "
            "Take sizes from x.size(0), not len(x), or use x.flatten(1); leave the batch out of decisions."
        )
    if "data-dependent" in text.lower() or "data dependent" in text.lower():
        return (
            f"{where} depends on the values of tensors; expected a forward that runs the same nodes for every input. "
            "Move the decision out of forward, or use torch.where."
        )
    return (
        f"{where} can be followed neither by torch.fx nor by torch.export ({reason_of(errors[0])}); expected tensor "
        "operations of torch. Rewrite that line with them, or put it into a module of its own and give that a rule."
    )


def users_line(error: Exception) -> str | None:
    """Return the line of the user's code that an error came from, by its traceback or else by its text; or None."""
    frames = [(frame.filename, frame.lineno, frame.line) for frame in traceback.extract_tb(error.__traceback__)]
    frames += _FRAME.findall(str(error))
    own = [frame for frame in frames if _is_users(frame[0])]
    if not own:
        return None
    file, number, line = own[-1]
    return f"{file}:{number}: `{str(line).strip()}`"


def _is_users(file: str) -> bool:
    path = Path(file)
    of_python = _STDLIB in path.parents and not {"site-packages", "dist-packages"} & set(path.parts)
    return not (file.startswith("<") or _TORCH in path.parents or of_python or _HERE in path.parents)
