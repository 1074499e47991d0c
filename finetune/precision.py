"""In which numbers a network is trained, as a type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ArgumentError


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
        if device.type == "cuda":
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            supported = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if not supported:
            raise ArgumentError(
                f"BFloat16: this {device.type} does not compute in bfloat16; expected a CPU with AVX-512 or a GPU from "
                "2020 on. Use Float32(), on the command line leave --amp out."
            )

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context in which losses are computed."""
        return torch.autocast(device.type, torch.bfloat16)


Precision = Float32 | BFloat16


@contextmanager
def stored_for(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Store the weights in the order that the precision asks for, for the length of the block."""
    if not precision.channels_last:
        yield
        return
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        yield
    finally:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def stored_input(x: Tensor, precision: Precision) -> Tensor:
    """Return images in the order that the precision asks for, other signals as they are."""
    if precision.channels_last and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def widened(outputs: Tensor) -> Tensor:
    """Return 16-bit outputs in float32, for losses; others as they are."""
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs
