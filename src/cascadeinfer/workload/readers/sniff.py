"""
Which format is it?
Decided by the first line alone, so that a caller may name a file and no more.
"""

import itertools
import json
from collections.abc import Callable, Iterable
from typing import Final

from cascadeinfer.core.errors import TraceError
from cascadeinfer.workload.jsonl import FORMAT, from_jsonl
from cascadeinfer.workload.readers.delimited import read_azure, read_burstgpt, read_csv
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


def sniff(first_line: str) -> str:
    """
    The format's name in `FORMATS`.

    Raises:
        TraceError: No known format starts like this.
    """
    columns = {name.strip().lstrip("\ufeff") for name in first_line.split(",")}
    if {"arrival_s", "prompt_tokens", "output_tokens"} <= columns:
        return "csv"
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= columns:
        return "azure"
    if {"Request tokens", "Response tokens"} <= columns:
        return "burstgpt"
    try:
        row = json.loads(first_line)
    except json.JSONDecodeError:
        row = None
    if isinstance(row, dict):
        if row.get("format") == FORMAT:
            return "jsonl"
        if "input_length" in row:
            return "mooncake"
    raise TraceError(f"unknown trace format (known: {', '.join(FORMATS)}); it starts with {first_line[:80]!r}", line=1)


def read_trace(lines: Iterable[str]) -> Trace:
    """
    A trace in whatever format it is.

    Raises:
        TraceError: The format is unknown, or the file is malformed.
    """
    every = iter(lines)
    first = next((line for line in every if line.strip()), None)
    if first is None:
        raise TraceError("the file is empty")
    return FORMATS[sniff(first)](itertools.chain([first], every))
