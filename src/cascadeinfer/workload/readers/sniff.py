"""Detects a trace's format from the first line alone, so that a caller need only name a file."""

import itertools
import json
from collections.abc import Callable, Iterable
from typing import Final

from cascadeinfer.core.errors import TraceError
from cascadeinfer.workload.jsonl import FORMAT, from_jsonl
from cascadeinfer.workload.readers.delimited import (
    AZURE_COLUMNS,
    BURSTGPT_COLUMNS,
    COMMON_COLUMNS,
    read_azure,
    read_burstgpt,
    read_csv,
    separated,
)
from cascadeinfer.workload.readers.mooncake import read_mooncake
from cascadeinfer.workload.trace import Trace

FORMATS: Final[dict[str, Callable[[Iterable[str]], Trace]]] = {
    "csv": read_csv,
    "azure": read_azure,
    "burstgpt": read_burstgpt,
    "mooncake": read_mooncake,
    "jsonl": from_jsonl,
}
"""Name -> reader, for formats that need nothing but the file."""
DELIMITED: Final = {"csv": COMMON_COLUMNS, "azure": AZURE_COLUMNS, "burstgpt": BURSTGPT_COLUMNS}
"""Those of them that are rows under a header, with the columns that each needs."""


def sniff(first_line: str) -> str:
    """
    The format's name in `FORMATS`.

    Raises:
        TraceError: No known format starts like this.
    """
    for name, columns in DELIMITED.items():
        if separated(first_line, columns) is not None:
            return name
    try:
        row = json.loads(first_line.lstrip("\ufeff"))
    except json.JSONDecodeError:
        row = None
    if isinstance(row, dict):
        if row.get("format") == FORMAT:
            return "jsonl"
        if "input_length" in row:
            return "mooncake"
    needed = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in DELIMITED.items())
    raise TraceError(
        f"unknown trace format (known: {', '.join(FORMATS)}); it starts with {first_line.strip()[:80]!r}; "
        f"as CSV it needs the columns of one of these: {needed}",
        line=1,
    )


def read_trace(lines: Iterable[str]) -> Trace:
    """
    A trace in any known format.

    Raises:
        TraceError: The format is unknown, or the file is malformed.
    """
    every = iter(lines)
    seen: list[str] = []  # blank lines too, because error messages count them
    for line in every:
        seen.append(line)
        if line.strip():
            break
    else:
        raise TraceError("the file is empty")
    first = seen[-1] = seen[-1].lstrip("\ufeff")
    return FORMATS[sniff(first)](itertools.chain(seen, every))
