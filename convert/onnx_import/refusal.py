"""What is said when a model cannot be imported: every operator and node at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...errors import SourceError
from .fold import CONTROL_FLOW

SHOWN = 3
_QUANTISED_OPERATORS = ("ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QuantizeLinear", "DequantizeLinear")


class Missing(NamedTuple):
    """A node whose operator is not in the registry."""

    domain: str
    op: str
    node: str


def refuse(where: str, missing: Sequence[Missing], problems: Sequence[str]) -> SourceError:
    """Return the error for a model with nodes that cannot be imported.

    Args:
        where: what to call the model.
        missing: the nodes without an entry in the registry.
        problems: a line for each node whose operator is known but not in this form.
    """
    nodes: dict[tuple[str, str], list[str]] = {}
    for domain, op, node in missing:
        nodes.setdefault((domain, op), []).append(node)
    lines = [_line(domain, op, names) for (domain, op), names in sorted(nodes.items())]
    lines += problems
    listed = "\n".join(f"  - {line}" for line in lines)
    count = len(lines)
    advice = _advice({op for _, op in nodes}, bool(problems))
    return SourceError(
        f"{where}: {count} {'thing' if count == 1 else 'things'} in it cannot be imported; expected operators that "
        f"lmh.convert.onnx_import has a function for.\n{listed}\n{advice}"
    )


def _line(domain: str, op: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"no importer for {domain + '.' if domain else ''}{op}: {', '.join(names[:SHOWN])}{more}."


def is_quantised(op: str) -> bool:
    """Whether an operator computes on quantised integers."""
    return op in _QUANTISED_OPERATORS or op.startswith("QLinear")


def _advice(ops: set[str], problems: bool) -> str:
    found = []
    if any(is_quantised(op) for op in ops):
        found.append("The model is quantised: export it before quantisation, with floating-point weights.")
    if ops & set(CONTROL_FLOW):
        found.append("The model has control flow: export it for one fixed sequence of operators.")
    if any(not is_quantised(op) and op not in CONTROL_FLOW for op in ops):
        found.append(
            "Export the model from parts that are listed in lmh.convert.onnx_import.OPERATORS, or add a function for "
            "the operator as its docstring says."
        )
    if not found and problems:
        found.append("Change these nodes where the model is defined and export it again.")
    return " ".join(found)
