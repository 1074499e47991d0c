"""Export: a converted network as one file for other tools (ONNX, torch.export, NIR)."""

from ..deploy import fold_batchnorm
from .nir_neurons import ShiftedStart, ZeroStart
from .result import Comparison, Exported
from .to_nir import Exact, Project, export_nir
from .to_onnx import export_onnx
from .to_pt2 import export_pt2

__all__ = [
    "Comparison",
    "Exact",
    "Exported",
    "Project",
    "ShiftedStart",
    "ZeroStart",
    "export_nir",
    "export_onnx",
    "export_pt2",
    "fold_batchnorm",
]
