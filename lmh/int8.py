"""Layers that read spikes as whole numbers: 0 and 1 in uint8, weights in int8, sums in int32.

A sum of weights that spikes choose has no rounding in int32, so the output is exact for the int8 weights, whose own
rounding is all that is lost: at most max|W_c|/254 for output channel c. The products are oneDNN's, on x86 CPUs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import ArgumentError

LEVELS = 127
Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def available() -> bool:
    """Whether torch has these layers' products here."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qconv_prepack")


class SpikeLayer(nn.Module, ABC):
    """W s + b for spikes s, with W = scale_c q for output channel c, q in −127 … 127 and scale_c = max|W_c|/127.

    Args:
        layer: whose weights, for spikes that are 0 and 1; not changed.
        dtype: of the output.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        weight = layer.weight.detach().double()
        largest = weight.abs().flatten(1).amax(1)
        scale = torch.where(largest > 0, largest / LEVELS, 1.0)
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", (weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).round().to(torch.int8))
        self.register_buffer("scale", scale.float())
        self.register_buffer("zeros", torch.zeros(len(scale), dtype=torch.int8))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())
        self.dtype = dtype
        self._packed: Tensor | None = None

    @abstractmethod
    def plain(self) -> nn.Conv2d | nn.Linear:
        """Return the layer with the same weights in float32."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave the packed weights out, which cannot be copied."""
        return {**self.__dict__, "_packed": None}

    @abstractmethod
    def _pack(self, shape: torch.Size) -> Tensor:
        """The weights as the product takes them, for inputs of a shape."""

    @abstractmethod
    def _product(self, spikes: Tensor, packed: Tensor) -> Tensor:
        """W s + b."""

    def forward(self, spikes: Tensor) -> Tensor:
        """Return W s + b in the layer's dtype, for s in uint8."""
        if spikes.device.type != "cpu":
            raise ArgumentError(
                f"spikes on {spikes.device} came to an int8 layer; expected them on a CPU, which alone has its "
                "product. Deploy the network without int8=True for other devices."
            )
        if self._packed is None:
            self._packed = self._pack(spikes.shape)
        return self._product(spikes, self._packed)


class SpikeConv2d(SpikeLayer):
    """A convolution of spikes, [N, C, H, W] → [N, C', H', W']; padding is with zeros."""

    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__(layer, dtype)
        self.form: tuple[Any, Any, Any, int] = (layer.stride, _padding(layer), layer.dilation, layer.groups)

    def plain(self) -> nn.Conv2d:
        """Return the convolution with the same weights in float32."""
        stride, padding, dilation, groups = self.form
        outputs, inputs, *kernel = self.weight.shape
        form = (stride, padding, dilation, groups, self.bias is not None)
        return _with_values(nn.Conv2d(inputs * groups, outputs, (kernel[0], kernel[1]), *form), self)

    def _pack(self, shape: torch.Size) -> Tensor:
        return torch.ops.onednn.qconv_prepack(self.weight, self.scale, 1.0, 0, *self.form, list(shape))

    def _product(self, spikes: Tensor, packed: Tensor) -> Tensor:
        return torch.ops.onednn.qconv_pointwise(
            spikes, 1.0, 0, packed, self.scale, self.zeros, self.bias, *self.form, 1.0, 0, self.dtype, "none", [], ""
        )


class SpikeLinear(SpikeLayer):
    """A linear layer of spikes, [N, …, F] → [N, …, F']."""

    def plain(self) -> nn.Linear:
        """Return the layer with the same weights in float32."""
        outputs, inputs = self.weight.shape
        return _with_values(nn.Linear(inputs, outputs, self.bias is not None), self)

    def _pack(self, shape: torch.Size) -> Tensor:
        return torch.ops.onednn.qlinear_prepack(self.weight, [math.prod(shape[:-1]), shape[-1]])

    def _product(self, spikes: Tensor, packed: Tensor) -> Tensor:
        return torch.ops.onednn.qlinear_pointwise(
            spikes, 1.0, 0, packed, self.scale, self.zeros, self.bias, 1.0, 0, self.dtype, "none", [], ""
        )


def _with_values(layer: Layer, source: SpikeLayer) -> Layer:
    weight = source.weight * source.scale.reshape(-1, *[1] * (source.weight.ndim - 1))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if source.bias is not None:
        layer.bias = nn.Parameter(source.bias.clone(), requires_grad=False)
    return layer


def int8_kind(layer: nn.Module | None) -> type[SpikeConv2d] | type[SpikeLinear] | None:
    """Return which of the two a layer can be made, None where it can be neither."""
    if layer is None or layer._forward_hooks:
        return None
    if type(layer) is nn.Linear:
        return SpikeLinear
    padded = type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and _padding(layer) is not None
    return SpikeConv2d if padded else None


class Thresholded(nn.Module):
    """θ s from s, for what reads the spikes and is no :class:`SpikeLayer`.

    Args:
        v_threshold: θ, [] or [C].
        dtype: of the output.
    """

    def __init__(self, v_threshold: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.theta: Tensor
        self.register_buffer("theta", v_threshold.detach().to(dtype))

    def forward(self, spikes: Tensor) -> Tensor:
        """Return θ s, of the shape of the spikes, [N, *F] or [N, C, *F]."""
        theta = self.theta
        return spikes * (theta.reshape(-1, *[1] * (spikes.ndim - 2)) if theta.ndim else theta)


def _padding(layer: nn.Conv2d) -> tuple[int, ...] | None:
    """The zeros on each side of every axis; None where the two sides differ."""
    if not isinstance(layer.padding, str):
        return layer.padding
    both = [d * (k - 1) * (layer.padding == "same") for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return None if any(zeros % 2 for zeros in both) else tuple(zeros // 2 for zeros in both)
