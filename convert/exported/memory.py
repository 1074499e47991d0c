"""Writes in place in an exported program: found, checked for shared memory, and made functional.

torch.export keeps ``relu_`` and ``add_`` as they are. Where nothing else reads the memory that such a call
overwrites, every later reader of the overwritten value can read the call's result instead. Where something
does, torch's own functionalisation (``run_decompositions`` with an empty table) writes the memory out as values;
it is the second choice, for it drops dropout and renames BatchNorm. It overlooks one thing: dropout in eval mode
returns its input itself, so that a write into its result is a write into its input. Such dropout is taken out.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from ...errors import AuditError
from ...ops import label
from .calls import arguments, operator_name
from .quiet import quiet

_DROPOUT = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
_UPDATED_IN_TRAINING = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Functional:
    """A program's graph without writes in place.

    Attributes:
        program: the program, functionalised by torch if that was needed.
        graph: a copy of its graph whose output is what the user gets; dead nodes are gone.
        values: from each node that only names memory another one made to that one.
        writes: the nodes that overwrote; their targets are functional now, and every later reader of the same
            memory means their result.
    """

    program: ExportedProgram
    graph: fx.Graph
    values: dict[fx.Node, fx.Node]
    writes: list[fx.Node]

    def tensor_names(self) -> dict[fx.Node, str]:
        """Return the dotted name of each placeholder that is a parameter, buffer or constant."""
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        specs = self.program.graph_signature.input_specs
        return {
            node: str(spec.target)
            for node, spec in zip(placeholders, specs, strict=True)
            if spec.kind is not InputKind.USER_INPUT
        }


def functional(program: ExportedProgram) -> Functional:
    """Return the program's graph in functional form.

    Raises:
        AuditError: if the forward keeps values in buffers between calls.
    """
    found = _read(program)
    if any(_shared(found)) and (idle := _idle_dropout_behind_writes(found)):
        for node in idle:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            found.graph.erase_node(node)
        found = _with_writes(program, found.graph)
        if any(_shared(found)):
            raise AuditError([_tangled(write) for write in _shared(found)])
    elif _has_regions(found.graph) or any(_shared(found)) or not all(map(_out_of_place, found.writes)):
        with quiet():
            program = program.run_decompositions({})
        found = _read(program)
    problems = list(_kept_between_calls(found))
    if problems:
        raise AuditError(problems)
    for node in found.writes:
        node.target = _out_of_place(node) or node.target
    return found


def _read(program: ExportedProgram) -> Functional:
    graph = copy.deepcopy(program.graph)
    (output,) = (node for node in graph.nodes if node.op == "output")
    specs = program.graph_signature.output_specs
    results = [value for value, spec in zip(output.args[0], specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT]
    output.args = (tuple(results),)
    graph.eliminate_dead_code()
    return _with_writes(program, graph)


def _with_writes(program: ExportedProgram, graph: fx.Graph) -> Functional:
    values: dict[fx.Node, fx.Node] = {}
    writes: list[fx.Node] = []
    for node in graph.nodes:
        if _overwrites(node):
            writes.append(node)
            values[node] = values.get(node.args[0], node.args[0])
    return Functional(program, graph, values, writes)


def _overwrites(node: fx.Node) -> bool:
    if not operator_name(node).endswith("_") or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    first = node.target._schema.arguments[0]  # type: ignore[union-attr]
    return first.alias_info is not None and first.alias_info.is_write and operator_name(node) != "detach_"


def _out_of_place(node: fx.Node) -> torch._ops.OpOverload | None:
    """Return the functional twin of an in-place operator, or None."""
    twin = getattr(torch.ops.aten, operator_name(node)[:-1], None)
    return getattr(twin, node.target._overloadname, None)  # type: ignore[union-attr]


def _has_regions(graph: fx.Graph) -> bool:
    """Whether a part of the graph under ``torch.no_grad()`` sits in a graph of its own."""
    return any(getattr(node.target, "__name__", "") == "wrap_with_set_grad_enabled" for node in graph.nodes)


def _views(found: Functional) -> dict[fx.Node, set[fx.Node]]:
    """From every value to the values that share memory with it directly."""
    links: dict[fx.Node, set[fx.Node]] = {}
    for node in found.graph.nodes:
        if not _is_view(node):
            continue
        source = node.args[0]
        pair = [found.values.get(end, end) for end in (node, source)]
        for one, other in (pair, pair[::-1]):
            links.setdefault(one, set()).add(other)
    return links


def _is_view(node: fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target is operator.getitem:
        return _is_view(node.args[0])
    if _is_idle_dropout(node):
        return True
    results = getattr(getattr(node.target, "_schema", None), "returns", ())
    return any(result.alias_info is not None and not result.alias_info.is_write for result in results)


def _is_idle_dropout(node: fx.Node) -> bool:
    return operator_name(node) in _DROPOUT and arguments(node).train is False


def _idle_dropout_behind_writes(found: Functional) -> set[fx.Node]:
    links = _views(found)
    memory = {value for write in _shared(found) for value in _sharers(links, found.values[write])}
    return {node for node in memory if _is_idle_dropout(node)}


def _tangled(write: fx.Node) -> str:
    return (
        f"{label(write)}: overwrites memory that is read later under another name, behind a dropout and a view; "
        "expected no shared memory. Use the out-of-place form here."
    )


def _sharers(links: dict[fx.Node, set[fx.Node]], value: fx.Node) -> set[fx.Node]:
    seen, pending = {value}, [value]
    while pending:
        for other in links.get(pending.pop(), ()):
            if other not in seen:
                seen.add(other)
                pending.append(other)
    return seen


def _shared(found: Functional) -> Iterator[fx.Node]:
    """Yield the writes into memory that is read later under another name."""
    links = _views(found)
    for write in found.writes:
        value = found.values[write]
        if any(_is_read_after(write, other, found) for other in _sharers(links, value) - {value}):
            yield write


def _is_read_after(write: fx.Node, value: fx.Node, found: Functional) -> bool:
    """Whether a node behind ``write`` reads the memory of ``value``."""
    names = [value, *(node for node, memory in found.values.items() if memory is value)]
    return any(write < user for name in names for user in name.users)


def _kept_between_calls(found: Functional) -> Iterator[str]:
    """Yield a line for each buffer that the forward overwrites, other than the statistics of BatchNorm."""
    advice = "expected a forward that keeps nothing between calls. Return the value, or drop the update in eval mode."
    for spec in found.program.graph_signature.output_specs:
        name = spec.target or ""
        if spec.kind is OutputKind.BUFFER_MUTATION and not name.endswith(_UPDATED_IN_TRAINING):
            yield f"{name}: the forward overwrites this buffer; {advice}"
    names = found.tensor_names()
    links = _views(found)
    for write in found.writes:
        for value in _sharers(links, found.values[write]):
            name = names.get(value, "")
            counted = name.endswith(_UPDATED_IN_TRAINING) and not _is_read_after(write, value, found)
            if name and not counted:
                yield f"{label(write)}: the forward overwrites {name}; {advice}"
