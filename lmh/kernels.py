"""Which program runs the neurons of a site: chosen from the size of the work and the machine, and always visible.

    EAGER      lmh_step, once per step, under autograd
    FUSED      one autograd function over all steps that keeps only its input current (lmh/fused.py)
    COMPILED   the same function, its forward and its backward each compiled by torch.compile

The default for training is FUSED, and COMPILED for currents of at least :data:`WORTH_COMPILING` values where a compiler
exists; without gradients it is EAGER. The choice depends on nothing else, so a run that is resumed repeats it.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentError

WORTH_COMPILING = 2**20
MOST_COMPILED_STEPS = 16


class Kernel(Enum):
    """The program that runs the neurons; the value is the name that files and reports use."""

    EAGER = "eager"
    FUSED = "fused"
    COMPILED = "compiled"


_asked: ContextVar[Kernel | None] = ContextVar("kernel", default=None)


@contextmanager
def use_kernel(kernel: Kernel) -> Iterator[None]:
    """Run the neurons by ``kernel`` inside this block, whatever the size of the work.

    Where a network is traced (torch.compile, torch.export, torch.jit) the choice has no effect.

    Raises:
        ArgumentError: if ``COMPILED`` is asked for and there is no compiler.

    >>> with use_kernel(Kernel.FUSED):
    ...     choose(torch.zeros(4, 2), steps=4, training=False)
    <Kernel.FUSED: 'fused'>
    """
    if kernel is Kernel.COMPILED and not any(can_compile(device) for device in ("cpu", "cuda")):
        raise ArgumentError(
            "use_kernel: COMPILED was asked for, and torch.compile has no compiler here; expected a C++ compiler (g++, "
            "or the one that CXX names) or, for CUDA, Triton. Install one, or use Kernel.FUSED, which needs none."
        )
    token = _asked.set(kernel)
    try:
        yield
    finally:
        _asked.reset(token)


def choose(current: Tensor, *, steps: int, training: bool) -> Kernel:
    """Return the kernel for one call of a site.

    Args:
        current: all steps of it, or the one that a static site takes ``steps`` times.
        steps: how many steps the call runs.
        training: whether a gradient is wanted.

    >>> choose(torch.zeros(4, 2), steps=4, training=True)
    <Kernel.FUSED: 'fused'>
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return Kernel.EAGER
    asked = _asked.get()
    if asked is not None:
        return asked
    if not training:
        return Kernel.EAGER
    worth = current.numel() >= WORTH_COMPILING and steps <= MOST_COMPILED_STEPS
    return Kernel.COMPILED if worth and can_compile(current.device.type) else Kernel.FUSED


@functools.cache
def can_compile(device: str) -> bool:
    """Whether torch.compile has what it needs on this kind of device; found out once.

    >>> can_compile("meta")
    False
    """
    try:
        if device == "cuda":
            from torch.utils._triton import has_triton

            return has_triton()
        if device == "cpu":
            from torch._inductor.cpp_builder import get_cpp_compiler

            return bool(get_cpp_compiler())
    except (ImportError, RuntimeError, OSError):
        return False
    return False


class Program:
    """A function of tensors, compiled when first called, for any sizes.

    A failure to compile is reported once, as a warning, and the function runs as it is from then on.
    """

    def __init__(self, function: Callable[..., Any], *fixed: Any) -> None:
        def run(*tensors: Tensor) -> Any:
            return function(*fixed, *tensors)

        # torch.compile counts recompilations by code object, at most 8: programs that shared one would run out of them.
        own = types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)
        self.plain = run
        self.compiled: Callable[..., Any] | None = torch.compile(own, dynamic=True, fullgraph=True)

    def __call__(self, *tensors: Tensor) -> Any:
        """Run the function."""
        if self.compiled is not None:
            try:
                return self.compiled(*tensors)
            except _compiler_errors() as error:
                self.compiled = None
                warnings.warn(
                    f"the neuron could not be compiled ({type(error).__name__}: {str(error).splitlines()[0]}); it runs "
                    "uncompiled, slower and with the same result. use_kernel(Kernel.FUSED) asks for that.",
                    stacklevel=2,
                )
        return self.plain(*tensors)


def _compiler_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return TorchDynamoException, FailOnRecompileLimitHit


program = functools.cache(Program)


def programs() -> int:
    """Return how many programs this process has made; a network needs a few, however many sites it has."""
    return program.cache_info().currsize
