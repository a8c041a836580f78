"""Exceptions for errors that are not bugs. Each says what is wrong, where, and what to do.

The command line turns them into a message and an exit code, in one place.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence


class DDKitError(Exception):
    """The base class of errors that the user can correct.

    message: what is wrong and where, one sentence. remedy: what to do about it, one sentence, or empty.
    exit_code: of the command (1 unacceptable submission, 2 wrong usage, 3 something needed is missing or failed,
        130 interrupted with the state saved).
    """

    exit_code = 3

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class UsageError(DDKitError):
    """A wrong option or argument: an unknown name, or a number out of range."""

    exit_code = 2


class MissingDataError(DDKitError):
    """A dataset, a reference file or a result is missing."""


class MissingModelError(DDKitError):
    """A model folder or a checkpoint is missing, or is not one that ddkit has written."""


class HubError(DDKitError):
    """The Hugging Face hub refused an upload, or could not be reached for it."""


class BadDataError(DDKitError):
    """Data that cannot be used: truncated, in another format, or with a wrong checksum."""


class BadFileError(DDKitError):
    """A file that cannot be read or written: no permission, no space, or not in its format."""


class ComputeError(DDKitError):
    """A computation failed: out of memory, a loss that is NaN, or no such device."""


class InvalidSubmissionError(DDKitError):
    """A submission that `ddkit check` finds unacceptable."""

    exit_code = 1


class InterruptedRunError(DDKitError):
    """Stopped by Ctrl-C or SIGTERM, with the state saved."""

    exit_code = 130


def did_you_mean(name: str, known: list[str] | tuple[str, ...]) -> str:
    """A sentence that suggests the known name closest to `name`, or lists the known ones."""
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(known)}."


def counted(count: int, one: str, more: str) -> str:
    """A number and the words after it: counted(1, "row is", "rows are") -> "1 row is"."""
    return f"{count:,} {one if count == 1 else more}"


def first_few(parts: Sequence[str], limit: int = 5, *, joint: str = ", ", kind: str = "") -> str:
    """The first `limit` parts of a list in a sentence, and how many more there are; kind: one of them, such as "row"."""
    left_out = counted(len(parts) - limit, f"more {kind}", f"more {kind}s" if kind else "more ").rstrip()
    return joint.join(parts[:limit]) + (f"{joint.rstrip(', ')} and {left_out}" if len(parts) > limit else "")


def require_positive(settings: object, *names: str) -> None:
    """Raise UsageError unless each of the named settings is positive and finite."""
    for name in names:
        if not 0 < getattr(settings, name) < math.inf:
            raise UsageError(f"{type(settings).__name__}.{name} must be positive, got {getattr(settings, name)}.")
