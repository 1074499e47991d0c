"""The zoo: architectures, data sets and trained weights."""

from .augmentation import AutoAugment, CropFlip, Cutout, ForCIFAR10, ForImageNet, ForSVHN, InTurn
from .data import DataSet, load_data
from .images import Batches, Preprocessing, seeded_order
from .models import card, list_models, load, record, snn_path
from .registry import Card, list_architectures

__all__ = [
    "AutoAugment",
    "Batches",
    "Card",
    "CropFlip",
    "Cutout",
    "DataSet",
    "ForCIFAR10",
    "ForImageNet",
    "ForSVHN",
    "InTurn",
    "Preprocessing",
    "card",
    "list_architectures",
    "list_models",
    "load",
    "load_data",
    "record",
    "seeded_order",
    "snn_path",
]
