"""Every error that the toolkit raises on purpose.

    LMHError                    the root: catch this to catch them all
    ├── ArgumentError           a value that a call cannot take (also a ValueError)
    ├── SourceError             a model file or name that cannot become an ANN
    │   ├── UnsafePickleError   loading the file would run code that was not allowed
    │   └── ArchitectureError   the tensors fit no architecture, or not the one that was named
    ├── DataError               a data set that is missing, empty, or does not fit the model
    ├── AuditError              a graph with nodes that no rule covers; all of them at once
    ├── CalibrationError        no threshold can be found with what was given
    ├── StateError              membrane state used outside its block or with another batch
    ├── TrainingError           fine-tuning cannot start or cannot go on
    ├── DownloadError           a file that cannot be had whole and unaltered from where it lies
    └── ArtifactError           a spiking network that cannot be written, or read back

A message says where, what came, what was expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


def reason_of(error: BaseException) -> str:
    """Return the first line of an error, or its type's name where it says nothing.

    >>> reason_of(ValueError("one")), reason_of(KeyError())
    ('one', 'KeyError')
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class LMHError(Exception):
    """Root of the toolkit's errors."""


class ArgumentError(LMHError, ValueError):
    """A value that a call cannot take."""


class SourceError(LMHError):
    """A model file or name that cannot become an ANN."""


class UnsafePickleError(SourceError):
    """Loading the file would run code that the user did not allow."""


class ArchitectureError(SourceError):
    """The tensors fit no known architecture, or not the one that was named."""


class DataError(LMHError):
    """A data set that is missing, empty, or does not fit the model."""


class AuditError(LMHError):
    """A graph with nodes that no rule covers.

    Attributes:
        problems: one line for each node, all found before anything was changed.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{count} {'place' if count == 1 else 'places'} cannot be converted:\n{lines}")


class CalibrationError(LMHError):
    """No threshold can be found with what was given."""


class StateError(LMHError):
    """Membrane state used outside its block or with another batch."""


class TrainingError(LMHError):
    """Fine-tuning cannot start or cannot go on."""


class DownloadError(LMHError):
    """A file that cannot be had whole and unaltered from where it lies."""


class ArtifactError(LMHError):
    """A spiking network that cannot be written, or read back."""
