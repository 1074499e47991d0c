"""Reconstruction: block by block, neurons and weights are fitted until a block's spikes mean what the ANN's values are.

A block reads what the spiking network made of the input so far, and its target is what the ANN's block makes of the
ANN's own values, so that errors of earlier blocks are corrected and not handed on (as in Li et al. 2021, there for
biases and potentials only; through the surrogate gradient, and with λ and μ, ours). With s[t] the spikes of the block's
last site, T steps, a the ANN's activation, the loss of a block is

    ‖(1/T) Σ_t θ s[t] − a‖² / ‖a‖²

No labels are needed. Through so few layers neurons are fitted better without a gradient through their reset
(lmh/resets.py), unless they name one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..arguments import split_batch
from ..errors import ArgumentError, CalibrationError
from ..records import Prepared
from ..resets import DetachedReset
from ..spiking import COEFFICIENTS, SpikingSite, sites
from ..structures import input_count
from ..time_axis import takes_events, time_axis
from .blocks import Block, blocks, cut


@dataclass(frozen=True)
class Reconstruction:
    """How blocks are fitted: Adam with half a cosine down to 0.

    Attributes:
        steps: of the optimiser for each block.
        batch_size: samples of a step.
        neuron_lr: learning rate of θ, v_init, λ and μ; 0 leaves them.
        coefficients: whether λ and μ are among them; without, neurons stay IF.
        weight_lr: learning rate of weights and biases; 0 leaves them.
        seed: of the order of the samples.
    """

    steps: int = 200
    batch_size: int = 64
    neuron_lr: float = 0.01
    coefficients: bool = True
    weight_lr: float = 3e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.neuron_lr < 0 or self.weight_lr < 0:
            raise ArgumentError(f"{self}: expected at least 1 step and 1 sample, and learning rates of at least 0.")


@dataclass(frozen=True)
class BlockResult:
    """The relative squared error of a block over all samples, before and after its fit."""

    block: Block
    before: float
    after: float


def reconstruct(
    snn: fx.GraphModule,
    prepared: Prepared,
    data: Iterable[Any] | Tensor,
    settings: Reconstruction | None = None,
    *,
    on_block: Callable[[BlockResult], None] | None = None,
) -> list[BlockResult]:
    """Fit a spiking network to its ANN, block by block, in place; no labels.

    Args:
        snn: made from ``prepared`` by ``convert``; its parameters change, its BatchNorm statistics do not.
        prepared: the ANN, :attr:`Conversion.prepared`.
        data: batches [N, *F] (or tuples that begin with one), or one tensor; pass several epochs of an augmented
            loader for augmentation. What the present block reads and gives is held in memory, for all samples.
        settings: steps and learning rates.
        on_block: told of each block that is done.

    Returns:
        One result for each block, in order.

    Raises:
        CalibrationError: if there is no data, no block, or a loss that is not finite.
        ArgumentError: for a network of event frames.

    >>> from lmh import zoo
    >>> from lmh.convert import convert
    >>> images = next(iter(zoo.Batches(zoo.load_data("digits").train, zoo.card("digits-cnn").preprocessing, 64)))[0]
    >>> conversion = convert(zoo.load("digits-cnn"), 2, data=images)
    >>> results = reconstruct(conversion.snn, conversion.prepared, images, Reconstruction(steps=20))
    >>> results[-1].after < results[-1].before
    True
    """
    settings = Reconstruction() if settings is None else settings
    if takes_events(snn):
        raise ArgumentError("reconstruct: the network takes event frames; expected one that takes static images.")
    if input_count(prepared.model) != 1:
        raise ArgumentError("reconstruct: the network takes several inputs; expected one. Fine-tune it instead.")
    device = next(snn.parameters()).device
    batches = [data] if isinstance(data, Tensor) else data
    images = [split_batch("reconstruct: data", batch)[0][0].to(device) for batch in batches]
    found = blocks(prepared)
    if not images or not found:
        what = "the data gave no batch" if not images else "the network has no place where it can be cut into blocks"
        raise CalibrationError(f"reconstruct: {what}; expected some. Check the data, or fine-tune instead.")
    source = torch.cat(images)
    timesteps, generator = time_axis(snn).timesteps, torch.Generator().manual_seed(settings.seed)
    spikes, values = source, source
    snn.eval()
    results = []
    for block in found:
        student, teacher = cut(snn, block), cut(prepared.model, block)
        with torch.no_grad():
            values = _in_chunks(teacher, values, settings.batch_size)
        fit = _Fit(student, timesteps, timed=spikes is not source, settings=settings)
        with _without_the_resets_gradient(snn):
            results.append(BlockResult(block, *fit.run(spikes, values, generator)))
        spikes = fit.outputs(spikes)
        if on_block is not None:
            on_block(results[-1])
    return results


@contextmanager
def _without_the_resets_gradient(snn: fx.GraphModule) -> Iterator[None]:
    """Inside the block no gradient passes the reset of neurons that do not say whether one does."""
    free = [site for site in sites(snn).values() if site.neuron.reset is None]
    for site in free:
        site.neuron = replace(site.neuron, reset=DetachedReset())
    try:
        yield
    finally:
        for site in free:
            site.neuron = replace(site.neuron, reset=None)


def _in_chunks(function: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    return torch.cat([function(part) for part in x.split(size)])


class _Fit:
    """One block: its part of the spiking network, and what of it is learned.

    Samples lie on axis 0: spikes are [N, T, *F] behind the first block, where ``timed``, and [N, *F] before it.
    """

    def __init__(self, student: fx.GraphModule, timesteps: int, *, timed: bool, settings: Reconstruction) -> None:
        self.student, self.timesteps, self.timed, self.settings = student, timesteps, timed, settings
        neurons, weights = [], []
        for module in student.modules():
            own = {name: value for name, value in module.named_parameters(recurse=False) if value.requires_grad}
            if isinstance(module, SpikingSite):
                fixed = set() if settings.coefficients else {f"raw_{name}" for name in COEFFICIENTS}
                neurons += [parameter for name, parameter in own.items() if name not in fixed]
            else:
                weights += list(own.values())
        groups = [(neurons, settings.neuron_lr), (weights, settings.weight_lr)]
        self.groups: list[dict[str, Any]] = [
            {"params": params, "lr": lr, "base": lr} for params, lr in groups if params and lr > 0
        ]

    def run(self, spikes: Tensor, values: Tensor, generator: torch.Generator) -> tuple[float, float]:
        """Fit the block and return its error before and after; a fit that does not help is taken back."""
        before = self.error(spikes, values)
        start = {name: value.clone() for name, value in self.student.state_dict().items()}
        if self.groups:
            self._optimise(spikes, values, generator)
        after = self.error(spikes, values)
        if after < before:
            return before, after
        self.student.load_state_dict(start)
        return before, before

    def _optimise(self, spikes: Tensor, values: Tensor, generator: torch.Generator) -> None:
        optimizer = torch.optim.Adam(self.groups)
        learned = [parameter for group in self.groups for parameter in group["params"]]
        size = min(self.settings.batch_size, len(values))
        order = torch.empty(0, dtype=torch.long)
        for step in range(self.settings.steps):
            if len(order) < size:
                order = torch.randperm(len(values), generator=generator)
            chosen, order = order[:size], order[size:]
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * 0.5 * (1 + math.cos(math.pi * step / self.settings.steps))
            target = values[chosen]
            loss = (self._mean(spikes[chosen]) - target).square().sum() / target.square().sum().clamp_min(1e-12)
            if not torch.isfinite(loss):
                raise CalibrationError(
                    f"reconstruct: the loss is {float(loss.detach())} at step {step + 1}; expected a finite number. "
                    "Lower neuron_lr or weight_lr."
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward(inputs=learned)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def error(self, spikes: Tensor, values: Tensor) -> float:
        """Return ‖mean output − target‖² / ‖target‖² over all samples."""
        size, wrong, whole = self.settings.batch_size, 0.0, 0.0
        with torch.no_grad():
            for part, target in zip(spikes.split(size), values.split(size), strict=True):
                wrong += float((self._mean(part) - target).square().sum())
                whole += float(target.square().sum())
        return wrong / max(whole, 1e-12)

    def outputs(self, spikes: Tensor) -> Tensor:
        """Return what the block makes of all samples, [N, T, *F]: what the next one reads."""
        with torch.no_grad():
            return _in_chunks(self._run, spikes, self.settings.batch_size)

    def _mean(self, spikes: Tensor) -> Tensor:
        return self._run(spikes).mean(1)

    def _run(self, spikes: Tensor) -> Tensor:
        """Return the block's output [N, T, *F]."""
        folded = spikes.transpose(0, 1).flatten(0, 1) if self.timed else spikes
        return self.student(folded).unflatten(0, (self.timesteps, -1)).transpose(0, 1)
