"""Freed memory that stays with the process.

glibc gives every block of 32 MiB or more back to the kernel when it is freed, and the next one is cleared page by page
as it is first touched. Training a spiking network allocates such blocks all the time, T times as large as those of its
ANN, and then spends more time on pages than on neurons.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the C library keep freed blocks of up to 2 GiB for the next allocation; returns whether it does.

    Holds for the rest of the process, whose memory then stays at its peak. Only glibc has the setting.

    >>> isinstance(keep_freed_memory(), bool)
    True
    """
    if not sys.platform.startswith("linux"):
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return False
    return all(set_option(option, _KEPT) == 1 for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))
