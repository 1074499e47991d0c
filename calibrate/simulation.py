"""The neurons of a site on their own: what they answer to currents."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..spiking import PerStep, SpikingSite
from ..time_axis import TimeAxis


def alone(site: SpikingSite) -> SpikingSite:
    """Return a copy of a site that takes any current [T·N, *F], with a time axis of its own."""
    site.drop_state()
    copied = copy.deepcopy(site)
    copied.time, copied.static = TimeAxis(site.time.timesteps), False
    return copied


def mean_output(site: SpikingSite, current: Tensor) -> Tensor:
    """Return the mean over time of θ s[t].

    Args:
        site: from :func:`alone`.
        current: [T, N, *F].
    """
    with torch.no_grad():
        return site(current.flatten(0, 1)).unflatten(0, current.shape[:2]).mean(0)


def constant_output(site: SpikingSite, current: Tensor) -> Tensor:
    """Return the mean output for a current [N, *F] that is the same at every step."""
    return mean_output(site, current.expand(site.time.timesteps, *current.shape))


def mean_threshold(site: SpikingSite) -> Tensor:
    """Return the largest mean output of a site: θ, or its mean over steps; shape [] or [C]."""
    theta = site.v_threshold.detach()
    return theta.mean(0) if isinstance(site.neuron.granularity, PerStep) else theta
