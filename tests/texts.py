"""Texts that tests of several files write."""

from __future__ import annotations

ANN_RECIPE = """architecture = "digits-cnn"
data = "digits"
samples = 64
seed = 3

[training]
batch_size = 32
strategy = {type = "STBP"}
schedule = {type = "Schedule", epochs = 1, distillation = "none"}
"""
