"""Parts shared by all readers: numbers from text, with the line number in every error, and rows into a trace."""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final, Protocol

import numpy as np

from cascadeinfer.core.errors import TraceError
from cascadeinfer.workload.trace import Trace

SHOWN_CHARACTERS: Final = 60


class CsvReader(Protocol):
    """What `csv.reader` returns."""

    line_num: int

    def __iter__(self) -> Iterator[list[str]]:
        """Rows of fields."""
        ...


def csv_rows(reader: CsvReader, lines_before: int = 0) -> Iterator[list[str]]:
    """
    Rows that are not blank.

    Args:
        reader: The reader of the text.
        lines_before: Lines of the file that the reader did not see, for error messages.

    Raises:
        TraceError: The text is no CSV, e.g. a quote is never closed.
    """
    try:
        for row in reader:
            if any(field.strip() for field in row):
                yield row
    except csv.Error as error:
        raise TraceError(f"not CSV: {error}", line=lines_before + reader.line_num) from None


MAX_TOKENS: Final = 10**9
"""Longer than any context; sums over millions of requests still fit into 64 bits."""
MAX_ID: Final = 2**63 - 1


def whole(value: object, name: str, line: int, *, most: int = MAX_TOKENS) -> int:
    """
    A count of tokens: a whole number >= 0, as text or number, taken exactly or not at all.

    Args:
        value: `12`, `"12"`, or an equal value such as `12.0` and `"1.2e1"`.
        name: Name of the column, for error messages.
        line: Line number, likewise.
        most: Largest plausible value.

    Raises:
        TraceError: It is no such number.
    """
    real(value, name, line)  # refuses what is not a finite number
    exact = Decimal(str(value).strip())
    if exact < 0:
        raise TraceError(f"{name} is negative: {_shown(value)}", line=line)
    if exact > most:
        raise TraceError(f"{name} is above {most:,}: {_shown(value)}", line=line)
    if exact != int(exact):
        raise TraceError(f"{name} is not a whole number: {_shown(value)}", line=line)
    return int(exact)


def real(value: object, name: str, line: int) -> float:
    """
    A finite number, as text or number.

    Raises:
        TraceError: It is no such number.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TraceError(f"{name} is not a number: {_shown(value)}", line=line)
    try:
        number = float(value)
    except ValueError:
        raise TraceError(f"{name} is not a number: {_shown(value)}", line=line) from None
    except OverflowError:  # an integer of more than 308 digits
        number = math.inf
    if not math.isfinite(number):
        raise TraceError(f"{name} is not finite: {_shown(value)}", line=line)
    return number


def _shown(value: object) -> str:
    """A value for an error message, on one line."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def check_blocks(hash_ids: list[int], prompt_tokens: int, block_tokens: int, line: int) -> None:
    """
    Check that a prompt has at most one hash per block that it begins.

    Raises:
        TraceError: There are more.
    """
    n_blocks = -(-prompt_tokens // block_tokens)
    if len(hash_ids) > n_blocks:
        raise TraceError(
            f"{len(hash_ids)} hash_ids for {prompt_tokens} prompt tokens, which fill {n_blocks} of {block_tokens}",
            line=line,
        )


@dataclass(slots=True)
class Rows:
    """
    Rows of a source, collected for a trace.

    Attributes:
        dropped: Rows left out because the source marks them as failed.
    """

    times_s: list[float] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    hashes: list[list[int]] = field(default_factory=list)
    dropped: int = 0

    def add(self, time_s: float | None, prompt_tokens: int, output_tokens: int, line: int) -> bool:
        """
        Add a row; a request that produced nothing failed, and is counted but not kept.

        Returns:
            Whether it was kept.

        Raises:
            TraceError: The prompt is empty, or this row has a time and others have none.
        """
        if output_tokens == 0:
            self.dropped += 1
            return False
        if prompt_tokens < 1:
            raise TraceError("the prompt has no tokens", line=line)
        if self.prompts and (time_s is None) == bool(self.times_s):
            raise TraceError("some rows have an arrival time and some have none", line=line)
        if time_s is not None:
            self.times_s.append(time_s)
        self.prompts.append(prompt_tokens)
        self.outputs.append(output_tokens)
        return True

    def to_trace(self, *, prefix_block_tokens: int = 0) -> Trace:
        """
        The rows, sorted by time (stable), with times from the earliest.

        Raises:
            TraceError: There is no row.
        """
        if not self.prompts:
            raise TraceError("the trace has no requests")
        trace = Trace.from_columns(
            self.prompts,
            self.outputs,
            prefix_hashes=self.hashes if prefix_block_tokens else None,
            prefix_block_tokens=prefix_block_tokens,
            dropped_rows=self.dropped,
        )
        if not self.times_s:
            return trace
        times_s = np.asarray(self.times_s)
        order = np.argsort(times_s, kind="stable")
        return trace.rows(order).with_arrivals(times_s[order] - times_s[order[0]])
