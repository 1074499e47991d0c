"""``python -m lmh``, which torchrun can start."""

from .cli import main

main()
