"""A check's verdict, what it found, and the fix."""

import enum
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


class Verdict(enum.StrEnum):
    """How it stands."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True, slots=True)
class Check:
    """
    One line of the doctor.

    Attributes:
        name: What was checked.
        found: What was found.
        fix: How to mend it, in one line; empty where there is nothing to mend.
    """

    name: str
    verdict: Verdict
    found: str
    fix: str = ""


def ok(name: str, found: str) -> Check:
    """All is well."""
    return Check(name, Verdict.OK, found)


def warning(name: str, found: str, fix: str) -> Check:
    """It works, but slowly, or not for everybody."""
    return Check(name, Verdict.WARNING, found, fix)


def fault(name: str, found: str, fix: str) -> Check:
    """Serving, or moving requests, will fail."""
    return Check(name, Verdict.FAULT, found, fix)


def not_applicable(name: str, found: str) -> Check:
    """There is nothing to check here."""
    return Check(name, Verdict.NOT_APPLICABLE, found)


def counted(checks: Iterable[Check]) -> Counter[Verdict]:
    """How many there are of each verdict."""
    return Counter(check.verdict for check in checks)
