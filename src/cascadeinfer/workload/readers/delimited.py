"""
Traces as comma-separated values.

The separator (comma, semicolon, tab) and the case of the column names are taken from the header.

- The common form of this project: `arrival_s,prompt_tokens,output_tokens[,extra...]`; `arrival_s` is empty in every row
  when the source has no times. An extra column `row_id` joins prefix hashes (`read_hash_ids`).
- Azure 2023 and 2024 (github Azure/AzurePublicDataset): `TIMESTAMP,ContextTokens,GeneratedTokens`; timestamps are
  wall-clock, with up to seven decimals, in 2024 with a time zone.
- BurstGPT (github HPMLL/BurstGPT): `Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type`, in later
  releases with `Session ID` and `Elapsed time`; seconds. Failed requests have no response tokens.
"""

import contextlib
import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

from cascadeinfer.core.errors import TraceError
from cascadeinfer.workload.readers.fields import Rows, check_blocks, csv_rows, real, whole
from cascadeinfer.workload.trace import Trace

COMMON_COLUMNS: Final = ("arrival_s", "prompt_tokens", "output_tokens")
AZURE_COLUMNS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT_COLUMNS: Final = ("Timestamp", "Model", "Request tokens", "Response tokens", "Log Type")
SEPARATORS: Final = (",", ";", "\t")
_TIMESTAMP: Final = re.compile(r"^(?P<whole>[^.]+?)(?:\.(?P<fraction>\d+))?(?P<zone>Z|[+-]\d\d:?\d\d)?$")


def read_csv(
    lines: Iterable[str], *, hashes: Mapping[int, list[int]] | None = None, prefix_block_tokens: int = 512
) -> Trace:
    """
    The common form of this project.

    Args:
        lines: The file's lines, the header first.
        hashes: Prefix hashes by `row_id`, as from `read_hash_ids`.
        prefix_block_tokens: Tokens per hashed block.

    Raises:
        TraceError: A column is missing, a field is not a number, only some rows have a time, or a `row_id` has no
            hashes.
    """
    rows = Rows()
    for line, row in _records(lines, COMMON_COLUMNS):
        time_s = real(row["arrival_s"], "arrival_s", line) if row["arrival_s"].strip() else None
        prompt_tokens = whole(row["prompt_tokens"], "prompt_tokens", line)
        output_tokens = whole(row["output_tokens"], "output_tokens", line)
        kept = rows.add(time_s, prompt_tokens, output_tokens, line)
        if hashes is not None and kept:
            row_id = whole(row.get("row_id", ""), "row_id", line)
            if row_id not in hashes:
                raise TraceError(f"no prefix hashes for row_id {row_id}", line=line)
            check_blocks(hashes[row_id], prompt_tokens, prefix_block_tokens, line)
            rows.hashes.append(hashes[row_id])
    return rows.to_trace(prefix_block_tokens=prefix_block_tokens if hashes is not None else 0)


def read_azure(lines: Iterable[str]) -> Trace:
    """
    Azure LLM inference traces of 2023 and 2024.

    Raises:
        TraceError: A column is missing, a timestamp is not a time, or a count is not a number.
    """
    rows = Rows()
    for line, row in _records(lines, AZURE_COLUMNS):
        rows.add(
            _wall_clock_s(row["TIMESTAMP"], line),
            whole(row["ContextTokens"], "ContextTokens", line),
            whole(row["GeneratedTokens"], "GeneratedTokens", line),
            line,
        )
    return rows.to_trace()


def read_burstgpt(lines: Iterable[str], *, model: str | None = None, log_type: str | None = None) -> Trace:
    """
    BurstGPT traces.

    Args:
        lines: The file's lines, the header first.
        model: Only rows of this model, e.g. `GPT-4`; others are not counted as dropped.
        log_type: Only rows of this kind, e.g. `Conversation log`.

    Raises:
        TraceError: A column is missing or a field is not a number.
    """
    rows = Rows()
    for line, row in _records(lines, BURSTGPT_COLUMNS):
        if (model is not None and row["Model"] != model) or (log_type is not None and row["Log Type"] != log_type):
            continue
        rows.add(
            real(row["Timestamp"], "Timestamp", line),
            whole(row["Request tokens"], "Request tokens", line),
            whole(row["Response tokens"], "Response tokens", line),
            line,
        )
    return rows.to_trace()


def separated(header: str, needed: Sequence[str]) -> tuple[str, list[str]] | None:
    """
    How a header separates its columns: the separator and the column names, the needed ones spelt as here.

    Spreadsheets write semicolons or tabs, and change the case of names. None when no separator yields all needed
    columns.
    """
    spelling = {name.casefold(): name for name in needed}
    for separator in SEPARATORS:
        names = [name.strip().lstrip("\ufeff") for name in next(csv.reader([header], delimiter=separator), [])]
        columns = [spelling.get(name.casefold(), name) for name in names]
        if set(needed) <= set(columns):
            return separator, columns
    return None


def _records(lines: Iterable[str], needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows by column name with their line numbers; blank lines are skipped."""
    every = iter(lines)
    n_before, header = 0, next(every, None)
    while header is not None and not header.strip():
        n_before, header = n_before + 1, next(every, None)
    if header is None:
        raise TraceError("the file is empty")
    n_before += 1
    found = separated(header, needed)
    if found is None:
        there = {name.strip().casefold() for separator in SEPARATORS for name in header.split(separator)}
        missing = next((name for name in needed if name.casefold() not in there), needed[0])
        raise TraceError(
            f"missing column {missing!r}; needed are {', '.join(needed)}; the header has {header.strip()[:200]!r}",
            line=n_before,
        )
    separator, columns = found
    reader = csv.reader(every, delimiter=separator)
    for row in csv_rows(reader, n_before):
        line = n_before + reader.line_num
        if len(row) != len(columns):
            raise TraceError(f"{len(row)} fields where the header has {len(columns)}", line=line)
        yield line, dict(zip(columns, row, strict=True))


def _wall_clock_s(text: str, line: int) -> float:
    """Seconds since 1970 of a timestamp with any number of decimals; without a time zone it is taken as UTC."""
    parts = _TIMESTAMP.match(text.strip())
    moment = None
    if parts is not None:
        with contextlib.suppress(ValueError):  # e.g. month 13
            moment = datetime.fromisoformat(parts["whole"] + (parts["zone"] or "+00:00"))
    if parts is None or moment is None:
        raise TraceError(f"TIMESTAMP is not a time: {text!r}", line=line)
    since_epoch = moment.astimezone(UTC) - datetime(1970, 1, 1, tzinfo=UTC)
    return since_epoch.days * 86400 + since_epoch.seconds + float(f"0.{parts['fraction'] or 0}")
