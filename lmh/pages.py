"""What becomes of freed memory: kept by the process, which is fast, or given back, which is small.

glibc gives every block of 32 MiB or more back to the kernel when it is freed, and the next one is cleared page by page
as it is first touched. A spiking network allocates such blocks all the time, T times as large as those of its ANN, and
then spends more time on pages than on neurons. So the commands keep what is freed. But a heap that is kept is cut into
pieces: torch asks for aligned blocks, and the next one of the same size does not fit where the last one was. Where
memory is short, every large block gets pages of its own, and gives them back.
"""

from __future__ import annotations

import ctypes
import os
import sys

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Lets torch ask for pages of 2 MiB, which cost less than 512 small ones; it looks when it first allocates."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST, _MOST_BEFORE_2_35 = 2**31 - 1, 2**25
_LARGE = 2**18


def keep_freed_memory() -> bool:
    """Let the C library keep freed blocks of up to 2 GiB for the next allocation (32 MiB before glibc 2.35).

    Returns whether it does.

    Holds until :func:`return_freed_memory` is called, and the process stays at its peak. Only glibc has the setting.

    >>> isinstance(keep_freed_memory(), bool)
    True
    """
    kept = any(_set(_MMAP_THRESHOLD, size) for size in (_MOST, _MOST_BEFORE_2_35))
    return _set(_TRIM_THRESHOLD, _MOST) and kept


def return_freed_memory() -> bool:
    """Let the C library give blocks of 256 KiB or more back when they are freed; returns whether it does.

    What is free now is given back at once. Called before any tensor is made, it also asks for huge pages, unless the
    environment decides that. Holds until :func:`keep_freed_memory` is called. Only glibc has the setting.

    >>> isinstance(return_freed_memory(), bool)
    True
    >>> _ = keep_freed_memory()
    """
    if not (_set(_MMAP_THRESHOLD, _LARGE) and _set(_TRIM_THRESHOLD, _LARGE)):
        return False
    os.environ.setdefault(HUGE_PAGES, "1")
    ctypes.CDLL(None).malloc_trim(0)
    return True


def _set(option: int, value: int) -> bool:
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    return set_option is not None and set_option(option, value) == 1
