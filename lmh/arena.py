"""Memory for training on a CPU: freed blocks are used again at once, and do not pile up.

The C library has a choice of two evils for the blocks of a spiking network, which are T times those of its ANN. Either
it gives them back to the kernel, and the next one is cleared page by page as it is first touched, which takes more time
than the neurons. Or it keeps them; but torch asks for aligned blocks, whose ends it leaves behind in pieces, so that
the next block of that size does not fit where the last one was, and the process grows by a half.

lmh/arena.cpp has blocks of 256 KiB and more in one range of addresses, in multiples of 64 KiB, without such pieces: a
block goes where it needs the fewest new pages, and holes that touch are one. What holes keep is bounded too: pages
beyond 17/16 of the most that was ever in use go back to the kernel, those of the last holes first.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from .home import home
from .terminal import Terminal

SOURCE = Path(__file__).with_name("arena.cpp")
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared")


@functools.cache
def use_arena() -> bool:
    """Let tensors on the CPU lie in an arena from now on, for the whole process; returns whether they do.

    What does it is compiled once for a version of torch, which takes 2 s, and kept in ``LMH_HOME``. Where that cannot
    be, all stays as it is: on another system than Linux, without a C++ compiler of C++20 (``g++``, or what ``CXX``
    names) or a folder to write in, and where address space is counted (``ulimit -v``, ``vm.overcommit_memory=2``), of
    which the arena reserves as much as the machine has memory.

    >>> isinstance(use_arena(), bool)
    True
    """
    if not sys.platform.startswith("linux") or _addresses_count():
        return False
    try:
        return bool(ctypes.CDLL(str(_library())).lmh_use_arena())
    except (OSError, AttributeError, ValueError, subprocess.SubprocessError):  # ValueError: a quote in CXX stays open
        return False


def train_in_arena(terminal: Terminal) -> None:
    """What commands begin to train with: the arena, or a notice where a Linux has none."""
    if not use_arena() and sys.platform.startswith("linux"):
        terminal.notice(
            "Training takes more memory than it needs: its allocator could not be built or started (lmh.use_arena says "
            "what it wants, a C++ compiler first of all)."
        )


def _addresses_count() -> bool:
    """Whether the system limits the addresses of a process, not the memory behind them alone."""
    import resource

    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return True
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    except OSError:
        return False


def _library() -> Path:
    """Return the compiled library, and compile it if there is none for this torch and this machine."""
    machine = platform.machine(), platform.libc_ver(), torch.__version__, torch.version.git_version
    made_for = f"{SOURCE.read_text()} {FLAGS} {machine}"
    library = home() / "compiled" / f"arena-{hashlib.sha256(made_for.encode()).hexdigest()[:16]}.so"
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            _compile(made)
            made.replace(library)
    return library


def _compile(library: Path) -> None:
    """Compile the source beside the headers of the torch that is installed."""
    installed, abi = Path(torch.__file__).parent, int(torch.compiled_with_cxx11_abi())
    command = [
        *shlex.split(os.environ.get("CXX", "g++")), *FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        f"-I{installed / 'include'}", str(SOURCE), "-o", str(library), f"-L{installed / 'lib'}", "-lc10",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=300)
