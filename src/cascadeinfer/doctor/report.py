"""
The doctor's report: one JSON file with all verdicts and facts, to attach to an issue.

Nothing secret goes into it: of the environment only a fixed list of names (`gathering/machine.py`), and wherever the
value of a variable that looks like a key turns up in a library's output, it is struck out. The home folder becomes `~`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from cascadeinfer import __version__
from cascadeinfer.doctor.facts import End, Gathered
from cascadeinfer.doctor.verdicts import Check, counted
from cascadeinfer.results.output_files import replacing
from cascadeinfer.results.provenance import own_commit

REPORT_VERSION: Final = 1
SECRET_NAME: Final = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH|COOKIE", re.IGNORECASE)
SECRET_MIN_CHARACTERS: Final = 6
"""Shorter values are no keys, and striking them out would garble the report."""
STRUCK_OUT: Final = "***"


def secrets_in(environment: Mapping[str, str]) -> list[str]:
    """Values of variables that may be keys, the longest first."""
    values = {
        value for name, value in environment.items() if SECRET_NAME.search(name) and len(value) >= SECRET_MIN_CHARACTERS
    }
    return sorted(values, key=len, reverse=True)


def public(value: Any, secrets: Iterable[str], home: str) -> Any:
    """The same, without secrets in its texts, and with `~` for the home folder."""
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, STRUCK_OUT)
        return value.replace(home, "~") if len(home) > 1 else value
    if isinstance(value, Mapping):
        return {key: public(item, secrets, home) for key, item in value.items()}
    if isinstance(value, list):
        return [public(item, secrets, home) for item in value]
    return value


def report_of(
    sections: Mapping[str, Sequence[Check]], gathered: Sequence[Gathered], command: Sequence[str]
) -> dict[str, Any]:
    """The report, before anything is struck out."""
    checks = [check for found in sections.values() for check in found]
    return {
        "version": REPORT_VERSION,
        "at": datetime.now(tz=UTC).isoformat(timespec="seconds"),
        "cascadeinfer": __version__,
        "commit": own_commit(),
        "command": list(command),
        "verdicts": {str(verdict): number for verdict, number in counted(checks).items()},
        "sections": {
            title: [
                {"name": c.name, "verdict": str(c.verdict), "found": c.found, **({"fix": c.fix} if c.fix else {})}
                for c in found
            ]
            for title, found in sections.items()
        },
        "parts": {
            part.part: {
                "end": str(part.end),
                "seconds": part.seconds,
                "facts": [msgspec.to_builtins(fact) for fact in part.facts],
                **({} if part.end is End.DONE else {"doing": part.doing, "code": part.code, "output": part.output}),
            }
            for part in gathered
        },
    }


def write_report(path: Path, report: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    """
    Write it, whole or not at all.

    Raises:
        ConfigError: It cannot be written.
    """
    safe = public(report, secrets_in(environment), str(Path.home()))
    with replacing(path, "--json") as beside:
        beside.write_text(json.dumps(safe, indent=1) + "\n", encoding="utf-8")
