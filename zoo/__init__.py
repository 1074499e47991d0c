"""The zoo: architectures, data sets and trained weights."""

from .augmentation import AutoAugment, CropFlip, Cutout, ForCIFAR10, ForImageNet, ForSVHN, InTurn, OneOf, Roll, Rotate
from .data import load_data
from .images import Batches, FramePreprocessing, Preprocessing, seeded_order
from .model_cards import ModelCard, SpikingCard
from .models import card, is_spiking, list_models, load, model_card, record, snn_path
from .registry import Card, list_architectures
from .splits import DataSet

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
    "FramePreprocessing",
    "InTurn",
    "ModelCard",
    "OneOf",
    "Preprocessing",
    "Roll",
    "Rotate",
    "SpikingCard",
    "card",
    "is_spiking",
    "list_architectures",
    "list_models",
    "load",
    "load_data",
    "model_card",
    "record",
    "seeded_order",
    "snn_path",
]
