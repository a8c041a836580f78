"""What can go wrong by no fault of the code, as exceptions that say what, where and what to do.

Library functions raise these; `ddkit.cli` turns them into one message and an exit status, in one place.
"""

from __future__ import annotations

import math


class DDKitError(Exception):
    """The root of every error that a user can cause and mend.

    message: what is wrong and where, one sentence.
    remedy: what to do about it, one sentence; may be empty.
    exit_code: status of the command that meets it (2 wrong usage, 3 something needed is missing,
        1 an unacceptable submission, 130 interrupted with the state saved).
    """

    exit_code = 3

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class UsageError(DDKitError):
    """An option or argument that cannot be meant: an unknown name, a number out of range."""

    exit_code = 2


class MissingDataError(DDKitError):
    """A dataset, reference file or result that is needed is not there."""


class MissingModelError(DDKitError):
    """A model folder or checkpoint that is needed is not there, or is not one of ours."""


class BadDataError(DDKitError):
    """Data that is there but cannot be used: truncated, of another format, with a wrong checksum."""


class BadFileError(DDKitError):
    """A file that cannot be read or written: no permission, no space, not the format it claims."""


class ComputeError(DDKitError):
    """The computation itself failed: out of memory, a loss that is no number, no such device."""


class InvalidSubmissionError(DDKitError):
    """`check` finds a submission unacceptable."""

    exit_code = 1


class InterruptedRunError(DDKitError):
    """Stopped by Ctrl-C or SIGTERM after saving what was done."""

    exit_code = 130


def did_you_mean(name: str, known: list[str] | tuple[str, ...]) -> str:
    """A sentence that offers the known name most like `name`, or lists the known ones."""
    import difflib

    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(known)}."


def require_positive(settings: object, *names: str) -> None:
    """Raise UsageError where one of these numbers among the settings is not above zero and finite."""
    for name in names:
        if not 0 < getattr(settings, name) < math.inf:
            raise UsageError(f"{type(settings).__name__}.{name} must be positive, got {getattr(settings, name)}.")
