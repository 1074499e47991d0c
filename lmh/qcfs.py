"""QCFS: the quantised clip-floor-shift activation, the ANN side of the neuron (Bu et al., ICLR 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .errors import ArgumentError
from .kernels import Kernel, choose, program
from .memory_order import Order

RAW_LIMIT = 60.0


def positive(base: Tensor, raw: Tensor) -> Tensor:
    """θ = θ₀ exp(raw), the learnable threshold (ours): raw = 0 gives θ₀ exactly, and no raw value gives 0 or infinity.

    Args:
        base: θ₀ > 0, any shape.
        raw: the parameter, broadcast against ``base``; without unit, taken from −60 to 60.
    """
    return base * raw.clamp(-RAW_LIMIT, RAW_LIMIT).exp()


def quantize(x: Tensor, v_threshold: Tensor, levels: int) -> Tensor:
    """q(x) = θ clip(⌊x L/θ + 1/2⌋, 0, L)/L, with the gradient passed straight through the floor.

    So dq/dx = 1 for 0 ≤ x ≤ θ, else 0, and dq/dθ = q/θ − x/θ for 0 ≤ x ≤ θ, else q/θ; the backward pass keeps x and θ
    alone. With L = T, v_init = θ/2, the IF preset and a constant current x this is the neuron's mean output.

    Args:
        x: pre-activation, any shape. 16-bit values are quantised in float32.
        v_threshold: θ > 0, broadcast against ``x``, in its unit.
        levels: L ≥ 1.

    Returns:
        The quantised activation, shape of ``x``.

    >>> quantize(torch.tensor([-1.0, 0.3, 0.6, 9.0]), torch.tensor(1.0), 4)
    tensor([0.0000, 0.2500, 0.5000, 1.0000])
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        share = (_single(x) / v_threshold).clamp(0, 1)
        return (v_threshold * (share + (_share(levels, share) - share).detach())).to(x.dtype)
    if torch.is_grad_enabled() and (x.requires_grad or v_threshold.requires_grad):
        return _Quantize.apply(x, v_threshold, levels)
    return _quantized(levels, x.dtype, x, v_threshold)


def _single(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _share(levels: int, ratio: Tensor) -> Tensor:
    """q/θ from x/θ."""
    return (ratio.clamp(0, 1) * levels + 0.5).floor() / levels


def _quantized(levels: int, dtype: torch.dtype, x: Tensor, theta: Tensor) -> Tensor:
    return (theta * _share(levels, _single(x) / theta)).to(dtype)


def _slopes(levels: int, columns: bool, grad: Tensor, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient by x, and the terms of the one by θ, summed over the columns where all of them share a θ."""
    ratio = _single(x) / theta
    inside = (ratio >= 0) & (ratio <= 1)
    terms = grad * (_share(levels, ratio) - torch.where(inside, ratio, 0))
    return torch.where(inside, grad, 0).to(x.dtype), terms.sum(-1, keepdim=True) if columns else terms


class _Quantize(torch.autograd.Function):
    """:func:`quantize` with its backward pass written out, compiled where the work is worth it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v_threshold: Tensor, levels: int) -> Tensor:
        ctx.save_for_backward(x, v_threshold)
        ctx.levels = levels
        compiled = choose(x, steps=1, training=True) is Kernel.COMPILED
        ctx.order = _order(x, v_threshold) if compiled else None
        if ctx.order is None:
            return _quantized(levels, x.dtype, x, v_threshold)
        theta = ctx.order.write_out(_squeezed(v_threshold))
        return ctx.order.restore(program(_quantized, levels, x.dtype)(ctx.order.flatten(x), theta))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        x, v_threshold = ctx.saved_tensors
        order: Order | None = ctx.order
        if order is None:
            by_x, terms = _slopes(ctx.levels, False, grad, x, v_threshold)
            return by_x, terms.sum_to_size(v_threshold.shape), None
        theta = _squeezed(v_threshold)
        tensors = (order.flatten(grad), order.flatten(x), order.write_out(theta))
        by_x, terms = program(_slopes, ctx.levels, tensors[-1].shape[-1] == 1)(*tensors)
        return order.restore(by_x), order.sum_up(terms, theta.ndim).reshape(v_threshold.shape), None


def _squeezed(theta: Tensor) -> Tensor:
    """θ as [] or [C]."""
    return theta.reshape(() if theta.numel() == 1 else -1)


def _order(x: Tensor, theta: Tensor) -> Order | None:
    """Return how x lies in memory; None where no compiled program is made for it."""
    if x.ndim == 0:
        return None
    order = Order.of(x)
    if not (order.channels_last or x.is_contiguous()):
        return None
    if theta.numel() > 1 and (x.ndim < 2 or theta.shape != (x.shape[1], *[1] * (x.ndim - 2))):
        return None
    return order


def _numbers(value: float | Tensor) -> object:
    return value.tolist() if isinstance(value, Tensor) else value


class QCFS(nn.Module):
    """The QCFS activation as a module, with θ learnable and kept positive: θ = θ₀ exp(raw).

    Args:
        levels: L, the number of quantisation steps.
        v_threshold: θ₀ at the start, or [channels] of them. The authors start at 8.
        channels: one θ for each channel (axis 1) instead of one for the layer; not needed where ``v_threshold`` has
            one for each.

    Shapes: any [N, *F] or, with ``channels``, [N, channels, *F]; the output has the input's shape.

    >>> QCFS(levels=4, v_threshold=1.0)(torch.tensor([0.3])).item()
    0.25
    """

    def __init__(self, levels: int = 4, v_threshold: float | Tensor = 8.0, channels: int | None = None) -> None:
        super().__init__()
        if levels < 1:
            raise ArgumentError(f"QCFS: levels is {levels}; expected at least 1.")
        theta = torch.as_tensor(v_threshold).detach().float()
        if not bool(((theta > 0) & theta.isfinite()).all()):
            raise ArgumentError(f"QCFS: v_threshold is {_numbers(v_threshold)}; expected a finite number above 0.")
        shape = tuple(theta.shape) if channels is None else (channels,)
        if theta.ndim > 1 or (theta.ndim == 1 and shape != tuple(theta.shape)):
            raise ArgumentError(
                f"QCFS: v_threshold has shape {list(theta.shape)} and channels is {channels}; expected [] or "
                f"[{channels or 'channels'}]. Pass one θ, or one for each channel."
            )
        self.levels = levels
        self.base_threshold: Tensor
        self.register_buffer("base_threshold", theta.expand(shape).clone())
        self.raw_threshold = nn.Parameter(torch.zeros(shape, device=theta.device))

    @property
    def v_threshold(self) -> Tensor:
        """θ, a scalar or [channels], in the unit of the pre-activation."""
        return positive(self.base_threshold, self.raw_threshold)

    def forward(self, x: Tensor) -> Tensor:
        """Return q(x), shape of ``x``."""
        theta = self.v_threshold
        if theta.ndim:
            theta = theta.reshape(-1, *[1] * (x.ndim - 2))
        return quantize(x, theta, self.levels)

    def extra_repr(self) -> str:
        """Return L, for the module's repr."""
        return f"levels={self.levels}"
