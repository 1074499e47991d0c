"""LM-H: convert pretrained networks to spiking networks, calibrate and fine-tune them.

from lmh import zoo
from lmh.convert import convert, load, save
from lmh.calibrate import calibrate
from lmh.finetune import finetune
from lmh import carry_state, evaluate, per_step, sites
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arena import use_arena
    from .errors import LMHError
    from .evaluation import evaluate
    from .footprint import Fit
    from .kernels import Kernel, use_kernel
    from .layers import fused_layers
    from .qcfs import QCFS
    from .readout import DelayedReadout, MeanReadout, WeightedReadout
    from .recomputed import recompute
    from .resets import AttachedReset, DetachedReset
    from .spiking import IF, LIF, LMH, PerChannel, PerLayer, PerStep, Ranges, SpikingSite, kernels_used, sites
    from .streaming import early_exit, exit_curve, streamed
    from .time_axis import carry_state, per_step, prefixes

__version__ = "0.1.0"

_HOMES = {
    "use_arena": "arena",
    "LMHError": "errors",
    "evaluate": "evaluation",
    "Fit": "footprint",
    "QCFS": "qcfs",
    **dict.fromkeys(
        ("IF", "LIF", "LMH", "PerChannel", "PerLayer", "PerStep", "Ranges", "SpikingSite", "kernels_used", "sites"),
        "spiking",
    ),
    **dict.fromkeys(("DelayedReadout", "MeanReadout", "WeightedReadout"), "readout"),
    **dict.fromkeys(("Kernel", "use_kernel"), "kernels"),
    "fused_layers": "layers",
    "recompute": "recomputed",
    **dict.fromkeys(("AttachedReset", "DetachedReset"), "resets"),
    **dict.fromkeys(("early_exit", "exit_curve", "streamed"), "streaming"),
    **dict.fromkeys(("carry_state", "per_step", "prefixes"), "time_axis"),
}

__all__ = [
    "IF",
    "LIF",
    "LMH",
    "QCFS",
    "AttachedReset",
    "DelayedReadout",
    "DetachedReset",
    "Fit",
    "Kernel",
    "LMHError",
    "MeanReadout",
    "PerChannel",
    "PerLayer",
    "PerStep",
    "Ranges",
    "SpikingSite",
    "WeightedReadout",
    "carry_state",
    "early_exit",
    "evaluate",
    "exit_curve",
    "fused_layers",
    "kernels_used",
    "per_step",
    "prefixes",
    "recompute",
    "sites",
    "streamed",
    "use_arena",
    "use_kernel",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``lmh --help`` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lmh' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
