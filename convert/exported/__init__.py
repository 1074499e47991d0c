"""Programs of torch.export as graphs of ordinary torch.nn modules: ``.pt2`` files, and what fx cannot trace."""

from .archive import read_exported
from .importer import modules_from_export
from .trace import trace_by_export

__all__ = ["modules_from_export", "read_exported", "trace_by_export"]
