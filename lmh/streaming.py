"""Inference in few steps at a time: in memory that does not grow with T, or until an answer is sure enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .arguments import check_labels, split_batch
from .errors import ArgumentError, DataError
from .eval_mode import in_eval_mode
from .footprint import Fit, part_of
from .op_table import Kind
from .ops import follows_readout, kind_of, module_of, readout_name
from .readout import MeanReadout
from .structures import cast_floats, example_tensor, input_count, only_tensor
from .time_axis import (
    Border,
    Readout,
    TimeAxis,
    Timed,
    call,
    carry_state,
    check_frames,
    prefixes,
    takes_events,
    time_axis,
)


def streamed(snn: nn.Module, *inputs: Tensor, chunk: int | Fit = 1) -> Tensor:
    """Return what ``snn`` answers in eval mode, computed ``chunk`` steps at a time, without gradients.

    Memory is that of ``chunk`` steps, whatever T is; each site keeps its state from chunk to chunk.

    Args:
        snn: a converted network, deployed or not.
        *inputs: as ``snn`` takes them: [N, *F] each, or [T, N, *F] for a network converted with ``EventFrames()``.
        chunk: how many steps run at once; T need not be a multiple of it. Or ``Fit()``: as many samples, else steps,
            as fit into memory.

    Returns:
        The mean over time, [N, *out]: ``snn(*inputs)`` up to rounding.

    Raises:
        ArgumentError: if ``snn`` is not a converted network, its readout is not the mean, ``chunk`` is below 1, or
            the free memory is asked for and unknown.

    >>> from lmh.convert import load
    >>> snn, x = load("zoo:digits-cnn-t4"), torch.rand(2, 1, 8, 8)
    >>> torch.allclose(streamed(snn, x), snn(x), atol=1e-5)
    True
    """
    time = _mean_over_time("streamed", snn, inputs)
    if not isinstance(chunk, Fit):
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise ArgumentError(
                f"streamed: chunk is {chunk!r}; expected a whole number of steps, at least 1, or Fit()."
            )
        return _in_chunks(snn, inputs, time.timesteps, chunk)
    with _answering(snn, carry=False):
        part = part_of(snn, inputs, chunk)
    axis = 1 if takes_events(snn) else 0
    pieces = zip(*(x.split(part.samples, axis) for x in inputs), strict=True)
    return torch.cat([_in_chunks(snn, piece, time.timesteps, part.steps) for piece in pieces])


def _in_chunks(snn: nn.Module, inputs: Sequence[Tensor], timesteps: int, chunk: int) -> Tensor:
    """Return the answer after T steps, run in chunks of steps."""
    answer = torch.empty(())
    with _answering(snn):
        for first in range(0, timesteps, chunk):
            answer = _go_on(snn, inputs, first, min(chunk, timesteps - first))
    return answer


@dataclass(frozen=True)
class Exits:
    """What :func:`early_exit` answers.

    Attributes:
        outputs: the answer after the steps that a sample ran, [N, classes].
        steps: how many these were, [N], whole numbers from 1 to T.
    """

    outputs: Tensor
    steps: Tensor


def early_exit(snn: nn.Module, *inputs: Tensor, confidence: float) -> Exits:
    """Run step by step in eval mode and stop each sample as soon as it is sure.

    A sample leaves the batch after step t if the largest probability of its answer after steps 1…t is at least
    ``confidence``, and after step T in any case; the rest goes on without it. Probabilities are the softmax of the
    answer, or the answer itself where the network ends in a softmax.

    Args:
        snn: a converted network that returns logits [N, classes] or their softmax, deployed or not.
        *inputs: as ``snn`` takes them.
        confidence: from 0 to 1. :func:`exit_curve` shows what each costs.

    Raises:
        ArgumentError: if ``snn`` is not such a network, or ``confidence`` is out of range.

    >>> from lmh.convert import load
    >>> found = early_exit(load("zoo:digits-cnn-t4"), torch.rand(8, 1, 8, 8), confidence=0.9)
    >>> found.outputs.shape, bool((found.steps <= 4).all())
    (torch.Size([8, 10]), True)
    """
    time, events = _mean_over_time("early_exit", snn, inputs), takes_events(snn)
    certainty = _certainty("early_exit", snn)
    _check_confidence("early_exit", confidence)
    axis = 1 if events else 0
    count = inputs[0].shape[axis]
    left = torch.arange(count, device=inputs[0].device)
    steps = torch.zeros(count, dtype=torch.int64, device=left.device)
    answers: list[Tensor] = []
    with _answering(snn):
        for t in range(1, time.timesteps + 1):
            answer = _go_on(snn, inputs, t - 1, 1)
            _check_logits("early_exit", answer)
            stays = certainty(answer) < confidence if t < time.timesteps else torch.zeros_like(left).bool()
            answers.append(answer.new_zeros(count, answer.shape[1]).index_copy(0, left[~stays], answer[~stays]))
            steps[left[~stays]] = t
            left = left[stays]
            if len(left) == 0:
                break
            inputs = tuple(x[:, stays] if events else x[stays] for x in inputs)
            for module in snn.modules():
                if isinstance(module, Timed):
                    module.keep_samples(stays)
    return Exits(torch.stack(answers).sum(0), steps)


@dataclass(frozen=True)
class ExitPoint:
    """What leaving early at a confidence gives.

    Attributes:
        confidence: at which a sample leaves.
        steps: the mean number of steps that ran.
        accuracy: a fraction of 1.
        samples: n.
    """

    confidence: float
    steps: float
    accuracy: float
    samples: int


def exit_curve(snn: nn.Module, data: Iterable[Any], confidences: Sequence[float]) -> tuple[ExitPoint, ...]:
    """Return the accuracy against the mean number of steps for :func:`early_exit`, from one run of all T steps.

    Args:
        snn: as for :func:`early_exit`.
        data: labelled batches (x, y), for several inputs (x1, …, xk, y).
        confidences: each from 0 to 1.

    Raises:
        ArgumentError: as :func:`early_exit`.
        DataError: if the data gives no sample or has no labels.

    >>> from lmh import zoo
    >>> from lmh.convert import load
    >>> test = zoo.Batches(zoo.load_data("digits").test, zoo.card("digits-cnn").preprocessing)
    >>> sure, surer = exit_curve(load("zoo:digits-cnn-t4"), test, [0.5, 0.99])
    >>> sure.steps < surer.steps <= 4
    True
    """
    _mean_over_time("exit_curve", snn)
    certainty = _certainty("exit_curve", snn)
    for confidence in confidences:
        _check_confidence("exit_curve", confidence)
    like = example_tensor(snn)
    steps, right, samples = [0.0] * len(confidences), [0] * len(confidences), 0
    with _answering(snn, carry=False):
        for batch in data:
            inputs, labels = split_batch("exit_curve: data", batch, input_count(snn))
            if labels is None:
                raise DataError("exit_curve: the data has no labels; expected batches (x, y). Pass labelled data.")
            answers = only_tensor(prefixes(snn, *(x.to(like) for x in inputs)), "exit_curve")
            _check_logits("exit_curve", answers[0])
            labels = check_labels("exit_curve: data", labels, answers.shape[1]).to(answers.device)
            sure = certainty(answers)
            samples += len(labels)
            for index, confidence in enumerate(confidences):
                leaves = sure >= confidence
                leaves[-1] = True
                first = leaves.int().argmax(0)
                chosen = answers.argmax(2).gather(0, first[None])[0]
                steps[index] += float((first + 1).sum())
                right[index] += int((chosen == labels).sum())
    if samples == 0:
        raise DataError("exit_curve: the data gave no batch; expected at least one sample. Check the data set.")
    return tuple(
        ExitPoint(confidence, steps[index] / samples, right[index] / samples, samples)
        for index, confidence in enumerate(confidences)
    )


@contextmanager
def _answering(snn: nn.Module, *, carry: bool = True) -> Iterator[None]:
    """In eval mode and without gradients, from chunk to chunk; every module is as before afterwards."""
    with in_eval_mode(snn), torch.no_grad(), carry_state(snn) if carry else nullcontext():
        yield


def _go_on(snn: nn.Module, inputs: Sequence[Tensor], first: int, steps: int) -> Tensor:
    """Run some steps and return the answer after all steps so far, [N, *out]."""
    if takes_events(snn):
        inputs = [x[first : first + steps] for x in inputs]
    with call(time_axis(snn), Readout.RUNNING, steps):
        return only_tensor(snn(*inputs), "the network")


def _certainty(where: str, snn: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what gives the largest probability in answers [..., classes], by what the network ends in."""
    graph = next(module.graph for module in snn.modules() if isinstance(module, fx.GraphModule))
    last = next(node for node in graph.nodes if node.op == "output").all_input_nodes[-1]
    while (
        last.target is cast_floats
        or isinstance(module_of(last), Border)
        or kind_of(last) is Kind.OUTPUT
        or follows_readout(last)
    ):
        last = last.all_input_nodes[0]
    if kind_of(last) is not Kind.READOUT or (name := readout_name(last)) == "log_softmax":
        return lambda answers: answers.softmax(-1).amax(-1)
    if name == "softmax":
        return lambda answers: answers.amax(-1)
    raise ArgumentError(
        f"{where}: the network ends in {name}; expected logits [N, classes], or a softmax of them. Convert the network "
        "without its last layer."
    )


def _mean_over_time(where: str, snn: nn.Module, inputs: Sequence[Tensor] = ()) -> TimeAxis:
    time = time_axis(snn)
    if takes_events(snn):
        for x in inputs:
            check_frames(x, time.timesteps)
    if not isinstance(time.average, MeanReadout):
        raise ArgumentError(
            f"{where}: the network's readout is {time.average}; expected the mean over time. "
            "Convert it with MeanReadout()."
        )
    return time


def _check_confidence(where: str, confidence: float) -> None:
    if not 0 <= confidence <= 1:
        raise ArgumentError(f"{where}: confidence is {confidence!r}; expected a probability from 0 to 1, such as 0.9.")


def _check_logits(where: str, outputs: Tensor) -> None:
    if outputs.ndim != 2:
        raise ArgumentError(
            f"{where}: the network returns {['N', *outputs.shape[1:]]}; expected logits [N, classes]. Wrap it in a "
            "module that flattens its output."
        )
