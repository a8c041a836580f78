"""The findings of a check: facts, each with a stable code that `submission/README.md` documents."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from ddkit.runtime.html import html_table

LEVELS = ("error", "warning", "info")


@dataclass(frozen=True)
class Finding:
    """One fact that a check reports.

    level: "error" (the challenge would refuse the submission, or score something else than intended), "warning" (it would
        be scored, but probably not as intended) or "info".
    code: stable; a letter for the kind and three digits: F files, T tensors, N normalization, L label layout, C content.
    message: the fact, the evidence, and what to do. where: the file and, if the fact is about some rows, the rows.
    """

    level: str
    code: str
    message: str
    where: str = ""

    def __post_init__(self) -> None:
        # Names in files from others may hold control sequences of a terminal, or characters that cannot be encoded.
        object.__setattr__(self, "message", printable(self.message))
        object.__setattr__(self, "where", printable(self.where))


@dataclass(frozen=True)
class Report:
    """All findings of one check, worst first."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """True if there is no error."""
        return all(finding.level != "error" for finding in self.findings)

    def ignoring(self, codes: Collection[str]) -> Report:
        """The report without the findings of these codes."""
        return Report(tuple(finding for finding in self.findings if finding.code not in codes))

    def strict(self) -> Report:
        """The report with every warning raised to an error."""
        return Report(tuple(replace(f, level="error") if f.level == "warning" else f for f in self.findings))

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {"ok": self.ok, "findings": [vars(finding) for finding in self.findings]}

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        verdict = "The check found no error." if self.ok else "The challenge would refuse this, or score something else."
        rows = [(finding.level, finding.code, finding.where, finding.message) for finding in self.findings]
        return f"<p>{verdict}</p>" + (html_table(rows, ("level", "code", "where", "finding")) if rows else "")


def printable(text: str) -> str:
    """`text` with every character that is not printable written as an escape, such as "\\x1b" for ESC."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def report_of(findings: Collection[Finding]) -> Report:
    """The report of these findings: errors, then warnings, then infos, each in the order found."""
    return Report(tuple(sorted(findings, key=lambda finding: LEVELS.index(finding.level))))
