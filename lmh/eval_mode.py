"""Networks in eval mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval_mode(*networks: nn.Module | None) -> Iterator[None]:
    """Put networks in eval mode for the length of the block; afterwards every module is in the mode it was in.

    >>> layer = nn.Dropout()
    >>> with in_eval_mode(layer, None):
    ...     layer.training
    False
    >>> layer.training
    True
    """
    given = [network for network in networks if network is not None]
    modes = [(module, module.training) for network in given for module in network.modules()]
    try:
        for network in given:
            network.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
