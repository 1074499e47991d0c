"""The zoo: architectures, data sets and trained weights."""

from .data import DataSet, load_data
from .images import Batches, CropFlip, Preprocessing, seeded_order
from .registry import Card, card, list_architectures, list_models, load, record, snn_path

__all__ = [
    "Batches",
    "Card",
    "CropFlip",
    "DataSet",
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
