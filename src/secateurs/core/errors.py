"""Every error that secateurs raises on purpose.

    SecateursError
    ├── OptionError      an argument outside what is allowed (also a ValueError)
    │   └── BudgetError  a budget that cannot be read or cannot be met
    ├── ModelError       the model cannot be pruned as it is: NaN weights, nothing prunable, a failing forward
    ├── DataError        calibration or training data that is empty or of the wrong shape
    ├── PlanError        a plan that does not fit the model it is applied to
    ├── ProofError       the cut model and the masked original disagree
    ├── FileError        a file that is truncated, tampered with, or written by another release
    └── MissingExtraError  an optional package is needed; the message has the install command

A message says what was given, what is allowed, where (tensor, layer, file) and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BudgetError",
    "DataError",
    "FileError",
    "MissingExtraError",
    "ModelError",
    "OptionError",
    "PlanError",
    "ProofError",
    "SecateursError",
    "unknown_name",
]


class SecateursError(Exception):
    """Root of the errors that secateurs raises on purpose; the message is one plain sentence."""


class OptionError(SecateursError, ValueError):
    """An argument outside what is allowed."""


class BudgetError(OptionError):
    """A budget that cannot be read or cannot be met.

    Args:
        message: what is wrong, in one sentence.
        nearest: for an infeasible budget, the nearest feasible one in the budget grammar.
    """

    def __init__(self, message: str, nearest: str | None = None) -> None:
        super().__init__(message if nearest is None else f"{message} Nearest feasible: {nearest!r}.")
        self.nearest = nearest


class ModelError(SecateursError):
    """The model cannot be pruned as it is."""


class DataError(SecateursError):
    """Calibration or training data that is empty or of the wrong shape."""


class PlanError(SecateursError):
    """A plan that does not fit the model it is applied to."""


class ProofError(SecateursError):
    """The cut model and the masked original disagree: the cut must not be used."""


class FileError(SecateursError):
    """A file that is truncated, tampered with, or written by another release."""


class MissingExtraError(SecateursError, ImportError):
    """An optional package is needed.

    Args:
        package: what could not be imported.
        extra: the extra of secateurs that installs it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is needed here; install it with: pip install 'secateurs[{extra}]'")


def unknown_name(noun: str, name: str, known: Iterable[str]) -> OptionError:
    """The error for a name that is not in a registry; it lists the nearest three."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
    return OptionError(f"unknown {noun} {name!r}; the nearest are {', '.join(near)}.")
