"""Refit: after ReLUs stand in for other activations, BatchNorm and biases are set so that layers agree again."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import CalibrationError
from ..op_table import BATCHNORM_MODULES, SYNAPSE_MODULES, Kind
from ..ops import kind_of, module_of
from ..qcfs import QCFS
from ..records import Prepared
from .layers import LEAST_SCALE

RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Hardtanh, QCFS)


def stand_ins(prepared: Prepared) -> list[str]:
    """Return the activations that become neurons without being rectifiers, by path.

    >>> from lmh.convert import ReluSurgery, prepare
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 8), nn.ReLU())
    >>> stand_ins(prepare(net, (4,), surgery=ReluSurgery()))
    ['1']
    """
    return [path for path in prepared.spiking if not _rectifies(prepared.model.get_submodule(path))]


def _rectifies(activation: nn.Module) -> bool:
    return type(activation) in RECTIFIERS and getattr(activation, "min_val", 0) == 0


def refit(prepared: Prepared, *images: Tensor) -> Prepared:
    """Put ReLUs where neurons will stand in for other activations, and make the layers behind agree again (ours).

    Both networks run side by side over one batch, node by node from input to output. Behind each layer the mean
    of every channel is compared, behind each BatchNorm its deviation too, and the new network's BatchNorm
    statistics or bias are set so that they are the old network's; later layers see the corrected earlier ones.
    Weights, and layers that have neither BatchNorm nor bias, stay as they are.

    Args:
        prepared: from :func:`lmh.convert.prepare` with surgery; not changed.
        images: one batch [N, *F] as the network takes it, for several inputs one of each; the more samples, the less
            noise. Labels are not needed.

    Returns:
        The network with ReLUs in the place of the stand-ins; ``prepared`` itself where there are none.

    Raises:
        CalibrationError: if the images are not finite, or fewer than two.

    >>> from lmh.convert import ReluSurgery, prepare
    >>> prepared = prepare(nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2)), (4,), surgery=ReluSurgery())
    >>> x = torch.randn(64, 4)
    >>> again = refit(prepared, x)
    >>> torch.allclose(again.model(x).mean(0), prepared.model(x).mean(0), atol=1e-5)
    True
    """
    paths = stand_ins(prepared)
    if not paths:
        return prepared
    if not images or len(images[0]) < 2 or not all(torch.isfinite(x).all() for x in images):
        raise CalibrationError(
            f"refit: {len(images[0]) if images else 'no'} images came, or values that are not finite; expected two or "
            "more."
        )
    model = copy.deepcopy(prepared.model)
    for path in paths:
        model.set_submodule(path, nn.ReLU())
    parameter = next(model.parameters(), torch.empty(()))
    with torch.no_grad():
        _Lockstep(prepared.model, model).run(*(x.to(parameter) for x in images))
    return replace(prepared, model=model)


class _Lockstep(fx.Interpreter):
    """Runs the old network, and the new one a node behind it, correcting the new one on the way."""

    def __init__(self, old: fx.GraphModule, new: fx.GraphModule) -> None:
        super().__init__(old)
        self.new = fx.Interpreter(new)
        self.twins = dict(zip(old.graph.nodes, new.graph.nodes, strict=True))

    def run(self, *args: Any, **options: Any) -> Any:
        self.new.args_iter = iter(args)
        return super().run(*args, **options)

    def run_node(self, n: fx.Node) -> Any:
        expected = super().run_node(n)
        twin = self.twins[n]
        got = self.new.run_node(twin)
        if _corrects(twin) and _correct(module_of(twin), got, expected):
            got = self.new.run_node(twin)
        self.new.env[twin] = got
        self._forget(n)
        return expected

    def _forget(self, n: fx.Node) -> None:
        """Free what nothing later reads, as the old network's side does."""
        for node in self.user_to_last_uses.get(n, []):
            self.new.env.pop(self.twins[node], None)


def _corrects(node: fx.Node) -> bool:
    """Whether a layer is corrected itself, and not by a BatchNorm that alone reads it."""
    module = module_of(node)
    if isinstance(module, BATCHNORM_MODULES):
        return True
    readers = [module_of(user) for user in node.users]
    behind = len(readers) == 1 and isinstance(readers[0], BATCHNORM_MODULES)
    return isinstance(module, SYNAPSE_MODULES) and kind_of(node) is Kind.SYNAPSE and not behind


def _correct(layer: Any, got: Tensor, expected: Tensor) -> bool:
    """Move a layer's outputs to the expected mean (and deviation) of each channel; False if nothing can be moved."""
    axis = got.ndim - 1 if isinstance(layer, nn.Linear) else 1
    others = [other for other in range(got.ndim) if other != axis]
    shift = expected.mean(others) - got.mean(others)
    if not isinstance(layer, BATCHNORM_MODULES):
        if layer.bias is None:
            return False
        layer.bias += shift
        return True
    if layer.running_mean is None or layer.running_var is None:
        return False
    scale = layer.weight if layer.weight is not None else torch.ones_like(layer.running_mean)
    bias = layer.bias if layer.bias is not None else torch.zeros_like(layer.running_mean)
    ratio = (expected.std(others) / got.std(others).clamp_min(1e-12)).clamp(0.1, 10.0)
    deviation = (layer.running_var + layer.eps).sqrt()
    movable = scale.abs() > LEAST_SCALE
    safe = torch.where(movable, scale, 1.0)
    received = layer.running_mean + (got.mean(others) - bias) * deviation / safe
    narrower = deviation / ratio
    mean = received - (expected.mean(others) - bias) * narrower / safe
    layer.running_mean.copy_(torch.where(movable, mean, layer.running_mean))
    layer.running_var.copy_(torch.where(movable, (narrower.square() - layer.eps).clamp_min(0), layer.running_var))
    return True
