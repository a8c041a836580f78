"""What a check finds: facts with a stable code each, documented in `submission/README.md`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

LEVELS = ("error", "warning", "info")


@dataclass(frozen=True)
class Finding:
    """One thing that a check has to say.

    level: "error" (the challenge would refuse it or score something else than meant), "warning" (it would be
        scored, but probably not as meant) or "info".
    code: stable, a letter for the kind and three digits: F files, T tensors, N normalization, L label layout,
        C content.
    message: what is so, the evidence, and what to do. where: file and, where there are such, rows.
    """

    level: str
    code: str
    message: str
    where: str = ""

    def __post_init__(self) -> None:
        # Names in strangers' files may hold what a terminal would obey, or what cannot be encoded.
        object.__setattr__(self, "message", printable(self.message))
        object.__setattr__(self, "where", printable(self.where))


@dataclass(frozen=True)
class Report:
    """All findings of one check, worst first."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing stands against submitting it: no error."""
        return all(finding.level != "error" for finding in self.findings)

    def ignoring(self, codes: Collection[str]) -> Report:
        """Without the findings of these codes."""
        return Report(tuple(finding for finding in self.findings if finding.code not in codes))

    def strict(self) -> Report:
        """With every warning raised to an error."""
        return Report(tuple(replace(f, level="error") if f.level == "warning" else f for f in self.findings))

    def to_json(self) -> dict[str, Any]:
        """As plain values for `--json`."""
        return {"ok": self.ok, "findings": [vars(finding) for finding in self.findings]}


def printable(text: str) -> str:
    """`text` with everything but characters that show written as escapes: "\\x1b" for ESC."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def report_of(findings: Collection[Finding]) -> Report:
    """The report of these findings: errors before warnings before remarks, each in the order found."""
    return Report(tuple(sorted(findings, key=lambda finding: LEVELS.index(finding.level))))
