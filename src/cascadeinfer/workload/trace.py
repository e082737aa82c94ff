"""
A trace: when requests arrive and how long they are.

Columns in numpy, one row per request in order of arrival. A trace is a value: every change makes another, and whatever
a change leaves out or shortens is counted, never silent. Source traces without arrival times have `has_arrivals` False
and zeros in `arrival_s`; give them times with `with_arrivals` (see `workload/arrivals.py`) before running them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cascadeinfer.core.errors import TraceError

PrefixHashes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """
    Requests in order of arrival.

    Attributes:
        arrival_s: Seconds since the trace's start, non-decreasing.  # (n,)
        prompt_tokens: At least 1.  # (n,)
        output_tokens: At least 1.  # (n,)
        prefix_hashes: Per request, hashes of the prompt's leading blocks, each covering all before it; None when
            unknown.
        prefix_block_tokens: Tokens per hashed block; 0 without hashes.
        dropped_rows: Rows of the source that are not here, e.g. failed requests.
        has_arrivals: Whether `arrival_s` is meaningful.

    Raises:
        TraceError: A column is too short, not finite, negative or unsorted, or a length is below 1; the message names
            the row.
    """

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    prefix_hashes: PrefixHashes | None = None
    prefix_block_tokens: int = 0
    dropped_rows: int = 0
    has_arrivals: bool = True

    def __post_init__(self) -> None:
        """Check the columns and make them read-only."""
        n = len(self.arrival_s)
        if len(self.prompt_tokens) != n or len(self.output_tokens) != n:
            raise TraceError(
                f"columns differ in length: {n} arrivals, {len(self.prompt_tokens)} prompts, "
                f"{len(self.output_tokens)} outputs"
            )
        if self.prefix_hashes is not None and len(self.prefix_hashes) != n:
            raise TraceError(f"{len(self.prefix_hashes)} prefix lists for {n} requests")
        if (self.prefix_hashes is None) != (self.prefix_block_tokens == 0):
            raise TraceError("prefix hashes and prefix_block_tokens come together")
        _check_rows(~np.isfinite(self.arrival_s) | (self.arrival_s < 0.0), "arrival_s is negative or not finite")
        _check_rows(np.diff(self.arrival_s, prepend=0.0) < 0.0, "arrival_s is before the row above")
        _check_rows(self.prompt_tokens < 1, "prompt_tokens is below 1")
        _check_rows(self.output_tokens < 1, "output_tokens is below 1")
        for column in (self.arrival_s, self.prompt_tokens, self.output_tokens):
            column.flags.writeable = False

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.arrival_s)

    @classmethod
    def from_columns(
        cls,
        prompt_tokens: Sequence[int] | NDArray[np.int64],
        output_tokens: Sequence[int] | NDArray[np.int64],
        arrival_s: Sequence[float] | NDArray[np.float64] | None = None,
        *,
        prefix_hashes: Sequence[Sequence[int]] | None = None,
        prefix_block_tokens: int = 0,
        dropped_rows: int = 0,
    ) -> "Trace":
        """A trace of these columns; without `arrival_s` it has no arrival times."""
        return cls(
            np.zeros(len(prompt_tokens)) if arrival_s is None else np.array(arrival_s, dtype=np.float64),
            np.array(prompt_tokens, dtype=np.int64),
            np.array(output_tokens, dtype=np.int64),
            None if prefix_hashes is None else tuple(tuple(hashes) for hashes in prefix_hashes),
            prefix_block_tokens,
            dropped_rows,
            has_arrivals=arrival_s is not None,
        )

    @property
    def total_tokens(self) -> NDArray[np.int64]:  # (n,)
        """Prompt and output of each request together: its longest sequence."""
        return self.prompt_tokens + self.output_tokens

    @property
    def duration_s(self) -> float:
        """Seconds from the start of the trace to its last arrival."""
        return float(self.arrival_s[-1]) if len(self) else 0.0

    @property
    def rate_rps(self) -> float:
        """
        Mean arrival rate in requests per second: (n - 1) gaps over the time between first and last arrival.

        Raises:
            TraceError: The trace has no arrival times, or fewer than two distinct ones.
        """
        self.require_arrivals()
        span_s = float(self.arrival_s[-1] - self.arrival_s[0]) if len(self) else 0.0
        if span_s <= 0.0:
            raise TraceError("the arrivals span no time, so there is no rate")
        return (len(self) - 1) / span_s

    def require_arrivals(self) -> None:
        """
        Refuse a trace without arrival times.

        Raises:
            TraceError: It has none.
        """
        if not self.has_arrivals:
            raise TraceError("the trace has no arrival times: give a rate, so that they can be drawn")

    def with_arrivals(self, arrival_s: NDArray[np.float64]) -> "Trace":
        """The same requests, arriving at these times."""
        return replace(self, arrival_s=np.array(arrival_s, dtype=np.float64), has_arrivals=True)

    def at_rate(self, rate_rps: float) -> "Trace":
        """The same arrivals, scaled in time to this mean rate; their pattern stays."""
        if not (np.isfinite(rate_rps) and rate_rps > 0.0):
            raise TraceError(f"a rate must be positive, not {rate_rps}")
        return self.with_arrivals(self.arrival_s * (self.rate_rps / rate_rps))

    def rows(self, indices: NDArray[np.int64]) -> "Trace":
        """The requests at these rows; arrival times must stay sorted."""
        hashes = self.prefix_hashes
        return replace(
            self,
            arrival_s=self.arrival_s[indices],
            prompt_tokens=self.prompt_tokens[indices],
            output_tokens=self.output_tokens[indices],
            prefix_hashes=None if hashes is None else tuple(hashes[i] for i in indices),
        )

    def sample(self, n: int, rng: np.random.Generator) -> "Trace":
        """
        `n` requests drawn without replacement, in order; thins the arrivals.

        Raises:
            TraceError: The trace has fewer than `n`.
        """
        if not 0 <= n <= len(self):
            raise TraceError(f"cannot draw {n} requests out of {len(self)}")
        return self.rows(np.sort(rng.choice(len(self), size=n, replace=False)))

    def resample(self, n: int, rng: np.random.Generator) -> "Trace":
        """
        `n` requests drawn with replacement, without arrival times: lengths for a synthetic arrival process.

        Raises:
            TraceError: The trace is empty.
        """
        if not len(self):
            raise TraceError("cannot draw from an empty trace")
        drawn = self.rows(np.sort(rng.integers(len(self), size=n)))
        shuffled = rng.permutation(n)
        hashes = drawn.prefix_hashes
        return replace(
            drawn,
            arrival_s=np.zeros(n),
            prompt_tokens=drawn.prompt_tokens[shuffled],
            output_tokens=drawn.output_tokens[shuffled],
            prefix_hashes=None if hashes is None else tuple(hashes[i] for i in shuffled),
            has_arrivals=False,
        )

    def window(self, start_s: float, end_s: float) -> "Trace":
        """Requests that arrive in `[start_s, end_s)`, with times from its start."""
        self.require_arrivals()
        inside = np.flatnonzero((self.arrival_s >= start_s) & (self.arrival_s < end_s))
        part = self.rows(inside)
        return part.with_arrivals(part.arrival_s - start_s)

    def capped(self, context_tokens: int) -> "CappedTrace":
        """
        The trace for a model with this context length: longer prompts and outputs are cut.

        A prompt keeps at most `context_tokens - 1`, an output what is left; nothing is dropped, and the counts say what
        was cut.
        """
        if context_tokens < 2:
            raise TraceError(f"a context of {context_tokens} tokens holds no prompt and output")
        prompts = np.minimum(self.prompt_tokens, context_tokens - 1)
        outputs = np.minimum(self.output_tokens, context_tokens - prompts)
        hashes = self.prefix_hashes
        if hashes is not None:
            kept = prompts // self.prefix_block_tokens
            hashes = tuple(h if len(h) <= k + 1 else h[:k] for h, k in zip(hashes, kept.tolist(), strict=True))
        return CappedTrace(
            replace(self, prompt_tokens=prompts, output_tokens=outputs, prefix_hashes=hashes),
            prompts_cut=int(np.count_nonzero(prompts < self.prompt_tokens)),
            outputs_cut=int(np.count_nonzero(outputs < self.output_tokens)),
        )


@dataclass(frozen=True, slots=True)
class CappedTrace:
    """A trace that fits a context length, and how many prompts and outputs had to be cut for it."""

    trace: Trace
    prompts_cut: int
    outputs_cut: int


def _check_rows(wrong: NDArray[np.bool_], complaint: str) -> None:
    if wrong.any():
        raise TraceError(f"row {int(np.argmax(wrong)) + 1}: {complaint}")
