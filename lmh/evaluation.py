"""Run a spiking network over data and measure it: accuracy at every t, firing rates, work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .arguments import check_batches, check_labels, check_network, split_batch
from .energy import analog_macs, binary_nodes, dense_macs, fan_out, tail_nodes
from .errors import ArgumentError, DataError
from .eval_mode import in_eval_mode
from .op_table import Kind
from .ops import kind_of, label, module_of, signal_input
from .records import Evaluation, LayerWork
from .spiking import SpikingSite
from .structures import example_tensor, input_count, only_tensor
from .time_axis import Readout, Timed, call, takes_events, time_axis


class Outputs(NamedTuple):
    """What a batch came to.

    Attributes:
        inputs: as they were given, [N, *F] each; [T, N, *F] for event frames.
        labels: [N], or None.
        snn: the answer after t = 1…T steps, [T, N, classes].
        ann: [N, classes], or None without ANN.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor | None
    snn: Tensor
    ann: Tensor | None


def evaluate(
    snn: fx.GraphModule,
    data: Iterable[Any] | Tensor,
    *,
    ann: nn.Module | None = None,
    on_batch: Callable[[int], None] | None = None,
    on_outputs: Callable[[Outputs], None] | None = None,
) -> Evaluation:
    """Measure a converted network, beside its source ANN where one is given.

    Args:
        snn: from :func:`lmh.convert.convert` or :func:`lmh.convert.load`; not changed, run in eval mode.
        data: batches (x, y), or x alone where there are no labels, or one tensor; x as the network takes it,
            floating and normalised, y whole numbers [N]. For a network with k inputs, (x1, …, xk, y).
        ann: the source, for its accuracy and for how far the outputs are apart.
        on_batch: told the number of samples done.
        on_outputs: given what every batch came to.

    Returns:
        Accuracies are fractions of 1; one entry for each t = 1…T.

    Raises:
        ArgumentError: if ``snn`` is not a converted graph or returns several tensors, or the batches are of another
            form.
        DataError: if the data gives no sample, or labels beyond the network's outputs.

    >>> from lmh import zoo
    >>> from lmh.convert import load
    >>> digits = zoo.load_data("digits").test
    >>> batches = zoo.Batches(digits, zoo.card("digits-cnn").preprocessing)
    >>> result = evaluate(load("zoo:digits-cnn-t4"), batches, ann=zoo.load("digits-cnn"))
    >>> result.samples, len(result.snn_accuracy), result.snn_accuracy[-1] > 0.95
    (360, 4, True)
    """
    check_network("evaluate: snn", snn)
    time = time_axis(snn)
    if not isinstance(snn, fx.GraphModule):
        raise ArgumentError(f"evaluate: got {type(snn).__name__}; expected the fx.GraphModule that convert returned.")
    events = takes_events(snn)
    if ann is not None:
        check_network("evaluate: ann", ann)
    inputs = input_count(snn)
    if isinstance(data, Tensor):
        split_batch("evaluate: data", data, inputs)
        data = list(data.split(128, dim=1 if events else 0))
    check_batches("evaluate: data", data)
    score, counter = _Score(time.timesteps), _Counter(snn, time.timesteps, events)
    like = example_tensor(snn)
    with in_eval_mode(snn, ann), torch.no_grad(), call(time, Readout.PREFIXES, None):
        for batch in data:
            given, y = split_batch("evaluate: data", batch, inputs)
            count = given[0].shape[1 if events else 0]
            if y is not None:
                y = check_labels("evaluate: data", y, count).to(like.device)
            if not all(torch.isfinite(x).all() for x in given):
                raise DataError("the data holds NaN or infinite values; expected finite ones. Check the images.")
            outputs = only_tensor(counter.count(tuple(x.to(like) for x in given), count), "evaluate")
            answers = None if ann is None else _ann_outputs(ann, given, events)
            score.add(outputs, y, answers)
            if on_outputs is not None:
                on_outputs(Outputs(given, y, outputs, answers))
            if on_batch is not None:
                on_batch(score.samples)
    if score.samples == 0:
        raise DataError("evaluate: the data gave no batch; expected at least one sample. Check the data set.")
    return score.result(counter)


def _ann_outputs(ann: nn.Module, inputs: Sequence[Tensor], events: bool) -> Tensor:
    inputs = [x.to(example_tensor(ann)) for x in inputs]
    if not events:
        return only_tensor(ann(*inputs), "evaluate")
    outputs = only_tensor(ann(*(x.flatten(0, 1) for x in inputs)), "evaluate")
    return outputs.unflatten(0, inputs[0].shape[:2]).mean(0)


class _Score:
    """Sums over batches of what the outputs say."""

    def __init__(self, timesteps: int) -> None:
        self.samples = self.labelled = self.compared = self.ann_correct = 0
        self.correct = torch.zeros(timesteps, dtype=torch.int64)
        self.agreed = torch.zeros(timesteps, dtype=torch.int64)
        self.distance = self.norm = 0.0

    def add(self, outputs: Tensor, labels: Tensor | None, ann: Tensor | None) -> None:
        """Take outputs [T, N, C], labels [N] and the ANN's outputs [N, C] of a batch."""
        if outputs.ndim != 3:
            raise DataError(
                f"the network returns {['N', *outputs.shape[2:]]}; expected [N, classes]. Wrap it in a module that "
                "flattens its output, or measure it with lmh.prefixes yourself."
            )
        chosen = outputs.argmax(-1)
        count = outputs.shape[1]
        self.samples += count
        if labels is not None:
            if int(labels.max()) >= outputs.shape[-1]:
                raise DataError(
                    f"a label is {int(labels.max())} and the network has {outputs.shape[-1]} outputs; expected labels "
                    "below that. Use the data set that the network was made for."
                )
            self.labelled += count
            self.correct += (chosen == labels).sum(1).cpu()
        if ann is not None:
            self.compared += count
            self.agreed += (chosen == ann.argmax(-1)).sum(1).cpu()
            self.distance += float((outputs[-1] - ann).flatten(1).norm(dim=1).sum())
            self.norm += float(ann.flatten(1).norm(dim=1).sum())
            if labels is not None:
                self.ann_correct += int((ann.argmax(-1) == labels).sum())

    def result(self, counter: _Counter) -> Evaluation:
        """Return the means."""

        def over(counts: Tensor, n: int) -> tuple[float, ...] | None:
            return tuple((counts.double() / n).tolist()) if n else None

        return Evaluation(
            samples=self.samples,
            snn_accuracy=over(self.correct, self.labelled),
            ann_accuracy=self.ann_correct / self.labelled if self.compared and self.labelled else None,
            agreement=over(self.agreed, self.compared),
            output_error=self.distance / self.norm if self.norm else None,
            firing_rate=counter.firing_rates(),
            channel_rate=counter.channel_rates(),
            layers=counter.layers(self.samples),
            uncounted=tuple(counter.uncounted),
        )


class _Counter(fx.Interpreter):
    """Runs the network node by node and counts spikes, SynOps and multiply-accumulates."""

    def __init__(self, snn: fx.GraphModule, timesteps: int, events: bool) -> None:
        super().__init__(snn)
        self.frames = timesteps if events else 1
        self.binary, self.tail = binary_nodes(snn), tail_nodes(snn)
        self.spikes: dict[str, Tensor] = {}
        self.chances: dict[str, int] = {}
        self.fan_outs: dict[tuple[fx.Node, torch.Size], Tensor] = {}
        self.accumulates: dict[fx.Node, float] = {}
        self.macs: dict[fx.Node, float] = {}
        self.ann_macs: dict[fx.Node, float] = {}
        self.analog: dict[tuple[fx.Node, Any], float] = {}
        self.uncounted: dict[str, None] = {}
        self.batch = 0

    def count(self, inputs: Sequence[Tensor], batch: int) -> Any:
        """Run a batch of ``batch`` samples and return the network's output."""
        self.batch = batch
        return self.run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_module" and isinstance(self.submodules[str(n.target)], SpikingSite):
            path = str(n.target)
            fired = torch.count_nonzero(value, [axis for axis in range(value.ndim) if axis != 1])
            self.spikes[path] = self.spikes[path] + fired if path in self.spikes else fired
            self.chances[path] = self.chances.get(path, 0) + value.numel() // value.shape[1]
        elif kind_of(n) is Kind.SYNAPSE:
            self._count_work(n, self.env[signal_input(n)], value)
        elif kind_of(n) is Kind.UNKNOWN and not isinstance(module_of(n), Timed):
            self._count_analog(n, value)
        return value

    def _count_analog(self, node: fx.Node, value: Any) -> None:
        """Count what a kept node multiplies, by its shapes in the first batch of samples of this size."""
        entries = next((len(leaf) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.ndim), 0)
        if entries == 0:
            return
        inputs = self.fetch_args_kwargs_from_env(node)
        key = node, tuple(leaf.shape[1:] for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
        if key not in self.analog:
            call = partial(getattr(self, node.op), node.target)
            work = analog_macs(lambda *args, **kwargs: call(args, kwargs), module_of(node), inputs)
            if work is None:
                self.uncounted[label(node)] = None
            self.analog[key] = (work or 0.0) / entries
        if self.analog[key]:
            _add(self.ann_macs, node, self.analog[key] * self.frames * self.batch)
            _add(self.macs, node, self.analog[key] * entries)

    def _count_work(self, node: fx.Node, x: Tensor, value: Tensor) -> None:
        dense = dense_macs(node, x, value)
        _add(self.ann_macs, node, dense * self.frames * self.batch)
        if signal_input(node) in self.binary:
            key = node, x.shape[1:]
            if key not in self.fan_outs:
                self.fan_outs[key] = fan_out(node, x)
            work = float(((x != 0).sum(0) * self.fan_outs[key]).sum(dtype=torch.float64))
            _add(self.accumulates, node, work)
        else:
            times = 1 if node in self.tail else len(value) / self.batch
            _add(self.macs, node, dense * times * self.batch)

    def firing_rates(self) -> dict[str, float]:
        """Return mean spikes per neuron and step, by site."""
        return {path: int(spikes.sum()) / (self.chances[path] * len(spikes)) for path, spikes in self.spikes.items()}

    def channel_rates(self) -> dict[str, tuple[float, ...]]:
        """Return the same of every channel."""
        return {path: tuple((spikes.double() / self.chances[path]).tolist()) for path, spikes in self.spikes.items()}

    def layers(self, samples: int) -> tuple[LayerWork, ...]:
        """Return the work of each weighted layer and kept node for one sample."""
        return tuple(
            LayerWork(
                label(node),
                self.ann_macs[node] / samples,
                self.accumulates.get(node, 0.0) / samples,
                self.macs.get(node, 0.0) / samples,
            )
            for node in self.ann_macs
        )


def _add(sums: dict[fx.Node, float], node: fx.Node, work: float) -> None:
    sums[node] = sums.get(node, 0.0) + work
