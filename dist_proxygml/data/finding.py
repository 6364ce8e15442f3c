"""A line of the doctor. It imports nothing that must be installed: the doctor also runs where packages are missing."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor."""

    status: Status
    name: str
    text: str
    remedy: str = ""
    """Remedy; empty where nothing needs to be done."""

    def __str__(self) -> str:
        return f"{self.status:<8} {self.name:<14} {self.text}" + (f"; {self.remedy}" if self.remedy else "")


def run_check(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Collect the findings of a check, with a warning instead of the rest where it raises."""
    findings: list[Finding] = []
    try:
        findings.extend(check())
    except Exception as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
        findings.append(Finding("warning", name, f"the check itself failed ({cause})"))
    return findings
