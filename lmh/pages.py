"""What becomes of freed memory: every command keeps it.

glibc gives every block of 32 MiB or more back to the kernel when it is freed, and the next one is cleared page by page
as it is first touched. A spiking network allocates such blocks all the time, T times as large as those of its ANN, and
then spends more time on pages than on neurons. Training has lmh/arena.py besides, which takes less memory.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST, _MOST_BEFORE_2_35 = 2**31 - 1, 2**25


def keep_freed_memory() -> bool:
    """Let the C library keep freed blocks of up to 2 GiB for the next allocation (32 MiB before glibc 2.35).

    Returns whether it does.

    Holds for the whole process, which stays at its peak. Only glibc has the setting.

    >>> isinstance(keep_freed_memory(), bool)
    True
    """
    kept = any(_set(_MMAP_THRESHOLD, size) for size in (_MOST, _MOST_BEFORE_2_35))
    return _set(_TRIM_THRESHOLD, _MOST) and kept


def _set(option: int, value: int) -> bool:
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    return set_option is not None and set_option(option, value) == 1
