"""The one door to torchvision.

PyPI's torchvision wheel is built for CUDA; beside a CPU-only torch its import dies because the compiled
operators, and with them their schemas, are missing. Declaring the two schemas that the import looks up is
enough for models, transforms and data sets. This module acts only when the plain import fails.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # a schema lives as long as its Library object


def torchvision() -> ModuleType:
    """Import torchvision with its ``models`` and ``transforms.v2``, and return it.

    Raises:
        ImportError: if torchvision is not installed, or fails for another reason than missing operators.
    """
    try:
        return _import()
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise ImportError(f"torchvision cannot be imported: {error}") from error
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)
    return _import()


def _import() -> ModuleType:
    module = importlib.import_module("torchvision")
    importlib.import_module("torchvision.models")
    importlib.import_module("torchvision.transforms.v2")
    return module
