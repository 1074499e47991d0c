"""A user's own module: test_pickles copies it into a package, and it is imported nowhere else."""

import enum
import os
import subprocess  # noqa: F401
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import NamedTuple

import torch.nn.functional as F
from torch import nn

Path("imported").touch()


class Kind(enum.Enum):
    PLAIN = 1


class Size(NamedTuple):
    inputs: int
    outputs: int


@dataclass
class Config:
    size: Size
    kind: Kind
    scale: float = 1.0


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config.size.inputs, 6)
        self.function = F.relu

    def forward(self, x):
        return self.function(self.fc(x)) * self.config.scale


class Mine(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.block = Block(config)
        self.head = nn.Linear(6, config.size.outputs)

    def forward(self, x):
        return self.head(self.block(x.flatten(1)))


class Runner(Popen):
    pass


class Outer:
    class Inner(nn.Module):
        pass


def build():
    return Mine(Config(Size(64, 10), Kind.PLAIN, 0.5)).eval()


def call(name):
    return os.mkdir(name)
