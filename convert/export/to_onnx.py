"""Export to ONNX: time unrolled, the batch size free, output the mean over time."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ...artifact import user_path, write_atomically
from ...errors import ArtifactError, reason_of
from ..deploy import deployed, random_inputs, required_shape
from ..files import EXPORT_MARK
from ..pipeline import Conversion
from .result import Exported
from .to_pt2 import EXAMPLE_BATCH, batch_axes, beside_the_network, traced

PROTOBUF_LIMIT = 2**31 - 1


def export_onnx(
    network: Conversion | fx.GraphModule, file: str | Path, *, input_shape: Sequence[Any] | None = None
) -> Exported:
    """Write a spiking network as an ONNX file.

    The T steps are unrolled into ordinary operators (a spike is GreaterOrEqual, Cast, Mul), BatchNorm is folded,
    coefficients are constants; nothing is lost but the names of the neurons' parameters. The file takes [N, *F]
    ([T, N, *F] for event frames) with N free and returns the mean over time, [N, C]. Several inputs are named as in
    the network's forward; several outputs come in the order in which the network holds them.

    Args:
        network: from ``convert`` or ``load``; not changed.
        file: to write; replaced only when the new one is whole.
        input_shape: of one sample, without batch; not needed for a Conversion or a loaded network.

    Returns:
        The file and how it was checked: by the onnx package, and beside the network where onnxruntime is installed.

    Raises:
        ArgumentError: if it is not a spiking network, or takes another input.
        ArtifactError: if an operator has no ONNX form, the file answers differently, is larger than ONNX allows
            (2 GB), or cannot be written.
    """
    path = user_path(file)
    shape = required_shape(network, input_shape)
    model = deployed(network, shape)
    data = _onnx_bytes(path, model, shape)
    onnx = importlib.import_module("onnx")
    onnx.checker.check_model(data)
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        check = f"Well-formed by onnx {onnx.__version__}; to run it too: pip install 'lmh-convert[onnx]'."
    else:
        try:
            comparison = beside_the_network(_session(runtime, data), network, shape)
        except Exception as error:  # onnxruntime has errors of its own kinds
            raise ArtifactError(
                f"{path}: not written, as onnxruntime {runtime.__version__} cannot run it ({reason_of(error)}); "
                "expected operators and types that it has, such as float32. Export network.float()."
            ) from error
        check = comparison.text(f"onnxruntime {runtime.__version__}")
        if not comparison.agrees:
            raise ArtifactError(f"{path}: not written, as it answers differently. {check}")
    write_atomically(path, data)
    return Exported(path, "onnx", len(data), check)


def _onnx_bytes(path: Path, model: fx.GraphModule, shape: Sequence[Any]) -> bytes:
    program = traced(model, shape)
    examples = random_inputs(model, shape, EXAMPLE_BATCH, seed=0)
    inputs = ["input"] if len(examples) == 1 else [node.name for node in model.graph.nodes if node.op == "placeholder"]
    try:
        with _quiet(), torch.no_grad():
            exported: Any = torch.onnx.export(
                program, examples, dynamo=True, verbose=False, input_names=inputs, output_names=["output"],
                dynamic_shapes=batch_axes(model, len(examples)),
            )  # fmt: skip
    except Exception as error:
        reason = reason_of(error.__cause__ or error)
        raise ArtifactError(
            f"{path}: torch.onnx cannot express {type(model).__name__} ({reason}); expected operators that ONNX has. "
            "Export to pt2 instead."
        ) from error
    proto = exported.model_proto
    key, value = EXPORT_MARK
    proto.metadata_props.add(key=key, value=value)
    size = proto.ByteSize()
    if size > PROTOBUF_LIMIT:
        raise ArtifactError(
            f"{path}: {size / 1e9:.1f} GB; expected at most {PROTOBUF_LIMIT / 1e9:.1f} GB, the limit of one ONNX file. "
            "Export to pt2 instead."
        )
    return proto.SerializeToString()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and deprecation notes off the user's terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _session(runtime: Any, data: bytes) -> Callable[..., list[Tensor]]:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def answer(*inputs: Tensor) -> list[Tensor]:
        given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, given)]

    return answer
