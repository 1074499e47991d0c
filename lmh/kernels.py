"""Which program runs the neurons of a site: chosen from the size of the work and the machine, and always visible.

    EAGER      lmh_step, step by step, under autograd
    FUSED      one autograd function over all steps, which keeps only what it was given (lmh/fused.py)
    COMPILED   the same function, its forward and its backward pass each compiled by torch.compile

Without gradients the neurons run by EAGER. With gradients, and in a deployed network (lmh/frozen.py), they run by
COMPILED where the current is large enough and a compiler exists, else by FUSED; trained ones from
:data:`WORTH_COMPILING` values on. Nothing else counts, so a run that is resumed chooses as before. Where torch.compile,
torch.export or torch.jit trace a network they see EAGER.

A compilation takes 5 to 30 s and is worth about 2 µs for every 1,000 values of current that are trained through. A
network needs a few, as sizes are no part of a program; torch keeps them on disk for the next process.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ArgumentError

WORTH_COMPILING = 2**19
MOST_COMPILED_STEPS = 16


class Kernel(Enum):
    """The program that runs the neurons; the value is its name in files and reports."""

    EAGER = "eager"
    FUSED = "fused"
    COMPILED = "compiled"


_asked: ContextVar[Kernel | None] = ContextVar("kernel", default=None)


@contextmanager
def use_kernel(kernel: Kernel) -> Iterator[None]:
    """Run the neurons by ``kernel`` inside this block, with or without gradients and whatever the size of the work.

    Raises:
        ArgumentError: if ``COMPILED`` is asked for and torch.compile has no compiler here.

    >>> with use_kernel(Kernel.FUSED):
    ...     choose(torch.zeros(4, 2), steps=4, training=False)
    <Kernel.FUSED: 'fused'>
    """
    if kernel is Kernel.COMPILED and not any(can_compile(device) for device in ("cpu", "cuda")):
        raise ArgumentError(
            "use_kernel: COMPILED was asked for and torch.compile has no compiler here; expected a C++ compiler (g++, "
            "or the one that CXX names), or Triton for CUDA. Install one, or use Kernel.FUSED, which needs none."
        )
    token = _asked.set(kernel)
    try:
        yield
    finally:
        _asked.reset(token)


def choose(current: Tensor, *, steps: int, training: bool, worth: int = WORTH_COMPILING) -> Kernel:
    """Return the kernel for one call of a site.

    Args:
        current: the current of all steps, or of the one that is taken ``steps`` times.
        steps: how many steps the call runs.
        training: whether a gradient is wanted.
        worth: how many values of current make a compilation worth it.

    >>> choose(torch.zeros(4, 2), steps=4, training=True), choose(torch.zeros(4, 2), steps=4, training=False)
    (<Kernel.FUSED: 'fused'>, <Kernel.EAGER: 'eager'>)
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return Kernel.EAGER
    asked = _asked.get()
    if asked is None and not training:
        return Kernel.EAGER
    plain = type(current) in (Tensor, nn.Parameter)
    large = current.numel() >= worth and steps <= MOST_COMPILED_STEPS
    if plain and can_compile(current.device.type) and (large if asked is None else asked is Kernel.COMPILED):
        return Kernel.COMPILED
    return Kernel.EAGER if asked is Kernel.EAGER else Kernel.FUSED


@contextmanager
def plainly(device: str) -> Iterator[None]:
    """Leave autograd and autocast out of this block: a pass needs neither, and would be compiled anew for each."""
    cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.no_grad(), torch.autocast(device, enabled=False) if cast else nullcontext():
        yield


@functools.cache
def can_compile(device: str) -> bool:
    """Whether torch.compile has what it needs on this kind of device; looked up once.

    >>> can_compile("meta")
    False
    """
    try:
        if device == "cpu":
            from torch._inductor.cpp_builder import get_cpp_compiler

            return bool(get_cpp_compiler())
        if device == "cuda":
            from torch.utils._triton import has_triton

            return has_triton()
    except (ImportError, RuntimeError, OSError):
        return False
    return False


class Program:
    """One pass over the neurons, or QCFS, compiled for any sizes when it is first called.

    Args:
        function: takes ``job``, ``variant`` and tensors.
        job: what the pass is made for. If it cannot be compiled, it runs as it is from then on; a warning says so once.
        variant: what of it is wanted.
    """

    def __init__(self, function: Callable[..., Any], job: Hashable, variant: Hashable) -> None:
        def run(*tensors: Tensor) -> Any:
            return function(job, variant, *tensors)

        # torch.compile allows a code object few recompilations; programs that share one would run out of them.
        own = types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)
        self.job = job
        self.plain = run
        self.compiled = torch.compile(own, fullgraph=True)

    def __call__(self, *tensors: Tensor) -> Any:
        """Run the pass."""
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        if not compiles(self.job):
            return self.plain(*tensors)
        _free_sizes(tensors)
        try:
            return self.compiled(*tensors)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            _failed.add(self.job)
            first = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"the neurons could not be compiled ({type(error).__name__}: {first}); they run uncompiled, which is "
                "slower and gives the same. use_kernel(Kernel.FUSED) asks for that from the start.",
                stacklevel=2,
            )
            return self.plain(*tensors)


def _free_sizes(tensors: Sequence[Tensor]) -> None:
    """Let what is compiled for these tensors serve any sizes of their last two axes.

    And nothing else: dynamic=True would free the numbers of the surrogate too, and compute with them anew for every
    neuron. Marked at every call, as any may compile: torch.export forgets what torch.compile had made.
    """
    from torch._dynamo import maybe_mark_dynamic

    for tensor in tensors:
        for axis in range(tensor.ndim)[-2:]:
            maybe_mark_dynamic(tensor, axis)


_failed: set[Hashable] = set()


def compiles(job: Hashable) -> bool:
    """Whether no compilation for ``job`` has failed so far."""
    return job not in _failed


program = functools.cache(Program)


def programs() -> int:
    """Return how many programs were compiled by this process so far.

    >>> programs() >= 0
    True
    """
    return program.cache_info().currsize
