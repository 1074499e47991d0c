"""ONNX in: from a file to a torch.fx graph of ordinary torch.nn modules, which the converter can rewrite.

    from lmh.convert.onnx_import import import_onnx
    network = import_onnx(Path("resnet18.onnx"))      # an fx.GraphModule in eval mode, trainable
    conversion = convert(network, timesteps=4, data=images)

The batch is free, whatever size the file was exported with: the graph is built while it runs on fake tensors
at several batch sizes, and what changes with the batch is read off a tensor instead of being frozen.

How to add an operator: one function, one decorator, one test.

1. Write a function from :class:`~lmh.convert.onnx_import.values.Op` to
   :class:`~lmh.convert.onnx_import.values.Call` in the file of its family, or in a new file that you add to
   ``OPERATORS`` below. It looks at its inputs' shapes and constants, computes nothing on signals, and returns
   which module or function to call on what::

       @OPERATORS.operator("Mish", since=(18, 22))
       def mish(op: Op) -> Call:
           return Call(nn.Mish(), op.inputs)

2. ``since`` lists every opset that changed the operator and that the function was written for; tests hold the
   list against the onnx package. A form that torch does not have raises ``UnsupportedFormError`` with the reason.
3. The onnx package's own cases for the operator run by themselves in tests/test_onnx_backend.py. Add a test for
   what they leave out.
"""

from __future__ import annotations

from pathlib import Path

from onnx import ModelProto
from torch import fx

from . import (
    activations,
    arithmetic,
    convolution,
    normalisation,
    pooling,
    reductions,
    reshaping,
    resizing,
    selecting,
)
from .building import build
from .fusion import fuse
from .reading import is_onnx, read_model
from .registry import Key, Registry

__all__ = ["OPERATORS", "Key", "Registry", "import_onnx", "is_onnx"]

OPERATORS = Registry(
    activations.OPERATORS,
    arithmetic.OPERATORS,
    convolution.OPERATORS,
    normalisation.OPERATORS,
    pooling.OPERATORS,
    reductions.OPERATORS,
    reshaping.OPERATORS,
    resizing.OPERATORS,
    selecting.OPERATORS,
)


def import_onnx(
    source: Path | str | ModelProto, *, fixed_batch: bool = False, operators: Registry = OPERATORS
) -> fx.GraphModule:
    """Return the network that an ONNX model describes.

    Args:
        source: an .onnx file, opset 9 to the newest, or a model in memory.
        fixed_batch: keep the file's batch size, for a model that works at no other.
        operators: which function imports which operator; your own on top with ``Registry(OPERATORS, mine)``.

    Returns:
        A graph module in eval mode with trainable parameters, called after the names in the file. It takes the
        file's inputs in order, [N, *F] with any N, and returns its output, or a tuple of several.

    Raises:
        SourceError: if the source is no valid ONNX model, or listing every node that cannot be imported.

    >>> from onnx import TensorProto, helper
    >>> shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    >>> graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], name="act")], "g", shapes[:1], shapes[1:])
    >>> network = import_onnx(helper.make_model(graph))
    >>> network.act
    ReLU()
    """
    model, where = read_model(source)
    return fuse(*build(model, operators, where, fixed_batch=fixed_batch))
