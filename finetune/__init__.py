"""Fine-tuning: from an ANN or a spiking network to one whose weights, θ, v_init, λ and μ were trained.

snn = convert(ann, timesteps=4, data=train).snn
finetune(snn, train, val, epochs=5)                                  STBP through all steps, in place
tuned = finetune(ann, train, val, timesteps=4, strategy=Hybrid())    a QCFS stage first; tuned.snn
conversion = distill(conversion, images)                             by the ANN's outputs, without labels
"""

from .api import Finetuned, finetune
from .batch_norm import FrozenBatchNorm, LiveBatchNorm, SyncedBatchNorm
from .checkpoint import Checkpoint
from .history import EpochResult, Stage
from .label_free import LabelFree, distill, seconds_per_epoch
from .log import JSONLines, Progress, TensorBoard
from .losses import TET, CrossEntropy, Distillation
from .memory import KeepAll, Recompute
from .mixing import CutMix, Mixup
from .precision import BFloat16, Float32
from .schedule import EMA, EarlyStopping, Schedule
from .strategies import SLTT, STBP, WIDER, EverySlice, Hybrid, OncePerBatch, Progressive, TimeSliced
from .trainer import fit

__all__ = [
    "EMA",
    "SLTT",
    "STBP",
    "TET",
    "WIDER",
    "BFloat16",
    "Checkpoint",
    "CrossEntropy",
    "CutMix",
    "Distillation",
    "EarlyStopping",
    "EpochResult",
    "EverySlice",
    "Finetuned",
    "Float32",
    "FrozenBatchNorm",
    "Hybrid",
    "JSONLines",
    "KeepAll",
    "LabelFree",
    "LiveBatchNorm",
    "Mixup",
    "OncePerBatch",
    "Progress",
    "Progressive",
    "Recompute",
    "Schedule",
    "Stage",
    "SyncedBatchNorm",
    "TensorBoard",
    "TimeSliced",
    "distill",
    "finetune",
    "fit",
    "seconds_per_epoch",
]
