"""In which numbers a network is trained, as a type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..memory_order import store_weights
from ..records import plain_value


@dataclass(frozen=True)
class Float32:
    """Everything in the dtype of the weights, which is float32 unless the network was made otherwise.

    Attributes:
        channels_last: store images and activations as [N, H, W, C]; the values are the same up to rounding.
    """

    channels_last: bool = False

    def check(self, device: torch.device) -> None:
        """Every device computes in float32."""

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return a context that changes nothing."""
        return nullcontext()


@dataclass(frozen=True)
class BFloat16:
    """Convolutions and products in bfloat16 by autocast; weights, neuron states and validation in float32.

    Attributes:
        channels_last: as for :class:`Float32`; it is what CPUs and GPUs with bfloat16 units prefer.
    """

    channels_last: bool = True

    def check(self, device: torch.device) -> None:
        """Refuse a device that has no bfloat16.

        Raises:
            ArgumentError: saying what to use.
        """
        if not has_bfloat16(device):
            raise ArgumentError(
                f"BFloat16: this {device.type} does not compute in bfloat16; expected a CPU with AVX-512 or a GPU from "
                "2020 on. Use Float32(), on the command line leave --amp out."
            )

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context in which losses are computed."""
        return torch.autocast(device.type, torch.bfloat16)


Precision = Float32 | BFloat16
IN_FLOAT32 = "The recipe says bfloat16, which this device does not compute in: it is carried out in float32."


def has_bfloat16(device: torch.device) -> bool:
    """Tell whether a device has units that compute in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def in_float32(plain: Any) -> Any:
    """Return a recipe's plain values with float32 in place of bfloat16, in the same order of memory.

    >>> in_float32({"epochs": 3, "precision": {"type": "BFloat16"}})
    {'epochs': 3, 'precision': {'type': 'Float32', 'channels_last': True}}
    """
    if isinstance(plain, list):
        return [in_float32(item) for item in plain]
    if not isinstance(plain, Mapping):
        return plain
    if plain.get("type") == BFloat16.__name__:
        return plain_value(Float32(plain.get("channels_last", BFloat16().channels_last)))
    return {key: in_float32(value) for key, value in plain.items()}


@contextmanager
def stored_for(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Store the weights in the order that the precision asks for, for the length of the block."""
    if not precision.channels_last:
        yield
        return
    store_weights(model, channels_last=True)
    try:
        yield
    finally:
        store_weights(model, channels_last=False)


def stored_input(x: Tensor, precision: Precision) -> Tensor:
    """Return images in the order that the precision asks for, other signals as they are."""
    if precision.channels_last and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def widened(outputs: Tensor) -> Tensor:
    """Return 16-bit outputs in float32, for losses; others as they are."""
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs
