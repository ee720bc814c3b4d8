"""The result of a check, and the report of all results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report; fix: what to do where it is not ok."""

    about: str
    level: Level
    says: str
    fix: str = ""


def exit_code(findings: Sequence[Finding]) -> int:
    return int(any(finding.level == "problem" for finding in findings))


def render(findings: Sequence[Finding]) -> str:
    """The printed report: a line each, the fix below, the counts at the end."""
    width = max(len(finding.about) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<8} {finding.about:<{width}}  {finding.says}")
        if finding.fix:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.fix}")
    levels = [finding.level for finding in findings]
    lines.append(f"{levels.count('problem')} problem(s), {levels.count('warning')} warning(s)")
    return "\n".join(lines)


def of_other_hosts(host: str, findings: Sequence[Finding]) -> list[Finding]:
    """Findings of another host for the report of the first: those that are not ok."""
    bad = (finding for finding in findings if finding.level != "ok")
    return [replace(finding, about=f"{host}: {finding.about}") for finding in bad]
