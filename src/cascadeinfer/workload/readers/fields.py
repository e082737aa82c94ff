"""
The parts every reader needs:
numbers out of text with a line number in every complaint, and rows collected into a trace.
"""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from cascadeinfer.core.errors import TraceError
from cascadeinfer.workload.trace import Trace


class CsvReader(Protocol):
    """What `csv.reader` returns."""

    line_num: int

    def __iter__(self) -> Iterator[list[str]]:
        """Rows of fields."""
        ...


def csv_rows(reader: CsvReader) -> Iterator[list[str]]:
    """
    Rows that are not blank.

    Raises:
        TraceError: The text is no CSV, e.g. a quote is never closed.
    """
    try:
        for row in reader:
            if row:
                yield row
    except csv.Error as error:
        raise TraceError(f"not CSV: {error}", line=reader.line_num) from None


def whole(value: object, name: str, line: int) -> int:
    """
    A count of tokens: a whole number >= 0, as text or number.

    Raises:
        TraceError: It is not one.
    """
    number = real(value, name, line)
    if number != int(number):
        raise TraceError(f"{name} is not a whole number: {value!r}", line=line)
    if number < 0:
        raise TraceError(f"{name} is negative: {value!r}", line=line)
    return int(number)


def real(value: object, name: str, line: int) -> float:
    """
    A finite number, as text or number.

    Raises:
        TraceError: It is not one.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TraceError(f"{name} is not a number: {value!r}", line=line)
    try:
        number = float(value)
    except ValueError:
        raise TraceError(f"{name} is not a number: {value!r}", line=line) from None
    if not math.isfinite(number):
        raise TraceError(f"{name} is not finite: {value!r}", line=line)
    return number


@dataclass(slots=True)
class Rows:
    """
    Rows of a source on their way to a trace.

    Attributes:
        dropped: Rows left out because the source says that they failed.
    """

    times_s: list[float] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    hashes: list[list[int]] = field(default_factory=list)
    dropped: int = 0

    def add(self, time_s: float | None, prompt_tokens: int, output_tokens: int, line: int) -> bool:
        """
        Take a row; a request that produced nothing failed, and is counted but not kept.

        Returns:
            Whether it was kept.

        Raises:
            TraceError: The prompt is empty, or this row has a time and others have none.
        """
        if prompt_tokens < 1:
            raise TraceError("the prompt has no tokens", line=line)
        if self.prompts and (time_s is None) == bool(self.times_s):
            raise TraceError("some rows have an arrival time and some have none", line=line)
        if output_tokens == 0:
            self.dropped += 1
            return False
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
