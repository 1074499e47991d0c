"""From an exported program to a graph of ordinary torch.nn modules, functions and methods."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ...errors import ArgumentError, AuditError
from ...structures import INPUT_SIZE
from ..audit import batch_problems
from .aten import built
from .calls import Call, Layer, as_it_is
from .memory import Functional, functional
from .places import Places, module_stack, tensors_of
from .quiet import quiet

_SIZED = ("view", "reshape", "expand")


def modules_from_export(program: ExportedProgram) -> fx.GraphModule:
    """Return an exported program as a graph of ordinary torch.nn modules that the converter can rewrite.

    Operators with parameters become the modules that hold them, at the paths of the model that was exported, so that
    parameters and buffers keep their names, and tied ones stay tied. Activations, pools and dropout become modules
    at the paths of the modules that made them, one for each call. The rest becomes functions and methods. An
    operator that has none stays a call of ``torch.ops.aten.…``, for the audit to name. A program with a constant
    batch size N gets a free one: the N in its reshapes is read off their input.

    Args:
        program: what torch.export.export gives, before or after its default decompositions. Not changed.

    Returns:
        The network in eval mode. It shares the program's parameters. Its inputs and outputs are the program's.

    Raises:
        AuditError: if the program writes into its own buffers, its batch size cannot be made free, or it returns
            something else than tensors in tuples, lists and dicts.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()).eval()
    >>> graph = modules_from_export(torch.export.export(net, (torch.rand(2, 4),)))
    >>> [(name, type(module).__name__) for name, module in graph.named_children()]
    [('0', 'Linear'), ('1', 'ReLU')]
    >>> graph(torch.rand(3, 4)).shape
    torch.Size([3, 8])
    """
    return _Import(functional(program)).run()


class _Import:
    """One walk over the program's graph.

    Attributes:
        values: from each node of the program to what stands for it in the new graph; a write in place moves the
            entry of the memory it wrote.
    """

    def __init__(self, found: Functional) -> None:
        self.found, self.program = found, found.program
        signature = self.program.graph_signature
        self.names = found.tensor_names()
        self.inputs = [n for n in found.graph.nodes if n.op == "placeholder" and n not in self.names]
        tensors = tensors_of(self.program)
        temporary = {*self.program.constants, *signature.non_persistent_buffers}
        self.places = Places(tensors, found.graph.nodes, temporary)
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.firsts: set[fx.Node] = set()
        self.fed = _fed(found.graph, self.inputs)
        self.batch = _constant_batch(self.inputs)

    def run(self) -> fx.GraphModule:
        """Build the new graph, node by node."""
        self._take_inputs()
        for node in self.found.graph.nodes:
            match node.op:
                case "get_attr":
                    self.places.root.add_module(str(node.target), getattr(self.program.graph_module, str(node.target)))
                    self.values[node] = self.graph.get_attr(str(node.target))
                case "call_function":
                    self._take_call(node)
                case "output":
                    self._give(node)
        model = fx.GraphModule(self.places.root, self.graph, _class_name(self.found.graph)).eval()
        model.graph.eliminate_dead_code()
        model.graph.lint()
        model.recompile()
        model.delete_all_unused_submodules()
        self.places.restore_persistence(model)
        if self.batch is not None:
            _check_batch(model, self.inputs, self.batch)
        return model

    def _take_inputs(self) -> None:
        """Give the new graph the arguments of the model's forward: one for each, whatever it holds."""
        args, kwargs = pytree.tree_unflatten(self.inputs, self.program.call_spec.in_spec)
        signature = self.program.module_call_graph[0].signature
        names = (signature.forward_arg_names if signature else None) or []
        for position, value in enumerate(args):
            name = names[position] if position < len(names) else f"argument_{position}"
            self._take_argument(name, value)
        for name, value in kwargs.items():
            self._take_argument(name, value)

    def _take_argument(self, name: str, value: Any) -> None:
        self._open(value, self.graph.placeholder(name))

    def _open(self, value: Any, node: fx.Node) -> None:
        if isinstance(value, fx.Node):
            self.values[value] = node
            node.meta[INPUT_SIZE] = _size_of_sample(value.meta.get("val"))
        elif isinstance(value, list | tuple | dict):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                self._open(inner, self.graph.call_function(operator.getitem, (node, key)))

    def _value(self, node: fx.Node) -> fx.Node:
        node = self.found.values.get(node, node)
        if node not in self.values:
            self.values[node] = self.graph.get_attr(self.names[node])
        return self.values[node]

    def _take_call(self, node: fx.Node) -> None:
        if node.target is operator.getitem and node.args[0] in self.firsts:
            self.values[node] = self._value(node.args[0])  # type: ignore[arg-type]
            return
        result = built(node)
        if isinstance(result, Layer) and (_any_node(result.options) or not isinstance(result.source, fx.Node)):
            result = result.otherwise or as_it_is(node)
        if result is None:
            return
        if isinstance(result, fx.Node):
            new = self._value(result)
        elif isinstance(result, Layer):
            new = self._layer(node, result)
        else:
            new = self._call(node, result)
        self.values[self.found.values.get(node, node)] = new

    def _layer(self, node: fx.Node, layer: Layer) -> fx.Node:
        if layer.first:
            self.firsts.add(node)
        names = {own: self.names[tensor] for own, tensor in layer.tensors.items() if tensor in self.names}
        path = self.places.place(layer, node, names)
        if path is None:
            return self._call(node, layer.otherwise or as_it_is(node))
        return self._made(node, self.graph.call_module(path, (self._value(layer.source),)))

    def _call(self, node: fx.Node, call: Call) -> fx.Node:
        args = fx.node.map_arg(call.args, self._value)
        kwargs = fx.node.map_arg(dict(call.kwargs), self._value)
        if self.batch is not None:
            args = self._with_free_batch(node, call, args)
        if isinstance(call.target, str):
            return self._made(node, self.graph.call_method(call.target, args, kwargs))
        return self._made(node, self.graph.call_function(call.target, args, kwargs))

    def _with_free_batch(self, node: fx.Node, call: Call, args: Any) -> Any:
        """Read the batch size that a reshape has as a number off its input."""
        source = call.args[0] if call.args else None
        if getattr(call.target, "__name__", call.target) not in _SIZED or source not in self.fed:
            return args
        sizes = args[1] if isinstance(args[1], list | tuple) else args[1:]
        if not sizes or sizes[0] != self.batch or _leading(source) != self.batch or _leading(node) != self.batch:
            return args
        sizes = (self.graph.call_method("size", (args[0], 0)), *sizes[1:])
        return (args[0], list(sizes)) if isinstance(args[1], list | tuple) else (args[0], *sizes)

    def _made(self, source: fx.Node, new: fx.Node) -> fx.Node:
        new.meta["nn_module_stack"] = module_stack(source)
        if "stack_trace" in source.meta:
            new.meta["stack_trace"] = source.meta["stack_trace"]
        return new

    def _give(self, node: fx.Node) -> None:
        spec = self.program.call_spec.out_spec
        results = fx.node.map_arg(node.args[0], self._value)
        value = pytree.tree_unflatten(list(results), spec)  # type: ignore[arg-type]
        foreign = _foreign(value)
        if foreign is not None:
            raise AuditError(
                [
                    f"the program returns a {foreign.__qualname__}; expected tensors, in tuples, lists or dicts. "
                    "Export a wrapper whose forward returns the tensor you want."
                ]
            )
        self.graph.output(value)


def _foreign(value: Any) -> type | None:
    """Return the type in an output that fx has no words for, or None."""
    if isinstance(value, dict | list | tuple):
        inner = value.values() if isinstance(value, dict) else value
        return next((found for found in map(_foreign, inner) if found is not None), None)
    return None if value is None or isinstance(value, fx.Node | int | float | str) else type(value)


def _any_node(value: Any) -> bool:
    return any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(dict(value)))


def _size_of_sample(value: Any) -> tuple[int, ...] | None:
    """Return the shape of one sample, [*F], or None where the program leaves an axis of it open."""
    if not isinstance(value, Tensor) or not all(isinstance(size, int) for size in value.shape[1:]):
        return None
    return tuple(value.shape[1:])


def _leading(node: Any) -> Any:
    return next(iter(node.meta["val"].shape), None)


def _fed(graph: fx.Graph, inputs: list[fx.Node]) -> set[fx.Node]:
    """Return the nodes whose values depend on the user's input."""
    fed = set(inputs)
    for node in graph.nodes:
        if any(source in fed for source in node.all_input_nodes):
            fed.add(node)
    return fed


def _constant_batch(inputs: list[fx.Node]) -> int | None:
    """Return the batch size if the program was exported for one only, else None."""
    value = inputs[0].meta.get("val") if inputs else None
    size = value.shape[0] if isinstance(value, Tensor) and value.ndim else None
    return size if isinstance(size, int) else None


def _check_batch(model: fx.GraphModule, inputs: list[fx.Node], batch: int) -> None:
    """Show that a program of one batch size serves others, as far as shapes tell.

    Raises:
        AuditError: with the nodes that do not.
    """
    shapes = [node.meta["val"].shape for node in inputs]
    if len(shapes) != 1 or not all(isinstance(size, int) for size in shapes[0]):
        return
    try:
        with quiet():
            problems = batch_problems(model, shapes[0][1:])
    except ArgumentError as error:
        problems = [str(error).partition(" Pass example_input")[0]]  # the example is right, for its own batch size
    if problems:
        cause = (
            f"the program was exported for the batch size {batch} alone, and its nodes below keep it; expected any "
            "batch size. Export it again with dynamic_shapes=({0: torch.export.Dim('batch')},)."
        )
        raise AuditError([cause, *problems])


def _class_name(graph: fx.Graph) -> str:
    stacks = (module_stack(node) for node in graph.nodes)
    kind = next((next(iter(stack.values()))[1] for stack in stacks if stack), "GraphModule")
    return kind.rpartition(".")[2] or "GraphModule"
