"""Conversion: from any pretrained ANN to a spiking network, and back from a file."""

from .deploy import deploy, spike_changes
from .loading import Source, load_source
from .maxpool import MAXPOOLS, AveragePool, BeforeNeuron, Gated, WhereExact
from .normalisation import NORMALISATIONS, TEBN, PlainBatchNorm, TdBN
from .pipeline import Conversion, Recipe, assemble, convert
from .prepare import prepare
from .refine import refine
from .rules import DEFAULT_RULES, ReluSurgery, as_neuron, from_qcfs, keep
from .spike import DirectCoding, EventFrames
from .storage import load, save

__all__ = [
    "DEFAULT_RULES",
    "MAXPOOLS",
    "NORMALISATIONS",
    "TEBN",
    "AveragePool",
    "BeforeNeuron",
    "Conversion",
    "DirectCoding",
    "EventFrames",
    "Gated",
    "PlainBatchNorm",
    "Recipe",
    "ReluSurgery",
    "Source",
    "TdBN",
    "WhereExact",
    "as_neuron",
    "assemble",
    "convert",
    "deploy",
    "from_qcfs",
    "keep",
    "load",
    "load_source",
    "prepare",
    "refine",
    "save",
    "spike_changes",
]
